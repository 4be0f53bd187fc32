"""docs/own_loop.md does what it says: its code is run, the loss falls, the result is saved."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pacswap
from pacswap.surgery import pac_layers, plan_of

PAGE = (Path(__file__).parents[1] / "docs" / "own_loop.md").read_text(encoding="utf-8")
SECTIONS = {
    part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
    for part in PAGE.split("\n## ")[1:]
}
SETUP = "The network and the data"


def needs(*libraries: str) -> pytest.MarkDecorator:
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    listed = " ".join(libraries)
    return pytest.mark.skipif(bool(missing), reason=f"no {missing}: pip install {listed}")


def third_party(*warnings: str) -> Any:
    """Warnings that a library raises over its own code, or over this machine."""

    def decorate(test: Any) -> Any:
        for text in warnings:
            test = pytest.mark.filterwarnings(f"ignore:{text}")(test)
        return test

    return decorate


lightnings_own = third_party(
    r"`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    "The 'train_dataloader' does not have many workers",
)


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """What the first section defines, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"__name__": "own_loop"}
    for block in SECTIONS[SETUP]:
        exec(block, found)
    return found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def run(section: str, names: dict[str, Any]) -> None:
    for block in SECTIONS[section]:
        exec(block, names)


def loss_of(model: nn.Module, names: dict[str, Any]) -> float:
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(names["images"])
    return nn.functional.cross_entropy(logits, names["masks"]).item()


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {key for key, value in after.items() if not torch.equal(value, before[key])}


def assert_saved(trained: nn.Module, names: dict[str, Any]) -> None:
    """What lies in the folder is the trained network, and no other."""
    loaded = pacswap.load("upgraded")
    with torch.no_grad():
        theirs, ours = trained.eval()(names["images"]), loaded(names["images"])
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, names["net"].eval()(names["images"]))
    for layer in pac_layers(loaded).values():
        assert layer.blend.item() != 0


def test_the_page_has_a_section_for_each_loop():
    assert list(SECTIONS) == [SETUP, "Plain PyTorch", "Lightning", "Hugging Face Trainer"]
    assert all(SECTIONS.values())


def test_the_first_section_changes_nothing_yet(names):
    with torch.no_grad():
        ours, theirs = names["model"].eval()(names["images"]), names["net"].eval()(names["images"])
    assert torch.equal(ours, theirs)
    groups = names["parameter_groups"](names["model"])
    assert [group["lr"] for group in groups] == [1e-2, 1e-3]
    added = plan_of(names["model"]).added_parameters()
    assert len(groups[0]["params"]) == len(added) == 7
    assert sum(len(group["params"]) for group in groups) == len(list(names["model"].parameters()))


def test_plain_pytorch(names, capsys):
    model, before = names["model"], tensors(names["model"])
    start = loss_of(model, names)
    run("Plain PyTorch", names)
    losses = names["losses"]
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert loss_of(model, names) < 0.9 * start
    changed = moved(before, tensors(model))
    assert changed >= set(plan_of(model).added_parameters())
    assert all(key.startswith(("layer3.0.conv2", "layer3.1.conv2", "head.")) for key in changed)
    assert not any("running" in key or "num_batches" in key for key in changed)
    assert_saved(model, names)
    assert capsys.readouterr().out == ""  # no layer has stopped adapting
    assert names["diagnose"](pacswap.swap(names["net"], "head.conv", "layer1"), names["images"])


@needs("lightning")
@lightnings_own
def test_lightning(names):
    model, before = names["model"], tensors(names["model"])
    start = loss_of(model, names)
    run("Lightning", names)
    assert loss_of(model, names) < 0.9 * start
    assert names["trainer"].callback_metrics["loss"].item() < 0.9 * start
    changed = moved(before, tensors(model))
    assert {"stem.conv.weight", *plan_of(model).added_parameters()} <= changed
    assert not any("running" in key or "num_batches" in key for key in changed)
    assert_saved(model, names)


@needs("lightning")
@lightnings_own
def test_lightning_trains_what_was_added_alone_first(names):
    model, before = names["model"], tensors(names["model"])
    (block,) = SECTIONS["Lightning"]
    assert "epoch=3" in block
    exec(block.replace("epoch=3", "epoch=99"), names)
    assert moved(before, tensors(model)) == set(plan_of(model).added_parameters())


@needs("transformers", "accelerate")
@third_party("'pin_memory' argument is set as true but no accelerator is found:UserWarning")
def test_hugging_face_trainer(names, capsys):
    model, before = names["model"], tensors(names["model"])
    start = loss_of(model, names)
    run("Hugging Face Trainer", names)
    assert loss_of(model, names) < 0.9 * start
    history = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    assert len(history) == 6
    assert float(history[-1]) < 0.9 * float(history[0])
    changed = moved(before, tensors(model))
    assert {"stem.conv.weight", *plan_of(model).added_parameters()} <= changed
    assert not any("running" in key or "num_batches" in key for key in changed)
    assert_saved(model, names)
