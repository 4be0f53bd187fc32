"""Trained networks on the disk: how a run keeps one, how `evaluate` and `predict` use it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from pacswap.checkpoint import CLASSES, RECIPE, load, new_folder, pinned, write_model
from pacswap.errors import CheckpointError, DataError
from pacswap.recipes import LoadedRecipe, Recipe, load_recipe, recipe_data
from pacswap.surgery import Plan
from pacswap.train.data.batches import normalized
from pacswap.train.data.faults import few, many
from pacswap.train.data.labels import Colour, drawing_palette
from pacswap.train.data.lists import located, picture_suffixes
from pacswap.train.data.pictures import FileReader, read_picture
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, open_data
from pacswap.train.measure.infer import evaluate as measure
from pacswap.train.measure.infer import predict as probabilities
from pacswap.train.measure.metrics import Scores
from pacswap.train.measure.pictures import overlay, palette_image, write_picture
from pacswap.train.setting import MODEL, scales_of, section_of
from pacswap.upgrade import folder_of

Count = Callable[[int, int], None]

# What torchvision's formats call their own splits: a file of such a name is not looked for.
_OWN_SPLITS = frozenset(("train", "val", "trainval", "test", "train_noval"))


def keep_model(
    model: nn.Module, loaded: LoadedRecipe, plan: Plan, split: Split, folder: Path
) -> Path:
    """Write a trained network as a model directory that `pacswap.load` and `evaluate` take.

    Args:
        model: the network.
        loaded: the recipe it was trained by.
        plan: what was done to it.
        split: of the data, for the classes and their colours.
        folder: the directory; one that is there is replaced.

    Raises:
        CheckpointError: it cannot be written.
    """
    legend = {"classes": list(split.classes), "palette": [list(c) for c in split.palette]}
    with new_folder(folder, overwrite=True) as draft:
        write_model(model, pinned(_portable(loaded, split), plan), draft)
        (draft / CLASSES).write_text(json.dumps(legend) + "\n", encoding="utf-8")
    return folder


def _portable(loaded: LoadedRecipe, split: Split) -> Recipe:
    """The recipe with its data named so that it is found from anywhere on this machine.

    What lies in the data's folder keeps its name, so that other data can be laid over `root`.
    """
    data = recipe_data(loaded.recipe)
    section, root = data["finetune"]["data"], split.root
    beside = folder_of(loaded, ("finetune", "data", "root"))
    if root is not None:
        section["root"] = str(root.resolve())
        for key in ("train", "val"):
            section[key] = _lasting(section[key], section["format"], root, beside)
    if root is not None and _is_read_by_colours_of_a_file(split):
        # Said in `palette`, the colours would be those of index masks as well.
        file = located(section["classes"], root, beside)
        assert file is not None
        section["classes"] = _absolute(file)
    else:
        section["classes"] = list(split.classes)
    return Recipe.model_validate(data)


def _lasting(given: str | None, style: str, root: Path, beside: Path) -> str | None:
    """A split's name; of a list beside the recipe its absolute path."""
    if given is None or (style not in ("folder", "coco") and given in _OWN_SPLITS):
        return given
    for name in (given, f"{given}.txt") if style == "folder" else (given,):
        found = located(name, root, beside)
        if found is not None:
            return given if found == root / name else _absolute(found)
    return given


def _absolute(file: Path) -> str:
    return str(file.parent.resolve() / file.name)  # a link keeps its name, which says what it is


def _is_read_by_colours_of_a_file(split: Split) -> bool:
    """Whether some masks are colour pictures, and a file of classes says what they mean."""
    reader = split.reader
    if not isinstance(reader, FileReader) or reader.labels.palette is None:
        return False
    if reader.labels.by_colour:  # by the recipe's own palette
        return False
    return any(_is_coloured(sample.mask) for sample in split.samples if sample.mask is not None)


def _is_coloured(mask: Path) -> bool:
    with Image.open(mask) as picture:  # its header only
        return len(picture.getbands()) > 2  # grey with transparency has 2


@dataclass(frozen=True)
class Trained:
    """A trained network and what it was trained on.

    Attributes:
        model: in eval mode.
        loaded: its recipe.
        classes: their names.
        palette: their colours.
        folder: the model directory.
    """

    model: nn.Module
    loaded: LoadedRecipe
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    folder: Path


