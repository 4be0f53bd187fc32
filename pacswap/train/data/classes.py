"""Which classes there are, from a recipe, a file or the format itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pacswap.recipes import DataSection
from pacswap.train.data.faults import few
from pacswap.train.data.labels import Colour, Labels
from pacswap.train.data.lists import lines_of, located


@dataclass(frozen=True)
class ClassList:
    """Names of classes, and the colours that a file gives them."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...] | None = None


def read_classes(
    section: DataSection, root: Path, folder: Path, faults: list[str]
) -> ClassList | None:
    """What `classes:` says; None where it says nothing or nothing that can be used.

    Args:
        section: the recipe's `finetune.data`.
        root: the data's folder, where a file's name starts.
        folder: the recipe's folder, where it may start as well.
        faults: gets what is wrong, in words.
    """
    given = section.classes
    found: ClassList | None = None
    if isinstance(given, int):
        found = ClassList(tuple(f"class {index}" for index in range(given)))
    elif isinstance(given, str):
        path = located(given, root, folder)
        if path is None:
            faults.append(f"classes: no file '{given}' in '{root}' or beside the recipe.")
        elif path.suffix.lower() == ".json":
            found = _from_json(path, section, faults)
        else:
            found = ClassList(tuple(lines_of(path, "classes", faults) or ()))
            if not found.names:
                faults.append(f"classes: '{path.name}' lists no class. Write one name per line.")
    elif given is not None:
        found = ClassList(given)
    if found is not None:
        doubled = sorted({name for name in found.names if found.names.count(name) > 1})
        if doubled:
            faults.append(f"classes: named twice: {few(doubled)}. Give each class its own name.")
    return found if found is not None and found.names else None


def own_classes(
    section: DataSection, names: Sequence[str], root: Path, folder: Path, faults: list[str]
) -> tuple[str, ...]:
    """The format's own classes, under other names where the recipe gives as many."""
    given = read_classes(section, root, folder, faults)
    if given is None or section.classes == len(names):
        return tuple(names)
    if len(given.names) != len(names):
        faults.append(
            f"classes: format {section.format} has {len(names)} ({few(names)}), got "
            f"{len(given.names)}. Give as many names, or leave the key out."
        )
    return given.names


def labels_of(section: DataSection, classes: ClassList, faults: list[str]) -> Labels:
    """How the masks of a folder are read."""
    count = len(classes.names)
    if section.palette is not None:
        if len(section.palette) != count:
            faults.append(
                f"palette: expected a colour for each of the {count} classes, got "
                f"{len(section.palette)}."
            )
        for colour in sorted({c for c in section.palette if section.palette.count(c) > 1}):
            sharing = [f"{i}" for i, c in enumerate(section.palette) if c == colour]
            faults.append(
                f"palette: {list(colour)} is the colour of the classes {' and '.join(sharing)}. "
                "Give each class its own."
            )
        return Labels(count, section.ignore_index, palette=section.palette, by_colour=True)
    palette = None if classes.palette is None else classes.palette[:count]
    return Labels(count, section.ignore_index, palette=palette)


def _from_json(path: Path, section: DataSection, faults: list[str]) -> ClassList | None:
    """A file with "classes" and perhaps "palette" and "ignore_index"."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        faults.append(f"classes: '{path.name}' is not JSON.")
        return None
    names = data.get("classes") if isinstance(data, dict) else data
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names) or not names:
        faults.append(
            f"classes: '{path.name}' has no list of names. Expected: "
            '{"classes": ["sky", "road"]}, perhaps with "palette": [[r, g, b], ...].'
        )
        return None
    extra = data if isinstance(data, dict) else {}
    ignored = extra.get("ignore_index", section.ignore_index)
    if ignored != section.ignore_index:
        faults.append(
            f"ignore_index: '{path.name}' says {ignored}, the recipe {section.ignore_index}. "
            f"Write ignore_index: {ignored}."
        )
    palette = extra.get("palette")
    if palette is None:
        return ClassList(tuple(names))
    if not _is_palette(palette) or len(palette) < len(names):
        faults.append(
            f"classes: the palette of '{path.name}' is not a list of [red, green, blue], 0 to 255, "
            "one for each class."
        )
        return None
    return ClassList(tuple(names), tuple((r, g, b) for r, g, b in palette))


def _is_palette(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(colour, list)
        and len(colour) == 3
        and all(isinstance(level, int) and 0 <= level <= 255 for level in colour)
        for colour in value
    )
