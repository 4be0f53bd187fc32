"""Which layers, which guidance: the probe on a recipe's own data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap.recipes import FinetuneSection, LoadedRecipe, find_recipe, load_recipe
from pacswap.surgery.spec import Operation
from pacswap.train.auto import resolve_auto
from pacswap.train.data import Split, open_data
from pacswap.train.data.batches import Batches
from pacswap.train.data.scan import scan
from pacswap.train.outputs import logits_of
from pacswap.train.probe import Probed, probe
from pacswap.train.setting import (
    check_classes,
    makes_batches_of_one_size,
    scales_of,
    section_of,
)
from pacswap.upgrade import built, folder_of

Progress = Callable[[int, int, str], None]


def probe_recipe(
    recipe: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    operation: Operation = "swap",
    layers: str = "*",
    guidance: Sequence[str] | None = None,
    most: int = 4,
    trust_python: bool = False,
    progress: Progress = lambda done, of, what: None,
) -> Probed:
    """Rank every eligible layer of a recipe's network by |dL/dblend| on the recipe's data.

    Args:
        recipe: a file with a `finetune` section, or the name of a shipped recipe. What it swaps is
            not looked at.
        overrides: `key=value`.
        operation: what would be done.
        layers: among which layers.
        guidance: candidates; None is the image and the last layer at each resolution.
        most: how many batches are taken.
        trust_python: allow `library: python`.
        progress: as for `probe`.

    Raises:
        RecipeError: the recipe is wrong.
        DataError: pictures are missing, damaged or mislabelled.
        PlanError: no layer can be changed.
    """
    loaded = load_recipe(find_recipe(recipe), overrides)
    section = section_of(loaded)
    train, _ = open_data(section.data, folder_of(loaded, ("finetune", "data", "root")))
    scan(train, one_size=makes_batches_of_one_size(section))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = built(loaded, trust_python, seed=section.seed).to(device)
    scales = scales_of(section.data, model)
    batches = _batches(section, train, scales, device)
    check_classes(model.eval(), loaded.recipe, next(batches)[0][:1], len(train.classes))
    return probe(
        model,
        batches,
        loss_of(train),
        operation=operation,
        layers=layers,
        guidance=None if guidance is None else list(guidance),
        most=most,
        progress=progress,
    )


def decided(
    loaded: LoadedRecipe,
    section: FinetuneSection,
    train: Split,
    model: nn.Module,
    report: Callable[[str, Probed], None],
) -> LoadedRecipe:
    """The recipe with every `auto` replaced by the layers that a probe ranks first.

    Args:
        loaded: the recipe.
        section: its `finetune`.
        train: the pictures to learn from.
        model: the network before any swap; left as it was.
        report: called with a group's path and what its probe found.

    Raises:
        RecipeError: nothing can be chosen.
    """
    scales = scales_of(section.data, model)
    batches = _batches(section, train, scales, next(model.parameters()).device)
    return resolve_auto(loaded, model, batches, loss_of(train), report=report)


def loss_of(split: Split) -> Callable[[Any, Tensor], Tensor]:
    """Cross entropy over the pixels that count."""

    def loss(output: Any, masks: Tensor) -> Tensor:
        logits = logits_of(output)
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear")
        return F.cross_entropy(logits, masks, ignore_index=split.ignore_index)

    return loss


def _batches(
    section: FinetuneSection,
    train: Split,
    scales: tuple[Sequence[float], Sequence[float]],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pictures that training would begin with; read in this process."""
    batches = Batches(
        train,
        section.data.transforms,
        batch_size=section.batch_size,
        seed=section.seed,
        mean=scales[0],
        std=scales[1],
        device=device,
    )
    for batch in batches.from_step(0):
        yield batch.images, batch.masks
