"""Stages in time: lengths, learning rates, and when the network is measured and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from pacswap.recipes import StageSection
from pacswap.train.engine.schedule import Timeline

LR = 0.037
STEPS = 12

# A recipe's keys, and the same for timm's own factory.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "poly": ({"schedule": "poly"}, {"sched": "poly", "decay_rate": 0.9}),
    "poly_power_2": ({"schedule": "poly", "power": 2.0}, {"sched": "poly", "decay_rate": 2.0}),
    "poly_warm": (
        {"schedule": "poly", "warmup": 4.0},
        {"sched": "poly", "decay_rate": 0.9, "warmup_epochs": 4},
    ),
    "cosine": ({"schedule": "cosine"}, {"sched": "cosine"}),
    "cosine_warm": ({"schedule": "cosine", "warmup": 3.0}, {"sched": "cosine", "warmup_epochs": 3}),
    "step": ({"schedule": "step"}, {"sched": "step", "decay_epochs": 4, "decay_rate": 0.1}),
    "step_5": (
        {"schedule": "step", "decay_every": 5.0, "decay_rate": 0.5, "warmup": 2.0},
        {"sched": "step", "decay_epochs": 5, "decay_rate": 0.5, "warmup_epochs": 2},
    ),
}


def stage(name: str = "one", **keys: Any) -> StageSection:
    length = {} if "epochs" in keys else {"steps": STEPS}
    return StageSection.model_validate({"name": name, "train": ["all"], "lr": LR, **length, **keys})


def timms(options: dict[str, Any]) -> list[float]:
    """The learning rates that timm's factory gives, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler, _ = create_scheduler_v2(
        optimizer, num_epochs=STEPS, step_on_epochs=True, warmup_lr=0.0, **options
    )
    rates = []
    for step in range(STEPS):
        scheduler.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_timms(name):
    keys, options = SCHEDULES[name]
    timeline = Timeline([stage(**keys)], steps_per_epoch=5)
    rates = [LR * timeline.multiplier(step) for step in range(STEPS)]
    assert rates == pytest.approx(timms(options), rel=1e-15, abs=0)


def test_the_comparison_sees_another_schedule():
    timeline = Timeline([stage(schedule="poly", power=0.91)], steps_per_epoch=5)
    rates = [LR * timeline.multiplier(step) for step in range(STEPS)]
    assert rates != pytest.approx(timms(SCHEDULES["poly"][1]), rel=1e-15, abs=0)


def test_a_constant_rate_is_constant_to_the_bit():
    timeline = Timeline([stage()], steps_per_epoch=5)
    assert {timeline.multiplier(step) for step in range(STEPS)} == {1.0}


def test_a_constant_rate_warms_up():
    timeline = Timeline([stage(warmup=4.0)], steps_per_epoch=5)
    rates = [timeline.multiplier(step) for step in range(6)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_epochs_are_steps_of_a_pass():
    stages = [stage(epochs=2, warmup=0.5, schedule="step", decay_every=1.0, decay_rate=0.5)]
    timeline = Timeline(stages, steps_per_epoch=4)
    assert timeline.total == 8
    rates = [timeline.multiplier(step) for step in range(8)]
    assert rates == [0.0, 0.5, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("schedule", ["constant", "poly", "cosine", "step"])
def test_a_stage_of_one_step(schedule):
    timeline = Timeline([stage(schedule=schedule, steps=1)], steps_per_epoch=5)
    assert [timeline.multiplier(0)] == [1.0]


def test_each_stage_counts_from_its_own_first_step():
    stages = [stage("a", steps=3), stage("b", steps=4, schedule="poly", power=1.0)]
    timeline = Timeline(stages, steps_per_epoch=5)
    assert [timeline.at(step).stage.name for step in range(7)] == list("aaabbbb")
    assert [timeline.multiplier(step) for step in range(7)] == [1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [stretch.steps for stretch in timeline.stretches] == [3, 4]


def test_a_multiplier_depends_on_nothing_asked_before():
    stages = [stage("a", schedule="cosine", warmup=2.0), stage("b", schedule="poly")]
    asked = Timeline(stages, steps_per_epoch=5)
    order = torch.randperm(asked.total).tolist()
    shuffled = {step: asked.multiplier(step) for step in order}
    for step in range(asked.total):
        assert Timeline(stages, steps_per_epoch=5).multiplier(step) == shuffled[step]


def test_when_the_network_is_measured():
    timeline = Timeline([stage("a", steps=7), stage("b", epochs=2)], steps_per_epoch=3)
    assert [s for s in range(14) if timeline.is_measured(s, every=1)] == [3, 6, 7, 9, 12, 13]
    assert [s for s in range(14) if timeline.is_measured(s, every=3)] == [7, 9, 13]


def test_when_a_checkpoint_is_due():
    timeline = Timeline([stage("a", steps=7), stage("b", epochs=2)], steps_per_epoch=3)
    assert [s for s in range(14) if timeline.is_kept(s, every=None)] == [3, 6, 9, 12, 13]
    assert [s for s in range(14) if timeline.is_kept(s, every=5)] == [5, 10, 13]


def test_passes_are_counted_from_1():
    timeline = Timeline([stage(steps=7)], steps_per_epoch=3)
    assert [timeline.epoch(step) for step in range(7)] == [1, 1, 1, 2, 2, 2, 3]
