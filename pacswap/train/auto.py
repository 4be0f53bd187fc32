"""`layers: {auto: …}` of a recipe, decided: a probe of the user's data chooses the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from pacswap.errors import PlanError, RecipeError
from pacswap.recipes import ChoosingQuerySection, LoadedRecipe, Recipe, auto_of, recipe_data
from pacswap.surgery import Group
from pacswap.train.candidates import named
from pacswap.train.probe import Loss, Probed, Progress, pairs, probe


def resolve_auto(
    loaded: LoadedRecipe,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    most: int = 4,
    progress: Progress = lambda done, of, what: None,
    report: Callable[[str, Probed], None] = lambda group, probed: None,
) -> LoadedRecipe:
    """The recipe with every `auto` replaced by the layers that a probe ranks first.

    Each such group is probed with its own guidance and kernel, among the layers that match its
    query and that no other group claims. A recipe without `auto` is returned as it is, and no
    batch is looked at.

    Args:
        loaded: a recipe.
        model: its network, before any swap; left as it was.
        batches: as for `probe`, like the rest up to `progress`.
        loss: from the model's output and the masks to a scalar.
        most: how many batches are taken.
        progress: of each probe.
        report: called with the group's path (`swap[0]`) and what its probe found.

    Raises:
        RecipeError: nothing can be chosen; with the place in the file.
        TrainingError: there is no batch, or the loss cannot be used.
    """
    data = recipe_data(loaded.recipe)
    sections = list(loaded.recipe.sections())
    waiting = [section for section in sections if auto_of(section[2].layers) is not None]
    if not waiting:
        return loaded
    taken = pairs(batches, most)
    example = taken[0][0]
    claimed: set[str] = set()
    for operation, _, section in sections:
        if auto_of(section.layers) is None:
            # What is wrong with these is said, in its place, when the recipe is planned.
            found, _ = named(model, section.to_group(operation), example)
            claimed.update(target.name for target in found)
    for operation, index, section in waiting:
        assert isinstance(section.layers, ChoosingQuerySection)
        auto = section.layers.auto
        assert auto is not None
        path = f"{operation}[{index}]"
        guidance, kernel = section.guidance.to_spec(), section.kernel.to_spec()
        group = Group(section.layers.to_spec(), guidance, kernel, operation=operation)
        try:
            matching, faults = named(model, group, example)
            free = [target.name for target in matching if target.name not in claimed]
            if matching and not free:
                faults.append("other groups claim every layer that matches.")
            if faults:
                raise PlanError(" ".join(faults))
            probed = probe(
                model,
                taken,
                loss,
                operation=operation,
                layers=free,
                guidance=guidance,
                kernel=kernel,
                most=most,
                progress=progress,
            )
            chosen = probed.best(auto.top, auto.max_cost)
        except PlanError as error:
            where = loaded.where((operation, index, "layers", "auto"))
            raise RecipeError(f"{where}: {path}.layers.auto: {error}") from error
        report(path, probed)
        claimed.update(chosen)
        data[operation][index]["layers"] = list(chosen)
    return replace(loaded, recipe=Recipe.model_validate(data))
