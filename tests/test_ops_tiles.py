"""How the loops of the CPU divide a convolution: every tap of every output, once."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from typing import Any

import pytest

from pacswap.ops import make_window, tiles


def drawn_geometry(seed: int) -> tuple[Any, tuple[int, int]]:
    draw = random.Random(seed)
    size = (draw.randint(1, 5), draw.randint(1, 5))
    padding = (draw.randint(0, 6), draw.randint(0, 6))
    dilation = (draw.randint(1, 5), draw.randint(1, 5))
    stride = (draw.randint(1, 3), draw.randint(1, 3))
    window = make_window(size, stride=stride, padding=padding, dilation=dilation)
    least = [
        max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, size, padding, strict=True)
    ]
    return window, (least[0] + draw.randint(0, 12), least[1] + draw.randint(0, 12))


def covered(tiling: tiles.Tiling) -> Counter[tuple[int, ...]]:
    """How often each (row, column, vertical tap, horizontal tap) is computed."""
    ranges = [
        (range(*t.rows), range(*t.columns), range(*t.down), range(*t.across))
        for block in tiling.blocks
        for t in block
    ]
    return Counter(
        (y, x, i, j) for ys, xs, down, across in ranges
        for y in ys for x in xs for i in down for j in across
    )  # fmt: skip


def check_cover(window: Any, image: tuple[int, int], tiling: tiles.Tiling) -> None:
    """Raise unless each tap that lies in the image is in one tile."""
    seen = covered(tiling)
    left, _, top, _ = window.border(*image)
    H_out, W_out = window.output_size(*image)
    sides = (H_out, W_out, *window.kernel_size)
    for y, x, i, j in product(*map(range, sides)):
        row = y * window.stride[0] + i * window.dilation[0] - top
        column = x * window.stride[1] + j * window.dilation[1] - left
        inside = 0 <= row < image[0] and 0 <= column < image[1]
        count = seen[y, x, i, j]
        assert count <= 1 and count >= inside, f"{(y, x, i, j)} in {count} tiles, inside={inside}"


@pytest.mark.parametrize("seed", range(40))
def test_each_tap_of_each_output_is_in_one_tile(seed, monkeypatch):
    monkeypatch.setattr(tiles, "_OUTPUTS", 9)
    tiles.tiling.cache_clear()
    window, image = drawn_geometry(seed)
    tiling = tiles.tiling(window, image)
    check_cover(window, image, tiling)
    if tiling.blocks:
        with pytest.raises(AssertionError, match="tiles, inside"):
            check_cover(window, image, tiles.Tiling(tiling.blocks[1:], tiling.one_by_one, 1))
    tiles.tiling.cache_clear()


def test_channels_are_divided_without_rest():
    tiling = tiles.tiling(make_window(3, padding=1), (40, 40))
    pieces = tiling.channels(make_window(3, padding=1), 70, 1, 9 * tiling.outputs * 16)
    assert [c for first, last in pieces for c in range(first, last)] == list(range(70))
    assert max(last - first for first, last in pieces) <= 16
    whole = tiling.channels(make_window(3, padding=1), 70, 35, 1)
    assert whole == [(0, 35), (35, 70)]
