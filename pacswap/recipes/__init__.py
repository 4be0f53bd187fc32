"""Recipes: what to swap and how to fine-tune, as YAML that is checked before anything runs."""

from pacswap.recipes.finetune import (
    ControlSection,
    DataSection,
    FinetuneSection,
    LossSection,
    OptimizerSection,
    StageSection,
    TransformSection,
)
from pacswap.recipes.library import copy_recipe, find_recipe, shipped_recipes, summary
from pacswap.recipes.loader import LoadedRecipe, load_recipe
from pacswap.recipes.schema import (
    CalibrationSection,
    GuidanceSection,
    KernelSection,
    LayerQuerySection,
    ModelSection,
    Recipe,
    SwapSection,
    dump_recipe,
    recipe_schema,
)

__all__ = [
    "CalibrationSection",
    "ControlSection",
    "DataSection",
    "FinetuneSection",
    "GuidanceSection",
    "KernelSection",
    "LayerQuerySection",
    "LoadedRecipe",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "Recipe",
    "StageSection",
    "SwapSection",
    "TransformSection",
    "copy_recipe",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "recipe_schema",
    "shipped_recipes",
    "summary",
]