def open_trained(
    folder: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    device: str | torch.device | None = None,
    trust_python: bool = False,
) -> Trained:
    """Load what `finetune` wrote.

    Args:
        folder: of a run, or the model directory in it.
        overrides: of its recipe, such as `finetune.evaluate.flip=true`.
        device: where to put the network; None is a GPU where there is one.
        trust_python: allow `library: python`.

    Raises:
        CheckpointError: there is no trained network, or it is damaged.
        RecipeError: an override is wrong.
    """
    folder = Path(folder)
    folder = folder / MODEL if (folder / MODEL / RECIPE).is_file() else folder
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(folder, device=device, trust_python=trust_python)
    loaded = load_recipe(folder / RECIPE, overrides)
    section_of(loaded)
    try:
        legend = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
        names = tuple(str(name) for name in legend["classes"])
        colours = tuple((int(r), int(g), int(b)) for r, g, b in legend["palette"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{folder / CLASSES}' does not name the classes: {error}. Name a directory that "
            "pacswap finetune wrote."
        ) from error
    return Trained(model, loaded, names, drawing_palette(colours, len(names)), folder)


def evaluate(
    trained: Trained, split: str = "val", *, progress: Count = lambda done, of: None
) -> Scores:
    """Measure a trained network on the data of its recipe.

    Args:
        trained: from `open_trained`; overrides may name other data.
        split: `val` or `train`.
        progress: called with how many pictures are done, and of how many.

    Raises:
        DataError: the pictures are missing, damaged or of other classes.
    """
    section = section_of(trained.loaded)
    root = folder_of(trained.loaded, ("finetune", "data", "root"))
    train, val = open_data(section.data, root)
    chosen = train if split == "train" else val
    if len(chosen.classes) != len(trained.classes):
        raise DataError(
            f"the data has {len(chosen.classes)} classes and the network {len(trained.classes)}. "
            "Mend finetune.data.classes, or name the data that it was trained for."
        )
    scan(chosen)
    mean, std = scales_of(section.data, trained.model)
    return measure(
        trained.model,
        chosen,
        section.evaluate,
        mean=mean,
        std=std,
        device=_device(trained.model),
        progress=progress,
    )


def predict(
    trained: Trained,
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    overlays: bool = False,
    overwrite: bool = False,
    progress: Count = lambda done, of: None,
) -> list[Path]:
    """Segment pictures: for each a palette PNG whose numbers are the classes.

    Args:
        trained: from `open_trained`.
        paths: pictures, or folders of them.
        output: the folder to write to.
        overlays: also write each picture with the classes laid over it.
        overwrite: replace files that are there.
        progress: called with how many pictures are done, and of how many.

    Returns:
        What was written.

    Raises:
        DataError: a path holds no picture; nothing is written then.
        TrainingError: a file cannot be written.
    """
    targets = _targets([Path(path) for path in paths], Path(output), overlays=overlays)
    if not overwrite:
        _refuse_existing(targets.values(), overlays=overlays)
    section = section_of(trained.loaded)
    scales = scales_of(section.data, trained.model)
    written = []
    for number, (path, target) in enumerate(targets.items()):
        pixels = torch.from_numpy(read_picture(path).copy()).permute(2, 0, 1)
        images = normalized(pixels[None], *scales, _device(trained.model))
        mask = probabilities(trained.model, images, section.evaluate)[0].argmax(0).cpu()
        written.append(write_picture(target, palette_image(mask, trained.palette)))
        if overlays:
            drawn = overlay(pixels, mask, trained.palette)
            written.append(write_picture(_overlay_of(target), drawn))
        progress(number + 1, len(targets))
    return written


def _overlay_of(target: Path) -> Path:
    return target.with_name(f"{target.stem}_overlay.png")


def _targets(paths: Sequence[Path], output: Path, *, overlays: bool) -> dict[Path, Path]:
    """Where each picture's mask goes, with every fault said at once."""
    found: dict[Path, Path] = {}
    faults = []
    for path in paths:
        pictures = list(_pictures(path))
        if not pictures:
            what = "holds no pictures" if path.is_dir() else "is not there"
            faults.append(f"'{path}' {what}.")
        found |= {picture: output / f"{picture.stem}.png" for picture in pictures}
    for picture in found:
        try:
            read_picture(picture)
        except DataError as error:
            faults.append(str(error))
    files = [*found.values(), *(_overlay_of(target) for target in found.values() if overlays)]
    doubled = [target for target, count in Counter(files).items() if count > 1]
    faults += [f"several pictures would be written to '{target}'." for target in sorted(doubled)]
    faults += [
        f"'{picture}' would be replaced by its own mask. Name another output."
        for picture, target in found.items()
        if picture.resolve() == target.resolve()
    ]
    if faults:
        raise DataError("\n".join(faults))
    return found


def _refuse_existing(targets: Iterable[Path], *, overlays: bool) -> None:
    """A file that is there may be a mask that somebody drew."""
    files = [*targets]
    files += [_overlay_of(target) for target in files if overlays]
    there = [str(file) for file in files if file.exists()]
    if there:
        raise DataError(
            f"{many(len(there), 'file is', 'files are')} there already: {few(there)}. Name another "
            "output, or replace them: --overwrite on the command line, overwrite=True in Python."
        )


def _pictures(path: Path) -> Iterator[Path]:
    if path.is_dir():
        known = picture_suffixes()
        yield from sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in known)
    elif path.is_file():
        yield path


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device
