"""Convolutions of one and three axes for the tests, and an oracle that visits every tap."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numerics import source
from torch import Tensor, nn

from pacswap import ops
from pacswap.ops.dimensions import AnyWindow, any_window

CONVS = {1: nn.Conv1d, 3: nn.Conv3d}
OPERATIONS = {1: ops.pac_conv1d, 3: ops.pac_conv3d}


@dataclass(frozen=True)
class Line:
    """One convolution of a sequence or a volume, small enough for every dtype and derivative."""

    kernel_size: tuple[int, ...]
    size: tuple[int, ...]
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    padding_mode: str = "zeros"
    groups: int = 1
    channels: tuple[int, int] = (4, 6)
    batch: int = 2

    @property
    def axes(self) -> int:
        return len(self.kernel_size)

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "padding_mode")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.geometry, "groups": self.groups}

    @property
    def window(self) -> AnyWindow:
        return any_window(self.kernel_size, **self.geometry)

    @property
    def output_size(self) -> tuple[int, ...]:
        return self.window.output_size(*self.size)

    def tensors(self, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> dict[str, Tensor]:
        C_in, C_out = self.channels
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "input": (self.batch, C_in, *self.size),
            "guidance": (self.batch, 3, *self.size),
            "weight": (C_out, C_in // self.groups, *self.kernel_size),
            "bias": (C_out,),
            "cotangent": (self.batch, C_out, *self.output_size),
        }
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        drawn["blend"] = torch.tensor(0.7, dtype=torch.float64)
        drawn["bandwidth"] = torch.tensor(1.6, dtype=torch.float64)
        return {name: tensor.to(dtype) for name, tensor in drawn.items()}

    def conv(self, dtype: torch.dtype = torch.float64) -> Any:
        """torch's own convolution, with the weight and bias of `tensors`."""
        given = self.tensors(dtype)
        conv = CONVS[self.axes](
            *self.channels, self.kernel_size, **self.options, device="meta", dtype=dtype
        )
        conv.weight, conv.bias = nn.Parameter(given["weight"]), nn.Parameter(given["bias"])
        return conv

    def plain(self, given: Mapping[str, Tensor]) -> Tensor:
        """The convolution as torch computes it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
            conv = self.conv(given["input"].dtype)
            return conv._conv_forward(given["input"], given["weight"], given["bias"])


CASES = {
    "line_p1": Line((3,), (7,), padding=1),
    "line_1": Line((1,), (5,)),
    "line_s2_d2_p2": Line((3,), (9,), stride=2, dilation=2, padding=2),
    "line_even_same": Line((4,), (7,), padding="same"),
    "line_reflect": Line((5,), (6,), padding=2, padding_mode="reflect"),
    "line_circular": Line((3,), (6,), padding="same", padding_mode="circular"),
    "line_depthwise": Line((3,), (6,), padding=1, groups=4, channels=(4, 8)),
    "line_of_one_channel": Line((3,), (8,), padding=1, channels=(1, 1)),
    "3x3x3_p1": Line((3, 3, 3), (3, 4, 5), padding=1),
    "1x3x3": Line((1, 3, 3), (2, 4, 5), padding=(0, 1, 1)),
    "3x1x1": Line((3, 1, 1), (4, 2, 3), padding=(1, 0, 0)),
    "3x1x1_d2_s2": Line((3, 1, 1), (6, 2, 2), padding=(2, 0, 0), dilation=(2, 1, 1), stride=2),
    "3x2x3_mixed": Line(
        (3, 2, 3), (5, 5, 6), stride=(2, 1, 2), padding=(1, 1, 0), dilation=(1, 2, 1)
    ),
    "2x2x2_same": Line((2, 2, 2), (3, 3, 3), padding="same"),
    "2x4x2_s2_p1": Line((2, 4, 2), (3, 4, 4), stride=2, padding=1),
    "3x3x3_p2_one_frame": Line((3, 3, 3), (1, 2, 2), padding=2),
    "replicate": Line((3, 3, 3), (3, 3, 4), padding=(2, 1, 1), padding_mode="replicate"),
    "reflect": Line((3, 3, 3), (3, 3, 4), padding=1, padding_mode="reflect"),
    "circular": Line((3, 1, 3), (3, 2, 4), padding=(1, 0, 1), padding_mode="circular"),
    "groups2": Line((3, 3, 1), (3, 3, 3), padding=(1, 1, 0), groups=2),
    "depthwise": Line((3, 3, 3), (3, 3, 3), padding=1, groups=4, channels=(4, 4)),
    "many_channels": Line((2, 2, 2), (3, 3, 3), channels=(36, 5), batch=1),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FEW = ("line_p1", "line_s2_d2_p2", "3x3x3_p1", "3x2x3_mixed", "circular", "depthwise")
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


def pads(case: Line) -> list[int]:
    """What is padded before each axis."""
    steps = case.dilation if isinstance(case.dilation, tuple) else (case.dilation,) * case.axes
    if case.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(steps, case.kernel_size, strict=True)]
    return list(case.padding) if isinstance(case.padding, tuple) else [case.padding] * case.axes


def place(case: Line, output: tuple[int, ...], tap: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where a tap of an output pixel looks; None for a zero of the border."""
    steps, strides = (
        value if isinstance(value, tuple) else (value,) * case.axes
        for value in (case.dilation, case.stride)
    )
    found = []
    for axis in range(case.axes):
        index = output[axis] * strides[axis] - pads(case)[axis] + tap[axis] * steps[axis]
        found.append(source(index, case.size[axis], case.padding_mode))
    return None if None in found else tuple(found)  # type: ignore[arg-type]


