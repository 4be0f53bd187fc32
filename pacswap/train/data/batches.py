"""The pictures of every training step, which depend on the seed and the step alone."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pacswap.errors import DataError, TrainingError
from pacswap.recipes import TransformSection
from pacswap.train.data.split import Split
from pacswap.train.data.vary import Vary

# Ends a seed's stream, so that the order of pictures and their variations are independent.
_ORDER, _VARIATION = 1, 2


@dataclass(frozen=True)
class Batch:
    """What one process takes of one step.

    Attributes:
        images: [b, 3, H, W], float32, normalised.
        masks: [b, H, W], int64, class indices or the ignore index.
        names: of the samples.
        step: the global step, from 0.
    """

    images: Tensor
    masks: Tensor
    names: tuple[str, ...]
    step: int


def normalized(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
) -> Tensor:
    """Pictures as a network takes them: subtract `mean`, divide by `std`.

    Args:
        images: [..., 3, H, W], uint8 RGB.
        mean: to subtract from each channel of a picture in [0, 1].
        std: to divide each channel by then.
        device: where to; None leaves them where they are.

    Returns:
        float32, dimensionless, the shape of `images`.

    Example:
        >>> normalized(torch.full((3, 1, 1), 255, dtype=torch.uint8), (0.5,) * 3, (0.25,) * 3)[0]
        tensor([[2.]])
    """
    images = images if device is None else images.to(device)
    low = torch.tensor(mean, dtype=torch.float32, device=images.device)[:, None, None]
    wide = torch.tensor(std, dtype=torch.float32, device=images.device)[:, None, None]
    return images.float().div_(255).sub_(low).div_(wide)


def _deaf(worker: int) -> None:
    """Leave signals to the main process, which ends its workers when a step is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """An endless, repeatable row of training batches.

    Every pass over the data has its own order; what is left of it after the last full batch waits
    for the next pass. The pictures of a step, and how each is varied, follow from `seed` and the
    step: neither the number of processes nor that of workers nor where training was resumed
    changes them.

    Args:
        split: the pictures to learn from.
        transforms: how they are varied.
        batch_size: pictures per step, over all processes.
        seed: where all randomness starts.
        mean: to subtract from each channel of a picture in [0, 1].
        std: to divide each channel by then.
        rank: which process this is, from 0; it gets the rank-th part of each step's pictures.
        world: how many processes there are.
        workers: processes that read ahead; 0 reads in this one.
        device: where batches are wanted; they travel there as bytes.

    Raises:
        DataError: there are fewer pictures than a batch takes, or their sizes would differ.
        TrainingError: the batch cannot be shared evenly by the processes.
    """

    def __init__(
        self,
        split: Split,
        transforms: TransformSection,
        *,
        batch_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size % world != 0:
            raise TrainingError(
                f"finetune.batch_size: {batch_size} pictures per step cannot be shared evenly by "
                f"{world} processes. Give a multiple of {world}."
            )
        if len(split) < batch_size:
            raise DataError(
                f"finetune.batch_size: a step takes {batch_size} pictures, and {split.name} has "
                f"{len(split)}. Give {len(split)} at most."
            )
        low, high = transforms.scale
        if low < high and transforms.crop is None and batch_size > 1:
            raise DataError(
                f"finetune.data.transforms: scale {low:g} to {high:g} makes the pictures of a step "
                "differ in size. Give crop, the height and width that is cut out of each."
            )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.mean, self.std, self.workers = tuple(mean), tuple(std), workers
        self.device = torch.device(device)
        self._share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._pictures = _Pictures(split, Vary(transforms, self.mean, split.ignore_index), seed)

    @property
    def steps_per_epoch(self) -> int:
        """How many full batches a pass over the data has."""
        return len(self.split) // self.batch_size

    def indices(self, step: int) -> list[int]:
        """The samples of a global step, of all processes together, as indices into the split."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(_mixed(_ORDER, self.seed, epoch))
        order = torch.randperm(len(self.split), generator=generator)
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def from_step(self, step: int) -> Generator[Batch, None, None]:
        """Batches from a global step on, without end.

        Args:
            step: the first one, from 0.

        Yields:
            This process's part of each step.

        Raises:
            DataError: a sample is damaged, or the pictures of a step differ in size.
            TrainingError: a worker died.
        """
        loader = DataLoader(
            self._pictures,
            batch_sampler=_Steps(self, step),
            collate_fn=_stacked,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_deaf,
            # Its own, or starting workers would move the global random state.
            generator=torch.Generator(),
        )
        rows = iter(loader)
        while True:
            try:
                found = next(rows)
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):
                    raise
                raise TrainingError(
                    f"a process that reads pictures ended at step {step}. Mostly memory ran out: "
                    "give fewer finetune.workers, 0 reads without them; in a container, more "
                    "shared memory (--shm-size)."
                ) from error
            if isinstance(found, str):
                raise DataError(found)
            yield Batch(
                normalized(self._moved(found.images), self.mean, self.std),
                self._moved(found.masks).long(),
                found.names,
                step,
            )
            step += 1

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _keys(self, step: int) -> list[_Key]:
        """What this process reads for a step."""
        epoch = step // self.steps_per_epoch
        return [_Key(step, epoch, index) for index in self.indices(step)[self._share]]


class _Key(NamedTuple):
    """One picture of one step."""

    step: int
    epoch: int
    sample: int


class _Sample(NamedTuple):
    """One varied picture, as a worker hands it over: in few bytes."""

    key: _Key
    image: Tensor  # [3, H, W], uint8
    mask: Tensor  # [H, W], as small as its numbers allow
    name: str


class _Stack(NamedTuple):
    images: Tensor  # [b, 3, H, W], uint8
    masks: Tensor  # [b, H, W]
    names: tuple[str, ...]


class _Steps:
    """The keys of each step's pictures, without end."""

    def __init__(self, batches: Batches, step: int) -> None:
        self.batches, self.step = batches, step

    def __iter__(self) -> Iterator[list[_Key]]:
        step = self.step
        while True:
            yield self.batches._keys(step)
            step += 1


class _Pictures(Dataset[Any]):
    """Reads and varies one picture. Faults come back as text: a raised one would lose its words."""

    def __init__(self, split: Split, vary: Vary, seed: int) -> None:
        self.split, self.vary, self.seed = split, vary, seed

    def __getitem__(self, key: _Key) -> _Sample | str:
        try:
            image, mask = self.split.load(key.sample)
        except DataError as error:
            return str(error)
        dice = _mixed(_VARIATION, self.seed, key.epoch, key.sample)
        image, mask = self.vary(image, mask, dice)
        return _Sample(key, image, mask, self.split.samples[key.sample].name)


def _stacked(samples: list[_Sample | str]) -> _Stack | str:
    whole = []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        whole.append(sample)
    first = whole[0]
    for other in whole:
        if other.image.shape != first.image.shape:
            sizes = ["×".join(map(str, s.image.shape[1:])) for s in (first, other)]
            return (
                f"finetune.data: the pictures of step {first.key.step} differ in size: "
                f"'{first.name}' is {sizes[0]}, '{other.name}' {sizes[1]}. Give resize, or "
                "transforms.crop."
            )
    return _Stack(
        _piled([sample.image for sample in whole]),
        _piled([sample.mask for sample in whole]),
        tuple(sample.name for sample in whole),
    )


def _piled(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`, by numpy: torch's threads wait for each other where cores are shared."""
    return torch.from_numpy(np.stack([tensor.numpy() for tensor in tensors]))


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers; near ones give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
