"""The depthwise convolution: an output channel at a time, a few rows of it in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.loops import machine_planes as machine
from pacswap.ops.loops.planes import Layout
from pacswap.ops.loops.threads import described, parts, shared

# Numbers of the kernel that stay in a CPU's second cache while channel after channel uses them.
_NUMBERS = 1 << 16


def convolve(image: Tensor, kernel: Tensor, weight: Tensor, output: Tensor, lie: Layout) -> None:
    """Fill `output`, [B, C_out, H_out, W_out], contiguous.

    Args:
        image: v with its border, [B, C_in, H', W'], like all that follow in the weight's dtype.
        kernel: K, [B, 1, KH*KW, H_out, W_out].
        weight: W, [C_out, 1, KH, KW], float32 or float64.
        output: is filled.
        lie: of the image.
    """
    planes, factors = _arrays(lie, image, kernel)
    channels = weight.shape[0]
    threads = parts(channels, output.numel() * lie.window.taps)
    rows = min(_rows(lie), lie.size[0])
    room = image.new_empty(threads, rows * lie.row)
    arrays = (planes, factors, _flat(weight), output, room)
    given = [number for array in arrays for number in described(array)]
    shared(machine.depthwise, image, channels, threads, [*given, lie.row, *lie.offsets])


def gradients(
    image: Tensor,
    kernel: Tensor,
    weight: Tensor,
    grad: Tensor,
    lie: Layout,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for the image with its border, for kernel and weight.

    Args:
        image: as in `convolve`, like `kernel`, `weight` and `lie`.
        kernel: K.
        weight: W.
        grad: of the output, [B, C_out, H_out, W_out], in the weight's dtype.
        lie: of the image.
        needed: which of the three are wanted.

    Returns:
        The three, each of its tensor's shape, None where not wanted.
    """
    planes, factors = _arrays(lie, image, kernel)
    channels = planes.shape[1]
    threads = parts(channels, grad.numel() * lie.window.taps)
    flat = _flat(weight)
    found: list[Tensor] = [
        torch.zeros_like(planes) if needed[0] else planes[:0],
        factors.new_zeros(threads, *factors.shape) if needed[1] else factors[None][:0],
        torch.zeros_like(flat) if needed[2] else flat[:0],
    ]
    arrays = (planes, factors, flat, lie.outputs(grad), *found)
    given = [number for array in arrays for number in described(array)]
    given += [_rows(lie) * lie.row, *map(int, needed), *lie.offsets]
    shared(machine.depthwise_gradients, image, channels, threads, given)
    grad_image = lie.image(found[0]) if needed[0] else None
    grad_kernel = lie.sized(found[1].sum(0)).unsqueeze(1) if needed[1] else None
    return grad_image, grad_kernel, found[2].view(weight.shape) if needed[2] else None


def _arrays(lie: Layout, image: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """(v [B, C_in, plane], K [B, taps, H_out·row])."""
    return lie.planes(image), lie.outputs(kernel[:, 0])


def _flat(weight: Tensor) -> Tensor:
    """[C_out, taps]."""
    return weight.flatten(1).contiguous()


def _rows(lie: Layout) -> int:
    """How many rows are computed at once."""
    return max(1, _NUMBERS // (lie.window.taps * lie.row))
