"""Train a joint upsampling network on pairs of picture and disparity, and measure it on others.

python benchmarks/joint_upsampling.py --data ../shared/assets/rgbd --out /tmp/joint

The folder holds NAME_rgb.png and NAME_disp.png of one size (Middlebury's are such). Nothing is
downloaded. The network learns what bilinear interpolation leaves, which
takes minutes on a CPU; the whole map takes longer. See docs/joint_upsampling.md.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pacswap.nn.joint import JointBilateralUpsample, JointUpsample

LARGEST = 700  # pixels along a side; larger pairs are halved until they fit
BATCH = 8
LOW = 8  # pixels along the side of a crop of the low-resolution map
PEAK_LR = {"lite": 3e-3, "full": 1e-3}  # at 3e-3 the full width dies; at 1e-3 not measured
WARMUP = 0.05  # of the steps
TIMED = 20  # steps, to see how many fit into the minutes
SIGMAS_SPACE = (0.35, 0.5, 0.7)  # of joint bilateral upsampling, in low-resolution pixels
SIGMAS_COLOR = (0.05, 0.1, 0.2)  # of an image in 0..1
Method = Callable[[Tensor, Tensor], Tensor]  # low, picture → high


class Pair(NamedTuple):
    """A picture [1, 3, H, W] in 0..1 and its disparity [1, 1, H, W] in 0..255."""

    picture: Tensor
    disparity: Tensor


def read(folder: Path, factor: int) -> dict[str, Pair]:
    """The pairs of a folder, cropped to multiples of `factor`."""
    pairs = {}
    for path in sorted(folder.glob("*_rgb.png")):
        name = path.name.removesuffix("_rgb.png")
        picture = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 255
        map_ = torch.from_numpy(np.array(Image.open(folder / f"{name}_disp.png"))).float()
        pair = Pair(picture.permute(2, 0, 1)[None], map_[None, None])
        while max(pair.disparity.shape) > LARGEST:
            pair = Pair(F.avg_pool2d(pair.picture, 2), F.avg_pool2d(pair.disparity, 2))
        H, W = (side // factor * factor for side in pair.disparity.shape[-2:])
        pairs[name] = Pair(*(t[..., :H, :W] for t in pair))
    if not pairs:
        sys.exit(f"no NAME_rgb.png with NAME_disp.png in '{folder}'. Give their folder as --data.")
    return pairs


def lower(disparity: Tensor, factor: int) -> Tensor:
    """The low-resolution map: the mean of each block."""
    return F.avg_pool2d(disparity, factor)


def residual(network: JointUpsample, low: Tensor, picture: Tensor) -> Tensor:
    """Bilinear interpolation and what the network adds to it."""
    size = tuple(picture.shape[-2:])
    return F.interpolate(low, size=size, mode="bilinear", align_corners=False) + network(
        low, picture
    )


def batches(pairs: list[Pair], factor: int, generator: torch.Generator) -> Callable[[], Pair]:
    """A source of random crops, flipped, some with far and near exchanged; disparity in 0..1."""
    side = LOW * factor
    sizes = torch.tensor([math.sqrt(pair.disparity.numel()) for pair in pairs])

    def below(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def crop(pair: Pair) -> Pair:
        H, W = pair.disparity.shape[-2:]
        y, x = below(H - side + 1), below(W - side + 1)
        turned = [axis for axis in (-1, -2) if below(2)]
        picture, disparity = (t[..., y : y + side, x : x + side].flip(turned) for t in pair)
        return Pair(picture, 1 - disparity if below(2) else disparity)

    def batch() -> Pair:
        chosen = torch.multinomial(sizes, BATCH, replacement=True, generator=generator)
        crops = [crop(pairs[i]) for i in chosen.tolist()]
        return Pair(*(torch.cat(tensors) for tensors in zip(*crops, strict=True)))

    return batch


def train(network: JointUpsample, pairs: list[Pair], steps: int, seed: int) -> float:
    """Adam on a cosine with a warm-up, mean squared error; returns the seconds taken."""
    generator = torch.Generator().manual_seed(seed)
    batch = batches([normalized(pair) for pair in pairs], network.factor, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=PEAK_LR[network.width])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate((step + 1) / steps))
    started, said, total, plain = time.perf_counter(), 0.0, 0.0, 0.0
    for step in range(1, steps + 1):
        picture, disparity = batch()
        low = lower(disparity, network.factor)
        loss = F.mse_loss(residual(network, low, picture), disparity)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        bilinear = F.interpolate(low, size=disparity.shape[-2:], mode="bilinear")
        total, plain = total + loss.item(), plain + F.mse_loss(bilinear, disparity).item()
        taken = time.perf_counter() - started
        if taken - said > 10 or (step == steps and steps > TIMED):
            left = taken * (steps / step - 1)
            ratio = math.sqrt(total / plain)
            print(f"step {step}/{steps}: {ratio:.3f} of bilinear's error, {left:.0f} s left")
            sys.stdout.flush()
            said, total, plain = taken, 0.0, 0.0
    return time.perf_counter() - started


def rate(done: float) -> float:
    """The learning rate, as a part of its peak, when a part `done` of the steps is: 0..1."""
    return min(1.0, done / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def normalized(pair: Pair) -> Pair:
    """The pair with its disparity brought to 0..1."""
    least, most = pair.disparity.aminmax()
    return Pair(pair.picture, (pair.disparity - least) / (most - least))


def affordable(network: JointUpsample, pairs: list[Pair], minutes: float, seed: int) -> int:
    """How many steps fit into the minutes, by a trial on a copy."""
    trial = copy.deepcopy(network)
    train(trial, pairs, 3, seed)  # the first steps are slower
    return max(1, round(60 * minutes / (train(trial, pairs, TIMED, seed) / TIMED)))


def learned(network: JointUpsample) -> Method:
    """The trained network as a method; disparity is brought to 0..1 and back."""

    def method(low: Tensor, picture: Tensor) -> Tensor:
        least, most = low.aminmax()
        high = residual(network, (low - least) / (most - least), picture)
        return high * (most - least) + least

    return method


def interpolated(mode: str) -> Method:
    """An interpolation that does not look at the picture."""
    return lambda low, picture: F.interpolate(low, size=tuple(picture.shape[-2:]), mode=mode)


def bilateral(factor: int, space: float, color: float) -> Method:
    """Joint bilateral upsampling over 3×3 low-resolution pixels, strip by strip to save memory."""
    upsample = JointBilateralUpsample(
        factor, kernel_size=3 * factor + 1, sigma_space=space, sigma_color=color
    )

    def method(low: Tensor, picture: Tensor) -> Tensor:
        strips, margin, H = [], 3, low.shape[-2]
        for top in range(0, H, 16):
            bottom = min(top + 16, H)
            first, last = max(0, top - margin), min(bottom + margin, H)
            part = picture[:, :, first * factor : last * factor]
            strip = upsample(low[:, :, first:last], part)
            strips.append(strip[:, :, (top - first) * factor : (bottom - first) * factor])
        return torch.cat(strips, 2)

    return method


@torch.no_grad()
def rmse(method: Method, pair: Pair, factor: int) -> float:
    """Root mean squared error in the disparity's unit."""
    low = lower(pair.disparity, factor)
    return math.sqrt(F.mse_loss(method(low, pair.picture), pair.disparity).item())


