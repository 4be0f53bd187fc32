"""PAC by Triton on a GPU: the three functions of a backend. `refusal` says what it cannot run.

float32, float16 and bfloat16 with float32 sums; zero padding costs nothing, other borders are made
first. A second derivative goes through `taps`.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from pacswap.ops import handwritten
from pacswap.ops.gpu import library
from pacswap.ops.gpu.geometry import Geometry, is_last, with_zeros
from pacswap.ops.measure import Measure
from pacswap.ops.window import Window


def tap_distance(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """As `reference.tap_distance`, computed in float32; keeps the guidance and the centre only."""
    image, window = with_zeros(guidance, window)
    geometry = list(Geometry.of(window, image.shape[2], image.shape[3]))
    return library.tap_distance(image, centre, geometry, measure, channel_wise)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """As `reference.pac_conv2d`; the output has the memory format that `F.conv2d` would give it."""
    image, window = with_zeros(input, window)
    geometry = list(Geometry.of(window, image.shape[2], image.shape[3]))
    last = is_last(image, weight)
    output = library.pac_conv2d(image, kernel, weight, geometry, groups, last)
    return output if bias is None else output + bias[:, None, None]


def attach_kernel_gradient(
    output: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
) -> Tensor:
    """As `eager.attach_kernel_gradient`, with the gradient computed by Triton."""
    image, window = with_zeros(input, window)
    engine: Any = sys.modules[__name__]
    given = output, image, kernel, weight, window, groups
    return handwritten.attach_kernel_gradient(engine, *given)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """As `handwritten.Engine` says; the window's border is of zeros."""
    geometry = Geometry.of(window, inputs[0].shape[2], inputs[0].shape[3])
    return library.conv_gradients(inputs, grad, geometry, groups, needed)
