"""Checkpoints: whole, of the right training, or refused; and the logs that go with them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pacswap.errors import TrainingError
from pacswap.train.engine.average import Average
from pacswap.train.engine.log import Table
from pacswap.train.engine.state import Checkpoints, Position

IDENTITY = {"finetune": {"stages": [{"lr": 0.1, "name": "all"}], "batch_size": 4}, "seed": 0}
TENSORS = {"model": {"w": torch.arange(5.0)}, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}


def make(folder: Path, keep: int = 2, **identity: Any) -> Checkpoints:
    return Checkpoints(folder, keep, IDENTITY | identity)


def filled(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = make(folder, keep)
    for step in steps:
        checkpoints.write(Position(step), TENSORS)
    return checkpoints


def seen(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def refused(checkpoints: Checkpoints) -> str:
    with pytest.raises(TrainingError) as raised:
        checkpoints.newest(pytest.fail)
    return str(raised.value)


def test_what_is_written_is_read(tmp_path):
    position = Position(7, 6, 3, 0.25, 1.5, [{"step": 3, "miou": 0.25, "none": None}])
    path = make(tmp_path).write(position, TENSORS)
    assert path == tmp_path / "checkpoints" / "step-0000007"
    found = make(tmp_path).newest(pytest.fail)
    assert (found.path, found.position) == (path, position)
    assert torch.equal(found.tensors["model"]["w"], TENSORS["model"]["w"])
    assert torch.equal(found.tensors["optimizer"]["state"][0]["m"], torch.ones(3))


def test_nothing_is_there_yet(tmp_path):
    assert make(tmp_path).newest(pytest.fail) is None


def test_the_last_and_the_best_stay(tmp_path):
    checkpoints = make(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        checkpoints.write(Position(step, best_step=best, best_score=best / 10), TENSORS)
    assert seen(tmp_path) == ["best.json", "step-0000002", "step-0000004", "step-0000005"]
    best = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert best == {"step": 2, "miou": 0.2}


def test_the_same_step_again(tmp_path):
    checkpoints = filled(tmp_path, 3)
    checkpoints.write(Position(3, measured=3), TENSORS)
    assert checkpoints.newest(pytest.fail).position.measured == 3
    assert seen(tmp_path) == ["best.json", "step-0000003"]


@pytest.mark.parametrize("name", ["state.pt", "position.json"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.95])
def test_a_truncated_one_is_passed_over(tmp_path, name, left):
    checkpoints = filled(tmp_path, 3, 6)
    file = checkpoints.path(6) / name
    os.truncate(file, int(file.stat().st_size * left))
    said: list[str] = []
    assert checkpoints.newest(said.append).position.step == 3
    (words,) = said
    assert words.startswith(f"The checkpoint '{checkpoints.path(6)}' is damaged ({name}")
    assert words.endswith(" It is passed over for the one before.")


def test_the_words_for_a_changed_file(tmp_path):
    checkpoints = filled(tmp_path, 3, 6)
    file = checkpoints.path(6) / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    checkpoints.newest(said.append)
    assert said == [
        f"The checkpoint '{checkpoints.path(6)}' is damaged (state.pt has {len(content)} bytes "
        f"that are not the {len(content)} that were written). It is passed over for the one before."
    ]


def test_all_are_damaged(tmp_path):
    checkpoints = filled(tmp_path, 3)
    (checkpoints.path(3) / "state.pt").unlink()
    with pytest.raises(TrainingError) as raised:
        checkpoints.newest(lambda words: None)
    assert str(raised.value) == (
        f"'{checkpoints.folder}' has no checkpoint that can be read: The checkpoint "
        f"'{checkpoints.path(3)}' is damaged (state.pt: No such file or directory). Name another "
        "run folder, or remove this one to begin again."
    )


def test_one_of_another_training(tmp_path):
    filled(tmp_path, 3)
    other = {"stages": [{"lr": 0.2, "name": "all"}], "batch_size": 4, "ema": 0.9}
    path = tmp_path / "checkpoints" / "step-0000003"
    assert refused(make(tmp_path, finetune=other, seed=1)) == (
        f"the checkpoint '{path}' is of another training: finetune.stages[0].lr is 0.1 there and "
        "0.2 here; finetune.ema is null there and 0.9 here; seed is 0 there and 1 here. Go on with "
        "the recipe as it was, or name another run folder."
    )


def test_many_differences_are_counted(tmp_path):
    filled(tmp_path, 3)
    words = refused(make(tmp_path, a=1, b=2, c=3, d=4, e=5))
    assert "c is null there and 3 here; and 2 more. Go on" in words


def test_one_of_another_version(tmp_path):
    checkpoints = filled(tmp_path, 3)
    file = checkpoints.path(3) / "position.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    assert refused(checkpoints) == (
        f"the checkpoint '{checkpoints.path(3)}' has format 2, this pacswap reads 1. Use the "
        "version that wrote it, or name another run folder."
    )


def test_no_code_is_run_from_a_checkpoint(tmp_path):
    checkpoints = make(tmp_path)
    checkpoints.write(Position(3), {"model": nn.Linear(1, 1)})  # pickled by its class
    said: list[str] = []
    with pytest.raises(TrainingError):
        checkpoints.newest(said.append)
    assert "damaged (state.pt: Weights only load failed" in said[0]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch, number):
    checkpoints = filled(tmp_path, 3)
    before = seen(tmp_path)
    calls = iter(range(1, 100))

    def fsync(handle: int) -> None:
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrainingError) as raised:
        checkpoints.write(Position(6), TENSORS)
    path, last = checkpoints.path(6), 3 if number < 4 else 6
    assert str(raised.value) == (
        f"cannot write the checkpoint '{path}': No space left on device. Free some space. The last "
        f"checkpoint is '{checkpoints.path(last)}'; resume goes on from it."
    )
    assert checkpoints.newest(pytest.fail).position.step == last
    assert seen(tmp_path) == (before if number < 4 else [*before, "step-0000006"])


def test_what_a_killed_process_leaves_is_swept(tmp_path):
    checkpoints = filled(tmp_path, 3)
    for name in (".step-0000006.ab12", ".gone-step-0000001.cd34", ".old-step-0000003.ef56"):
        (checkpoints.folder / name).mkdir()
        (checkpoints.folder / name / "state.pt").write_bytes(b"half")
    (checkpoints.folder / ".best.json.0123").write_text("{")
    checkpoints.sweep()
    assert seen(tmp_path) == ["best.json", "step-0000003"]


def test_one_that_was_being_replaced_comes_back(tmp_path):
    checkpoints = filled(tmp_path, 3)
    checkpoints.path(3).rename(checkpoints.folder / ".old-step-0000003.ab12")
    checkpoints.sweep()
    assert checkpoints.newest(pytest.fail).position.step == 3


def test_later_ones_are_forgotten(tmp_path):
    checkpoints = filled(tmp_path, 3, 6, 9)
    checkpoints.forget_after(3)
    assert checkpoints.steps() == [3]


def table(path: Path, step: int, *rows: int) -> str:
    made = Table(path, ["step", "loss"], step)
    for row in rows:
        made.add({"step": row, "loss": repr(row / 10)})
    made.close()
    return path.read_text()


def test_a_table_is_cut_back(tmp_path):
    path = tmp_path / "log.csv"
    assert table(path, 0, 1, 2, 3) == "step,loss\n1,0.1\n2,0.2\n3,0.3\n"
    with path.open("a") as file:
        file.write("4,0.")  # killed while it was written
    assert table(path, 2, 3) == "step,loss\n1,0.1\n2,0.2\n3,0.3\n"
    assert table(path, 0) == "step,loss\n"


def test_a_row_that_lacks_a_column(tmp_path):
    made = Table(tmp_path / "t.csv", ["step", "a", "b,c"], 0)
    made.add({"step": 1, "b,c": 0})
    made.close()
    assert (tmp_path / "t.csv").read_text() == 'step,a,"b,c"\n1,,0\n'


def test_a_table_on_a_full_disk(tmp_path, monkeypatch):
    made = Table(tmp_path / "t.csv", ["step"], 0)

    def fsync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(TrainingError) as raised:
        made.sync()
    made.close()
    assert str(raised.value) == (
        f"cannot write '{tmp_path / 't.csv'}': No space left on device. Free some space; resume "
        "goes on from the last checkpoint."
    )


def test_an_average_is_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    average = Average(net, 0.9)
    truth = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for _ in range(4):
        with torch.no_grad():
            for tensor in [*net.parameters(), *net.buffers()]:
                tensor.add_(1)
        average.update()
        for name, tensor in net.state_dict().items():
            whole = not tensor.is_floating_point()
            truth[name] = tensor.clone() if whole else 0.9 * truth[name] + 0.1 * tensor
    last = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name, tensor in average.tensors.items():
        torch.testing.assert_close(tensor, truth[name], rtol=1e-14, atol=1e-14)
        assert whole_or_differs(tensor, last[name])
    with average.applied():
        assert torch.equal(net[0].weight, average.tensors["0.weight"])
    assert all(torch.equal(tensor, last[name]) for name, tensor in net.state_dict().items())
    average.copy_to_model()
    assert torch.equal(net[1].running_mean, average.tensors["1.running_mean"])


def whole_or_differs(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or not torch.equal(tensor, other)
