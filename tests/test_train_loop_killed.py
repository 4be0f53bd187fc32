"""Trainings that are killed or are several processes: nothing is lost or changed."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch

WORKER = Path(__file__).with_name("train_worker.py")
SCENES = {"format": "scenes", "count": [9, 2], "resize": [24, 32]}
# All that a resume has to get right at once.
RICH: dict[str, Any] = {
    "accumulate": 2,
    "ema": 0.9,
    "clip_grad": 1.0,
    "optimizer": {"name": "sgd", "momentum": 0.8},
    "checkpoint": {"every": 3},
    "evaluate": {"every": 2},
    "data": SCENES
    | {"transforms": {"scale": [0.7, 1.4], "crop": [24, 32], "flip": 0.5, "color": 0.3}},
    "stages": [
        {"name": "adapt", "train": ["added"], "steps": 5, "lr": 0.05},
        {
            "name": "joint",
            "train": ["all"],
            "steps": 11,
            "lr": {"default": 0.01, "added": 0.05},
            "schedule": "poly",
            "warmup": 2.0,
        },
    ],
}
# Smaller pictures on larger crops: every part of a batch has its own share of ignored pixels.
SHARED: dict[str, Any] = {
    "batch_norm": "frozen",
    "ema": 0.9,
    "clip_grad": 1.0,
    "optimizer": {"name": "sgd", "momentum": 0.8},
    "data": SCENES | {"transforms": {"scale": [0.5, 1.0], "crop": [24, 32], "flip": 0.5}},
    "stages": [
        {"name": "head", "train": ["head"], "steps": 3, "lr": 0.05},
        {"name": "all", "train": ["all"], "steps": 5, "lr": 0.05},
    ],
}


def work(*runs: dict[str, Any], processes: int = 1) -> None:
    """Train in other processes; raise with what they said where that fails."""
    command = str(WORKER), json.dumps(runs, default=str)
    if processes == 2:
        fresh.run_pair(*command)
    else:
        done = fresh.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("log.csv", "val.csv")}


def differing(one: Path, other: Path) -> list[str]:
    """The tensors of the last weights that differ in any bit."""
    a, b = (torch.load(folder / "final.pt") for folder in (one, other))
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_killed_and_resumed_is_undisturbed(tmp_path):
    """Random moments, moments in the writing of a checkpoint, and between two of them."""
    dice = random.Random(7)
    kills = [f"after {dice.uniform(0.02, 0.5):.3f}" for _ in range(4)]
    kills += ["at fsync 5", "at step 7", "at fsync 9", "at step 13", "at fsync 7"]
    base = {"keys": RICH, "dropout": 0.3}
    plain, killed, forgetful = (tmp_path / name for name in ("plain", "killed", "forgetful"))
    work(
        base | {"folder": plain},
        base | {"folder": killed, "kills": kills},
        base | {"folder": forgetful, "kills": ["at step 14"], "forget": True},
    )
    assert found(plain)["steps"] == list(range(1, 17))
    assert len(found(killed)["steps"]) < 16
    assert differing(plain, killed) == []
    assert files(plain) == files(killed)
    names = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (plain / "checkpoints").iterdir())
    # The twin: a resume without the optimizer's momentum is another training.
    assert found(forgetful)["steps"] == [13, 14, 15, 16]
    assert "classifier.weight" in differing(plain, forgetful)
    assert files(plain)["log.csv"] != files(forgetful)["log.csv"]


def curve(folder: Path) -> list[float]:
    with (folder / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_are_one(tmp_path):
    one, parts, two, other = (tmp_path / name for name in ("one", "parts", "two", "other"))
    base = {"keys": SHARED, "wide": True}
    work(
        base | {"folder": one},
        base | {"folder": parts, "keys": SHARED | {"accumulate": 3}},
        base | {"folder": other, "keys": SHARED | {"batch_size": 2}},
    )
    work(base | {"folder": two}, processes=2)
    assert len(curve(one)) == 8
    for folder in (parts, two):
        assert curve(folder) == pytest.approx(curve(one), rel=1e-12)
        last, truth = (torch.load(place / "final.pt") for place in (folder, one))
        worst = max((last[name] - truth[name]).abs().max().item() for name in truth)
        assert worst < 1e-13
        assert files(folder)["val.csv"] == files(one)["val.csv"]
    assert curve(other) != pytest.approx(curve(one), rel=1e-3)
    # The first process alone reports and writes.
    assert found(two)["steps"] == list(range(1, 9))
    second = json.loads((two / "found.json.1").read_text())
    assert (second["steps"], second["notes"]) == ([], [])
    assert second["miou"] == found(two)["miou"]
    both = [torch.load(two / name) for name in ("final.pt", "final.pt.1")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    assert len(list((two / "tensorboard").iterdir())) == 1
    # A parameter off the path to the logits would keep torch.distributed waiting.
    assert found(two)["notes"] == [
        "stage 'all' trains 'idle.weight', on which the loss does not depend; they stay as they "
        "are."
    ]


def test_a_full_disk(tmp_path):
    """A limit on the size of files, which the system enforces as it does a full disk."""
    work({"folder": tmp_path, "keys": {"checkpoint": {"every": 1}}, "limit": 20_000})
    checkpoint = tmp_path / "checkpoints" / "step-0000001"
    assert found(tmp_path)["error"] == (
        f"cannot write the checkpoint '{checkpoint}': File too large. Free some space. There is "
        "no earlier checkpoint."
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []
