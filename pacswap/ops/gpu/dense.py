"""Triton kernels of the dense and the grouped PAC: implicit matrix products with `tl.dot`.

Names as in `places`; G groups of CG input and OG output channels, of which CF and OF are powers of
two that divide them; the weight is [CO, T, CG]; a block is BP pixels by BC or BO channels. `EACH`:
the adapting kernel has a channel for every input channel.

Tensor cores are faster than divisions: where a tap lies is counted on, not computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacswap.ops.gpu.places import (
    decode,
    factor,
    inside,
    inside_bits,
    owned,
    pixel,
    reached_bits,
    reaching,
    seen_at,
    sees_at_once,
)
from pacswap.ops.gpu.tuning import PRODUCT, PULL, WEIGHT, tuned


@triton.jit
def separate(k, b, c, t, py, px, seen, C, T: tl.constexpr, HO, WO):
    """K of a tap for each pixel, [BP, 1], and channel, 0 where not `seen`, [BP, BC]."""
    return tl.load(k + factor(b, c, t, py, px, C, T, HO, WO), mask=seen, other=0.0)


@triton.jit
def real(channels, count, block: tl.constexpr, divisor: tl.constexpr):
    """Whether channels are there; no question where blocks divide their number."""
    return channels < count if divisor % block else tl.full(channels.shape, True, tl.int1)


@triton.jit
def next_tap(channel, channels, y, step_y, x, step_x, first_x, count_x):
    """(channel, y, x) of the next step: the next tap where the channels are at their end.

    No `if`: the compiler would load for one step at a time.
    """
    x += tl.where(channel >= channels, step_x, 0)
    channel = tl.where(channel >= channels, 0, channel)
    is_row = x == first_x + count_x * step_x
    y += tl.where(is_row, step_y, 0)
    return channel, y, tl.where(is_row, first_x, x)


@triton.jit
def next_block(block, each, y, x, start_y, start_x, count: tl.constexpr, width):
    """(block, y, x, wrapped) of the next block of so many pixels of an image that has `each`."""
    x += count % width
    y += count // width + (x >= width).to(tl.int32)
    x = tl.where(x >= width, x - width, x)
    over = block + 1 == each
    return (
        tl.where(over, 0, block + 1),
        tl.where(over, start_y, y),
        tl.where(over, start_x, x),
        over,
    )


@tuned(PRODUCT)
def forward(
    x, k, w, y, M, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    CF: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y[p, o] = Σ_t Σ_c (K[t, p] · x[p+t, c]) · w[o, t, c]."""
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    # Programs side by side read the same pixels.
    across = tl.cdiv(OG, BO)
    g = tl.program_id(0) // across % G
    o = tl.program_id(0) % across * BO + tl.arange(0, BO)
    p = tl.program_id(0) // (across * G) * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    sees_y = tl.where(known, inside_bits(py * SH - TOP, H, KH, DH), 0)
    sees_x = inside_bits(px * SW - LEFT, W, KW, DW)
    sees = sees_at_once(sees_y, sees_x, KH, KW)
    c = tl.arange(0, BC)
    # Of the first tap and the first channels.
    rows = x + (pixel(b, py * SH - TOP, px * SW - LEFT, C, H, W)[:, None] + (g * CG + c))
    filters = w + ((g * OG + o) * (T * CG) + c[:, None])
    factors = k + factor(b, 0, 0, py, px, 1, T, HO, WO)
    steps = tl.cdiv(CG, BC)
    total = tl.zeros([BP, BO], tl.float32)
    ty, tx, first = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    # One loop over taps and channels, so that loads of the next tap overlap with this product.
    for _ in range(T * steps):
        seen = seen_at(sees, sees_y, sees_x, ty, tx, KH, KW)
        exists = real(first + c, CG, BC, CF)
        terms = tl.load(
            rows + ((ty * DH * W + tx * DW).to(tl.int64) * C + first),
            mask=seen[:, None] & exists, other=0.0,
        )  # fmt: skip
        weights = tl.load(
            filters + ((ty * KW + tx) * CG + first),
            mask=exists[:, None] & real(o, OG, BO, OF), other=0.0,
        )  # fmt: skip
        if EACH:
            mask = seen[:, None] & exists
            scale = separate(
                k, b[:, None], g * CG + first + c, ty * KW + tx, py[:, None], px[:, None], mask,
                C, T, HO, WO,
            )  # fmt: skip
        else:
            there = known & inside(py * SH - TOP + ty * DH, px * SW - LEFT + tx * DW, H, W)
            scale = tl.load(factors + (ty * KW + tx) * HO * WO, mask=there, other=0.0)[:, None]
        total = tl.dot(terms * scale, weights, total, input_precision=PRECISION)
        first, ty, tx = next_tap(first + BC, CG, ty, 1, tx, 1, 0, KW)
    tl.store(
        y + (pixel(b, py, px, CO, HO, WO)[:, None] + (g * OG + o)),
        total.to(y.dtype.element_ty), mask=known[:, None] & (o < OG),
    )  # fmt: skip


