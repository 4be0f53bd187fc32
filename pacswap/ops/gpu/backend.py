"""PAC by Triton on a GPU: the three functions of a backend. `refusal` says what it cannot run.

float32, float16 and bfloat16 with float32 sums; zero padding costs nothing, other borders are made
first. A second derivative goes through `taps`.
"""

from __future__ import annotations

from torch import Tensor

from pacswap.errors import BackendError
from pacswap.ops import eager
from pacswap.ops.gpu import library
from pacswap.ops.gpu.geometry import Geometry, is_last, with_zeros
from pacswap.ops.gpu.refusal import why_not_triton
from pacswap.ops.measure import Measure
from pacswap.ops.window import Window


def tap_distance(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """As `reference.tap_distance`, computed in float32; keeps the guidance and the centre only."""
    _check(guidance, None, window, 1)
    image, window = with_zeros(guidance, window)
    geometry = list(Geometry.of(window, image.shape[2], image.shape[3]))
    return library.tap_distance(image, centre, geometry, measure, channel_wise)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """As `reference.pac_conv2d`; the output has the memory format that `F.conv2d` would give it."""
    _check(input, weight, window, groups)
    image, window = with_zeros(input, window)
    geometry = list(Geometry.of(window, image.shape[2], image.shape[3]))
    last = is_last(image, weight)
    output = library.pac_conv2d(image, kernel, weight, geometry, groups, last)
    return output if bias is None else output + bias[:, None, None]


def attach_kernel_gradient(
    output: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
) -> Tensor:
    """As `eager.attach_kernel_gradient`, with the gradient computed by Triton."""
    _check(input, weight, window, groups)
    image, window = with_zeros(input, window)
    geometry = Geometry.of(window, image.shape[2], image.shape[3])

    def gradients(
        inputs: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        window: Window,
        groups: int,
        needed: tuple[bool, ...],
    ) -> list[Tensor | None]:
        return library.conv_gradients(inputs, grad, geometry, groups, needed)

    given = output, image, kernel, weight, window, groups
    return eager.attach_kernel_gradient(*given, gradients=gradients)


def _check(input: Tensor, weight: Tensor | None, window: Window, groups: int) -> None:
    refusal = why_not_triton(input, weight, window, groups)
    if refusal is not None:
        raise BackendError(f"backend='triton' cannot run this call: {refusal}.")
