"""Images as planes: each one long row with its border, so that a tap is an offset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch.nn.functional as F
from torch import Tensor

from pacswap.ops.window import Window


@dataclass(frozen=True)
class Layout:
    """How some rows of a convolution, and the part of the image that they see, lie in planes.

    Of an image that is looked at in steps, the pixels of each phase are together: what one tap sees
    for all outputs is then a stretch.

    Attributes:
        window: the geometry, with a border of zeros.
        image: (H, W), without its border.
        size: (H_out, W_out).
        rows: of outputs that are computed at once.
    """

    window: Window
    image: tuple[int, int]
    size: tuple[int, int]
    rows: int

    @cached_property
    def _seen(self) -> tuple[int, int]:
        """(rows, columns) that the outputs of a block see."""
        pairs = zip(
            (self.rows, self.size[1]),
            self.window.stride,
            self.window.kernel_size,
            self.window.dilation,
            strict=True,
        )
        down, across = ((n - 1) * step + (k - 1) * apart + 1 for n, step, k, apart in pairs)
        return down, across

    @cached_property
    def phase(self) -> tuple[int, int]:
        """(rows, columns) of one phase."""
        (rows, columns), (down, across) = self._seen, self.window.stride
        return -(-rows // down), -(-columns // across)

    @cached_property
    def row(self) -> int:
        """Numbers from an output to the one below."""
        return self.phase[1]

    @cached_property
    def plane(self) -> int:
        """Numbers of a plane, all phases."""
        down, across = self.window.stride
        return self.phase[0] * self.phase[1] * down * across

    @cached_property
    def offsets(self) -> list[int]:
        """Of each tap, where what the first output sees lies in the plane."""
        rows, columns = self.phase
        (down, across), (apart_y, apart_x) = self.window.stride, self.window.dilation
        found = []
        for i in range(self.window.kernel_size[0]):
            for j in range(self.window.kernel_size[1]):
                y, x = i * apart_y, j * apart_x
                phase = (y % down) * across + x % across
                found.append(phase * rows * columns + y // down * columns + x // across)
        return found

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """What a compiled loop needs to know of it, in the order of `machine_planes.cut`."""
        left, _, top, _ = self.window.border(*self.image)
        return (*self.image, top, left, *self.window.stride, *self._seen, *self.phase)

    def outputs(self, x: Tensor) -> Tensor:
        """[.., H_out, W_out] to contiguous [.., H_out·row], zeros between the rows."""
        return F.pad(x, (0, self.row - self.size[1])).contiguous().flatten(-2)

    def sized(self, flat: Tensor) -> Tensor:
        """The inverse of `outputs`, a view."""
        return flat.unflatten(-1, (self.size[0], self.row))[..., : self.size[1]]


_CACHE = 1 << 17  # 512 KB of float32


@lru_cache(maxsize=256)
def layout(
    window: Window, image: tuple[int, int], *, numbers: int, least: int = 1, blocks: int = 1
) -> Layout:
    """The layout with as many rows at once as a CPU's second cache holds.

    Args:
        window: the geometry, with a border of zeros.
        image: (H, W).
        numbers: that are used for each output of a block.
        least: rows.
        blocks: to have at least, so that each thread has one; goes before `least`.
    """
    size = window.output_size(*image)
    rows = max(least, _CACHE // max(1, numbers * size[1]))
    return Layout(window, image, size, max(1, min(rows, -(-size[0] // blocks))))
