"""The training loop: one arm of one recipe, from its first step or its last checkpoint to its end.

Stages, data, random numbers and learning rates follow from the number of steps done, so a run that
was killed and resumed is, on the CPU, bit for bit the run that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch

from pacswap.errors import TrainingError, quoted
from pacswap.train.data.batches import Batch, Batches
from pacswap.train.engine.average import Average
from pacswap.train.engine.begin import checked_groups, identity_of, last_checkpoint, loss_of
from pacswap.train.engine.device import (
    Interrupts,
    kept,
    make_accelerator,
    on_main,
    seed_step,
    synchronised,
)
from pacswap.train.engine.events import Evaluated, Note, Progress, StageBegun, StepDone, ignore
from pacswap.train.engine.groups import ParameterGroup, numbers_in
from pacswap.train.engine.job import Job, Outcome
from pacswap.train.engine.learner import Learner, NotFinite
from pacswap.train.engine.log import Logs
from pacswap.train.engine.losses import Loss
from pacswap.train.engine.schedule import Stretch, Timeline
from pacswap.train.engine.state import Checkpoint, Checkpoints, Position
from pacswap.train.measure.infer import evaluate
from pacswap.train.measure.metrics import Scores

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Job", "Outcome", "train"]


@dataclass
class _Run:
    """All that the loop works with."""

    job: Job
    accelerator: Accelerator
    say: Progress
    timeline: Timeline
    groups: list[list[ParameterGroup]]
    loss: Loss
    checkpoints: Checkpoints
    logs: Logs
    average: Average | None
    position: Position
    scores: Scores | None = None  # of the weights as they are
    learner: Learner | None = None


class _Feed:
    """The batches, read ahead for as long as they are asked for in order."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._rows: Iterator[Batch] = iter(())
        self._next: int | None = None

    def at(self, step: int) -> Batch:
        """This process's part of a step."""
        if step != self._next:
            self.close()
            self._rows = self._batches.from_step(step)
        self._next = step + 1
        return next(self._rows)

    def close(self) -> None:
        """End the processes that read ahead."""
        if isinstance(self._rows, Generator):
            self._rows.close()


def train(job: Job, *, resume: bool = False, progress: Progress = ignore) -> Outcome:
    """Take a network through the stages of a recipe.

    Every process of `accelerate launch` or `torchrun` calls this with the same job; the first one
    alone writes and reports. Global random numbers are moved.

    Args:
        job: what to train. Afterwards its model holds the last weights, or their moving average
            where the recipe has one; modes and `requires_grad` are as they were.
        resume: go on from the last whole checkpoint of the job's folder.
        progress: told of every step, measure and stage.

    Raises:
        TrainingError: the recipe asks for what cannot be done here, the folder holds a run and
            `resume` is not set, its checkpoints are of another training, a loss is not finite, or
            the disk is full. Whatever could be checked was, before the first step.
        DataError: there are fewer pictures than a batch takes.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the step was finished and a checkpoint written.
    """
    section = job.section
    accelerator = make_accelerator(section.precision)
    say = progress if accelerator.is_main_process else ignore
    groups = checked_groups(job, accelerator)
    batches = Batches(
        job.train,
        section.data.transforms,
        batch_size=section.batch_size,
        seed=job.seed,
        mean=job.mean,
        std=job.std,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=section.workers,
        device=accelerator.device,
    )
    timeline = Timeline(section.stages, batches.steps_per_epoch)
    checkpoints = Checkpoints(job.folder, section.checkpoint.keep, identity_of(job))
    found = last_checkpoint(job, checkpoints, accelerator, resume, say)
    position = Position() if found is None else found.position
    loss = loss_of(job, accelerator)
    model = job.model.to(accelerator.device)
    logs = Logs(
        job.folder,
        rates=list(dict.fromkeys(group.key for some in groups for group in some)),
        classes=job.train.classes,
        step=position.step,
        measured=position.measured,
        main=accelerator.is_main_process,
    )
    together = accelerator.num_processes > 1 and section.batch_norm == "train"
    on_cuda = accelerator.device.type == "cuda"
    _warn(logs, apart=together and not on_cuda, say=say)
    with logs, kept(model), synchronised(model, wanted=together and on_cuda):
        average = None if section.ema is None else Average(model, section.ema)
        run = _Run(
            job, accelerator, say, timeline, groups, loss, checkpoints, logs, average, position
        )
        with Interrupts() as interrupts, closing(_Feed(batches)) as feed:
            try:
                _loop(run, feed, found, interrupts)
            except torch.cuda.OutOfMemoryError as error:
                raise TrainingError(_out_of_memory(run)) from error
        if _is_asked(run, interrupts):  # during the last step or measure
            _end(run, interrupts)
        scores = _final_scores(run)
        if average is not None:
            average.copy_to_model()
    accelerator.wait_for_everyone()
    return Outcome(
        scores, tuple(position.history), timeline.total, position.seconds, position.best_step
    )


