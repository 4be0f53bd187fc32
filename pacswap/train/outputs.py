"""What a segmentation network returns: logits, alone or among other things."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pacswap.errors import TrainingError


def logits_of(output: Any) -> Tensor:
    """The logits in what a segmentation network returned.

    Args:
        output: a tensor, a mapping with `out` or `logits` (torchvision, transformers), an object
            with `logits`, or a tuple or list that begins with them.

    Returns:
        [B, C, H, W].

    Raises:
        TrainingError: there are none.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("out", output.get("logits"))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else None
        raise TrainingError(
            f"the network returned {shape or type(output).__name__}, expected logits [B, classes, "
            "H, W]: a tensor, or a mapping with 'out' or 'logits'. Fine-tuning is for segmentation "
            "networks."
        )
    return found


def auxiliary_of(output: Any) -> Tensor | None:
    """The logits of an auxiliary head, [B, C, H, W], which torchvision's FCN and DeepLabV3 return.

    None where there is no such head.
    """
    found = output.get("aux") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None
