"""Lists of pictures, folders of pictures, and finding one by the name that a list gives it."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from PIL import Image

_T = TypeVar("_T")


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """The endings of the files that Pillow reads, small letters, with the dot."""
    kinds = Image.registered_extensions()
    return frozenset(suffix for suffix, kind in kinds.items() if kind in Image.OPEN)


def without_suffix(name: str) -> str:
    """A name without the ending of a picture file; any other dot belongs to the name.

    >>> without_suffix("a/b.c.JPG"), without_suffix("a/b.c")
    ('a/b.c', 'a/b.c')
    """
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in picture_suffixes() else name


def located(name: str, root: Path, folder: Path) -> Path | None:
    """The file of that name in the data's folder or beside the recipe."""
    for base in (root, folder):
        path = base / Path(name).expanduser()
        if "\0" not in name and path.is_file():
            return path
    return None


def lines_of(path: Path, key: str, faults: list[str]) -> list[str] | None:
    """The lines of a text file that are neither empty nor comments; None where it is no text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        faults.append(f"{key}: '{path}' cannot be read: {(error.strerror or 'no reason').lower()}.")
        return None
    except UnicodeDecodeError as error:
        faults.append(
            f"{key}: '{path.name}' is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        )
        return None
    lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text))
    return [line for line in lines if line and not line.startswith("#")]


def pictures_below(folder: Path) -> list[str]:
    """The picture files in a folder and its subfolders, as sorted paths below it.

    Linked folders are entered, each real folder once and none that lies above, so that links in a
    circle end. Names that begin with a dot are the system's.
    """
    return sorted(_walk(folder, "", {_identity(above) for above in folder.resolve().parents}))


def _walk(folder: Path, prefix: str, entered: set[tuple[int, int]]) -> Iterator[str]:
    identity = _identity(folder)
    if identity in entered:
        return
    entered.add(identity)
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", entered)
        elif os.path.splitext(entry.name)[1].lower() in picture_suffixes():  # noqa: PTH122
            yield prefix + entry.name


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def twice(names: Sequence[str]) -> list[str]:
    """The names that are there more than once.

    >>> twice(["a", "b", "a"])
    ['a']
    """
    return [name for name, count in Counter(names).items() if count > 1]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


@dataclass(frozen=True)
class Entry(Generic[_T]):
    """Something with a name, which may begin with folders."""

    name: str
    value: _T


class Index(Generic[_T]):
    """Things found by their name, with or without the folders before it and the ending after.

    >>> index = Index([Entry("day/a.png", 1), Entry("day/b.png", 2)])
    >>> [entry.value for entry in index.find("a")]
    [1]
    >>> [entry.value for entry in index.find("/elsewhere/day/b.jpg")]
    [2]
    >>> index.find("night/a")
    []
    """

    def __init__(self, entries: Iterable[Entry[_T]]) -> None:
        self.entries = list(entries)
        self._by_name = {entry.name: entry for entry in self.entries}
        self._by_key: dict[str, list[Entry[_T]]] = {}
        self._by_last: dict[str, list[Entry[_T]]] = {}
        for entry in self.entries:
            key = without_suffix(entry.name)
            self._by_key.setdefault(key, []).append(entry)
            self._by_last.setdefault(key.rpartition("/")[2], []).append(entry)

    def find(self, name: str) -> list[Entry[_T]]:
        """All entries that the name can mean; more than one is an ambiguity."""
        name = name.replace("\\", "/").removeprefix("./")
        if name in self._by_name:
            return [self._by_name[name]]
        key = without_suffix(name)
        if key in self._by_key:
            return self._by_key[key]
        candidates = self._by_last.get(key.rpartition("/")[2], [])
        return [e for e in candidates if _is_tail(without_suffix(e.name), key)]

    def last_names(self) -> Iterable[str]:
        """The names without folders and endings, to suggest one."""
        return self._by_last


def _is_tail(one: str, other: str) -> bool:
    """Whether one path ends with the whole other one."""
    short, long = sorted((one, other), key=len)
    return f"/{long}".endswith(f"/{short}")
