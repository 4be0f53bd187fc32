"""Every call that cannot be right ends in words on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from cli_cases import CALLS, RECIPE, RECIPES

from pacswap.cli import main
from pacswap.zoo import Source, build


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def png(width: int, height: int) -> bytes:
    """A picture that says to be so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """What lies in the working directory beside the recipe."""
    folder = tmp_path_factory.mktemp("files")
    state = build(Source("pacswap", "scene_net")).state_dict()
    torch.save({**state, "head.classifier.bias": torch.ones(9)}, folder / "shapes.pth")
    quickstart = Path(__file__).parents[1] / "recipes" / "quickstart.safetensors"
    return {
        "code.pth": pickle.dumps({"state_dict": Payload()}, protocol=2),
        "shapes.pth": (folder / "shapes.pth").read_bytes(),
        "cut.safetensors": quickstart.read_bytes()[:500_000],
        "bomb.png": png(100_000, 100_000),
    }


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    for name, data in {**files, "r.yaml": RECIPE.encode()}.items():
        Path(name).write_bytes(data)
    for name in ("model", "photos", "empty"):
        Path(name).mkdir()
    for name in ("model/model.safetensors", "model/recipe.yaml", "photos/photo.jpg"):
        Path(name).write_text("mine")


def snapshot() -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path().rglob("*")}


def refused(capsys, *args: str) -> str:
    """The message of a call that has to fail, and to fail cleanly."""
    before = snapshot()
    with pytest.raises(SystemExit) as raised:
        main(list(args))
    printed = capsys.readouterr()
    assert raised.value.code == 2
    assert printed.out == ""
    assert snapshot() == before, "something was written"
    assert "Traceback" not in printed.err
    assert "\x1b" not in printed.err
    assert printed.err.startswith("pacswap: ")
    assert printed.err.endswith("\n")
    return printed.err.removeprefix("pacswap: ").removesuffix("\n")


def break_recipe(case: str) -> str:
    """Write the recipe of a case; gives the message that it has to get."""
    old, new, message = RECIPES[case]
    assert RECIPE.count(old) >= 1
    Path("r.yaml").write_text(RECIPE.replace(old, new, 1))
    return message


@pytest.mark.parametrize("case", RECIPES)
def test_a_broken_recipe(case, capsys):
    message = break_recipe(case)
    assert refused(capsys, "apply", "r.yaml", "-o", "out") == message


@pytest.mark.parametrize("case", CALLS)
def test_a_broken_call(case, capsys):
    args, message = CALLS[case]
    if "/proc/self/mem" in args and not Path("/proc/self/mem").exists():
        pytest.skip("needs a file that cannot be read: /proc/self/mem")
    assert refused(capsys, *args) == message


def test_a_guidance_that_comes_too_late(capsys):
    Path("r.yaml").write_text(RECIPE.replace("layer1", "head.classifier"))
    message = refused(capsys, "plan", "r.yaml")
    assert message.startswith(
        "r.yaml:6:15: swap[0].guidance: cannot feed 'head.conv' from 'head.classifier', which is "
        "ready only after the layer has run"
    )


@pytest.mark.parametrize("command", ["plan", "validate"])
@pytest.mark.parametrize(
    "case", ["misspelt key", "model", "weights tag", "no layer", "claimed twice", "no guidance"]
)
def test_plan_and_validate_say_the_same(case, command, capsys):
    message = break_recipe(case)
    assert refused(capsys, command, "r.yaml", "--json") == message


def test_a_good_call_is_not_refused(capsys):
    main(["validate", "r.yaml"])
    assert capsys.readouterr() == ("r.yaml is valid: 1 layers of SceneNet\n", "")
