"""Triton kernels of the dense and the grouped PAC: implicit matrix products with `tl.dot`.

Names as in `places`; G groups of CG input and OG output channels; a block is BP pixels by BC or BO
channels. `EACH`: the adapting kernel has a channel for every input channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacswap.ops.gpu.places import channel, decode, factor, inside, owned, pixel
from pacswap.ops.gpu.tuning import PRODUCT, PULL, WEIGHT, tuned


@tuned(PRODUCT)
@triton.jit
def forward(
    x, k, w, y, M, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y[p, o] = Σ_t Σ_c (K[t, p] · x[p+t, c]) · w[t, g, c, o]."""
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    blocks = tl.cdiv(OG, BO)
    g = tl.program_id(1) // blocks
    o = tl.program_id(1) % blocks * BO + tl.arange(0, BO)
    total = tl.zeros([BP, BO], tl.float32)
    steps = tl.cdiv(CG, BC)
    # One loop over taps and channels, so that loads of the next tap overlap with this product.
    for step in range(T * steps):
        t = step // steps
        c = step % steps * BC + tl.arange(0, BC)
        qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
        seen = tl.load(
            x + (pixel(b, qy, qx, C, H, W, X_LAST)[:, None] + channel(g * CG + c, H, W, X_LAST)),
            mask=(known & inside(qy, qx, H, W))[:, None] & (c < CG), other=0.0,
        )  # fmt: skip
        if EACH:
            at = factor(b[:, None], g * CG + c, t, py[:, None], px[:, None], C, T, HO, WO)
            scale = tl.load(k + at, mask=known[:, None] & (c < CG), other=0.0)
        else:
            scale = tl.load(k + factor(b, 0, t, py, px, 1, T, HO, WO), mask=known, other=0.0)
            scale = scale[:, None]
        scaled = (seen.to(tl.float32) * scale.to(tl.float32)).to(seen.dtype)
        filters = tl.load(
            w + ((t * G + g) * CG + c)[:, None] * OG + o,
            mask=(c < CG)[:, None] & (o < OG), other=0.0,
        )  # fmt: skip
        total = tl.dot(scaled, filters, total, input_precision=PRECISION)
    tl.store(
        y + (pixel(b, py, px, CO, HO, WO, Y_LAST)[:, None] + channel(g * OG + o, HO, WO, Y_LAST)),
        total.to(y.dtype.element_ty), mask=known[:, None] & (o < OG),
    )  # fmt: skip


