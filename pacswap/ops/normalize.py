"""The normalisation of an adapting kernel: which taps are counted, and what divides them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pacswap.ops.dimensions import VolumeWindow
from pacswap.ops.mask import valid_taps
from pacswap.ops.window import Window


def valid_of(
    mask: Tensor | None, window: Window | VolumeWindow
) -> tuple[Tensor | None, int | Tensor]:
    """Which taps are valid, [B, 1, KH*KW, H_out, W_out], and how many a mean is to stand for."""
    if mask is None:
        return None, window.taps
    if mask.dim() == 4:
        assert isinstance(window, Window)  # a mask of a volume is refused
        return valid_taps(mask, window), window.taps
    valid = mask > 0
    return valid, valid.sum(2, keepdim=True)


class Counted(NamedTuple):
    """Which taps a normalisation counts, [1 or B, 1, KH*KW, H_out, W_out].

    Attributes:
        divides: whether there is a normalisation.
        seen: True where a tap counts at all; None for all.
        as_one: True where it counts as 1, whatever the features; None for none.
    """

    divides: bool
    seen: Tensor | None = None
    as_one: Tensor | None = None


def counted_taps(
    normalize: str,
    window: Window | VolumeWindow,
    size: tuple[int, ...],
    valid: Tensor | None,
    device: torch.device,
) -> Counted:
    """Which taps a normalisation counts, for an image or a volume of that size."""
    if normalize == "none":
        return Counted(False)
    if isinstance(window, VolumeWindow):
        T, H, W = size
        inside = window.inside(T, H, W, device)
    else:
        H, W = size
        inside = window.inside(H, W, device)
    inside = None if inside is None else inside[:, None]
    if normalize == "sum":
        return Counted(True, inside if valid is None else valid)
    if inside is not None:
        # A centre in the padding has no guidance to compare with: all its taps count as 1.
        inside = inside & inside[:, :, window.centre : window.centre + 1]
    return Counted(True, valid, None if inside is None else ~inside)


def normalized(kernel: Tensor, normalize: str, seen: Tensor | None, taps: int | Tensor) -> Tensor:
    """N(K), [B, 1 or D, KH*KW, H_out, W_out]."""
    if normalize == "none":
        return kernel
    if seen is not None:
        kernel = torch.where(seen, kernel, 0.0)
    if normalize == "mean":
        # In this order: torch computes taps / ΣK as taps · (1/ΣK), which is not 1 for 49 / 49.
        return kernel * taps / _or_one(kernel.sum(2, keepdim=True))
    return kernel / _or_one(kernel.sum(2, keepdim=True))


def _or_one(total: Tensor) -> Tensor:
    """A sum to divide by; a window that sees nothing gives 0, not 0/0."""
    return torch.where(total == 0, 1.0, total)
