"""Dense PAC over few channels: all taps of some rows at once, in one matrix product.

With few channels a matrix product per tap is too thin to be fast. Here the taps of a block of rows
lie side by side, [KH·KW·C_in, pixels], and the block is small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pacswap.ops.window import Window

# Measured on a CPU with 3×3 and 5×5 windows: above it, a product per tap is as fast.
MOST_CHANNELS = 32
# Numbers of a block: 1 MB of float32 in a CPU's cache; elsewhere launches cost more than memory.
_BLOCK = {"cpu": 1 << 18}
_LARGE_BLOCK = 1 << 26


def fits(in_channels: int, groups: int) -> bool:
    """Whether this is the faster way."""
    return groups == 1 and in_channels <= MOST_CHANNELS


def pac_conv2d(
    image: Tensor, kernel: Tensor, weight: Tensor, window: Window, size: tuple[int, int]
) -> Tensor:
    """PAC of a padded image.

    Args:
        image: [B, C_in, H', W'], padded.
        kernel: K, [B, 1 or C_in, KH*KW, H_out, W_out], in the image's dtype.
        weight: [C_out, C_in, KH, KW], in the image's dtype.
        window: its padding is in the image already.
        size: (H_out, W_out).

    Returns:
        [B, C_out, H_out, W_out].
    """
    filters = _joined(weight)
    output = image.new_empty(image.shape[0], weight.shape[0], *size)
    for picture, out, factors in zip(image, output, kernel, strict=True):
        for block in _blocks(picture, weight, size):
            seen = _seen(picture, factors, window, size, block)
            out[:, block] = _product(filters, seen.flatten(0, 1).flatten(1)).view_as(out[:, block])
    return output


def gradients(
    image: Tensor,
    kernel: Tensor,
    weight: Tensor,
    grad: Tensor,
    window: Window,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for the padded image, the kernel and the weight.

    Args:
        image: as in `pac_conv2d`, like `kernel`, `weight` and `window`.
        kernel: K.
        weight: W.
        grad: of the output, [B, C_out, H_out, W_out], in the image's dtype.
        window: the window.
        needed: which of the three are wanted.

    Returns:
        The three, each like its tensor, None where not wanted.
    """
    need_image, need_kernel, need_weight = needed
    size = (grad.shape[-2], grad.shape[-1])
    filters = _joined(weight)
    grad_image = torch.zeros_like(image) if need_image else None
    grad_kernel = torch.empty_like(kernel) if need_kernel else None
    grad_filters = torch.zeros_like(filters) if need_weight else None
    for b, picture in enumerate(image):
        for block in _blocks(picture, weight, size):
            pulled = grad[b, :, block]
            flat = pulled.flatten(1)
            if grad_filters is not None:
                seen = _seen(picture, kernel[b], window, size, block)
                grad_filters.addmm_(flat, seen.flatten(0, 1).flatten(1).T)
            if grad_image is None and grad_kernel is None:
                continue
            shape = (window.taps, image.shape[1], *pulled.shape[1:])
            pulled = _product(filters.T, flat).view(shape)
            for t, place in enumerate(_places(window, size, block)):
                if grad_kernel is not None:
                    product = pulled[t] * picture[place]
                    each = kernel.shape[1] > 1
                    grad_kernel[b, :, t, block] = product if each else product.sum(0, keepdim=True)
                if grad_image is not None:
                    grad_image[b][place] += pulled[t].mul_(kernel[b, :, t, block])
    grad_weight = None
    if grad_filters is not None:
        C_out, C_in, KH, KW = weight.shape
        grad_weight = grad_filters.view(C_out, KH, KW, C_in).permute(0, 3, 1, 2)
    return grad_image, grad_kernel, grad_weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right in their own precision, which autocast would round without `out`."""
    return torch.mm(left, right, out=left.new_empty(left.shape[0], right.shape[1]))


def _joined(weight: Tensor) -> Tensor:
    """[C_out, C_in, KH, KW] to [C_out, KH*KW*C_in]."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _blocks(picture: Tensor, weight: Tensor, size: tuple[int, int]) -> Iterator[slice]:
    """Rows of the output that are computed together."""
    numbers = weight[0].numel() * size[1]
    rows = max(1, _BLOCK.get(picture.device.type, _LARGE_BLOCK) // max(1, numbers))
    for first in range(0, size[0], rows):
        yield slice(first, min(first + rows, size[0]))


def _places(
    window: Window, size: tuple[int, int], block: slice
) -> Iterator[tuple[slice, slice, slice]]:
    """Where each tap looks from a block of output rows: channels, rows, columns."""
    for rows, columns in window.slices(size):
        step = rows.step or 1
        first = rows.start + block.start * step
        last = first + (block.stop - block.start - 1) * step
        yield slice(None), slice(first, last + 1, step), columns


def _seen(
    picture: Tensor, factors: Tensor, window: Window, size: tuple[int, int], block: slice
) -> Tensor:
    """K times what each tap sees: [KH*KW, C_in, rows, W_out]."""
    seen = picture.new_empty(window.taps, picture.shape[0], block.stop - block.start, size[1])
    for t, place in enumerate(_places(window, size, block)):
        torch.mul(picture[place], factors[:, t, block], out=seen[t])
    return seen
