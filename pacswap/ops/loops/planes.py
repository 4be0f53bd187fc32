"""Images as planes: each one long row with its border, so that a tap is an offset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
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
    def stride(self) -> int:
        """Numbers from plane to plane: an odd number of lines of a cache, which divides it well."""
        lines = -(-self.plane // _LINE)
        return _LINE * (lines + 1 - lines % 2)

    @cached_property
    def address(self) -> int:
        """Of the offsets, in memory that lives as long as this layout."""
        return self._arrays[0].ctypes.data

    @cached_property
    def address_from_centre(self) -> int:
        """Of the offsets from the centre's, without its own; likewise."""
        return self._arrays[1].ctypes.data

    @cached_property
    def farthest(self) -> int:
        """The largest offset from the centre's."""
        return int(self._arrays[1].max(initial=0))

    @cached_property
    def _arrays(self) -> tuple[Any, Any]:
        offsets, centre = np.array(self.offsets, dtype=np.int64), self.window.centre
        return offsets, np.delete(offsets, centre) - offsets[centre]

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """What a compiled loop needs to know of it, in the order of `machine_planes.cut`."""
        left, _, top, _ = self.window.border(*self.image)
        return (*self.image, top, left, *self.window.stride, *self.phase)

    def outputs(self, x: Tensor, slack: int) -> Tensor:
        """[.., H_out, W_out] as long rows, zeros between them and `slack` at the end, one flat."""
        flat = x.new_zeros(x.shape[:-1].numel() * self.row + slack)
        self.sized(flat, x.shape).copy_(x)
        return flat

    def sized(self, flat: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `outputs`, a view of that shape."""
        *lines, width = shape
        return flat[: math.prod(lines) * self.row].view(*lines, self.row)[..., :width]


class Plan(NamedTuple):
    """How the work of a call is divided.

    Attributes:
        lie: the layout of its planes.
        units: that are divided among threads.
        threads: that share it.
        room: numbers of memory that each needs.
        numbers: what the loops are told.
    """

    lie: Layout
    units: int
    threads: int
    room: int
    numbers: tuple[int, ...]


_CACHE = 1 << 17  # 512 KB of float32
_LINE = 16


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
    # As many for each thread, of one height: a small rest would cut as much around it as others.
    count = max(1, blocks * -(-size[0] // (rows * blocks)))
    return Layout(window, image, size, max(1, -(-size[0] // count)))


@lru_cache(maxsize=256)
def whole(window: Window, image: tuple[int, int]) -> Layout:
    """The layout with all rows at once."""
    size = window.output_size(*image)
    return Layout(window, image, size, size[0])
