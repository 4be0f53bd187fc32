"""Before the first step: whether the recipe can run here, and where to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pacswap.errors import TrainingError
from pacswap.train.engine.device import on_main
from pacswap.train.engine.events import Note, Progress
from pacswap.train.engine.groups import ParameterGroup, groups_of_stages
from pacswap.train.engine.job import Job
from pacswap.train.engine.log import LOG, VAL
from pacswap.train.engine.losses import Loss, balanced_weights
from pacswap.train.engine.optimizers import make_optimizer
from pacswap.train.engine.state import Checkpoint, Checkpoints

if TYPE_CHECKING:
    from accelerate import Accelerator

# What of `finetune` may change when a run is resumed, as pydantic excludes it.
MAY_CHANGE: dict[str, Any] = {
    "workers": True,
    "checkpoint": True,
    "control": True,
    "data": {"root": True},
    "evaluate": {"pictures": True},
}


def checked_groups(job: Job, accelerator: Accelerator) -> list[list[ParameterGroup]]:
    """Who learns in each stage.

    Raises:
        TrainingError: something of the recipe cannot run here or on this network.
    """
    section = job.section
    parts = accelerator.num_processes * section.accumulate
    if section.batch_size < parts:
        raise TrainingError(
            f"finetune.batch_size: {section.batch_size} pictures cannot be divided among "
            f"{accelerator.num_processes} processes and {section.accumulate} parts. Raise it to "
            f"{parts}, or lower accumulate, for a new run in a new folder."
        )
    groups = groups_of_stages(job.model, job.roles, section)
    for some in groups:
        if some:
            make_optimizer(job.model, section.optimizer, some)
    given = section.loss.class_weights
    weights = torch.tensor(given) if isinstance(given, tuple) else None
    Loss(section.loss, len(job.train.classes), job.train.ignore_index, weights)
    return groups


def loss_of(job: Job, accelerator: Accelerator) -> Loss:
    """The recipe's loss; for balanced weights all masks are read."""
    section, split = job.section.loss, job.train
    classes, weights = len(split.classes), None
    if section.class_weights == "balanced":
        masks = (split.read(index)[1] for index in range(len(split)))
        weights = balanced_weights(masks, classes, split.ignore_index)
    elif section.class_weights is not None:
        weights = torch.tensor(section.class_weights, dtype=torch.float64)
    if weights is not None and accelerator.device.type == "mps":
        weights = weights.float()
    return Loss(section, classes, split.ignore_index, weights)


def identity_of(job: Job) -> dict[str, Any]:
    """What a checkpoint has to agree with, and what it may differ in left out."""
    recipe = job.section.model_dump(mode="json", exclude=MAY_CHANGE | {"seed": True})
    shapes = [
        f"{name} {list(tensor.shape)} {tensor.dtype}"
        for name, tensor in job.model.state_dict().items()
    ]
    return {
        "finetune": recipe,
        "seed": job.seed,
        "arm": job.arm,
        "network": _digest(shapes),
        "train pictures": _digest([sample.name for sample in job.train.samples]),
        "val pictures": _digest([sample.name for sample in job.val.samples]),
    }


def _digest(words: Sequence[str]) -> str:
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    return f"{len(words)} ({digest[:12]})"


def last_checkpoint(
    job: Job, checkpoints: Checkpoints, accelerator: Accelerator, resume: bool, say: Progress
) -> Checkpoint | None:
    """Where to go on from; the first process looks, and all do as it says.

    Raises:
        TrainingError: the folder holds a run and `resume` is not set, or its checkpoints are of
            another training or all damaged.
    """
    found: list[Checkpoint] = []

    def look() -> int | None:
        newest = _found(job, checkpoints, resume, say)
        if newest is None:
            return None
        found.append(newest)
        return newest.position.step

    step = on_main(accelerator, look)
    if step is None:
        return None
    return found[0] if found else checkpoints.of_all(step)


def _found(job: Job, checkpoints: Checkpoints, resume: bool, say: Progress) -> Checkpoint | None:
    there = [name for name in (LOG, VAL) if (job.folder / name).exists()]
    steps = checkpoints.steps()
    if not resume and (there or steps):
        reached = f"that has reached step {steps[-1]}" if steps else "without a checkpoint"
        raise TrainingError(
            f"'{job.folder}' holds a training {reached}. Resume it (--resume, or resume=True), or "
            "name another folder."
        )
    checkpoints.sweep()
    found = checkpoints.newest(lambda words: say(Note(words)))
    if found is not None:
        checkpoints.forget_after(found.position.step)
        say(Note(f"going on from '{found.path}'."))
    elif resume:
        say(Note(f"'{job.folder}' has no checkpoint to resume from: training begins at step 0."))
    return found
