"""Which outputs and channels of a dense convolution are computed at once, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pacswap.ops.loops import registers
from pacswap.ops.tiles import is_sparse, spans
from pacswap.ops.window import Window

# Numbers that a chunk of outputs should need: 640 KB of float32, in a core's second cache. A small
# layer's chunks are smaller, so that they add little to its memory.
_CACHE = 160 << 10
_LEAST = 16 << 10
# Rows of a product, taps times channels: a block of K·v, 48 outputs wide, fills a first cache.
_DEEP = 144


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors to compute with.

    Attributes:
        axes: of the array that says so to compiled loops.
        lanes: numbers of a vector.
        high: rows of a block of sums.
    """

    axes: int
    lanes: int
    high: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return (8 << self.axes) // self.lanes

    @property
    def wide(self) -> int:
        """Columns of a block."""
        return registers.ACROSS * self.lanes

    @property
    def step(self) -> int:
        """Numbers of what lies by rows of a block."""
        return max(self.lanes, self.high)


def vectors_of(dtype: torch.dtype) -> Vectors:
    """This machine's vectors."""
    return _vectors(registers.vector_axes(), dtype.itemsize)


@lru_cache(maxsize=8)
def _vectors(axes: int, size: int) -> Vectors:
    return Vectors(axes, registers.lanes_of(axes, size), registers.rows_of(axes))


