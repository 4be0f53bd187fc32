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
from torch import Tensor, nn

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
    if _is_watched(image, centre):
        geometry = list(_geometry(image, window))
        return library.tap_distance(image, centre, geometry, measure, channel_wise)
    return handwritten.tap_distance(_ENGINE, image, centre, window, measure, channel_wise)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """As `reference.pac_conv2d`; the output has the memory format that `F.conv2d` would give it."""
    image, window = with_zeros(input, window)
    if _is_watched(image, kernel, weight):
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
    # A compiler of backward passes comes here after a forward pass that nobody watched.
    by = library if _is_watched(grad, *inputs) else launch
    return launch.gradients(inputs, grad, _geometry(inputs[0], window), groups, needed, by)


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
    is_watched = _is_watched(grad, guidance, centre)
    compute = library.tap_distance_gradients if is_watched else made.gradients
    of_guidance, of_centre = compute(*given)
    return of_guidance, None if centre is None else of_centre


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a mode or a tensor, such as a fake one, wants to see operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(type(t) not in (Tensor, nn.Parameter) for t in tensors if t is not None)


def _geometry(image: Tensor, window: Window) -> Geometry:
    return Geometry.of(window, image.shape[2], image.shape[3])


_ENGINE: Any = sys.modules[__name__]
