"""Outlines in COCO's JSON, drawn into masks by pycocotools."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pacswap.errors import nearest_hint
from pacswap.recipes import DataSection
from pacswap.train.data.classes import read_classes
from pacswap.train.data.faults import few, many
from pacswap.train.data.found import Found, below, check_there
from pacswap.train.data.labels import Labels, drawing_palette
from pacswap.train.data.lists import located, without_suffix
from pacswap.train.data.pictures import (
    Flaw,
    Pixels,
    Raw,
    Sample,
    has_size_of,
    read_picture,
    require_one_size,
)

BACKGROUND = "background"
_FIELDS: dict[str, dict[str, Any]] = {
    "images": {"id": int | str, "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": int | str, "category_id": int, "segmentation": list | dict},
    "categories": {"id": int, "name": str},
}


@dataclass(frozen=True)
class Outlines:
    """What is outlined in one picture.

    Attributes:
        size: height and width.
        parts: from back to front: the class (None for ignored), and what pycocotools takes.
    """

    size: tuple[int, int]
    parts: tuple[tuple[int | None, Any], ...]


@dataclass(frozen=True)
class OutlineReader:
    """Samples that are a picture file and outlines in a JSON file."""

    labels: Labels
    outlines: Mapping[Path, Outlines]
    on_disk: bool = True

    def read(self, sample: Sample) -> tuple[Pixels, Raw]:
        """See `Reader`."""
        if sample.image is None:
            raise AssertionError(f"{sample.name} has no file")
        mask = self._drawn(sample.image, self.outlines[sample.image])
        picture = read_picture(sample.image)
        if not has_size_of(picture, mask):
            picture = read_picture(sample.image, upright=False)
        require_one_size(picture, mask, sample)
        return picture, mask

    def _drawn(self, image: Path, outlines: Outlines) -> Raw:
        coco_mask = import_module("pycocotools.mask")
        mask = np.zeros(outlines.size, self.labels.dtype)
        for label, part in outlines.parts:
            if not _is_drawable(part, outlines.size):
                raise Flaw("unreadable", str(image), "its outlines are damaged")
            inside = coco_mask.decode(_coded(part, outlines.size, coco_mask)).astype(bool)
            mask[inside] = self.labels.ignore_index if label is None else label
        return mask


def _is_drawable(part: Any, size: tuple[int, int]) -> bool:
    """Whether pycocotools takes it: its own checks are few, and its C code trusts what it gets."""
    if isinstance(part, list):
        return bool(part) and all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(isinstance(value, int | float) for value in polygon)
            for polygon in part
        )
    if not isinstance(part, dict) or part.get("size") != [*size]:
        return False
    counts = part.get("counts")
    if isinstance(counts, list):
        whole = all(isinstance(count, int) and count >= 0 for count in counts)
        return whole and sum(counts) == size[0] * size[1]
    return isinstance(counts, str)


def _coded(part: Any, size: tuple[int, int], coco_mask: Any) -> Any:
    """A list of polygons, run lengths as a list or as a string, in pycocotools' run lengths."""
    if isinstance(part, list):
        return coco_mask.merge(coco_mask.frPyObjects(part, *size))
    if isinstance(part["counts"], list):
        return coco_mask.frPyObjects(part, *size)
    return part


def read_coco(section: DataSection, root: Path, folder: Path, faults: list[str]) -> Found | None:
    """Find the pictures and outlines of both splits.

    Class 0 is what nothing outlines. The categories follow in the order of their ids, or those
    that `classes` names in its order: others are background then. Crowds are ignored. Where
    outlines overlap, the smaller lies in front.

    Args:
        section: the recipe's `finetune.data`; `train` and `val` are JSON files, `images` the
            folder of the pictures.
        root: the data's folder; it exists.
        folder: the recipe's folder, where JSON files may lie too.
        faults: gets what is missing or contradictory.
    """
    if importlib.util.find_spec("pycocotools") is None:
        faults.append('format coco needs pycocotools. Install it: pip install "pacswap[coco]"')
        return None
    files = {key: _json_of(section, key, root, folder, faults) for key in ("train", "val")}
    data = {key: _loaded(path, key, faults) for key, path in files.items() if path is not None}
    train, val = data.get("train"), data.get("val")
    if faults or train is None or val is None:
        return None
    if _categories(train) != _categories(val):
        faults.append("val: its categories are not those of train. Give both the same.")
        return None
    classes, label_of = _classes(section, _categories(train), root, folder, faults)
    outlines: dict[Path, Outlines] = {}
    splits = []
    for key, path in files.items():
        samples = _samples(section, key, path, data[key], root, label_of, outlines, faults)
        check_there(key, samples, root, faults)
        splits.append(samples)
    if faults:
        return None
    reader = OutlineReader(Labels(len(classes), section.ignore_index), outlines)
    return Found(splits[0], splits[1], classes, drawing_palette(None, len(classes)), reader)


