"""Street scenes as a data set: drawn once, then remembered."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from pacswap.scenes import draw_scene
from pacswap.train.data.pictures import Pixels, Raw, Sample, one_thread

SMALLEST = 16  # what draw_scene draws
# The shipped networks learnt from the first seeds and were measured from this one on.
HELD_OUT = 1_000_000
_MOST_BYTES = 512 << 20


def scene_samples(count: tuple[int, int]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """So many scenes to learn from and to measure on; no seed is in both.

    >>> [sample.number for part in scene_samples((2, 1)) for sample in part]
    [0, 1, 1000000]
    """
    first = max(HELD_OUT, count[0])
    train = tuple(Sample(f"scene{seed}", number=seed) for seed in range(count[0]))
    val = tuple(Sample(f"scene{seed}", number=seed) for seed in range(first, first + count[1]))
    return train, val


class SceneReader:
    """Draws a scene when it is first asked for.

    Drawing takes longer than a small network's step. So each is kept, in memory that the processes
    forked from this one share; a process started in another way, or scenes too many to keep, are
    drawn anew.

    Args:
        size: height and width.
        count: how many there are.
    """

    on_disk = False

    def __init__(self, size: tuple[int, int], count: int) -> None:
        self.size, self.count = size, count
        # Per scene: red, green, blue, the class, and one byte that says it is there.
        room = 4 * size[0] * size[1] + 1
        self._memory: NDArray[np.uint8] | None = None
        if count * room <= _MOST_BYTES:
            shared = mmap.mmap(-1, count * room)
            self._memory = np.frombuffer(shared, np.uint8).reshape(count, room)

    def __reduce__(self) -> tuple[type[SceneReader], tuple[tuple[int, int], int]]:
        return SceneReader, (self.size, self.count)

    def read(self, sample: Sample) -> tuple[Pixels, Raw]:
        """See `Reader`."""
        slot = self._slot(sample.number)
        if slot is None:
            return self._draw(sample.number)
        H, W = self.size
        if not slot[-1]:
            picture, mask = self._draw(sample.number)
            slot[: 3 * H * W] = picture.ravel()
            slot[3 * H * W : -1] = mask.ravel()
            slot[-1] = 1  # last: whoever else draws it now writes the same
        return slot[: 3 * H * W].reshape(H, W, 3), slot[3 * H * W : -1].reshape(H, W)

    def _slot(self, seed: int) -> NDArray[np.uint8] | None:
        """The place of a seed: those to learn from first, those to measure on from the end."""
        if self._memory is None:
            return None
        place = seed if seed < HELD_OUT else self.count - 1 - (seed - HELD_OUT)
        return self._memory[place] if 0 <= place < self.count else None

    def _draw(self, seed: int) -> tuple[Pixels, Raw]:
        with one_thread():  # a second one costs on tensors this small, and moves last bits
            image, mask = draw_scene(seed, self.size)
        picture = (image * 255).round().byte().permute(1, 2, 0).numpy()
        return np.ascontiguousarray(picture), mask.byte().numpy()
