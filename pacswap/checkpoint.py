"""Model directories: weights as safetensors, structure as a recipe; loaded without user code.

What the paper's own code has published is read by `pacswap.pacnet`, whose functions are here too.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pacswap.errors import CheckpointError, PacswapError, quoted
from pacswap.pacnet import Fcn8s, load_fcn8s, load_joint_upsample, load_layer
from pacswap.recipes import LoadedRecipe, Recipe, dump_recipe, load_recipe, recipe_data
from pacswap.surgery import Group, Plan, plan_groups, plan_of, revert, rewrite
from pacswap.surgery.skeleton import ExampleInput, skeleton
from pacswap.zoo import Source, bare, build, identify, why_not_twin
from pacswap.zoo.weights import why_not_fit

__all__ = [
    "Fcn8s",
    "example_of",
    "groups_of",
    "load",
    "load_fcn8s",
    "load_joint_upsample",
    "load_layer",
    "new_folder",
    "pinned",
    "recipe_of",
    "refuse_existing",
    "save",
    "source_of",
    "write_model",
]

WEIGHTS = "model.safetensors"
RECIPE = "recipe.yaml"
CLASSES = "classes.json"
REPORTS = ("report.json", "report.md", CLASSES)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    source: Source | Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an upgraded model to a directory that `load` rebuilds it from.

    Args:
        model: an upgraded network.
        folder: the directory to make. It appears whole or not at all.
        source: how the original network is built: a mapping with `library`, `name` and `args`; a
            python factory is called, to see that it fits. Left out, networks of timm and
            torchvision are recognised by their structure.
        overwrite: replace an existing model directory.

    Returns:
        The directory.

    Raises:
        PlanError: the model was not upgraded by pacswap.
        CheckpointError: the directory exists, cannot be written, or the original network is not
            known.
        ModelError: `source` builds nothing.
    """
    plan = plan_of(model)
    plain = revert(skeleton(model))
    source = identify(plain) if source is None else _checked(source, plain)
    if source is None:
        raise CheckpointError(
            f"cannot tell how this {type(model).__name__} is built, so load could not rebuild it. "
            'Say it: pacswap.save(model, folder, source={"library": "timm", "name": "resnet50", '
            '"args": {"num_classes": 10}}); library is timm, torchvision or python '
            "(package.module:factory)."
        )
    recipe = recipe_of(plan, source)
    with new_folder(Path(folder), overwrite=overwrite) as draft:
        write_model(model, recipe, draft)
    return Path(folder)


