"""One layer: pixel-adaptive against plain convolution, forward and forward with backward, in turns.

    python benchmarks/layers.py [--seconds 2] [--backend auto|taps|reference]

Prints, for each shape, the median of the ratio pac/conv over pairs timed in turns in this process,
with the smallest and the largest. The adapting kernel is computed beforehand: `kernel` is its own
row's ratio to the convolution. Ratios from one run compare; absolute times on shared machines
don't.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pacswap import ops

# name, C_in, C_out, kernel, groups, H=W, dilation
SHAPES = (
    ("VGG conv3_3", 256, 256, 3, 1, 56, 1),
    ("ResNet layer2 conv2", 128, 128, 3, 1, 28, 1),
    ("C=64 at 128×128", 64, 64, 3, 1, 128, 1),
    ("DeepLab atrous", 512, 256, 3, 1, 28, 12),
    ("ConvNeXt depthwise 7×7", 384, 384, 7, 384, 14, 1),
    ("MobileNet depthwise 3×3", 144, 144, 3, 144, 56, 1),
)
GUIDANCE_CHANNELS = 16


def main() -> None:
    """Measure every shape and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per figure")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    print(f"{'layer':<26}{'forward':>20}{'forward+backward':>20}{'kernel':>20}")
    for name, *shape in SHAPES:
        cells = [ratio(a, b, options.seconds) for a, b in contenders(shape, options.backend)]
        print(f"{name:<26}" + "".join(f"{m:>8.2f} ({lo:.2f}…{hi:.2f})" for m, lo, hi in cells))


Run = Callable[[], object]


def contenders(shape: list[int], backend: str) -> list[tuple[Run, Run]]:
    """(pac, conv) pairs for forward and for forward with backward, and (kernel, conv)."""
    C_in, C_out, k, groups, size, dilation = shape
    torch.manual_seed(0)
    padding = dilation * (k // 2)
    x = torch.randn(1, C_in, size, size)
    w = torch.randn(C_out, C_in // groups, k, k)
    f = torch.randn(1, GUIDANCE_CHANNELS, size, size)
    geometry = {"padding": padding, "dilation": dilation}
    K = ops.adapting_kernel(f, k, standardize=True, distance="mean", **geometry)
    leaves = [t.clone().requires_grad_() for t in (x, K, w)]

    def pac() -> object:
        with torch.no_grad():
            return ops.pac_conv2d(x, K, w, groups=groups, backend=backend, **geometry)

    def conv() -> object:
        with torch.no_grad():
            return F.conv2d(x, w, groups=groups, **geometry)

    def pac_step() -> object:
        y = ops.pac_conv2d(*leaves, groups=groups, backend=backend, **geometry)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    def conv_step() -> object:
        y = F.conv2d(leaves[0], leaves[2], groups=groups, **geometry)
        return torch.autograd.grad(y, [leaves[0], leaves[2]], torch.ones_like(y))

    def kernel() -> object:
        with torch.no_grad():
            return ops.adapting_kernel(f, k, standardize=True, distance="mean", **geometry)

    return [(pac, conv), (pac_step, conv_step), (kernel, conv)]


def ratio(ours: Run, theirs: Run, seconds: float) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of pairs timed in turns."""
    ours(), theirs()
    ratios = []
    began = time.perf_counter()
    while len(ratios) < 5 or time.perf_counter() - began < seconds:
        a, b = seconds_of(ours), seconds_of(theirs)
        ratios.append(a / b)
    return statistics.median(ratios), min(ratios), max(ratios)


def seconds_of(run: Run) -> float:
    """Wall-clock time of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
