"""What guided upsampling brings to the network of the quickstart, beside two controls.

python benchmarks/guided_upsampling.py                      # four arms, three seeds
python benchmarks/guided_upsampling.py --seeds 0 --steps 50 # a quick look

Every arm fine-tunes the same weights on the same drawn scenes in the same order. `plain` is the
network as it is; `filter` and `full` have a guided filter behind their interpolation, with one
spatial filter or a matrix of classes at every tap; `constant` is `full` with a kernel that adapts
to nothing: what it gains, it gains by its parameters. Held-out scenes, and the pixels at outlines
among them. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from train_quickstart import BATCH, HELD_OUT_SEEDS, TRAIN_SEEDS, confusion, draw, left, near_outline

import pacswap
from pacswap.scenes import normalize
from pacswap.zoo.scene_net import SceneNet

WEIGHTS = Path(__file__).parents[1] / "recipes" / "quickstart.safetensors"
ARMS = {
    "plain": None,
    "filter": {"filter": {"weights": "filter"}},
    "full": {"filter": {"weights": "full"}},
    "constant": {"filter": {"weights": "full"}, "kernel": {"form": "constant"}},
}
LR = {"added": 3e-3, "rest": 3e-4}


def build(arm: str) -> nn.Module:
    """The network of an arm, with the quickstart's weights."""
    model = SceneNet()
    model.load_state_dict(load_file(WEIGHTS))
    options = ARMS[arm]
    if options is None:
        return model
    guidance = {"from": ["input", "stem"], "channels": 8}
    example = torch.empty(1, 3, 96, 128)
    return pacswap.swap(
        model, "interpolate", guidance, operation="upsample", example_input=example, **options
    )


def fine_tune(model: nn.Module, data: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    """AdamW on a cosine; the head and what was added, norms in eval mode."""
    images, masks = data
    added = set(pacswap.surgery.plan_of(model).added_parameters()) if _is_upgraded(model) else set()
    groups: dict[str, list[nn.Parameter]] = {"added": [], "rest": []}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in added or name.startswith("head."))
        if parameter.requires_grad:
            groups["added" if name in added else "rest"].append(parameter)
    optimizer = torch.optim.AdamW([{"params": p, "lr": LR[n]} for n, p in groups.items() if p])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    model.eval()  # dropout and statistics as they are: the arms differ in nothing else
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(normalize(images[batch])), masks[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(mIoU, mIoU among the pixels at outlines) on the held-out scenes, in percent."""
    images, masks = data
    predicted = torch.cat([model(normalize(part)).argmax(1) for part in images.split(BATCH)])
    outline = near_outline(masks)
    return _miou(predicted, masks), _miou(predicted[outline], masks[outline])


def _miou(predicted: Tensor, target: Tensor) -> float:
    counts = confusion(predicted, target).double()
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return 100 * iou.mean().item()


def _is_upgraded(model: nn.Module) -> bool:
    return bool(pacswap.surgery.pac_layers(model))


def main() -> None:
    """Parse the command line, run every arm with every seed, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120, help="batches of 16 (%(default)s)")
    options = parser.parse_args()
    train, test = draw(TRAIN_SEEDS[:320], "drawing"), draw(HELD_OUT_SEEDS[:120], "held out")
    start = measure(build("plain").eval(), test)
    print(f"before fine-tuning: mIoU {start[0]:.2f}, at outlines {start[1]:.2f}", flush=True)
    results: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    runs = [(seed, arm) for seed in options.seeds for arm in ARMS]
    began = time.perf_counter()
    for done, (seed, arm) in enumerate(runs, start=1):
        model = build(arm)
        fine_tune(model, train, options.steps, seed)
        results[arm].append(measure(model, test))
        score = "mIoU {:.2f}, at outlines {:.2f}".format(*results[arm][-1])
        print(f"seed {seed}, {arm}: {score}; {left(began, done / len(runs))}", flush=True)
    print("\n| arm | mIoU | at outlines | difference to plain, at outlines |\n|---|---|---|---|")
    for arm, scores in results.items():
        cells = [" ".join(f"{score[i]:.2f}" for score in scores) for i in (0, 1)]
        gains = [
            f"{a - b:+.2f}, {c - d:+.2f}"
            for (a, c), (b, d) in zip(scores, results["plain"], strict=True)
        ]
        mean = statistics.mean(
            score[0] - base[0] for score, base in zip(scores, results["plain"], strict=True)
        )
        print(f"| {arm} | {cells[0]} | {cells[1]} | {'; '.join(gains)} (mean mIoU {mean:+.2f}) |")


if __name__ == "__main__":
    main()
