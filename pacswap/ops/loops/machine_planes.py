"""Images into planes and back, as numba compiles it.

A plane is an image as one long row, its borders included, so that a tap is an offset: what a window
sees across the end of a row is computed and not used. Of an image that is looked at in steps, one
plane holds the pixels of each phase.
"""

from __future__ import annotations

from typing import Any

from pacswap.ops.loops.moves import copy_steps
from pacswap.ops.loops.threads import compiled
from pacswap.ops.loops.vectors import clear, copy, every_other


@compiled
def inside(phase: int, step: int, count: int, before: int, side: int) -> tuple[int, int]:
    """Which of a phase's `count` places lie in an image's side: first and last + 1.

    Place i is pixel i·step + phase of the image with its border, which begins `before` it.
    """
    first, last = before - phase, side + before - phase
    if step > 1:
        first, last = (first + step - 1) // step, (last + step - 1) // step
    first = min(count, max(0, first))
    return first, max(first, min(count, last))


@compiled
def cut(image: Any, plane: Any, at: int, g: Any) -> None:
    """A part of an image, phase by phase.

    Args:
        image: [H, W].
        plane: is filled, and up to a vector beyond it with zeros.
        at: output row where the part begins.
        g: `Layout.numbers`.
    """
    H, W, top, left, down, across, high, wide = g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]
    size, source, to = plane.itemsize, image.ctypes.data, plane.ctypes.data
    for phase in range(down * across):
        below, beside = phase // across, phase % across
        a, b = inside(beside, across, wide, left, W)
        first = at * down - top + below
        for r in range(high):
            y, line = first + r * down, (phase * high + r) * wide
            if y < 0 or y >= H:
                clear(plane, to + size * line, wide)
                continue
            # Zeros may reach into what comes after, which is filled after.
            clear(plane, to + size * line, a)
            x = source + size * (y * W + a * across + beside - left)
            if across == 1:
                copy(plane, to + size * (line + a), x, b - a)
            elif across == 2:
                every_other(plane, to + size * (line + a), x, b - a)
            else:
                copy_steps(plane, to + size * (line + a), x, b - a, across)
            clear(plane, to + size * (line + b), wide - b)


@compiled
def add_back(plane: Any, image: Any, at: int, g: Any) -> None:
    """The inverse of `cut`: added to the image."""
    H, W, top, left, down, across, high, wide = g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]
    for phase in range(down * across):
        below, beside = phase // across, phase % across
        a, b = inside(beside, across, wide, left, W)
        first, x = at * down - top + below, a * across + beside - left
        for r in range(high):
            y, line = first + r * down, (phase * high + r) * wide
            if y < 0 or y >= H or a == b:
                continue
            source, row = plane[line + a : line + b], image[y, x:]
            if across == 1:
                for i in range(source.size):
                    row[i] += source[i]
            else:
                for i in range(source.size):
                    row[i * across] += source[i]


@compiled
def flatten(lines: Any, flat: Any, row: int) -> None:
    """Rows [count, width] to one long row, zeros between them and up to a vector beyond."""
    size, width = flat.itemsize, lines.shape[1]
    for y in range(lines.shape[0]):
        to = flat.ctypes.data + size * y * row
        copy(flat, to, lines.ctypes.data + size * y * width, width)
        clear(flat, to + size * width, row - width)


@compiled
def unflatten(flat: Any, lines: Any, row: int) -> None:
    """The inverse of `flatten`."""
    size = flat.itemsize
    for y in range(lines.shape[0]):
        to = lines.ctypes.data + size * y * lines.shape[1]
        copy(flat, to, flat.ctypes.data + size * y * row, lines.shape[1])
