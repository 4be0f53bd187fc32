"""Weights from files and code from strangers: what fits is loaded, nothing else runs."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from pacswap.errors import ModelError, PacswapError, WeightsError
from pacswap.zoo import Source, build, identify, load_weights_file, read_state_dict

ASSETS = Path(__file__).parents[2] / "shared" / "assets" / "weights"


class Net(nn.Module):
    """Small enough for every file below; `trained` is what the files hold."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)
        self.norm = nn.BatchNorm2d(width)


TRAINED = {name: tensor + 1 for name, tensor in Net().state_dict().items()}
NET = f"{__name__}:Net"


def error_of(error: type[PacswapError], function: Callable[..., Any], *args: Any, **kw: Any) -> str:
    with pytest.raises(error) as raised:
        function(*args, **kw)
    assert type(raised.value) is error
    return str(raised.value)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def loaded(path: str) -> dict[str, Tensor]:
    """What a network has after a file was loaded into it."""
    return build(Source("python", NET, path), trust_python=True).state_dict()


def assert_trained(state: dict[str, Tensor]) -> None:
    assert list(state) == list(TRAINED)
    for name, tensor in state.items():
        assert torch.equal(tensor, TRAINED[name]), name


def save_legacy(state: dict[str, Tensor], path: str) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def with_ddp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": tensor for name, tensor in state.items()}


