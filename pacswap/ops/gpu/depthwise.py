"""Triton kernels of the depthwise PAC: every input channel has MULT output channels of its own.

No matrix product: memory is the bound, and all is computed in float32. Names as in `dense`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacswap.ops.gpu.dense import separate, spread, spread_each
from pacswap.ops.gpu.places import decode, factor, inside, owned, pixel, reaching
from pacswap.ops.gpu.tuning import PIXELWISE, POINTWISE, tuned


@triton.jit
def _scaled(
    x, k, b, c, py, px, t, known, real, C, H, W, HO, WO, TOP, LEFT,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """K · x as tap t of the output pixels (py, px) sees it, for channels c, in float32."""
    qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
    seen = known & inside(qy, qx, H, W)
    mask = seen[:, None] & real
    terms = tl.load(x + (pixel(b, qy, qx, C, H, W)[:, None] + c), mask=mask, other=0.0)
    if EACH:
        scale = separate(
            k, b[:, None], c, t, py[:, None], px[:, None], mask, C, KH * KW, HO, WO
        )  # fmt: skip
    else:
        at = factor(b, 0, t, py, px, 1, KH * KW, HO, WO)
        scale = tl.load(k + at, mask=seen, other=0.0)[:, None]
    return terms.to(tl.float32) * scale.to(tl.float32)


@tuned(POINTWISE)
def forward(
    x, k, w, y, M, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Y[p, o] = Σ_t K[t, p] · x[p+t, o // MULT] · w[t, o]; a block is BP pixels by BC outputs."""
    across = tl.cdiv(CO, BC)
    p = tl.program_id(0) // across * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    o = tl.program_id(0) % across * BC + tl.arange(0, BC)
    c = o // (CO // C)
    total = tl.zeros([BP, BC], tl.float32)
    for t in range(KH * KW):
        scaled = _scaled(
            x, k, b, c, py, px, t, known, o < CO, C, H, W, HO, WO, TOP, LEFT,
            KH, KW, SH, SW, DH, DW, EACH,
        )  # fmt: skip
        total += scaled * tl.load(w + t * CO + o, mask=o < CO, other=0.0).to(tl.float32)
    tl.store(
        y + (pixel(b, py, px, CO, HO, WO)[:, None] + o),
        total.to(y.dtype.element_ty), mask=known[:, None] & (o < CO),
    )  # fmt: skip


@tuned(PIXELWISE)
def pull(
    dy, x, k, w, dx, dk, B, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    WANT_INPUT: tl.constexpr, WANT_KERNEL: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """As `dense.pull`, with Z[q, c] the sum over the MULT outputs of c alone."""
    T: tl.constexpr = KH * KW
    across = tl.cdiv(C, BC)
    column = tl.program_id(0) % across
    c = column * BC + tl.arange(0, BC)
    block = tl.program_id(0) // across
    phase = block % (SH * SW)
    b, i, j, qy, qx = owned(block // (SH * SW), H, W, phase, SH, SW, BP)
    known = (b < B) & (qy < H) & (qx < W)
    q = pixel(b, qy, qx, C, H, W)[:, None] + c
    mine = known[:, None] & (c < C)
    own = tl.zeros([BP, BC], tl.float32)
    if WANT_KERNEL:
        own = tl.load(x + q, mask=mine, other=0.0).to(tl.float32)
    first_y, step_y, rows = reaching(phase // SW + TOP, KH, SH, DH)
    first_x, step_x, columns = reaching(phase % SW + LEFT, KW, SW, DW)
    total = tl.zeros([BP, BC], tl.float32)
    mult = CO // C
    for n in range(rows * columns):
        ty, tx = first_y + n // columns * step_y, first_x + n % columns * step_x
        t = ty * KW + tx
        py = i + (phase // SW + TOP - ty * DH) // SH
        px = j + (phase % SW + LEFT - tx * DW) // SW
        seen = known & inside(py, px, HO, WO)
        p = pixel(b, py, px, CO, HO, WO)[:, None]
        z = tl.zeros([BP, BC], tl.float32)
        for m in range(mult):
            o = c * mult + m
            grad = tl.load(dy + (p + o), mask=seen[:, None] & (c < C), other=0.0)
            filters = tl.load(w + t * CO + o, mask=c < C, other=0.0)
            z += grad.to(tl.float32) * filters.to(tl.float32)
        if EACH:
            total = spread_each(
                z, own, total, k, dk, b, c, t, py, px, seen, c < C, C, T, HO, WO,
                WANT_INPUT, WANT_KERNEL,
            )  # fmt: skip
        else:
            total = spread(
                z, own, total, k, dk, column.to(tl.int64) * B * T * HO * WO,
                factor(b, 0, t, py, px, 1, T, HO, WO), seen, WANT_INPUT, WANT_KERNEL,
            )  # fmt: skip
    if WANT_INPUT:
        tl.store(dx + q, total.to(dx.dtype.element_ty), mask=mine)


@tuned(POINTWISE)
def weight_gradient(
    dy, x, k, dw, M, CHUNK, C, H, W, CO, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
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
            x, k, b, c, py, px, t, known, o < CO, C, H, W, HO, WO, TOP, LEFT,
            KH, KW, SH, SW, DH, DW, EACH,
        )  # fmt: skip
        at = pixel(b, py, px, CO, HO, WO)[:, None] + o
        grad = tl.load(dy + at, mask=known[:, None] & (o < CO), other=0.0)
        total += scaled * grad.to(tl.float32)
    place = dw + (s.to(tl.int64) * T + t) * CO + o
    tl.store(place, tl.sum(total, 0).to(dw.dtype.element_ty), mask=o < CO)
