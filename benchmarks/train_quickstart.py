"""Train the network of the quickstart on drawn scenes, or measure a weights file on held-out ones.

python benchmarks/train_quickstart.py                                      # trains, then measures
python benchmarks/train_quickstart.py --evaluate recipes/quickstart.safetensors

Nothing is downloaded. Training takes 12 minutes of CPU time: six to eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from pacswap.scenes import CLASSES, draw_batch, normalize
from pacswap.zoo.scene_net import SceneNet

TRAIN_SEEDS = range(0, 1200)
HELD_OUT_SEEDS = range(1_000_000, 1_000_200)
BATCH = 16
WEIGHT_DECAY = 1e-2
PEAK_LR = 3e-3
WARMUP = 0.05  # of the steps


def draw(seeds: Sequence[int], what: str) -> tuple[Tensor, Tensor]:
    """Draw scenes, a line of progress for every tenth of them."""
    started, parts = time.perf_counter(), []
    portion = max(1, len(seeds) // 10)
    for first in range(0, len(seeds), portion):
        parts.append(draw_batch(seeds[first : first + portion]))
        done = min(first + portion, len(seeds))
        print(f"{what}: {done}/{len(seeds)} scenes, {left(started, done / len(seeds))}", flush=True)
    images, masks = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(masks)


def left(started: float, done: float) -> str:
    """The time left, from the time taken for the part that is done, 0..1."""
    return f"{(time.perf_counter() - started) * (1 / done - 1):.0f} s left"


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Vary exposure and tint of each image [B, 3, H, W]."""
    spread = torch.rand((len(images), 3, 1, 1), generator=generator) - 0.5
    gain = torch.rand((len(images), 1, 1, 1), generator=generator) - 0.5
    return (images * (1 + 0.3 * gain + 0.1 * spread)).clamp(0, 1)


def train(model: SceneNet, steps: int, seed: int) -> None:
    """AdamW on a one-cycle cosine, batches of flipped and re-exposed scenes."""
    images, masks = draw(TRAIN_SEEDS, "drawing")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=WARMUP, anneal_strategy="cos"
    )
    model.train()
    order, started, smooth = torch.empty(0, dtype=torch.int64), time.perf_counter(), None
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(images), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        inputs, target = augment(images[batch], generator), masks[batch]
        flipped = torch.rand(len(batch), generator=generator) < 0.5
        inputs[flipped], target[flipped] = inputs[flipped].flip(-1), target[flipped].flip(-1)
        inputs = normalize(inputs).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            print(
                f"step {step}/{steps}: loss {smooth:.3f}, {left(started, step / steps)}", flush=True
            )


def confusion(predicted: Tensor, target: Tensor) -> Tensor:
    """How often class `row` was called `column`. [C, C], int64."""
    pairs = target * len(CLASSES) + predicted
    return torch.bincount(pairs.flatten(), minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)


def near_outline(masks: Tensor) -> Tensor:
    """Which pixels of [B, H, W] have another class among their eight neighbours."""
    classes = masks[:, None].float()
    high, low = F.max_pool2d(classes, 3, 1, 1), -F.max_pool2d(-classes, 3, 1, 1)
    return (high != low)[:, 0]


@torch.no_grad()
def evaluate(model: SceneNet) -> float:
    """Print what the model reaches on the held-out scenes; return its mIoU, 0..1."""
    images, masks = draw(HELD_OUT_SEEDS, "held out")
    model.eval()
    predicted = torch.cat([model(normalize(part)).argmax(1) for part in images.split(BATCH)])
    counts = confusion(predicted, masks).double()
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    outline = near_outline(masks)
    right = (predicted == masks).double()
    for name, value in zip(CLASSES, iou.tolist(), strict=True):
        print(f"  {name:9} IoU {value:.4f}")
    print(f"mIoU {iou.mean():.4f}, pixel accuracy {right.mean():.4f}", end=" ")
    print(f"({right[outline].mean():.4f} at outlines, {right[~outline].mean():.4f} elsewhere)")
    return iou.mean().item()


def write(model: SceneNet, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights whole or not at all."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(save(state, metadata))
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=1000, help="batches of 16 scenes (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("recipes/quickstart.safetensors"))
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only measure these weights")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = SceneNet().to(memory_format=torch.channels_last)
    if options.evaluate is not None:
        model.load_state_dict(load_file(options.evaluate))
        evaluate(model)
        return
    started = time.perf_counter()
    train(model, options.steps, options.seed)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    command = f"python benchmarks/train_quickstart.py --steps {options.steps} --seed {options.seed}"
    write(model, options.out, {"miou": f"{evaluate(model):.4f}", "command": command})


if __name__ == "__main__":
    main()
