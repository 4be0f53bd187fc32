"""A window as the integers that an operator of torch can take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pacswap.ops.window import Window


class Geometry(NamedTuple):
    """Where the taps of each output pixel lie, on an image with zeros around it, in pixels."""

    KH: int
    KW: int
    SH: int
    SW: int
    DH: int
    DW: int
    TOP: int
    LEFT: int
    HO: int
    WO: int

    @classmethod
    def of(cls, window: Window, height: int, width: int) -> Geometry:
        """That of a window with zero padding over an image of that size."""
        left, _, top, _ = window.border(height, width)
        size = window.output_size(height, width)
        return cls(*window.kernel_size, *window.stride, *window.dilation, top, left, *size)

    def window(self, height: int, width: int) -> Window:
        """A window that `of` makes this from, for an image of that size."""
        below = (self.HO - 1) * self.SH + self.DH * (self.KH - 1) + 1 - height - self.TOP
        beside = (self.WO - 1) * self.SW + self.DW * (self.KW - 1) + 1 - width - self.LEFT
        pad = (self.LEFT, beside, self.TOP, below)
        sides = (self.KH, self.KW), (self.SH, self.SW), (self.DH, self.DW)
        return Window(*sides, pad, "zeros")

    @property
    def centre(self) -> int:
        """As `Window.centre`."""
        return (self.KH - 1) // 2 * self.KW + (self.KW - 1) // 2


def with_zeros(image: Tensor, window: Window) -> tuple[Tensor, Window]:
    """The image and its window, or the padded image and the unpadded window if not of zeros."""
    if window.padding_mode == "zeros":
        return image, window
    return window.padded(image), window.unpadded


def is_last(*tensors: Tensor) -> bool:
    """Whether any lies in memory channel by channel for each pixel, and not also the other way."""
    return any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in tensors
    )


def empty(like: Tensor, size: tuple[int, ...], last: bool) -> Tensor:
    """An unfilled image [B, C, H, W] in the dtype and on the device of another."""
    memory = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory)
