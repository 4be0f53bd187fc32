"""Opening every picture and mask once, before hours are spent on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pacswap.train.data.faults import few_of, many, refuse
from pacswap.train.data.found import below
from pacswap.train.data.pictures import KINDS, Flaw, Raw
from pacswap.train.data.split import Split

Progress = Callable[[int, int], None]

_MOST_THREADS = 8


_Size = tuple[int, int]


def scan(split: Split, *, one_size: bool = False, progress: Progress | None = None) -> None:
    """Read every sample of a split, so that a damaged one does not end a training.

    Files are decoded by several threads and nothing is kept. Drawn scenes are not scanned.

    Args:
        split: what `open_data` found.
        one_size: also refuse pictures that differ in size: neither cropped nor resized, they make
            no batch.
        progress: called with the samples done and their number, from this thread.

    Raises:
        DataError: files are damaged, sizes differ that must not, masks hold numbers that are no
            class, or none but one class is there to learn; the message counts each kind and names
            the first few.
    """
    total = len(split)
    if not split.reader.on_disk:
        if progress is not None:
            progress(total, total)
        return
    flaws: list[Flaw] = []
    present: set[int] = set()
    sizes: dict[_Size, int] = {}  # the first sample of each
    threads = ThreadPoolExecutor(min(_MOST_THREADS, _cores()))
    try:
        results = threads.map(lambda index: _look(split, index), range(total))
        for done, found in enumerate(results, 1):
            if isinstance(found, Flaw):
                flaws.append(found)
            else:
                present |= found[0]
                sizes.setdefault(found[1], done - 1)
            if progress is not None:
                progress(done, total)
    finally:
        threads.shutdown(cancel_futures=True)
    faults = _in_words(flaws, split)
    if not flaws:
        faults += _too_few_classes(split, present)
    if one_size and split.resize is None and len(sizes) > 1:
        faults.append(_unlike_in_size(split, sizes))
    if faults:
        where = f"'{split.root}', {split.name}" if split.root is not None else split.name
        refuse(f"{where} ({many(total, 'picture', 'pictures')})", faults)


def _look(split: Split, index: int) -> Flaw | tuple[set[int], _Size]:
    """What is wrong with a sample, or else the classes in it, and its height and width."""
    try:
        _, mask = split.reader.read(split.samples[index])
    except Flaw as flaw:
        return flaw
    return _values(mask) - {split.ignore_index}, (mask.shape[0], mask.shape[1])


def _values(mask: Raw) -> set[int]:
    if mask.dtype == np.uint8:
        return {int(v) for v in np.flatnonzero(np.bincount(mask.ravel(), minlength=256))}
    return {int(value) for value in np.unique(mask)}


def _in_words(flaws: list[Flaw], split: Split) -> list[str]:
    """One sentence per kind of flaw."""
    faults = []
    for kind, (one, several, hint) in KINDS.items():
        files = {flaw.file: flaw.detail for flaw in flaws if flaw.kind == kind}
        if not files:
            continue
        root = Path() if split.root is None else split.root
        named = [f"'{below(Path(file), root)}' ({detail})" for file, detail in files.items()]
        if kind == "number":
            hint = (
                f"Classes are 0 to {len(split.classes) - 1}, ignored is {split.ignore_index}. "
                f"{hint}"
            )
        if len(files) == 1:
            file, detail = next(iter(files.items()))
            faults.append(f"'{below(Path(file), root)}' {one}: {detail}. {hint}")
        else:
            faults.append(f"{len(files)} {several}: {few_of(named)}. {hint}")
    return faults


def _unlike_in_size(split: Split, sizes: dict[_Size, int]) -> str:
    """Of each size one picture."""
    named = []
    for (height, width), index in sizes.items():
        sample = split.samples[index]
        root = Path() if split.root is None else split.root
        name = sample.name if sample.image is None else below(sample.image, root)
        named.append(f"'{name}' ({height}×{width})")
    return (
        f"pictures differ in size, {len(sizes)} sizes: {few_of(named)}. A batch takes one size: "
        "give finetune.data.transforms.crop or finetune.data.resize, or set "
        "finetune.batch_size: 1."
    )


def _too_few_classes(split: Split, present: set[int]) -> list[str]:
    """Masks in which there is nothing to tell apart: mostly they mean something else."""
    if not present:
        return [
            f"no pixel of its masks has a class, all are ignored ({split.ignore_index}). Check "
            "finetune.data.classes, palette and ignore_index."
        ]
    if split.name == "train" and len(present) == 1 < len(split.classes):
        only = split.classes[present.pop()]
        return [
            f"every pixel of its masks is '{only}' or ignored ({split.ignore_index}): there is "
            "nothing to tell apart. Where masks are black and white, say "
            "palette: [[0, 0, 0], [255, 255, 255]]."
        ]
    return []


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
