"""Directories that hold the whole model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pacswap.checkpoint.describe import example_of, groups_of, source_of
from pacswap.checkpoint.folders import RECIPE, WEIGHTS
from pacswap.checkpoint.tensors import Notes, put_in, read_tensors, saying_why, tensors_of
from pacswap.errors import CheckpointError, PacswapError
from pacswap.recipes import LoadedRecipe, Recipe, dump_recipe
from pacswap.surgery import plan_groups, rewrite
from pacswap.surgery.base import base_of, remember_base
from pacswap.zoo import build
from pacswap.zoo.origin import remember_origin
from pacswap.zoo.weights import why_not_fit


def write_model(model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """Put weights and recipe into an existing folder.

    Args:
        model: an upgraded network.
        recipe: of it.
        folder: where to put them.

    Raises:
        CheckpointError: they cannot be written.
    """
    from safetensors.torch import save_model

    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    tensors_of(model)
    with saying_why():
        save_model(model, str(folder / WEIGHTS), metadata=Notes(base_of(model)).as_metadata())
    # safetensors writes files that nobody else may read
    (folder / WEIGHTS).chmod((folder / RECIPE).stat().st_mode)


def load_full(loaded: LoadedRecipe, folder: Path, *, trust_python: bool) -> nn.Module:
    """The model of a directory that holds all of it.

    Raises:
        CheckpointError: a file is damaged, or does not fit the recipe.
        ModelError: the network cannot be built.
    """
    path = folder / WEIGHTS
    source = source_of(loaded.recipe)
    plain = build(source_of(loaded.recipe, weights=False), trust_python=trust_python)
    try:
        plan = plan_groups(plain, groups_of(loaded.recipe), example_of(loaded, plain))
    except PacswapError as error:
        raise CheckpointError(
            f"'{folder}' cannot be rebuilt with the installed libraries: {error}"
        ) from error
    model = rewrite(plain, plan)
    state, notes = read_tensors(path)
    faults = why_not_fit(model, state)
    if faults:
        raise CheckpointError(
            f"'{path}' does not fit the network of its recipe: {'; '.join(faults)}. The library "
            "may have changed since; install the version that wrote it."
        )
    put_in(model, state, path)
    remember_base(model, notes.base)
    remember_origin(model, source, folder)
    return model
