"""`pacswap finetune`, `evaluate` and `predict` from the command line, on drawn scenes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from train_data import write_folder

import pacswap
from pacswap.cli import main
from pacswap.zoo import Source, build

RECIPE = """
version: 1
model:
  library: pacswap
  name: scene_net
  weights: null
  args: {width: 6, num_classes: 6}
  input_size: [3, 48, 64]
upsample:
  - layers: interpolate
    guidance: {from: [stem, input], channels: 4}
    filter: {kernel_size: 3, weights: full, blur: 2}
finetune:
  batch_size: 4
  workers: 0
  data: {format: scenes, count: [16, 3], resize: [48, 64], transforms: {flip: 0.5}}
  optimizer: {weight_decay: 0.0}
  stages:
    - {name: all, train: [all], steps: 12, lr: {default: 3.0e-3, added: 1.0e-2}}
  evaluate: {pictures: 2}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a recipe."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A run with both controls, which later tests only look at."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    control = "finetune.control={seeds: [0, 1], capacity: true}"
    main(["finetune", str(folder / "r.yaml"), control, "-o", str(folder / "run")])
    return folder / "run"


def refused(capsys, *args: str) -> str:
    """The words with which a command fails."""
    with pytest.raises(SystemExit) as raised:
        main(list(args))
    assert raised.value.code == 2
    printed = capsys.readouterr()
    return printed.err.strip().splitlines()[-1].removeprefix("pacswap: ")


# What a run leaves behind.


def test_a_run_leaves_what_the_manual_names(done):
    inside = {path.name for path in done.iterdir()}
    assert inside == {
        *("recipe.yaml", "report.md", "report.json", "curves.png", "pictures", "model"),
        *("seed-0", "seed-1"),
    }
    for seed in ("seed-0", "seed-1"):
        assert {path.name for path in (done / seed).iterdir()} == {
            *("control", "upgraded", "capacity"),
        }
    assert len(list((done / "pictures").iterdir())) == 2
    assert "\n![" in (done / "report.md").read_text(encoding="utf-8")


def test_the_report_compares_what_was_trained(done):
    report = json.loads((done / "report.json").read_text(encoding="utf-8"))
    arms = [(arm["arm"], arm["seed"]) for arm in report["arms"]]
    assert arms == [
        (name, seed) for seed in (0, 1) for name in ("control", "upgraded", "capacity control")
    ]
    assert [c["control"] for c in report["comparisons"]] == ["control", "capacity control"]
    assert report["verdict"].startswith(("No gain is shown: ", "A gain: ", "A loss: "))
    assert report["before"] is None, "its head is random"
    assert report["latency"]["shape"] == [1, 3, 48, 64]
    upgraded = [arm["scores"]["miou"] for arm in report["arms"] if arm["arm"] == "upgraded"]
    compared = report["comparisons"][0]["measures"]["miou"]
    assert compared["upgraded"] == pytest.approx(sum(upgraded) / 2)


def test_the_arms_of_a_seed_begin_alike_and_see_the_same(done):
    """Before the blend has moved, the first loss is the same; later ones are not."""
    first = {}
    for arm in ("control", "upgraded", "capacity"):
        log = (done / "seed-0" / arm / "log.csv").read_text(encoding="utf-8").splitlines()
        column = log[0].split(",").index("loss")
        first[arm] = [float(line.split(",")[column]) for line in log[1:]]
    assert first["control"][0] == first["upgraded"][0] == first["capacity"][0]
    assert first["control"] != first["upgraded"] != first["capacity"]
    other = (done / "seed-1" / "control" / "log.csv").read_text(encoding="utf-8").splitlines()
    assert float(other[1].split(",")[column]) != first["control"][0]


def test_the_model_of_a_run_loads_and_is_the_one_that_was_measured(done, capsys):
    model = pacswap.load(done / "model")
    state = torch.load(
        done / "seed-0/upgraded/checkpoints/step-0000012/state.pt", weights_only=True
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][name]), name
    main(["evaluate", str(done), "--json"])
    measured = json.loads(capsys.readouterr().out)
    report = json.loads((done / "report.json").read_text(encoding="utf-8"))
    told = next(arm for arm in report["arms"] if arm["arm"] == "upgraded")["scores"]
    assert measured["miou"] == pytest.approx(told["miou"], abs=1e-6)
    assert measured["classes"][0]["name"] == "sky"


