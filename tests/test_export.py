"""`pacswap export`: the file, how it is checked, and what cannot be written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import models
import onnxruntime
import pytest
import torch
from ecosystem import NETWORKS, images
from same import assert_same
from torch import nn

import pacswap
from pacswap.cli import main
from pacswap.errors import ExportError
from pacswap.export import export

WANTED = "expected a name that ends in .onnx or .pt2, or format 'onnx' or 'pt2'"


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model directory of a small network, made once."""
    folder = tmp_path_factory.mktemp("applied")
    (folder / "r.yaml").write_text(
        "version: 1\n"
        "model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 48]}\n"
        "swap:\n  - {layers: head.conv, guidance: {from: layer1, channels: 4}}\n"
    )
    pacswap.apply(folder / "r.yaml", output=folder / "model")
    return folder


@pytest.fixture
def trained(applied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    shutil.copytree(applied, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["export", *args])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as raised:
        main(["export", *args])
    assert raised.value.code == 2
    assert sorted(Path().rglob("*")) == before, "something was written"
    return capsys.readouterr().err.removeprefix("pacswap: ").rstrip("\n")


def test_the_command_writes_a_program(trained: Path, capsys: Any) -> None:
    answer = json.loads(said(capsys, "model", "-o", "net.pt2", "--json"))
    assert answer["input_shape"] == ["batch", 3, "height", "width"]
    assert [check["shape"] for check in answer["checks"]] == [[2, 3, 48, 80], [1, 3, 51, 53]]
    assert all(check["difference"] <= 1e-4 for check in answer["checks"])
    module = torch.export.load("net.pt2").module()
    given = torch.rand(3, 3, 61, 47)
    assert_same(pacswap.load("model")(given), module(given))
    assert refused(capsys, "model", "-o", "net.pt2") == (
        "'net.pt2' exists. Name another file, or replace it: --overwrite on the command line, "
        "overwrite=True in Python."
    )


def test_the_command_writes_onnx_of_one_size(trained: Path, capsys: Any) -> None:
    printed = said(capsys, "model", "-o", "net.onnx", "--static")
    assert printed.startswith("written: net.onnx (onnx, images of 1×3×48×48)\nchecked at 1×3×48×48")
    assert sorted(p.name for p in Path().iterdir()) == ["model", "net.onnx", "r.yaml"]
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 48, 48]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-o", "net.txt"), f"'net.txt': {WANTED}, got '.txt'."),
        (("-o", "n.pt2", "--format", "tf"), f"'n.pt2': {WANTED}, got 'tf'."),
        (("-o", "none/net.pt2"), "'none' is no folder. Make it, or name another file."),
    ],
    ids=["suffix", "format", "folder"],
)
def test_a_wrong_call(trained: Path, capsys: Any, args: tuple[str, ...], message: str) -> None:
    assert refused(capsys, "model", *args) == message


def test_missing_packages(trained: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name, *_: None if name == "onnxscript" else object())
    assert refused(capsys, "model", "-o", "net.onnx") == (
        "ONNX needs onnxscript, which is not installed. Install: "
        'pip install "pacswap[onnx]". Or write .pt2, which needs nothing.'
    )


def test_an_unchecked_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = export(NETWORKS["dense"].upgraded(0.5), tmp_path / "net.onnx", static=True)
    assert str(done).endswith(
        "not checked: onnxruntime is not installed, so nothing here can run the file. "
        'Install: pip install "pacswap[onnx]".'
    )


# ---- what cannot be exported


def swapped(make: type[nn.Module], layer: str, guidance: str, example: Any = None) -> nn.Module:
    given = images() if example is None else example
    return pacswap.swap(make().eval(), layer, guidance, example_input=given)


def message(model: nn.Module, path: Path, **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        export(model, path, **options)
    assert list(path.parent.iterdir()) == []
    return str(caught.value)


def test_a_network_with_a_way_for_each_size(tmp_path: Path) -> None:
    model = swapped(models.BranchAtRoot, "body.target", "body.stem")
    said = message(model, tmp_path / "net.pt2")
    assert said.startswith(f"'{tmp_path / 'net.pt2'}' would not run on images of 1×3×19×25: ")
    assert said.endswith(
        "The network goes another way for other sizes. Export it for one: --static on the command "
        "line, static=True in Python."
    )
    assert export(model, tmp_path / "net.pt2", static=True).input_shape == (1, 3, 16, 20)


def test_a_detector(tmp_path: Path) -> None:
    model = swapped(models.Detector, "body.target", "body.stem", ([*images()],))
    assert message(model, tmp_path / "net.pt2").startswith(
        "this Detector cannot be exported, and neither can the network before the swap: "
    )


def test_an_external_guidance(tmp_path: Path) -> None:
    assert message(swapped(models.Body, "target", "external"), tmp_path / "net.pt2") == (
        "this Body takes an external guidance, whose shape is not known here. Export it yourself: "
        "torch.export.export(model, (images,), {'guidance': …})."
    )


def test_a_file_that_is_not_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, write = NETWORKS["dense"].upgraded(0.5), torch.export.export

    def plain(given: nn.Module, *args: Any, **options: Any) -> Any:
        return write(pacswap.revert(given), *args, **options)

    monkeypatch.setattr(torch.export, "export", plain)
    said = message(model, tmp_path / "net.pt2")
    assert "would give other outputs than the network on images of 2×3×16×20: off by " in said


def test_what_overwrites_its_input_is_compared_all_the_same(tmp_path: Path) -> None:
    done = export(swapped(models.InPlaceInput, "target", "input"), tmp_path / "net.pt2")
    assert list(done.differences) == [(2, 3, 16, 20), (1, 3, 19, 25)]
