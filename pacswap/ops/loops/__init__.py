"""PAC in loops that numba compiles, for CPUs: near the price of the convolution.

Half precisions are computed in float32.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pacswap.ops import handwritten
from pacswap.ops.format import as_convolved, unpadded
from pacswap.ops.loops import dense, depthwise, distance
from pacswap.ops.loops.planes import Layout
from pacswap.ops.measure import Measure
from pacswap.ops.precision import compute_dtype
from pacswap.ops.window import Window

_ENGINE: Any = sys.modules[__name__]
tap_distance = partial(handwritten.tap_distance, _ENGINE)
pac_conv2d = partial(handwritten.pac_conv2d, _ENGINE)
attach_kernel_gradient = partial(handwritten.attach_kernel_gradient, _ENGINE)


def distances(
    padded: Tensor,
    centre: Tensor | None,
    window: Window,
    size: tuple[int, int],
    measure: Measure,
    channel_wise: bool,
) -> Tensor:
    """As `handwritten.Engine` says, like all that follow."""
    given = (padded.detach(), None if centre is None else centre.detach())
    return distance.distances(*given, window, size, square=measure == "square")


def distance_gradients(
    padded: Tensor,
    centre: Tensor | None,
    grad: Tensor,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> tuple[Tensor, Tensor | None]:
    """Both ends of each difference."""
    given = (padded.detach(), None if centre is None else centre.detach(), grad.detach())
    return distance.gradients(*given, window, square=measure == "square")


def convolve(input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """Depthwise plane by plane, else by matrix products."""
    wide = compute_dtype(input.dtype)
    K, W = (t.detach().to(wide).contiguous() for t in (kernel, weight))
    size = window.output_size(input.shape[-2], input.shape[-1])
    shape = (input.shape[0], weight.shape[0], *size)
    if weight.shape[1] == 1:
        image = window.padded(input.detach().to(wide))
        output = image.new_empty(shape)
        depthwise.convolve(image, K, W, output, _layout(image, window, size))
    else:
        image, plane = _with_border(input.detach().to(wide), window)
        output = image.new_zeros(shape)
        dense.convolve(image, K, W, output, plane, groups)
    return as_convolved(output.to(input.dtype), input, weight)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """For input, kernel and weight."""
    input = inputs[0]
    wide = compute_dtype(input.dtype)
    v, K, W, dY = (t.detach().to(wide).contiguous() for t in (*inputs, grad))
    if W.shape[1] == 1:
        image = window.padded(v)
        lie = _layout(image, window, (grad.shape[-2], grad.shape[-1]))
        found = depthwise.gradients(image, K, W, dY, lie, needed)
        has_border = True
    else:
        image, plane = _with_border(v, window)
        found = dense.gradients(image, K, W, dY, plane, groups, needed)
        has_border = image is not v
    grad_image = found[0]
    if grad_image is not None and has_border:
        grad_image = unpadded(grad_image, input, window)
    return [
        None if g is None else g.to(t.dtype)
        for g, t in zip((grad_image, *found[1:]), inputs, strict=True)
    ]


def _with_border(image: Tensor, window: Window) -> tuple[Tensor, Window]:
    """The image with a border that is not of zeros, and the window for it."""
    if window.padding_mode == "zeros":
        return image.contiguous(), window
    return window.padded(image), window.unpadded


def _layout(image: Tensor, window: Window, size: tuple[int, int]) -> Layout:
    return Layout(window, (image.shape[-2], image.shape[-1]), size)