def load(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    trust_python: bool = False,
) -> nn.Module:
    """Rebuild an upgraded model from a directory, without network and without its user's code.

    Args:
        folder: what `save` or `pacswap apply -o` wrote.
        device: where to put the model.
        trust_python: allow a network that a Python factory builds, which runs its code.

    Returns:
        The upgraded model, in eval mode.

    Raises:
        CheckpointError: the directory lacks a file, is damaged, or does not fit its own recipe.
        RecipeError: its recipe is wrong.
        ModelError: the network cannot be built.
    """
    folder = Path(folder)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise CheckpointError(
            f"device {device!r} is unknown. Use 'cpu', 'cuda' or 'mps'."
        ) from error
    missing = [name for name in (RECIPE, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"'{folder}' is not a model directory: it has no {' and no '.join(missing)}. Name one "
            "that pacswap.save or pacswap apply -o wrote."
        )
    loaded = load_recipe(folder / RECIPE)
    plain = build(source_of(loaded.recipe, weights=False), trust_python=trust_python)
    try:
        plan = plan_groups(plain, groups_of(loaded.recipe), example_of(loaded, plain))
    except PacswapError as error:
        raise CheckpointError(
            f"'{folder}' cannot be rebuilt with the installed libraries: {error}"
        ) from error
    model = rewrite(plain, plan)
    _load_weights(model, folder / WEIGHTS)
    return model.to(device).eval()


def recipe_of(plan: Plan, source: Source) -> Recipe:
    """The recipe that describes an upgraded model."""
    return Recipe.model_validate(
        {
            "version": 1,
            "model": {
                "library": source.library,
                "name": source.name,
                "weights": None,
                "args": dict(source.args),
                "num_classes": source.num_classes,
                "input_size": list(plan.input_shape[1:]),
            },
            **_sections(plan),
        }
    )


def pinned(recipe: Recipe, plan: Plan) -> Recipe:
    """A recipe with its patterns replaced by the layers that they matched, and its image size."""
    data = recipe_data(recipe) | _sections(plan)
    data["model"]["input_size"] = list(plan.input_shape[1:])
    return Recipe.model_validate(data)


def source_of(recipe: Recipe, *, weights: bool = True) -> Source:
    """What a recipe's model section builds."""
    model = recipe.model
    source = Source(model.library, model.name, model.weights, model.args, model.num_classes)
    return source if weights else bare(source)


def groups_of(recipe: Recipe) -> tuple[Group, ...]:
    """What a recipe asks for, in the order of its operations."""
    return tuple(section.to_group(operation) for operation, _, section in recipe.sections())


def example_of(loaded: LoadedRecipe, model: nn.Module) -> ExampleInput:
    """What the model takes, on meta, of the size that a recipe, the library or the model names."""
    from pacswap.surgery import default_input
    from pacswap.surgery.example import of_size
    from pacswap.zoo import input_size

    recipe = loaded.recipe
    size = recipe.model.input_size or input_size(source_of(recipe), model)
    default = default_input(model)
    return default if size is None else of_size(default, size)


def write_model(model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """Put weights and recipe into an existing folder.

    Raises:
        CheckpointError: they cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    try:
        save_model(model, str(folder / WEIGHTS), metadata={"format": "pt"})
    except SafetensorError as error:
        raise CheckpointError(f"cannot write the model: {error}. Is the disk full?") from error
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the model's tensors cannot be stored as safetensors: {error}"
        ) from error
    # safetensors writes files that nobody else may read
    (folder / WEIGHTS).chmod((folder / RECIPE).stat().st_mode)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `target` on leaving, whole, or vanishes on an error.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or cannot be made.
    """
    refuse_existing(target, overwrite=overwrite)
    place = target.resolve()  # behind a link, which stays
    draft = _beside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        _sync(draft)
        refuse_existing(target, overwrite=overwrite)  # another process may have made it meanwhile
        if overwrite and place.exists():
            _replace(place, draft)
        else:
            draft.rename(place)
    except OSError as error:
        raise CheckpointError(f"cannot write '{target}': {error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise unless `target` may be made.

    Raises:
        CheckpointError: something is there already.
    """
    if not target.exists():
        return
    if target.resolve() == Path.cwd():
        raise CheckpointError(
            f"'{target}' is the working directory, which cannot be replaced. Name another one."
        )
    inside = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not target.is_dir() or (inside and not inside >= {RECIPE, WEIGHTS}):
        raise CheckpointError(
            f"'{target}' exists and is not a model directory; it is not replaced. Name another one."
        )
    strange = sorted(inside - {RECIPE, WEIGHTS, *REPORTS})
    if overwrite and strange:
        raise CheckpointError(
            f"'{target}' also holds {quoted(strange[:3])}, which pacswap did not write; it is not "
            "replaced. Name another directory."
        )
    if inside and not overwrite:
        raise CheckpointError(
            f"'{target}' exists. Name another directory, or replace it: --overwrite on the command "
            "line, overwrite=True in Python."
        )


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _replace(target: Path, draft: Path) -> None:
    """Put a finished folder in the place of an old one, which is kept until then."""
    old = _beside(target)
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            old.rename(target)
        if target.exists():  # if not, the old one stays where it is, under its hidden name
            shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make sure that the files' contents are on the disk before their folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _load_weights(model: nn.Module, path: Path) -> None:
    """Strictly, in the dtypes that were saved."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            aliases = {k: v for k, v in (file.metadata() or {}).items() if k != "format"}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path}' is not a readable safetensors file: {error}. It may be truncated; write the "
            "model directory again."
        ) from error
    state.update({name: state[kept] for name, kept in aliases.items() if kept in state})
    faults = why_not_fit(model, state)
    if faults:
        raise CheckpointError(
            f"'{path}' does not fit the network of its recipe: {'; '.join(faults)}. The library "
            "may have changed since; install the version that wrote it."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name in state and state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(state)


def _checked(given: Source | Mapping[str, Any], plain: nn.Module) -> Source:
    """A source that the user gave, if it builds this network."""
    try:
        source = given if isinstance(given, Source) else Source(**given)
    except TypeError as error:
        raise CheckpointError(f"source: expected library, name and args, got {given!r}.") from error
    if not isinstance(source.name, str) or not isinstance(source.args, Mapping):
        raise CheckpointError(f"source: expected a name and a mapping of args, got {given!r}.")
    source = bare(source)
    difference = why_not_twin(build(source, meta=True, trust_python=True), plain)
    if difference is not None:
        raise CheckpointError(
            f"source builds another network than this {type(plain).__name__}: {difference}. Mend "
            "its name or args (num_classes?)."
        )
    return source


def _sections(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """The groups of a plan as the sections of a recipe."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for group in plan.record().groups:
        sections.setdefault(group.operation, []).append(_section(group))
    return sections


def _section(group: Group) -> dict[str, Any]:
    guidance = asdict(group.guidance)
    source = guidance.pop("source")
    guidance["from"] = list(source) if isinstance(source, tuple) else source
    layers = group.layers if isinstance(group.layers, tuple) else (group.layers,)
    section = {"layers": list(layers), "guidance": guidance, "kernel": asdict(group.kernel)}
    if group.filter is not None:
        section["filter"] = asdict(group.filter)
    if group.crf is not None:
        section["crf"] = asdict(group.crf)
    return section
