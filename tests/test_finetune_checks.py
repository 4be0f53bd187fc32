"""What `pacswap finetune` finds out before it measures or trains anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_finetune import RECIPE

from pacswap.errors import DataError, RecipeError, TrainingError
from pacswap.recipes import load_recipe
from pacswap.train import run
from pacswap.train.run import finetune
from pacswap.zoo import Source, has_trained_head


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")


@pytest.fixture
def unmeasured(monkeypatch):
    """Whoever measures before the checks are done fails the test."""

    def late(*args, **kwargs):
        raise AssertionError("measured before everything was checked")

    for name in ("verify", "measure_latency", "evaluate", "train"):
        monkeypatch.setattr(run, name, late)


WRONG = {
    "optimizer": (
        "finetune.optimizer.name=adamv",
        TrainingError,
        "adamv",
    ),
    "batch size": ("finetune.batch_size=99", DataError, "99"),
    "pattern": ("finetune.stages[0].train=['nope.*']", TrainingError, "nope.*"),
    "pattern of a rate": (
        "finetune.stages[0].lr={default: 1.0e-3, 'nope.*': 1.0e-2}",
        TrainingError,
        "nope.*",
    ),
}


@pytest.mark.parametrize("control", [False, True], ids=["alone", "controlled"])
@pytest.mark.parametrize(("override", "error", "named"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_told_before_anything_is_measured(
    override, error, named, control, unmeasured
):
    with pytest.raises(error) as raised:
        finetune("r.yaml", [override], control=control)
    assert named in str(raised.value)


def test_a_right_recipe_is_measured(unmeasured):
    with pytest.raises(AssertionError, match="measured before everything was checked"):
        finetune("r.yaml")


def test_a_seed_counts_once():
    with pytest.raises(RecipeError) as raised:
        load_recipe("r.yaml", ["finetune.control={seeds: [1, 2, 1]}"])
    assert str(raised.value).endswith(
        "finetune.control.seeds[2]: expected each seed once, got 1 again."
    )


@pytest.mark.parametrize(
    ("overrides", "seeds"),
    [
        (["finetune.seed=5"], {5}),
        (["finetune.seed=5", "finetune.control={}"], {5}),
        (["finetune.seed=5", "finetune.control={seeds: [1, 2]}"], {1, 2}),
    ],
)
def test_which_seeds_are_trained(overrides, seeds, monkeypatch):
    trained = set()

    def note(job, **how):
        trained.add(job.seed)
        if trained == seeds:
            raise KeyboardInterrupt
        return run.train_(job, **how)

    monkeypatch.setattr(run, "train_", run.train, raising=False)
    monkeypatch.setattr(run, "train", note)
    with pytest.raises(KeyboardInterrupt):
        finetune("r.yaml", [*overrides, "finetune.stages[0].steps=1"])
    assert trained == seeds


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Source("torchvision", "fcn_resnet50", "DEFAULT"), True),
        (Source("torchvision", "fcn_resnet50", "DEFAULT", num_classes=3), False),
        (Source("torchvision", "fcn_resnet50", None), False),
        (Source("pacswap", "scene_net", "DEFAULT"), True),
        (Source("pacswap", "deeplabv3", "DEFAULT"), False),
        (Source("pacswap", "deeplabv3", "voc.safetensors"), True),
    ],
)
def test_which_networks_are_measured_before_fine_tuning(source, expected):
    assert has_trained_head(source) is expected


def test_bandwidths_are_set_on_the_pictures_of_the_recipe(monkeypatch):
    """`calibration:` where there is one, else pictures that are learnt from."""
    seen = []

    def note(name, loaded, original, images):
        seen.append(images.shape[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "make_arm", note)
    with pytest.raises(KeyboardInterrupt):
        finetune("r.yaml")
    from PIL import Image

    for name in "abc":
        Image.fromarray(torch.randint(0, 255, (48, 64, 3)).byte().numpy()).save(f"{name}.png")
    with pytest.raises(KeyboardInterrupt):
        finetune("r.yaml", ["calibration={images: [a.png, b.png, c.png]}"], overwrite=True)
    assert seen == [8, 3]
