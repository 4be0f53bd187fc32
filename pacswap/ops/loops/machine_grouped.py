"""Loops of the depthwise and the grouped convolution, as numba compiles them.

Two rows of some outputs at a time, a vector of each: their sums stay in registers while the taps
pass by. Each K that is read serves them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from pacswap.ops.loops.emit import INT, Vectors
from pacswap.ops.loops.machine_planes import add_back, cut, flatten, unflatten
from pacswap.ops.loops.threads import compiled, pointer
from pacswap.ops.loops.vectors import copy

_ROWS = 2
_SUMMED = 4  # units of channels whose gradients of K are summed up before they are written


@intrinsic(prefer_literal=True)
def sum_taps(
    typingctx: Any, like: Any, outputs: Any, apart: Any, places: Any, counts: Any, steps: Any
) -> Any:
    """Σ_c Σ_t w[o, c, t] · K[t, p] · v[c, p + t] of some outputs, for a vector of two rows each.

    Args:
        typingctx: numba's.
        like: an array of the dtype.
        outputs: 4 or 1.
        apart: 1 if output o sees input o and no other.
        places: addresses of v, K, w, the outputs, and the offsets of the taps.
        counts: (taps, inputs).
        steps: in numbers, of v: (to the next input, row), K: (tap, row), w: (output, input),
            outputs: (output, row), and to the K that is needed next.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, count = Vectors(builder, like.dtype), outputs.literal_value
        v, factors, weight, made, offsets = emit.parts(args[3])
        taps, inputs = emit.parts(args[4])
        v_plane, v_row, k_tap, k_row, w_output, w_input, out, row, ahead = emit.parts(args[5])
        totals = [emit.sums(_ROWS) for _ in range(count)]
        with emit.repeated(inputs) as c:
            # Of each input apart: sums of sums are more exact than long ones.
            sums = [emit.sums(_ROWS) for _ in range(count)]
            with emit.repeated(taps) as t:
                k_t = emit.place(factors, k_tap, t)
                w_t = emit.place(emit.place(weight, w_input, c), 1, t)
                v_t = emit.place(emit.place(v, v_plane, c), emit.index(offsets, t))
                k = [emit.load(emit.place(k_t, k_row, r)) for r in range(_ROWS)]
                for r in range(_ROWS):
                    emit.fetch(emit.place(emit.place(k_t, ahead), k_row, r))
                if not apart.literal_value:
                    seen = [emit.load(emit.place(v_t, v_row, r)) for r in range(_ROWS)]
                    k = [emit.product(*pair) for pair in zip(k, seen, strict=True)]
                for o in range(count):
                    w = emit.spread(emit.place(w_t, w_output, o))
                    for r in range(_ROWS):
                        added = emit.product(w, k[r])
                        if apart.literal_value:
                            own = emit.place(emit.place(v_t, v_plane, o), v_row, r)
                            added = emit.product(added, emit.load(own))
                        emit.add(sums[o][r], added)
            for o in range(count):
                for r in range(_ROWS):
                    emit.add(totals[o][r], emit.total(sums[o][r]))
        for o in range(count):
            for r in range(_ROWS):
                emit.store(emit.total(totals[o][r]), emit.place(emit.place(made, out, o), row, r))
        return context.get_dummy_value()

    return types.void(like, outputs, apart, places, counts, steps), code


@compiled
def put(aside: Any, lanes: int, output: Any, top: int, rows: int) -> None:
    """What `sum_taps` made of outputs [o, H_out, W_out], two rows each, to where it belongs."""
    for o in range(output.shape[0]):
        unflatten(aside[2 * o * lanes :], output[o, top : top + rows], lanes)


