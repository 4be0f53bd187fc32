"""What a run may replace and resume, where it hears a signal, and what its arms have in common."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_jobs import Net, events, job, moved, notes, rows, section, stage, upgraded, weights

from pacswap.errors import TrainingError
from pacswap.recipes import load_recipe
from pacswap.surgery import plan_of
from pacswap.train import setting
from pacswap.train.engine.device import is_batch_norm
from pacswap.train.engine.events import Evaluated, Event, Note, StageBegun, StepDone
from pacswap.train.engine.groups import parameter_groups, roles_of
from pacswap.train.engine.loop import train
from pacswap.train.setting import _begin, check_folder

RECIPE = """
version: 1
model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 64]}
swap:
  - {layers: head.conv, guidance: {from: layer1}}
finetune:
  batch_size: 4
  data: {format: scenes, count: [8, 2], resize: [48, 64]}
  stages:
    - {name: all, train: [all], steps: 3, lr: 0.01}
"""
ELSE = "Name another folder: -o FOLDER."


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a recipe and the folder of a run of it."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    _begin(Path("run"), load_recipe("r.yaml"), overwrite=False)
    for name in ("model", "pictures", "seed-0/upgraded/checkpoints", "seed-12/control"):
        (Path("run") / name).mkdir(parents=True)
        (Path("run") / name / "some.txt").touch()
    for name in ("report.md", "report.json", "curves.png", ".report.md.0a1b2c3d"):
        (Path("run") / name).touch()
    (Path("run") / ".model.0a1b2c3d").mkdir()
    return tmp_path


def check(folder: str = "run", recipe: str = "r.yaml", *overrides: str, **options: bool) -> str:
    """The words of a refusal; none where the folder may be taken."""
    asked = {"resume": False, "overwrite": False} | options
    try:
        check_folder(Path(folder), load_recipe(recipe, overrides), **asked)
    except TrainingError as error:
        return str(error)
    return ""


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# What --overwrite removes.


def test_overwrite_removes_a_run(here):
    assert check(overwrite=True) == ""
    _begin(Path("run"), load_recipe("r.yaml", ["finetune.batch_size=2"]), overwrite=True)
    assert everything(Path("run")) == ["recipe.yaml"]
    assert load_recipe("run/recipe.yaml").recipe.finetune.batch_size == 2


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (".git/config", ".git"),
        (".env", ".env"),
        ("seed-data/pictures.zip", "seed-data"),
        ("seed-0/notes.txt", "seed-0/notes.txt"),
        (".model.backup/a", ".model.backup"),
        ("thesis.txt", "thesis.txt"),
    ],
)
def test_overwrite_removes_nothing_else(here, name, named):
    path = Path("run") / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    words = f"'run' holds '{named}', which no run of pacswap wrote. {ELSE}"
    assert check(overwrite=True) == words
    assert check(resume=True) == ("" if name.startswith(".") else words)
    _begin(Path("run"), load_recipe("r.yaml"), overwrite=False)
    assert path.exists()


def test_what_comes_while_pictures_are_read_stays(here):
    (here / "run/seed-0/notes.txt").touch()
    (here / "run/notes.txt").touch()
    with pytest.raises(TrainingError) as raised:
        _begin(Path("run"), load_recipe("r.yaml"), overwrite=True)
    assert str(raised.value).startswith("cannot write 'run': ")
    assert (here / "run/seed-0/notes.txt").exists()
    assert (here / "run/notes.txt").exists()


def test_what_a_link_leads_to_stays(here):
    Path("mine").mkdir()
    Path("mine/a.txt").touch()
    (here / "run/seed-0/capacity").symlink_to(here / "mine")
    _begin(Path("run"), load_recipe("r.yaml"), overwrite=True)
    assert everything(Path("run")) == ["recipe.yaml"]
    assert Path("mine/a.txt").exists()


def test_overwrite_spares_what_is_needed(here, monkeypatch):
    words = f"'run' holds the recipe run/recipe.yaml, so it is not replaced. {ELSE}"
    assert check("run", "run/recipe.yaml", overwrite=True) == words
    assert check("run", "run/recipe.yaml", resume=True) == ""
    monkeypatch.chdir(here / "run")
    words = f"'.' is where you are working, so it is not replaced. {ELSE}"
    assert check(".", "../r.yaml", overwrite=True) == words
    monkeypatch.chdir(here / "run/model")
    assert check("..", "../../r.yaml", overwrite=True) == words.replace("'.'", "'..'")


def test_a_kill_while_a_run_is_replaced(here, monkeypatch):
    """Wherever it comes, the folder is still known for a run's."""
    removed, last, plain = 0, 0, setting._remove

    def die(path: Path) -> None:
        nonlocal removed
        removed += 1
        if removed == last:
            raise KeyboardInterrupt
        plain(path)

    monkeypatch.setattr(setting, "_remove", die)
    for moment in (1, 3, 5, 7):
        removed, last = 0, moment
        with pytest.raises(KeyboardInterrupt):
            _begin(Path("run"), load_recipe("r.yaml"), overwrite=True)
        assert check(overwrite=True) == ""
    monkeypatch.setattr(setting, "write_file", lambda *_: 1 / 0)
    last = -1
    with pytest.raises(ZeroDivisionError):
        _begin(Path("run"), load_recipe("r.yaml"), overwrite=True)
    assert everything(Path("run")) == ["recipe.yaml"]
    assert check(overwrite=True) == ""


