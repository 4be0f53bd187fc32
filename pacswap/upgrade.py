"""`apply`: from a recipe's file to an upgraded, verified model, and its report."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pacswap.checkpoint import (
    example_of,
    groups_of,
    new_folder,
    pinned,
    refuse_existing,
    source_of,
    write_model,
)
from pacswap.errors import PlanError, RecipeError
from pacswap.recipes import LoadedRecipe, find_recipe, load_recipe, refuse_auto
from pacswap.report import Report, measure_latency, versions
from pacswap.surgery import Plan, calibrate, pac_layers, plan_groups, rewrite, verify
from pacswap.surgery.example import calibration_batch
from pacswap.surgery.spec import Operation
from pacswap.zoo import build, normalization

Progress = Callable[[str], None]

STEPS = (
    "building the network",
    "planning",
    "swapping",
    "calibrating",
    "verifying the promises",
    "measuring the latency",
    "writing",
)


@dataclass(frozen=True)
class Applied:
    """What `apply` gives.

    Attributes:
        model: the upgraded network, in eval mode.
        plan: what was done.
        report: the figures.
        original: the network before.
    """

    model: nn.Module
    plan: Plan
    report: Report
    original: nn.Module


def apply(
    recipe: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    trust_python: bool = False,
    progress: Progress = lambda step: None,
) -> Applied:
    """Upgrade a network as a recipe says, and prove that nothing broke.

    Args:
        recipe: a file, or the name of a shipped recipe (`quickstart`).
        overrides: `key=value`, such as `model.weights=null` or `swap[0].guidance.channels=8`.
        output: a model directory to write: weights, recipe, `report.json` and `report.md`.
        overwrite: replace an existing model directory.
        trust_python: allow `library: python`, which runs the code that the recipe names.
        progress: called with the name of each of `STEPS` as it begins.

    Returns:
        The upgraded network, its plan and its report.

    Raises:
        RecipeError: the recipe is wrong, or asks for what the network cannot give.
        ModelError: the network cannot be built.
        WeightsError: its weights cannot be had.
        CheckpointError: the output cannot be written.
        VerificationError: a promise is broken; nothing is written then.
    """
    loaded = load_recipe(find_recipe(recipe), overrides)
    if output is not None:
        refuse_existing(Path(output), overwrite=overwrite)
    progress(STEPS[0])
    original = built(loaded, trust_python)
    progress(STEPS[1])
    plan = planned(loaded, original)
    progress(STEPS[2])
    upgraded = rewrite(original, plan)
    progress(STEPS[3])
    images = calibration_images(loaded, original, plan)
    bandwidths = calibrate(upgraded, plan, images)
    progress(STEPS[4])
    extra = _external_guidance(plan, images)
    verification = verify(original, upgraded, images[:2], guidance=extra)
    verification.raise_if_failed()
    progress(STEPS[5])
    latency = measure_latency(original, half_blended(upgraded), images[:1], guidance=extra)
    report = Report(
        str(loaded.path),
        loaded.recipe.model.name,
        plan,
        bandwidths,
        verification,
        latency,
        versions(),
    )
    if output is not None:
        progress(STEPS[6])
        with new_folder(Path(output), overwrite=overwrite) as draft:
            write_model(upgraded, pinned(loaded.recipe, plan), draft)
            (draft / "report.json").write_text(report.as_json(), encoding="utf-8")
            (draft / "report.md").write_text(report.as_markdown(), encoding="utf-8")
    return Applied(upgraded.eval(), plan, report, original.eval())


def plan_recipe(
    recipe: str | os.PathLike[str], overrides: Sequence[str] = (), *, trust_python: bool = False
) -> tuple[LoadedRecipe, Plan]:
    """The plan of a recipe, without weights and without data.

    Raises:
        RecipeError: the recipe is wrong, or asks for what the network cannot give.
        ModelError: the network cannot be built.
    """
    loaded = load_recipe(find_recipe(recipe), overrides)
    model = build(source_of(loaded.recipe), meta=True, trust_python=trust_python)
    return loaded, planned(loaded, model)


def planned(loaded: LoadedRecipe, model: nn.Module) -> Plan:
    """Plan a recipe for a model; every refusal points at its line in the file.

    Raises:
        RecipeError: with every refusal.
    """
    refuse_auto(loaded)
    recipe = loaded.recipe
    name = f"{recipe.model.library} {recipe.model.name}"
    places = [(operation, index) for operation, index, _ in recipe.sections()]

    def command(operation: Operation) -> str:
        option = "" if operation == "swap" else f" --operation {operation}"
        return f"List them: pacswap ls layers {recipe.model.library}/{recipe.model.name}{option}"

    try:
        return plan_groups(
            model,
            groups_of(recipe),
            example_of(loaded, model),
            list_command=command,
            group_name=lambda index: "{}[{}]".format(*places[index]),
        )
    except PlanError as error:
        lines = [] if error.faults else [f"{loaded.path}: {error}"]
        for fault in error.faults:
            path: tuple[str | int, ...] = ("model",)
            spelled = "model"
            if fault.group is not None:
                operation, index = places[fault.group]
                path = (operation, index, *([fault.field] if fault.field else []))
                spelled = f"{operation}[{index}]" + (f".{fault.field}" if fault.field else "")
            lines.append(f"{loaded.where(path)}: {spelled}: {fault.message}")
        head = f"{loaded.path} cannot be carried out on {name}, {len(lines)} faults:\n"
        raise RecipeError((head if len(lines) > 1 else "") + "\n".join(lines)) from error


def calibration_images(loaded: LoadedRecipe, model: nn.Module, plan: Plan) -> Tensor:
    """The images of a recipe's calibration section, or drawn scenes; [B, C, H, W], two or more.

    Raises:
        RecipeError: the section's images cannot be read.
    """
    parameter = next(model.parameters())
    shape = (2, *plan.input_shape[1:])
    section = loaded.recipe.calibration
    if section is None or section.images is None:
        batch = calibration_batch(torch.empty(shape, device="meta"))
        assert isinstance(batch, Tensor)
        return batch.to(parameter)
    mean, std = normalization(model)
    images = _read_images(loaded, section.images, (shape[2], shape[3]))
    mean, std = section.mean or mean, section.std or std
    columns = (1, 3, 1, 1)
    images = (images - torch.tensor(mean).view(columns)) / torch.tensor(std).view(columns)
    if shape[1] != 3:
        images = images.mean(1, keepdim=True).expand(-1, shape[1], -1, -1)
    return images.to(parameter)


def built(loaded: LoadedRecipe, trust_python: bool = False, *, seed: int = 0) -> nn.Module:
    """The recipe's network; what is random in it is the same each time.

    Args:
        loaded: a recipe.
        trust_python: allow `library: python`, which runs the code that the recipe names.
        seed: of random weights.

    Raises:
        ModelError: the network cannot be built.
        WeightsError: its weights cannot be had.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        source = source_of(loaded.recipe)
        folder = folder_of(loaded, ("model", "weights"))
        return build(source, folder=folder, trust_python=trust_python)


