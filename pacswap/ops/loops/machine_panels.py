"""How what a dense convolution reads is laid out for its products, as numba compiles it.

`like` says which vectors there are, as in `registers`; places are addresses. `lie` is
`Blocks.numbers`. Outputs are taken a rectangle at a time, a chunk, row after row as one long row;
channels of the input some at a time, a piece.

What a chunk sees of a channel lies in columns, [horizontal tap, phase of rows, row, column]: what a
tap sees of all its outputs is then a stretch. Beyond the image they are 0, and so is K, `factors`,
so that infinity times nothing is nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from pacswap.ops.loops.moves import (
    add,
    add_steps,
    clear,
    clear_steps,
    copy_rows,
    copy_steps,
    turn,
)
from pacswap.ops.loops.registers import ACROSS, lanes_of, rows_of
from pacswap.ops.loops.threads import compiled, inner, pointer
from pacswap.ops.loops.vectors import copy

_lanes, _rows = inner(lanes_of), inner(rows_of)
CHUNK = 9  # numbers of a chunk


@inner
def sizes(like: Any) -> tuple[int, int, int]:
    """Lanes of a vector, rows of a block, numbers from a k to the next where rows lie together."""
    lanes, rows = _lanes(like.ndim, like.itemsize), _rows(like.ndim)
    return lanes, rows, max(lanes, rows)


@inner
def span(start: int, step: int, count: int, side: int) -> tuple[int, int]:
    """Which of `count` places start, start + step, … lie in range(side): first and last + 1."""
    first = 0 if start >= 0 else (-start + step - 1) // step
    last = min(count, (side - 1 - start) // step + 1) if start < side else 0
    return min(first, count), max(min(first, count), last)


@inner
def numbers_at(place: int, count: int) -> Any:
    """So many int64."""
    return carray(pointer(place), (count,), np.int64)


@inner
def chunk(s: int, lie: Any) -> Any:
    """A chunk's rows, columns, vertical and horizontal taps, each first and last + 1; its place."""
    return numbers_at(lie[15] + s * CHUNK * 8, CHUNK)


@inner
def inside(c: Any, i: int, j: int, lie: Any) -> tuple[int, int, int, int]:
    """From which rows and columns of a chunk a tap sees the image, first and last + 1."""
    x0, x1 = span(c[2] * lie[7] + j * lie[9] - lie[5], lie[7], c[3] - c[2], lie[1])
    y0, y1 = span(c[0] * lie[6] + i * lie[8] - lie[4], lie[6], c[1] - c[0], lie[0])
    return y0, y1 if x0 < x1 else y0, x0, x1


@inner
def tap_of(t: int, c: Any) -> tuple[int, int]:
    """Its row and column in the window, from its number among a chunk's taps."""
    return c[4] + t // (c[7] - c[6]), c[6] + t % (c[7] - c[6])


@inner
def taps_of(c: Any) -> int:
    """How many taps a chunk has."""
    return (c[5] - c[4]) * (c[7] - c[6])


