"""The depthwise and the grouped convolution, some output channels at a time.

What the loops read by raw addresses is held by names here until they have come to their end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.ops.loops import machine_grouped as machine
from pacswap.ops.loops.planes import Layout, layout
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.loops.vectors import lanes
from pacswap.ops.window import Window

_AT_ONCE = 4  # outputs
# Channels of a group: of more, the planes leave the cache, and matrix products are faster.
_NARROW = 32


def fits(weight: Tensor, groups: int) -> bool:
    """Whether a convolution with that weight, [C_out, C_in/groups, KH, KW], is one for here."""
    return weight.shape[1] == 1 or (groups > 1 and weight.shape[1] <= _NARROW)


def convolve(
    image: Tensor, kernel: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int
) -> None:
    """Fill `output`, [B, C_out, H_out, W_out].

    Args:
        image: v, [B, C_in, H, W], contiguous like all that follow, in the weight's dtype.
        kernel: K, [B, 1, KH*KW, H_out, W_out].
        weight: W, [C_out, C_in/groups, KH, KW], float32 or float64.
        output: contiguous.
        window: the geometry, with a border of zeros.
        groups: of channels.
    """
    C_in, C_out, each = image.shape[1], weight.shape[0], weight.shape[1]
    apart = each == 1 and C_in == C_out
    inputs, outputs = (_AT_ONCE, _AT_ONCE) if apart else (each, C_out // groups)
    units = -(-C_in // inputs)
    lie = layout(window, (image.shape[2], image.shape[3]), numbers=window.taps + inputs)
    wide = lanes(image.dtype)
    if lie.size[1] < wide:
        # The last row is read a vector long.
        kernel = F.pad(kernel.flatten(), (0, wide))
    threads = parts(units, output.numel() * window.taps * each)
    room = image.new_zeros(threads, inputs * lie.stride + 9 * wide)
    given = (
        *described(image), kernel.data_ptr(), weight.data_ptr(), C_out, each, window.taps,
        *described(output), *described(room), inputs, outputs, apart, wide, lie.stride, lie.rows,
        lie.address, *lie.numbers,
    )  # fmt: skip
    shared(machine.grouped, image, units, threads, given)


def depthwise_gradients(
    image: Tensor, kernel: Tensor, weight: Tensor, grad: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for image, kernel and weight of a depthwise convolution.

    Args:
        image: as in `convolve`, like `kernel` and `window`.
        kernel: K.
        weight: W, [C_out, 1, KH, KW].
        grad: of the output, [B, C_out, H_out, W_out].
        window: the window.
    """
    C_in, C_out = image.shape[1], weight.shape[0]
    inputs, outputs = (_AT_ONCE, _AT_ONCE) if C_in == C_out else (1, C_out // C_in)
    units = -(-C_in // inputs)
    lie = layout(window, (image.shape[2], image.shape[3]), numbers=2 * window.taps)
    wide = lanes(image.dtype)
    threads = parts(units, grad.numel() * window.taps)
    factors, each = lie.outputs(kernel[:, 0], wide), lie.size[0] * lie.row
    room = image.new_zeros(
        threads, 2 * (inputs * lie.stride + wide) + outputs * (lie.rows * lie.row + wide) + 4 * wide
    )
    grad_image, grad_weight = torch.zeros_like(image), torch.zeros_like(weight)
    dots = image.new_zeros(threads, factors.numel())
    given = (
        *described(image), factors.data_ptr(), each, window.taps, weight.data_ptr(),
        *described(grad), *described(grad_image), dots.data_ptr(), grad_weight.data_ptr(),
        *described(room), inputs, outputs, wide, lie.stride, lie.rows, lie.address, *lie.numbers,
    )  # fmt: skip
    shared(machine.depthwise_gradients, image, units, threads, given)
    summed = dots.sum(0) if threads > 1 else dots[0]
    return grad_image, lie.sized(summed, kernel.shape), grad_weight
