"""Loops of the dense and the grouped convolution, as numba compiles them.

Each takes (first, last, thread, given, like), as `threads.shared` calls it; `like` says which
vectors there are, as in `registers`. Outputs are taken some whole rows at a time, a chunk, one
after another as one long row; channels of the input some at a time, a piece. `lie` is
`Blocks.numbers`.

What a chunk sees of a channel lies in columns, [horizontal tap, phase of rows, rows, W_out]: what a
tap sees of all its outputs is then a stretch. Beyond the image they are 0, and so is K, `factors`,
so that infinity times nothing is nothing.
"""

from __future__ import annotations

from typing import Any

from numba import carray

from pacswap.ops.loops.registers import ACROSS, adapt, lanes, multiply, pull, rows, turn, weigh
from pacswap.ops.loops.threads import compiled, pointer

_lanes, _rows = compiled(lanes), compiled(rows)
NUMBERS = 17  # of `lie`


@compiled
def sizes(like: Any) -> tuple[int, int, int]:
    """Lanes of a vector, rows of a block, numbers from a k to the next where rows lie together."""
    across, down = _lanes(like.ndim, like.itemsize), _rows(like.ndim)
    return across, down, max(across, down)


@compiled
def flat(address: int, count: int, like: Any) -> Any:
    """Numbers at an address."""
    return carray(pointer(address), (count,), like.dtype)


@compiled
def clear(x: Any, start: int, stop: int) -> None:
    """0 there; setting a slice would take as long as a row."""
    for n in range(start, stop):
        x[n] = 0


@compiled
def copy(into: Any, at: int, source: Any, start: int, count: int, step: int) -> None:
    """So many numbers, of the source every so many."""
    part = into[at : at + count]
    if step == 1:
        line = source[start : start + count]
        for n in range(part.size):
            part[n] = line[n]
    else:
        line = source[start : start + (count - 1) * step + 1]
        for n in range(part.size):
            part[n] = line[n * step]


@compiled
def add(into: Any, at: int, source: Any, start: int, count: int, step: int) -> None:
    """So many numbers, to every so many of what is there."""
    line = source[start : start + count]
    if step == 1:
        part = into[at : at + count]
        for n in range(line.size):
            part[n] += line[n]
    else:
        part = into[at : at + (count - 1) * step + 1]
        for n in range(line.size):
            part[n * step] += line[n]