@compiled
def grouped(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, o, p] = Σ_c Σ_t w[o, c, t] · K[b, t, p] · v[b, c, p + t], c of o's group.

    For units `first` to `last`: the outputs of a group, or a part of them. `given`: v [B, C_in, H,
    W]; addresses of K [B, taps, H_out, W_out] and w [C_out, C_in/G, taps]; output [B, C_out, H_out,
    W_out]; room [threads, planes of a group, a vector, K of some rows and a vector if a row is
    shorter than that, 8 vectors]; then C_in/G, taps, inputs and outputs of a group (if output o
    sees input o alone, of 4 of them), its parts, outputs of a part, whether that is so, numbers of
    a vector, numbers from plane to plane, rows that are computed at once, the address of the
    offsets of the taps, and `Layout.numbers`.

    In an image that is narrower than a vector, a row ends in the next one, which is written after.
    """
    g, size = given, like.itemsize
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), like.dtype)
    output = carray(pointer(g[7]), (g[8], g[9], g[10], g[11]), like.dtype)
    room = carray(pointer(g[12]), (g[13], g[14]), like.dtype)[thread]
    each, taps, inputs, outputs, parts, share, apart, lanes, plane, rows = g[15:25]
    lie, (C_out, height, width) = g[26:], output.shape[1:]
    pixels, row, aside = height * width, lie[7], room.size - 8 * lanes
    here, ahead = g[12] + size * thread * room.size, lanes if width > lanes else 2 * width
    for b in range(image.shape[0]):
        for top in range(0, height, rows):
            count = min(rows, height - top)
            second = 1 if count > 1 else 0  # a single row is computed twice
            factors, k_tap = g[5] + size * (b * taps * pixels + top * width), pixels
            if width < lanes:
                k_tap = count * width
                own = here + size * (inputs * plane + lanes)
                for t in range(taps):
                    copy(like, own + size * t * k_tap, factors + size * t * pixels, k_tap)
                factors = own
            for unit in range(first, last):
                c0, o0 = unit // parts * inputs, unit // parts * outputs
                o = o0 + unit % parts * share
                end = min(o + share, o0 + outputs, C_out)
                for c in range(c0, min(c0 + inputs, image.shape[1])):
                    cut(image[b, c], room[(c - c0) * plane : (c - c0 + 1) * plane], top, lie)
                while o < end:
                    many = 4 if end - o >= 4 else 1
                    start = (o - o0) * plane if apart else 0
                    for y in range(top, top + count, 2):
                        y0 = max(top, min(y, top + count - 2))
                        # The last rows of an image would end in another one.
                        last_ones = width < lanes and (y0 + second) * width + lanes > pixels
                        for x in range(0, width, lanes):
                            x0 = max(0, min(x, width - lanes))
                            at = y0 * width + x0
                            into, out, out_row = g[7], pixels, second * width
                            into += size * ((b * C_out + o) * pixels + at)
                            if last_ones:
                                into, out, out_row = here + size * aside, 2 * lanes, lanes
                            places = (
                                here + size * (start + (y0 - top) * row + x0),
                                factors + size * (at - top * width),
                                g[6] + size * o * each * taps,
                                into,
                                g[25],
                            )
                            steps = (
                                plane, second * row, k_tap, second * width, each * taps, taps,
                                out, out_row, ahead,
                            )  # fmt: skip
                            if many == 1:
                                sum_taps(like, 1, 0, places, (taps, each), steps)
                            elif apart:
                                sum_taps(like, 4, 1, places, (taps, each), steps)
                            else:
                                sum_taps(like, 4, 0, places, (taps, each), steps)
                            if last_ones:
                                put(room[aside:], lanes, output[b, o : o + many], y0, 1 + second)
                    o += many


@intrinsic(prefer_literal=True)
def share_tap(
    typingctx: Any, like: Any, channels: Any, whole: Any, places: Any, count: Any, steps: Any
) -> Any:
    """What a tap's gradient is to v, K and w of some channels, each its own output.

    into += w·K·g, dots += Σ w·g·v, found += K·g·v, for p in a stretch.

    Args:
        typingctx: numba's.
        like: an array of the dtype.
        channels: 4 or 1.
        whole: 0 if `count` numbers of a single vector count, 1 if `count` vectors do.
        places: addresses of v and into where the tap sees them, g, K, dots, w, and found, of which
            each channel has a vector.
        count: as `whole` says.
        steps: in numbers, from channel to channel: of v and into, of g, and of w.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, many = Vectors(builder, like.dtype), channels.literal_value
        v, into, pulled, factors, dots, weight, found = emit.parts(args[3])
        plane, outputs, filters = emit.parts(args[5])
        where, vectors = None, args[4]
        if not whole.literal_value:
            where, vectors = emit.lanes_below(args[4]), INT(1)
        w = [emit.spread(emit.place(weight, filters, c)) for c in range(many)]
        sums = emit.sums(many)
        with emit.repeated(vectors) as i:
            k, place = emit.load(emit.nth(factors, i)), emit.nth(dots, i)
            before = dot = emit.load(place)
            for c in range(many):
                g = emit.load(emit.nth(emit.place(pulled, outputs, c), i))
                seen = emit.load(emit.nth(emit.place(v, plane, c), i))
                both = emit.product(g, seen)
                dot = emit.sum(dot, emit.product(w[c], both))
                emit.add(sums[c], emit.choose(where, emit.product(k, both), emit.zero()))
                near = emit.nth(emit.place(into, plane, c), i)
                old = emit.load(near)
                new = emit.sum(old, emit.product(emit.product(w[c], k), g))
                emit.store(emit.choose(where, new, old), near)
            emit.store(emit.choose(where, dot, before), place)
        for c in range(many):
            place = emit.nth(found, c)
            emit.store(emit.sum(emit.load(place), emit.total(sums[c])), place)
        return context.get_dummy_value()

    return types.void(like, channels, whole, places, count, steps), code


@compiled
def dot(p: Any, k: Any, x: Any, row: int, width: int) -> float:
    """Σ p·k·x, without what lies between the rows."""
    total = p[0] * 0
    for y in range(0, p.size, row):
        for i in range(y, min(y + width, p.size)):
            total += p[i] * k[i] * x[i]
    return total


