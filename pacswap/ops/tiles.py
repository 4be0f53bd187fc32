"""Which part of a convolution is computed at once, so that it stays in a CPU's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import TypeAlias

from pacswap.ops.window import Window

Channels: TypeAlias = "tuple[int, int]"  # of the input, first and last + 1

# Outputs of a tile: fewer make matrix products slow (benchmarks/layers.py).
_OUTPUTS = 1024
# Numbers of a tile, one for each output, tap and channel: 1 MB of float32, a core's second cache.
_MOST = 1 << 18
_LEAST = 1 << 16
# Multiply-adds of a matrix product in the time of writing one number of K·v; and a depthwise
# convolution, whose two products for each tap leave nothing to a matrix product.
_WRITE = 30
_DEPTHWISE = 2.0
# Below this part of a window's taps that lie inside the image, taps are taken one by one, each
# where it does.
_DENSE = 0.65


@dataclass(frozen=True)
class Tile:
    """Outputs of one image that are computed at once, by some taps.

    Attributes:
        rows: of the output, first and last + 1.
        columns: of the output.
        down: vertical taps, first and last + 1.
        across: horizontal taps.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    down: tuple[int, int]
    across: tuple[int, int]

    @cached_property
    def taps(self) -> int:
        """How many it has."""
        return (self.down[1] - self.down[0]) * (self.across[1] - self.across[0])

    @cached_property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of outputs."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @cached_property
    def place(self) -> tuple[slice, slice]:
        """Its rows and columns of the output."""
        return slice(*self.rows), slice(*self.columns)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """All of it, for a compiled loop."""
        return *self.rows, *self.columns, *self.down, *self.across


@dataclass(frozen=True)
class Tiling:
    """How one image's output is divided.

    Attributes:
        blocks: of rows; in each, the output is a sum over tiles.
        one_by_one: each tile has one tap; else a block has one tile, with all of them.
        outputs: of the largest tile.
    """

    blocks: tuple[tuple[Tile, ...], ...]
    one_by_one: bool
    outputs: int

    def channels(self, window: Window, count: int, step: int, most: int) -> list[Channels]:
        """The input's channels in pieces for a tile, each a multiple of `step`.

        Args:
            window: the geometry.
            count: C_in.
            step: channels that stay together.
            most: numbers that a tile should hold.
        """
        taps = 1 if self.one_by_one else window.taps
        units = max(1, most // max(1, taps * self.outputs * step))
        return [
            (a * step, b * step) for a, b in _even(0, count // step, -(-count // (units * step)))
        ]


@lru_cache(maxsize=256)
def tiling(window: Window, image: tuple[int, int]) -> Tiling:
    """How to divide the work for one image.

    Args:
        window: the geometry, with a border of zeros.
        image: (H, W).
    """
    size = window.output_size(*image)
    left, _, top, _ = window.border(*image)
    spans = [
        [_span(window, axis, k, size[axis], image[axis], before) for k in range(taps)]
        for axis, (taps, before) in enumerate(zip(window.kernel_size, (top, left), strict=True))
    ]
    one_by_one = part_inside(window, image) < _DENSE
    blocks = []
    for rows in _even(0, size[0], round(size[0] * size[1] / _OUTPUTS)):
        down, across = ((0, taps) for taps in window.kernel_size)
        tiles = [Tile(rows, (0, size[1]), down, across)]
        if one_by_one:
            tiles = list(_by_tap(rows, spans))
        if tiles:
            blocks.append(tuple(tiles))
    tallest = max((tile.size[0] * tile.size[1] for block in blocks for tile in block), default=1)
    return Tiling(tuple(blocks), one_by_one, tallest)


def spans(window: Window, image: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """For each axis and tap, the outputs, first and last + 1, from which it lies in the image."""
    size = window.output_size(*image)
    left, _, top, _ = window.border(*image)
    return [
        [_span(window, axis, k, size[axis], image[axis], before) for k in range(taps)]
        for axis, (taps, before) in enumerate(zip(window.kernel_size, (top, left), strict=True))
    ]


def outside(window: Window, image: tuple[int, int]) -> bool:
    """Whether so many taps lie outside the image that it pays to leave them out."""
    return part_inside(window, image) < _DENSE


def part_inside(window: Window, image: tuple[int, int]) -> float:
    """How many of all taps of all outputs lie in the image, from 0 to 1."""
    size = window.output_size(*image)
    left, _, top, _ = window.border(*image)
    inside = 1.0
    for axis, before in enumerate((top, left)):
        taps = range(window.kernel_size[axis])
        ends = [_span(window, axis, k, size[axis], image[axis], before) for k in taps]
        inside *= sum(last - first for first, last in ends) / max(1, size[axis] * len(taps))
    return inside


def forward_cost(window: Window, image: tuple[int, int], weight: tuple[int, ...]) -> float:
    """What the forward pass is estimated to take, in multiples of the plain convolution.

    The products are the convolution's, less those of taps outside the image where these are left
    out; writing a number of K·v takes as long as so many multiply-adds. Measured with
    benchmarks/layers.py on two cores; docs/performance.md has how well it fits.

    Args:
        window: the geometry.
        image: (H, W).
        weight: (C_out, C_in/groups, KH, KW).
    """
    if weight[1] == 1:
        return _DEPTHWISE
    inside = part_inside(window, image)
    return (inside if inside < _DENSE else 1.0) * (1 + _WRITE / weight[0])


def most(cores: int, numbers: int) -> int:
    """How many numbers a tile should hold.

    Args:
        cores: that compute it together, each with a cache of its own.
        numbers: of input, weight and output: a tile adds little to the memory of a small layer.
    """
    return min(_MOST * cores, max(_LEAST, numbers))


def _even(first: int, last: int, count: int) -> Iterator[tuple[int, int]]:
    """A range in `count` pieces of about the same size: a small rest would be slow."""
    count = max(1, min(count, last - first))
    return pairwise(first + (last - first) * i // count for i in range(count + 1))


def _by_tap(rows: tuple[int, int], spans: list[list[tuple[int, int]]]) -> Iterator[Tile]:
    """For each tap the outputs of some rows from which it lies in the image."""
    for (i, down), (j, across) in product(*map(enumerate, spans)):
        tall = max(rows[0], down[0]), min(rows[1], down[1])
        if tall[0] < tall[1] and across[0] < across[1]:
            yield Tile(tall, across, (i, i + 1), (j, j + 1))


def _span(
    window: Window, axis: int, tap: int, size: int, side: int, before: int
) -> tuple[int, int]:
    """The outputs, first and last + 1, from which a tap lies in the image."""
    offset = tap * window.dilation[axis] - before
    step = window.stride[axis]
    first = min(size, max(0, -(offset // step)))
    return first, max(first, min(size, (side - 1 - offset) // step + 1))
