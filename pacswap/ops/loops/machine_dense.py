"""Loops of the dense convolution, as numba compiles them: one tile of one image at a time.

Each takes (first, last, thread, given, like), as `threads.shared` calls it. `tile` is
`Tile.numbers`; `moves` is (border above, border left, vertical stride, horizontal stride, vertical
dilation, horizontal dilation).
"""

from __future__ import annotations

from typing import Any

from numba import carray

from pacswap.ops.loops.threads import compiled, pointer


@compiled
def span(start: int, step: int, count: int, side: int) -> tuple[int, int]:
    """Which of `count` places start, start + step, … lie in range(side): first and last + 1."""
    first = 0 if start >= 0 else (-start + step - 1) // step
    last = min(count, (side - 1 - start) // step + 1) if start < side else 0
    return min(first, count), max(min(first, count), last)


@compiled
def clear_sides(x: Any, start: int, y0: int, y1: int, count: int, a: int, b: int) -> None:
    """0 at the left and the right of some rows; setting slices would take as long as the rows."""
    for r in range(y0, y1):
        for n in range(start + r * count, start + r * count + a):
            x[n] = 0
        for n in range(start + r * count + b, start + (r + 1) * count):
            x[n] = 0


@compiled
def multiply(part: Any, k: Any, v: Any, step: int) -> None:
    """part = k · v, of v every so many."""
    if step == 1:
        for n in range(part.size):
            part[n] = k[n] * v[n]
    else:
        for n in range(part.size):
            part[n] = k[n] * v[n * step]


@compiled
def adapt(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """seen[c, t, p] = K[t, p] · v[c, p + t], 0 beyond the image; channels `first` to `last`.

    `given`: v [C, H, W], K [taps, H_out, W_out] and seen [C, taps of the tile, outputs], each as
    `described`; then tile, moves and the taps of a row of the window.
    """
    g = given
    image = carray(pointer(g[0]), (g[1], g[2], g[3]), like.dtype)
    factors = carray(pointer(g[4]), (g[5], g[6], g[7]), like.dtype)
    seen = carray(pointer(g[8]), (g[9], g[10], g[11]), like.dtype)
    r0, r1, c0, c1, i0, i1, j0, j1 = g[12], g[13], g[14], g[15], g[16], g[17], g[18], g[19]
    above, beside, down, across, apart_y, apart_x = g[20], g[21], g[22], g[23], g[24], g[25]
    KW = g[26]
    height, width = image.shape[1:]
    high, wide = factors.shape[1:]
    rows, count, taps_x = r1 - r0, c1 - c0, j1 - j0
    v, K, S = image.reshape(-1), factors.reshape(-1), seen.reshape(-1)
    is_flat = down == 1 and across == 1 and count == width and wide == width
    for c in range(first, last):
        for i in range(i0, i1):
            top = r0 * down - above + i * apart_y
            for j in range(j0, j1):
                start = (c * (i1 - i0) + i - i0) * taps_x + j - j0
                start = start * rows * count
                left = c0 * across - beside + j * apart_x
                a, b = span(left, across, count, width)
                y0, y1 = span(top, down, rows, height)
                if a >= b or y0 >= y1:
                    S[start : start + rows * count] = 0
                    continue
                S[start : start + y0 * count] = 0
                S[start + y1 * count : start + rows * count] = 0
                k0 = ((i * KW + j) * high + r0) * wide + c0
                if is_flat:
                    # All rows in one go: what a row sees of its neighbours is put right after.
                    p, q = y0 * count + a, (y1 - 1) * count + b
                    x = c * height * width + top * width + left
                    multiply(S[start + p : start + q], K[k0 + p : k0 + q], v[x + p : x + q], 1)
                clear_sides(S, start, y0, y1, count, a, b)
                for r in range(y0, 0 if is_flat else y1):
                    s = start + r * count
                    x = (c * height + top + r * down) * width + left + a * across
                    part, k = S[s + a : s + b], K[k0 + r * wide + a : k0 + r * wide + b]
                    line = v[x : x + (b - a - 1) * across + 1]
                    multiply(part, k, line, across)


@compiled
def share(Z: Any, k: Any, v: Any, into: Any, sums: Any, step: int) -> None:
    """What a tap's gradient is to its pixel, into += K · Z, and to its factor, sums += Z · v."""
    if step == 1:
        for n in range(Z.size):
            into[n] += k[n] * Z[n]
            sums[n] += Z[n] * v[n]
    else:
        for n in range(Z.size):
            into[n * step] += k[n] * Z[n]
            sums[n] += Z[n] * v[n * step]


@compiled
def gather(first: int, last: int, thread: int, given: Any, like: Any) -> None:
    """Both gradients from Z: found[c, p + t] += K · Z, dots[t, p] += Σ_c Z · v.

    `given`: v [C, H, W], K [taps, H_out, W_out], Z [C, taps of the tile, outputs] (what lies beyond
    the image becomes 0), found like v, dots [threads, taps of the tile, outputs]; then as in
    `adapt`.
    """
    g = given
    image = carray(pointer(g[0]), (g[1], g[2], g[3]), like.dtype)
    factors = carray(pointer(g[4]), (g[5], g[6], g[7]), like.dtype)
    pulled = carray(pointer(g[8]), (g[9], g[10], g[11]), like.dtype)
    found = carray(pointer(g[12]), (g[13], g[14], g[15]), like.dtype)
    dots = carray(pointer(g[16]), (g[17], g[18], g[19]), like.dtype)
    r0, r1, c0, c1, i0, i1, j0, j1 = g[20], g[21], g[22], g[23], g[24], g[25], g[26], g[27]
    above, beside, down, across, apart_y, apart_x = g[28], g[29], g[30], g[31], g[32], g[33]
    KW = g[34]
    height, width = image.shape[1:]
    high, wide = factors.shape[1:]
    rows, count, taps_x = r1 - r0, c1 - c0, j1 - j0
    v, K, Z = image.reshape(-1), factors.reshape(-1), pulled.reshape(-1)
    into, sums = found.reshape(-1), dots[thread].reshape(-1)
    is_flat = down == 1 and across == 1 and count == width and wide == width
    for c in range(first, last):
        for i in range(i0, i1):
            top = r0 * down - above + i * apart_y
            for j in range(j0, j1):
                t = (i - i0) * taps_x + j - j0
                at, start = t * rows * count, (c * (i1 - i0) * taps_x + t) * rows * count
                left = c0 * across - beside + j * apart_x
                a, b = span(left, across, count, width)
                y0, y1 = span(top, down, rows, height)
                if a >= b or y0 >= y1:
                    continue
                k0 = ((i * KW + j) * high + r0) * wide + c0
                if is_flat:
                    clear_sides(Z, start, y0, y1, count, a, b)
                    p, q = y0 * count + a, (y1 - 1) * count + b
                    x = c * height * width + top * width + left
                    share(
                        Z[start + p : start + q],
                        K[k0 + p : k0 + q],
                        v[x + p : x + q],
                        into[x + p : x + q],
                        sums[at + p : at + q],
                        1,
                    )
                    clear_sides(sums, at, y0, y1, count, a, b)  # 0·∞ beyond the image
                    continue
                for r in range(y0, y1):
                    s, m, o = start + r * count, k0 + r * wide, at + r * count
                    x = (c * height + top + r * down) * width + left + a * across
                    end = x + (b - a - 1) * across + 1
                    z, k, d = Z[s + a : s + b], K[m + a : m + b], sums[o + a : o + b]
                    line, sent = v[x:end], into[x:end]
                    share(z, k, line, sent, d, across)