@tuned(PULL)
@triton.jit
def pull(
    dy, x, k, w, dx, dk, B, C, H, W, CO, HO, WO, TOP, LEFT, LIFT_Y, LIFT_X, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, D_LAST: tl.constexpr, PRECISION: tl.constexpr,
    WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Z[q, c] = Σ_o dy[p, o] · w[t, g, o, c], where tap t of p sees q; dx = Σ_t K·Z, dk = x·Z.

    A program owns pixels q of the image. Each (t, p) sees one q, so it alone writes dk[t, p], and
    nobody adds to another's dx: no atomics. Sums over blocks of channels are the caller's.
    """
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    phase = tl.program_id(0) % (SH * SW)
    b, i, j, qy, qx = owned(tl.program_id(0) // (SH * SW), H, W, phase, SH, SW, BP)
    known = (b < B) & (qy < H) & (qx < W)
    blocks = tl.cdiv(CG, BC)
    g = tl.program_id(1) // blocks
    c = tl.program_id(1) % blocks * BC + tl.arange(0, BC)
    q = pixel(b, qy, qx, C, H, W, X_LAST)[:, None] + channel(g * CG + c, H, W, X_LAST)
    mine = known[:, None] & (c < CG)
    own = tl.zeros([BP, BC], tl.float32)
    if WANT_KERNEL:
        own = tl.load(x + q, mask=mine, other=0.0).to(tl.float32)
    total = tl.zeros([BP, BC], tl.float32)
    for t in range(T):
        # Lifted by so many strides above 0, where division rounds down on every machine.
        ny = phase // SW + TOP - t // KW * DH + LIFT_Y * SH
        nx = phase % SW + LEFT - t % KW * DW + LIFT_X * SW
        if (ny % SH == 0) & (nx % SW == 0):
            py, px = i + ny // SH - LIFT_Y, j + nx // SW - LIFT_X
            seen = known & inside(py, px, HO, WO)
            p = pixel(b, py, px, CO, HO, WO, Y_LAST)[:, None]
            z = tl.zeros([BP, BC], tl.float32)
            for start in range(0, OG, BO):
                o = start + tl.arange(0, BO)
                grad = tl.load(
                    dy + (p + channel(g * OG + o, HO, WO, Y_LAST)),
                    mask=seen[:, None] & (o < OG), other=0.0,
                )  # fmt: skip
                filters = tl.load(
                    w + ((t * G + g) * OG + o)[:, None] * CG + c,
                    mask=(o < OG)[:, None] & (c < CG), other=0.0,
                )  # fmt: skip
                z = tl.dot(grad, filters, z, input_precision=PRECISION)
            total = spread(
                z, own, total, k, dk, b, g * CG + c, t, py, px, seen, c < CG, B, C, T, HO, WO,
                EACH, WANT_INPUT, WANT_KERNEL,
            )  # fmt: skip
    if WANT_INPUT:
        q = pixel(b, qy, qx, C, H, W, D_LAST)[:, None] + channel(g * CG + c, H, W, D_LAST)
        tl.store(dx + q, total.to(dx.dtype.element_ty), mask=mine)


@triton.jit
def spread(
    z, own, total, k, dk, b, c, t, py, px, seen, real, B, C, T: tl.constexpr, HO, WO,
    EACH: tl.constexpr, WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr,
):  # fmt: skip
    """Store x·Z as the kernel's gradient and return the total with K·Z added."""
    if EACH:
        at = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
        mask = seen[:, None] & real
        if WANT_KERNEL:
            tl.store(dk + at, (z * own).to(dk.dtype.element_ty), mask=mask)
        if WANT_INPUT:
            total += z * tl.load(k + at, mask=mask, other=0.0).to(tl.float32)
    else:
        at = factor(b, 0, t, py, px, 1, T, HO, WO)
        if WANT_KERNEL:
            # A share of its own for each program along the channels.
            share = (tl.program_id(1).to(tl.int64) * B) * T * HO * WO
            tl.store(dk + share + at, tl.sum(z * own, 1), mask=seen)
        if WANT_INPUT:
            total += z * tl.load(k + at, mask=seen, other=0.0).to(tl.float32)[:, None]
    return total


@tuned(WEIGHT)
@triton.jit
def weight_gradient(
    dy, x, k, dw, M, CHUNK, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, G: tl.constexpr, EACH: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dw[s, t, g, c, o] = Σ_p (K[t, p] · x[p+t, c]) · dy[p, o] over the s-th CHUNK of pixels."""
    T: tl.constexpr = KH * KW
    CG, OG = C // G, CO // G
    tile, s = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(OG, BO)
    o = tile % across * BO + tl.arange(0, BO)
    tile = tile // across
    down = tl.cdiv(CG, BC)
    c = tile % down * BC + tl.arange(0, BC)
    t, g = tile // down // G, tile // down % G
    last = tl.minimum(M, (s + 1) * CHUNK)
    total = tl.zeros([BC, BO], tl.float32)
    for start in range(s * CHUNK, last, BP):
        p = start + tl.arange(0, BP)
        known = p < last
        b, py, px = decode(p, HO, WO)
        qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
        seen = tl.load(
            x + (pixel(b, qy, qx, C, H, W, X_LAST) + channel(g * CG + c, H, W, X_LAST)[:, None]),
            mask=(known & inside(qy, qx, H, W)) & (c < CG)[:, None], other=0.0,
        )  # fmt: skip
        if EACH:
            at = factor(b, (g * CG + c)[:, None], t, py, px, C, T, HO, WO)
            scale = tl.load(k + at, mask=known & (c < CG)[:, None], other=0.0)
        else:
            scale = tl.load(k + factor(b, 0, t, py, px, 1, T, HO, WO), mask=known, other=0.0)
        scaled = (seen.to(tl.float32) * scale.to(tl.float32)).to(seen.dtype)  # [BC, BP]
        grad = tl.load(
            dy
            + (pixel(b, py, px, CO, HO, WO, Y_LAST)[:, None] + channel(g * OG + o, HO, WO, Y_LAST)),
            mask=known[:, None] & (o < OG), other=0.0,
        )  # fmt: skip
        total = tl.dot(scaled, grad, total, input_precision=PRECISION)
    at = (((s.to(tl.int64) * T + t) * G + g) * CG + c)[:, None] * OG + o
    tl.store(dw + at, total, mask=(c < CG)[:, None] & (o < OG))
