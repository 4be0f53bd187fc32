"""Loops over planes, as numba compiles them: the depthwise convolution and the adapting kernel.

A plane is an image as one long row, its borders included, so that a tap is an offset: what a window
sees across the end of a row is computed and not used. Of an image that is looked at in steps, one
plane holds the pixels of each phase. Taps are taken by threes, which a CPU's registers hold.
"""

from __future__ import annotations

from typing import Any

from numba import carray

from pacswap.ops.loops.threads import compiled, pointer


@compiled
def add_1(acc: Any, w0: float, k0: Any, x0: Any) -> None:
    """acc += w·k·x."""
    for q in range(acc.size):
        acc[q] += w0 * k0[q] * x0[q]


@compiled
def add_3(
    acc: Any, w0: float, w1: float, w2: float, k0: Any, k1: Any, k2: Any, x0: Any, x1: Any, x2: Any
) -> None:
    """acc += w·k·x of three taps."""
    for q in range(acc.size):
        acc[q] += w0 * k0[q] * x0[q] + w1 * k1[q] * x1[q] + w2 * k2[q] * x2[q]


@compiled
def depthwise(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, o, y, x] = Σ_t w[o, t] · K[b, t, q] · v[b, c, offset_t + q], q = y·row + x.

    For channels `first` to `last` of the output. `given`: v [B, C_in, plane], K [B, taps,
    H_out·row], w [C_out, taps], output [B, C_out, H_out, W_out], room [threads, rows·row] to
    compute so many rows at once; then row, and the offsets of the taps.
    """
    g, kind = given, like.dtype
    planes = carray(pointer(g[0]), (g[1], g[2], g[3]), kind)
    factors = carray(pointer(g[4]), (g[5], g[6], g[7]), kind)
    weight = carray(pointer(g[8]), (g[9], g[10]), kind)
    output = carray(pointer(g[11]), (g[12], g[13], g[14], g[15]), kind)
    room = carray(pointer(g[16]), (g[17], g[18]), kind)
    row, offsets = g[19], g[20:]
    B, C_out, height, width = output.shape
    taps, times = offsets.size, C_out // planes.shape[1]
    rows = room.shape[1] // row
    for b in range(B):
        for top in range(0, height, rows):
            count = min(rows, height - top)
            n, q = (count - 1) * row + width, top * row
            acc = room[thread, :n]
            for o in range(first, last):
                v, w = planes[b, o // times], weight[o]
                acc[:] = 0
                t = 0
                while t + 3 <= taps:
                    s0, s1, s2 = q + offsets[t], q + offsets[t + 1], q + offsets[t + 2]
                    k0, k1 = factors[b, t, q : q + n], factors[b, t + 1, q : q + n]
                    k2 = factors[b, t + 2, q : q + n]
                    v0, v1, v2 = v[s0 : s0 + n], v[s1 : s1 + n], v[s2 : s2 + n]
                    add_3(acc, w[t], w[t + 1], w[t + 2], k0, k1, k2, v0, v1, v2)
                    t += 3
                while t < taps:
                    s0 = q + offsets[t]
                    add_1(acc, w[t], factors[b, t, q : q + n], v[s0 : s0 + n])
                    t += 1
                for y in range(count):
                    output[b, o, top + y] = acc[y * row : y * row + width]


@compiled
def depthwise_gradients(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """What a depthwise convolution's gradient is to its three inputs.

    For channels `first` to `last` of the input. `given`: v, K and w as in `depthwise`; the
    gradient of the output [B, C_out, H_out·row], zeros where nothing was used; the gradients, zeros
    yet, of v, of K [threads, B, taps, H_out·row] and of w; then how many numbers of a plane are
    taken at once, which of the three are needed, and the offsets of the taps.
    """
    g, kind = given, like.dtype
    planes = carray(pointer(g[0]), (g[1], g[2], g[3]), kind)
    factors = carray(pointer(g[4]), (g[5], g[6], g[7]), kind)
    weight = carray(pointer(g[8]), (g[9], g[10]), kind)
    grad = carray(pointer(g[11]), (g[12], g[13], g[14]), kind)
    grad_planes = carray(pointer(g[15]), (g[16], g[17], g[18]), kind)
    grad_factors = carray(pointer(g[19]), (g[20], g[21], g[22], g[23]), kind)
    grad_weight = carray(pointer(g[24]), (g[25], g[26]), kind)
    rows, needed, offsets = g[27], g[28:31], g[31:]
    B, C_in, _ = planes.shape
    C_out, taps = weight.shape
    times, end = C_out // C_in, grad.shape[2]
    for b in range(B):
        for q in range(0, end, rows):
            n = min(rows, end - q)
            for o in range(first * times, last * times):
                g, v, into = (
                    grad[b, o, q : q + n],
                    planes[b, o // times],
                    grad_planes[b, o // times],
                )
                for t in range(taps):
                    at, w = q + offsets[t], weight[o, t]
                    k, x = factors[b, t, q : q + n], v[at : at + n]
                    if needed[0]:
                        add_1(into[at : at + n], w, k, g)
                    if needed[1]:
                        add_1(grad_factors[thread, b, t, q : q + n], w, x, g)
                    if needed[2]:
                        total = w * 0
                        for i in range(n):
                            total += g[i] * k[i] * x[i]
                        grad_weight[o, t] += total


@compiled
def squares(acc: Any, a0: Any, a1: Any, a2: Any, b0: Any, b1: Any, b2: Any) -> None:
    """acc += Σ (a − b)² of three channels."""
    for q in range(acc.size):
        d0, d1, d2 = a0[q] - b0[q], a1[q] - b1[q], a2[q] - b2[q]
        acc[q] += d0 * d0 + d1 * d1 + d2 * d2


@compiled
def absolutes(acc: Any, a0: Any, a1: Any, a2: Any, b0: Any, b1: Any, b2: Any) -> None:
    """acc += Σ |a − b| of three channels."""
    for q in range(acc.size):
        acc[q] += abs(a0[q] - b0[q]) + abs(a1[q] - b1[q]) + abs(a2[q] - b2[q])


@compiled
def differences(acc: Any, features: Any, centres: Any, at: int, to: int, square: bool) -> None:
    """acc[q] = Σ_c φ(features[c, at + q] − centres[c, to + q])."""
    n, channels = acc.size, features.shape[0]
    acc[:] = 0
    c = 0
    while c + 3 <= channels:
        a0, b0 = features[c, at : at + n], centres[c, to : to + n]
        a1, b1 = features[c + 1, at : at + n], centres[c + 1, to : to + n]
        a2, b2 = features[c + 2, at : at + n], centres[c + 2, to : to + n]
        if square:
            squares(acc, a0, a1, a2, b0, b1, b2)
        else:
            absolutes(acc, a0, a1, a2, b0, b1, b2)
        c += 3
    while c < channels:
        a0, b0 = features[c, at : at + n], centres[c, to : to + n]
        if square:
            for q in range(n):
                acc[q] += (a0[q] - b0[q]) * (a0[q] - b0[q])
        else:
            for q in range(n):
                acc[q] += abs(a0[q] - b0[q])
        c += 1


@compiled
def distances(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, t, y, x] = Σ_c φ(f[offset_t + q] − f_p[to + q]), q = y·row + x.

    For blocks `first` to `last` of rows, of all images. With `halves`, what a tap differs from the
    centre is what the centre, seen from there, differs from the opposite tap: half of the taps are
    computed, on a stretch that holds both.

    `given`: f [B, D, plane], f_p likewise (f itself where the centre is a tap), output [B, taps,
    H_out, W_out], room [threads, rows·row + the farthest tap]; then where f_p begins in its plane,
    the tap that is the centre or −1, row, whether φ is the square or the absolute value, halves
    (0 or 1), and the offsets of the taps.
    """
    g, kind = given, like.dtype
    planes = carray(pointer(g[0]), (g[1], g[2], g[3]), kind)
    centres = carray(pointer(g[4]), (g[5], g[6], g[7]), kind)
    output = carray(pointer(g[8]), (g[9], g[10], g[11], g[12]), kind)
    room = carray(pointer(g[13]), (g[14], g[15]), kind)
    to, centre, row, square, halves, offsets = g[16], g[17], g[18], g[19], g[20], g[21:]
    taps, height, width = output.shape[1:]
    reach = to - offsets[0] if halves else 0
    rows = (room.shape[1] - reach) // row
    blocks = (height + rows - 1) // rows
    for block in range(first, last):
        b, top = block // blocks, block % blocks * rows
        count = min(rows, height - top)
        n, q = (count - 1) * row + width, top * row
        for t in range(centre + 1 if halves else taps):
            if t == centre:
                output[b, t, top : top + count] = 0
                continue
            beyond = to - offsets[t] if halves else 0
            acc = room[thread, : n + beyond]
            differences(acc, planes[b], centres[b], q + offsets[t], q + to, square)
            for y in range(count):
                output[b, t, top + y] = acc[y * row : y * row + width]
            if halves:
                for y in range(count):
                    start = beyond + y * row
                    output[b, taps - 1 - t, top + y] = acc[start : start + width]


