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
def reaching(place, taps: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr):
    """(first, step, count) of the taps that see a place on one axis, counted from its border on.

    Tap t of the output n sees n·stride + t·dilation.
    """
    first, second, count = 0, 0, 0
    for t in tl.static_range(taps):
        hit = (place - t * dilation) % stride == 0
        first = tl.where(hit & (count == 0), t, first)
        second = tl.where(hit & (count == 1), t, second)
        count += tl.where(hit, 1, 0)
    return first, second - first, count