def _loop(run: _Run, feed: _Feed, found: Checkpoint | None, interrupts: Interrupts) -> None:
    """From where the run stands to its end."""
    section, timeline, position = run.job.section, run.timeline, run.position
    if found is not None:
        run.job.model.load_state_dict(found.tensors["model"])
        if run.average is not None:
            run.average.load(found.tensors["average"])
    current: Stretch | None = None
    changed = False
    while True:
        due = timeline.is_measured(position.step, section.evaluate.every)
        paused = due and position.measured < position.step
        if paused:
            _measure(run)
            changed = True
        due = timeline.is_kept(position.step, section.checkpoint.every)
        if changed and (due or position.best_step == position.step):
            _keep(run)
            changed = False
        if position.step == timeline.total:
            return
        if paused and _is_asked(run, interrupts):
            if changed:
                _keep(run)
            _end(run, interrupts)
        stretch = timeline.at(position.step)
        groups = run.groups[timeline.stretches.index(stretch)]
        if not groups:
            run.say(Note(_passed_over(stretch, run.job.arm)))
            position.step = position.measured = stretch.end  # as the network is, it was
            changed = True
            if position.step < timeline.total and _is_asked(run, interrupts):
                _keep(run)
                _end(run, interrupts)
            continue
        began = time.perf_counter()
        batch = feed.at(position.step)
        if stretch is not current:
            run.learner = _learner(run, stretch, groups, batch, found)
            current, found = stretch, None
        assert run.learner is not None
        seed_step(run.job.seed, position.step, run.accelerator.process_index)
        try:
            value, asked = run.learner.step(
                batch, timeline.multiplier(position.step), interrupts.received is not None
            )
        except NotFinite as broken:
            raise TrainingError(_not_finite(run, stretch, broken)) from broken
        if run.average is not None:
            run.average.update()
        position.step += 1
        run.scores, changed = None, True
        position.seconds += time.perf_counter() - began
        _report(run, stretch, value, time.perf_counter() - began)
        if asked:
            _keep(run)
            _end(run, interrupts)


def _learner(
    run: _Run,
    stretch: Stretch,
    groups: list[ParameterGroup],
    batch: Batch,
    found: Checkpoint | None,
) -> Learner:
    """A stage's learner, as it was in the checkpoint if that is from within the stage."""
    model, section = run.job.model, run.job.section
    run.learner = None  # its memory is needed
    # Arms without what was added pass such a stage over, and their norms with it.
    rest = run.job.roles.added.issuperset(name for group in groups for name in group.names)
    learner = Learner(model, section, run.loss, run.accelerator, groups, batch, norms_rest=rest)
    scaler = run.accelerator.scaler
    if found is not None and found.position.step > stretch.begin:
        learner.optimizer.load_state_dict(found.tensors["optimizer"])
    if found is not None and scaler is not None:
        scaler.load_state_dict(found.tensors["scaler"])
    learning = numbers_in(model, learner.groups)
    run.say(StageBegun(stretch.stage.name, stretch.begin, stretch.end, learning))
    if learner.idle:
        more = f" and {len(learner.idle) - 3} more" if len(learner.idle) > 3 else ""
        run.say(
            Note(
                f"stage '{stretch.stage.name}' trains {quoted(learner.idle[:3])}{more}, on which "
                "the loss does not depend; they stay as they are.",
                warning=True,
            )
        )
    return learner


def _report(run: _Run, stretch: Stretch, value: float, seconds: float) -> None:
    assert run.learner is not None
    step, rates = run.position.step, run.learner.rates()
    run.logs.step(step, stretch.stage.name, run.timeline.epoch(step - 1), value, rates)
    run.say(StepDone(step, run.timeline.total, value, max(rates.values()), seconds))


