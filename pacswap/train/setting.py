"""What all trainings of a run share, checked before the first one begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from pacswap.errors import RecipeError, TrainingError, quoted
from pacswap.recipes import DataSection, FinetuneSection, LoadedRecipe, Recipe, dump_recipe
from pacswap.train.arms import FOLDERS
from pacswap.train.data.batches import normalized
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, open_data
from pacswap.train.engine.device import make_accelerator
from pacswap.train.engine.events import Event
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
    if accelerator.is_main_process:
        check_folder(folder, loaded, resume=resume, overwrite=overwrite)
    accelerator.wait_for_everyone()
    say(Phase("looking for pictures"))
    train, val = open_data(section.data, folder_of(loaded, ("finetune", "data", "root")))
    if accelerator.is_main_process:
        for split in (train, val):
            what = "learn from" if split is train else "measure on"
            say(Phase(f"reading {len(split)} pictures to {what}"))
            scan(split)
        _begin(folder, loaded, overwrite=overwrite)
    accelerator.wait_for_everyone()
    return Setting(loaded, section, train, val, folder, accelerator, trust_python, say)


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
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"'{folder}' is a file. Name another folder: -o FOLDER.")
    known = {RECIPE, MODEL, *REPORTS, CURVES, PICTURES}
    strange = [n for n in inside if n not in known and not n.startswith((_SEED, "."))]
    if inside and (strange or RECIPE not in inside):
        named = quoted(strange[:3]) or quoted(inside[:3])
        raise TrainingError(
            f"'{folder}' holds {named}, which no run of pacswap wrote. Name another folder: "
            "-o FOLDER."
        )
    if inside and not (resume or overwrite):
        raise TrainingError(
            f"'{folder}' holds a run. Go on with it: --resume. Or replace it: --overwrite. Or name "
            "another folder: -o FOLDER."
        )
    if inside and not overwrite and _text(folder / RECIPE) != dump_recipe(loaded.recipe):
        raise TrainingError(
            f"'{folder}' holds a run of another recipe, so it cannot go on with this one. "
            f"Compare with {folder / RECIPE}, which has every default written out, or name "
            "another folder: -o FOLDER."
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _begin(folder: Path, loaded: LoadedRecipe, *, overwrite: bool) -> None:
    """Empty the folder where asked, and write down what is trained there."""
    try:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write '{folder}': {error}.") from error
    if not (folder / RECIPE).exists():
        write_file(folder / RECIPE, dump_recipe(loaded.recipe))


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
