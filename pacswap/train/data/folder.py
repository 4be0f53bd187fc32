"""A folder of pictures and a folder of masks, paired by their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pacswap.errors import nearest_hint
from pacswap.recipes import DataSection
from pacswap.train.data.classes import labels_of, read_classes
from pacswap.train.data.faults import few, few_of, many
from pacswap.train.data.found import Found, below
from pacswap.train.data.labels import drawing_palette
from pacswap.train.data.lists import (
    Entry,
    Index,
    lines_of,
    located,
    pictures_below,
    twice,
    without_suffix,
)
from pacswap.train.data.pictures import FileReader, Sample, own_palette

# What a mask's name may have after its picture's, and what a picture's name may have that its
# mask's lacks.
MASK_SUFFIXES = (
    "", "_mask", "_label", "_labels", "_labelIds", "_gtFine_labelIds", "_gt", "_L", "_seg",
)  # fmt: skip
PICTURE_SUFFIXES = ("", "_leftImg8bit", "_image", "_img", "_rgb")


@dataclass(frozen=True)
class _Place:
    """Where a split lies."""

    key: str  # train or val
    images: Path
    masks: Path
    list_file: Path | None  # None: all pictures in the folder
    own_masks: bool  # whether the masks' folder holds this split's alone


def read_folder(section: DataSection, root: Path, folder: Path, faults: list[str]) -> Found | None:
    """Pair the pictures and masks of both splits.

    Args:
        section: the recipe's `finetune.data`.
        root: the data's folder; it exists.
        folder: the recipe's folder, where lists may lie too.
        faults: gets what is missing, doubled or contradictory.
    """
    classes = read_classes(section, root, folder, faults)
    if section.classes is None:
        faults.append(
            "classes: missing key. Expected: the names of the classes in the order of the masks' "
            "numbers, a file with one per line, or how many."
        )
    splits = []
    for key in ("train", "val"):
        place = _place_of(section, key, root, folder, faults)
        splits.append(() if place is None else tuple(_samples(place, faults)))
    if faults or classes is None:
        return None
    labels = labels_of(section, classes, faults)
    first = splits[0][0].mask
    known = section.palette or classes.palette or (own_palette(first) if first else None)
    palette = drawing_palette(known, len(classes.names))
    return Found(splits[0], splits[1], classes.names, palette, FileReader(labels))


def _place_of(
    section: DataSection, key: str, root: Path, folder: Path, faults: list[str]
) -> _Place | None:
    given = section.train if key == "train" else section.val
    if given is None:
        list_file = located(f"{key}.txt", root, root)
    else:
        list_file = located(given, root, folder) or located(f"{given}.txt", root, folder)
    name = given or key if list_file is None else list_file.stem
    images, masks = section.images or "images", section.masks or "masks"
    named = "{split}" in images + masks
    for candidate in _names_of(name) if named else [name]:
        place = _Place(
            key,
            root / images.replace("{split}", candidate),
            root / masks.replace("{split}", candidate),
            list_file,
            "{split}" in masks,
        )
        if place.images.is_dir() and place.masks.is_dir():
            break
    else:
        if list_file is None and named:
            faults.append(_no_split(section, key, root, images.replace("{split}", name)))
            return None
        for what, pattern in (("images", images), ("masks", masks)):
            path = root / pattern.replace("{split}", name)
            if not path.is_dir():
                faults.append(_no_folder(what, path, root))
        return None
    if list_file is not None or "{split}" in images:
        return place
    if not (place.images / name).is_dir():
        faults.append(_no_split(section, key, root, f"{images}/{name}"))
        return None
    inner = place.masks / name
    own = inner.is_dir()
    return _Place(key, place.images / name, inner if own else place.masks, None, own)


def _names_of(name: str) -> Iterator[str]:
    """What `{split}` may stand for.

    >>> list(_names_of("train_half_1"))
    ['train_half_1', 'train_half', 'train']
    """
    while name:
        yield name
        name = name.rpartition("_")[0]


def _no_folder(key: str, path: Path, root: Path) -> str:
    there = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    hint = nearest_hint(path.name, there) if there else "There is no folder in it."
    return f"{key}: no folder '{below(path, root)}' in '{root}'. {hint}".rstrip()


def _no_split(section: DataSection, key: str, root: Path, subfolder: str) -> str:
    given = section.train if key == "train" else section.val
    lists = sorted(path.name for path in root.glob("*.txt"))
    if given is None:
        hint = f" Name one of {few(lists)}" if lists else " Name a list of the pictures"
        return (
            f"{key}: missing key, and neither a list '{key}.txt' nor a folder '{subfolder}' in "
            f"'{root}'.{hint}, or a subfolder."
        )
    images = root / Path(subfolder).parent
    folders = sorted(p.name for p in images.iterdir() if p.is_dir()) if images.is_dir() else []
    hint = nearest_hint(given, [*lists, *folders], most=1)
    return (
        f"{key}: '{given}' is neither a list in '{root}' or beside the recipe nor the folder "
        f"'{subfolder}'. {hint}"
    ).rstrip()


def _samples(place: _Place, faults: list[str]) -> Iterator[Sample]:
    """The pairs of a split; nothing where a fault was found."""
    images = Index([Entry(name, place.images / name) for name in pictures_below(place.images)])
    masks = Index([Entry(name, place.masks / name) for name in pictures_below(place.masks)])
    before = len(faults)
    if place.list_file is None:
        pairs = _all_pairs(place, images, masks, faults)
    else:
        pairs = _listed_pairs(place, images, masks, faults)
    if len(faults) > before:
        return
    for image, mask in pairs:
        yield Sample(without_suffix(image.name), image.value, mask.value)


_Pair = tuple[Entry[Path], Entry[Path]]


def _all_pairs(
    place: _Place, images: Index[Path], masks: Index[Path], faults: list[str]
) -> list[_Pair]:
    """Every picture of the folder with its mask."""
    pictures = images.entries
    if place.images == place.masks:
        pictures = [entry for entry in pictures if not _is_mask_name(entry.name)]
    elif place.masks.is_relative_to(place.images):
        inner = place.masks.relative_to(place.images).as_posix() + "/"
        pictures = [entry for entry in pictures if not entry.name.startswith(inner)]
    if not pictures:
        faults.append(f"{place.key}: no picture in '{place.images}'.")
    keys = [without_suffix(entry.name) for entry in pictures]
    _report_doubled(place, twice(keys), faults)
    pairs = _with_masks(place, pictures, masks, faults)
    if place.own_masks and place.images != place.masks:
        known = {base for key in keys for base in _bases(key.rpartition("/")[2])}
        used = {mask.name for _, mask in pairs}
        alone = [e.name for e in masks.entries if e.name not in used and not _is_of(e.name, known)]
        if alone:
            faults.append(
                f"{place.key}: {many(len(alone), 'mask has', 'masks have')} no picture in "
                f"'{place.images}': {few(alone)}."
            )
    return pairs


def _listed_pairs(
    place: _Place, images: Index[Path], masks: Index[Path], faults: list[str]
) -> list[_Pair]:
    """The pictures that the list names, with the masks that it names or their own."""
    path = place.list_file
    lines = [] if path is None else lines_of(path, place.key, faults)
    if path is None or lines is None:
        return []
    if not lines:
        faults.append(f"{place.key}: '{path.name}' lists no picture. Write one name per line.")
    unknown, unknown_masks, doubtful = [], [], []
    told: list[tuple[Entry[Path], Entry[Path] | None]] = []
    for line in lines:
        found, named = images.find(line), None
        columns = line.split()
        if not found and len(columns) == 2:
            found, named = images.find(columns[0]), masks.find(columns[1])
        if not found:
            unknown.append(line)
        elif named == []:
            unknown_masks.append(columns[1])
        elif len(found) > 1 or (named is not None and len(named) > 1):
            doubtful.append(line)
        else:
            told.append((found[0], None if named is None else named[0]))
    if unknown:
        hint = "" if len(unknown) > 1 else nearest_hint(unknown[0], images.last_names(), most=1)
        faults.append(
            f"{place.key}: '{path.name}' lists {many(len(unknown), 'picture', 'pictures')} that "
            f"'{place.images}' lacks: {few(unknown)}. {hint}".rstrip()
        )
    if unknown_masks:
        faults.append(
            f"{place.key}: '{path.name}' lists {many(len(unknown_masks), 'mask', 'masks')} that "
            f"'{place.masks}' lacks: {few(unknown_masks)}."
        )
    _report_doubled(place, doubtful, faults)
    doubled = twice([image.name for image, _ in told])
    if doubled:
        faults.append(
            f"{place.key}: '{path.name}' lists {many(len(doubled), 'picture', 'pictures')} "
            f"more than once: {few(doubled)}. Keep one line of each."
        )
    alone = [image for image, mask in told if mask is None]
    own = {pair[0].name: pair for pair in _with_masks(place, alone, masks, faults)}
    pairs = [own.get(image.name) if mask is None else (image, mask) for image, mask in told]
    return [pair for pair in pairs if pair is not None]


def _with_masks(
    place: _Place, pictures: Sequence[Entry[Path]], masks: Index[Path], faults: list[str]
) -> list[_Pair]:
    """Each picture with the mask that bears its name."""
    pairs, missing, doubtful = [], [], []
    for picture in pictures:
        found = _masks_of(picture, masks)
        if len(found) == 1:
            pairs.append((picture, found[0]))
        elif found:
            both = " and ".join(f"'{entry.name}'" for entry in found[:2])
            doubtful.append(f"'{picture.name}' ({both})")
        else:
            missing.append(picture.name)
    if missing:
        faults.append(
            f"{place.key}: {many(len(missing), 'picture has', 'pictures have')} no mask in "
            f"'{place.masks}': {few(missing)}. Expected the picture's name, alone or with "
            f"{', '.join(MASK_SUFFIXES[1:4])} ... after it."
        )
    if doubtful:
        faults.append(
            f"{place.key}: {many(len(doubtful), 'picture has', 'pictures have')} more than one "
            f"mask: {few_of(doubtful)}. Keep one of each."
        )
    return pairs


def _masks_of(picture: Entry[Path], masks: Index[Path]) -> list[Entry[Path]]:
    for base in _bases(without_suffix(picture.name)):
        for suffix in MASK_SUFFIXES:
            found = [e for e in masks.find(base + suffix) if e.value != picture.value]
            if found:
                return found
    return []


def _bases(name: str) -> list[str]:
    """What of a picture's name may begin that of its mask.

    >>> _bases("a_rgb")
    ['a_rgb', 'a']
    """
    return [name.removesuffix(ending) for ending in PICTURE_SUFFIXES if name.endswith(ending)]


def _is_mask_name(name: str) -> bool:
    return without_suffix(name).endswith(MASK_SUFFIXES[1:])


def _is_of(mask: str, pictures: set[str]) -> bool:
    """Whether a mask's name begins with that of a picture: another kind of mask of it."""
    stem = without_suffix(mask).rpartition("/")[2]
    return any(base in pictures for base in _names_of(stem))


def _report_doubled(place: _Place, names: Sequence[str], faults: list[str]) -> None:
    if names:
        faults.append(
            f"{place.key}: more than one file in '{place.images}' can be meant by {few(names)}. "
            "Keep one, or write its ending too."
        )