def _measured_scores(run: _Run) -> Scores:
    job = run.job
    with nullcontext() if run.average is None else run.average.applied():
        return evaluate(
            job.model,
            job.val,
            job.section.evaluate,
            mean=job.mean,
            std=job.std,
            device=run.accelerator.device,
            accelerator=run.accelerator,
        )


def _measure(run: _Run) -> None:
    """Measure the network, and see whether it is the best so far."""
    position, timeline = run.position, run.timeline
    run.scores = _measured_scores(run)
    found = run.scores.as_dict()
    position.measured = position.step
    position.history.append({"step": position.step, **found})
    miou = run.scores.miou
    best = math.isfinite(miou) and (position.best_score is None or miou > position.best_score)
    if best:
        position.best_step, position.best_score = position.step, miou
    last = position.step - 1
    run.logs.measured(position.step, timeline.at(last).stage.name, timeline.epoch(last), found)
    run.say(Evaluated(position.step, run.scores, best))


def _keep(run: _Run) -> None:
    """Write a checkpoint, after the logs that lead up to it."""
    model, step = run.job.model.state_dict(), run.position.step
    broken = [n for n, t in model.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise TrainingError(
            f"{quoted(broken[:3])} of the network are no longer finite after step {step}; they are "
            f"not kept. {_way_on(run)}"
        )
    on_main(run.accelerator, lambda: _write(run))


def _write(run: _Run) -> None:
    run.logs.sync()
    scaler = run.accelerator.scaler
    tensors = {
        "model": run.job.model.state_dict(),
        "average": {} if run.average is None else run.average.tensors,
        "optimizer": {} if run.learner is None else run.learner.optimizer.state_dict(),
        "scaler": {} if scaler is None else scaler.state_dict(),
    }
    run.checkpoints.write(run.position, tensors, run.scores)


def _is_asked(run: _Run, interrupts: Interrupts) -> bool:
    """Whether any process was asked to end."""
    mine = torch.tensor(float(interrupts.received is not None), device=run.accelerator.device)
    return bool(run.accelerator.reduce(mine, "sum").item() > 0)


def _end(run: _Run, interrupts: Interrupts) -> NoReturn:
    """End as the user has asked, after a checkpoint was written."""
    step = run.position.step
    raise KeyboardInterrupt(
        f"{interrupts.received or 'another process was asked to end'}: ended after step {step} of "
        f"{run.timeline.total}. Resume goes on from '{run.checkpoints.path(step)}'."
    )


def _final_scores(run: _Run) -> Scores:
    """The scores of the network as it is."""
    if run.scores is not None:
        return run.scores
    kept_there = run.checkpoints.scores_file(run.position.step)
    return Scores.read(kept_there) if kept_there.exists() else _measured_scores(run)


def _warn(logs: Logs, *, apart: bool, say: Progress) -> None:
    if logs.lacks_board:
        say(
            Note(
                "tensorboard is not installed, so there are no TensorBoard logs; the CSV files "
                'have all figures. Install it: pip install "pacswap[train]"'
            )
        )
    if apart:
        say(
            Note(
                "batch norms gather their statistics in each process apart, because only CUDA "
                "devices can share them; the result depends on the number of processes. Set "
                "batch_norm: frozen to avoid that.",
                warning=True,
            )
        )


def _passed_over(stretch: Stretch, arm: str) -> str:
    return (
        f"stage '{stretch.stage.name}' is passed over in the {arm} arm: it trains "
        f"{', '.join(stretch.stage.train)}, which this network lacks."
    )


def _not_finite(run: _Run, stretch: Stretch, broken: NotFinite) -> str:
    return f"stage '{stretch.stage.name}', step {run.position.step + 1}: {broken}. {_way_on(run)}"


def _out_of_memory(run: _Run) -> str:
    section = run.job.section
    return (
        f"{run.accelerator.device} has too little memory for {section.batch_size} pictures in "
        f"{section.accumulate} parts, at step {run.position.step + 1}. Raise "
        f"finetune.accumulate, lower batch_size or take a smaller crop, for a new run in a new "
        f"folder. "
        f"{run.checkpoints.last_words()}"
    )


def _way_on(run: _Run) -> str:
    words = run.checkpoints.last_words()
    return f"Lower lr, or set clip_grad, for a new run in a new folder. {words}"