def test_a_kill_before_the_first_recipe_was_whole(here):
    Path("new").mkdir()
    Path("new/.recipe.yaml.01234567").touch()
    assert check("new", resume=True) == check("new", overwrite=True) == ""
    assert check("new").startswith("'new' holds a run. Go on with it: --resume.")


# What may change at a resume.


@pytest.mark.parametrize(
    "change",
    [
        "finetune.workers=0",
        "finetune.checkpoint={every: 1, keep: 3}",
        "finetune.control={seeds: [0, 1, 2]}",
        "finetune.evaluate.pictures=0",
        "finetune.data.root=elsewhere",
    ],
)
def test_what_changes_no_training_may_change(here, change):
    loaded = load_recipe("r.yaml", ["finetune.data={format: folder, root: a, classes: [a, b]}"])
    _begin(Path("other"), loaded, overwrite=False)
    given = load_recipe("other/recipe.yaml", [change])
    assert given.recipe != loaded.recipe
    check_folder(Path("other"), given, resume=True, overwrite=False)
    _begin(Path("other"), given, overwrite=False)
    assert load_recipe("other/recipe.yaml").recipe == given.recipe, "written anew"
    assert [path.name for path in Path("other").iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("finetune.stages[0].lr=0.1", "finetune.stages[0].lr is 0.01 there and 0.1 here"),
        ("model.args={width: 6}", "model.args.width is null there and 6 here"),
        ("finetune.seed=3", "finetune.seed is 0 there and 3 here"),
    ],
)
def test_what_changes_a_training_may_not(here, change, words):
    assert check("run", "r.yaml", change, resume=True) == (
        f"'run' holds a run of another recipe: {words}. Go on with the recipe as it was, or name "
        "another folder: -o FOLDER."
    )


def test_a_recipe_that_cannot_be_read(here):
    Path("run/recipe.yaml").write_text("version: 9\n", encoding="utf-8")
    words = check(resume=True)
    assert words.startswith("'run' cannot be resumed, for its own recipe cannot be read: run/reci")
    assert words.endswith(f"\n{ELSE}")


def test_a_recipe_that_was_written_by_hand_stays(here):
    Path("own").mkdir()
    Path("own/recipe.yaml").write_text(RECIPE, encoding="utf-8")
    _begin(Path("own"), load_recipe("own/recipe.yaml", ["finetune.workers=0"]), overwrite=False)
    assert Path("own/recipe.yaml").read_text(encoding="utf-8") == RECIPE


# Signals.


ADAPT = [stage("head", ["head"], steps=2), stage("adapt", ["added"], steps=2)]


def last_step(event: Event) -> bool:
    return isinstance(event, StepDone) and event.step == 6


def last_measure(event: Event) -> bool:
    return isinstance(event, Evaluated) and event.step == 6


def first_measure(event: Event) -> bool:
    return isinstance(event, Evaluated) and event.step == 2


@pytest.mark.parametrize(
    ("moment", "step"), [(last_step, 6), (last_measure, 6), (first_measure, 2)]
)
def test_a_signal_while_the_network_is_measured(tmp_path, moment, step):
    plain = upgraded()
    train(job(tmp_path / "plain", plain))
    said: list[Event] = []

    def interrupt(event: Event) -> None:
        said.append(event)
        if moment(event):
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) as raised:
        train(job(run), progress=interrupt)
    checkpoint = run / "checkpoints" / f"step-{step:07d}"
    assert str(raised.value) == (
        f"SIGTERM: ended after step {step} of 6. Resume goes on from '{checkpoint}'."
    )
    assert (checkpoint / "scores.safetensors").is_file()
    assert [e.step for e in said if isinstance(e, StepDone)] == list(range(1, step + 1))
    model = upgraded()
    _, said = events(job(run, model), resume=True)
    assert moved(weights(plain), model) == set()
    assert (step == 6) is (not any(isinstance(event, StepDone) for event in said))