@compiled
def span(start: int, step: int, count: int, side: int) -> tuple[int, int]:
    """Which of `count` places start, start + step, … lie in range(side): first and last + 1."""
    first = 0 if start >= 0 else (-start + step - 1) // step
    last = min(count, (side - 1 - start) // step + 1) if start < side else 0
    return min(first, count), max(min(first, count), last)


@compiled
def chunk(s: int, lie: Any) -> tuple[int, int]:
    """Rows of outputs, first and last + 1."""
    return lie[2] * s // lie[13], lie[2] * (s + 1) // lie[13]


@compiled
def block(q: int, count: int, lanes: int) -> tuple[int, int]:
    """Where the block begins among a chunk's outputs, and its vectors: 3, or fewer, evenly."""
    vectors = -(-count // lanes)
    blocks = -(-vectors // ACROSS)
    first = vectors * q // blocks
    return first * lanes, vectors * (q + 1) // blocks - first


@compiled
def blocks(count: int, lanes: int) -> int:
    """How many blocks there are."""
    return -(-count // (ACROSS * lanes))


@compiled
def mask(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """factors[b, chunk, t, p] = K[b, t, p] where the tap sees the image, else 0.

    For so many of [b, chunk, t]. `given`: addresses of K [B, taps, H_out, W_out] and of factors
    [B, chunks, taps, room for a chunk], B, lie.
    """
    g, lie = given, given[3:]
    H, W, H_out, W_out, above, beside = lie[0], lie[1], lie[2], lie[3], lie[4], lie[5]
    down, across, apart_y, apart_x, KW, taps = lie[6], lie[7], lie[8], lie[9], lie[11], lie[16]
    chunks, room = lie[13], lie[15]
    K = flat(g[0], g[2] * taps * H_out * W_out, like)
    factors = flat(g[1], g[2] * chunks * taps * room, like)
    for n in range(first, last):
        b, s, t = n // (taps * chunks), n // taps % chunks, n % taps
        h0, h1 = chunk(s, lie)
        x0, x1 = span(t % KW * apart_x - beside, across, W_out, W)
        y0, y1 = span(h0 * down + t // KW * apart_y - above, down, h1 - h0, H)
        if x0 == x1:
            y0, y1 = 0, 0
        at, start = n * room, ((b * taps + t) * H_out + h0) * W_out
        clear(factors, at, at + y0 * W_out)
        for y in range(y0, y1):
            line = at + y * W_out
            clear(factors, line, line + x0)
            copy(factors, line + x0, K, start + y * W_out + x0, x1 - x0, 1)
            clear(factors, line + x1, line + W_out)
        clear(factors, at + y1 * W_out, at + room)


@compiled
def collect(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """The gradient of K: the sum of what the threads found, 0 where a tap sees nothing.

    For so many of [b, chunk, t]. `given`: addresses of what was found, [threads, B, chunks, taps,
    room for a chunk], and of the gradient, [B, taps, H_out, W_out], zeros; threads, B, lie.
    """
    g, lie = given, given[4:]
    H, W, H_out, W_out, above, beside = lie[0], lie[1], lie[2], lie[3], lie[4], lie[5]
    down, across, apart_y, apart_x, KW, taps = lie[6], lie[7], lie[8], lie[9], lie[11], lie[16]
    chunks, room = lie[13], lie[15]
    threads, each = g[2], g[3] * chunks * taps * room
    found, grad = flat(g[0], threads * each, like), flat(g[1], g[3] * taps * H_out * W_out, like)
    for n in range(first, last):
        b, s, t = n // (taps * chunks), n // taps % chunks, n % taps
        h0, h1 = chunk(s, lie)
        x0, x1 = span(t % KW * apart_x - beside, across, W_out, W)
        y0, y1 = span(h0 * down + t // KW * apart_y - above, down, h1 - h0, H)
        for y in range(y0, y1 if x0 < x1 else y0):
            at = ((b * taps + t) * H_out + h0 + y) * W_out + x0
            for thread in range(threads):
                add(grad, at, found, thread * each + n * room + y * W_out + x0, x1 - x0, 1)


@compiled
def columns(v: Any, at: int, X: Any, pieces: tuple[int, int], rows: tuple[int, int], lie: Any) -> None:
    """What a chunk sees of some channels: X[c, j, phase, r, w], 0 beyond the image.

    Args:
        v: images, flat.
        at: where the image begins.
        X: is filled.
        pieces: channels, first and last + 1.
        rows: of the chunk, first and last + 1.
        lie: as above.
    """
    H, W, W_out, above, beside, down, across = lie[0], lie[1], lie[3], lie[4], lie[5], lie[6], lie[7]
    apart_y, apart_x, KH, KW, room = lie[8], lie[9], lie[10], lie[11], lie[14]
    deep = rows[1] - rows[0] + (KH - 1) * apart_y // down
    is_flat = down == 1 and across == 1 and W_out == W
    for c in range(pieces[0], pieces[1]):
        for j in range(KW):
            x0, x1 = span(j * apart_x - beside, across, W_out, W)
            for phase in range(down):
                start = (((c - pieces[0]) * KW + j) * down + phase) * room
                y0, y1 = span(rows[0] * down + phase - above, down, deep, H)
                if x0 == x1:
                    y0, y1 = 0, 0
                clear(X, start, start + y0 * W_out)
                x = at + (c * H + rows[0] * down + phase - above) * W + j * apart_x - beside
                if is_flat and y0 < y1:
                    # All rows in one go; what a row sees of its neighbours is put right after.
                    n, m = y0 * W + x0, (y1 - 1) * W + x1
                    copy(X, start + n, v, x + n, m - n, 1)
                for r in range(y0, y1):
                    line = start + r * W_out
                    clear(X, line, line + x0)
                    if not is_flat:
                        copy(X, line + x0, v, x + r * down * W + x0 * across, x1 - x0, across)
                    clear(X, line + x1, line + W_out)
                clear(X, start + y1 * W_out, start + room)


@compiled
def add_columns(
    X: Any, v: Any, at: int, pieces: tuple[int, int], rows: tuple[int, int], lie: Any
) -> None:
    """The inverse of `columns`: added to the image."""
    H, W, W_out, above, beside, down, across = lie[0], lie[1], lie[3], lie[4], lie[5], lie[6], lie[7]
    apart_y, apart_x, KH, KW, room = lie[8], lie[9], lie[10], lie[11], lie[14]
    deep = rows[1] - rows[0] + (KH - 1) * apart_y // down
    for c in range(pieces[0], pieces[1]):
        for j in range(KW):
            x0, x1 = span(j * apart_x - beside, across, W_out, W)
            for phase in range(down):
                start = (((c - pieces[0]) * KW + j) * down + phase) * room
                y0, y1 = span(rows[0] * down + phase - above, down, deep, H)
                x = at + (c * H + rows[0] * down + phase - above) * W + j * apart_x - beside
                for r in range(y0, y1 if x0 < x1 else y0):
                    line, to = start + r * W_out + x0, x + r * down * W + x0 * across
                    add(v, to, X, line, x1 - x0, across)


@compiled
def offset(t: int, lie: Any) -> int:
    """Where in the columns of a channel lies what a tap sees of the first output."""
    i, j = t // lie[11] * lie[8], t % lie[11]
    return (j * lie[6] + i % lie[6]) * lie[14] + i // lie[6] * lie[3]


@compiled
def piece(n: int, count: int, each: int) -> tuple[int, int, int]:
    """(group, first and last + 1 channel of it) of a piece, `count` to each group."""
    a = n % count
    return n // count, each * a // count, each * (a + 1) // count


@compiled
def pack(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """Of matrices [.., rows, columns] the panels [.., columns, step]: some rows lie together.

    For so many panels of all matrices. `given`: addresses of the matrices and of the panels, how
    many matrices, rows, columns, step (numbers of a panel's k, of which the rows fill the first
    `wide`, zeros after the last row), wide.
    """
    g = given
    count, high, columns, step, wide = g[2], g[3], g[4], g[5], g[6]
    lanes = sizes(like)[0]
    panels = -(-high // wide)
    source = flat(g[0], count * high * columns, like)
    into = flat(g[1], count * panels * columns * step, like)
    for n in range(first, last):
        top = n % panels * wide
        start, to = (n // panels * high + top) * columns, n * columns * step
        here = min(wide, high - top)
        whole = columns // lanes * lanes
        for r in range(0, wide, lanes):
            if r + lanes <= here:
                for k in range(0, whole, lanes):
                    a = g[0] + (start + r * columns + k) * like.itemsize
                    turn(like, a, columns, g[1] + (to + k * step + r) * like.itemsize, step)
                for k in range(whole, columns):
                    for i in range(r, r + lanes):
                        into[to + k * step + i] = source[start + i * columns + k]
                continue
            for k in range(columns):
                for i in range(r, r + lanes):
                    value = source[start + i * columns + k] if i < here else 0
                    into[to + k * step + i] = value


@compiled
def product(
    like: Any, across: int, left: int, right: int, into: int, counts: Any, apart: int, more: int
) -> None:
    """`multiply` for a block of so many vectors."""
    total, run, jump = counts
    if across == 3:
        multiply(like, 3, left, right, into, total, run, jump, apart, more)
    elif across == 2:
        multiply(like, 2, left, right, into, total, run, jump, apart, more)
    else:
        multiply(like, 1, left, right, into, total, run, jump, apart, more)


@compiled
def seen_taps(p: int, width: int, rows: Any, lie: Any) -> tuple[int, int]:
    """Taps, first and last + 1, that see the image from any of some outputs of a chunk."""
    top = (rows[0] + p // lie[3]) * lie[6] - lie[4]
    last = min(rows[1] - 1, rows[0] + (p + width - 1) // lie[3]) * lie[6] - lie[4]
    i0 = 0 if last >= 0 else (-last + lie[8] - 1) // lie[8]
    i1 = min(lie[10], (lie[0] - 1 - top) // lie[8] + 1) if top < lie[0] else 0
    return min(i0, i1) * lie[11], i1 * lie[11]


@compiled
def adapted(
    like: Any, factors: int, X: int, into: int, place: Any, taps: Any, channels: int, given: Any
) -> None:
    """into[c, t, column] = K[t, column] · v[c, column + t] for a block of outputs."""
    size, (p, across), lie = like.itemsize, place, given
    k, x = factors + (taps[0] * lie[15] + p) * size, X + p * size
    table = given.ctypes.data + (NUMBERS + taps[0]) * 8
    count, channel = taps[1] - taps[0], lie[11] * lie[6] * lie[14]
    if across == 3:
        adapt(like, 3, k, lie[15], x, channel, into, table, count, channels)
    elif across == 2:
        adapt(like, 2, k, lie[15], x, channel, into, table, count, channels)
    else:
        adapt(like, 1, k, lie[15], x, channel, into, table, count, channels)


@compiled
def forward(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, o, p] = Σ_ct w[o, c, t] · K[b, t, p] · v[b, c, p + t].

    For so many of [b, chunk, part of the outputs' channels]. `given`: addresses of v, factors, the
    packed weight, the output and a room for each thread; numbers of a room, where in it sums and
    columns begin; B, groups, channels of a group of the input and of the output, pieces of a group,
    parts; lie.
    """
    g, lie, size = given, given[14:], like.itemsize
    begin_sums, begin_columns, groups, C, O = g[6], g[7], g[9], g[10], g[11]
    pieces, parts, chunks, taps = g[12], g[13], lie[13], lie[16]
    lanes, high, step = sizes(like)
    wide, H_W, HW_out = ACROSS * lanes, lie[0] * lie[1], lie[2] * lie[3]
    v, Y = flat(g[0], g[8] * groups * C * H_W, like), flat(g[3], g[8] * groups * O * HW_out, like)
    room = g[4] + thread * g[5] * size
    sums = flat(room + begin_sums * size, begin_columns - begin_sums, like)
    X = flat(room + begin_columns * size, g[5] - begin_columns, like)
    each = -(-O // high)  # blocks of the outputs' channels, for a group
    packed = -(-O // step) * C * taps * step
    for item in range(first, last):
        b, s, part = item // (chunks * parts), item // parts % chunks, item % parts
        rows = chunk(s, lie)
        count = (rows[1] - rows[0]) * lie[3]
        n = blocks(count, lanes)
        u0, u1 = groups * each * part // parts, groups * each * (part + 1) // parts
        factors = g[1] + (b * chunks + s) * taps * lie[15] * size
        for group in range(u0 // each, (u1 + each - 1) // each):
            o0, o1 = max(u0, group * each) - group * each, min(u1, (group + 1) * each) - group * each
            for a in range(pieces):
                c0, c1 = C * a // pieces, C * (a + 1) // pieces
                own = group * C + c0, group * C + c1
                columns(v, b * groups * C * H_W, X, own, rows, lie)
                for q in range(n):
                    p, across = block(q, count, lanes)
                    t0, t1 = seen_taps(p, across * lanes, rows, lie)
                    adapted(like, factors, X.ctypes.data, room, (p, across), (t0, t1), c1 - c0, lie)
                    counts = ((c1 - c0) * (t1 - t0), max(1, t1 - t0), (taps - t1 + t0) * step)
                    for o in range(o0, o1):
                        left = group * packed + (o * high // step * C + c0) * taps * step + o * high % step
                        at = g[2] + (left + t0 * step) * size
                        into = sums.ctypes.data + ((o - o0) * n + q) * high * wide * size
                        product(like, across, at, room, into, counts, wide, a)
            for o in range(o0 * high, min(O, o1 * high)):
                for q in range(n):
                    p, across = block(q, count, lanes)
                    line = (((o // high - o0) * n + q) * high + o % high) * wide
                    to = ((b * groups + group) * O + o) * HW_out + rows[0] * lie[3] + p
                    copy(Y, to, sums, line, min(count - p, across * lanes), 1)


@compiled
def lay(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """A gradient [B, O, H_out, W_out] as blocks [B, chunks, blocks, O, columns], zeros after it.

    For so many of [b, chunk]. `given`: addresses of both, B, O, blocks of the largest chunk; lie.
    """
    g, lie = given, given[5:]
    O, most, chunks, lanes = g[3], g[4], lie[13], sizes(like)[0]
    wide, HW_out = ACROSS * lanes, lie[2] * lie[3]
    grad = flat(g[0], g[2] * O * HW_out, like)
    into = flat(g[1], g[2] * chunks * most * O * wide, like)
    for n in range(first, last):
        rows = chunk(n % chunks, lie)
        count = (rows[1] - rows[0]) * lie[3]
        for q in range(blocks(count, lanes)):
            p, across = block(q, count, lanes)
            here = min(count - p, across * lanes)
            start = n // chunks * O * HW_out + rows[0] * lie[3] + p
            for o in range(O):
                to = ((n * most + q) * O + o) * wide
                copy(into, to, grad, start + o * HW_out, here, 1)
                clear(into, to + here, to + across * lanes)


@compiled
def pulled(
    like: Any, across: int, left: int, right: int, total: int, rows: int, table: int, places: Any
) -> None:
    """`pull` for a block of so many vectors."""
    x, k, f, d = places
    if across == 3:
        pull(like, 3, left, right, total, rows, table, x, k, f, d)
    elif across == 2:
        pull(like, 2, left, right, total, rows, table, x, k, f, d)
    else:
        pull(like, 1, left, right, total, rows, table, x, k, f, d)


@compiled
def backward(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """found[b, c, p + t] += K[b, t, p] · Z[c, t, p] and dots[b, t, p] += Σ_c Z · v; Z = Wᵀ·dY.

    For so many pieces of channels. `given`: addresses of v, factors, the weight, the gradient as
    `lay` leaves it, found, dots [threads, ..] and a room for each thread; numbers of a room and
    where in it columns begin, B, groups, channels of a group of the input and of the output, pieces
    of a group, blocks of a chunk, the address of `pull`'s table; lie.
    """
    g, lie, size = given, given[16:], like.itemsize
    begin, B, groups, C, O, pieces, most = g[8], g[9], g[10], g[11], g[12], g[13], g[14]
    chunks, taps, line = lie[13], lie[16], lie[15]
    lanes, high, step = sizes(like)
    wide, H_W = ACROSS * lanes, lie[0] * lie[1]
    v, found = flat(g[0], B * groups * C * H_W, like), flat(g[4], B * groups * C * H_W, like)
    W, place = flat(g[2], groups * O * C * taps, like), g[6] + thread * g[7] * size
    packed, X = flat(place, begin, like), flat(place + begin * size, g[7] - begin, like)
    dots, apart = g[5] + thread * B * chunks * taps * line * size, X.size // 2
    for n in range(first, last):
        group, c0, c1 = piece(n, pieces, C)
        count = (c1 - c0) * taps
        for r in range(0, count, step):
            for o in range(O):
                start = ((group * O + o) * C + c0) * taps + r
                copy(packed, (r * O + o * step), W, start, min(step, count - r), 1)
        for item in range(B * chunks):
            b, rows = item // chunks, chunk(item % chunks, lie)
            outputs = (rows[1] - rows[0]) * lie[3]
            own, at = (group * C + c0, group * C + c1), b * groups * C * H_W
            columns(v, at, X, own, rows, lie)
            clear(X, apart, X.size)
            for q in range(blocks(outputs, lanes)):
                p, across = block(q, outputs, lanes)
                right = g[3] + ((item * most + q) * groups + group) * O * wide * size
                x, k = X.ctypes.data + p * size, (item * taps * line + p) * size
                places = x, g[1] + k, x + apart * size, dots + k
                for r in range(0, count, high):
                    left = place + (r // step * step * O + r % step) * size
                    here = min(high, count - r)
                    pulled(like, across, left, right, O, here, g[15] + r * 16, places)
            add_columns(X[apart:], found, at, own, rows, lie)


@compiled
def weighed(
    like: Any, across: int, left: int, right: int, into: int, counts: Any, more: int
) -> None:
    """`weigh` for a block of so many vectors."""
    total, run, jump = counts
    if across == 3:
        weigh(like, 3, left, right, into, total, run, jump, run, more)
    elif across == 2:
        weigh(like, 2, left, right, into, total, run, jump, run, more)
    else:
        weigh(like, 1, left, right, into, total, run, jump, run, more)


@compiled
def unpack(
    like: Any, sums: Any, W: Any, start: int, apart: int, place: Any, rows: int, columns: int
) -> None:
    """W[start + o·apart + r] = sums[r, o]; sums lie as `ACROSS` vectors for each r."""
    lanes = sizes(like)[0]
    wide, size = ACROSS * lanes, like.itemsize
    for r in range(0, rows, lanes):
        for o in range(0, columns, lanes):
            at, to = place + r * wide + o, start + o * apart + r
            if r + lanes <= rows and o + lanes <= columns:
                source, into = sums.ctypes.data + at * size, W.ctypes.data + to * size
                turn(like, source, wide, into, apart)
                continue
            for i in range(min(lanes, rows - r)):
                for j in range(min(lanes, columns - o)):
                    W[to + j * apart + i] = sums[at + i * wide + j]


@compiled
def weights(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """grad_weight[o, c, t] = Σ_bp dY[b, o, p] · K[b, t, p] · v[b, c, p + t].

    For so many pieces of channels. `given`: addresses of v, factors, the gradient as `pack` leaves
    it with whole blocks, the weight's gradient and a room for each thread; numbers of a room, where
    in it sums and columns begin, blocks that are taken at once, B, groups, channels of a group of
    the input and of the output, pieces of a group; lie.
    """
    g, lie, size = given, given[14:], like.itemsize
    begin_sums, begin_columns, B, groups, C, O = g[6], g[7], g[9], g[10], g[11], g[12]
    pieces, chunks, taps, HW_out = g[13], lie[13], lie[16], lie[2] * lie[3]
    lanes, high, _ = sizes(like)
    wide, H_W = ACROSS * lanes, lie[0] * lie[1]
    v, W = flat(g[0], B * groups * C * H_W, like), flat(g[3], groups * O * C * taps, like)
    room = g[4] + thread * g[5] * size
    sums = flat(room + begin_sums * size, begin_columns - begin_sums, like)
    X = flat(room + begin_columns * size, g[5] - begin_columns, like)
    panels = -(-O // wide)
    for n in range(first, last):
        group, c0, c1 = piece(n, pieces, C)
        count = (c1 - c0) * taps
        deep = -(-count // high) * high
        for item in range(B * chunks):
            b, rows = item // chunks, chunk(item % chunks, lie)
            outputs = (rows[1] - rows[0]) * lie[3]
            columns(v, b * groups * C * H_W, X, (group * C + c0, group * C + c1), rows, lie)
            factors = g[1] + item * taps * lie[15] * size
            for p in range(0, outputs, g[8] * wide):
                here = min(outputs - p, g[8] * wide)
                for q in range(0, here, wide):
                    into = room + q // wide * deep * wide * size
                    across = min(ACROSS, -(-(here - q) // lanes))
                    adapted(like, factors, X.ctypes.data, into, (p + q, across), (0, taps), c1 - c0, lie)
                counts = here, wide, (deep - 1) * wide
                for o in range(panels):
                    at = ((b * groups + group) * panels + o) * HW_out + rows[0] * lie[3] + p
                    right, across = g[2] + at * wide * size, min(ACROSS, -(-(O - o * wide) // lanes))
                    for r in range(0, count, high):
                        into = sums.ctypes.data + (o * deep + r) * wide * size
                        weighed(like, across, room + r * wide * size, right, into, counts, item + p)
        for o in range(panels):
            start = ((group * O + o * wide) * C + c0) * taps
            unpack(like, sums, W, start, C * taps, o * deep * wide, count, min(wide, O - o * wide))
