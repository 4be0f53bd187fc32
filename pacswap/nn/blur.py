"""Lower resolutions, at which a message or a correction is cheap, and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reduced(image: Tensor, factor: int) -> Tensor:
    """Average pooling by `factor`; what hangs over at the border averages the image's own pixels.

    Args:
        image: [B, C, H, W].
        factor: 1 leaves the image as it is.

    Returns:
        [B, C, ⌈H/factor⌉, ⌈W/factor⌉].
    """
    if factor == 1:
        return image
    H, W = image.shape[-2:]
    if torch.compiler.is_compiling():
        ones = image.new_ones(1, 1, H, W)
        return F.avg_pool2d(_whole(image, factor), factor) / F.avg_pool2d(
            _whole(ones, factor), factor
        )
    top, bottom = _overhang(H, factor)
    left, right = _overhang(W, factor)
    border = (left, right, top, bottom)
    if not any(border):
        return F.avg_pool2d(image, factor)
    inside = F.avg_pool2d(F.pad(image.new_ones(1, 1, H, W), border), factor)
    return F.avg_pool2d(F.pad(image, border), factor) / inside


def restored(message: Tensor, factor: int, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of what `reduced` made small, back to (H, W).

    Args:
        message: [B, C, h, w].
        factor: as for `reduced`.
        size: (H, W).

    Returns:
        [B, C, H, W].
    """
    if factor == 1:
        return message
    large = (message.shape[-2] * factor, message.shape[-1] * factor)
    message = F.interpolate(message, size=large, mode="bilinear", align_corners=False)
    top, bottom = _overhang(size[0], factor)
    left, right = _overhang(size[1], factor)
    if torch.compiler.is_compiling():
        return _window(message, (top, left), size)
    if not any((top, bottom, left, right)):
        return message
    return F.pad(message, (-left, -right, -top, -bottom))


def _whole(image: Tensor, factor: int) -> Tensor:
    """The image within zeros, both sides multiples of the factor; [B, C, H, W] of any size."""
    H, W = image.shape[-2:]
    size = ((H + factor - 1) // factor * factor, (W + factor - 1) // factor * factor)
    most = factor - 1
    start = (most - _overhang(H, factor)[0], most - _overhang(W, factor)[0])
    return _window(F.pad(image, (most, most, most, most)), start, size)


def _window(image: Tensor, start: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A slice of rows and columns that sets torch.export no condition on the sizes.

    A slice, or a pad by what is lacking, makes it remember whether the example's sizes divide.
    """
    for dim, first, length in zip((-2, -1), start, size, strict=True):
        image = image.index_select(dim, torch.arange(length, device=image.device) + first)
    return image


def _overhang(length: int, factor: int) -> tuple[int, int]:
    """(before, after): the pixels by which a length falls short of a multiple of the factor."""
    lacking = (length + factor - 1) // factor * factor - length
    return (lacking + 1) // 2, lacking // 2
