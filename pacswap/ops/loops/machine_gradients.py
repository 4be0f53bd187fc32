"""The products of the dense and the grouped convolution's gradients, as numba compiles them.

As in `machine_dense`. Z = Wᵀ·dY, the gradient of K·v, never leaves the registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pacswap.ops.loops.machine_dense import adapted, few
from pacswap.ops.loops.machine_panels import add_columns, chunk, columns, sizes, taps_of
from pacswap.ops.loops.moves import add, clear, copy_rows, copy_steps, turn
from pacswap.ops.loops.registers import ACROSS, COLUMNS, pull, pull_turned, weigh
from pacswap.ops.loops.threads import compiled, inner
from pacswap.ops.loops.vectors import copy


@inner
def pulled(
    like: Any, across: int, left: int, right: int, total: int, rows: int, table: int, places: Any
) -> None:
    """`pull` for a block of so many vectors, if any."""
    x, k, f, d = places
    if across == 3:
        pull(like, 3, left, right, total, rows, table, x, k, f, d)
    elif across == 2:
        pull(like, 2, left, right, total, rows, table, x, k, f, d)
    elif across == 1:
        pull(like, 1, left, right, total, rows, table, x, k, f, d)


@inner
def pulled_turned(
    like: Any,
    count: int,
    packed: int,
    outs: int,
    right: int,
    rows: Any,
    table: int,
    places: Any,
    beside: int,
) -> None:
    """`pull_turned` for so many columns that come after others, and for some rows of panels."""
    size, step = like.itemsize, sizes(like)[2]
    for column in range(beside, beside + count, COLUMNS):
        b, (x, k, f, d) = right + column * size, places
        x, k, f, d = x + column * size, k + column * size, f + column * size, d + column * size
        for r in range(rows[0], rows[1], 2 * step):
            a, lines, here = packed + r * outs * size, table + r * 16, rows[1] - r
            apart = step * outs
            if here > step:
                here = min(here, 2 * step)
                pull_turned(like, 2, a, apart, b, outs, here, lines, x, k, f, d)
            else:
                pull_turned(like, 1, a, apart, b, outs, here, lines, x, k, f, d)


@inner
def transposed(
    like: Any, W: int, row: int, into: int, outs: int, channels: int, taps: int, lot: int
) -> None:
    """A piece of the weight as panels [row / step, o, step], a row for each channel and tap.

    Args:
        like: as in `machine_panels`.
        W: address of the piece, [o, c, t].
        row: numbers from an o to the next.
        into: address.
        outs: how many o.
        channels: of the piece.
        taps: of the window.
        lot: rows for a tap, if they are to lie tap by tap, else 0.
    """
    size, (lanes, high, step) = like.itemsize, sizes(like)
    count = channels * taps
    for o in range(outs):
        source, to = W + o * row * size, into + o * step * size
        if not lot:
            whole = count // step
            copy_rows(like, 1, to, outs * step, source, step, whole, step // lanes)
            rest = whole * step
            copy(like, to + rest * outs * size, source + rest * size, count - rest)
            continue
        for t in range(taps):
            for c in range(0, channels, high):
                r, here = t * lot + c, min(high, channels - c)
                place = to + (r // step * step * outs + r % step) * size
                copy_steps(like, place, source + (c * taps + t) * size, here, taps)


@compiled
def backward(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """found[b, c, p + t] += K[b, t, p] · Z[c, t, p] and dots[b, t, p] += Σ_c Z · v; Z = Wᵀ·dY.

    For so many pieces of channels. `given`: addresses of v, factors, the weight, the gradient as
    `lay` leaves it, found, dots [threads, ..], a room for each thread and `pull`'s table; numbers
    of dots and a room, where in it columns begin and how many they are, B, groups, channels of a
    group of the input and of the output, pieces of a group, blocks of a chunk, rows of a tap (0:
    rows lie channel by channel), which of [b, chunk] to do and dots to have, first and last + 1,
    where in a room the dots of a piece begin; lie.

    Those of a piece are summed up by themselves: sums of sums are more exact than long ones.
    """
    g, lie, size = given, given[22:], like.itemsize
    B, groups, ins, outs, pieces, most, lot = g[12], g[13], g[14], g[15], g[16], g[17], g[18]
    taps, line, KW, H_W = lie[11], lie[13], lie[10], lie[0] * lie[1]
    lanes, high, step = sizes(like)
    wide, end = ACROSS * lanes, g[0] + B * groups * ins * H_W * size
    packed, dots = g[6] + thread * g[9] * size, g[5] + thread * g[8] * size
    X, found = packed + g[10] * size, packed + (g[10] + g[11]) * size
    own = packed + g[21] * size
    height = (lot if lot else -(-ins // pieces)) * taps  # rows of the table for a chunk
    for n in range(first, last):
        group, a = n // pieces, n % pieces
        c0, c1 = ins * a // pieces, ins * (a + 1) // pieces
        start = g[2] + (group * outs * ins + c0) * taps * size
        transposed(like, start, ins * taps, packed, outs, c1 - c0, taps, lot)
        for item in range(g[19], g[20]):
            b, s = item // lie[14], item % lie[14]
            c = chunk(s, lie)
            at = (b * groups * ins + group * ins + c0) * H_W * size
            columns(like, g[0] + at, end, X, c1 - c0, c, lie)
            clear(like, found, (lot if lot else c1 - c0) * (c[7] - c[6]) * lie[6] * lie[12])
            runs, rows = (taps_of(c), c1 - c0) if lot else (1, (c1 - c0) * taps)
            count = (c[1] - c[0]) * (c[3] - c[2])
            for p in range(0, count, wide):
                across = min(ACROSS, -(-(count - p) // lanes))
                right = g[3] + ((item * most + p // wide) * groups + group) * outs * wide * size
                k, d = (item * taps * line + p) * size, ((item - g[19]) * taps * line + p) * size
                places = X + p * size, g[1] + k, found + p * size, own + p * size
                for n_t in range(taps_of(c)):
                    clear(like, own + (n_t * line + p) * size, wide)
                rest = few(like, count - p, lot % step == 0)
                fewer = across - (rest > 0)
                for run in range(runs):
                    t = (c[4] + run // (c[7] - c[6])) * KW + c[6] + run % (c[7] - c[6])
                    table, end_of_it = g[7] + s * height * 16, t * lot + rows
                    if rest:
                        lines, beside = (t * lot, end_of_it), fewer * lanes
                        pulled_turned(like, rest, packed, outs, right, lines, table, places, beside)
                    for r in range(t * lot, end_of_it, high):
                        left = packed + (r // step * step * outs + r % step) * size
                        here = min(high, end_of_it - r)
                        pulled(like, fewer, left, right, outs, here, table + r * 16, places)
                for n_t in range(taps_of(c)):
                    at_t = (n_t * line + p) * size
                    add(like, dots + d + n_t * line * size, own + at_t, wide)
            add_columns(like, found, g[4] + at, c1 - c0, c, lie)


@inner
def weighed(like: Any, across: int, left: int, right: int, into: int, counts: Any) -> None:
    """`weigh` for a block of so many vectors."""
    total, run, jump = counts
    if across == 3:
        weigh(like, 3, left, right, into, total, run, jump)
    elif across == 2:
        weigh(like, 2, left, right, into, total, run, jump)
    else:
        weigh(like, 1, left, right, into, total, run, jump)


@inner
def leave(
    like: Any, sums: int, W: int, apart: int, columns: int, channels: int, taps: int, lot: int
) -> None:
    """W[o, c, t] = sums[t·lot + c, o], o < columns: the rows of W lie so far apart."""
    size, lanes, wide = like.itemsize, sizes(like)[0], ACROSS * sizes(like)[0]
    lines, places = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    deep = channels * taps
    for first in range(0, deep, lanes):
        k = max(0, min(first, deep - lanes))
        for i in range(min(lanes, deep)):
            lines[i] = ((k + i) % taps * lot + (k + i) // taps) * wide
        for start in range(0, columns, lanes):
            o = max(0, min(start, columns - lanes))
            for j in range(min(lanes, columns)):
                places[j] = (o + j) * apart + k
            if deep >= lanes and columns >= lanes:
                turn(like, sums + o * size, lines.ctypes.data, W, places.ctypes.data)
                continue
            for i in range(min(lanes, deep)):
                for j in range(min(lanes, columns)):
                    copy(like, W + (places[j] + i) * size, sums + (lines[i] + o + j) * size, 1)


@compiled
def weights(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """grad_weight[o, c, t] = Σ_bp dY[b, o, p] · K[b, t, p] · v[b, c, p + t].

    For so many pieces of channels. `given`: addresses of v, factors, the gradient as `pack` leaves
    it with whole blocks, chunk by chunk, the weight's gradient and a room for each thread; numbers
    of a room, where in it sums and columns begin, blocks that are taken at once, B, groups,
    channels of a group of the input and of the output, pieces of a group, rows of a tap (0: its
    channels); lie.
    """
    g, lie, size = given, given[15:], like.itemsize
    B, groups, ins, outs, pieces = g[9], g[10], g[11], g[12], g[13]
    taps, KW, H_W, HW_out = lie[11], lie[10], lie[0] * lie[1], lie[2] * lie[3]
    lanes, high, _ = sizes(like)
    wide, end = ACROSS * lanes, g[0] + B * groups * ins * H_W * size
    room = g[4] + thread * g[5] * size
    sums, X = room + g[6] * size, room + g[7] * size
    panels = -(-outs // wide)
    for n in range(first, last):
        group, a = n // pieces, n % pieces
        c0, c1 = ins * a // pieces, ins * (a + 1) // pieces
        lot = g[14] if g[14] else c1 - c0
        deep = -(-lot * taps // high) * high
        clear(like, sums, panels * deep * wide)
        for item in range(B * lie[14]):
            b, c = item // lie[14], chunk(item % lie[14], lie)
            count = (c[1] - c[0]) * (c[3] - c[2])
            at = (b * groups * ins + group * ins + c0) * H_W * size
            columns(like, g[0] + at, end, X, c1 - c0, c, lie)
            runs, rows = (c[5] - c[4], (c[7] - c[6]) * lot) if g[14] else (1, lot * taps)
            for p in range(0, count, g[8] * wide):
                here = min(count - p, g[8] * wide)
                for q in range(0, here, wide):
                    adapted(like, g[1], X, room + q * deep * size, p + q, (c1 - c0, lot), item, lie)
                counts = here, wide, (deep - 1) * wide
                for o in range(panels):
                    across = min(ACROSS, -(-(outs - o * wide) // lanes))
                    right = ((b * groups + group) * panels + o) * HW_out * wide
                    right = g[2] + (right + (c[8] + p) * across * lanes) * size
                    for run in range(runs):
                        into = sums + (o * deep + ((c[4] + run) * KW + c[6]) * lot) * wide * size
                        left = room + run * rows * wide * size
                        for r in range(0, rows * wide * size, high * wide * size):
                            weighed(like, across, left + r, right, into + r, counts)
        for o in range(panels):
            start = ((group * outs + o * wide) * ins + c0) * taps
            source, here = sums + o * deep * wide * size, min(wide, outs - o * wide)
            leave(like, source, g[3] + start * size, ins * taps, here, c1 - c0, taps, lot)
