"""Loops of the adapting kernel's distances, as numba compiles them.

The sums of four taps stay in registers while the channels pass by, and backward those of four
channels while the taps do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from pacswap.ops.loops.emit import Vectors
from pacswap.ops.loops.machine_planes import add_back, cut, unflatten
from pacswap.ops.loops.threads import compiled, pointer
from pacswap.ops.loops.vectors import exponentials, number_of

_VECTORS = 2  # at once, of each sum
# At once: what the taps of a row see of them stays in the first cache; and sums of sums are more
# exact than long ones.
CHANNELS = 16


@intrinsic(prefer_literal=True)
def sum_channels(
    typingctx: Any, like: Any, taps: Any, square: Any, places: Any, channels: Any, steps: Any
) -> Any:
    """sums[t] += Σ_c φ(f[c, p + t] − f_p[c]) of some taps, for two vectors of pixels.

    Args:
        typingctx: numba's.
        like: an array of the dtype.
        taps: 4 or 1.
        square: 1 if φ is the square, 0 if the absolute value.
        places: addresses of f and f_p in the first channel, of the sums, and of the taps' offsets.
        channels: how many.
        steps: in numbers, from channel to channel of f and of f_p, and from sum to sum.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, count = Vectors(builder, like.dtype), taps.literal_value
        features, centres, made, offsets = emit.parts(args[3])
        plane, apart, stretch = emit.parts(args[5])
        at = [emit.place(features, emit.index(offsets, t)) for t in range(count)]
        sums = [emit.sums(_VECTORS) for _ in range(count)]
        with emit.repeated(args[4]) as c:
            middle = emit.place(centres, apart, c)
            centre = [emit.load(emit.nth(middle, i)) for i in range(_VECTORS)]
            for t in range(count):
                tap = emit.place(at[t], plane, c)
                for i in range(_VECTORS):
                    apart_by = emit.difference(emit.load(emit.nth(tap, i)), centre[i])
                    if square.literal_value:
                        emit.add(sums[t][i], emit.product(apart_by, apart_by))
                    else:
                        emit.add(sums[t][i], emit.absolute(apart_by))
        for t in range(count):
            for i in range(_VECTORS):
                place = emit.nth(emit.place(made, stretch, t), i)
                emit.store(emit.sum(emit.load(place), emit.total(sums[t][i])), place)
        return context.get_dummy_value()

    return types.void(like, taps, square, places, channels, steps), code


