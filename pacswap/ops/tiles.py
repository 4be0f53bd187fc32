"""Which taps of a convolution lie in the image, and what a CPU is estimated to take."""

from __future__ import annotations

from pacswap.ops.window import Window

# Multiply-adds of a product in the time of writing one number of K·v; and a depthwise convolution,
# whose two products for each tap leave nothing to a matrix product.
_WRITE = 6
_DEPTHWISE = 1.4
# Below this part of a window's taps that lie inside the image, those outside are left out.
_DENSE = 0.65


def spans(window: Window, image: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """For each axis and tap, the outputs, first and last + 1, from which it lies in the image.

    Args:
        window: the geometry, with a border of zeros.
        image: (H, W).
    """
    size = window.output_size(*image)
    left, _, top, _ = window.border(*image)
    return [
        [_span(window, axis, tap, size[axis], image[axis], before) for tap in range(taps)]
        for axis, (taps, before) in enumerate(zip(window.kernel_size, (top, left), strict=True))
    ]


def is_sparse(window: Window, image: tuple[int, int]) -> bool:
    """Whether so many taps lie outside the image that it pays to leave them out.

    Args:
        window: as in `spans`, like `image`.
        image: (H, W).
    """
    inside = 1.0
    for size, ends in zip(window.output_size(*image), spans(window, image), strict=True):
        inside *= sum(last - first for first, last in ends) / max(1, size * len(ends))
    return inside < _DENSE


def forward_cost(weight: tuple[int, ...]) -> float:
    """What the forward pass is estimated to take, in multiples of the plain convolution.

    The products are the convolution's; writing a number of K·v, which C_out of them use, takes as
    long as some more. Measured with benchmarks/layers.py on two cores; docs/performance.md has how
    well it fits.

    Args:
        weight: (C_out, C_in/groups, KH, KW).
    """
    return _DEPTHWISE if weight[1] == 1 else 1 + _WRITE / max(1, weight[0])


def _span(
    window: Window, axis: int, tap: int, size: int, side: int, before: int
) -> tuple[int, int]:
    """The outputs, first and last + 1, from which a tap lies in the image."""
    offset = tap * window.dilation[axis] - before
    step = window.stride[axis]
    first = min(size, max(0, -(offset // step)))
    return first, max(first, min(size, (side - 1 - offset) // step + 1))
