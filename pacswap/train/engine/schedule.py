"""When which stage runs, how high its learning rate is, and when the network is measured.

All of it is a function of the number of steps done, so a resumed run goes on as if nothing was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pacswap.recipes import StageSection


@dataclass(frozen=True)
class Stretch:
    """A stage and the steps that it takes: from `begin` up to, not including, `end`."""

    stage: StageSection
    begin: int
    end: int

    @property
    def steps(self) -> int:
        """How long it is."""
        return self.end - self.begin


class Timeline:
    """The stages of a recipe, one after the other, in steps.

    A learning rate is its stage's, times `multiplier`, which timm's schedulers give: counted from
    the stage's own first step, and rising from 0 over the warm-up, which lies on top of the
    schedule and does not delay it. A warm-up's first step therefore moves nothing, as in timm.

    Args:
        stages: of the recipe, one or more.
        steps_per_epoch: how many steps one pass over the pictures takes.

    Example:
        >>> stage = StageSection(name="all", train=("all",), steps=4, lr=0.1, schedule="cosine")
        >>> timeline = Timeline([stage], steps_per_epoch=2)
        >>> [round(timeline.multiplier(step), 3) for step in range(timeline.total)]
        [1.0, 0.854, 0.5, 0.146]
    """

    def __init__(self, stages: Sequence[StageSection], steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.stretches: list[Stretch] = []
        begin = 0
        for stage in stages:
            end = begin + _steps_of(stage, steps_per_epoch)
            self.stretches.append(Stretch(stage, begin, end))
            begin = end
        self.total = begin
        self._schedules: dict[int, Callable[[int], float]] = {}

    def at(self, step: int) -> Stretch:
        """The stage that takes the step after `step` steps."""
        return next(stretch for stretch in self.stretches if step < stretch.end)

    def epoch(self, step: int) -> int:
        """Which pass over the pictures, from 1, the step after `step` steps belongs to."""
        return step // self.steps_per_epoch + 1

    def multiplier(self, step: int) -> float:
        """What the learning rates of the step after `step` steps are multiplied by."""
        stretch = self.at(step)
        if stretch.begin not in self._schedules:
            self._schedules[stretch.begin] = _schedule(stretch, self.steps_per_epoch)
        return self._schedules[stretch.begin](step - stretch.begin)

    def is_measured(self, step: int, every: int) -> bool:
        """Whether the network is measured when `step` steps are done.

        Args:
            step: at least 1.
            every: after how many passes over the pictures; always at a stage's end.
        """
        ends = {stretch.end for stretch in self.stretches}
        return step in ends or (step > 0 and step % (every * self.steps_per_epoch) == 0)

    def is_kept(self, step: int, every: int | None) -> bool:
        """Whether a checkpoint is due when `step` steps are done: once per pass if `every` is None.

        One always is at the end.
        """
        return step == self.total or (step > 0 and step % (every or self.steps_per_epoch) == 0)


def _steps_of(stage: StageSection, steps_per_epoch: int) -> int:
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None  # the recipe has one of the two
    return stage.epochs * steps_per_epoch


def _schedule(stretch: Stretch, steps_per_epoch: int) -> Callable[[int], float]:
    """A scheduler of timm's for a stage, from the number of its steps done to a multiplier."""
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler, StepLRScheduler
    from timm.scheduler.scheduler import Scheduler

    stage = stretch.stage
    unit = 1 if stage.epochs is None else steps_per_epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = {"warmup_t": round(stage.warmup * unit), "t_in_epochs": False, "warmup_prefix": False}
    scheduler: Scheduler
    if stage.schedule == "poly" and stretch.steps > 1:  # timm warns where there is nothing to bend
        power = 0.9 if stage.power is None else stage.power
        scheduler = PolyLRScheduler(optimizer, stretch.steps, power=power, **warmup)
    elif stage.schedule == "cosine" and stretch.steps > 1:
        scheduler = CosineLRScheduler(optimizer, stretch.steps, **warmup)
    elif stage.schedule == "step":
        every = stretch.steps / 3 if stage.decay_every is None else stage.decay_every * unit
        rate = 0.1 if stage.decay_rate is None else stage.decay_rate
        scheduler = StepLRScheduler(optimizer, max(1, round(every)), rate, **warmup)
    else:
        scheduler = StepLRScheduler(optimizer, stretch.steps, 1.0, **warmup)

    def multiplier(step: int) -> float:
        scheduler.step_update(step)
        return float(optimizer.param_groups[0]["lr"])

    return multiplier
