"""The Triton programs of PAC alone, each configuration, against what cuDNN takes for the same.

    python benchmarks/programs.py [--dtype bfloat16] [--layers GLOB …]

Prints TFLOP/s of `F.conv2d`'s forward pass and its two gradients, then of each configuration of the
programs that do the same for PAC, by `triton.testing.do_bench`: no launch, no change of memory
format. Channels last. Needs an NVIDIA GPU; takes a minute.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from pacswap.ops.gpu import launch, tuning
from pacswap.ops.gpu.geometry import Geometry
from pacswap.ops.window import make_window

# Images, channels, side.
LAYERS = {
    "128@56 b8": (8, 128, 56),
    "256@64 b8": (8, 256, 64),
    "512@32 b8": (8, 512, 32),
    "256@28 b1": (1, 256, 28),
    "64@128 b8": (8, 64, 128),
}


def main(words: list[str] | None = None, device: str = "cuda") -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--layers", nargs="+", metavar="GLOB", default=["*"])
    options = parser.parse_args(words)
    for name, (B, C, H) in LAYERS.items():
        if any(fnmatch(name, glob) for glob in options.layers):
            made: dict[str, Any] = {"device": device, "dtype": getattr(torch, options.dtype)}
            of_layer(name, B, C, H, made)


def of_layer(name: str, B: int, C: int, H: int, made: dict[str, Any]) -> None:
    """Print the figures of a 3×3 layer of C channels on B images of H×H."""
    last = torch.channels_last
    x, dy = (torch.randn(B, C, H, H, **made).to(memory_format=last) for _ in range(2))
    w = (torch.randn(C, C, 3, 3, **made) / (9 * C) ** 0.5).to(memory_format=last)
    K = torch.rand(B, 1, 9, H, H, **made)
    operations = 2 * 9 * C * C * B * H * H

    def backward(*wanted: bool) -> Any:
        sides: Any = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False]
        return torch.ops.aten.convolution_backward(dy, x, w, None, *sides)

    print(f"{name}: conv2d {rate(operations, lambda: F.conv2d(x, w, padding=1)):.0f} TFLOP/s, "
          f"its input's gradient {rate(operations, lambda: backward(True, False)):.0f}, "
          f"its weight's {rate(operations, lambda: backward(False, True)):.0f}")  # fmt: skip

    def each(program: tuning.Program, grid: Any, on: Tensor, given: dict[str, Any]) -> None:
        arguments = {n: given[n] for n in program.function.arg_names if n in given}
        for config in program.configs:
            if tuning.fits(config, given, on):
                options = config.all_kwargs()

                def run(options: dict[str, Any] = options) -> None:
                    program.function[grid](**arguments, **options)

                print(f"    {program.function.fn.__name__:<16} "
                      f"{rate(operations, run):4.0f}  {options}", flush=True)  # fmt: skip

    geometry = Geometry.of(make_window(3, padding=1), H, H)
    right, launch.run = launch.run, each
    try:
        launch.pac_conv2d(x, K, w, geometry, 1, True)
        launch.pull(dy, x, K, w, geometry, 1, True, True)
        launch.weight_gradient(dy, x, K, w, geometry, 1)
    finally:
        launch.run = right


def rate(operations: int, run: Any) -> float:
    """TFLOP/s of what takes so many operations."""
    run()
    took: float = triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median")
    return operations / took / 1e9


if __name__ == "__main__":
    main()
