"""Triton kernels of the dense and the grouped PAC: implicit matrix products with `tl.dot`.

Names as in `places`; G groups of CG input and OG output channels; the weight is [CO, T, CG]; a
block is BP pixels by BC or BO channels. `EACH`: the adapting kernel has a channel for every input
channel. If not, a tap's factor multiplies the tap's sum and not its terms: tensor cores read x as it
lies.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacswap.ops.gpu.places import decode, factor, inside, owned, pixel, reaching
from pacswap.ops.gpu.tuning import PRODUCT, PULL, WEIGHT, tuned


@triton.jit
def common(k, b, t, py, px, seen, T: tl.constexpr, HO, WO):
    """K of a tap for each pixel, 0 where the tap sees none, in float32."""
    return tl.load(k + factor(b, 0, t, py, px, 1, T, HO, WO), mask=seen, other=0.0).to(tl.float32)


@triton.jit
def separate(k, b, c, t, py, px, seen, C, T: tl.constexpr, HO, WO):
    """K of a tap for each pixel and channel, 0 where not `seen`, [BP, BC], in float32."""
    at = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
    return tl.load(k + at, mask=seen, other=0.0).to(tl.float32)


@tuned(PRODUCT)
@triton.jit
def forward(
    x, k, w, y, M, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y[p, o] = Σ_t K[t, p] · Σ_c x[p+t, c] · w[o, t, c]."""
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    # Programs side by side read the same pixels.
    across = tl.cdiv(OG, BO)
    g = tl.program_id(0) // across % G
    o = tl.program_id(0) % across * BO + tl.arange(0, BO)
    p = tl.program_id(0) // (across * G) * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    steps = tl.cdiv(CG, BC)
    total = tl.zeros([BP, BO], tl.float32)
    part = tl.zeros([BP, BO], tl.float32)
    # One loop over taps and channels, so that loads of the next tap overlap with this product.
    for step in range(T * steps):
        t = step // steps
        c = step % steps * BC + tl.arange(0, BC)
        qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
        seen = known & inside(qy, qx, H, W)
        terms = tl.load(
            x + (pixel(b, qy, qx, C, H, W)[:, None] + (g * CG + c)),
            mask=seen[:, None] & (c < CG), other=0.0,
        )  # fmt: skip
        filters = tl.load(
            w + (((g * OG + o) * T + t) * CG + c[:, None]),
            mask=(c < CG)[:, None] & (o < OG), other=0.0,
        )  # fmt: skip
        if EACH:
            mask = seen[:, None] & (c < CG)
            scale = separate(k, b, g * CG + c, t, py, px, mask, C, T, HO, WO)
            terms = (terms.to(tl.float32) * scale).to(terms.dtype)
            total = tl.dot(terms, filters, total, input_precision=PRECISION)
        else:
            scale = common(k, b, t, py, px, seen, T, HO, WO)
            part = tl.dot(terms, filters, part, input_precision=PRECISION)
            if step % steps == steps - 1:
                total += part * scale[:, None]
                part = tl.zeros([BP, BO], tl.float32)
    tl.store(
        y + (pixel(b, py, px, CO, HO, WO)[:, None] + (g * OG + o)),
        total.to(y.dtype.element_ty), mask=known[:, None] & (o < OG),
    )  # fmt: skip


