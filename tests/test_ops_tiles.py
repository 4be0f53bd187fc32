"""How the loops of the CPU divide a convolution: every tap of every output, once."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pacswap.ops import make_window
from pacswap.ops.loops import blocks
from pacswap.ops.loops.blocks import Blocks, Shape, Vectors

NARROW = Vectors(1, 4, 8)


def drawn_shape(seed: int) -> Shape:
    draw = random.Random(seed)
    size = (draw.randint(1, 5), draw.randint(1, 5))
    padding = (draw.randint(0, 6), draw.randint(0, 6))
    dilation = (draw.randint(1, 5), draw.randint(1, 5))
    stride = (draw.randint(1, 3), draw.randint(1, 3))
    window = make_window(size, stride=stride, padding=padding, dilation=dilation)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, size, padding, strict=True)
    ]
    image = (least[0] + draw.randint(0, 12), least[1] + draw.randint(0, 12))
    return Shape(window, image, draw.randint(1, 3), 1, draw.randint(1, 40), draw.randint(1, 40))


def covered(work: Blocks) -> Counter[tuple[int, ...]]:
    """How often each (row, column, vertical tap, horizontal tap) is computed."""
    return Counter(
        (y, x, i, j) for h0, h1, w0, w1, i0, i1, j0, j1, _ in work.chunks
        for y in range(h0, h1) for x in range(w0, w1) for i in range(i0, i1) for j in range(j0, j1)
    )  # fmt: skip


def check_cover(work: Blocks) -> None:
    """Raise unless each output is in one chunk, with each of its taps that lies in the image."""
    window, image = work.shape.window, work.shape.image
    seen = covered(work)
    left, _, top, _ = window.border(*image)
    for y, x, i, j in product(*map(range, (*work.shape.size, *window.kernel_size))):
        row = y * window.stride[0] + i * window.dilation[0] - top
        column = x * window.stride[1] + j * window.dilation[1] - left
        inside = 0 <= row < image[0] and 0 <= column < image[1]
        count = seen[y, x, i, j]
        assert count <= 1 and count >= inside, f"{(y, x, i, j)} in {count} chunks, inside={inside}"
    outputs = sum((c[1] - c[0]) * (c[3] - c[2]) for c in work.chunks)
    assert outputs == work.shape.size[0] * work.shape.size[1], f"{outputs} outputs in chunks"
    before = [c[8] for c in work.chunks]
    counts = [(c[1] - c[0]) * (c[3] - c[2]) for c in work.chunks]
    assert before == [sum(counts[:n]) for n in range(len(counts))], "chunks do not follow in order"


@pytest.mark.parametrize("seed", range(40))
def test_each_tap_of_each_output_is_in_one_chunk(seed, monkeypatch):
    monkeypatch.setattr(blocks, "_CACHE", 500)
    shape = drawn_shape(seed)
    for work in (
        blocks.forward_blocks(shape, NARROW, 2),
        blocks.backward_blocks(shape, NARROW, 3),
    ):
        check_cover(work)
        if any(c[4] < c[5] and c[6] < c[7] for c in work.chunks):
            with pytest.raises(AssertionError, match=r"in chunks|in 0 chunks"):
                check_cover(replace(work, chunks=work.chunks[1:]))


@pytest.mark.parametrize("seed", range(40))
def test_what_a_tap_sees_lies_in_its_columns(seed):
    """Offsets and tables stay in the memory that is set aside for them."""
    work = blocks.backward_blocks(drawn_shape(seed), NARROW, 1)
    for s, chunk in enumerate(work.chunks):
        count = (chunk[1] - chunk[0]) * (chunk[3] - chunk[2])
        last = work._offsets[s].max() + -(-count // 4) * 4
        apart = (chunk[7] - chunk[6]) * work.shape.window.stride[0] * work.room
        assert last <= max(apart, work.room)
        assert work.pulls[s, :, 0].max() + count <= work.columns
        assert work.pulls[s, :, 1].max() + count <= work.shape.window.taps * work.line


def test_bands_leave_out_what_lies_outside():
    window = make_window(3, padding=12, dilation=12)
    work = blocks.forward_blocks(Shape(window, (28, 28), 1, 1, 16, 16), NARROW, 1)
    taps = sum((c[1] - c[0]) * (c[3] - c[2]) * (c[5] - c[4]) * (c[7] - c[6]) for c in work.chunks)
    assert taps == 28 * 28 * 9 * 25 // 49  # 5/7 of the taps lie in the image along each axis


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 6, 64])
def test_each_thread_has_work_where_there_is_enough(threads):
    shape = Shape(make_window(3, padding=1), (14, 14), 1, 1, 512, 512)
    forward, backward = (
        of(shape, Vectors(3, 16, 8), threads)
        for of in (blocks.forward_blocks, blocks.backward_blocks)
    )
    assert len(forward.chunks) * forward.parts >= threads
    assert backward.pieces % threads == 0 or backward.pieces == 512


def test_the_order_of_the_weight_goes_tap_by_tap_in_each_piece():
    shape = Shape(make_window((1, 3), padding=(0, 1)), (4, 4), 1, 1, 5, 2)
    work = Blocks(shape, NARROW, 1, ((0, 4, 0, 4, 0, 1, 0, 3, 0),), pieces=2)
    numbers = np.array([10 * c + t for c in range(5) for t in range(3)])
    packed = np.empty(15, int)
    packed[work.whole_order] = numbers
    first, second = [0, 10, 1, 11, 2, 12], [20, 30, 40, 21, 31, 41, 22, 32, 42]
    assert packed.tolist() == first + second
    pieces = work.piece_orders
    assert sorted(pieces[:9]) == list(range(9)) and sorted(pieces[9:]) == list(range(6))
