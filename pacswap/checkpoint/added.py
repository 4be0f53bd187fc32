"""Directories that hold only what a swap added and what has changed since.

All other tensors are those of the base, the network that was upgraded. Of these the file has
digests, so that another base is refused and not taken in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pacswap.checkpoint.describe import example_of, groups_of, source_of
from pacswap.checkpoint.folders import ADDED, RECIPE
from pacswap.checkpoint.tensors import put_in, read_tensors, tensors_of, write_tensors
from pacswap.errors import CheckpointError, PacswapError, WeightsError, quoted
from pacswap.fingerprint import digests
from pacswap.recipes import LoadedRecipe, Recipe, dump_recipe
from pacswap.surgery import plan_groups, rewrite
from pacswap.surgery.base import base_of
from pacswap.surgery.checks import why_not_model
from pacswap.surgery.rewrite import PLAN
from pacswap.zoo import Source, build, why_not_twin
from pacswap.zoo.build import lasting
from pacswap.zoo.origin import origins
from pacswap.zoo.weights import why_not_fit


@dataclass(frozen=True)
class AddedPart:
    """What a directory of this kind is made of.

    Attributes:
        source: of the base, with its weights if they are known.
        state: the tensors to write.
        base: the digests of all others.
    """

    source: Source
    state: dict[str, Tensor]
    base: dict[str, str]


def added_part(
    model: nn.Module, plain: nn.Module, source: Source | None, weights: str | None = None
) -> AddedPart:
    """What of an upgraded model its base does not have.

    Args:
        model: an upgraded network.
        plain: its structure before the swap.
        source: what builds that structure; None if it is not known.
        weights: what the user says that the base was built with.

    Raises:
        CheckpointError: the base is not known, or not what the user says.
        WeightsError: the weights that the user names cannot be had.
    """
    state = tensors_of(model)
    before, now = base_of(model), digests(state)
    if before is None or now is None:
        raise CheckpointError(
            f"this {type(model).__name__} does not know what its tensors were at the swap, so what "
            "was added cannot be told from them: they had no values then (the meta device), or it "
            "was loaded from a file that does not say. Save the whole model: added_only=False."
        )
    held = {name for name in state if before.get(name) != now[name]}
    if source is None:
        # Never built: load wants the base itself.
        source = Source("python", f"{type(plain).__module__}:{type(plain).__qualname__}")
    elif weights is not None:
        source = lasting(replace(source, weights=weights), None)
        differing = _differing(source, before)
        _refuse_other_weights(source, differing, before)
        held |= differing & set(state)
    else:
        sizes = {name: t.numel() * t.element_size() for name, t in state.items() if name in before}
        for candidate in origins(plain, source):
            try:
                differing = _differing(candidate, before)
            except PacswapError:  # not here any more, or no network: load wants the base itself
                continue
            # Some may differ: a head that is drawn anew each time, or that was trained before.
            if 2 * sum(sizes.get(name, 0) for name in differing) <= sum(sizes.values()):
                source = candidate
                held |= differing & set(state)
                break
    kept = {name: before[name] for name in state if name not in held}
    return AddedPart(source, {name: state[name] for name in held}, kept)


def _differing(source: Source, base: Mapping[str, str]) -> set[str]:
    """Which tensors of a base are not those of the network that a source builds."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.seed()  # what is random must not come out the same by chance
        twin = build(source, trust_python=True)  # as it was when the base was built
    found = digests(twin.state_dict()) or {}
    return {name for name, digest in base.items() if found.get(name) != digest}


def _refuse_other_weights(source: Source, differing: set[str], base: Mapping[str, str]) -> None:
    if len(differing) == len(base):
        raise CheckpointError(
            f"source: no tensor of the network that was upgraded is that of weights "
            f"'{source.weights}'. Name the weights that it was built with, or leave them out and "
            "give load the network as base=."
        )


def write_added(part: AddedPart, recipe: Recipe, folder: Path) -> None:
    """Put what was added and a recipe into an existing folder.

    Args:
        part: what to write.
        recipe: of the model.
        folder: where to put it.

    Raises:
        CheckpointError: they cannot be written.
    """
    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    write_tensors(part.state, part.base, folder / ADDED)
    # safetensors writes files that nobody else may read
    (folder / ADDED).chmod((folder / RECIPE).stat().st_mode)


