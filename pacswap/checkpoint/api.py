"""`save` and `load`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pacswap.checkpoint.added import added_part, load_added, write_added
from pacswap.checkpoint.describe import recipe_of
from pacswap.checkpoint.folders import ADDED, RECIPE, WEIGHTS, new_folder
from pacswap.checkpoint.full import load_full, write_model
from pacswap.checkpoint.remote import PREFIX, fetched
from pacswap.checkpoint.tensors import tensors_of
from pacswap.errors import CheckpointError
from pacswap.recipes import load_recipe
from pacswap.surgery import plan_of, revert
from pacswap.surgery.skeleton import skeleton
from pacswap.zoo import Source, bare, build, identify, why_not_twin


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    added_only: bool = False,
    source: Source | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an upgraded model to a directory that `load` rebuilds it from.

    Args:
        model: an upgraded network.
        folder: the directory to make. It appears whole or not at all.
        added_only: leave out every tensor that is still what it was at the swap, and write a digest
            of it instead: kilobytes, if only what was added has been trained. Where the original
            weights came from is noted if that is known; the network is built once more then, to see
            that they are the same. If it is not known, `load` wants `base=`.
        source: how the original network is built: a mapping with `library`, `name` and `args`; a
            python factory is called, to see that it fits. With `added_only` it may say `weights`.
            Left out, networks of timm and torchvision are recognised by their structure.
        overwrite: replace an existing model directory.

    Returns:
        The directory.

    Raises:
        PlanError: the model was not upgraded by pacswap.
        CheckpointError: the directory exists, cannot be written, or the original network is not
            known.
        ModelError: `source` builds nothing.
        WeightsError: the weights that `source` names cannot be had.
    """
    plan = plan_of(model)
    tensors_of(model)  # refuses what no file has a place for
    plain = revert(skeleton(model))
    known = identify(plain) if source is None else _checked(source, plain)
    if added_only:
        part = added_part(model, plain, known, _given_weights(source))
        with new_folder(Path(folder), overwrite=overwrite) as draft:
            write_added(part, recipe_of(plan, part.source), draft)
        return Path(folder)
    if known is None:
        raise CheckpointError(
            f"cannot tell how this {type(model).__name__} is built, so load could not rebuild it. "
            'Say it: pacswap.save(model, folder, source={"library": "timm", "name": "resnet50", '
            '"args": {"num_classes": 10}}); library is timm, torchvision or python '
            "(package.module:factory)."
        )
    recipe = recipe_of(plan, known)
    with new_folder(Path(folder), overwrite=overwrite) as draft:
        write_model(model, recipe, draft)
    return Path(folder)


def load(
    folder: str | os.PathLike[str],
    *,
    base: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust_python: bool = False,
) -> nn.Module:
    """Rebuild an upgraded model from a directory, without its user's code.

    Args:
        folder: what `save` or `pacswap apply -o` wrote, or `hf-hub:owner/name`, which is downloaded
            from the Hugging Face Hub.
        base: the original network, for a directory that holds only what was added; a copy of it is
            upgraded. Left out, it is built from the recipe with the weights that it names, which
            may be a download. Either way each of its tensors that the directory does not hold must
            be what it was at the swap.
        device: where to put the model.
        trust_python: allow a network that a Python factory builds, which runs its code. A download
            is trusted no more than a file.

    Returns:
        The upgraded model, in eval mode.

    Raises:
        CheckpointError: the directory lacks a file, is damaged, does not fit its own recipe, or was
            made from another base.
        RecipeError: its recipe is wrong.
        ModelError: the network cannot be built.
    """
    is_remote = isinstance(folder, str) and folder.startswith(PREFIX)
    return load_folder(
        fetched(str(folder)) if is_remote else Path(folder),
        base=base,
        device=device,
        trust_python=trust_python,
        trust_files=not is_remote,
    )


def load_folder(
    folder: Path,
    *,
    base: nn.Module | None,
    device: str | torch.device,
    trust_python: bool,
    trust_files: bool,
) -> nn.Module:
    """`load`, of a directory on this machine.

    Args:
        folder: the directory.
        base: as in `load`, like the next two.
        device: where to put the model.
        trust_python: allow a Python factory.
        trust_files: allow the recipe to name a weights file of this machine; not that of a
            download.

    Raises:
        CheckpointError: as in `load`, like the other errors.
    """
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(
            f"device {device!r} is unknown. Use 'cpu', 'cuda' or 'mps'."
        ) from error
    kind = _kind_of(folder)
    loaded = load_recipe(folder / RECIPE)
    if kind == ADDED:
        model = load_added(loaded, folder, base, trust_python=trust_python, trust_files=trust_files)
    elif base is not None:
        raise CheckpointError(
            f"'{folder}' holds the whole model, which takes nothing from a base. Leave out base=."
        )
    else:
        model = load_full(loaded, folder, trust_python=trust_python)
    return model.to(device).eval()


def _kind_of(folder: Path) -> str:
    """Which of the two files a model directory has."""
    has = {name: (folder / name).is_file() for name in (RECIPE, WEIGHTS, ADDED)}
    if has[WEIGHTS] and has[ADDED]:
        raise CheckpointError(
            f"'{folder}' holds a whole model and an added part, {WEIGHTS} and {ADDED}. Remove the "
            "one that is not meant."
        )
    missing = [] if has[RECIPE] else [RECIPE]
    missing += [] if has[WEIGHTS] or has[ADDED] else [WEIGHTS]
    if missing:
        raise CheckpointError(
            f"'{folder}' is not a model directory: it has no {' and no '.join(missing)}. Name one "
            "that pacswap.save or pacswap apply -o wrote."
        )
    return ADDED if has[ADDED] else WEIGHTS


def _given_weights(given: Source | Mapping[str, Any] | None) -> str | None:
    return given.weights if isinstance(given, Source) else (given or {}).get("weights")


def _checked(given: Source | Mapping[str, Any], plain: nn.Module) -> Source:
    """A source that the user gave, if it builds this network."""
    try:
        source = given if isinstance(given, Source) else Source(**given)
    except TypeError as error:
        raise CheckpointError(f"source: expected library, name and args, got {given!r}.") from error
    if not isinstance(source.name, str) or not isinstance(source.args, Mapping):
        raise CheckpointError(f"source: expected a name and a mapping of args, got {given!r}.")
    if not isinstance(source.weights, str | None):
        raise CheckpointError(f"source: expected weights as text or None, got {given!r}.")
    source = bare(source)
    difference = why_not_twin(build(source, meta=True, trust_python=True), plain)
    if difference is not None:
        raise CheckpointError(
            f"source builds another network than this {type(plain).__name__}: {difference}. Mend "
            "its name or args (num_classes?)."
        )
    return source