@pytest.mark.parametrize("later", [[], [stage("more", ["head"], steps=2)]], ids=["last", "first"])
def test_a_signal_while_a_stage_is_passed_over(tmp_path, later):
    def given(net: Net) -> Any:
        roles = roles_of(net, None, swapped=())
        return job(tmp_path, net, roles=roles, arm="control", stages=ADAPT + later)

    def interrupt(event: Event) -> None:
        if isinstance(event, Note) and "passed over" in event.text:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        train(given(Net()), progress=interrupt)
    assert str(raised.value) == (
        f"SIGINT: ended after step 4 of {4 + 2 * len(later)}. Resume goes on from "
        f"'{tmp_path / 'checkpoints' / 'step-0000004'}'."
    )
    outcome, said = events(given(Net()), resume=True)
    assert outcome.steps == 4 + 2 * len(later)
    assert [e.name for e in said if isinstance(e, StageBegun)] == [s["name"] for s in later]


# What the arms have in common.


def test_a_pattern_of_what_the_upgraded_network_has_more():
    swap, net = upgraded(), Net()
    roles = roles_of(swap, plan_of(swap))
    control = roles_of(net, None, swapped=roles.swapped, absent=roles.added)
    assert control.absent == roles.added
    for names in (["*.blend"], ["re:.*\\.blend"], ["body.0.guidance"]):
        one = section(stages=[stage(train=names)])
        assert parameter_groups(net, control, one.stages[0], one) == []
    one = section(stages=[stage(train=["head", "*.blend"], lr={"default": 0.1, "*.blend": 0.2})])
    found = parameter_groups(net, control, one.stages[0], one)
    assert {name for group in found for name in group.names} == roles.head
    # What neither has is a fault as before, and so is a pattern without the upgraded network.
    for roles_, name in ((control, "*.blond"), (roles_of(net, None), "*.blend")):
        one = section(stages=[stage(train=["head", name])])
        with pytest.raises(TrainingError) as raised:
            parameter_groups(net, roles_, one.stages[0], one)
        assert str(raised.value).startswith(
            f"stage 'all': train: '{name}' matches no parameter of Net."
        )


def test_what_a_capacity_control_has_is_not_absent():
    swap = upgraded()
    roles = roles_of(swap, plan_of(swap))
    found = roles_of(swap, plan_of(swap), swapped=roles.swapped, absent={*roles.added, "x"})
    assert found.absent == {"x"}


def test_norms_rest_where_the_control_does(tmp_path):
    """Else the upgraded network has seen more pictures than the control."""
    swap, net = upgraded(), Net()
    roles = roles_of(swap, plan_of(swap))
    control = roles_of(net, None, swapped=roles.swapped, absent=roles.added)
    adapt = [stage("adapt", ["added"]), stage("head", ["head"])]
    train(job(tmp_path / "u", swap, stages=adapt, roles=roles))
    train(job(tmp_path / "c", net, stages=adapt, roles=control, arm="control"))
    batches = [
        [m.num_batches_tracked.item() for m in n.modules() if is_batch_norm(m)] for n in (swap, net)
    ]
    assert batches == [[3, 3], [3, 3]]
    before = weights(swap)
    _, said = events(job(tmp_path / "a", swap, stages=adapt[:1], roles=roles))
    assert moved(before, swap) == roles.added
    assert notes(said) == []
    assert len(rows(tmp_path / "a" / "log.csv")) == 3


# Several processes.

WORKER = """
import json, os, sys
from pathlib import Path
from pacswap.errors import PacswapError
from pacswap.recipes import load_recipe
from pacswap.train.engine.device import make_accelerator, on_main
from pacswap.train.setting import prepare

found = []
for folder in sys.argv[1:]:
    try:
        prepare(load_recipe("r.yaml"), Path(folder), resume=False, overwrite=False,
                trust_python=False, say=lambda event: None)
    except PacswapError as error:
        found.append(f"{type(error).__name__}: {error}")
rank = os.environ["RANK"]
found.append(on_main(make_accelerator("fp32"), lambda: f"rank {rank}"))
Path(f"found.{rank}").write_text(json.dumps(found))
"""


def test_the_first_process_speaks_for_all(here):
    """A folder that is taken, one that cannot be made, and one that can."""
    Path("worker.py").write_text(WORKER, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launch, "worker.py", "run", "r.yaml/below", "fresh"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads(Path(f"found.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == (
        "TrainingError: 'run' holds a run. Go on with it: --resume. Or replace it: --overwrite. Or "
        "name another folder: -o FOLDER."
    )
    assert first[1].startswith("TrainingError: cannot write 'r.yaml/below': ")
    assert first[2:] == ["rank 0"]
    assert Path("fresh/recipe.yaml").is_file()
