"""How a training begins, goes on and ends: refusals, resumes, interrupts and broken numbers."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_jobs import (
    Net,
    events,
    job,
    losses,
    moved,
    notes,
    refused,
    rows,
    stage,
    upgraded,
    weights,
)

from pacswap.errors import DataError, TrainingError
from pacswap.train.engine import device
from pacswap.train.engine.device import Interrupts
from pacswap.train.engine.events import Event, Note, StepDone
from pacswap.train.engine.groups import roles_of
from pacswap.train.engine.loop import Job, train
from pacswap.train.engine.state import Checkpoints


def test_a_folder_that_holds_a_run(tmp_path):
    train(job(tmp_path))
    assert refused(job(tmp_path)) == (
        f"'{tmp_path}' holds a training that has reached step 6. Resume it (--resume, or "
        "resume=True), or name another folder."
    )


def test_a_folder_that_holds_logs_only(tmp_path):
    (tmp_path / "log.csv").write_text("step\n")
    assert refused(job(tmp_path)).startswith(
        f"'{tmp_path}' holds a training without a checkpoint. Resume it"
    )
    (tmp_path / "log.csv").unlink()
    (tmp_path / "recipe.yaml").write_text("")
    train(job(tmp_path))


def test_a_resume_of_nothing(tmp_path):
    _, said = events(job(tmp_path), resume=True)
    assert notes(said) == [
        f"'{tmp_path}' has no checkpoint to resume from: training begins at step 0."
    ]
    assert len(losses(tmp_path)) == 6


def test_a_resume_of_what_is_done(tmp_path):
    outcome = train(job(tmp_path, ema=0.5))
    before = (tmp_path / "log.csv").read_text()
    model = upgraded()
    again, said = events(job(tmp_path, model, ema=0.5), resume=True)
    assert [type(event) for event in said] == [Note]
    assert again.scores.miou == outcome.scores.miou
    assert torch.equal(again.scores.tallies, outcome.scores.tallies)
    assert (again.history, again.steps, again.best_step, again.seconds) == (
        outcome.history,
        outcome.steps,
        outcome.best_step,
        outcome.seconds,
    )
    assert (tmp_path / "log.csv").read_text() == before
    average = torch.load(tmp_path / "checkpoints" / "step-0000006" / "state.pt")["average"]
    assert moved(average, model) == set()


def test_a_truncated_checkpoint_costs_a_few_steps(tmp_path):
    plain = upgraded()
    train(job(tmp_path / "plain", plain))
    train(job(tmp_path / "run"))
    newest = tmp_path / "run" / "checkpoints" / "step-0000006"
    os.truncate(newest / "state.pt", 100)
    model = upgraded()
    _, said = events(job(tmp_path / "run", model), resume=True)
    assert notes(said)[0].startswith(f"The checkpoint '{newest}' is damaged (state.pt has 100 byte")
    assert notes(said)[1] == f"going on from '{newest.with_name('step-0000004')}'."
    assert moved(weights(plain), model) == set()
    for name in ("log.csv", "val.csv"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "plain" / name).read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": [stage(lr=0.1)]}, "finetune.stages[0].lr is 0.05 there and 0.1 here"),
        ({"seed": 5}, "seed is 0 there and 5 here"),
        ({"arm": "control"}, 'arm is "upgraded" there and "control" here'),
        ({"model": Net()}, 'network is "'),
        (
            {"data": {"format": "scenes", "count": [9, 2], "resize": [24, 32]}},
            "finetune.data.count[0] is 8 there and 9 here; train pictures is ",
        ),
    ],
    ids=["recipe", "seed", "arm", "network", "pictures"],
)
def test_a_resume_of_another_training(tmp_path, change, words):
    train(job(tmp_path, stages=[stage()]))
    keys = {"stages": [stage()]} | change
    if "model" in change:
        keys["roles"] = roles_of(change["model"], None)
    given = job(tmp_path, **keys)
    path = tmp_path / "checkpoints" / "step-0000003"
    found = refused(given, resume=True)
    assert found.startswith(f"the checkpoint '{path}' is of another training: {words}")


def test_what_may_change_at_a_resume(tmp_path):
    train(job(tmp_path))
    train(job(tmp_path, workers=1, checkpoint={"every": 1, "keep": 5}), resume=True)


class Breaking(Net):
    """Gives no numbers from some step on."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__()
        self.left, self.how = at, how

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        if self.training:
            self.left -= 1
        if self.left >= 0:
            return logits
        if self.how == "loss":
            return logits * torch.nan
        return logits + (0 * self.classifier.weight.sum()).sqrt()  # 0 · ∞ on the way back


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_no_number(tmp_path, how):
    model = Breaking(4, how)  # the first one is the look at what the loss depends on
    given = job(
        tmp_path,
        model,
        roles=roles_of(model, None),
        checkpoint={"every": 2},
        stages=[stage(steps=9)],
    )
    with pytest.raises(TrainingError) as raised:
        train(given)
    what = "the loss is nan" if how == "loss" else r"the gradient is nan (the loss is "
    checkpoint = tmp_path / "checkpoints" / "step-0000002"
    words = str(raised.value)
    assert words.startswith(f"stage 'all', step 4: {what}")
    pictures = [f"'{sample.name}'" for sample in given.train.samples]
    assert sum(name in words for name in pictures) == 4
    assert words.endswith(
        ". Lower lr, or set clip_grad, for a new run in a new folder. The last checkpoint is "
        f"'{checkpoint}'; resume goes on from it."
    )
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    model = Breaking(99, how)
    again = job(
        tmp_path,
        model,
        roles=roles_of(model, None),
        checkpoint={"every": 2},
        stages=[stage(steps=9)],
    )
    train(again, resume=True)
    assert len(losses(tmp_path)) == 9