@compiled
def distances(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, t, p] = Σ_c φ(f[p + t] − f_p) =: d, or e^(d / divisor).

    For blocks `first` to `last` of rows, of all images. With `halves`, what a tap differs from the
    centre is what the centre, seen from there, differs from the opposite tap: half of the taps are
    computed, on a stretch that holds both.

    `given`: f [B, D, H, W]; the address of f_p [B, D, H_out·row], not used where the centre is a
    tap; output [B, taps, H_out, W_out]; room [threads, planes of `CHANNELS`, two vectors, then a
    stretch for each tap that is computed]; whether φ is the square or the absolute value, the bits
    of the divisor or 0 for none, numbers of a stretch, numbers of a vector, numbers from plane to
    plane, rows of a block, the tap that is the centre or −1, halves (0 or 1), the address of the
    offsets of the taps, and `Layout.numbers`. f_p and a plane can be read two vectors beyond their
    ends.
    """
    g, size = given, like.itemsize
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), like.dtype)
    output = carray(pointer(g[6]), (g[7], g[8], g[9], g[10]), like.dtype)
    room = carray(pointer(g[11]), (g[12], g[13]), like.dtype)[thread]
    square, divides, stretch, lanes, plane, rows, centre, halves = g[14:22]
    lie, D, (taps, height, width) = g[23:], image.shape[1], output.shape[1:]
    offsets, row = carray(pointer(g[22]), (taps,), np.int64), lie[7]
    divisor = number_of(divides)
    to = offsets[centre] if centre >= 0 else 0
    computed = centre if halves else taps
    here, sums = g[11] + size * thread * room.size, room.size - computed * stretch
    blocks = (height + rows - 1) // rows
    for block in range(first, last):
        b, top = block // blocks, block % blocks * rows
        count = min(rows, height - top)
        n = (count - 1) * row + width
        room[sums:] = 0
        for c0 in range(0, D, CHANNELS):
            share = min(CHANNELS, D - c0)
            for c in range(share):
                cut(image[b, c0 + c], room[c * plane : (c + 1) * plane], top, lie)
            centres, apart = here + size * to, plane
            if centre < 0:
                centres, apart = g[5] + size * ((b * D + c0) * height + top) * row, height * row
            t = 0
            while t < computed:
                if t == centre:
                    t += 1
                    continue
                many = 1 if (centre if t < centre else computed) - t < 4 else 4
                beyond = to - offsets[t] if halves else 0
                for q in range(0, n + beyond, 2 * lanes):
                    into = here + size * (sums + t * stretch + q)
                    places = (here + size * q, centres + size * q, into, g[22] + 8 * t)
                    steps = (plane, apart, stretch)
                    if many == 4 and square:
                        sum_channels(like, 4, 1, places, share, steps)
                    elif many == 4:
                        sum_channels(like, 4, 0, places, share, steps)
                    elif square:
                        sum_channels(like, 1, 1, places, share, steps)
                    else:
                        sum_channels(like, 1, 0, places, share, steps)
                t += many
        for t in range(computed):
            made = room[sums + t * stretch :]
            if divides != 0:
                beyond = to - offsets[t] if halves else 0
                exponentials(like, made.ctypes.data, n + beyond, divisor)
            unflatten(made, output[b, t, top : top + count], row)
            if halves:
                opposite = output[b, taps - 1 - t, top : top + count]
                unflatten(made[to - offsets[t] :], opposite, row)
        if centre >= 0:
            own = np.exp(0.0 / divisor) if divides != 0 else 0.0
            output[b, centre, top : top + count] = own


@intrinsic(prefer_literal=True)
def pull_channels(
    typingctx: Any, like: Any, channels: Any, square: Any, places: Any, taps: Any, steps: Any
) -> Any:
    """Σ_t s[t] · φ′(f − f[p + t]) of some channels, for two vectors of pixels.

    Args:
        typingctx: numba's.
        like: an array of the dtype.
        channels: 4 or 1.
        square: as in `sum_channels`.
        places: addresses of f, of s, of the sums, and of the taps' offsets.
        taps: how many.
        steps: in numbers, from channel to channel of f and of the sums, and from tap to tap of s.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit, count = Vectors(builder, like.dtype), channels.literal_value
        features, pulls, made, offsets = emit.parts(args[3])
        plane, into, stretch = emit.parts(args[5])
        own = [emit.place(features, plane, c) for c in range(count)]
        here = [[emit.load(emit.nth(f, i)) for i in range(_VECTORS)] for f in own]
        sums = [emit.sums(_VECTORS) for _ in range(count)]
        with emit.repeated(args[4]) as t:
            tap = emit.place(pulls, stretch, t)
            s = [emit.load(emit.nth(tap, i)) for i in range(_VECTORS)]
            if square.literal_value:
                s = [emit.sum(value, value) for value in s]
            seen = emit.place(features, emit.index(offsets, t))
            for c in range(count):
                there = emit.place(seen, plane, c)
                for i in range(_VECTORS):
                    apart_by = emit.difference(here[c][i], emit.load(emit.nth(there, i)))
                    if square.literal_value:
                        emit.add(sums[c][i], emit.product(s[i], apart_by))
                    else:
                        emit.add(sums[c][i], emit.signed(s[i], apart_by))
        for c in range(count):
            for i in range(_VECTORS):
                emit.store(emit.total(sums[c][i]), emit.nth(emit.place(made, into, c), i))
        return context.get_dummy_value()

    return types.void(like, channels, square, places, taps, steps), code


@compiled
def both_ends(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """For each pixel of a plane and each tap, the gradients of the two differences they share.

    Of its own difference from that tap, and of the opposite tap's centre's from it. For taps
    `first` to `last` of all images. `given`: the gradient [B, taps, H_out, W_out]; pulls, zeros
    yet, [B·(taps − 1), plane], without the centre; the centre, numbers of a row, and the address of
    the offsets of the taps.
    """
    g = given
    grad = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), like.dtype)
    pulls = carray(pointer(g[5]), (g[6], g[7]), like.dtype)
    taps, height, centre, row = g[2], g[3], g[8], g[9]
    offsets = carray(pointer(g[10]), (taps,), np.int64)
    for place in range(first, last):
        b, t = place // (taps - 1), place % (taps - 1)
        t = t if t < centre else t + 1
        for tap, start in ((t, offsets[centre]), (taps - 1 - t, offsets[taps - 1 - t])):
            for y in range(height):
                line, part = grad[b, tap, y], pulls[place, start + y * row :]
                for x in range(line.size):
                    part[x] += line[x]


