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
def cut(image: Any, plane: Any, at: int, g: Any) -> None:
    """A part of an image [H, W], with its border of zeros, phase by phase.

    Args:
        image: [H, W].
        plane: is filled.
        at: output row where the part begins.
        g: `Layout.numbers`.
    """
    H, W, top, left, down, across = g[0], g[1], g[2], g[3], g[4], g[5]
    rows, columns, high, wide = g[6], g[7], g[8], g[9]
    if down > 1 or across > 1:
        plane[:] = 0
    for r in range(rows):
        y = at * down - top + r
        if down == 1 and across == 1:
            line = plane[r * wide : (r + 1) * wide]
            if y < 0 or y >= H:
                line[:] = 0
                continue
            start, stop = min(columns, max(0, left)), max(0, min(columns, W + left))
            stop = max(start, stop)
            for x in range(start):
                line[x] = 0
            for x in range(stop, columns):
                line[x] = 0
            part, source = line[start:stop], image[y, start - left : stop - left]
            for x in range(part.size):
                part[x] = source[x]
        elif 0 <= y < H:
            for x in range(max(0, left), min(columns, W + left)):
                phase = (r % down) * across + x % across
                plane[(phase * high + r // down) * wide + x // across] = image[y, x - left]


@compiled
def add_back(plane: Any, image: Any, at: int, g: Any) -> None:
    """The inverse of `cut`: added to the image."""
    H, W, top, left, down, across = g[0], g[1], g[2], g[3], g[4], g[5]
    rows, columns, high, wide = g[6], g[7], g[8], g[9]
    for r in range(rows):
        y = at * down - top + r
        if y < 0 or y >= H:
            continue
        start, stop = max(0, left), min(columns, W + left)
        if down == 1 and across == 1:
            if start < stop:
                part = image[y, start - left : stop - left]
                source = plane[r * wide + start : r * wide + stop]
                for x in range(part.size):
                    part[x] += source[x]
        else:
            for x in range(start, stop):
                phase = (r % down) * across + x % across
                image[y, x - left] += plane[(phase * high + r // down) * wide + x // across]


@compiled
def depthwise(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """output[b, o, p] = Σ_t w[o, t] · K[b, t, p] · v[b, c, p + t].

    For channels `first` to `last` of the input. `given`: v [B, C_in, H, W], K [B, taps, H_out·row],
    w [C_out, taps], output [B, C_out, H_out, W_out], room [threads, plane + rows·row]; then
    `Layout.numbers`, how many rows are computed at once, and the offsets of the taps.
    """
    g, kind = given, like.dtype
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), kind)
    factors = carray(pointer(g[5]), (g[6], g[7], g[8]), kind)
    weight = carray(pointer(g[9]), (g[10], g[11]), kind)
    output = carray(pointer(g[12]), (g[13], g[14], g[15], g[16]), kind)
    room = carray(pointer(g[17]), (g[18], g[19]), kind)
    lie, rows, offsets = g[20:30], g[30], g[31:]
    row, (height, width) = lie[9], output.shape[2:]
    taps, times, end = offsets.size, output.shape[1] // image.shape[1], room.shape[1]
    v, acc = room[thread, : end - rows * row], room[thread, end - rows * row :]
    for b in range(image.shape[0]):
        for top in range(0, height, rows):
            count = min(rows, height - top)
            n, q = (count - 1) * row + width, top * row
            for c in range(first, last):
                cut(image[b, c], v, top, lie)
                for o in range(c * times, (c + 1) * times):
                    w, sums = weight[o], acc[:n]
                    sums[:] = 0
                    t = 0
                    while t + 3 <= taps:
                        s0, s1, s2 = offsets[t], offsets[t + 1], offsets[t + 2]
                        k0, k1 = factors[b, t, q : q + n], factors[b, t + 1, q : q + n]
                        k2 = factors[b, t + 2, q : q + n]
                        v0, v1, v2 = v[s0 : s0 + n], v[s1 : s1 + n], v[s2 : s2 + n]
                        add_3(sums, w[t], w[t + 1], w[t + 2], k0, k1, k2, v0, v1, v2)
                        t += 3
                    while t < taps:
                        s0 = offsets[t]
                        add_1(sums, w[t], factors[b, t, q : q + n], v[s0 : s0 + n])
                        t += 1
                    for y in range(count):
                        out, line = output[b, o, top + y], acc[y * row : y * row + width]
                        for x in range(width):
                            out[x] = line[x]


@compiled
def depthwise_gradients(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """What a depthwise convolution's gradient is to its three inputs.

    For channels `first` to `last` of the input. `given`: v, K and w as in `depthwise`; the
    gradient of the output [B, C_out, H_out, W_out]; the gradients, zeros yet, of v, of K
    [threads, B, taps, H_out·row] and of w; room [threads, 2·plane + rows·row]; then as in
    `depthwise`.
    """
    g, kind = given, like.dtype
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), kind)
    factors = carray(pointer(g[5]), (g[6], g[7], g[8]), kind)
    weight = carray(pointer(g[9]), (g[10], g[11]), kind)
    grad = carray(pointer(g[12]), (g[13], g[14], g[15], g[16]), kind)
    grad_image = carray(pointer(g[17]), (g[18], g[19], g[20], g[21]), kind)
    grad_factors = carray(pointer(g[22]), (g[23], g[24], g[25], g[26]), kind)
    grad_weight = carray(pointer(g[27]), (g[28], g[29]), kind)
    room = carray(pointer(g[30]), (g[31], g[32]), kind)
    lie, rows, offsets = g[33:43], g[43], g[44:]
    row, (height, width) = lie[9], grad.shape[2:]
    taps, times, size = offsets.size, grad.shape[1] // image.shape[1], room.shape[1]
    plane = (size - rows * row) // 2
    v, into, pulled = (
        room[thread, :plane],
        room[thread, plane : 2 * plane],
        room[thread, 2 * plane :],
    )
    for b in range(image.shape[0]):
        for top in range(0, height, rows):
            count = min(rows, height - top)
            n, q = (count - 1) * row + width, top * row
            for c in range(first, last):
                cut(image[b, c], v, top, lie)
                into[:] = 0
                for o in range(c * times, (c + 1) * times):
                    for y in range(count):
                        line, source = pulled[y * row : (y + 1) * row], grad[b, o, top + y]
                        for x in range(width):
                            line[x] = source[x]
                        line[width:] = 0
                    p = pulled[:n]
                    for t in range(taps):
                        at, w = offsets[t], weight[o, t]
                        k, x = factors[b, t, q : q + n], v[at : at + n]
                        near, dots = into[at : at + n], grad_factors[thread, b, t, q : q + n]
                        total = w * 0
                        for i in range(n):
                            pull = p[i] * w
                            near[i] += pull * k[i]
                            dots[i] += pull * x[i]
                            total += p[i] * k[i] * x[i]
                        if total != total:  # NaN, perhaps from 0·∞ between the rows
                            total = w * 0
                            for y in range(count):
                                for i in range(y * row, y * row + width):
                                    total += p[i] * k[i] * x[i]
                        grad_weight[o, t] += total
                add_back(into, grad_image[b, c], top, lie)


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
    """output[b, t, p] = Σ_c φ(f[p + t] − f_p).

    For blocks `first` to `last` of rows, of all images. With `halves`, what a tap differs from the
    centre is what the centre, seen from there, differs from the opposite tap: half of the taps are
    computed, on a stretch that holds both.

    `given`: f [B, D, H, W]; f_p [B, D, H_out·row], not used where the centre is a tap; output
    [B, taps, H_out, W_out]; room [threads, D·plane + rows·row + the farthest tap]; then
    `Layout.numbers`, rows of a block, the tap that is the centre or −1, whether φ is the square or
    the absolute value, halves (0 or 1), and the offsets of the taps.
    """
    g, kind = given, like.dtype
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), kind)
    apart = carray(pointer(g[5]), (g[6], g[7], g[8]), kind)
    output = carray(pointer(g[9]), (g[10], g[11], g[12], g[13]), kind)
    room = carray(pointer(g[14]), (g[15], g[16]), kind)
    lie, rows, centre, square, halves, offsets = g[17:27], g[27], g[28], g[29], g[30], g[31:]
    D, row, (taps, height, width) = image.shape[1], lie[9], output.shape[1:]
    to = offsets[centre] if centre >= 0 else 0
    reach = to - offsets[0] if halves else 0
    features = room[thread, : room.shape[1] - rows * row - reach]
    acc = room[thread, features.size :]
    planes = features.reshape((D, features.size // D))
    blocks = (height + rows - 1) // rows
    for block in range(first, last):
        b, top = block // blocks, block % blocks * rows
        count = min(rows, height - top)
        n = (count - 1) * row + width
        for c in range(D):
            cut(image[b, c], planes[c], top, lie)
        for t in range(centre + 1 if halves else taps):
            if t == centre:
                output[b, t, top : top + count] = 0
                continue
            beyond = to - offsets[t] if halves else 0
            sums = acc[: n + beyond]
            if centre >= 0:
                differences(sums, planes, planes, offsets[t], to, square)
            else:
                differences(sums, planes, apart[b], offsets[t], top * row, square)
            for y in range(count):
                out, line = output[b, t, top + y], acc[y * row : y * row + width]
                for x in range(width):
                    out[x] = line[x]
                if halves:
                    start = beyond + y * row
                    out, line = output[b, taps - 1 - t, top + y], acc[start : start + width]
                    for x in range(width):
                        out[x] = line[x]


@compiled
def pull_here(s: Any, here: Any, there: Any, into: Any, square: bool) -> None:
    """into += s · φ′(here − there)."""
    if square:
        for q in range(into.size):
            into[q] += 2 * s[q] * (here[q] - there[q])
    else:
        for q in range(into.size):
            d = here[q] - there[q]
            into[q] += s[q] if d > 0 else (-s[q] if d < 0 else 0 * s[q])


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
    not used where the centre is a tap; for each tap what pulls at its difference, [B, taps, plane]
    with `halves`, else [B, taps, H_out·row]; the gradients, zeros yet, of f and f_p; room [threads,
    2·plane]; then `Layout.numbers` of the whole image, the tap that is the centre or −1, whether φ
    is the square, halves, and the offsets of the taps.

    With `halves` a pixel's differences from its neighbours are pulled at from both ends, and what
    pulls at them holds both.
    """
    g, kind = given, like.dtype
    image = carray(pointer(g[0]), (g[1], g[2], g[3], g[4]), kind)
    apart = carray(pointer(g[5]), (g[6], g[7], g[8]), kind)
    pulls = carray(pointer(g[9]), (g[10], g[11], g[12]), kind)
    found = carray(pointer(g[13]), (g[14], g[15], g[16], g[17]), kind)
    found_apart = carray(pointer(g[18]), (g[19], g[20], g[21]), kind)
    room = carray(pointer(g[22]), (g[23], g[24]), kind)
    lie, centre, square, halves, offsets = g[25:35], g[35], g[36], g[37], g[38:]
    D, size = image.shape[1], room.shape[1] // 2
    # Without what lies beyond the last row's last output.
    n = pulls.shape[2] if halves else min(pulls.shape[2], size - offsets.max())
    f, into = room[thread, :size], room[thread, size:]
    for channel in range(first, last):
        b, c = channel // D, channel % D
        cut(image[b, c], f, 0, lie)
        into[:] = 0
        for t in range(offsets.size):
            if t == centre:
                continue
            at = offsets[t]
            if halves:
                at -= offsets[centre]
                start, stop = max(0, -at), min(size, size - at)
                pull_here(
                    pulls[b, t, start:stop], f[start:stop], f[start + at : stop + at],
                    into[start:stop], square,
                )  # fmt: skip
            elif centre >= 0:
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
