"""The memory that each thread of a dense convolution has to itself, and what lies where in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pacswap.ops.loops.blocks import Blocks

# Blocks of outputs that the weight's gradient takes at once: K·v of them stays in the second cache.
_ONCE = 3
_LINE = 64  # bytes, at a multiple of which each part begins


@dataclass(frozen=True)
class Room:
    """Parts of a thread's memory, in numbers.

    Attributes:
        each: of a thread, in all.
        begins: where the parts begin, but for the first.
    """

    each: int
    begins: tuple[int, ...]


@lru_cache(maxsize=256)
def forward_room(work: Blocks) -> Room:
    """A block of K·v; the weight's panels, if each run packs its own; sums; columns."""
    vectors, taps = work.vectors, work.shape.window.taps
    each = -(-work.shape.outs // vectors.high)  # blocks of a group
    own = min(each, -(-work.shape.groups * each // work.parts)) * vectors.high
    panels = 0 if work.is_packed else -(-own // vectors.step) + 1
    return _room(
        work,
        work.each * taps * vectors.wide,
        panels * work.each * taps * vectors.step,
        own * work.run_blocks * vectors.wide,
        work.columns,
    )


@lru_cache(maxsize=256)
def pull_room(work: Blocks) -> Room:
    """A piece of the weight; columns, and their gradients; what a piece gives to K's."""
    step = work.vectors.step
    piece = -(-work.rows // step) * step * work.shape.outs
    return _room(work, piece, work.columns, work.columns, work.shape.window.taps * work.line)


@lru_cache(maxsize=256)
def weigh_room(work: Blocks) -> Room:
    """Blocks of K·v; sums; columns."""
    vectors = work.vectors
    deep = -(-work.rows // vectors.high) * vectors.high * vectors.wide
    panels = -(-work.shape.outs // vectors.wide)
    return _room(work, blocks_at_once(work) * deep, panels * deep, work.columns)


def blocks_at_once(work: Blocks) -> int:
    """Blocks of outputs that the weight's gradient takes at once."""
    return min(_ONCE, work.blocks)


def _room(work: Blocks, *numbers: int) -> Room:
    step, begins = _LINE // work.vectors.itemsize, [0]
    for count in numbers:
        begins.append(begins[-1] + -(-count // step) * step)
    return Room(begins[-1], tuple(begins[1:-1]))