GOOD = {
    "safetensors": lambda path: safetensors.torch.save_file(TRAINED, path),
    "bare": lambda path: torch.save(TRAINED, path),
    "bare, the old format": lambda path: save_legacy(TRAINED, path),
    "state_dict": lambda path: torch.save({"epoch": 3, "state_dict": TRAINED}, path),
    "model_state_dict": lambda path: torch.save({"model_state_dict": TRAINED}, path),
    "model": lambda path: torch.save({"model": TRAINED, "optimizer": {"lr": 1.0}}, path),
    "module": lambda path: torch.save({"module": TRAINED}, path),
    "one in another": lambda path: torch.save({"model": {"state_dict": TRAINED}}, path),
    "of DDP": lambda path: torch.save(with_ddp(TRAINED), path),
    "of DDP, in a container": lambda path: torch.save({"state_dict": with_ddp(TRAINED)}, path),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_file_that_fits(case):
    path = "w.safetensors" if case == "safetensors" else "w.pth"
    GOOD[case](path)
    assert_trained(loaded(path))


def test_other_weights_are_seen():
    torch.save({**TRAINED, "conv.bias": TRAINED["conv.bias"] + 1e-3}, "w.pth")
    with pytest.raises(AssertionError, match=r"conv\.bias"):
        assert_trained(loaded("w.pth"))


def test_paths_start_at_the_folder_that_is_given(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    torch.save(TRAINED, folder / "w.pt")
    model = build(Source("python", NET, "w.pt"), folder=folder, trust_python=True)
    assert_trained(model.state_dict())


def test_what_does_not_fit_leaves_the_network_alone():
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.save({**TRAINED, "conv.bias": torch.zeros(3)}, "w.pth")
    error_of(WeightsError, load_weights_file, net, Path("w.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


MEND = ". Use the file of this very network, or mend model.name and model.args (num_classes?)."
CONTAINERS = "'state_dict', 'model_state_dict', 'model', 'module'"
# What a file holds instead, and the message.
MISFITS = {
    "missing": (
        {name: tensor for name, tensor in TRAINED.items() if "norm" not in name},
        "'w.pth' does not fit Net: 5 of 7 tensors missing ('norm.weight', 'norm.bias', "
        "'norm.running_mean', …)" + MEND,
    ),
    "unknown": (
        {**TRAINED, "head.weight": torch.ones(1)},
        "'w.pth' does not fit Net: 1 unknown ('head.weight')" + MEND,
    ),
    "shapes": (
        {**TRAINED, "conv.weight": torch.ones(2, 3)},
        "'w.pth' does not fit Net: 1 of another shape ('conv.weight' [2, 3] (expected [2, 3, 1, "
        "1]))" + MEND,
    ),
    "a shape far larger than its file": (
        {**TRAINED, "conv.weight": torch.zeros(1).expand(10**12)},
        "'w.pth' does not fit Net: 1 of another shape ('conv.weight' [1000000000000] (expected [2, "
        "3, 1, 1]))" + MEND,
    ),
    "half a DDP": (
        {**TRAINED, "module.conv.weight": torch.ones(1)},
        "'w.pth' does not fit Net: 1 unknown ('module.conv.weight')" + MEND,
    ),
    "nothing": (
        {},
        "'w.pth' does not fit Net: 7 of 7 tensors missing ('conv.weight', 'conv.bias', "
        "'norm.weight', …)" + MEND,
    ),
    "a tensor": (
        torch.ones(3),
        f"'w.pth' holds a Tensor, expected a state_dict (names to tensors), bare or under "
        f"{CONTAINERS}.",
    ),
    "a list": (
        [torch.ones(3)],
        f"'w.pth' holds a list, expected a state_dict (names to tensors), bare or under "
        f"{CONTAINERS}.",
    ),
    "an optimizer": (
        {"lr": 1.0, "step": 7},
        "'w.pth' holds a mapping with 'lr', 'step', expected a state_dict (names to tensors), bare "
        f"or under {CONTAINERS}.",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_that_does_not_fit(case):
    held, message = MISFITS[case]
    torch.save(held, "w.pth")
    assert error_of(WeightsError, loaded, "w.pth") == message


@pytest.mark.parametrize("name", ["none.pth", "folder.pth", "none.safetensors"])
def test_a_missing_file(name):
    Path("folder.pth").mkdir()
    assert error_of(WeightsError, loaded, name) == (
        f"no weights file '{name}'. Paths in a recipe start at the recipe's folder; set "
        "model.weights to an existing file, a tag, or null for random weights."
    )


AGAIN = " It may be truncated; copy or download it again."
BROKEN = {
    "empty.pth": (b"", "EOFError."),
    "page.pth": (b"<!DOCTYPE html><html>404</html>", "its pickle is not one of tensors."),
    "text.pth": (b"hello world", "KeyError: 101."),
    "plain.pth": (pickle.dumps({"a": 1}), "its pickle is not one of tensors."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_something_else(name):
    raw, reason = BROKEN[name]
    Path(name).write_bytes(raw)
    message = f"'{name}' is not a readable PyTorch file: {reason}{AGAIN}"
    assert error_of(WeightsError, loaded, name) == message


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["safetensors", "bare", "bare, the old format"])
def test_a_truncated_file(kind, part):
    path = Path("w.safetensors" if kind == "safetensors" else "w.pth")
    GOOD[kind](path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(part * len(raw))])
    message = error_of(WeightsError, loaded, str(path))
    format = "safetensors" if kind == "safetensors" else "PyTorch"
    assert message.startswith(f"'{path}' is not a readable {format} file: ")
    assert message.endswith(AGAIN)
    assert len(message.splitlines()) == 1
    assert "weights_only" not in message


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", ["bare", "bare, the old format"])
def test_a_damaged_file_is_read_or_refused(kind, seed):
    GOOD[kind]("w.pth")
    raw = bytearray(Path("w.pth").read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(len(raw), (6,), generator=generator).tolist():
        raw[place] = int(torch.randint(256, (), generator=generator))
    Path("w.pth").write_bytes(raw)
    try:
        state = read_state_dict(Path("w.pth"))
    except WeightsError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in state.values())


def test_a_zip_bomb_is_no_network():
    """A hundred megabytes of zeros in a hundred kilobytes."""
    torch.save({"conv.weight": torch.zeros(25_000_000)}, "large.pth")
    large = zipfile.ZipFile("large.pth")
    with large, zipfile.ZipFile("w.pth", "w", zipfile.ZIP_DEFLATED) as small:
        for record in large.infolist():
            small.writestr(record.filename, large.read(record))
    assert Path("w.pth").stat().st_size < 200_000
    assert error_of(WeightsError, loaded, "w.pth") == (
        "'w.pth' does not fit Net: 6 of 7 tensors missing ('conv.bias', 'norm.weight', 'norm.bias',"
        " …); 1 of another shape ('conv.weight' [25000000] (expected [2, 3, 1, 1]))" + MEND
    )


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo it ran > ran",)


ATTACKS = {
    "alone": lambda path: torch.save(Payload(), path),
    "beside the weights": lambda path: torch.save({"state_dict": TRAINED, "x": Payload()}, path),
    "in the old format": lambda path: save_legacy({"x": Payload()}, path),
    "a bare pickle": lambda path: path.write_bytes(pickle.dumps(Payload(), protocol=2)),
}


@pytest.mark.parametrize("case", ATTACKS)
def test_code_in_a_file_does_not_run(case):
    ATTACKS[case](Path("w.pth"))
    message = error_of(WeightsError, loaded, "w.pth")
    assert not Path("ran").exists()
    assert message == (
        f"'w.pth' holds more than tensors ({os.name}.system), and reading that would run code from "
        "the file. Refused. Save the weights alone: "
        "safetensors.torch.save_file(model.state_dict(), …)."
    )


def test_the_attack_is_a_real_one():
    Path("w.pkl").write_bytes(pickle.dumps(Payload()))
    pickle.loads(Path("w.pkl").read_bytes())
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=["options", "a whole model"],
)
def test_objects_in_a_file_are_named(held, name):
    torch.save({"state_dict": TRAINED, "args": held}, "w.pth")
    assert error_of(WeightsError, loaded, "w.pth").startswith(
        f"'w.pth' holds more than tensors ({name}), and reading that would run code from the file."
    )


@pytest.fixture
def their_module(tmp_path, monkeypatch):
    """A user's file, which leaves a mark when it is imported."""
    (tmp_path / "theirs.py").write_text(
        "from pathlib import Path\n"
        "from torch import nn\n"
        "Path('ran').touch()\n"
        "def net(width=3): return nn.Sequential(nn.Conv2d(3, width, 1))\n"
        "def number(): return 7\n"
        "def broken(): raise RuntimeError('no more memory\\nand more')\n"
        "WIDTH = 3\n"
    )
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "not_python.py").write_text("def :\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("theirs", "raises", "not_python"):
        sys.modules.pop(name, None)


def test_no_code_runs_without_trust(their_module):
    assert error_of(ModelError, build, Source("python", "theirs:net")) == (
        "library 'python' runs the code of 'theirs:net'. If you trust it, say so: --trust-python "
        "on the command line, trust_python=True in Python."
    )
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["theirs:net", "theirs.net"])
def test_code_runs_with_trust(name, their_module):
    model = build(Source("python", name, None, {"width": 5}), trust_python=True)
    assert model[0].out_channels == 5
    assert Path("ran").exists()


IMPORTS = "cannot import '{}': {}. Name it package.module:factory."
BUILDS = "cannot build python model '{}' with args {}: {}. Mend model.args."
FACTORIES = {
    "theirs:none": IMPORTS.format(
        "theirs:none", "AttributeError: module 'theirs' has no attribute 'none'"
    ),
    "nowhere:net": IMPORTS.format("nowhere:net", "ModuleNotFoundError: No module named 'nowhere'"),
    "net": IMPORTS.format("net", "ValueError: Empty module name"),
    "raises:net": IMPORTS.format("raises:net", "ZeroDivisionError: division by zero"),
    "not_python:net": IMPORTS.format(
        "not_python:net", "SyntaxError: invalid syntax (not_python.py, line 1)"
    ),
    "theirs:number": "'theirs:number' returned int, expected a torch.nn.Module.",
    "theirs:WIDTH": BUILDS.format("theirs:WIDTH", {}, "TypeError: 'int' object is not callable"),
    "theirs:broken": BUILDS.format("theirs:broken", {}, "RuntimeError: no more memory"),
}


@pytest.mark.parametrize("meta", [False, True], ids=["", "meta"])
@pytest.mark.parametrize("name", FACTORIES)
def test_code_that_does_not_work(name, meta, their_module):
    source = Source("python", name)
    assert error_of(ModelError, build, source, meta=meta, trust_python=True) == FACTORIES[name]


def test_a_network_of_nobody_is_not_identified():
    assert identify(Net()) is None


def test_a_network_changed_since_is_not_what_it_was():
    model = timm.create_model("resnet18", num_classes=4)
    assert identify(model) == Source("timm", "resnet18.a1_in1k", None, {"num_classes": 4})
    model.fc = nn.Sequential(model.fc)
    assert identify(model) is None


REAL = {
    "squeezenet1_1.torchvision.safetensors": Source("torchvision", "squeezenet1_1"),
    "mobilenetv2_100.timm.safetensors": Source("timm", "mobilenetv2_100"),
    "resnet18_stem_layers123.timm_torchvision.safetensors": Source(
        "timm", "resnet18", None, {"features_only": True, "out_indices": [1, 2, 3]}
    ),
}


@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no pretrained weights in {ASSETS}")
@pytest.mark.parametrize("file", REAL)
def test_real_weights(file):
    source = REAL[file]
    state = safetensors.torch.load_file(ASSETS / file)
    model = build(Source(source.library, source.name, file, source.args), folder=ASSETS)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert identify(model) == source
