"""How model directories are written: whole or not at all, whatever happens in the middle."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import pacswap
from pacswap import checkpoint
from pacswap.errors import CheckpointError
from pacswap.zoo import Source, build

FILES = {"model.safetensors", "recipe.yaml"}
EXISTS = (
    "'{}' exists. Name another directory, or replace it: --overwrite on the command line, "
    "overwrite=True in Python."
)
NOT_OURS = "'{}' exists and is not a model directory; it is not replaced. Name another one."
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, which may end up with no more than the test expects."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Two networks whose directories differ in both files."""
    net = build(Source("pacswap", "scene_net"))
    guidance = {"old": 4, "new": 8}
    return {
        name: pacswap.swap(
            net,
            "head.conv",
            {"from": "layer1", "channels": channels},
            example_input=torch.zeros(1, 3, 48, 48),
        ).eval()
        for name, channels in guidance.items()
    }


def contents(path: str | Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def names() -> set[str]:
    return {path.name for path in Path().iterdir()}


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as raised:
        function(*args, **kwargs)
    return str(raised.value)


def channels_of(path: str | Path) -> int:
    return pacswap.load(path).head.conv.guidance.project.out_channels


def test_what_is_written(models):
    assert pacswap.save(models["old"], "deep/er/model") == Path("deep/er/model")
    assert set(contents("deep/er/model")) == FILES
    assert [path.name for path in Path("deep/er").iterdir()] == ["model"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_permissions_are_the_users(models, umask):
    before = os.umask(umask)
    try:
        pacswap.save(models["old"], "model")
    finally:
        os.umask(before)
    assert Path("model").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path("model").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o666 & ~umask)


def test_an_existing_model_is_kept(models):
    pacswap.save(models["old"], "model")
    before = contents("model")
    assert error_of(pacswap.save, models["new"], "model") == EXISTS.format("model")
    assert contents("model") == before
    assert names() == {"model"}


def test_an_existing_model_is_replaced_when_told_to(models):
    pacswap.save(models["old"], "model")
    pacswap.save(models["new"], "model", overwrite=True)
    assert channels_of("model") == 8
    assert set(contents("model")) == FILES
    assert names() == {"model"}


def test_an_empty_directory_is_taken(models):
    Path("model").mkdir()
    pacswap.save(models["old"], "model")
    assert channels_of("model") == 4


def test_a_link_stays_a_link(models):
    pacswap.save(models["old"], "run1")
    Path("latest").symlink_to("run1")
    Path("next").symlink_to("run2")
    assert error_of(pacswap.save, models["new"], "latest") == EXISTS.format("latest")
    pacswap.save(models["new"], "latest", overwrite=True)
    pacswap.save(models["new"], "next")
    assert (channels_of("run1"), channels_of("run2")) == (8, 8)
    assert Path("latest").is_symlink()
    assert names() == {"latest", "next", "run1", "run2"}


def make_foreign(kind: str) -> None:
    if kind == "a file":
        Path("it").write_text("mine")
    elif kind == "my photos":
        Path("it").mkdir()
        Path("it/photo.jpg").write_text("mine")
    else:  # a project that happens to have a recipe of that name
        Path("it").mkdir()
        Path("it/recipe.yaml").write_text("mine")
        Path("it/thesis.tex").write_text("mine")


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("kind", ["a file", "my photos", "my project"])
def test_what_is_not_a_model_is_never_replaced(models, kind, overwrite):
    make_foreign(kind)
    before = {path: path.read_bytes() for path in Path("it").rglob("*")}
    assert error_of(pacswap.save, models["old"], "it", overwrite=overwrite) == NOT_OURS.format("it")
    assert before == {path: path.read_bytes() for path in Path("it").rglob("*")}


def test_a_model_with_notes_beside_it_is_not_replaced(models):
    pacswap.save(models["old"], "model")
    Path("model/notes.txt").write_text("mine")
    assert error_of(pacswap.save, models["new"], "model", overwrite=True) == (
        "'model' also holds 'notes.txt', which pacswap did not write; it is not replaced. Name "
        "another directory."
    )
    assert Path("model/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".", ""])
def test_the_working_directory_is_not_replaced(models, name):
    assert error_of(pacswap.save, models["old"], name) == (
        "'.' is the working directory, which cannot be replaced. Name another one."
    )
    assert names() == set()


def test_a_file_in_the_way(models):
    Path("file").write_text("mine")
    message = error_of(pacswap.save, models["old"], "file/model")
    assert message.startswith("cannot write 'file/model': [Errno ")
    assert Path("file").read_text() == "mine"


def failing(error: BaseException):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


# What breaks, with what, and what is said then.
BREAKAGES = {
    "the weights, disk full": (
        (safetensors.torch, "save_model", FULL),
        "cannot write 'model': [Errno 28] No space left on device.",
    ),
    "the weights, in Rust": (
        (safetensors.torch, "save_model", SafetensorError("I/O error: No space left on device")),
        "cannot write the model: I/O error: No space left on device. Is the disk full?",
    ),
    "the recipe": (
        (Path, "write_text", FULL),
        "cannot write 'model': [Errno 28] No space left on device.",
    ),
    "flushing": (
        (os, "fsync", OSError(errno.EIO, "Input/output error")),
        "cannot write 'model': [Errno 5] Input/output error.",
    ),
    "the folder": (
        (Path, "mkdir", PermissionError(errno.EACCES, "Permission denied")),
        "cannot write 'model': [Errno 13] Permission denied.",
    ),
    "the last step": (
        (Path, "rename", OSError(errno.EXDEV, "Invalid cross-device link")),
        "cannot write 'model': [Errno 18] Invalid cross-device link.",
    ),
}


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an old one there"])
@pytest.mark.parametrize("case", BREAKAGES)
def test_nothing_is_left_of_a_failure(models, case, old, monkeypatch):
    before = {}
    if old:
        pacswap.save(models["old"], "model")
        before = contents("model")
    (owner, attribute, error), message = BREAKAGES[case]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, failing(error))
        assert error_of(pacswap.save, models["new"], "model", overwrite=old) == message
    assert names() == ({"model"} if old else set())
    assert (contents("model") if old else {}) == before
    pacswap.save(models["new"], "model", overwrite=old)  # and the next time it works
    assert channels_of("model") == 8


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_the_old_one_comes_back_when_the_new_one_cannot_take_its_place(models, error, monkeypatch):
    pacswap.save(models["old"], "model")
    before, rename = contents("model"), Path.rename

    def fail_once(path: Path, target: Path) -> Path:
        if target.name == "model" and (path / "recipe.yaml").read_text().count("channels: 8"):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        pacswap.save(models["new"], "model", overwrite=True)
    assert contents("model") == before
    assert names() == {"model"}


def test_an_interruption_leaves_nothing(models, monkeypatch):
    monkeypatch.setattr(safetensors.torch, "save_model", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pacswap.save(models["old"], "model")
    assert names() == set()


def test_a_file_that_may_not_grow(models):
    """A real refusal of the system in the middle of the weights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        message = error_of(pacswap.save, models["old"], "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith("cannot write the model: ")
    assert message.endswith("File too large (os error 27). Is the disk full?")
    assert names() == set()


PREPARE = """
import os, signal, sys, time
from pathlib import Path
import torch, pacswap
from pacswap.checkpoint import new_folder, recipe_of, write_model
from pacswap.errors import CheckpointError
from pacswap.surgery import plan_of
from pacswap.zoo import Source, build
torch.set_num_threads(1)
source = Source("pacswap", "scene_net")
net = build(source)
def upgraded(channels):
    guidance = {"from": "layer1", "channels": channels}
    model = pacswap.swap(net, "head.conv", guidance, example_input=torch.zeros(1, 3, 48, 48))
    return model, recipe_of(plan_of(model), source)
def write(model, recipe, target, overwrite):
    with new_folder(Path(target), overwrite=overwrite) as draft:
        write_model(model, recipe, draft)
def contents(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir()}
A, B = upgraded(4), upgraded(8)
write(*A, "A", False)
write(*B, "B", False)
whole = [contents("A"), contents("B")]
"""


def in_a_process(code: str, *before: str) -> list[str]:
    if before:
        command = [*before, sys.executable, "-c", PREPARE + code]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    else:
        run = fresh.run("-c", PREPARE + code)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    probe = [unshare, "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs `unshare -rm`: a file system of one's own")
def test_a_disk_that_is_really_full():
    code = """
import subprocess
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", "disk"], check=True)
write(*A, "disk/old", False)
for overwrite in (False, True):
    try:
        write(*B, "disk/old" if overwrite else "disk/new", overwrite)
        print("written")
    except CheckpointError as error:
        print("full" if "No space left on device" in str(error) else error)
print(os.listdir("disk") == ["old"], contents("disk/old") == whole[0])
"""
    assert in_a_process(code, "unshare", "-rm") == ["full", "full", "True True"]


KILLS = """
state = []
for round in range(30):
    child = os.fork()
    if child == 0:
        while True:
            write(*A, "model", True)
            write(*B, "model", True)
    time.sleep(0.003 * round)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = os.path.exists("model")
    state.append("none" if not there else "whole" if contents("model") in whole else "HALF")
drafts = [name for name in os.listdir() if name.startswith(".model.")]
print(state.count("whole") > 0, state.count("HALF"), len(drafts) > 0)
"""
RACES = """
def race(target, overwrite):
    children, begin = [], time.monotonic() + 0.02
    for model, recipe in (A, B):
        child = os.fork()
        if child == 0:
            time.sleep(max(0.0, begin - time.monotonic()))
            try:
                write(model, recipe, target, overwrite)
            except CheckpointError:
                os._exit(3)
            os._exit(0)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    winners = [whole[i] for i, code in enumerate(codes) if code == 0]
    return sorted(codes), contents(target) in winners
for overwrite, allowed in ((False, [[0, 3]]), (True, [[0, 0], [0, 3]])):
    races = [race(f"raced{round}{overwrite}", overwrite) for round in range(15)]
    print(all(codes in allowed for codes, _ in races), all(intact for _, intact in races))
print(any(name.startswith(".raced") for name in os.listdir()))
"""


def test_kills_and_races():
    kills, alone, overwriting, drafts = in_a_process(KILLS + RACES)
    # None is half; that drafts were left behind shows that the kills came in the middle.
    assert kills == "True 0 True"
    # Of two processes one is told so; told to overwrite, one or both win. Never a mixture.
    assert alone == overwriting == "True True"
    assert drafts == "False"


def test_the_drafts_name_is_hidden_and_beside_the_target(models, monkeypatch):
    seen = []
    write_model = checkpoint.api.write_model

    def note(model: nn.Module, recipe: object, draft: Path) -> None:
        seen.append(draft)
        write_model(model, recipe, draft)

    monkeypatch.setattr(checkpoint.api, "write_model", note)
    pacswap.save(models["old"], "model")
    assert [path.parent for path in seen] == [Path.cwd()]
    assert seen[0].name.startswith(".model.")
    assert torch.equal(models["old"].head.conv.weight, pacswap.load("model").head.conv.weight)
