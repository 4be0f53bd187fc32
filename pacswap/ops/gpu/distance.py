"""Triton kernels of the distance between the features at a tap and at the centre, in float32.

Names as in `places`; C is the guidance's channels. SKIP is the centre's tap where the centre is the
guidance's own, which is 0 and not computed; −1 where the centre is a tensor, `at` [B, HO, WO, C].
"""

from __future__ import annotations

import triton
import triton.language as tl

from pacswap.ops.gpu.places import decode, factor, inside, owned, pixel, reaching
from pacswap.ops.gpu.tuning import PIXELWISE, POINTWISE, tuned


@triton.jit
def phi(d, MEASURE: tl.constexpr):
    """As `measure.PHI`."""
    if MEASURE == "absolute":
        value = tl.abs(d)
    elif MEASURE == "asymmetric":
        value = tl.where(d < 0, 0.0, d * d)  # not `maximum`, which takes 0 for NaN
    else:
        value = d * d
    return value


@triton.jit
def derivative(d, MEASURE: tl.constexpr):
    """As `measure.DERIVATIVE`."""
    if MEASURE == "absolute":
        value = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    elif MEASURE == "asymmetric":
        value = tl.where(d < 0, 0.0, 2.0 * d)
    else:
        value = 2.0 * d
    return value


@triton.jit
def _seen(f, b, c, py, px, t, known, C, H, W, TOP, LEFT,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """The features that tap t of the output pixels (py, px) sees."""
    qy, qx = py * SH - TOP + t // KW * DH, px * SW - LEFT + t % KW * DW
    return tl.load(
        f + (pixel(b, qy, qx, C, H, W)[:, None] + c),
        mask=(known & inside(qy, qx, H, W))[:, None] & (c < C), other=0.0,
    ).to(tl.float32)  # fmt: skip


@triton.jit
def _centre(f, at, b, c, py, px, known, C, H, W, HO, WO, TOP, LEFT,
    KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """The centre's features of the output pixels (py, px)."""
    if SKIP < 0:
        place = pixel(b, py, px, C, HO, WO)[:, None] + c
        found = tl.load(at + place, mask=known[:, None] & (c < C), other=0.0).to(tl.float32)
    else:
        found = _seen(
            f, b, c, py, px, SKIP, known, C, H, W, TOP, LEFT, KW, SH, SW, DH, DW
        )  # fmt: skip
    return found


@triton.jit
def _grad(grad, b, c, t, py, px, known, C, T, HO, WO, EACH: tl.constexpr):
    """The gradient of the distances of tap t, [BP, BC] or [BP, 1]."""
    if EACH:
        at = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
        found = tl.load(grad + at, mask=known[:, None] & (c < C), other=0.0)
    else:
        found = tl.load(grad + factor(b, 0, t, py, px, 1, T, HO, WO), mask=known, other=0.0)
        found = found[:, None]
    return found.to(tl.float32)


@tuned(POINTWISE)
def forward(
    f, at, d, M, C, H, W, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    SKIP: tl.constexpr, MEASURE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """d[t, p] = Σ_c φ(f[p+t, c] − centre[p, c]); the sum stays apart if EACH."""
    T: tl.constexpr = KH * KW
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    for t in range(T):
        total = tl.zeros([BP, BC], tl.float32)
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            seen = _seen(f, b, c, py, px, t, known, C, H, W, TOP, LEFT, KW, SH, SW, DH, DW)
            centre = _centre(
                f, at, b, c, py, px, known, C, H, W, HO, WO, TOP, LEFT,
                KW, SH, SW, DH, DW, SKIP,
            )  # fmt: skip
            # Infinite features too are at no distance from themselves.
            value = phi(tl.where(t == SKIP, 0.0, seen - centre), MEASURE)
            if EACH:
                place = factor(b[:, None], c, t, py[:, None], px[:, None], C, T, HO, WO)
                mask = known[:, None] & (c < C)
                tl.store(d + place, value.to(d.dtype.element_ty), mask=mask)
            else:
                total += value
        if not EACH:
            place = factor(b, 0, t, py, px, 1, T, HO, WO)
            tl.store(d + place, tl.sum(total, 1).to(d.dtype.element_ty), mask=known)


@tuned(POINTWISE)
def centre_gradient(
    grad, f, at, dat, M, C, H, W, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    SKIP: tl.constexpr, MEASURE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dat[p, c] = −Σ_t grad[t, p] · φ'(f[p+t, c] − centre[p, c]), [B, HO, WO, C]."""
    T: tl.constexpr = KH * KW
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    known = p < M
    b, py, px = decode(p, HO, WO)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    centre = _centre(
        f, at, b, c, py, px, known, C, H, W, HO, WO, TOP, LEFT, KW, SH, SW, DH, DW, SKIP
    )  # fmt: skip
    total = tl.zeros([BP, BC], tl.float32)
    for t in range(T):
        seen = _seen(f, b, c, py, px, t, known, C, H, W, TOP, LEFT, KW, SH, SW, DH, DW)
        pulled = derivative(seen - centre, MEASURE)
        pulled *= _grad(grad, b, c, t, py, px, known, C, T, HO, WO, EACH)
        total -= tl.where(t == SKIP, 0.0, pulled)
    place = pixel(b, py, px, C, HO, WO)[:, None] + c
    tl.store(dat + place, total.to(dat.dtype.element_ty), mask=known[:, None] & (c < C))


@tuned(PIXELWISE)
def guidance_gradient(
    grad, f, at, dat, df, B, C, H, W, HO, WO, TOP, LEFT, size,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, EACH: tl.constexpr,
    SKIP: tl.constexpr, MEASURE: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """df[q, c] = Σ_t grad[t, p] · φ'(f[q, c] − centre[p, c]), where tap t of p sees q.

    Where the centre is the guidance's own, what `centre_gradient` made of it is added to its pixel.
    A program owns its pixels, as in `dense.pull`: no atomics.
    """
    T: tl.constexpr = KH * KW
    phase = tl.program_id(0) % (SH * SW)
    b, i, j, qy, qx = owned(tl.program_id(0) // (SH * SW), H, W, phase, SH, SW, BP)
    known = (b < B) & (qy < H) & (qx < W)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mine = known[:, None] & (c < C)
    q = pixel(b, qy, qx, C, H, W)[:, None] + c
    own = tl.load(f + q, mask=mine, other=0.0).to(tl.float32)
    first_y, step_y, rows = reaching(phase // SW + TOP, KH, SH, DH)
    first_x, step_x, columns = reaching(phase % SW + LEFT, KW, SW, DW)
    total = tl.zeros([BP, BC], tl.float32)
    for n in range(rows * columns):
        ty, tx = first_y + n // columns * step_y, first_x + n % columns * step_x
        t = ty * KW + tx
        py = i + (phase // SW + TOP - ty * DH) // SH
        px = j + (phase % SW + LEFT - tx * DW) // SW
        seen = known & inside(py, px, HO, WO)
        if t == SKIP:
            place = pixel(b, py, px, C, HO, WO)[:, None] + c
            total += tl.load(dat + place, mask=seen[:, None] & (c < C), other=0.0)
        else:
            centre = _centre(
                f, at, b, c, py, px, seen, C, H, W, HO, WO, TOP, LEFT, KW, SH, SW, DH, DW, SKIP
            )  # fmt: skip
            pulled = derivative(own - centre, MEASURE)
            pulled *= _grad(grad, b, c, t, py, px, seen, C, T, HO, WO, EACH)
            total += tl.where(seen[:, None], pulled, 0.0)
    tl.store(df + q, total.to(df.dtype.element_ty), mask=mine)