def test_evaluate_prints_every_class(done, capsys):
    main(["evaluate", str(done / "model"), "finetune.evaluate.flip=true", "--split", "train"])
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:8]] == list(pacswap_classes())
    assert printed.rstrip().endswith(" over 16 pictures")


def pacswap_classes():
    from pacswap.scenes import CLASSES

    return CLASSES


def test_predict_writes_palette_pictures(done, here, capsys):
    data = write_folder(here / "data", train=2, val=1, size=(48, 64))
    pictures = sorted((data / "images").iterdir())
    main(["predict", str(done), str(data / "images"), "-o", "masks", "--overlay"])
    names = {path.name for path in Path("masks").iterdir()}
    assert names == {f"{p.stem}{end}.png" for p in pictures for end in ("", "_overlay")}
    mask = Image.open(Path("masks") / f"{pictures[0].stem}.png")
    assert mask.mode == "P"
    assert np.asarray(mask).shape == (48, 64)
    assert np.asarray(mask).max() < 6


def test_predict_refuses_before_it_writes(done, here, capsys):
    Path("text.png").write_text("no picture", encoding="utf-8")
    Path("empty").mkdir()
    with pytest.raises(SystemExit):
        main(["predict", str(done), "text.png", "empty", "none.jpg", "-o", "masks"])
    error = capsys.readouterr().err
    assert "'empty' holds no pictures." in error
    assert "'none.jpg' is not there." in error
    assert "text.png" in error
    assert not Path("masks").exists()


def test_predict_replaces_only_when_told(done, here, capsys):
    Image.new("RGB", (64, 48)).save("a.png")
    Path("masks").mkdir()
    Path("masks/a.png").write_text("drawn by hand", encoding="utf-8")
    message = refused(capsys, "predict", str(done), "a.png", "-o", "masks")
    assert message == (
        "1 file is there already: 'masks/a.png'. Name another output, or replace them: --overwrite "
        "on the command line, overwrite=True in Python."
    )
    assert Path("masks/a.png").read_text(encoding="utf-8") == "drawn by hand"
    main(["predict", str(done), "a.png", "-o", "masks", "--overwrite"])
    with Image.open("masks/a.png") as mask:
        assert mask.mode == "P"


def test_a_run_that_was_refused_leaves_its_folder_free(here, capsys):
    refused(capsys, "finetune", "r.yaml", "finetune.batch_size=99", "-o", "run")
    main(["finetune", "r.yaml", "finetune.stages[0].steps=1", "-o", "run"])
    assert (here / "run/report.md").exists()


def test_predict_does_not_replace_a_picture_by_its_mask(done, here, capsys):
    Image.new("RGB", (64, 48)).save("a.png")
    message = refused(capsys, "predict", str(done), "a.png", "-o", ".")
    assert message == "'a.png' would be replaced by its own mask. Name another output."


# Refusals.


def test_a_recipe_that_does_not_train(here, capsys):
    Path("r.yaml").write_text(RECIPE[: RECIPE.index("finetune:")], encoding="utf-8")
    assert refused(capsys, "finetune", "r.yaml") == (
        "r.yaml has no 'finetune', which says on what and how to train. Add one: pacswap cp "
        "scenes_guided my.yaml shows the form."
    )


def test_other_classes_than_the_networks(here, capsys):
    message = refused(capsys, "finetune", "r.yaml", "model.args.num_classes=4")
    assert message == (
        "scene_net gives 4 classes and the data has 6. Give it a new head: model.num_classes=6, or "
        "mend finetune.data.classes."
    )
    assert not (here / "runs/r/seed-0").exists()