@tuned(PULL)
@triton.jit
def pull(
    dy, x, k, w, dx, dk, B, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr,
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
    first_y, step_y, rows = reaching(phase // SW + TOP, KH, SH, DH)
    first_x, step_x, columns = reaching(phase % SW + LEFT, KW, SW, DW)
    steps = tl.cdiv(OG, BO)
    own = tl.zeros([BP, BC], tl.float32)
    if WANT_KERNEL:
        own = tl.load(x + q, mask=mine, other=0.0).to(tl.float32)
    total = tl.zeros([BP, BC], tl.float32)
    z = tl.zeros([BP, BC], tl.float32)
    for step in range(rows * columns * steps):
        o = step % steps * BO + tl.arange(0, BO)
        ty = first_y + step // steps // columns * step_y
        tx = first_x + step // steps % columns * step_x
        t = ty * KW + tx
        py = i + (phase // SW + TOP - ty * DH) // SH
        px = j + (phase % SW + LEFT - tx * DW) // SW
        seen = known & inside(py, px, HO, WO)
        grad = tl.load(
            dy + (pixel(b, py, px, CO, HO, WO)[:, None] + (g * OG + o)),
            mask=seen[:, None] & (o < OG), other=0.0,
        )  # fmt: skip
        filters = tl.load(
            w + (((g * OG + o[:, None]) * T + t) * CG + c),
            mask=(o < OG)[:, None] & (c < CG), other=0.0,
        )  # fmt: skip
        z = tl.dot(grad, filters, z, input_precision=PRECISION)
        if step % steps == steps - 1:
            total = spread(
                z, own, total, k, dk, column, b, g * CG + c, t, py, px, seen, c < CG,
                B, C, T, HO, WO, EACH, WANT_INPUT, WANT_KERNEL,
            )  # fmt: skip
            z = tl.zeros([BP, BC], tl.float32)
    if WANT_INPUT:
        tl.store(dx + q, total.to(dx.dtype.element_ty), mask=mine)


@triton.jit
def spread(
    z, own, total, k, dk, column, b, c, t, py, px, seen, real, B, C, T: tl.constexpr, HO, WO,
    EACH: tl.constexpr, WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr,
):  # fmt: skip
    """Store x·Z as the kernel's gradient and return the total with K·Z added."""
    if WANT_KERNEL:
        pulled = z * own
        if EACH:
            at = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
            tl.store(dk + at, pulled.to(dk.dtype.element_ty), mask=seen[:, None] & real)
        else:
            # A share of its own for each program along the channels.
            share = dk + column.to(tl.int64) * B * T * HO * WO
            tl.store(share + factor(b, 0, t, py, px, 1, T, HO, WO), tl.sum(pulled, 1), mask=seen)
    if WANT_INPUT:
        if EACH:
            total += z * separate(k, b, c, t, py, px, seen[:, None] & real, C, T, HO, WO)
        else:
            total += z * common(k, b, t, py, px, seen, T, HO, WO)[:, None]
    return total


@tuned(WEIGHT)
@triton.jit
def weight_gradient(
    dy, x, k, dw, M, CHUNK, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dw[s, o, t, c] = Σ_p (K[t, p] · dy[p, o]) · x[p+t, c] over the s-th CHUNK of pixels."""
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    tile, s = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(CG, BC)
    c = tile % across * BC + tl.arange(0, BC)
    tile = tile // across
    down = tl.cdiv(OG, BO)
    o = tile % down * BO + tl.arange(0, BO)
    t, g = tile // down // G, tile // down % G
    last = tl.minimum(M, (s + 1) * CHUNK)
    total = tl.zeros([BO, BC], tl.float32)
    for start in range(s * CHUNK, last, BP):
        p = start + tl.arange(0, BP)
        b, py, px = decode(p, HO, WO)
        qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
        seen = (p < last) & inside(qy, qx, H, W)
        terms = tl.load(
            x + (pixel(b, qy, qx, C, H, W)[:, None] + (g * CG + c)),
            mask=seen[:, None] & (c < CG), other=0.0,
        )  # fmt: skip
        grad = tl.load(
            dy + (pixel(b, py, px, CO, HO, WO)[:, None] + (g * OG + o)),
            mask=seen[:, None] & (o < OG), other=0.0,
        )  # fmt: skip
        pulled = tl.trans(grad)  # [BO, BP]
        if EACH:
            mask = seen[:, None] & (c < CG)
            scale = separate(k, b, g * CG + c, t, py, px, mask, C, T, HO, WO)
            terms = (terms.to(tl.float32) * scale).to(terms.dtype)
        else:
            scale = common(k, b, t, py, px, seen, T, HO, WO)
            pulled = (pulled.to(tl.float32) * scale[None, :]).to(terms.dtype)
        total = tl.dot(pulled, terms, total, input_precision=PRECISION)
    at = ((s.to(tl.int64) * CO + g * OG + o[:, None]) * T + t) * CG + c
    tl.store(dw + at, total, mask=(o < OG)[:, None] & (c < CG))