def best_bilateral(pairs: list[Pair], factor: int) -> tuple[str, Method]:
    """The widths that are best in the middle of the pairs to train on."""
    middles = [middle(pair, 32 * factor) for pair in pairs]
    tried = {
        (space, color): sum(rmse(bilateral(factor, space, color), p, factor) for p in middles)
        for space in SIGMAS_SPACE
        for color in SIGMAS_COLOR
    }
    space, color = min(tried, key=lambda key: tried[key])
    return f"joint bilateral (σ {space:g} px, {color:g})", bilateral(factor, space, color)


def middle(pair: Pair, side: int) -> Pair:
    """The square in the middle, or as much as there is of it."""
    H, W = pair.disparity.shape[-2:]
    y, x = max(0, (H - side) // 2), max(0, (W - side) // 2)
    return Pair(*(t[..., y : y + side, x : x + side] for t in pair))


def draw(name: str, pair: Pair, ours: Method, factor: int, folder: Path) -> None:
    """Write a picture of what went in, what came out and where it is wrong."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture. pip install matplotlib")
        return
    low = lower(pair.disparity, factor)
    with torch.no_grad():
        plain, made = interpolated("bilinear")(low, pair.picture), ours(low, pair.picture)
    maps = {"low": low, "bilinear": plain, "JointUpsample": made, "truth": pair.disparity}
    errors = {"error of bilinear": plain, "error of JointUpsample": made}
    figure = Figure(figsize=(16, 7), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    axes[0].imshow(pair.picture[0].permute(1, 2, 0).numpy())
    axes[0].set_title(f"guidance: {name}")
    least, most = (bound.item() for bound in pair.disparity.aminmax())
    for axis, (title, values) in zip(axes[1:5], maps.items(), strict=True):
        axis.imshow(values[0, 0].numpy(), vmin=least, vmax=most, interpolation="nearest")
        axis.set_title(f"{title} {values.shape[-2]}×{values.shape[-1]}")
    for axis, (title, values) in zip(axes[5:7], errors.items(), strict=True):
        shown = axis.imshow((values - pair.disparity).abs()[0, 0].numpy(), vmin=0, vmax=15)
        axis.set_title(title)
    figure.colorbar(shown, ax=axes[7], location="left")
    for axis in axes:
        axis.set_axis_off()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"joint_upsampling_{factor}x_{name}.png"
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the pairs")
    parser.add_argument("--factor", type=int, default=4, choices=(4, 8, 16))
    parser.add_argument("--width", default="lite", choices=("lite", "full"))
    parser.add_argument("--test", nargs="+", default=["moebius", "teddy"], help="held-out pairs")
    parser.add_argument("--minutes", type=float, default=5, help="of training (%(default)s)")
    parser.add_argument("--steps", type=int, help="instead of --minutes: the same numbers again")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops (%(default)s)")
    parser.add_argument("--grey", action="store_true", help="show no picture: what is it worth?")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for pictures; none without it")
    return parser.parse_args()


def main() -> None:
    """Train, measure, print, draw."""
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pairs = read(options.data, options.factor)
    unknown = sorted(set(options.test) - set(pairs))
    if unknown or len(options.test) >= len(pairs):
        sys.exit(f"--test takes some of {', '.join(pairs)}, not all; got {options.test}.")
    if options.grey:
        pairs = {n: Pair(torch.full_like(p.picture, 0.5), p.disparity) for n, p in pairs.items()}
    kept = [pair for name, pair in pairs.items() if name not in options.test]
    network = JointUpsample(options.factor, width=options.width)
    steps = options.steps or affordable(network, kept, options.minutes, options.seed)
    seconds = train(network, kept, steps, options.seed)
    print(f"trained {steps} steps in {seconds:.0f} s; again: --steps {steps}")
    ours = learned(network.eval())
    methods = {mode: interpolated(mode) for mode in ("nearest", "bilinear", "bicubic")}
    methods |= [best_bilateral(kept, options.factor)]
    methods[f"JointUpsample, {options.width}, {seconds / 60:.1f} min"] = ours
    print(f"{f'RMSE at {options.factor}×':36}" + "".join(f"{n:>10}" for n in options.test))
    for title, method in methods.items():
        figures = [rmse(method, pairs[name], options.factor) for name in options.test]
        print(f"{title:36}" + "".join(f"{figure:10.3f}" for figure in figures))
    for name in options.test if options.out is not None else ():
        draw(name, pairs[name], ours, options.factor, options.out)


if __name__ == "__main__":
    main()