def test_an_external_guidance(here, capsys):
    message = refused(capsys, "finetune", "r.yaml", "upsample[0].guidance={from: external}")
    assert message == (
        "r.yaml asks for an external guidance, which no labelled data brings along. Name a layer "
        "or 'input', or train in a loop of your own: docs/own_loop.md."
    )


def test_a_folder_that_is_taken(here, done, capsys):
    message = refused(capsys, "finetune", "r.yaml", "-o", str(done))
    assert message == (
        f"'{done}' holds a run. Go on with it: --resume. Or replace it: --overwrite. Or name "
        "another folder: -o FOLDER."
    )
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years", encoding="utf-8")
    message = refused(capsys, "finetune", "r.yaml", "-o", "mine", "--overwrite")
    assert message == (
        "'mine' holds 'thesis.txt', which no run of pacswap wrote. Name another folder: -o FOLDER."
    )
    assert Path("mine/thesis.txt").exists()


def test_a_run_of_another_recipe(here, done, capsys):
    change = "finetune.batch_size=2"
    message = refused(capsys, "finetune", "r.yaml", change, "-o", str(done), "--resume")
    assert message == (
        f"'{done}' holds a run of another recipe: finetune.batch_size is 4 there and 2 here. Go on "
        "with the recipe as it was, or name another folder: -o FOLDER."
    )


def test_a_model_directory_that_was_not_trained(here, capsys):
    net = build(Source("pacswap", "scene_net"))
    pacswap.save(pacswap.swap(net, "head.conv", "layer1"), "model")
    message = refused(capsys, "evaluate", "model")
    assert message.startswith("model/recipe.yaml has no 'finetune'")


# Killed and resumed.


def started(*args: str) -> fresh.Process:
    return fresh.start("-m", "pacswap", "finetune", *args)


LONG = ["r.yaml", "finetune.stages[0].steps=40", "finetune.checkpoint.every=1", "-o", "run"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(here):
    whole = started(*LONG[:-1], "whole")
    log = Path("run/seed-0/upgraded/log.csv")
    for rows in (8, 20):
        process = started(*LONG, "--resume")
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < rows):
            time.sleep(0.02)
        process.kill()
        process.communicate()
    assert not Path("run/model").exists(), "it was killed before its end"
    last = started(*LONG, "--resume")
    assert last.communicate() and last.returncode == 0
    assert whole.communicate() and whole.returncode == 0
    expected, found = weights(Path("whole")), weights(Path("run"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    same = Path("whole/seed-0/upgraded/log.csv").read_bytes()
    assert log.read_bytes() == same
    begun = Path("whole/seed-0/upgraded/checkpoints/step-0000039/state.pt")
    early = torch.load(begun, weights_only=True)["model"]
    assert any(not torch.equal(early[name], expected[name]) for name in expected)


def test_ctrl_c_ends_in_words_and_can_be_resumed(here):
    process = started(*LONG)
    log = Path("run/seed-0/upgraded/log.csv")
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    words = error.strip().splitlines()[-1]
    assert "--resume" in words
    assert "Traceback" not in error
    assert list(Path("run/seed-0/upgraded/checkpoints").glob("step-*"))


def test_a_recipe_resumed_after_its_end_is_done_at_once(here, capsys):
    main(["finetune", "r.yaml"])
    before = weights(Path("runs/r"))
    main(["finetune", "r.yaml", "--resume"])
    assert all(torch.equal(before[k], v) for k, v in weights(Path("runs/r")).items())
    assert "written to runs/r" in capsys.readouterr().out


def test_a_folder_of_ones_own(here, capsys):
    """As the README shows it: images, masks, lists of names."""
    write_folder(here / "data", train=8, val=3, size=(48, 64))
    data = (
        "finetune.data={format: folder, root: data, images: images, masks: masks, train: "
        "train.txt, val: val.txt, classes: classes.txt}"
    )
    main(["finetune", "r.yaml", data, "finetune.stages[0].steps=4", "-o", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["data"].startswith("8 pictures to learn from and 3 to measure on, 6 classes")
    recipe = (here / "run/model/recipe.yaml").read_text(encoding="utf-8")
    assert f"root: {here / 'data'}" in recipe, "found from anywhere"