def folder_of(loaded: LoadedRecipe, path: tuple[str, ...]) -> Path:
    """Where a relative path in a recipe starts.

    One that was typed on the command line starts where the user is, one in the file at the file.

    Args:
        loaded: a recipe.
        path: of the key, such as `("model", "weights")`.
    """
    return Path() if loaded.where(path).startswith("override ") else loaded.path.parent


def _read_images(
    loaded: LoadedRecipe, given: str | tuple[str, ...], size: tuple[int, int]
) -> Tensor:
    """RGB in 0 … 1, resized; at most 16 of them, at least two."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    where = loaded.where(("calibration", "images"))
    base = loaded.path.parent
    names = (given,) if isinstance(given, str) else given
    paths = []
    for name in names:
        path = base / name
        paths += sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    images, faults = [], []
    for path in paths[:16]:
        try:
            with Image.open(path) as image:
                resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
                images.append(pil_to_tensor(resized).float() / 255)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            faults.append(f"{where}: calibration.images: '{path}' is not a readable image: {error}")
    if not paths:
        faults.append(f"{where}: calibration.images: '{given}' has no files.")
    if faults:
        raise RecipeError("\n".join(faults))
    return torch.stack(images if len(images) > 1 else images * 2)


def _external_guidance(plan: Plan, images: Tensor) -> Tensor | None:
    """Random features in place of an external guidance, which a recipe cannot bring along."""
    if not any(guidance.is_external for guidance in plan.guidances):
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, *images.shape[2:], generator=generator).to(images)


def half_blended(upgraded: nn.Module) -> nn.Module:
    """A copy with every blend at 0.5, which takes the path that a trained network takes."""
    twin = copy.deepcopy(upgraded)
    with torch.no_grad():
        for layer in pac_layers(twin).values():
            layer.blend.fill_(0.5)
    return twin