@compiled
def distance_gradients(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """found[b, c, u] = Σ_t S[b, t, u] · φ′(f[u] − f[u + offset_t]): both ends of each difference.

    For channels `first` to `last` of all images. `given`: f [B, D, plane]; S [B, taps, plane], for
    each pixel the gradients of its difference from that tap, and of the opposite tap's from it;
    found, zeros; then whether φ is the square, and the offsets of the taps from the centre.
    """
    g, kind = given, like.dtype
    planes = carray(pointer(g[0]), (g[1], g[2], g[3]), kind)
    pulls = carray(pointer(g[4]), (g[5], g[6], g[7]), kind)
    found = carray(pointer(g[8]), (g[9], g[10], g[11]), kind)
    square, offsets = g[12], g[13:]
    D, N = planes.shape[1:]
    for channel in range(first, last):
        b, c = channel // D, channel % D
        f, into = planes[b, c], found[b, c]
        for t in range(offsets.size):
            offset = offsets[t]
            start, stop = max(0, -offset), min(N, N - offset)
            s, here, there = (
                pulls[b, t, start:stop],
                f[start:stop],
                f[start + offset : stop + offset],
            )
            acc = into[start:stop]
            if square:
                for q in range(acc.size):
                    acc[q] += 2 * s[q] * (here[q] - there[q])
            else:
                for q in range(acc.size):
                    d = here[q] - there[q]
                    acc[q] += s[q] if d > 0 else (-s[q] if d < 0 else 0 * s[q])


@compiled
def distance_gradients_apart(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """The gradients of each difference, sent to its two ends one after the other.

    For channels `first` to `last` of all images. `given`: f [B, D, plane], f_p likewise, the
    gradient of the distances [B, taps, H_out·row] (zeros where nothing was used), those of f and
    f_p, zeros yet, one memory if f_p is f; then where f_p begins in its plane, whether φ is the
    square, and the offsets of the taps.
    """
    g, kind = given, like.dtype
    planes = carray(pointer(g[0]), (g[1], g[2], g[3]), kind)
    centres = carray(pointer(g[4]), (g[5], g[6], g[7]), kind)
    grad = carray(pointer(g[8]), (g[9], g[10], g[11]), kind)
    found = carray(pointer(g[12]), (g[13], g[14], g[15]), kind)
    found_centres = carray(pointer(g[16]), (g[17], g[18], g[19]), kind)
    to, square, offsets = g[20], g[21], g[22:]
    D = planes.shape[1]
    n = grad.shape[2]
    for channel in range(first, last):
        b, c = channel // D, channel % D
        centre, back = centres[b, c, to : to + n], found_centres[b, c, to : to + n]
        for t in range(offsets.size):
            f, into = (
                planes[b, c, offsets[t] : offsets[t] + n],
                found[b, c, offsets[t] : offsets[t] + n],
            )
            g = grad[b, t]
            for q in range(n):
                d = f[q] - centre[q]
                pull = (
                    2 * d * g[q] if square else (g[q] if d > 0 else (-g[q] if d < 0 else 0 * g[q]))
                )
                into[q] += pull
                back[q] -= pull
