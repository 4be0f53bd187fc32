"""Predictions for whole pictures: at once or window by window, at several sizes, mirrored too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacswap.errors import TrainingError
from pacswap.recipes import EvaluateSection
from pacswap.surgery.modes import kept_modes
from pacswap.train.data.batches import normalized
from pacswap.train.measure.metrics import Counts, Scores, count
from pacswap.train.outputs import logits_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pacswap.train.data.split import Split

_READERS = 2  # threads that decode pictures while the network works


def predict(
    model: Callable[..., Any], images: Tensor, section: EvaluateSection | None = None
) -> Tensor:
    """How probable each class is at each pixel.

    Logits smaller than the picture are resized to it, bilinearly. Where a picture is seen more than
    once (overlapping windows, several sizes, mirrored) probabilities are averaged, not logits,
    whose scale differs from view to view. Windows cover every pixel and count alike wherever they
    overlap; a picture smaller than the window is padded with zeros, the mean colour.

    The model's modes are left as they are: call `model.eval()` first, or use `evaluate`.

    Args:
        model: takes [B, 3, h, w]; gives logits, alone or as `logits_of` finds them.
        images: [B, 3, H, W], normalised.
        section: `window`, `overlap`, `scales` and `flip`; None takes each picture whole.

    Returns:
        [B, C, H, W], float32; sums to 1 over the classes.

    Example:
        >>> predict(nn.Conv2d(3, 5, 1, stride=2), torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 5, 8, 8])
    """
    section = EvaluateSection() if section is None else section
    size = images.shape[-2:]
    total, views = torch.zeros(()), 0
    with torch.inference_mode():
        for scale in section.scales:
            seen = _resized(images, [max(1, round(side * scale)) for side in size], smooth=True)
            for flip in (False, True)[: 1 + section.flip]:
                found = _windowed(model, seen.flip(-1) if flip else seen, section)
                found = found.flip(-1) if flip else found
                total = total.to(found) + _resized(found, size)
                views += 1
    return total / views


def share(count: int, rank: int, world: int) -> range:
    """Which of `count` pictures one of `world` processes takes: each exactly one, evenly.

    >>> [list(share(5, rank, 2)) for rank in range(2)]
    [[0, 2, 4], [1, 3]]
    """
    return range(rank, count, world)


def evaluate(
    model: nn.Module,
    split: Split,
    section: EvaluateSection,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    batch: int = 1,
    accelerator: Accelerator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Measure a network on every picture of a split, at the pictures' own sizes.

    Every process of an accelerator calls this; each takes its share and all return the same scores.

    Args:
        model: a segmentation network; its modules' modes are restored.
        split: the pictures and their masks.
        section: how the pictures are seen and what is counted.
        mean: of each channel, of pictures in [0, 1].
        std: of each channel, of pictures in [0, 1].
        device: where the model is.
        batch: how many pictures of one size go through the network together.
        accelerator: whose processes share the work and whose precision is used; None is one
            process in the model's own precision.
        progress: called with the pictures done and to do by this process.

    Raises:
        DataError: a mask holds a label that is no class.
        TrainingError: the network has another number of classes, or its answer is not finite.
    """
    rank = 0 if accelerator is None else accelerator.process_index
    world = 1 if accelerator is None else accelerator.num_processes
    # A wrapper of several processes would wait for all at each forward pass; shares are unequal.
    bare = model if accelerator is None else accelerator.unwrap_model(model)
    mine = share(len(split), rank, world)
    found: list[tuple[int, Tensor]] = []
    confusion = torch.zeros(len(split.classes), len(split.classes), dtype=torch.int64)
    with torch.inference_mode(), kept_modes(bare):
        bare.eval()
        for pictures in _batches(_read_ahead(split, mine), batch):
            images = normalized(torch.stack([p.image for p in pictures]), mean, std, device)
            with nullcontext() if accelerator is None else accelerator.autocast():
                answers = predict(bare, images, section)
            for picture, answer in zip(pictures, answers, strict=True):
                counts = _counted(answer, picture, split, section)
                found.append((picture.index, counts.tally))
                confusion += counts.confusion
            if progress is not None:
                progress(len(found), len(mine))
    return _gathered(split, found, confusion, world)


@dataclass(frozen=True)
class _Picture:
    index: int
    image: Tensor  # [3, H, W], uint8
    mask: Tensor  # [H, W], int64


