"""PAC in loops that numba compiles, for CPUs: near the price of the convolution.

Half precisions are computed in float32.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from pacswap.ops import handwritten
from pacswap.ops.format import as_convolved, unpadded
from pacswap.ops.loops import dense, distance, grouped
from pacswap.ops.measure import Measure
from pacswap.ops.precision import compute_dtype
from pacswap.ops.window import Window

tap_distance, pac_conv2d, attach_kernel_gradient = handwritten.operations(sys.modules[__name__])
tap_exponential = partial(handwritten.tap_exponential, sys.modules[__name__])


def distances(
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> Tensor:
    """As `handwritten.Engine` says, like all that follow."""
    return _distances(guidance, centre, window, measure, None)


def exponentials(
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    measure: Measure,
    divisor: float,
) -> Tensor:
    """In the same pass."""
    return _distances(guidance, centre, window, measure, divisor)


def _distances(
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    measure: Measure,
    divisor: float | None,
) -> Tensor:
    image, plane = _with_border(_raw(guidance), window)
    given, square = None if centre is None else _raw(centre), measure == "square"
    found = distance.distances(image.contiguous(), given, plane, square=square, divisor=divisor)
    return found if found.dtype == guidance.dtype else found.to(guidance.dtype)


def distance_gradients(
    guidance: Tensor,
    centre: Tensor | None,
    grad: Tensor,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> tuple[Tensor, Tensor | None]:
    """Both ends of each difference."""
    image, plane = _with_border(_raw(guidance), window)
    given = (None if centre is None else _raw(centre), _raw(grad).contiguous())
    found, back = distance.gradients(image.contiguous(), *given, plane, square=measure == "square")
    found = _without_border(found, guidance, window).to(guidance.dtype)
    return found, None if back is None else back.to(guidance.dtype)


def convolve(input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """Groups of few channels plane by plane, else block by block in registers."""
    K, W = (_raw(tensor).contiguous() for tensor in (kernel, weight))
    image, plane = _with_border(_raw(input), window)
    size = window.output_size(input.shape[-2], input.shape[-1])
    output = image.new_empty(input.shape[0], weight.shape[0], *size)
    if grouped.fits(weight, groups):
        grouped.convolve(image.contiguous(), K, W, output, plane, groups)
    else:
        dense.convolve(image.contiguous(), K, W, output, plane, groups)
    output = output if output.dtype == input.dtype else output.to(input.dtype)
    return as_convolved(output, image, weight)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """For input, kernel and weight."""
    v, K, W, dY = (_raw(tensor).contiguous() for tensor in (*inputs, grad))
    image, plane = _with_border(v, window)
    image = image.contiguous()
    found: tuple[Tensor | None, ...]
    if W.shape[1] == 1:
        found = grouped.depthwise_gradients(image, K, W, dY, plane)
    else:
        found = dense.gradients(image, K, W, dY, plane, groups, needed)
    grads = [None if g is None or not need else g for g, need in zip(found, needed, strict=True)]
    if grads[0] is not None:
        grads[0] = _without_border(grads[0], inputs[0], window)
    return [None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]


def _raw(tensor: Tensor) -> Tensor:
    """The numbers themselves, in the dtype to compute in: no lazy sign, no zeros without memory."""
    wide = compute_dtype(tensor.dtype)
    if torch._is_zerotensor(tensor):
        return torch.zeros(tensor.shape, dtype=wide, device="cpu")
    if tensor.dtype == wide and not tensor.is_neg():
        return tensor
    return tensor.detach().to(wide).resolve_neg()


def _with_border(image: Tensor, window: Window) -> tuple[Tensor, Window]:
    """The image with a border that is not of zeros, and the window for it."""
    if window.padding_mode == "zeros":
        return image, window
    return window.padded(image), window.unpadded


def _without_border(grad: Tensor, image: Tensor, window: Window) -> Tensor:
    """The gradient of the image from that of what `_with_border` gave."""
    return grad if window.padding_mode == "zeros" else unpadded(grad, image, window)
