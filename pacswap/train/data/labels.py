"""What the numbers or colours of a mask mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Colour: TypeAlias = tuple[int, int, int]

_NOTHING = np.iinfo(np.int32).min  # stands for no class


class Labels:
    """How masks are turned into class indices.

    Args:
        classes: how many there are.
        ignore_index: what pixels that do not count become; any whole number.
        numbers: the class of every number that a mask may hold; None takes class indices and
            `ignore_index` as they are.
        palette: the colour of each class, where masks may be colour pictures.
        by_colour: masks are colour pictures even if their file holds indices or greys.
    """

    def __init__(
        self,
        classes: int,
        ignore_index: int,
        *,
        numbers: Mapping[int, int] | None = None,
        palette: Sequence[Colour] | None = None,
        by_colour: bool = False,
    ) -> None:
        self.classes, self.ignore_index = classes, ignore_index
        self.palette, self.by_colour = palette, by_colour
        plain = {index: index for index in (*range(classes), ignore_index)}
        self._numbers = dict(plain if numbers is None else numbers)
        self._as_they_are = self._numbers == plain
        small = classes <= 256 and 0 <= ignore_index <= 255
        self.dtype: np.dtype[Any] = np.dtype(np.uint8 if small else np.int32)
        self._table = np.full(256, _NOTHING, np.int32)
        for number, meaning in self._numbers.items():
            if 0 <= number < 256:
                self._table[number] = meaning

    def of_numbers(self, raw: NDArray[Any]) -> tuple[NDArray[Any], list[int]]:
        """Class indices [H, W] in `dtype`, and the numbers of `raw` [H, W] that stand for none."""
        if raw.dtype == np.uint8:
            there = np.flatnonzero(np.bincount(raw.ravel(), minlength=256))
            wrong = there[self._table[there] == _NOTHING]
            if wrong.size or (self._as_they_are and self.dtype == np.uint8):
                return raw, [int(number) for number in wrong]
            return self._table.astype(self.dtype)[raw], []
        values, where = np.unique(raw, return_inverse=True)
        wrong_values = [int(value) for value in values if int(value) not in self._numbers]
        if wrong_values:
            return raw, wrong_values
        meanings = np.array([self._numbers[int(value)] for value in values], self.dtype)
        return meanings[where].reshape(raw.shape), []

    def of_colours(self, rgb: NDArray[np.uint8]) -> NDArray[Any]:
        """Class indices [H, W] of a colour picture [H, W, 3]; other colours are ignored."""
        if self.palette is None:
            raise AssertionError("colours without a palette")
        weights = np.array([1 << 16, 1 << 8, 1], np.int32)
        known = np.array(self.palette, np.int32) @ weights
        order = np.argsort(known)
        codes = rgb.astype(np.int32) @ weights
        place = np.minimum(np.searchsorted(known, codes, sorter=order), len(known) - 1)
        nearest = order[place]
        result = np.where(known[nearest] == codes, nearest, self.ignore_index)
        return result.astype(self.dtype)


def distinct_colours(count: int = 256) -> tuple[Colour, ...]:
    """Colours that differ, PASCAL VOC's: neighbours differ most, 0 is black.

    The bits of an index are dealt to red, green and blue in turn, from the highest bit down.

    >>> distinct_colours(4)
    ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    """

    def level(index: int, channel: int) -> int:
        return sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))

    return tuple((level(i, 0), level(i, 1), level(i, 2)) for i in range(count))


def drawing_palette(known: Sequence[Colour] | None, classes: int) -> tuple[Colour, ...]:
    """256 colours to draw masks with: the known ones, then fixed ones that differ from them.

    Known ones that cannot tell the classes apart are not used.

    >>> drawing_palette([(1, 2, 3), (0, 0, 0)], 2)[:4]
    ((1, 2, 3), (0, 0, 0), (0, 128, 0), (128, 128, 0))
    """
    kept = tuple(known or ())[:256]
    if len(kept) < classes or len(set(kept[:classes])) < classes:
        kept = ()
    others = [colour for colour in distinct_colours() if colour not in set(kept)]
    fixed = distinct_colours()
    tail = [fixed[i] if fixed[i] not in kept else others.pop() for i in range(len(kept), 256)]
    return kept + tuple(tail)