def _resized(images: Tensor, size: Sequence[int], *, smooth: bool = False) -> Tensor:
    """Bilinear; `smooth` keeps a smaller copy of a picture free of aliases."""
    if list(images.shape[-2:]) == list(size):
        return images
    return F.interpolate(
        images, size=list(size), mode="bilinear", align_corners=False, antialias=smooth
    )


def _places(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start so that they cover a side; the last ends with it.

    >>> _places(10, 4, 0.5), _places(9, 4, 0.5), _places(3, 4, 0.5)
    ([0, 2, 4, 6], [0, 2, 4, 5], [0])
    """
    step = max(1, int(window * (1 - overlap)))
    last = max(0, length - window)
    return [*range(0, last, step), last]


def _windowed(model: Callable[..., Any], images: Tensor, section: EvaluateSection) -> Tensor:
    """Probabilities at the size of `images`, window by window where the section says so."""
    if section.window is None:
        return _probabilities(model, images)
    (H, W), (h, w) = images.shape[-2:], section.window
    padded = F.pad(images, (0, max(0, w - W), 0, max(0, h - H)))
    total: Tensor | None = None
    times = images.new_zeros(padded.shape[-2:], dtype=torch.float32)
    places = product(_places(H, h, section.overlap), _places(W, w, section.overlap))
    for y, x in places:
        spot = (..., slice(y, y + h), slice(x, x + w))
        found = _probabilities(model, padded[spot])
        if total is None:
            total = found.new_zeros(*found.shape[:2], *padded.shape[-2:])
        total[spot] += found
        times[spot] += 1
    assert total is not None  # a picture has at least one window
    return (total / times)[..., :H, :W]


def _probabilities(model: Callable[..., Any], images: Tensor) -> Tensor:
    logits = logits_of(model(images)).float()
    return _resized(logits, images.shape[-2:]).softmax(1)


def _read_ahead(split: Split, indices: Sequence[int]) -> Iterator[_Picture]:
    """The pictures in order, the next few read meanwhile."""

    def read(index: int) -> _Picture:
        return _Picture(index, *split.read(index))

    with ThreadPoolExecutor(_READERS) as pool:
        waiting = [pool.submit(read, index) for index in indices[: 2 * _READERS]]
        try:
            for index in indices[2 * _READERS :]:
                picture = waiting.pop(0).result()
                waiting.append(pool.submit(read, index))
                yield picture
            while waiting:
                yield waiting.pop(0).result()
        finally:  # where the reader of these stops early, nobody needs the rest
            for future in waiting:
                future.cancel()


def _batches(pictures: Iterator[_Picture], most: int) -> Iterator[list[_Picture]]:
    """Neighbours of one size, up to `most` together."""
    group: list[_Picture] = []
    for picture in pictures:
        if group and (len(group) == most or picture.image.shape != group[0].image.shape):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def _counted(answer: Tensor, picture: _Picture, split: Split, section: EvaluateSection) -> Counts:
    name = split.samples[picture.index].name
    if len(answer) != len(split.classes):
        raise TrainingError(
            f"the network tells {len(answer)} classes apart, the data has {len(split.classes)}. "
            "Give the model as many: model.args.num_classes."
        )
    if not answer.isfinite().all():
        raise TrainingError(
            f"the network's answer to '{name}' is not finite: its weights or its inputs are "
            "damaged. Try precision: fp32, or an earlier checkpoint."
        )
    return count(
        answer.argmax(0),
        picture.mask.to(answer.device),
        classes=len(split.classes),
        ignore_index=split.ignore_index,
        band=section.band,
        boundary=section.boundary,
    )


def _gathered(
    split: Split, found: list[tuple[int, Tensor]], confusion: Tensor, world: int
) -> Scores:
    """One record of all processes' pictures, in the split's order."""
    parts = [(found, confusion)]
    if world > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
    tallies = sorted((entry for part, _ in parts for entry in part), key=lambda entry: entry[0])
    assert [index for index, _ in tallies] == list(range(len(split)))  # none twice, none missing
    return Scores(
        tuple(split.classes),
        tuple(sample.name for sample in split.samples),
        torch.stack([tally for _, tally in tallies]),
        torch.stack([part for _, part in parts]).sum(0),
        split.ignore_index,
    )
