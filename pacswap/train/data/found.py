"""What a format's reader finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pacswap.train.data.faults import few, many
from pacswap.train.data.labels import Colour
from pacswap.train.data.pictures import Reader, Sample


@dataclass(frozen=True)
class Found:
    """Two splits and all that they share; see `Split`."""

    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    reader: Reader


def check_there(key: str, samples: tuple[Sample, ...], root: Path, faults: list[str]) -> None:
    """Say which files of the samples are missing."""
    paths = [path for s in samples for path in (s.image, s.mask) if path is not None]
    missing = [below(path, root) for path in paths if not path.is_file()]
    if missing:
        faults.append(
            f"{key}: {many(len(missing), 'file is', 'files are')} missing: {few(missing)}. Unpack "
            "the data once more."
        )


def below(path: Path, root: Path) -> str:
    """A path as it reads from the data's folder."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
