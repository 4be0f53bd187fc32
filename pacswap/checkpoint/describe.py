"""From an upgraded model to the recipe that describes it, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from pacswap.recipes import LoadedRecipe, Recipe, recipe_data
from pacswap.surgery import Group, Plan, default_input
from pacswap.surgery.example import of_size
from pacswap.surgery.skeleton import ExampleInput
from pacswap.zoo import Source, bare, input_size


def recipe_of(plan: Plan, source: Source) -> Recipe:
    """The recipe that describes an upgraded model."""
    return Recipe.model_validate(
        {
            "version": 1,
            "model": {
                "library": source.library,
                "name": source.name,
                "weights": source.weights,
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


def without_files(recipe: Recipe) -> Recipe:
    """A recipe whose weights are no file: it would not be there on another machine."""
    if recipe.model.weights_file is None:
        return recipe
    data = recipe_data(recipe)
    data["model"]["weights"] = None
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
    recipe = loaded.recipe
    size = recipe.model.input_size or input_size(source_of(recipe), model)
    default = default_input(model)
    return default if size is None else of_size(default, size)


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