@compiled
def mask(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """factors[b, chunk, t, p] = K[b, t, p] where the tap sees the image, else 0.

    For so many of [b, chunk]. `given`: addresses of K [B, taps, H_out, W_out] and of factors
    [B, chunks, taps, line], lie.
    """
    g, lie, size = given, given[2:], like.itemsize
    H_out, W_out, KW, taps, line = lie[2], lie[3], lie[10], lie[11], lie[13]
    for item in range(first, last):
        b, c = item // lie[14], chunk(item % lie[14], lie)
        wide = c[3] - c[2]
        for t in range(taps_of(c)):
            i, j = tap_of(t, c)
            y0, y1, x0, x1 = inside(c, i, j, lie)
            into = g[1] + (item * taps + t) * line * size
            clear(like, into, line)
            source = g[0] + (((b * taps + i * KW + j) * H_out + c[0]) * W_out + c[2]) * size
            for y in range(y0, y1):
                start = source + (y * W_out + x0) * size
                copy(like, into + (y * wide + x0) * size, start, x1 - x0)


@compiled
def collect(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """The gradient of K: the sum of what the threads found, 0 where a tap sees nothing.

    For so many of [b, chunk]. `given`: addresses of what was found, [threads, .., taps, line], and
    of the gradient, [B, taps, H_out, W_out], zeros; threads, numbers of one, the first of
    [b, chunk] that was found; lie.
    """
    g, lie, size = given, given[5:], like.itemsize
    H_out, W_out, KW, taps, line = lie[2], lie[3], lie[10], lie[11], lie[13]
    for item in range(first, last):
        b, c = (g[4] + item) // lie[14], chunk((g[4] + item) % lie[14], lie)
        wide = c[3] - c[2]
        for t in range(taps_of(c)):
            i, j = tap_of(t, c)
            y0, y1, x0, x1 = inside(c, i, j, lie)
            into = g[1] + (((b * taps + i * KW + j) * H_out + c[0]) * W_out + c[2]) * size
            for n in range(g[2]):
                found = g[0] + (n * g[3] + (item * taps + t) * line) * size
                for y in range(y0, y1):
                    start = found + (y * wide + x0) * size
                    add(like, into + (y * W_out + x0) * size, start, x1 - x0)


@inner
def stretch(c: Any, j: int, phase: int, lie: Any) -> tuple[int, int, int, int, int]:
    """Of a channel's columns for a tap and a phase, the part that sees the image.

    Returns:
        Rows and columns, first and last + 1, and where the first lies in the channel.
    """
    past = c[4] * lie[8] // lie[6]
    deep = c[1] - c[0] + (c[5] - 1) * lie[8] // lie[6] - past
    top, left = (c[0] + past) * lie[6] + phase - lie[4], c[2] * lie[7] + j * lie[9] - lie[5]
    x0, x1 = span(left, lie[7], c[3] - c[2], lie[1])
    y0, y1 = span(top, lie[6], deep, lie[0])
    return y0, y1 if x0 < x1 else y0, x0, x1, (top + y0 * lie[6]) * lie[1] + left + x0 * lie[7]


@inner
def sides(like: Any, start: int, wide: int, part: Any) -> None:
    """Zeros at the left and the right of some rows."""
    y0, y1, x0, x1 = part
    for x in range(x0):
        clear_steps(like, start + (y0 * wide + x) * like.itemsize, y1 - y0, wide)
    for x in range(x1, wide):
        clear_steps(like, start + (y0 * wide + x) * like.itemsize, y1 - y0, wide)


@inner
def columns(like: Any, image: int, end: int, X: int, channels: int, c: Any, lie: Any) -> None:
    """What a chunk sees of some channels of an image, 0 beyond it.

    Args:
        like: as above.
        image: address of the first channel.
        end: address beyond the last number that may be read.
        X: address of the columns.
        channels: how many.
        c: the chunk.
        lie: as above.
    """
    size, lanes, wide = like.itemsize, sizes(like)[0], c[3] - c[2]
    W, down, across, room = lie[1], lie[6], lie[7], lie[12]
    each, apart = (c[7] - c[6]) * down * room * size, lie[0] * W * size  # of a channel
    for part in range((c[7] - c[6]) * down):
        # Divisions take longer than a small copy: not for each channel.
        y0, y1, x0, x1, at = stretch(c, c[6] + part // down, part % down, lie)
        rows, count = y1 - y0, x1 - x0
        vectors, is_whole = -(-count // lanes), across == 1 and down == 1 and wide == W
        reach = ((rows - 1) * down * W + (count + lanes) * across) * size
        for n in range(channels):
            start, source = X + part * room * size + n * each, image + at * size + n * apart
            into = start + (y0 * wide + x0) * size
            clear(like, start, y0 * wide)
            if rows > 0 and is_whole:
                copy(like, into, source, (rows - 1) * W + count)
            elif across <= 2 and source + reach <= end:
                # What a row has too much lies where the next one comes, or zeros.
                if across == 1:
                    copy_rows(like, 1, into, wide, source, down * W, rows, vectors)
                else:
                    copy_rows(like, 2, into, wide, source, down * W, rows, vectors)
            else:
                for r in range(rows):
                    line = source + r * down * W * size
                    copy_steps(like, into + r * wide * size, line, count, across)
            sides(like, start, wide, (y0, y1, x0, x1))
            clear(like, start + y1 * wide * size, room - y1 * wide)


@inner
def add_columns(like: Any, X: int, image: int, channels: int, c: Any, lie: Any) -> None:
    """The inverse of `columns`: added to the image."""
    size, wide = like.itemsize, c[3] - c[2]
    W, down, across, room = lie[1], lie[6], lie[7], lie[12]
    each, apart = (c[7] - c[6]) * down * room * size, lie[0] * W * size  # of a channel
    for part in range((c[7] - c[6]) * down):
        y0, y1, x0, x1, at = stretch(c, c[6] + part // down, part % down, lie)
        for n in range(channels):
            start, into = X + part * room * size + n * each, image + at * size + n * apart
            source = start + (y0 * wide + x0) * size
            if y0 < y1 and across == 1 and down == 1 and wide == W:
                sides(like, start, wide, (y0, y1, x0, x1))
                add(like, into, source, (y1 - y0 - 1) * W + x1 - x0)
                continue
            for r in range(y1 - y0):
                line, to = source + r * wide * size, into + r * down * W * size
                if across == 1:
                    add(like, to, line, x1 - x0)
                else:
                    add_steps(like, to, line, x1 - x0, across)


@inner
def together(
    like: Any, source: int, apart: int, rows: int, into: int, step: int, order: Any, deep: int
) -> None:
    """into[order[k], row] = source[row, k]: some rows lie together.

    Args:
        like: as above.
        source: address.
        apart: numbers from a row to the next.
        rows: at most `step`; what is read beyond them has no meaning.
        into: address.
        step: numbers from a k to the next.
        order: of k; empty if they keep it.
        deep: how many k there are.
    """
    size, lanes = like.itemsize, sizes(like)[0]
    lines, places = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for top in range(0, rows, lanes):
        for i in range(lanes):
            lines[i] = min(top + i, rows - 1) * apart
        k = 0
        while k < deep:
            k = max(0, min(k, deep - lanes))
            for j in range(min(lanes, deep - k)):
                places[j] = (order[k + j] if order.size else k + j) * step + top
            if deep >= lanes:
                turn(like, source + k * size, lines.ctypes.data, into, places.ctypes.data)
            else:
                for j in range(deep):
                    for i in range(min(lanes, rows - top)):
                        copy(like, into + (places[j] + i) * size, source + (lines[i] + j) * size, 1)
            k += lanes


@compiled
def pack(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """Of matrices [rows, columns] panels [columns, step], in another order of columns if asked for.

    For so many panels. `given`: addresses of the matrices, the panels and the order; numbers of
    that, rows, columns, step; whether a panel of fewer rows has only so many vectors for a column.
    """
    g, size = given, like.itemsize
    rows, deep, step = g[4], g[5], g[6]
    panels = -(-rows // step)
    order = numbers_at(g[2], g[3])
    for n in range(first, last):
        top = n % panels * step
        source = g[0] + (n // panels * rows + top) * deep * size
        here = min(step, rows - top)
        lanes = sizes(like)[0]
        apart = -(-here // lanes) * lanes if g[7] else step
        together(like, source, deep, here, g[1] + n * deep * step * size, apart, order, deep)


@compiled
def lay(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """A gradient [B, channels, H_out, W_out] as blocks [B, chunks, blocks, channels, columns].

    Zeros follow the last output of a chunk. For so many of [b, chunk]. `given`: addresses of both,
    channels, blocks of the largest chunk; lie.
    """
    g, lie, size = given, given[4:], like.itemsize
    lanes, H_out, W_out = sizes(like)[0], lie[2], lie[3]
    wide = ACROSS * lanes
    for item in range(first, last):
        c = chunk(item % lie[14], lie)
        whole = c[3] - c[2] == W_out
        rows = 1 if whole else c[1] - c[0]
        each = (c[1] - c[0]) * (c[3] - c[2]) // rows
        for o in range(g[2]):
            source = ((item // lie[14] * g[2] + o) * H_out + c[0]) * W_out + c[2]
            into = g[1] + (item * g[3] * g[2] + o) * wide * size
            p = 0
            for r in range(rows):
                x = 0
                while x < each:
                    count = min(each - x, wide - p % wide)
                    to = into + (p // wide * g[2] * wide + p % wide) * size
                    copy(like, to, g[0] + (source + r * W_out + x) * size, count)
                    x, p = x + count, p + count
            if p % wide:
                to = into + (p // wide * g[2] * wide + p % wide) * size
                clear(like, to, wide - p % wide)