@functools.cache
def oracle(case: Line, form: str = "gaussian", **options: Any) -> Any:
    """The output and K of `case.tensors()`, number by number.

    Returns:
        (output [B, C_out, *output size], K [B, 1, taps, *output size]).
    """
    every = [tuple(at) for at in itertools.product(*map(range, case.kernel_size))]
    middle = tuple((k - 1) // 2 for k in case.kernel_size)
    given = case.tensors()
    x, f, w, b = (given[name] for name in ("input", "guidance", "weight", "bias"))
    width, blend = given["bandwidth"].item(), given["blend"].item()
    D, per = f.shape[1], case.channels[0] // case.groups
    kernel = torch.zeros(case.batch, 1, len(every), *case.output_size, dtype=torch.float64)
    output = torch.zeros(case.batch, case.channels[1], *case.output_size, dtype=torch.float64)
    if options.get("standardize"):
        flat = f.flatten(2)
        mean, variance = flat.mean(2, keepdim=True), flat.var(2, unbiased=False, keepdim=True)
        f = ((flat - mean) / torch.sqrt(variance + 1e-6 * mean**2 + 1e-12)).view(f.shape)

    def feature(n: int, channel: int, at: tuple[int, ...] | None) -> float:
        return 0.0 if at is None else f[(n, channel, *at)].item()

    for n in range(case.batch):
        for p in itertools.product(*map(range, case.output_size)):
            places = [place(case, p, tap) for tap in every]
            centre = place(case, p, middle)
            values = []
            for at in places:
                parts = [feature(n, c, at) - feature(n, c, centre) for c in range(D)]
                d = sum(abs(v) if form == "laplacian" else v * v for v in parts)
                d = d / D if options.get("distance") == "mean" else d
                values.append(
                    {
                        "gaussian": lambda d: math.exp(-0.5 * d / width**2),
                        "laplacian": lambda d: math.exp(-d / width),
                        "inverse": lambda d: 0.3 + (d / width**2 + 1e-4) ** -0.25,
                        "constant": lambda d: 1.0,
                    }[form](d)
                )
            if options.get("normalize") == "sum":
                values = [0 if at is None else v for v, at in zip(values, places, strict=True)]
                values = [v / (sum(values) or 1) for v in values]
            if options.get("normalize") == "mean":
                lone = centre is None
                values = [
                    1 if lone or at is None else v for v, at in zip(values, places, strict=True)
                ]
                values = [v * len(every) / sum(values) for v in values]
            values = [1 + blend * (v - 1) for v in values]
            for t, value in enumerate(values):
                kernel[(n, 0, t, *p)] = value
            for o in range(case.channels[1]):
                total, first = b[o].item(), o // (case.channels[1] // case.groups) * per
                for at, tap, value in zip(places, every, values, strict=True):
                    if at is not None:
                        total += value * sum(
                            w[(o, c, *tap)].item() * x[(n, first + c, *at)].item()
                            for c in range(per)
                        )
                output[(n, o, *p)] = total
    return output, kernel


def pac(
    case: Line, given: Mapping[str, Tensor], backend: str = "auto", **kernel_options: Any
) -> dict[str, Tensor]:
    """From guidance to output, and the gradient of all it was given."""
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    cotangent = leaves.pop("cotangent")
    kernel = ops.adapting_kernel(
        leaves["guidance"],
        case.kernel_size,
        **case.geometry,
        bandwidth=leaves["bandwidth"],
        blend=leaves["blend"],
        backend=backend,
        **kernel_options,
    )
    output = OPERATIONS[case.axes](
        leaves["input"], kernel, leaves["weight"], leaves["bias"], **case.options, backend=backend
    )
    grads = torch.autograd.grad(
        output, list(leaves.values()), cotangent.detach(), materialize_grads=True
    )
    results = {"output": output.detach(), "kernel": kernel.detach()}
    return results | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
