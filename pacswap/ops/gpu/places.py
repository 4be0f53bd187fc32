"""Where a Triton kernel's pixels lie. Device code: `tl` integers, no tensors of torch.

Images are [B, H, W, C] in memory, adapting kernels [B, 1 or C, T, H, W].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(n, height, width):
    """(b, y, x) of the n-th pixel of a batch; b in 64 bits, so that what is added to it is too."""
    rows = n // width
    return (rows // height).to(tl.int64), rows % height, n % width


@triton.jit
def pixel(b, y, x, C, H, W):
    """The offset of a pixel's first channel."""
    return ((b * H + y) * W + x) * C


@triton.jit
def factor(b, c, t, y, x, C, T, H, W):
    """The offset in an adapting kernel of C channels and T taps."""
    return (((b * C + c) * T + t) * H + y) * W + x


@triton.jit
def owned(block, H, W, phase, SH: tl.constexpr, SW: tl.constexpr, BP: tl.constexpr):
    """The pixels (b, i, j) of a block, of which only every SH-th row and SW-th column counts.

    Pixel (i·SH + phase // SW, j·SW + phase % SW): all of one phase are seen by the same taps.
    """
    b, i, j = decode(block * BP + tl.arange(0, BP), tl.cdiv(H, SH), tl.cdiv(W, SW))
    return b, i, j, i * SH + phase // SW, j * SW + phase % SW


@triton.jit
def inside(y, x, H, W):
    """Whether a place is on the image and not on its border of zeros."""
    return (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def inside_bits(first, side, taps: tl.constexpr, dilation: tl.constexpr):
    """Bit t says whether first + t·dilation, on one axis, is on the image: up to 63 taps."""
    bits = first.to(tl.int64 if taps > 31 else tl.int32) * 0
    for t in tl.static_range(taps):
        place = first + t * dilation
        bits |= ((place >= 0) & (place < side)).to(bits.dtype) << t
    return bits


@triton.jit
def reached_bits(
    n, place, side, taps: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr
):  # fmt: skip
    """Bit t says whether an output's tap t, of those that `reaching` counts, sees the place.

    The place is `n` strides after `place`; `side` is the outputs' number on this axis.
    """
    bits = n.to(tl.int64 if taps > 31 else tl.int32) * 0
    for t in tl.static_range(taps):
        output = n + (place - t * dilation) // stride
        bits |= ((output >= 0) & (output < side)).to(bits.dtype) << t
    return bits


@triton.jit
def sees_at_once(rows, columns, KH: tl.constexpr, KW: tl.constexpr):
    """Bits of all taps from those of both axes, or those of the rows where there are too many."""
    bits = rows
    if KH * KW < 64:
        bits = rows.to(tl.int64 if KH * KW > 31 else tl.int32) * 0
        for t in tl.static_range(KH * KW):
            bits |= ((rows >> (t // KW)) & (columns >> (t % KW)) & 1).to(bits.dtype) << t
    return bits


@triton.jit
def seen_at(bits, rows, columns, y, x, KH: tl.constexpr, KW: tl.constexpr):
    """Whether the tap (y, x) is on the image: `bits` of `sees_at_once`, and those of both axes."""
    bits = bits >> (y * KW + x) if KH * KW < 64 else (rows >> y) & (columns >> x)
    return bits & 1 != 0


@triton.jit
def reaching(place, taps: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr):
    """(first, step, count) of the taps that see a place on one axis, counted from its border on.

    Tap t of the output n sees n·stride + t·dilation.
    """
    first, second, count = place * 0, place * 0, place * 0
    for t in tl.static_range(taps):
        hit = (place - t * dilation) % stride == 0
        first = tl.where(hit & (count == 0), t, first)
        second = tl.where(hit & (count == 1), t, second)
        count += tl.where(hit, 1, 0)
    return first, tl.where(count > 1, second - first, 1), count
