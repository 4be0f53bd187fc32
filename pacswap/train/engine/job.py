"""What a training is given, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from pacswap.recipes import FinetuneSection
from pacswap.train.engine.groups import Roles
from pacswap.train.measure.metrics import Scores

if TYPE_CHECKING:
    from pacswap.train.data.split import Split


@dataclass
class Job:
    """What to train, on what, and where to keep it.

    Attributes:
        model: the network; `train` changes it in place.
        section: of the recipe.
        train: the pictures to learn from.
        val: the pictures to measure on.
        roles: of the network's parameters.
        seed: where all randomness starts; a recipe's own seed counts only through this.
        folder: of this run; several processes and machines share it.
        mean: of each channel, of pictures in [0, 1].
        std: of each channel, of pictures in [0, 1].
        arm: what the network is in a comparison, such as `upgraded` or `control`.
    """

    model: nn.Module
    section: FinetuneSection
    train: Split
    val: Split
    roles: Roles
    seed: int
    folder: Path
    mean: Sequence[float]
    std: Sequence[float]
    arm: str = "upgraded"


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        scores: of the network at the end, on the pictures to measure on.
        history: all measures, as `Scores.as_dict` gives them, with `step`.
        steps: of the whole training.
        seconds: spent in steps, over all resumes.
        best_step: after which mIoU was highest.
    """

    scores: Scores
    history: tuple[dict[str, Any], ...]
    steps: int
    seconds: float
    best_step: int | None
