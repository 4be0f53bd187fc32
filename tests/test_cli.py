"""The command: what it prints, what it writes, and what it says of a call that cannot be right."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import fresh
import pytest
import torch
from torch import nn

import pacswap
from pacswap import cli, upgrade
from pacswap.recipes import load_recipe, shipped_recipes
from pacswap.zoo import Source, build

RECIPE = """\
# A small network, for tests.
version: 1
model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 48]}
swap:
  - layers: head.conv
    guidance: {from: layer1, channels: 4}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a good recipe, quick measuring and no say of the environment."""
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(upgrade.measure_latency, seconds=0)
    monkeypatch.setattr(upgrade, "measure_latency", quick)
    monkeypatch.delenv("PACSWAP_DEBUG", raising=False)
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", None)  # set where CI is detected
    Path("r.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line; gives its exit code, stdout and stderr."""

    def run(*args: str) -> tuple[object, str, str]:
        code: object = 0
        try:
            cli.main(list(args))
        except SystemExit as exit:
            code = exit.code
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err, "escape codes, although it is no terminal"
        assert "Traceback" not in printed.out + printed.err
        return code, printed.out, printed.err

    return run


def test_version(run):
    code, out, err = run("--version")
    versions = [version(name) for name in ("pacswap", "torch", "timm")]
    assert (code, err) == (0, "")
    assert out == "pacswap {}, torch {}, timm {}\n".format(*versions)
    assert pacswap.__version__ == versions[0]


def test_apply(run):
    code, out, err = run("apply", "r.yaml", "-o", "out")
    assert (code, err) == (0, "")
    assert out.startswith("SceneNet, input 3×48×48: 1 convolution becomes pixel-adaptive\n")
    assert out.count("\nok    ") == 8
    assert re.search(r"\nlatency ratio \d+\.\d+ \(.* … .*\), .* → .* ms on cpu, 3 pairs", out)
    assert out.endswith("\nwritten to out: load it with pacswap.load('out')\n")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "model.safetensors",
        "recipe.yaml",
        "report.json",
        "report.md",
    ]
    model = pacswap.load("out")
    assert json.loads(Path("out/report.json").read_text())["passed"] is True
    assert Path("out/report.md").read_text().startswith("# scene_net: 1 convolution swapped, all")
    image = torch.rand(1, 3, 48, 48)
    torch.manual_seed(0)
    plain = build(Source("pacswap", "scene_net")).eval()
    assert torch.equal(model(image), plain(image))
    assert not torch.equal(model(image), model(image + 0.1))


def test_apply_without_output_writes_nothing(run):
    code, out, err = run("apply", "r.yaml", "swap[0].guidance.channels=8")
    assert (code, err) == (0, "")
    assert "24 channels at 24×24 → 8 (1×1 projection)" in out
    assert "written" not in out
    assert [path.name for path in Path().iterdir()] == ["r.yaml"]


def test_apply_overwrites_when_told_to(run):
    assert run("apply", "r.yaml", "-o", "out")[0] == 0
    assert run("apply", "r.yaml", "swap[0].guidance.channels=8", "-o", "out", "--overwrite")[0] == 0
    assert pacswap.load("out").head.conv.guidance.project.out_channels == 8
    assert sorted(path.name for path in Path().iterdir()) == ["out", "r.yaml"]


def test_what_was_written_can_be_applied_again(run):
    assert run("apply", "r.yaml", "-o", "out")[0] == 0
    assert run("apply", "out/recipe.yaml", "-o", "again")[0] == 0
    assert Path("again/recipe.yaml").read_text() == Path("out/recipe.yaml").read_text()
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1], "random weights are the same each time"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_calibration_on_pictures(channels, run):
    from PIL import Image

    Path("pictures").mkdir()
    for shade in range(2):
        noise = Image.effect_noise((50, 40), 60 + 20 * shade)
        noise.save(Path("pictures", f"{shade}.png"))
    Path("nets.py").write_text(
        "from torch import nn\n"
        "def net(channels): return nn.Sequential(\n"
        "    nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))\n"
    )
    recipe = (
        RECIPE.replace("pacswap, name: scene_net", f"python, name: 'nets:net{channels}'")
        .replace("[3,", f"[{channels},")
        .replace("head.conv", "'1'")
        .replace("{from: layer1, channels: 4}", "input")
        .replace("swap:", "calibration: {images: pictures}\nswap:")
    )
    Path("c.yaml").write_text(
        recipe.replace(f"net{channels}'", f"net', args: {{channels: {channels}}}")
    )
    sys.path.insert(0, str(Path.cwd()))
    try:
        code, out, err = run("apply", "c.yaml", "--trust-python", "--json")
    finally:
        sys.path.remove(str(Path.cwd()))
        sys.modules.pop("nets")
    assert (code, err) == (0, "")
    assert 0.1 < json.loads(out)["bandwidths"]["1"] < 10


def test_plan(run):
    code, out, err = run("plan", "r.yaml")
    assert (code, err) == (0, "")
    assert "  head.conv  Conv2d 72→48 3×3  12×12   layer1\n" in out


def test_validate(run):
    assert run("validate", "r.yaml") == (0, "r.yaml is valid: 1 layers of SceneNet\n", "")


def test_cp(run):
    assert run("cp", "quickstart", "mine.yaml") == (0, "written: mine.yaml\n", "")
    assert load_recipe("mine.yaml").recipe == load_recipe(shipped_recipes()["quickstart"]).recipe