def test_weights_that_are_no_numbers_are_not_kept(tmp_path):
    class Spoilt(Net):
        def forward(self, input: Tensor) -> Tensor:
            if self.training:
                self.stem[1].running_var.fill_(torch.inf)
            return super().forward(input)

    model = Spoilt()
    with pytest.raises(TrainingError) as raised:
        given = job(tmp_path, model, roles=roles_of(model, None), checkpoint={"every": 1})
        train(given)
    assert str(raised.value) == (
        "'stem.1.running_var' of the network are no longer finite after step 1; they are not kept. "
        "Lower lr, or set clip_grad, for a new run in a new folder. There is no earlier checkpoint."
    )


def test_a_full_disk(tmp_path, monkeypatch):
    plain, written = os.fsync, Checkpoints.write

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self: Checkpoints, position: Any, *args: Any) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync if position.step == 4 else plain)
            return written(self, position, *args)

    monkeypatch.setattr(Checkpoints, "write", write)
    with pytest.raises(TrainingError) as raised:
        train(job(tmp_path))
    folder = tmp_path / "checkpoints"
    assert str(raised.value) == (
        f"cannot write the checkpoint '{folder / 'step-0000004'}': No space left on device. Free "
        f"some space. The last checkpoint is '{folder / 'step-0000002'}'; resume goes on from it."
    )
    assert sorted(path.name for path in folder.iterdir()) == ["best.json", "step-0000002"]
    monkeypatch.undo()
    train(job(tmp_path), resume=True)
    assert len(losses(tmp_path)) == 6


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_with_a_checkpoint(tmp_path, name):
    plain = upgraded()
    train(job(tmp_path / "plain", plain))

    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), getattr(signal, name))

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as raised:
        train(job(tmp_path / "run"), progress=interrupt)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000004"
    assert str(raised.value) == (
        f"{name}: ended after step 4 of 6. Resume goes on from '{checkpoint}'."
    )
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    # It was not measured at step 4, and is now.
    assert [row["step"] for row in rows(tmp_path / "run" / "val.csv")] == ["2"]
    model = upgraded()
    train(job(tmp_path / "run", model), resume=True)
    assert moved(weights(plain), model) == set()
    for file in ("log.csv", "val.csv"):
        assert (tmp_path / "run" / file).read_text() == (tmp_path / "plain" / file).read_text()


def test_a_second_interrupt_ends_at_once(monkeypatch):
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr(device.time, "monotonic", lambda: next(clock))
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on the same wish
        assert interrupts.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt) as raised:
            os.kill(os.getpid(), signal.SIGTERM)
    assert str(raised.value) == (
        "SIGINT and then SIGTERM: ended at once. Resume goes on from the last checkpoint."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 runs on this machine")
def test_fp16_needs_cuda(tmp_path):
    assert refused(job(tmp_path, precision="fp16")) == (
        "finetune.precision: fp16 needs a CUDA device, and this runs on cpu. Take fp32 or bf16."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"optimizer": {"name": "adamm"}},
            "finetune.optimizer.name: timm has no optimizer 'adamm'",
        ),
        (
            {"accumulate": 5},
            "finetune.batch_size: 4 pictures cannot be divided among 1 processes and 5 parts. "
            "Raise it to 5, or lower accumulate, for a new run in a new folder.",
        ),
        (
            {"loss": {"class_weights": [1.0, 2.0]}},
            "finetune.loss.class_weights: expected one weight for each of the 6 classes, got 2.",
        ),
        (
            {"stages": [stage(train=["nose.*"])]},
            "stage 'all': train: 'nose.*' matches no parameter",
        ),
    ],
    ids=["optimizer", "accumulate", "weights", "pattern"],
)
def test_faults_are_found_before_anything_starts(tmp_path, keys, words):
    assert refused(job(tmp_path, **keys)).startswith(words)
    assert list(tmp_path.iterdir()) == []


def test_fewer_pictures_than_a_batch(tmp_path):
    with pytest.raises(DataError):
        train(job(tmp_path, batch_size=9))
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_other_classes(tmp_path):
    model = Net()
    model.classifier = nn.Conv2d(8, 3, 1)
    assert refused(job(tmp_path, model, roles=roles_of(model, None))).startswith(
        "the network gives 3 classes and the data has 6."
    )


def test_one_picture_at_a_time_is_too_few_for_a_batch_norm(tmp_path):
    class Pooled(Net):
        def forward(self, input: Tensor) -> Tensor:
            pooled = self.stem[1](self.stem[0](input).mean((2, 3), keepdim=True))
            return super().forward(input) + pooled.mean()

    def given(**keys: Any) -> Job:
        model = Pooled()
        folder = tmp_path / str(len(keys))
        return job(folder, model, roles=roles_of(model, None), accumulate=4, **keys)

    assert refused(given()) == (
        "a batch norm of the network needs more than 1 picture at a time, and each of 1 processes "
        "takes 1 in each of 4 parts of a step. Raise finetune.batch_size, lower accumulate, or set "
        "batch_norm: frozen, for a new run in a new folder."
    )
    train(given(batch_norm="frozen"))


def test_too_little_memory(tmp_path):
    class Large(Net):
        def forward(self, input: Tensor) -> Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    model = Large()
    assert refused(job(tmp_path, model, roles=roles_of(model, None))) == (
        "cpu has too little memory for 4 pictures in 1 parts, at step 1. Raise "
        "finetune.accumulate, lower batch_size or take a smaller crop, for a new run in a new "
        "folder. There is no earlier checkpoint."
    )
