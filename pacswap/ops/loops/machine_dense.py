"""The products of the dense and the grouped convolution, forward, as numba compiles them.

Each loop takes (first, last, thread, given, like), as `threads.shared` calls it; the rest is as in
`machine_panels`. K·v of a block of outputs is written for a piece of channels, and stays in the
first cache while all outputs' channels take it up.
"""

from __future__ import annotations

from typing import Any

from pacswap.ops.loops.machine_panels import (
    chunk,
    columns,
    numbers_at,
    sizes,
    taps_of,
    together,
)
from pacswap.ops.loops.moves import copy_steps
from pacswap.ops.loops.registers import ACROSS, COLUMNS, adapt, multiply, multiply_turned
from pacswap.ops.loops.threads import compiled, inner
from pacswap.ops.loops.vectors import copy

# Of so few input channels the sums of one row of taps are made apart: sums of sums are more exact,
# as they are where each tap is a matrix product.
FEW_INPUTS = 64


@inner
def product(
    like: Any, across: int, left: int, right: int, into: int, counts: Any, more: int
) -> None:
    """`multiply` for a block of so many vectors, if any."""
    total, run, jump = counts
    if across == 3:
        multiply(like, 3, left, right, into, total, run, jump, more)
    elif across == 2:
        multiply(like, 2, left, right, into, total, run, jump, more)
    elif across == 1:
        multiply(like, 1, left, right, into, total, run, jump, more)


@inner
def few(like: Any, rest: int, is_even: bool) -> int:
    """Of so many columns that are left, how many are best computed in vectors of rows.

    Those beyond whole vectors, where rows come in whole panels and the sums have room for that.
    """
    lanes, _, step = sizes(like)
    whole, beyond = rest // lanes, rest % lanes
    if whole >= ACROSS or not is_even or 4 * beyond > 3 * lanes:
        return 0
    return beyond if step <= (ACROSS - whole) * lanes else 0


@inner
def product_turned(
    like: Any, count: int, panels: int, left: int, apart: int, right: int, into: int, counts: Any
) -> None:
    """`multiply_turned` for so many columns and panels of rows, that lie so far apart."""
    total, run, jump, more = counts
    size, step = like.itemsize, sizes(like)[2]
    for column in range(0, count, COLUMNS):
        b = right + column * size
        for q in range(0, panels, 2):
            a = left + q * apart * size
            to = into + (q * step + column) * ACROSS * sizes(like)[0] * size
            if panels - q > 1:
                multiply_turned(like, 2, a, apart, b, to, total, run, jump, more)
            else:
                multiply_turned(like, 1, a, apart, b, to, total, run, jump, more)


