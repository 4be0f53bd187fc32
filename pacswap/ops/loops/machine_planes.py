"""Images into planes and back, as numba compiles it.

A plane is an image as one long row, its borders included, so that a tap is an offset: what a window
sees across the end of a row is computed and not used. Of an image that is looked at in steps, one
plane holds the pixels of each phase.
"""

from __future__ import annotations

from typing import Any

from pacswap.ops.loops.threads import compiled
from pacswap.ops.loops.vectors import copy


@compiled
def inside(phase: int, step: int, count: int, before: int, side: int) -> tuple[int, int]:
    """Which of a phase's `count` places lie in an image's side: first and last + 1.

    Place i is pixel i·step + phase of the image with its border, which begins `before` it.
    """
    first = min(count, max(0, (before - phase + step - 1) // step))
    last = min(count, max(0, (side + before - phase + step - 1) // step))
    return first, max(first, last)


@compiled
def cut(image: Any, plane: Any, at: int, was_zero: bool, g: Any) -> None:
    """A part of an image, phase by phase.

    Args:
        image: [H, W].
        plane: is filled; at the left and the right of the image it has to be 0 already.
        at: output row where the part begins.
        was_zero: whether it is 0 above and below too.
        g: `Layout.numbers`.
    """
    H, W, top, left, down, across = g[0], g[1], g[2], g[3], g[4], g[5]
    high, wide, size = g[6], g[7], plane.itemsize
    source, to = image.ctypes.data, plane.ctypes.data
    for r in range(high * down):
        y, line = at * down - top + r, ((r % down) * across * high + r // down) * wide
        for phase in range(across):
            start = line + phase * high * wide
            if y < 0 or y >= H:
                if not was_zero:
                    plane[start : start + wide] = 0
                continue
            a, b = inside(phase, across, wide, left, W)
            x = y * W + a * across + phase - left
            if across == 1:
                copy(to + size * (start + a), source + size * x, size * (b - a))
            elif across == 2:  # which a compiler vectorises
                row, part = image.reshape(-1), plane[start + a : start + b]
                for i in range(part.size):
                    part[i] = row[x + 2 * i]
            else:
                row = image.reshape(-1)
                for i in range(b - a):
                    plane[start + a + i] = row[x + i * across]


@compiled
def add_back(plane: Any, image: Any, at: int, g: Any) -> None:
    """The inverse of `cut`: added to the image."""
    H, W, top, left, down, across = g[0], g[1], g[2], g[3], g[4], g[5]
    high, wide = g[6], g[7]
    for r in range(high * down):
        y, line = at * down - top + r, ((r % down) * across * high + r // down) * wide
        if y < 0 or y >= H:
            continue
        for phase in range(across):
            a, b = inside(phase, across, wide, left, W)
            start, x = line + phase * high * wide, a * across + phase - left
            source, row = plane[start + a : start + b], image[y]
            if across == 1:
                part = row[x : x + b - a]
                for i in range(part.size):
                    part[i] += source[i]
            else:
                for i in range(source.size):
                    row[x + i * across] += source[i]