def load_added(
    loaded: LoadedRecipe,
    folder: Path,
    base: nn.Module | None,
    *,
    trust_python: bool,
    trust_files: bool = True,
) -> nn.Module:
    """The model of a directory that holds only what was added.

    Args:
        loaded: the directory's recipe.
        folder: the directory.
        base: the network that was upgraded; None builds it.
        trust_python: allow a Python factory to build it.
        trust_files: allow the recipe to name a file of this machine.

    Raises:
        CheckpointError: the file is damaged or does not fit, or the base is another one.
        ModelError: the network cannot be built.
    """
    path = folder / ADDED
    state, notes = read_tensors(path)
    if notes.base is None:
        raise CheckpointError(
            f"'{path}' does not say which base it belongs to. It is damaged or not one of "
            "pacswap's; write the model directory again."
        )
    if base is None:
        plain, what = _built(loaded, folder, trust_python, trust_files), "the network of its recipe"
    else:
        plain, what = _checked(base, loaded), f"this {type(base).__name__}"
    try:
        plan = plan_groups(plain, groups_of(loaded.recipe), example_of(loaded, plain))
        model = rewrite(plain, plan)
    except PacswapError as error:
        raise CheckpointError(f"'{folder}' cannot be put on {what}: {error}") from error
    own = model.state_dict()
    faults = why_not_fit(model, {**{name: own.get(name, _NOTHING) for name in notes.base}, **state})
    if faults:
        raise CheckpointError(
            f"'{path}' does not fit {what} with what the swap adds: {'; '.join(faults)}. "
            f"{_way_out(base)}"
        )
    _check_base(model, notes.base, folder, loaded, base)
    put_in(model, {**own, **state}, path)
    return model


_NOTHING = torch.empty(0)


def _built(loaded: LoadedRecipe, folder: Path, trust_python: bool, trust_files: bool) -> nn.Module:
    """The base as the recipe says."""
    section = loaded.recipe.model
    unknown = section.weights is None or (section.weights_file is not None and not trust_files)
    if unknown:
        raise CheckpointError(
            f"'{folder}' holds only what was added to a {section.name}, and does not say where "
            "that network's weights are. Give the network that was upgraded: "
            "pacswap.load(folder, base=network)."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return build(source_of(loaded.recipe), folder=folder, trust_python=trust_python)
    except WeightsError as error:
        raise CheckpointError(
            f"'{folder}' holds only what was added, and the base cannot be built: {error} Or give "
            "the network that was upgraded: pacswap.load(folder, base=network)."
        ) from error


def _checked(base: nn.Module, loaded: LoadedRecipe) -> nn.Module:
    """A base of the user's, if it may be the network that was upgraded."""
    if not isinstance(base, nn.Module):
        raise CheckpointError(
            f"base: expected the network that was upgraded, got {type(base).__name__}."
        )
    if PLAN in vars(base):
        raise CheckpointError(
            f"base: this {type(base).__name__} is upgraded already, expected the network before. "
            "Take pacswap.revert(base), if its weights are those of before the swap."
        )
    reason = why_not_model(base)
    if reason is not None:
        raise CheckpointError(f"base: cannot upgrade {type(base).__name__}: {reason}.")
    if any(p.is_meta for p in base.parameters()):
        raise CheckpointError(
            f"base: this {type(base).__name__} has no values, it is on the meta device. Give the "
            "network with the weights that it was upgraded with."
        )
    if loaded.recipe.model.library == "python":
        return base
    try:
        twin = build(source_of(loaded.recipe, weights=False), meta=True)
    except PacswapError:  # the library does not have it any more; its tensors are compared anyway
        return base
    difference = why_not_twin(twin, base)
    if difference is not None:
        raise CheckpointError(
            f"base: this {type(base).__name__} is not a {loaded.recipe.model.name} as it was "
            f"upgraded: {difference}. Build it as it was then (num_classes?)."
        )
    return base


def _check_base(
    model: nn.Module,
    expected: Mapping[str, str],
    folder: Path,
    loaded: LoadedRecipe,
    base: nn.Module | None,
) -> None:
    """Raise unless every tensor that the file does not hold is what it was at the swap."""
    found = base_of(model) or {}
    order = [*found, *(name for name in expected if name not in found)]
    differing = [name for name in order if found.get(name) != expected.get(name, found.get(name))]
    if not differing:
        return
    if base is None:
        section = loaded.recipe.model
        what = f"the weights '{section.weights}' of {section.name} are"
    else:
        what = f"this {type(base).__name__} is"
    raise CheckpointError(
        f"'{folder}' belongs to another base: {what} not what was upgraded, {len(differing)} of "
        f"{len(expected)} tensors differ ({', '.join(_some(differing))}). {_way_out(base)}"
    )


def _some(names: list[str]) -> Iterator[str]:
    yield quoted(names[:3])
    if len(names) > 3:
        yield "…"


def _way_out(base: nn.Module | None) -> str:
    if base is None:
        return "Give the network that was upgraded: pacswap.load(folder, base=network)."
    return "Give the network with the weights that it had before the swap."
