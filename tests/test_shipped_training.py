"""A shipped recipe of each kind trains: the loss falls, and only what may learn moves."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from pacswap.recipes import load_recipe, shipped_recipes
from pacswap.train.arms import make_arm
from pacswap.train.data import open_data
from pacswap.train.engine.groups import parameter_groups
from pacswap.train.engine.loop import Job, train
from pacswap.train.measure.summary import UPGRADED
from pacswap.train.setting import scales_of, some_images
from pacswap.upgrade import built

STEPS = 12
KINDS = {
    "swap": "fcn_resnet50",
    "pool": "fcn_resnet50_pool",
    "append": "fcn_resnet50_crf",
    "upsample": "camvid_deeplabv3",
    "quick": "scenes_guided",
}
SIZES = {"append": 64, "swap": 64}  # its CRF looks 48 pixels far; the others do with less


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(job, names that may learn, state before, folder): the recipe's last stage, 12 steps."""
    path = shipped_recipes()[KINDS[request.param]]
    stages = load_recipe(path).recipe.finetune.stages
    last = f"finetune.stages[{len(stages) - 1}]"
    changes = ["epochs=null", f"steps={STEPS}", "warmup=0"]
    if stages[-1].schedule == "step":
        changes.append("decay_every=6")
    # The lr of a network that is trained already is too gentle for a random one.
    lr = "lr={default: 1.0e-3, added: 1.0e-2}" if "added" in stages[-1].train else "lr=1.0e-3"
    side = SIZES.get(request.param, 32)
    data = f"finetune.data={{format: scenes, count: [2, 1], resize: [{side}, {side}]}}"
    overrides = ["model.weights=null", "model.num_classes=6", data, "finetune.batch_size=2"]
    overrides += [f"{last}.{change}" for change in [*changes, lr]]
    loaded = load_recipe(
        path, [*overrides, "finetune.workers=0", f"model.input_size=[3, {side}, {side}]"]
    )
    section = loaded.recipe.finetune.model_copy(
        update={"stages": loaded.recipe.finetune.stages[-1:], "batch_norm": "frozen"}
    )
    learn, measure = open_data(section.data, Path())
    original = built(loaded)
    scales = scales_of(section.data, original)
    arm = make_arm(UPGRADED, loaded, original, some_images(learn, 2, (side, side), scales))
    groups = parameter_groups(arm.model, arm.roles, section.stages[0], section)
    job = Job(
        arm.model, section, learn, measure, arm.roles, 0, tmp_path_factory.mktemp("run"), *scales
    )
    before = {name: tensor.clone() for name, tensor in arm.model.state_dict().items()}
    train(job)
    return job, {name for group in groups for name in group.names}, before


def test_the_loss_falls(trained):
    job, _, _ = trained
    with (job.folder / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])


def test_only_what_may_learn_moves(trained):
    job, may_learn, before = trained
    after = job.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= may_learn
    assert len(moved) > 0.9 * len(may_learn), "most of it does"
    assert may_learn < set(before), "something stands still"
