"""Recipes: what to swap and how to fine-tune, as YAML that is checked before anything runs."""

from pacswap.recipes.data import DataSection, TransformSection
from pacswap.recipes.finetune import (
    CheckpointSection,
    ControlSection,
    EvaluateSection,
    FinetuneSection,
    LossSection,
    OptimizerSection,
    StageSection,
)
from pacswap.recipes.groups import (
    AppendSection,
    CRFSection,
    FilterSection,
    GroupSection,
    GuidanceSection,
    KernelSection,
    PairwiseSection,
    PoolSection,
    SwapSection,
    UpsampleSection,
)
from pacswap.recipes.layers import (
    AutoSection,
    ChoosingQuerySection,
    LayerQuerySection,
    auto_of,
    refuse_auto,
)
from pacswap.recipes.library import copy_recipe, find_recipe, shipped_recipes, summary
from pacswap.recipes.loader import LoadedRecipe, load_recipe
from pacswap.recipes.schema import (
    OPERATIONS,
    CalibrationSection,
    ModelSection,
    Recipe,
    dump_recipe,
    recipe_data,
    recipe_schema,
)

__all__ = [
    "OPERATIONS",
    "AppendSection",
    "AutoSection",
    "CRFSection",
    "CalibrationSection",
    "CheckpointSection",
    "ChoosingQuerySection",
    "ControlSection",
    "DataSection",
    "EvaluateSection",
    "FilterSection",
    "FinetuneSection",
    "GroupSection",
    "GuidanceSection",
    "KernelSection",
    "LayerQuerySection",
    "LoadedRecipe",
    "LossSection",
    "ModelSection",
    "OptimizerSection",
    "PairwiseSection",
    "PoolSection",
    "Recipe",
    "StageSection",
    "SwapSection",
    "TransformSection",
    "UpsampleSection",
    "auto_of",
    "copy_recipe",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "recipe_data",
    "recipe_schema",
    "refuse_auto",
    "shipped_recipes",
    "summary",
]