@compiled
def share_all(
    room: Any, here: int, starts: Any, weight: int, n: int, many: int, steps: Any, lanes: int
) -> None:
    """`share_tap` of n numbers that begin at `starts` in the room, which begins with `found`."""
    size, rest = room.itemsize, n % lanes
    room[: 4 * lanes] = 0
    v, into, pulled, factors, dots = starts
    for whole in range(2):
        on = 0 if whole else n - rest
        places = (
            here + size * (v + on), here + size * (into + on), here + size * (pulled + on),
            here + size * (factors + on), here + size * (dots + on), weight, here,
        )  # fmt: skip
        if whole and many == 4:
            share_tap(room, 4, 1, places, n // lanes, steps)
        elif whole:
            share_tap(room, 1, 1, places, n // lanes, steps)
        elif rest and many == 4:
            share_tap(room, 4, 0, places, rest, steps)
        elif rest:
            share_tap(room, 1, 0, places, rest, steps)


@compiled
def leave(dots: Any, each: int, grad: Any, row: int) -> None:
    """What some channels give to K's gradient, a stretch for each tap, is added to its rows."""
    for t in range(grad.shape[0]):
        for y in range(grad.shape[1]):
            line, source = grad[t, y], dots[t * each + y * row :]
            for x in range(line.size):
                line[x] += source[x]
    dots[:] = 0


@compiled
def depthwise_gradients(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """What a depthwise convolution's gradient is to its three inputs.

    For units `first` to `last`: 4 channels with an output each, or one with several outputs.
    `given`: v [B, C_in, H, W]; addresses of K [B, taps, H_out, W_out] and w [C_out, taps]; the
    gradient of the output [B, C_out, H_out, W_out]; addresses of the gradients, zeros yet, of v,
    of K for each thread, and of w; room [threads, 4 vectors; planes of v; a vector; planes
    of what it gets; then, each with a vector, rows of outputs of a unit, K and what it gets of some
    rows]; then as in `grouped`, from `taps` on without `apart`.
    """
    g, size = given, like.itemsize
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), like.dtype)
    grad = carray(pointer(g[7]), (g[8], g[9], g[10], g[11]), like.dtype)
    room = carray(pointer(g[15]), (g[16], g[17]), like.dtype)[thread]
    taps, inputs, outputs, lanes, plane, rows = g[18:24]
    lie, (B, C_out, height, width) = g[25:], grad.shape
    factors = carray(pointer(g[5]), (B, taps, height, width), like.dtype)
    grad_image = carray(pointer(g[12]), image.shape, like.dtype)
    grad_factors = carray(pointer(g[13]), (thread + 1, B, taps, height, width), like.dtype)[thread]
    grad_weight = carray(pointer(g[14]), (C_out, taps), like.dtype)
    offsets = carray(pointer(g[24]), (taps,), np.int64)
    row, here = lie[7], g[15] + size * thread * room.size
    each = rows * row + lanes
    v, into = 4 * lanes, 4 * lanes + inputs * plane + lanes
    pulled = into + inputs * plane + lanes
    k, dots = pulled + outputs * each, pulled + (outputs + taps) * each
    for b in range(B):
        for top in range(0, height, rows):
            count = min(rows, height - top)
            n = (count - 1) * row + width
            for t in range(taps):
                flatten(factors[b, t, top : top + count], room[k + t * each :], row)
            room[dots:] = 0
            for unit in range(first, last):
                c0, o0 = unit * inputs, unit * outputs
                have, end = min(inputs, image.shape[1] - c0), min(o0 + outputs, C_out)
                room[into : into + have * plane] = 0
                for c in range(have):
                    own = room[v + c * plane : v + (c + 1) * plane]
                    cut(image[b, c0 + c], own, top, lie)
                for o in range(o0, end):
                    flatten(grad[b, o, top : top + count], room[pulled + (o - o0) * each :], row)
                many = 4 if inputs == 4 and have == 4 else 1
                for o in range(o0, end, many):
                    c = o - o0 if inputs == outputs else 0
                    for t in range(taps):
                        at = c * plane + offsets[t]
                        starts = (v + at, into + at, pulled + (o - o0) * each, k + t * each,
                                  dots + t * each)  # fmt: skip
                        share_all(room, here, starts, g[6] + size * (o * taps + t), n, many,
                                  (plane, each, taps), lanes)  # fmt: skip
                        for m in range(many):
                            total = room[m * lanes : (m + 1) * lanes].sum()
                            if total != total:  # NaN, perhaps from 0·∞ between the rows
                                total = dot(
                                    room[starts[2] + m * each :][:n], room[starts[3] :],
                                    room[starts[0] + m * plane :], row, width,
                                )  # fmt: skip
                            grad_weight[o + m, t] += total
                for c in range(have):
                    own = room[into + c * plane : into + (c + 1) * plane]
                    add_back(own, grad_image[b, c0 + c], top, lie)
                # Sums of sums are more exact than long ones.
                if unit == last - 1 or (unit - first) % _SUMMED == _SUMMED - 1:
                    leave(room[dots:], each, grad_factors[b, :, top : top + count], row)