def test_ls(run):
    recipes = run("ls", "recipes")
    assert recipes == run("ls")
    assert [line.split()[0] for line in recipes[1].splitlines()[2:]] == list(shipped_recipes())


def test_ls_models(run):
    code, out, err = run("ls", "models", "*fcn_resnet*")
    assert (code, err) == (0, "")
    assert out.splitlines()[2:] == ["  torchvision  fcn_resnet101", "  torchvision  fcn_resnet50"]
    assert run("ls", "models", "pacswap")[1].split()[-2:] == ["pacswap", "scene_net"]


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "squeezenet1_1"])
def test_ls_layers(name, run):
    code, out, err = run("ls", "layers", name)
    assert (code, err) == (0, "")
    assert " ".join(out.splitlines()[2].split()) == "features.0 Conv2d 3→64 3×3 s2 111×111 yes"


KEYS = {
    "apply r.yaml": "recipe model passed plan bandwidths checks latency versions",
    "plan r.yaml": "model input_shape layers rewired added_parameters cost",
    "validate r.yaml": "valid recipe layers",
    "cp quickstart mine.yaml": "written",
    "schema": "$schema $defs additionalProperties anyOf description properties required title type",
    "ls": "name summary",
    "ls recipes": "name summary",
    "ls models pacswap": "library name",
    "ls layers scene_net": "name what output_shape refusal",
}


@pytest.mark.parametrize("command", KEYS)
def test_json(command, run):
    code, out, err = run(*command.split(), "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    for entry in data if isinstance(data, list) else [data]:
        assert set(entry) == set(KEYS[command].split())


def test_json_of_a_plan(run):
    data = json.loads(run("plan", "r.yaml", "--json")[1])
    assert data["input_shape"] == [1, 3, 48, 48]
    assert [layer["name"] for layer in data["layers"]] == ["head.conv"]
    assert " ".join(data["layers"][0]) == (
        "name operation what place guidance guidance_channels kernel output_size"
    )


def test_json_may_stand_before_the_subcommand(run):
    assert run("ls", "--json", "recipes") == run("ls", "recipes", "--json")


def test_no_arguments_are_a_question(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "Usage: pacswap" in out
    assert all(f" {name} " in out for name in ("apply", "plan", "validate", "cp", "schema", "ls"))


def test_json_is_plain_text_and_tables_survive_any_locale(monkeypatch):
    for args in (["ls", "recipes"], ["ls", "recipes", "--json"]):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        cli.main(args)
        assert b"vgg16_hotswap" in raw.getvalue()


SCRIPT = Path(sys.executable).with_name("pacswap")


def test_python_m_pacswap():
    run = fresh.run("-m", "pacswap", "plan", "r.yaml", "--json")
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["layers"][0]["name"] == "head.conv"


@pytest.mark.skipif(not SCRIPT.is_file(), reason=f"pacswap is not installed beside {SCRIPT.parent}")
def test_the_console_script():
    command = [str(SCRIPT), "plan", "r.yaml", "model.nam=x"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        "pacswap: override 'model.nam=x': model.nam: unknown key. Nearest: 'name'.\n"
    )


def test_a_closed_pipe_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:  # noqa: PTH123 (a descriptor, not a path)
        run = fresh.run("-m", "pacswap", "ls", "recipes", stdout=pipe)
    assert (run.returncode, run.stderr) == (1, "")


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_stdout(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", FullDisk())
    code, _, err = run("ls", "recipes")
    assert (code, err) == (2, "pacswap: the system refuses: [Errno 28] No space left on device\n")


def test_an_interruption(run, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        # Where the tests run in the background, Python has been told to ignore it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, before)

    monkeypatch.setattr(upgrade, "calibrate", interrupted)
    code, out, err = run("apply", "r.yaml", "-o", "out")
    assert (code, out, err) == (130, "", "pacswap: interrupted; nothing was written.\n")
    assert not Path("out").exists()


def broken(*args: object, **kwargs: object) -> None:
    raise ZeroDivisionError("division by zero")


def test_a_fault_of_ours_is_said_in_words(run, monkeypatch):
    monkeypatch.setattr(upgrade, "plan_recipe", broken)
    assert run("plan", "r.yaml") == (
        1,
        "",
        "pacswap: internal error: ZeroDivisionError: division by zero\n"
        "This is a fault of pacswap. Run it again with PACSWAP_DEBUG=1 for the traceback, and "
        "please report it.\n",
    )


def test_a_developer_sees_the_traceback(monkeypatch):
    monkeypatch.setattr(upgrade, "plan_recipe", broken)
    monkeypatch.setenv("PACSWAP_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "r.yaml"])


def test_a_broken_promise_writes_nothing(run, monkeypatch):
    def careless(model: nn.Module, plan: pacswap.Plan) -> nn.Module:
        upgraded = pacswap.rewrite(model, plan)
        nn.init.ones_(upgraded.head.conv.blend)
        return upgraded

    monkeypatch.setattr(upgrade, "rewrite", careless)
    code, out, err = run("apply", "r.yaml", "-o", "out")
    assert (code, out) == (2, "")
    assert err.startswith("pacswap: 2 of 8 checks failed:\n  - promise 1, same output in eval mode")
    assert not Path("out").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
def test_the_bar_is_for_terminals(colour, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    cli.main(["apply", "r.yaml"])
    shown = terminal.getvalue()
    assert "verifying the promises" in shown
    assert ("\x1b[36m" in shown) == colour
    assert bool(re.search(r"\x1b\[[0-9;]*m", shown)) == colour
