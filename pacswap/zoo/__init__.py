"""Building models by name; the only importer of timm and torchvision.models."""

from pacswap.zoo.build import (
    Source,
    bare,
    build,
    has_trained_head,
    input_size,
    model_names,
    normalization,
)
from pacswap.zoo.identify import identify, why_not_twin
from pacswap.zoo.weights import load_weights_file, read_state_dict

__all__ = [
    "Source",
    "bare",
    "build",
    "has_trained_head",
    "identify",
    "input_size",
    "load_weights_file",
    "model_names",
    "normalization",
    "read_state_dict",
    "why_not_twin",
]
