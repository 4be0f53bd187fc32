"""φ, by which a difference of features becomes a distance, and its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Measure: TypeAlias = Literal["square", "absolute", "asymmetric"]

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square,
    "absolute": torch.abs,
    "asymmetric": lambda difference: difference.relu().square(),
}

DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda difference: 2 * difference,
    "absolute": torch.sign,
    "asymmetric": lambda difference: 2 * difference.relu(),
}
