"""What all trainings of a run share, checked before the first one begins."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pacswap.errors import RecipeError, TrainingError, quoted
from pacswap.recipes import (
    DataSection,
    FinetuneSection,
    LoadedRecipe,
    Recipe,
    dump_recipe,
    load_recipe,
)
from pacswap.train.arms import FOLDERS
from pacswap.train.data.batches import normalized
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, open_data
from pacswap.train.engine.begin import MAY_CHANGE
from pacswap.train.engine.device import make_accelerator, on_main
from pacswap.train.engine.events import Event
from pacswap.train.engine.state import differences
from pacswap.train.outputs import logits_of
from pacswap.train.writing import write_file
from pacswap.upgrade import folder_of
from pacswap.zoo import normalization

if TYPE_CHECKING:
    from accelerate import Accelerator

RECIPE = "recipe.yaml"
# All that a run writes into its folder, beside a folder for each seed.
MODEL, REPORTS, CURVES, PICTURES = "model", ("report.md", "report.json"), "curves.png", "pictures"
_SEED = "seed-"
_WRITTEN = (RECIPE, MODEL, *REPORTS, CURVES, PICTURES)
# What a run that was killed in the middle of writing leaves.
_DRAFT = re.compile(rf"\.({'|'.join(map(re.escape, _WRITTEN))})\.[0-9a-f]{{8}}")


@dataclass(frozen=True)
class Phase:
    """Something other than training begins, in a few words."""

    text: str


@dataclass(frozen=True)
class ArmBegun:
    """The training of an arm begins.

    Attributes:
        name: of the arm.
        seed: of its randomness.
        number: of the training, from 1.
        of: how many there are.
    """

    name: str
    seed: int
    number: int
    of: int


RunProgress: TypeAlias = Callable[[Event | Phase | ArmBegun], None]


@dataclass(frozen=True)
class Setting:
    """What all trainings of a run share.

    Attributes:
        loaded: the recipe.
        section: its `finetune`.
        train: the pictures to learn from.
        val: the pictures to measure on.
        folder: of the run.
        accelerator: the devices.
        trust_python: whether `library: python` is allowed.
        say: told of every phase, arm, step and measure.
    """

    loaded: LoadedRecipe
    section: FinetuneSection
    train: Split
    val: Split
    folder: Path
    accelerator: Accelerator
    trust_python: bool
    say: RunProgress

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    def place_of(self, arm: str, seed: int) -> Path:
        """The folder of a training."""
        return self.folder / f"{_SEED}{seed}" / FOLDERS[arm]


def prepare(
    loaded: LoadedRecipe,
    folder: Path,
    *,
    resume: bool,
    overwrite: bool,
    trust_python: bool,
    say: RunProgress,
) -> Setting:
    """Open and check the data, the devices and the run's folder.

    Raises:
        RecipeError: the recipe has no `finetune` section.
        DataError: pictures are missing, damaged or mislabelled.
        TrainingError: the devices cannot do what the recipe asks, or the folder is taken.
    """
    section = section_of(loaded)
    accelerator = make_accelerator(section.precision)
    on_main(accelerator, lambda: check_folder(folder, loaded, resume=resume, overwrite=overwrite))
    say(Phase("looking for pictures"))
    train, val = open_data(section.data, folder_of(loaded, ("finetune", "data", "root")))

    def begin() -> None:
        for split in (train, val):
            what = "learn from" if split is train else "measure on"
            say(Phase(f"reading {len(split)} pictures to {what}"))
            scan(split, one_size=split is train and makes_batches_of_one_size(section))
        _begin(folder, loaded, overwrite=overwrite)

    on_main(accelerator, begin)
    return Setting(loaded, section, train, val, folder, accelerator, trust_python, say)


def makes_batches_of_one_size(section: FinetuneSection) -> bool:
    """Whether pictures are put into batches as they are."""
    return section.batch_size > 1 and section.data.transforms.crop is None


def section_of(loaded: LoadedRecipe) -> FinetuneSection:
    """A recipe's `finetune`.

    Raises:
        RecipeError: there is none.
    """
    section = loaded.recipe.finetune
    if section is None:
        raise RecipeError(
            f"{loaded.path} has no 'finetune', which says on what and how to train. Add one: "
            "pacswap cp scenes_guided my.yaml shows the form."
        )
    return section


def check_folder(folder: Path, loaded: LoadedRecipe, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else than is to be written there.

    Raises:
        TrainingError: it does.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"'{folder}' is a file. Name another folder: -o FOLDER.")
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not inside:
        return
    strange = _strange(folder)
    if not overwrite:  # nothing is removed then, so .git may stay
        strange = [name for name in strange if not name.startswith(".")]
    begun = RECIPE in inside or all(map(_DRAFT.fullmatch, inside))
    if strange or not begun:
        named = quoted(strange[:3]) or quoted(inside[:3])
        raise TrainingError(
            f"'{folder}' holds {named}, which no run of pacswap wrote. Name another folder: "
            "-o FOLDER."
        )
    if inside == [RECIPE] and _is_dumped(folder / RECIPE):
        return  # it was refused before anything was trained
    if not (resume or overwrite):
        raise TrainingError(
            f"'{folder}' holds a run. Go on with it: --resume. Or replace it: --overwrite. Or name "
            "another folder: -o FOLDER."
        )
    if overwrite:
        _check_use(folder, loaded)
    elif RECIPE in inside:
        _check_recipe(folder, loaded)


def _strange(folder: Path) -> list[str]:
    """What no run wrote: names in the folder, and such as seed-0/notes.txt."""
    found = []
    for path in sorted(folder.iterdir()):
        if _is_seed(path):
            names = sorted(one.name for one in path.iterdir())
            found += [f"{path.name}/{n}" for n in names if n not in FOLDERS.values()]
        elif path.name not in _WRITTEN and not _DRAFT.fullmatch(path.name):
            found.append(path.name)
    return found


def _is_seed(path: Path) -> bool:
    named = re.fullmatch(rf"{_SEED}\d+", path.name)
    return named is not None and path.is_dir() and not path.is_symlink()


def _check_use(folder: Path, loaded: LoadedRecipe) -> None:
    """Refuse to replace a folder that is needed."""
    place = folder.resolve()
    if place in (Path.cwd(), *Path.cwd().parents):
        what = "is where you are working"
    elif place in loaded.path.resolve().parents:
        what = f"holds the recipe {loaded.path}"
    else:
        return
    raise TrainingError(
        f"'{folder}' {what}, so it is not replaced. Name another folder: -o FOLDER."
    )


def _check_recipe(folder: Path, loaded: LoadedRecipe) -> None:
    """Refuse to go on with another recipe; what changes no training may differ."""
    try:
        there = _compared(load_recipe(folder / RECIPE).recipe)
    except RecipeError as error:
        raise TrainingError(
            f"'{folder}' cannot be resumed, for its own recipe cannot be read: {error}\nName "
            "another folder: -o FOLDER."
        ) from error
    differing = differences(there, _compared(loaded.recipe))
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise TrainingError(
            f"'{folder}' holds a run of another recipe: {'; '.join(differing[:3])}{more}. Go on "
            "with the recipe as it was, or name another folder: -o FOLDER."
        )


def _compared(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe has to stay for a run to be resumed."""
    return recipe.model_dump(mode="json", by_alias=True, exclude={"finetune": MAY_CHANGE})