@tuned(PULL)
def pull(
    dy, x, k, w, dx, dk, B, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    CF: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr, WANT_INPUT: tl.constexpr,
    WANT_KERNEL: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Z[q, c] = Σ_o dy[p, o] · w[o, t, c], where tap t of p sees q; dx = Σ_t K·Z, dk = x·Z.

    A program owns pixels q of the image. Each (t, p) sees one q, so it alone writes dk[t, p], and
    nobody adds to another's dx: no atomics. Sums over blocks of channels are the caller's.
    """
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    across = tl.cdiv(CG, BC)
    column = tl.program_id(0) % (across * G)
    g = column // across
    c = column % across * BC + tl.arange(0, BC)
    block = tl.program_id(0) // (across * G)
    phase = block % (SH * SW)
    b, i, j, qy, qx = owned(block // (SH * SW), H, W, phase, SH, SW, BP)
    known = (b < B) & (qy < H) & (qx < W)
    q = pixel(b, qy, qx, C, H, W)[:, None] + (g * CG + c)
    mine = known[:, None] & (c < CG)
    own = tl.load(x + q, mask=mine, other=0.0).to(tl.float32)
    above, beside = phase // SW + TOP, phase % SW + LEFT
    first_y, step_y, count_y = reaching(above, KH, SH, DH)
    first_x, step_x, count_x = reaching(beside, KW, SW, DW)
    sees_y = tl.where(known, reached_bits(i, above, HO, KH, SH, DH), 0)
    sees_x = reached_bits(j, beside, WO, KW, SW, DW)
    sees = sees_at_once(sees_y, sees_x, KH, KW)
    o = tl.arange(0, BO)
    rows = dy + (pixel(b, i, j, CO, HO, WO)[:, None] + (g * OG + o))
    filters = w + ((g * OG + o[:, None]).to(tl.int64) * (T * CG) + c)
    # Of the output pixel (i, j) and the first tap.
    place = factor(b, 0, 0, i, j, 1, T, HO, WO)
    total, z = tl.zeros([BP, BC], tl.float32), tl.zeros([BP, BC], tl.float32)
    ty, tx, first = first_y, first_x, tl.full([], 0, tl.int32)
    for _ in range(count_y * count_x * tl.cdiv(OG, BO)):
        shift = (above - ty * DH) // SH * WO + (beside - tx * DW) // SW
        t = ty * KW + tx
        seen = seen_at(sees, sees_y, sees_x, ty, tx, KH, KW)
        exists = real(first + o, OG, BO, OF)
        far = shift.to(tl.int64) * CO + first
        grad = tl.load(rows + far, mask=seen[:, None] & exists, other=0.0)
        mask = exists[:, None] & real(c, CG, BC, CF)
        weights = tl.load(filters + (first * T + t) * CG, mask=mask, other=0.0)
        z = tl.dot(grad, weights, z, input_precision=PRECISION)
        first += BO
        if first >= OG:
            if EACH:
                total = spread_each(
                    z, own, total, k, dk, b, g * CG + c, t, i + (above - ty * DH) // SH,
                    j + (beside - tx * DW) // SW, seen, c < CG, C, T, HO, WO,
                    WANT_INPUT, WANT_KERNEL,
                )  # fmt: skip
            else:
                total = spread(
                    z, own, total, k, dk, column.to(tl.int64) * B * T * HO * WO,
                    place + (t * HO * WO + shift), seen, WANT_INPUT, WANT_KERNEL,
                )  # fmt: skip
            z = tl.zeros([BP, BC], tl.float32)
        first, ty, tx = next_tap(first, OG, ty, step_y, tx, step_x, first_x, count_x)
    if WANT_INPUT:
        tl.store(dx + q, total.to(dx.dtype.element_ty), mask=mine)


@triton.jit
def spread(
    z, own, total, k, dk, share, at, seen, WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr,
):  # fmt: skip
    """Store x·Z as the kernel's gradient and return the total with K·Z added.

    Programs along the channels have a share of `dk` each.
    """
    if WANT_KERNEL:
        tl.store(dk + share + at, tl.sum(z * own, 1).to(dk.dtype.element_ty), mask=seen)
    if WANT_INPUT:
        total += z * tl.load(k + at, mask=seen, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def spread_each(
    z, own, total, k, dk, b, c, t, py, px, seen, exists, C, T: tl.constexpr, HO, WO,
    WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr,
):  # fmt: skip
    """As `spread`, for an adapting kernel with a channel for every input channel."""
    mask = seen[:, None] & exists
    if WANT_KERNEL:
        at = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
        tl.store(dk + at, (z * own).to(dk.dtype.element_ty), mask=mask)
    if WANT_INPUT:
        each = separate(k, b[:, None], c, t, py[:, None], px[:, None], mask, C, T, HO, WO)
        total += z * each.to(tl.float32)
    return total


@tuned(WEIGHT)
def weight_gradient(
    dy, x, k, dw, B, PARTS, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    CF: tl.constexpr, OF: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dw[s, o, t, c] = Σ_p (K[t, p] · dy[p, o]) · x[p+t, c] over the s-th of PARTS of pixels."""
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    tile, s = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(CG, BC)
    c = tile % across * BC + tl.arange(0, BC)
    tile = tile // across
    down = tl.cdiv(OG, BO)
    o = tile % down * BO + tl.arange(0, BO)
    t, g = tile // down // G, tile // down % G
    above, beside = t // KW * DH - TOP, t % KW * DW - LEFT
    # Blocks of pixels do not go on from one image to the next: what is of the image is of all rows.
    each = tl.cdiv(HO * WO, BP)
    first = s * tl.cdiv(B * each, PARTS)
    last = tl.minimum(B * each, first + tl.cdiv(B * each, PARTS))
    b, block = (first // each).to(tl.int64), first % each
    # Numbers before the image, pixels before the output, and how many each has.
    size_x, size_y = (b * 0 + H) * W * C, (b * 0 + HO) * WO
    image, output = b * size_x, b * size_y
    start_y, start_x = tl.arange(0, BP) // WO, tl.arange(0, BP) % WO
    py, px = (block * BP + tl.arange(0, BP)) // WO, (block * BP + tl.arange(0, BP)) % WO
    columns = x + (g * CG + c)
    # Read transposed: the left factor of a product is scaled on its way to the tensor cores.
    grads = dy + (tl.arange(0, BP) * CO + (g * OG + o)[:, None])
    total = tl.zeros([BO, BC], tl.float32)
    for _ in range(first, last):
        p = block * BP + tl.arange(0, BP)
        known = p < HO * WO
        qy, qx = py * SH + above, px * SW + beside
        seen = known & inside(qy, qx, H, W)
        terms = tl.load(
            columns + (image + (qy * W + qx).to(tl.int64)[:, None] * C),
            mask=seen[:, None] & real(c, CG, BC, CF), other=0.0,
        )  # fmt: skip
        grad = tl.load(
            grads + (output + block * BP) * CO,
            mask=known & real(o, OG, BO, OF)[:, None], other=0.0,
        )  # fmt: skip
        if EACH:
            b, at_y, at_x = output // size_y, py[:, None], px[:, None]
            mask = seen[:, None] & (c < CG)
            terms *= separate(k, b, g * CG + c, t, at_y, at_x, mask, C, T, HO, WO)
        else:
            # A sum, or the compiler would find out `seen` for every thread that multiplies.
            factors = k + (output * T + t * HO * WO + p)[:, None] + tl.zeros([1, 2], tl.int32)
            mask = seen[:, None] & (tl.arange(0, 2) == 0)
            grad *= tl.sum(tl.load(factors, mask=mask, other=0.0), 1).to(grad.dtype)
        total = tl.dot(grad, terms, total, input_precision=PRECISION)
        block, py, px, over = next_block(block, each, py, px, start_y, start_x, BP, WO)
        image += tl.where(over, size_x, 0)
        output += tl.where(over, size_y, 0)
    at = ((s.to(tl.int64) * CO + g * OG + o[:, None]) * T + t) * CG + c
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=(o < OG)[:, None] & (c < CG))