# Compared by identity, since `shape_of` makes each once: hashing a window takes long.
@dataclass(frozen=True, eq=False)
class Shape:
    """A convolution's geometry.

    Attributes:
        window: with a border of zeros.
        image: (H, W).
        batch: images.
        groups: of channels.
        ins: channels of a group of the input.
        outs: channels of a group of the output.
    """

    window: Window
    image: tuple[int, int]
    batch: int
    groups: int
    ins: int
    outs: int

    @cached_property
    def size(self) -> tuple[int, int]:
        """(H_out, W_out)."""
        return self.window.output_size(*self.image)

    @cached_property
    def products(self) -> int:
        """Multiply-adds of all images."""
        outputs = self.batch * self.size[0] * self.size[1]
        return outputs * self.groups * self.outs * self.ins * self.window.taps

    @cached_property
    def cache(self) -> int:
        """Numbers that a chunk should need."""
        image = self.groups * self.ins * self.image[0] * self.image[1]
        weight = self.groups * self.outs * self.ins * self.window.taps
        output = self.groups * self.outs * self.size[0] * self.size[1]
        return min(_CACHE, max(_LEAST, (self.batch * (image + output) + weight) // 8))

    @cached_property
    def is_sparse(self) -> bool:
        """Whether so many taps lie outside that bands of outputs leave theirs out."""
        return is_sparse(self.window, self.image)


def shape_of(image: Tensor, weight: Tensor, window: Window, groups: int) -> Shape:
    """That of `image` [B, C_in, H, W] and `weight` [C_out, C_in/groups, KH, KW]."""
    return _shape(window, groups, *image.shape, *weight.shape[:2])


@lru_cache(maxsize=256)
def _shape(
    window: Window, groups: int, B: int, C: int, H: int, W: int, outs: int, ins: int
) -> Shape:
    return Shape(window, (H, W), B, groups, ins, outs // groups)


@dataclass(frozen=True, eq=False)
class Blocks:
    """How the work is divided.

    Attributes:
        shape: the geometry.
        vectors: to compute with.
        threads: that compute.
        chunks: of outputs; for each its rows, columns, vertical and horizontal taps, first and
            last + 1, and how many outputs come before it.
        pieces: that the channels of a group of the input are divided into.
        parts: that the channels of the output are divided into.
        run: chunks, of one image, whose sums are kept while a piece of the weight is used.
    """

    shape: Shape
    vectors: Vectors
    threads: int
    chunks: tuple[tuple[int, ...], ...]
    pieces: int
    parts: int = 1
    run: int = 1

    @cached_property
    def items(self) -> int:
        """What threads share forward: runs of chunks of images, and parts of the channels."""
        return self.shape.batch * (len(self.chunks) // self.run) * self.parts

    @cached_property
    def is_packed(self) -> bool:
        """Whether the weight is laid out once for all items: each would do it itself else."""
        return not self.shape.is_sparse and self.items > self.threads

    @cached_property
    def each(self) -> int:
        """Most channels of a piece."""
        return -(-self.shape.ins // self.pieces)

    @cached_property
    def count(self) -> int:
        """Most outputs of a chunk."""
        return max((r[1] - r[0]) * (r[3] - r[2]) for r in self.chunks)

    @cached_property
    def blocks(self) -> int:
        """Most blocks of a chunk."""
        return -(-self.count // self.vectors.wide)

    @cached_property
    def run_blocks(self) -> int:
        """Most blocks of a run."""
        wide = self.vectors.wide
        found = [-(-((r[1] - r[0]) * (r[3] - r[2])) // wide) for r in self.chunks]
        return max(sum(found[n : n + self.run]) for n in range(0, len(found), self.run))

    @cached_property
    def line(self) -> int:
        """Numbers of K for a tap of a chunk."""
        return self.blocks * self.vectors.wide

    @cached_property
    def lot(self) -> int:
        """Rows of a tap where taps can be left out: whole blocks. Else 0."""
        return _up(self.each, self.vectors.high) if self.shape.is_sparse else 0

    @cached_property
    def rows(self) -> int:
        """Most rows of a piece, taps times channels."""
        return (self.lot or self.each) * self.shape.window.taps

    @cached_property
    def room(self) -> int:
        """Numbers of a channel's columns for a tap and a phase, and what is read beyond them."""
        deepest = max(self._deep(r)[1] * (r[3] - r[2]) for r in self.chunks)
        return deepest + 2 * self.vectors.wide

    @cached_property
    def columns(self) -> int:
        """Numbers of the columns of a piece."""
        window = self.shape.window
        channels = self.lot or self.each
        return channels * window.kernel_size[1] * window.stride[0] * self.room

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """All of it, for a compiled loop."""
        window = self.shape.window
        left, _, top, _ = window.border(*self.shape.image)
        return (
            *self.shape.image,
            *self.shape.size,
            *(top, left, *window.stride, *window.dilation),
            *(window.kernel_size[1], window.taps, self.room, self.line),
            *(len(self.chunks), self._table.ctypes.data, self._offsets.ctypes.data),
        )

    @cached_property
    def pulls(self) -> NDArray[np.int64]:
        """For each chunk and row of a piece, where its columns and its K begin, [.., 2]."""
        taps, channels = self.shape.window.taps, self.lot or self.each
        found = np.zeros((len(self.chunks), channels * taps, 2), np.int64)
        for s, chunk in enumerate(self.chunks):
            apart = (chunk[7] - chunk[6]) * self.shape.window.stride[0] * self.room
            for n, t in enumerate(self._taps(chunk)):
                c = np.arange(channels)
                rows = t * channels + c if self.lot else c * taps + t
                found[s, rows, 0] = self._offsets[s, n] + c * apart
                found[s, rows, 1] = n * self.line
        return found

    def order(self, *counts: int) -> NDArray[np.int64]:
        """Where the weight of each channel and tap comes: tap by tap in pieces of so many."""
        taps, found, first = self.shape.window.taps, [], 0
        for count in counts:
            places = np.arange(taps * count).reshape(taps, count).T
            found.append(places.reshape(-1) + first)
            first += taps * count
        return np.concatenate(found)

    @cached_property
    def whole_order(self) -> NDArray[np.int64]:
        """`order` of all pieces of a group."""
        ins, pieces = self.shape.ins, self.pieces
        return self.order(
            *(b - a for a, b in pairwise(ins * n // pieces for n in range(pieces + 1)))
        )

    @cached_property
    def piece_orders(self) -> NDArray[np.int64]:
        """`order` of a piece, of the most channels and of one less."""
        return np.concatenate([self.order(self.each), self.order(max(1, self.each - 1))])

    @cached_property
    def orders_address(self) -> int:
        """Of `piece_orders`: numpy takes long to say it."""
        return int(self.piece_orders.ctypes.data)

    @cached_property
    def pulls_address(self) -> int:
        """Of `pulls`."""
        return int(self.pulls.ctypes.data)

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where each output comes, chunk by chunk; none where they keep their order."""
        if not self.shape.is_sparse:
            return np.zeros(0, np.int64)
        found = np.empty(self.shape.size, np.int64)
        for h0, h1, w0, w1, *_, before in self.chunks:
            count = (h1 - h0) * (w1 - w0)
            found[h0:h1, w0:w1] = before + np.arange(count).reshape(h1 - h0, w1 - w0)
        return found.reshape(-1)

    @cached_property
    def _table(self) -> NDArray[np.int64]:
        return np.array(self.chunks, np.int64)

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """For each chunk and each of its taps, where in a channel's columns its first output is."""
        window = self.shape.window
        down, apart = window.stride[0], window.dilation[0]
        found = np.zeros((len(self.chunks), window.taps), np.int64)
        for s, chunk in enumerate(self.chunks):
            first = self._deep(chunk)[0]
            for n, t in enumerate(self._taps(chunk)):
                i, j = divmod(t, window.kernel_size[1])
                row, phase = divmod(i * apart, down)
                at = ((j - chunk[6]) * down + phase) * self.room
                found[s, n] = at + (row - first) * (chunk[3] - chunk[2])
        return found

    def _taps(self, chunk: tuple[int, ...]) -> list[int]:
        """The taps of a chunk, as numbers of the window's."""
        KW = self.shape.window.kernel_size[1]
        return [i * KW + j for i in range(*chunk[4:6]) for j in range(*chunk[6:8])]

    def _deep(self, chunk: tuple[int, ...]) -> tuple[int, int]:
        """Rows of a phase before what a chunk sees, and how many it sees."""
        down, apart = self.shape.window.stride[0], self.shape.window.dilation[0]
        first = chunk[4] * apart // down
        return first, chunk[1] - chunk[0] + max(0, (chunk[5] - 1) * apart // down - first)


@lru_cache(maxsize=256)
def forward_blocks(shape: Shape, vectors: Vectors, threads: int) -> Blocks:
    """For the output: threads share chunks, or the output's channels where chunks are few."""
    pieces = _pieces(shape)
    each = -(-shape.ins // pieces)
    blocks = -(-shape.outs // vectors.high)
    units = shape.groups * blocks
    best: tuple[float, int, int] | None = None
    for parts in (p for p in range(1, threads + 1) if threads % p == 0 and p <= units):
        own = -(-units // parts)
        rows = _rows(shape, _seen(shape, each) + min(blocks, own) * vectors.high, _CACHE)
        count = -(-shape.size[0] // rows)
        while shape.batch * count * parts % threads and count < shape.size[0]:
            count += 1
        columns = -(-(-(-shape.size[0] // count) * shape.size[1]) // vectors.lanes)
        items = -(-shape.batch * count * parts // threads)
        # In vectors of sums for each row of a product: writing one of K·v takes as long as about
        # six of them, packing a number of the weight as three.
        took = items * columns * (own * vectors.high + 6) + 3 * own * vectors.high
        if best is None or took < best[0]:
            best = took, count, parts
    assert best is not None
    if shape.is_sparse:
        bands = _bands(shape, each)
        # The weight is far larger than the image: it is read once.
        return Blocks(shape, vectors, threads, bands, pieces, min(threads, units), len(bands))
    return Blocks(shape, vectors, threads, _chunks(shape, best[1]), pieces, best[2])


@lru_cache(maxsize=256)
def backward_blocks(shape: Shape, vectors: Vectors, threads: int) -> Blocks:
    """For the gradients: threads share pieces of channels."""
    pieces = _pieces(shape)
    while shape.groups * pieces % threads and pieces < shape.ins:
        pieces += 1
    each = -(-shape.ins // pieces)
    if shape.is_sparse:
        return Blocks(shape, vectors, threads, _bands(shape, each), pieces)
    chunks = _chunks(shape, -(-shape.size[0] // _rows(shape, 2 * _seen(shape, each), shape.cache)))
    return Blocks(shape, vectors, threads, chunks, pieces)


def _pieces(shape: Shape) -> int:
    return -(-shape.ins // max(1, _DEEP // shape.window.taps))


def _seen(shape: Shape, each: int) -> int:
    """Numbers of the columns of a piece, for each output."""
    return each * shape.window.kernel_size[1] * shape.window.stride[0]


def _rows(shape: Shape, numbers: int, cache: int) -> int:
    """Rows of a chunk that needs so many numbers for each output."""
    return max(1, min(shape.size[0], cache // (numbers * shape.size[1])))


def _chunks(shape: Shape, count: int) -> tuple[tuple[int, ...], ...]:
    """So many chunks of whole rows, with all taps."""
    (H_out, W_out), (KH, KW) = shape.size, shape.window.kernel_size
    ends = pairwise(H_out * n // count for n in range(count + 1))
    return tuple((a, b, 0, W_out, 0, KH, 0, KW, a * W_out) for a, b in ends)


def _bands(shape: Shape, each: int) -> tuple[tuple[int, ...], ...]:
    """Rectangles of outputs from which the same taps lie in the image."""
    axes = []
    for axis, ends in enumerate(spans(shape.window, shape.image)):
        side = shape.size[axis]
        cuts = sorted({0, side, *(end for pair in ends for end in pair)})
        found = []
        for a, b in pairwise(cuts):
            taps = [n for n, (first, last) in enumerate(ends) if first <= a and b <= last]
            found.append((a, b, taps[0], taps[-1] + 1) if taps else (a, b, 0, 0))
        axes.append(found)
    bands, before = [], 0
    for (h0, h1, i0, i1), (w0, w1, j0, j1) in product(*axes):
        if i0 == i1 or j0 == j1:
            i0, i1, j0, j1 = 0, 0, 0, 0
        tall = max(1, shape.cache // (_seen(shape, each) * (w1 - w0)))
        for a, b in pairwise([*range(h0, h1, tall), h1]):
            bands.append((a, b, w0, w1, i0, i1, j0, j1, before))
            before += (b - a) * (w1 - w0)
    return tuple(bands)


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
