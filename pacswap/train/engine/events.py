"""What a training tells whoever looks on; it prints nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from pacswap.train.measure.metrics import Scores


@dataclass(frozen=True)
class StageBegun:
    """A stage begins, or goes on after a resume.

    Attributes:
        name: the stage's.
        begin: the steps done before it.
        end: the steps done when it ends.
        learning: how many numbers learn in it.
    """

    name: str
    begin: int
    end: int
    learning: int


@dataclass(frozen=True)
class StepDone:
    """A step was taken.

    Attributes:
        step: how many are done.
        total: of the whole training.
        loss: over all pictures of the step, before it.
        lr: the highest learning rate among the parameters.
        seconds: that it took, reading included.
    """

    step: int
    total: int
    loss: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """The network was measured.

    Attributes:
        step: how many steps were done.
        scores: the measures.
        best: whether its mIoU is the highest so far.
    """

    step: int
    scores: Scores
    best: bool


@dataclass(frozen=True)
class Note:
    """Something that the user should know, in a sentence or two.

    Attributes:
        text: the words.
        warning: whether the report should repeat them, for the result depends on it.
    """

    text: str
    warning: bool = False


Event: TypeAlias = StageBegun | StepDone | Evaluated | Note
Progress: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Look away."""
