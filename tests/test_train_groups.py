"""Who learns in a stage, and how fast."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from train_jobs import Net, section, upgraded

import pacswap
from pacswap.errors import TrainingError, nearest_hint
from pacswap.recipes import OptimizerSection, StageSection
from pacswap.surgery import plan_of
from pacswap.train.engine.groups import (
    ParameterGroup,
    Roles,
    groups_of_stages,
    parameter_groups,
    roles_of,
)
from pacswap.train.engine.optimizers import make_optimizer

ADDED = {
    "body.0.blend",
    "body.0.adapting_kernel.log_bandwidth",
    "body.0.guidance.project.weight",
    "body.3.blend",
}
SWAPPED = {"body.0.weight", "body.3.weight", "body.3.bias"}
HEAD = {"classifier.weight", "classifier.bias"}
NORM = {"stem.1.weight", "stem.1.bias", "body.1.weight", "body.1.bias"}


def stage(*train: str, lr: Any = 0.1) -> StageSection:
    return StageSection.model_validate({"name": "one", "train": train, "steps": 4, "lr": lr})


def groups(model: nn.Module, roles: Roles, *train: str, lr: Any = 0.1, **keys: Any):
    return parameter_groups(model, roles, stage(*train, lr=lr), section(**keys))


def names(found: list[ParameterGroup]) -> set[str]:
    return {name for group in found for name in group.names}


def rates(found: list[ParameterGroup]) -> dict[str, float]:
    return {name: group.lr for group in found for name in group.names}


def refused(*train: str, lr: Any = 0.1, model: nn.Module | None = None) -> str:
    model = upgraded() if model is None else model
    with pytest.raises(TrainingError) as raised:
        groups(model, roles_of(model, plan_of(model)), *train, lr=lr)
    return str(raised.value)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return upgraded()


@pytest.fixture(scope="module")
def roles(model) -> Roles:
    return roles_of(model, plan_of(model))


def test_roles_of_an_upgraded_network(roles):
    assert roles.added == ADDED
    assert roles.swapped == SWAPPED
    assert roles.guidance == {"body.0.guidance.project.weight"}
    assert roles.head == HEAD
    assert roles.norm == NORM
    assert roles.lacking == frozenset()


def test_roles_of_its_control(roles):
    control = roles_of(Net(), None, swapped=roles.swapped)
    assert control == Roles(
        swapped=roles.swapped, head=roles.head, norm=roles.norm, lacking={"added", "guidance"}
    )


def test_roles_of_an_upgrade_to_compare_with(roles):
    """One that lacks a part of the upgrade trains the same convolutions."""
    net = pacswap.swap(
        Net(), layers="body.0", guidance="stem", example_input=torch.zeros(1, 3, 24, 32)
    )
    found = roles_of(net, plan_of(net), swapped=roles.swapped)
    assert found.added == {"body.0.blend", "body.0.adapting_kernel.log_bandwidth"}
    assert found.swapped == SWAPPED
    assert names(groups(net, found, "guidance", "swapped")) == SWAPPED
    assert roles_of(net, plan_of(net)).swapped == {"body.0.weight"}


def test_roles_of_a_network_of_timm():
    net = timm.create_model("resnet10t", num_classes=5)
    found = roles_of(net, None)
    assert found.head == {"fc.weight", "fc.bias"}
    assert "layer1.0.bn1.weight" in found.norm
    assert "layer1.0.conv1.weight" not in found.norm


def test_a_control_of_another_network():
    with pytest.raises(TrainingError) as raised:
        roles_of(Net(), None, swapped={"body.9.weight"})
    assert str(raised.value) == (
        "this Net has no 'body.9.weight', which the upgraded network has. Take both from one "
        "recipe."
    )


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (["added"], ADDED),
        (["swapped"], SWAPPED),
        (["guidance"], {"body.0.guidance.project.weight"}),
        (["head", "norm"], HEAD | NORM),
        (["stem.*"], {"stem.0.weight", "stem.1.weight", "stem.1.bias"}),
        (["body.3"], {"body.3.weight", "body.3.bias", "body.3.blend"}),
        (["re:.*\\.blend"], {"body.0.blend", "body.3.blend"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_a_stage_trains(model, roles, train, expected):
    assert names(groups(model, roles, *train)) == expected


def test_all_is_all(model, roles):
    assert names(groups(model, roles, "all")) == {name for name, _ in model.named_parameters()}


def test_patterns_beat_groups_and_groups_have_an_order(model, roles):
    lr = {"default": 1, "norm": 2, "head": 3, "swapped": 4, "added": 5, "guidance": 6}
    found = rates(groups(model, roles, "all", lr=lr | {"body.3": 7, "classifier.weight": 8}))
    assert found["stem.0.weight"] == 1
    assert found["stem.1.bias"] == 2
    assert found["classifier.bias"] == 3
    assert found["body.0.weight"] == 4
    assert found["body.0.blend"] == 5
    assert found["body.0.guidance.project.weight"] == 6
    assert found["body.3.blend"] == found["body.3.bias"] == 7
    assert found["classifier.weight"] == 8


def test_vectors_biases_and_scalars_do_not_decay(model, roles):
    found = groups(model, roles, "all", optimizer={"weight_decay": 0.3})
    parameters = dict(model.named_parameters())
    flat = {name for group in found if group.weight_decay == 0 for name in group.names}
    assert flat == {name for name, p in parameters.items() if p.ndim <= 1}
    assert {group.weight_decay for group in found} == {0, 0.3}


def test_what_a_network_excludes_does_not_decay(roles):
    net = upgraded()
    net.no_weight_decay = lambda: {"stem.0.weight"}
    found = groups(net, roles, "all")
    assert {g.weight_decay for g in found if "stem.0.weight" in g.names} == {0}


def test_layer_decay_is_timms():
    net = timm.create_model("resnet10t", num_classes=5)
    net.conv1.requires_grad_(False)
    truth = timm.create_model("resnet10t", num_classes=5)
    scales = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(truth, layer_decay=0.7)
        for p in group["params"]
    }
    found = rates(groups(net, roles_of(net, None), "all", layer_decay=0.7))
    assert found == {name: 0.1 * scales[id(p)] for name, p in truth.named_parameters()}
    assert len(set(found.values())) > 3
    assert not net.conv1[0].weight.requires_grad


def test_layer_decay_without_timms_layers(model, roles):
    found = rates(groups(model, roles, "all", layer_decay=0.5))
    assert found["classifier.weight"] == 0.1
    assert found["stem.0.weight"] == 0.05  # all nine tensors of the trunk are one layer
    assert found["body.3.blend"] == found["body.3.weight"]


def test_what_is_added_moves_no_other_parameter(model, roles):
    deep = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(20)])
    swapped = pacswap.swap(
        deep, layers=["2", "9"], guidance="0", example_input=torch.zeros(1, 3, 24, 32)
    )
    before = rates(groups(deep, roles_of(deep, None), "all", layer_decay=0.5))
    after = rates(groups(swapped, roles_of(swapped, plan_of(swapped)), "all", layer_decay=0.5))
    assert before == {name: after[name] for name in before}
    assert len(set(before.values())) == 4
    assert after["9.blend"] == before["9.weight"] != before["0.weight"] == after["2.blend"]


def test_names_that_match_nothing():
    assert refused("head", "bodi.0", lr={"default": 0.1, "norm": 0.2}) == (
        "stage 'one': train: 'bodi.0' matches no parameter of Net. Nearest: 'body.0', 'body.3'."
    )
    assert refused("head", lr={"default": 0.1, "norm": 0.2, "body.9": 1}) == (
        "stage 'one': lr: 'norm' matches no parameter that learns in this stage. Groups with "
        "parameters: head, all.\n"
        "stage 'one': lr: 'body.9' matches no parameter that learns in this stage."
    )


def test_a_guidance_that_is_not_projected():
    net = pacswap.swap(
        Net(), layers="body.0", guidance="stem", example_input=torch.zeros(1, 3, 24, 32)
    )
    assert refused("guidance", model=net) == (
        "stage 'one': train: 'guidance' matches no parameter of Net. No guidance is projected: "
        "set guidance.channels in the recipe, or drop it."
    )


def test_two_patterns_for_one_parameter():
    assert refused("body.3", lr={"default": 1, "body.*": 2, "*.bias": 3}) == (
        "stage 'one': lr: 'body.*', '*.bias' give 'body.3.bias' several learning rates. Let only "
        "one of them match it."
    )


def test_the_faults_of_all_stages_come_together(model, roles):
    stages = [
        {"name": name, "train": [f"{name}.x"], "steps": 1, "lr": 0.1} for name in ("qq", "zz")
    ]
    with pytest.raises(TrainingError) as raised:
        groups_of_stages(model, roles, section(stages=stages))
    assert str(raised.value) == (
        "finetune.stages has 2 faults:\n"
        "stage 'qq': train: 'qq.x' matches no parameter of Net.\n"
        "stage 'zz': train: 'zz.x' matches no parameter of Net."
    )


def test_a_control_has_nothing_to_learn_where_only_the_swap_does(roles):
    control = roles_of(Net(), None, swapped=roles.swapped)
    assert groups(Net(), control, "added", "guidance") == []
    lr = {"default": 0.1, "added": 0.2}
    assert names(groups(Net(), control, "added", "swapped", lr=lr)) == SWAPPED


def test_a_control_that_never_learns(roles):
    control = roles_of(Net(), None, swapped=roles.swapped)
    stages = [{"name": "one", "train": ["added"], "steps": 1, "lr": 0.1}]
    with pytest.raises(TrainingError) as raised:
        groups_of_stages(Net(), control, section(stages=stages))
    assert str(raised.value) == (
        "finetune.stages: no stage trains anything of a network without a swap, so there is "
        "nothing to compare. Let a stage train swapped or head too."
    )


def make(model: nn.Module, roles: Roles, **keys: Any) -> torch.optim.Optimizer:
    found = groups(model, roles, "all", lr={"default": 0.1, "added": 0.2}, optimizer=keys)
    return make_optimizer(model, OptimizerSection.model_validate(keys), found)


def test_an_optimizer_is_timms(model, roles):
    made = make(model, roles, name="sgd", weight_decay=0.3)
    truth = create_optimizer_v2([torch.zeros(1)], "sgd", lr=0.1, momentum=0.9)
    assert type(made) is type(truth)
    assert {g["momentum"] for g in made.param_groups} == {0.9}
    assert {g["nesterov"] for g in made.param_groups} == {True}
    pairs = {(g["key"], g["lr"], g["weight_decay"]) for g in made.param_groups}
    assert pairs == {
        ("default", 0.1, 0),
        ("default", 0.1, 0.3),
        ("added", 0.2, 0),
        ("added", 0.2, 0.3),
    }


@pytest.mark.parametrize("name", ["adamw", "lion", "lookahead_adamw", "lamb", "adafactor", "muon"])
def test_optimizers_that_learn(name):
    net = upgraded()
    roles = roles_of(net, plan_of(net))
    optimizer = make(net, roles, name=name)
    before = net.classifier.weight.detach().clone()
    net(torch.rand(2, 3, 24, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, net.classifier.weight)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"name": "adamv"},
            "finetune.optimizer.name: timm has no optimizer 'adamv' ({n} are known). {near}",
        ),
        (
            {"name": "adahessian"},
            "finetune.optimizer.name: 'adahessian' needs second derivatives, which this training "
            "does not compute. Take adamw or sgd.",
        ),
        (
            {"name": "lion", "momentum": 0.5},
            "finetune.optimizer.momentum: 'lion' has no momentum. Remove the key, or set its own "
            "options in args.",
        ),
        (
            {"name": "sgd", "args": {"beta": 1}},
            "finetune.optimizer: 'sgd' cannot be made with args {'beta': 1}: SGD.__init__() got an "
            "unexpected keyword argument 'beta'",
        ),
    ],
    ids=["unknown", "second order", "momentum", "args"],
)
def test_optimizers_that_cannot_run(model, roles, keys, words):
    with pytest.raises(TrainingError) as raised:
        make(model, roles, **keys)
    known = timm.optim.list_optimizers()
    near = nearest_hint("adamv", known)
    assert str(raised.value) == words.replace("{n}", str(len(known))).replace("{near}", near)