def _begin(folder: Path, loaded: LoadedRecipe, *, overwrite: bool) -> None:
    """Empty the folder where asked, and write down what is trained there."""
    recipe, text = folder / RECIPE, dump_recipe(loaded.recipe)
    try:
        if overwrite and folder.exists():
            _empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A file that was written by hand, in a folder that was taken for a run's, stays as it is.
        kept = not overwrite and recipe.exists() and not _is_dumped(recipe)
    except OSError as error:
        raise TrainingError(f"cannot write '{folder}': {error}.") from error
    if not kept:
        write_file(recipe, text)


def _is_dumped(recipe: Path) -> bool:
    """Whether a run wrote the file."""
    try:
        return dump_recipe(load_recipe(recipe).recipe) == recipe.read_text(encoding="utf-8")
    except RecipeError:
        return False


def _empty(folder: Path) -> None:
    """Remove what a run wrote, except the recipe, by which the folder is known for a run's."""
    for path in sorted(folder.iterdir()):
        if path.name == RECIPE:
            continue
        if _is_seed(path):
            for name in FOLDERS.values():
                _remove(path / name)
            path.rmdir()
        elif path.name in _WRITTEN or _DRAFT.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def scales_of(section: DataSection, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the channels of a network's pictures, in [0, 1]."""
    mean, std = normalization(model)
    return section.mean or mean, section.std or std


def spread(split: Split, count: int) -> list[int]:
    """The indices of so many pictures, evenly spaced over the split, the first and last too.

    There are fewer where the split has fewer.
    """
    count = min(count, len(split))
    return [round(i * (len(split) - 1) / max(1, count - 1)) for i in range(count)]


def some_images(
    split: Split,
    count: int,
    size: Sequence[int],
    scales: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """Evenly spaced pictures of a split, brought to one size and normalised: [B, 3, H, W]."""
    found = []
    for index in spread(split, count):
        picture = split.read(index)[0][None].float()
        found.append(
            nn.functional.interpolate(picture, list(size), mode="bilinear", antialias=True)
        )
    return normalized(torch.cat(found).round().clamp(0, 255).byte(), *scales)


def check_classes(model: Callable[..., Any], recipe: Recipe, images: Tensor, classes: int) -> None:
    """See that a network gives logits of as many classes as the data has.

    Args:
        model: the network, in eval mode.
        recipe: for the message.
        images: [B, 3, H, W], normalised.
        classes: of the data.

    Raises:
        TrainingError: it gives something else.
    """
    with torch.inference_mode():
        logits = logits_of(model(images))
    if logits.shape[1] != classes:
        raise TrainingError(
            f"{recipe.model.name} gives {logits.shape[1]} classes and the data has {classes}. Give "
            f"it a new head: model.num_classes={classes}, or mend finetune.data.classes."
        )
