"""PAC by Triton on a GPU: the three functions of a backend. `refusal` says what it cannot run.

float32, float16 and bfloat16 with float32 sums; zero padding costs nothing, other borders are made
first. A second derivative goes through `taps`.

For what traces or watches torch's operations the calls are operators of torch (`library`). Else
they are as `handwritten` has them: a small layer takes less time than to find an operator.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from pacswap.ops import handwritten
from pacswap.ops.gpu import distances as made
from pacswap.ops.gpu import launch, library
from pacswap.ops.gpu.geometry import Geometry, is_last, with_zeros
from pacswap.ops.measure import Measure
from pacswap.ops.window import Window


def tap_distance(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """As `reference.tap_distance`, computed in float32; keeps the guidance and the centre only."""
    image, window = with_zeros(guidance, window)
    if _is_watched():
        geometry = list(_geometry(image, window))
        return library.tap_distance(image, centre, geometry, measure, channel_wise)
    return handwritten.tap_distance(_ENGINE, image, centre, window, measure, channel_wise)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """As `reference.pac_conv2d`; the output has the memory format that `F.conv2d` would give it."""
    image, window = with_zeros(input, window)
    if _is_watched():
        geometry, last = list(_geometry(image, window)), is_last(image, weight)
        output = library.pac_conv2d(image, kernel, weight, geometry, groups, last)
        return output if bias is None else output + bias[:, None, None]
    return handwritten.pac_conv2d(_ENGINE, image, kernel, weight, bias, window, groups)


def attach_kernel_gradient(
    output: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
) -> Tensor:
    """As `eager.attach_kernel_gradient`, with the gradient computed by Triton."""
    image, window = with_zeros(input, window)
    given = output, image, kernel, weight, window, groups
    return handwritten.attach_kernel_gradient(_ENGINE, *given)


def convolve(input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """As `handwritten.Engine` says, like all that follow; the window's border is of zeros."""
    geometry, last = _geometry(input, window), is_last(input, weight)
    return launch.pac_conv2d(input, kernel, weight, geometry, groups, last)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """For input, kernel and weight."""
    return launch.gradients(inputs, grad, _geometry(inputs[0], window), groups, needed)


def distances(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """The distances of the taps."""
    return made.tap_distance(guidance, centre, _geometry(guidance, window), measure, channel_wise)


def distance_gradients(
    guidance: Tensor,
    centre: Tensor | None,
    grad: Tensor,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> tuple[Tensor, Tensor | None]:
    """For the guidance and the centre."""
    given = grad, guidance, centre, _geometry(guidance, window), measure, channel_wise
    of_guidance, of_centre = made.gradients(*given)
    return of_guidance, None if centre is None else of_centre


def _is_watched() -> bool:
    """Whether a compiler or a mode, such as that of fake tensors, wants to see operators."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _geometry(image: Tensor, window: Window) -> Geometry:
    return Geometry.of(window, image.shape[2], image.shape[3])


_ENGINE: Any = sys.modules[__name__]
