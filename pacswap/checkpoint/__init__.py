"""Model directories: weights as safetensors, structure as a recipe; loaded without user code.

`recipe.yaml` says what was built and swapped. Beside it lies `model.safetensors`, the whole model,
or `added.safetensors`, what the swap added and training changed, with a digest of every other
tensor of the network that has to be there.

What the paper's own code has published is read by `pacswap.pacnet`, whose functions are here too.
"""

from pacswap.checkpoint.api import load, save
from pacswap.checkpoint.describe import example_of, groups_of, pinned, recipe_of, source_of
from pacswap.checkpoint.folders import (
    ADDED,
    CLASSES,
    RECIPE,
    WEIGHTS,
    new_folder,
    refuse_existing,
)
from pacswap.checkpoint.full import write_model
from pacswap.pacnet import Fcn8s, load_fcn8s, load_joint_upsample, load_layer

__all__ = [
    "ADDED",
    "CLASSES",
    "RECIPE",
    "WEIGHTS",
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
