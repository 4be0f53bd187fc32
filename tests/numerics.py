"""How tests compare numbers, and the geometries they compare them on.

Every helper raises with the figures; none returns a verdict that a test could drop.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.ops.window import Padding, Size2, Window, make_window

BACKENDS = ("taps", "eager", "loops")
HALVES = (torch.bfloat16, torch.float16)

# What the helpers below say of numbers that differ.
DIFFERS = r"max \|difference\|"

# The order in which these are summed is all that differs between two float64 results.
CLOSE64 = 1e-12

# For torch's gradcheck: along one direction drawn at random instead of every axis in turn. The
# tolerance is far below torch's own, which grows with the sizes and would hide a wrong derivative.
ONE_DIRECTION = {"fast_mode": True, "atol": 1e-7}


@dataclass(frozen=True)
class Case:
    """One convolution, small enough for every dtype and every derivative."""

    kernel_size: Size2 = 3
    stride: Size2 = 1
    padding: Padding = 0
    dilation: Size2 = 1
    padding_mode: str = "zeros"
    groups: int = 1
    channels: tuple[int, int] = (4, 6)  # in, out
    image: tuple[int, int, int] = (2, 7, 8)  # B, H, W

    @property
    def geometry(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "padding_mode")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.geometry, "groups": self.groups}

    @property
    def window(self) -> Window:
        return make_window(self.kernel_size, **self.geometry)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        B, H, W = self.image
        return B, self.channels[1], *self.window.output_size(H, W)

    @property
    def centre_in_padding(self) -> bool:
        """Whether some output pixel lies on no pixel of the image, but on its border of zeros."""
        inside = self.window.inside(*self.image[1:], torch.device("cpu"))
        return inside is not None and not inside[:, self.window.centre].all().item()

    def tensors(self, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> dict[str, Tensor]:
        """What the convolution takes, drawn in float64 and rounded to `dtype`."""
        B, H, W = self.image
        C_in, C_out = self.channels
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "input": (B, C_in, H, W),
            "guidance": (B, 3, H, W),
            "weight": (C_out, C_in // self.groups, *self.window.kernel_size),
            "bias": (C_out,),
            "cotangent": self.output_shape,
        }
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }
        drawn["blend"] = torch.tensor(0.7, dtype=torch.float64)
        drawn["bandwidth"] = torch.tensor(1.6, dtype=torch.float64)
        return {name: tensor.to(dtype) for name, tensor in drawn.items()}

    def conv(self, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
        """torch's own convolution, with the weight and bias of `tensors`."""
        given = self.tensors(dtype)
        conv = nn.Conv2d(
            *self.channels, self.window.kernel_size, **self.options, device="meta", dtype=dtype
        )
        conv.weight, conv.bias = nn.Parameter(given["weight"]), nn.Parameter(given["bias"])
        return conv


CASES = {
    "1x1": Case(1),
    "1x1_s2": Case(1, stride=2),
    "1x1_s3_p1": Case(1, stride=3, padding=1),
    "3x3_valid": Case(padding="valid"),
    "3x3_p1": Case(padding=1),
    "3x3_p2": Case(padding=2),
    "3x3_same_d2": Case(padding="same", dilation=2),
    "3x3_s2_p1": Case(stride=2, padding=1),
    "3x3_s3x2_p1x0": Case(stride=(3, 2), padding=(1, 0)),
    "3x3_d2x1_p2x1": Case(dilation=(2, 1), padding=(2, 1)),
    "3x3_d4_p4": Case(dilation=4, padding=4),
    "3x3_s2_d2_p2": Case(stride=2, dilation=2, padding=2),
    "5x5_p2_small_image": Case(5, padding=2, image=(2, 2, 3)),
    "3x3_p1_one_pixel": Case(padding=1, image=(1, 1, 1)),
    "7x7_s2_p3": Case(7, stride=2, padding=3),
    "1x5_p0x2": Case((1, 5), padding=(0, 2)),
    "5x3_s1x2": Case((5, 3), stride=(1, 2)),
    "2x2": Case(2),
    "2x2_p1": Case(2, padding=1),
    "2x2_s3": Case(2, stride=3),
    "4x4_same": Case(4, padding="same"),
    "4x4_s2_p1": Case(4, stride=2, padding=1),
    "reflect": Case(padding=1, padding_mode="reflect"),
    "reflect_5x5_s2": Case(5, stride=2, padding=2, padding_mode="reflect"),
    "replicate": Case(padding=(1, 2), padding_mode="replicate"),
    "replicate_same_2x2": Case(2, padding="same", padding_mode="replicate"),
    "circular": Case(padding=1, padding_mode="circular"),
    "circular_same_4x4": Case(4, padding="same", padding_mode="circular"),
    "groups2": Case(padding=1, groups=2),
    "groups2_to_1_each": Case(padding=1, groups=2, channels=(6, 2)),
    "depthwise": Case(padding=1, groups=4, channels=(4, 4)),
    "depthwise_times_2": Case(padding=1, groups=4, channels=(4, 8)),
    "depthwise_5x5_s2": Case(5, stride=2, padding=2, groups=4, channels=(4, 4)),
    "prime_sizes": Case(padding=1, channels=(5, 7), image=(3, 11, 13)),
    "batch_of_1": Case(padding=1, image=(1, 6, 5)),
    "one_channel": Case(padding=1, channels=(1, 1)),
}

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
FEW = ("3x3_p1", "3x3_s2_d2_p2", "4x4_s2_p1", "circular", "groups2", "depthwise_times_2")
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


