"""The depthwise convolution: an output channel at a time, a few rows of it in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.loops import machine_planes as machine
from pacswap.ops.loops.planes import Layout, layout
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.window import Window


def convolve(image: Tensor, kernel: Tensor, weight: Tensor, output: Tensor, window: Window) -> None:
    """Fill `output`, [B, C_out, H_out, W_out].

    Args:
        image: v, [B, C_in, H, W], contiguous like all that follow, in the weight's dtype.
        kernel: K, [B, 1, KH*KW, H_out, W_out].
        weight: W, [C_out, 1, KH, KW], float32 or float64.
        output: contiguous.
        window: the geometry, with a border of zeros.
    """
    lie = _layout(image, window)
    channels = image.shape[1]
    threads = parts(channels, output.numel() * window.taps)
    room = image.new_empty(threads, lie.plane + lie.rows * lie.row)
    arrays = (image, lie.outputs(kernel[:, 0]), weight.flatten(1), output, room)
    given = [number for array in arrays for number in described(array)]
    given += [*lie.numbers, lie.rows, *lie.offsets]
    shared(machine.depthwise, image, channels, threads, given)


def gradients(
    image: Tensor, kernel: Tensor, weight: Tensor, grad: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for image, kernel and weight.

    Args:
        image: as in `convolve`, like `kernel`, `weight` and `window`.
        kernel: K.
        weight: W.
        grad: of the output, [B, C_out, H_out, W_out].
        window: the window.
    """
    lie = _layout(image, window)
    channels = image.shape[1]
    threads = parts(channels, grad.numel() * window.taps)
    factors, flat = lie.outputs(kernel[:, 0]), weight.flatten(1)
    room = image.new_empty(threads, 2 * lie.plane + lie.rows * lie.row)
    found = (
        torch.zeros_like(image),
        factors.new_zeros(threads, *factors.shape),
        torch.zeros_like(flat),
    )
    arrays = (image, factors, flat, grad, *found, room)
    given = [number for array in arrays for number in described(array)]
    given += [*lie.numbers, lie.rows, *lie.offsets]
    shared(machine.depthwise_gradients, image, channels, threads, given)
    grad_kernel = lie.sized(found[1].sum(0)).unsqueeze(1)
    return found[0], grad_kernel, found[2].view(weight.shape)


def _layout(image: Tensor, window: Window) -> Layout:
    # K of a block is used by channel after channel.
    return layout(window, (image.shape[2], image.shape[3]), numbers=window.taps)
