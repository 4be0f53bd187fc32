"""Triton kernels of the depthwise PAC: every input channel has MULT output channels of its own.

No matrix product: memory is the bound, and all is computed in float32. Names as in `dense`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacswap.ops.gpu.dense import spread
from pacswap.ops.gpu.places import channel, decode, factor, inside, owned, pixel
from pacswap.ops.gpu.tuning import PIXELWISE, POINTWISE, tuned


@triton.jit
def _scaled(
    x, k, b, c, py, px, t, known, C, H, W, HO, WO, TOP, LEFT,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr, X_LAST: tl.constexpr,
):  # fmt: skip
    """K · x as tap t of the output pixels (py, px) sees it, for channels c, in float32."""
    T: tl.constexpr = KH * KW
    qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
    seen = tl.load(
        x + (pixel(b, qy, qx, C, H, W, X_LAST)[:, None] + channel(c, H, W, X_LAST)),
        mask=(known & inside(qy, qx, H, W))[:, None] & (c < C), other=0.0,
    )  # fmt: skip
    if EACH:
        at = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
        scale = tl.load(k + at, mask=known[:, None] & (c < C), other=0.0)
    else:
        scale = tl.load(k + factor(b, 0, t, py, px, 1, T, HO, WO), mask=known, other=0.0)
        scale = scale[:, None]
    return seen.to(tl.float32) * scale.to(tl.float32)


@tuned(POINTWISE)
@triton.jit
def forward(
    x, k, w, y, M, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y[p, o] = Σ_t K[t, p] · x[p+t, o // MULT] · w[t, o]; a block is BP pixels by BC outputs."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    o = tl.program_id(1) * BC + tl.arange(0, BC)
    c = o // (CO // C)
    total = tl.zeros([BP, BC], tl.float32)
    for t in range(KH * KW):
        scaled = _scaled(
            x, k, b, c, py, px, t, known, C, H, W, HO, WO, TOP, LEFT,
            KH, KW, SH, SW, DH, DW, EACH, X_LAST,
        )  # fmt: skip
        total += scaled * tl.load(w + t * CO + o, mask=o < CO, other=0.0).to(tl.float32)
    tl.store(
        y + (pixel(b, py, px, CO, HO, WO, Y_LAST)[:, None] + channel(o, HO, WO, Y_LAST)),
        total.to(y.dtype.element_ty), mask=known[:, None] & (o < CO),
    )  # fmt: skip


@tuned(PIXELWISE)
@triton.jit
def pull(
    dy, x, k, w, dx, dk, B, C, H, W, CO, HO, WO, TOP, LEFT, LIFT_Y, LIFT_X, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, D_LAST: tl.constexpr,
    WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """As `dense.pull`, with Z[q, c] the sum over the MULT outputs of c alone."""
    T: tl.constexpr = KH * KW
    phase = tl.program_id(0) % (SH * SW)
    b, i, j, qy, qx = owned(tl.program_id(0) // (SH * SW), H, W, phase, SH, SW, BP)
    known = (b < B) & (qy < H) & (qx < W)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mine = known[:, None] & (c < C)
    own = tl.zeros([BP, BC], tl.float32)
    if WANT_KERNEL:
        q = pixel(b, qy, qx, C, H, W, X_LAST)[:, None] + channel(c, H, W, X_LAST)
        own = tl.load(x + q, mask=mine, other=0.0).to(tl.float32)
    total = tl.zeros([BP, BC], tl.float32)
    mult = CO // C
    for t in range(T):
        ny = phase // SW + TOP - t // KW * DH + LIFT_Y * SH
        nx = phase % SW + LEFT - t % KW * DW + LIFT_X * SW
        if (ny % SH == 0) & (nx % SW == 0):
            py, px = i + ny // SH - LIFT_Y, j + nx // SW - LIFT_X
            seen = known & inside(py, px, HO, WO)
            p = pixel(b, py, px, CO, HO, WO, Y_LAST)[:, None]
            z = tl.zeros([BP, BC], tl.float32)
            for m in range(mult):
                o = c * mult + m
                grad = tl.load(
                    dy + (p + channel(o, HO, WO, Y_LAST)),
                    mask=seen[:, None] & (c < C), other=0.0,
                )  # fmt: skip
                filters = tl.load(w + t * CO + o, mask=c < C, other=0.0)
                z += grad.to(tl.float32) * filters.to(tl.float32)
            total = spread(
                z, own, total, k, dk, b, c, t, py, px, seen, c < C, B, C, T, HO, WO,
                EACH, WANT_INPUT, WANT_KERNEL,
            )  # fmt: skip
    if WANT_INPUT:
        q = pixel(b, qy, qx, C, H, W, D_LAST)[:, None] + channel(c, H, W, D_LAST)
        tl.store(dx + q, total.to(dx.dtype.element_ty), mask=mine)


@tuned(POINTWISE)
@triton.jit
def weight_gradient(
    dy, x, k, dw, M, CHUNK, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    X_LAST: tl.constexpr, Y_LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dw[s, t, o] = Σ_p K[t, p] · x[p+t, o // MULT] · dy[p, o] over the s-th CHUNK of pixels."""
    T: tl.constexpr = KH * KW
    across = tl.cdiv(CO, BC)
    t, s = tl.program_id(0) // across, tl.program_id(1)
    o = tl.program_id(0) % across * BC + tl.arange(0, BC)
    c = o // (CO // C)
    last = tl.minimum(M, (s + 1) * CHUNK)
    total = tl.zeros([BP, BC], tl.float32)
    for start in range(s * CHUNK, last, BP):
        p = start + tl.arange(0, BP)
        known = p < last
        b, py, px = decode(p, HO, WO)
        scaled = _scaled(
            x, k, b, c, py, px, t, known, C, H, W, HO, WO, TOP, LEFT,
            KH, KW, SH, SW, DH, DW, EACH, X_LAST,
        )  # fmt: skip
        at = pixel(b, py, px, CO, HO, WO, Y_LAST)[:, None] + channel(o, HO, WO, Y_LAST)
        grad = tl.load(dy + at, mask=known[:, None] & (o < CO), other=0.0)
        total += scaled * grad.to(tl.float32)
    tl.store(dw + (s.to(tl.int64) * T + t) * CO + o, tl.sum(total, 0), mask=o < CO)