def fresh_memory_is_nan() -> Iterator[None]:
    """A fixture's body: what `torch.empty` gives and nobody fills shows up in the results."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # this alone fills it
    torch.set_num_threads(1)  # on tensors so small a second one only costs
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def plain(case: Case, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution as torch computes it, padding modes and all."""
    with warnings.catch_warnings():
        # An even side with padding="same" costs a copy, says torch.
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        return case.conv()._conv_forward(input, weight, bias)


def pac(
    case: Case,
    given: Mapping[str, Tensor],
    backend: str,
    *,
    derivatives: bool = True,
    **kernel_options: Any,
) -> dict[str, Tensor]:
    """A pixel-adaptive convolution from guidance to output, and the gradient of all it was given.

    Returns:
        output, kernel, and (with `derivatives`) a `grad_*` for every tensor of `given` but the
        cotangent.
    """
    # Not cloned: strides are part of the case.
    leaves = {name: t.detach().requires_grad_(derivatives) for name, t in given.items()}
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
    output = ops.pac_conv2d(
        leaves["input"], kernel, leaves["weight"], leaves["bias"], **case.options, backend=backend
    )
    results = {"output": output.detach(), "kernel": kernel.detach()}
    if derivatives:
        grads = torch.autograd.grad(output, list(leaves.values()), cotangent.detach())
        results |= {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return results


def wide(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64."""
    return {name: tensor.double() for name, tensor in given.items()}


def error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference, in float64; NaN and infinity are infinitely wrong."""
    if value.shape != truth.shape:
        raise AssertionError(f"shape {list(value.shape)}, expected {list(truth.shape)}")
    if value.numel() == 0:
        return 0.0
    worst = (value.double() - truth.double()).abs().max().item()
    return worst if worst == worst else float("inf")


def scale(truth: Tensor) -> float:
    return truth.abs().max().item() if truth.numel() else 0.0


def assert_close64(
    value: Tensor, truth: Tensor, *, relative: float = CLOSE64, name: str = "value"
) -> None:
    """Raise unless both are float64 and differ by at most `relative` times the largest number."""
    if (value.dtype, truth.dtype) != (torch.float64, torch.float64):
        raise AssertionError(f"{name}: expected float64 twice, got {value.dtype}, {truth.dtype}")
    worst, allowed = error(value, truth), relative * scale(truth)
    if not worst <= allowed:
        raise AssertionError(
            f"{name}: max |difference| {worst:.3g} > {allowed:.3g} = {relative:g} × max |truth|"
        )


def assert_as_good_as(
    value: Tensor, truth: Tensor, baseline: Tensor, factor: float, *, name: str = "value"
) -> None:
    """Raise unless `value` errs at most `factor` times as much as a baseline of its own dtype.

    Args:
        value: under test.
        truth: the float64 reference on the same rounded inputs.
        baseline: the plain way to compute it, in the dtype of `value`.
        factor: 2 for outputs and 3 for gradients.
        name: for the message.
    """
    if truth.dtype != torch.float64 or value.dtype != baseline.dtype:
        raise AssertionError(
            f"{name}: expected a float64 truth and one dtype, got truth {truth.dtype}, "
            f"value {value.dtype}, baseline {baseline.dtype}"
        )
    # No number of this dtype is nearer than half a unit in the last place: a baseline that happened
    # to hit the truth must not forbid that.
    floor = torch.finfo(value.dtype).eps / 2 * scale(truth)
    worst, allowed = error(value, truth), factor * error(baseline, truth) + floor
    if not worst <= allowed:
        raise AssertionError(
            f"{name}: max |difference| {worst:.3g} > {allowed:.3g} = {factor:g} × baseline + floor "
            f"(baseline {error(baseline, truth):.3g}, floor {floor:.3g})"
        )


def assert_equal(value: Tensor, truth: Tensor, *, name: str = "value") -> None:
    """Raise unless dtype, shape and every bit agree."""
    if value.dtype != truth.dtype or not torch.equal(value, truth):
        raise AssertionError(
            f"{name}: {value.dtype} and {truth.dtype} differ by {error(value, truth):.3g}, "
            "expected the same bits"
        )


def assert_all_close64(
    values: Mapping[str, Tensor], truths: Mapping[str, Tensor], *, relative: float = CLOSE64
) -> None:
    """`assert_close64` for every quantity of one calculation; both sides hold the same names."""
    if list(values) != list(truths) or not values:
        raise AssertionError(f"expected the quantities {list(truths)}, got {list(values)}")
    for name, value in values.items():
        assert_close64(value, truths[name], relative=relative, name=name)


def source(index: int, length: int, mode: str) -> int | None:
    """The pixel that a place in the border repeats; None for a zero."""
    if 0 <= index < length:
        return index
    if mode == "reflect":
        return -index if index < 0 else 2 * (length - 1) - index
    if mode == "replicate":
        return min(max(index, 0), length - 1)
    return index % length if mode == "circular" else None


def looped_smooth(f: Any, filter: Any, window: Window, y: int, x: int) -> Any:
    """The features [D] at a window's centre (y, x), smoothed with zeros beyond the image."""
    H, W = f.shape[1:]
    if window.padding_mode != "zeros":
        y, x = (source(v, n, window.padding_mode) for v, n in ((y, H), (x, W)))
    total = np.zeros(len(f))
    for i, j in product(*map(range, filter.shape)):
        row, column = y + i - filter.shape[0] // 2, x + j - filter.shape[1] // 2
        if 0 <= row < H and 0 <= column < W:
            total += filter[i, j] * f[:, row, column]
    return total


def looped_taps(f: Any, window: Window, p: tuple[int, int], mask: Any, filter: Any) -> Any:
    """At output pixel p: f_q − f_p [taps, D], which taps are inside, which of them are valid."""
    corner = [v * s - pad for v, s, pad in zip(p, window.stride, window.pad[2::-2], strict=True)]
    middle = ((window.kernel_size[0] - 1) // 2, (window.kernel_size[1] - 1) // 2)
    H, W = f.shape[1:]

    def at(i: int, j: int) -> tuple[Any, bool, bool]:
        y = source(corner[0] + i * window.dilation[0], H, window.padding_mode)
        x = source(corner[1] + j * window.dilation[1], W, window.padding_mode)
        if y is None or x is None:
            return np.zeros(len(f)), False, False
        return f[:, y, x], True, bool(mask is None or mask[y, x] > 0)

    seen = [at(i, j) for i, j in product(*map(range, window.kernel_size))]
    centre = at(*middle)[0]
    if filter is not None:
        places = (c + m * d for c, m, d in zip(corner, middle, window.dilation, strict=True))
        centre = looped_smooth(f, filter, window, *places)
    features, inside, valid = (np.array(values) for values in zip(*seen, strict=True))
    return features - centre, inside, valid


def looped_kernel(
    guidance: Tensor,
    window: Window,
    *,
    form: str = "gaussian",
    alpha: Any = 0.0,
    lambd: Any = -1.0,
    asymmetric: bool = False,
    smoothing: Tensor | None = None,
    channel_wise: bool = False,
    mask: Tensor | None = None,
    distance: str = "sum",
    bandwidth: Any = 1.0,
    normalize: str = "none",
    blend: Any = 1.0,
) -> Tensor:
    """`adapting_kernel` pixel by pixel, from its docstring and without torch."""
    B, D, H, W = guidance.shape
    f, width, a, b = guidance.numpy(), float(bandwidth), np.asarray(alpha), np.asarray(lambd)
    filter = None if smoothing is None else smoothing.numpy()
    size = window.output_size(H, W)
    result = np.zeros((B, D if channel_wise else 1, window.taps, *size))
    for n, y, x in product(range(B), *map(range, size)):
        hidden = None if mask is None else mask[n, 0].numpy()
        difference, inside, valid = looped_taps(f[n], window, (y, x), hidden, filter)
        if asymmetric:
            difference = np.maximum(difference, 0)
        d = np.abs(difference) if form == "laplacian" else difference**2
        if not channel_wise:
            d = (d.sum(1) if distance == "sum" else d.mean(1))[:, None]
        kernel = {
            "constant": lambda d: np.ones_like(d),
            "laplacian": lambda d: np.exp(-d / width),
            "gaussian": lambda d: np.exp(-0.5 * d / width**2),
            "inverse": lambda d: a + (d / width**2 + 1e-4) ** (0.5 * b),
        }[form](d).T  # [1 or D, taps]
        counted = inside if mask is None else valid
        if normalize == "sum":
            total = (kernel * counted).sum(1, keepdims=True)
            kernel = kernel * counted / np.where(total == 0, 1, total)
        if normalize == "mean":
            outside = ~(inside & inside[window.centre])
            kernel = np.where(outside, 1, kernel) * (1 if mask is None else valid)
            total = kernel.sum(1, keepdims=True)
            kernel = kernel * window.taps / np.where(total == 0, 1, total)
        kernel = 1 + float(blend) * (kernel - 1)
        if mask is not None:
            share = inside.sum() / max(valid.sum(), 1) if normalize == "none" else 1
            kernel = kernel * valid * share
        result[n, :, :, y, x] = kernel
    return torch.from_numpy(result)
