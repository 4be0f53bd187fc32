"""One reader per `format`: which samples there are, and how their pixels are had."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision.datasets import Cityscapes, OxfordIIITPet, SBDataset, VOCSegmentation

from pacswap.errors import nearest_hint
from pacswap.recipes import DataSection
from pacswap.scenes import CLASSES as SCENE_CLASSES
from pacswap.train.data.classes import own_classes
from pacswap.train.data.coco import read_coco
from pacswap.train.data.faults import few, many
from pacswap.train.data.folder import read_folder
from pacswap.train.data.found import Found, below, check_there
from pacswap.train.data.labels import Colour, Labels, distinct_colours, drawing_palette
from pacswap.train.data.lists import Entry, Index, lines_of, located, twice, without_suffix
from pacswap.train.data.pictures import FileReader, Raw, Sample, read_mask
from pacswap.train.data.sbd import read_mat_mask, why_no_scipy
from pacswap.train.data.scenes import SMALLEST, SceneReader, scene_samples

_VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
_VOID = 255
_COUNTED = [c for c in Cityscapes.classes if not c.ignore_in_eval]


@dataclass(frozen=True)
class _Library:
    """A format of torchvision.datasets.

    Attributes:
        splits: the names it knows; those of train and val first.
        pairs: the pictures and masks of one of them, given the data's folder.
        classes: their names.
        numbers: the class of each number in a mask; None stands for ignored.
        to_get: how to come by the data, `{root}` being its folder.
        colours: of the classes, to draw masks with.
    """

    splits: tuple[str, ...]
    pairs: Callable[[Path, str], list[tuple[Path, Path]]]
    classes: tuple[str, ...]
    numbers: dict[int, int | None]
    to_get: str
    colours: tuple[Colour, ...] = distinct_colours()
    load_mask: Callable[[Path, Labels], Raw] = read_mask


def _voc_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    """Of the newest year there is, or of the one that `root` itself is."""
    named = re.fullmatch(r"VOC(20\d\d)", root.name)
    base = root.absolute().parents[1] if named else root
    base = root.absolute().parent if root.name == "VOCdevkit" else base
    base = base.parent if base.name == "TrainVal" else base  # where 2011 lies
    inner = [base / "VOCdevkit", base / "TrainVal/VOCdevkit"]
    years = [path.name[3:] for place in inner for path in place.glob("VOC20[01][0-9]")]
    year = named[1] if named else max(years, default="2012")
    data = VOCSegmentation(base, year=year, image_set=split)
    return [(Path(i), Path(m)) for i, m in zip(data.images, data.masks, strict=True)]


def _sbd_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    data = SBDataset(root, image_set=split, mode="segmentation")
    return [(Path(i), Path(m)) for i, m in zip(data.images, data.masks, strict=True)]


def _cityscapes_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    data = Cityscapes(root, split=split, target_type="semantic")
    pairs = [(Path(i), Path(m[0])) for i, m in zip(data.images, data.targets, strict=True)]
    return sorted(pair for pair in pairs if pair[0].suffix == ".png")


def _pet_pairs(root: Path, split: str) -> list[tuple[Path, Path]]:
    base = root.parent if root.name == "oxford-iiit-pet" else root
    data = OxfordIIITPet(base, split=split, target_types="segmentation")
    return list(zip(data._images, data._segs, strict=True))


_VOC_NUMBERS: dict[int, int | None] = {**{i: i for i in range(21)}, _VOID: None}
_LIBRARY = {
    "voc": _Library(
        ("train", "val", "trainval", "test"),
        _voc_pairs,
        _VOC_CLASSES,
        _VOC_NUMBERS,
        'python -c "from torchvision.datasets import VOCSegmentation as D; '
        "D(r'{root}', download=True)\"",
    ),
    "sbd": _Library(
        ("train", "val", "train_noval"),
        _sbd_pairs,
        _VOC_CLASSES,
        _VOC_NUMBERS,
        'python -c "from torchvision.datasets import SBDataset as D; '
        "D(r'{root}', download=True)\"",
        load_mask=read_mat_mask,
    ),
    "cityscapes": _Library(
        ("train", "val", "test"),
        _cityscapes_pairs,
        tuple(c.name for c in _COUNTED),
        {
            **{c.id % 256: None for c in Cityscapes.classes},
            **{c.id: c.train_id for c in _COUNTED},
        },
        "register at https://www.cityscapes-dataset.com, and unpack "
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in '{root}'",
        tuple(c.color for c in _COUNTED),
    ),
    "oxford_pet": _Library(
        ("trainval", "test"),
        _pet_pairs,
        ("pet", "background", "border"),
        {1: 0, 2: 1, 3: 2},
        'python -c "from torchvision.datasets import OxfordIIITPet as D; '
        "D(r'{root}', download=True)\"",
    ),
}
_FOLDERS = {"folder": read_folder, "coco": read_coco}
_TO_GET = {
    "folder": "put the pictures into '{root}/images' and the masks into '{root}/masks'",
    "coco": "download a split's zip file and annotations_trainval2017.zip from "
    "https://cocodataset.org/#download, and unpack them in '{root}'",
}


def read_format(
    section: DataSection, root: Path | None, folder: Path, faults: list[str]
) -> Found | None:
    """Find the samples of both splits.

    Args:
        section: the recipe's `finetune.data`.
        root: the data's folder; None for drawn scenes.
        folder: the recipe's folder.
        faults: gets all that is wrong, in words.

    Returns:
        None only where there are faults.
    """
    style = section.format
    if root is None:
        return _scenes(section, folder, faults)
    if not root.is_dir():
        what = "a folder" if root.exists() else "there"
        hint = _LIBRARY[style].to_get if style in _LIBRARY else _TO_GET[style]
        faults.append(
            f"root: '{root}' is not {what}. A relative root starts at the recipe's folder. To get "
            f"the data: {hint.format(root=root)}."
        )
        return None
    if style in _FOLDERS:
        return _FOLDERS[style](section, root, folder, faults)
    return _from_library(section, _LIBRARY[style], root, folder, faults)


def _scenes(section: DataSection, folder: Path, faults: list[str]) -> Found | None:
    count, size = section.count or (320, 60), section.resize or (96, 128)
    if min(size) < SMALLEST:
        faults.append(
            f"resize: scenes are drawn at {SMALLEST}×{SMALLEST} at least, got {size[0]}×{size[1]}."
        )
    classes = own_classes(section, SCENE_CLASSES, folder, folder, faults)
    if faults:
        return None
    train, val = scene_samples(count)
    palette = drawing_palette(None, len(classes))
    return Found(train, val, classes, palette, SceneReader(size, sum(count)))


def _from_library(
    section: DataSection, library: _Library, root: Path, folder: Path, faults: list[str]
) -> Found | None:
    if section.format == "sbd" and (why := why_no_scipy()) is not None:
        faults.append(why)
        return None
    classes = own_classes(section, library.classes, root, folder, faults)
    ignore = section.ignore_index
    numbers = {n: ignore if c is None else c for n, c in library.numbers.items()}
    labels = Labels(len(classes), ignore, numbers=numbers)
    splits = []
    for key, own in zip(("train", "val"), library.splits, strict=False):
        given = section.train if key == "train" else section.val
        samples = _split(library, key, given or own, root, folder, faults)
        check_there(key, samples, root, faults)
        splits.append(samples)
    if faults:
        return None
    palette = drawing_palette(library.colours, len(classes))
    return Found(splits[0], splits[1], classes, palette, FileReader(labels, library.load_mask))


def _split(
    library: _Library, key: str, given: str, root: Path, folder: Path, faults: list[str]
) -> tuple[Sample, ...]:
    """One of the library's splits, or those of its samples that a file lists."""
    path = located(given, root, folder) if given not in library.splits else None
    if given not in library.splits and path is None:
        faults.append(
            f"{key}: '{given}' is neither a split of the format nor a file in '{root}' or beside "
            f"the recipe. {nearest_hint(given, library.splits)}"
        )
        return ()
    if path is None:
        samples, why_not = _named_split(library, given, root)
        if why_not is not None:
            faults.append(f"{key}: {why_not}")
        return samples
    known = [_named_split(library, name, root)[0] for name in library.splits]
    everything = {sample.image: sample for samples in known for sample in samples}
    index = Index([Entry(sample.name, sample) for sample in everything.values()])
    lines = lines_of(path, key, faults) or []
    found = [(line, index.find(line)) for line in lines]
    missing = [line for line, entries in found if not entries]
    chosen = [entries[0].value for _, entries in found if entries]
    doubled = twice([sample.name for sample in chosen])
    if missing:
        faults.append(
            f"{key}: '{path.name}' lists {many(len(missing), 'picture', 'pictures')} that no split "
            f"of the format has: {few(missing)}."
        )
    if doubled:
        faults.append(
            f"{key}: '{path.name}' lists {many(len(doubled), 'picture', 'pictures')} more than "
            f"once: {few(doubled)}. Keep one line of each."
        )
    if not lines:
        faults.append(f"{key}: '{path.name}' lists no picture. Write one name per line.")
    return tuple(chosen)


def _named_split(library: _Library, name: str, root: Path) -> tuple[tuple[Sample, ...], str | None]:
    """The samples of a split, or why it cannot be had."""
    try:
        pairs: Sequence[tuple[Path, Path]] = library.pairs(root, name)
    except (OSError, ValueError, RuntimeError) as error:
        lacking = getattr(error, "filename", None)
        what = f": there is no '{below(Path(lacking), root)}'" if lacking else ""
        return (), (
            f"the split '{name}' cannot be read from '{root}'{what}. To get the data: "
            f"{library.to_get.format(root=root)}."
        )
    start = _common(pairs)
    names = [without_suffix(below(image, start)) for image, _ in pairs]
    why = None if pairs else f"the split '{name}' in '{root}' has no picture."
    return tuple(Sample(n, image, mask) for n, (image, mask) in zip(names, pairs, strict=True)), why


def _common(pairs: Sequence[tuple[Path, Any]]) -> Path:
    """The folder below which pictures are named: Cityscapes' have their city before them."""
    folders = {image.parent for image, _ in pairs}
    return folders.pop() if len(folders) == 1 else next(iter(folders), Path("x")).parent