@inner
def adapted(
    like: Any, factors: int, X: int, into: int, p: int, counts: Any, item: int, lie: Any
) -> int:
    """`adapt` for the block of a chunk's outputs that begins at p; how many vectors it has.

    `counts`: channels, rows of `into` for a tap. `item`: of [b, chunk].
    """
    size, (channels, lot), lanes = like.itemsize, counts, sizes(like)[0]
    s = item % lie[14]
    c = chunk(s, lie)
    across = min(ACROSS, -(-((c[1] - c[0]) * (c[3] - c[2]) - p) // lanes))
    k, x = factors + (item * lie[11] * lie[13] + p) * size, X + p * size
    apart, table, taps = lot * ACROSS * lanes, lie[16] + s * lie[11] * 8, taps_of(c)
    channel = (c[7] - c[6]) * lie[6] * lie[12]
    if across == 3:
        adapt(like, 3, k, lie[13], x, channel, into, apart, table, taps, channels)
    elif across == 2:
        adapt(like, 2, k, lie[13], x, channel, into, apart, table, taps, channels)
    else:
        adapt(like, 1, k, lie[13], x, channel, into, apart, table, taps, channels)
    return across


@compiled
def forward(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, o, p] = Σ_ct w[o, c, t] · K[b, t, p] · v[b, c, p + t].

    For so many of [b, run of chunks, part of the outputs' channels]. `given`: addresses of v,
    factors, the weight, the packed weight (0 if each run packs its own), the output, a room for
    each thread and the orders of the taps; numbers of a room, where in it the packed weight, the
    sums and the columns begin; B, groups, channels of a group of the input and of the output,
    pieces of a group, parts, chunks of a run; lie.
    """
    g, lie, size = given, given[18:], like.itemsize
    groups, ins, outs, pieces, parts, run = g[12], g[13], g[14], g[15], g[16], g[17]
    _, high, step = sizes(like)
    own = g[5] + (thread * g[7] + g[8]) * size
    each, deep = -(-outs // high), ins * lie[11]  # blocks of a group's outputs; rows of products
    for item in range(first, last):
        n, part = item // parts * run, item % parts
        u0, u1 = groups * each * part // parts, groups * each * (part + 1) // parts
        for group in range(u0 // each, -(-u1 // each)):
            o0 = max(u0, group * each) - group * each
            o1 = min(u1, (group + 1) * each) - group * each
            base = o0 * high // step * step
            for a in range(pieces):
                c0, c1 = ins * a // pieces, ins * (a + 1) // pieces
                left, apart = own, (c1 - c0) * lie[11] * step  # panels of the weight
                if g[3]:
                    left = g[3] + (group * -(-outs // step) * deep + c0 * lie[11]) * step * size
                    left, apart = left + base * deep * size, deep * step
                else:
                    most = -(-ins // pieces)
                    order = numbers_at(
                        g[6] + (c1 - c0 < most) * most * lie[11] * 8, (c1 - c0) * lie[11]
                    )
                    for o in range(base, min(outs, o1 * high), step):
                        source = g[2] + ((group * outs + o) * deep + c0 * lie[11]) * size
                        into = own + (o - base) // step * apart * size
                        together(
                            like, source, deep, min(step, outs - o), into, step, order, order.size
                        )
                left -= base // step * apart * size
                places, channels = (left, apart, thread), (group, a, o0, o1)
                add_piece(like, n, run, places, channels, given)
            finish(like, n, run, thread, (group, o0, o1), given)


@inner
def add_piece(like: Any, n: int, run: int, places: Any, channels: Any, given: Any) -> None:
    """What a piece of channels gives to the sums of a run of chunks, which begins at n."""
    g, lie, size = given, given[18:], like.itemsize
    (left, apart, thread), (group, a, o0, o1) = places, channels
    ins, KW, H_W = g[13], lie[10], lie[0] * lie[1]
    _, high, step = sizes(like)
    wide, end = ACROSS * sizes(like)[0], g[0] + g[11] * g[12] * ins * H_W * size
    is_even = o0 * high % step == 0 and o1 * high % step == 0
    c0, c1 = ins * a // g[15], ins * (a + 1) // g[15]
    room = g[5] + thread * g[7] * size
    sums, X = room + g[9] * size, room + g[10] * size
    for item in range(n, n + run):
        c = chunk(item % lie[14], lie)
        image = g[0] + ((item // lie[14] * g[12] + group) * ins + c0) * H_W * size
        columns(like, image, end, X, c1 - c0, c, lie)
        count = (c1 - c0) * (c[7] - c[6])
        counts = count * (c[5] - c[4]), max(1, count), ((c1 - c0) * KW - count) * step
        times, jump = 1, (c1 - c0) * KW * step * size
        if ins < FEW_INPUTS:
            times, counts = max(1, c[5] - c[4]), (count if c[5] > c[4] else 0, max(1, count), 0)
        start = left + (c[4] * KW + c[6]) * (c1 - c0) * step * size
        for p in range(0, (c[1] - c[0]) * (c[3] - c[2]), wide):
            across = adapted(like, g[1], X, room, p, (c1 - c0, c1 - c0), item, lie)
            rest = few(like, (c[1] - c[0]) * (c[3] - c[2]) - p, is_even)
            for i in range(times):
                here, right = start + i * jump, room + i * count * wide * size
                block, units = (across, rest), (o0, o1)
                add_block(like, block, (here, apart, right, sums), (*counts, a + i), units)
            sums += (o1 - o0) * high * wide * size


@inner
def add_block(like: Any, block: Any, places: Any, counts: Any, units: Any) -> None:
    """Some products of a block of outputs for all channels of the output: their blocks of rows.

    `block`: vectors across, and columns of the last of them that are computed in vectors of rows;
    `places`: the weight, numbers from panel to panel, K·v and the sums; `counts`: as `multiply`
    has them, and whether to add.
    """
    size, (lanes, high, step), (across, rest) = like.itemsize, sizes(like), block
    (left, apart, right, sums), (total, run, jump, more), (o0, o1) = places, counts, units
    if rest:
        across -= 1
        beside, panels = across * lanes * size, (o1 - o0) * high // step
        here = left + o0 * high // step * apart * size
        product_turned(like, rest, panels, here, apart, right + beside, sums + beside, counts)
    for o in range(o0, o1):
        here = left + (o * high // step * apart + o * high % step) * size
        into = sums + (o - o0) * high * ACROSS * lanes * size
        product(like, across, here, right, into, (total, run, jump), more)


@inner
def finish(like: Any, n: int, run: int, thread: int, channels: Any, given: Any) -> None:
    """The sums of a run of chunks to where they belong."""
    g, lie, size = given, given[18:], like.itemsize
    (group, o0, o1), (_, high, _), outs = channels, sizes(like), g[14]
    wide, step = ACROSS * sizes(like)[0], sizes(like)[2]
    is_even = o0 * high % step == 0 and o1 * high % step == 0
    sums = g[5] + (thread * g[7] + g[9]) * size
    for item in range(n, n + run):
        c = chunk(item % lie[14], lie)
        for o in range(o0 * high, min(outs, o1 * high)):
            to = ((item // lie[14] * g[12] + group) * outs + o) * lie[2] * lie[3] * size
            row = o - o0 * high
            source = sums + row * wide * size
            turned = sums + (row // step * step * wide + row % step) * size if is_even else 0
            put(like, (source, turned), (o1 - o0) * high * wide, g[4] + to, c, lie)
        sums += -(-((c[1] - c[0]) * (c[3] - c[2])) // wide) * (o1 - o0) * high * wide * size


@inner
def put(like: Any, sources: Any, apart: int, into: int, c: Any, lie: Any) -> None:
    """A chunk's outputs of a channel to where they belong; its blocks lie so far apart.

    `sources`: where the channel's sums begin in vectors of columns, and in vectors of rows or 0.
    """
    size, lanes, W_out = like.itemsize, sizes(like)[0], lie[3]
    wide, total = ACROSS * lanes, (c[1] - c[0]) * (c[3] - c[2])
    rest = few(like, total % wide, sources[1] != 0)
    rows = 1 if c[3] - c[2] == W_out else c[1] - c[0]
    each = total // rows
    p = 0
    for r in range(rows):
        x = 0
        while x < each:
            to, q = into + ((c[0] + r) * W_out + c[2] + x) * size, p % wide
            block = p // wide * apart * size
            if p < total - rest:
                count = min(each - x, min(wide - q, total - rest - p))
                copy(like, to, sources[0] + block + q * size, count)
            else:
                count = each - x
                column, first = total - rest - total // wide * wide, p - (total - rest)
                source = sources[1] + block + (first * wide + column) * size
                copy_steps(like, to, source, count, wide)
            x, p = x + count, p + count