@compiled
def mirrored_gradients(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """The gradients of each difference where each tap has an opposite one, for the features.

    For blocks `first` to `last` of 4 channels, of all images. `given`: f [B, D, H, W]; what
    `both_ends` made and can be read two vectors beyond its end; taps but the centre; the gradient,
    zeros yet, of f; room [threads, a margin, 4 planes with a margin each, two vectors, then
    4 stretches of the plane's size and two vectors]; numbers of a vector, of a margin, from plane
    to plane, of a plane, whether φ is the square, the address of the taps' offsets from the centre
    but its own, and `Layout.numbers` of the whole image. A margin is as far as a tap can be.
    """
    g, size = given, like.itemsize
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), like.dtype)
    found = carray(pointer(g[7]), (g[8], g[9], g[10], g[11]), like.dtype)
    room = carray(pointer(g[12]), (g[13], g[14]), like.dtype)[thread]
    taps, lanes, margin, plane, full, square = g[6], g[15], g[16], g[17], g[18], g[19]
    lie, (D, H, W) = g[21:], image.shape[1:]
    row, start = lie[7], lie[2] * lie[7] + lie[3]  # of the first pixel that is not border
    stretch = full + 2 * lanes
    here, aside = g[12] + size * thread * room.size, room.size - 4 * stretch
    room[:aside] = 0
    for block in range(first, last):
        b, c0 = block // ((D + 3) // 4), block % ((D + 3) // 4) * 4
        have = min(4, D - c0)
        for c in range(have):
            at = margin + c * plane
            cut(image[b, c0 + c], room[at : at + full], 0, lie)
        many = 4 if have == 4 else 1
        for c in range(0, have, many):
            for q in range(max(0, start), min(full, start + (H - 1) * row + W), 2 * lanes):
                places = (
                    here + size * (margin + c * plane + q),
                    g[5] + size * (b * taps * full + q),
                    here + size * (aside + c * stretch + q),
                    g[20],
                )
                steps = (plane, stretch, full)
                if many == 4 and square:
                    pull_channels(like, 4, 1, places, taps, steps)
                elif many == 4:
                    pull_channels(like, 4, 0, places, taps, steps)
                elif square:
                    pull_channels(like, 1, 1, places, taps, steps)
                else:
                    pull_channels(like, 1, 0, places, taps, steps)
            for m in range(c, c + many):
                sums = room[aside + m * stretch : aside + m * stretch + full]
                add_back(sums, found[b, c0 + m], 0, lie)


@compiled
def pull_both(s: Any, f: Any, centre: Any, into: Any, back: Any, square: bool) -> None:
    """What s · φ′(f − centre) adds to one end and takes from the other."""
    for q in range(into.size):
        d = f[q] - centre[q]
        pull = 2 * d * s[q] if square else (s[q] if d > 0 else (-s[q] if d < 0 else 0 * s[q]))
        into[q] += pull
        back[q] -= pull


@compiled
def distance_gradients(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """The gradients of each difference, for features and centres.

    For channels `first` to `last` of all images. `given`: f [B, D, H, W]; f_p [B, D, H_out·row],
    not used where the centre is a tap; what pulls at the differences, [B, taps, H_out·row]; the
    gradients, zeros yet, of f and f_p; room [threads, 2·plane and a vector]; then the tap that is
    the centre or −1, whether φ is the square, the offsets' address, numbers of a plane, and
    `Layout.numbers` of the whole image.
    """
    g, kind = given, like.dtype
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), kind)
    apart = carray(pointer(g[5]), (g[6], g[7], g[8]), kind)
    pulls = carray(pointer(g[9]), (g[10], g[11], g[12]), kind)
    found = carray(pointer(g[13]), (g[14], g[15], g[16], g[17]), kind)
    found_apart = carray(pointer(g[18]), (g[6], g[7], g[8]), kind)
    room = carray(pointer(g[19]), (g[20], g[21]), kind)[thread]
    centre, square, lie, D = g[22], g[23], g[26:], image.shape[1]
    offsets, size = carray(pointer(g[24]), (pulls.shape[1],), np.int64), g[25]
    # Without what lies beyond the last row's last output.
    n = min(pulls.shape[2], size - offsets.max())
    f, into = room[:size], room[room.size - size :]
    for channel in range(first, last):
        b, c = channel // D, channel % D
        cut(image[b, c], f, 0, lie)
        into[:] = 0
        for t in range(offsets.size):
            at = offsets[t]
            if t == centre:
                continue
            if centre >= 0:
                to = offsets[centre]
                pull_both(
                    pulls[b, t, :n], f[at : at + n], f[to : to + n],
                    into[at : at + n], into[to : to + n], square,
                )  # fmt: skip
            else:
                pull_both(
                    pulls[b, t, :n], f[at : at + n], apart[b, c, :n], into[at : at + n],
                    found_apart[b, c, :n], square,
                )  # fmt: skip
        add_back(into, found[b, c], 0, lie)