def _json_of(
    section: DataSection, key: str, root: Path, folder: Path, faults: list[str]
) -> Path | None:
    given = section.train if key == "train" else section.val
    if given is not None:
        path = located(given, root, folder)
        if path is None:
            there = sorted(below(p, root) for p in (*root.glob("*.json"), *root.glob("*/*.json")))
            faults.append(
                f"{key}: no file '{given}' in '{root}' or beside the recipe. "
                f"{nearest_hint(given, there)}".rstrip()
            )
        return path
    patterns = (
        f"{key}.json",
        f"annotations/{key}.json",
        f"annotations/instances_{key}*.json",
        f"{key}/_annotations.coco.json",
    )
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) == 1:
            return found[0]
    faults.append(
        f"{key}: missing key, and no {' or '.join(repr(p) for p in patterns)} in '{root}'. Name "
        "the JSON file."
    )
    return None


def _loaded(path: Path, key: str, faults: list[str]) -> dict[str, Any] | None:
    """The JSON file, its lists of mappings there and whole."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        faults.append(f"{key}: '{path.name}' is not JSON.")
        return None
    for name, fields in _FIELDS.items():
        entries = data.get(name) if isinstance(data, dict) else None
        if not isinstance(entries, list):
            faults.append(f"{key}: '{path.name}' has no list '{name}', as COCO's files have.")
            return None
        for index, entry in enumerate(entries):
            for field, kind in fields.items():
                if not isinstance(entry, dict) or not isinstance(entry.get(field), kind):
                    faults.append(f"{key}: '{path.name}' has no '{field}' in {name}[{index}].")
                    return None
    if not data["images"]:
        faults.append(f"{key}: '{path.name}' lists no picture.")
        return None
    return data


def _categories(data: dict[str, Any]) -> dict[Any, str]:
    return {c["id"]: c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])}


def _classes(
    section: DataSection,
    categories: dict[Any, str],
    root: Path,
    folder: Path,
    faults: list[str],
) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The classes' names, and the class of each category's id."""
    given = read_classes(section, root, folder, faults)
    names = [*categories.values()]
    if given is not None and isinstance(section.classes, int):
        if section.classes != len(names) + 1:
            faults.append(
                f"classes: the data has {len(names)} categories, {len(names) + 1} classes with the "
                f"background, got {section.classes}."
            )
    elif given is not None:
        names = [name for name in given.names if name != BACKGROUND]
        unknown = [name for name in names if name not in categories.values()]
        if unknown:
            hint = nearest_hint(unknown[0], categories.values())
            faults.append(
                f"classes: {many(len(unknown), 'is', 'are')} no category of the data: "
                f"{few(unknown)}. {hint}".rstrip()
            )
    places = {name: index for index, name in enumerate(names, 1)}
    label_of = {id: places[name] for id, name in categories.items() if name in places}
    return (BACKGROUND, *names), label_of


def _samples(
    section: DataSection,
    key: str,
    path: Path | None,
    data: dict[str, Any] | None,
    root: Path,
    label_of: dict[Any, int],
    outlines: dict[Path, Outlines],
    faults: list[str],
) -> tuple[Sample, ...]:
    if path is None or data is None:
        return ()
    folder = _pictures_of(section, key, path, data, root, faults)
    if folder is None:
        return ()
    marked: dict[Any, list[dict[str, Any]]] = {}
    for annotation in data["annotations"]:
        if annotation["category_id"] in label_of:
            marked.setdefault(annotation["image_id"], []).append(annotation)
    samples = []
    for picture in data["images"]:
        image = folder / picture["file_name"]
        # Crowds lie at the back, large things behind small ones.
        order = sorted(marked.get(picture["id"], ()), key=_depth)
        outlines[image] = Outlines(
            (picture["height"], picture["width"]),
            tuple(
                (
                    None if a.get("iscrowd") else label_of[a["category_id"]],
                    a["segmentation"],
                )
                for a in order
            ),
        )
        samples.append(Sample(without_suffix(picture["file_name"]), image))
    return tuple(samples)


def _depth(annotation: Mapping[str, Any]) -> tuple[bool, float]:
    return not annotation.get("iscrowd"), -float(annotation.get("area") or 0)


def _pictures_of(
    section: DataSection,
    key: str,
    path: Path,
    data: dict[str, Any],
    root: Path,
    faults: list[str],
) -> Path | None:
    """The folder in which the split's first picture lies."""
    name = path.stem.removeprefix("instances_")
    patterns: Sequence[str] = ("images", "{split}", "images/{split}")
    if section.images is not None:
        patterns = (section.images,)
    folders = [root / pattern.replace("{split}", name) for pattern in patterns]
    if section.images is None:
        folders.append(path.parent)
    first = data["images"][0]["file_name"]
    for folder in folders:
        if (folder / first).is_file():
            return folder
    looked = few([below(folder, root) for folder in folders], most=4)
    faults.append(f"{key}: its first picture '{first}' is not in {looked}. Name images.")
    return None
