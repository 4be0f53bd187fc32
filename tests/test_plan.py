"""What a plan holds: which layers, which guidance, which kernels are shared, what is rewired."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import models
import pytest
import torch
import torchvision
from same import Untouched
from swaps import SWAPS, TINY
from torch import nn

import pacswap
from pacswap import GuidanceSpec, LayerQuery

EXAMPLE = torch.empty(1, 3, 64, 64, device="meta")
SMALL = torch.empty(1, 3, 16, 20, device="meta")


class Block(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, stride=stride, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.downsample = nn.Conv2d(4, 4, 1, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv2(self.relu(self.conv1(x)))
        out += self.downsample(x)
        return self.relu(out)


class ResNet(nn.Sequential):
    """The names and strides of resnet18, four channels."""

    def __init__(self) -> None:
        stages = {
            f"layer{n}": nn.Sequential(Block(1 if n == 1 else 2), Block(1)) for n in (1, 2, 3, 4)
        }
        stem = {
            "conv1": nn.Conv2d(3, 4, 7, stride=2, padding=3),
            "maxpool": nn.MaxPool2d(3, 2, padding=1),
        }
        super().__init__(OrderedDict(stem | stages))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return ResNet().to("meta")


def names(plan: pacswap.Plan) -> list[str]:
    return [layer.name for layer in plan.layers]


# ---- selection

LAST = ["layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2", "layer4.1.conv2"]
STRIDED = ["layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]


def ends_a_strided_block(name: str, conv: nn.Module) -> bool:
    return name.endswith("0.conv2") and "layer1" not in name


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        pytest.param("layer4.1.conv2", LAST[3:], id="name"),
        pytest.param("layer4.?.conv2", ["layer4.0.conv2", "layer4.1.conv2"], id="glob"),
        pytest.param("layer[24].0.conv1", [STRIDED[0], STRIDED[2]], id="class"),
        pytest.param("*1.conv2", LAST, id="across_dots"),
        pytest.param(r"re:layer[34]\.1\.conv2", LAST[2:], id="regex"),
        pytest.param(["layer4.1.conv2", "layer3.1.c*2"], LAST[2:], id="list_as_it_runs"),
        pytest.param(("layer4.1.conv2", "layer4.1.*2"), LAST[3:], id="tuple_that_overlaps"),
        pytest.param({"kernel_size": 3, "stride": 2}, STRIDED, id="stride"),
        pytest.param({"kernel_size": (3, 3), "stride": [2, 2]}, STRIDED, id="pairs"),
        pytest.param({"kernel_size": 7, "type": "Conv2d"}, ["conv1"], id="type"),
        pytest.param({"kernel_size": 3, "last_of_stage": True}, LAST, id="last_of_stage"),
        pytest.param(
            {"last_of_stage": True, "exclude": ["conv1", "layer[12].*"]}, LAST[2:], id="exclude"
        ),
        pytest.param({"stride": 2, "exclude": "conv1"}, STRIDED, id="exclude_one"),
        pytest.param({"name": "layer[23].*", "last_of_stage": True}, LAST[1:3], id="query_name"),
        pytest.param({"name": ["layer2.*", "re:layer3.*"], "stride": 2}, STRIDED[:2], id="names"),
        pytest.param(LayerQuery(stride=2, kernel_size=3), STRIDED, id="query"),
        pytest.param([LAST[3], LayerQuery(kernel_size=7)], ["conv1", LAST[3]], id="mixed"),
        pytest.param([{"kernel_size": 7}, LAST[3]], ["conv1", LAST[3]], id="mapping"),
        pytest.param(ends_a_strided_block, [n[:-1] + "2" for n in STRIDED], id="callable"),
    ],
)
def test_selection(resnet: nn.Module, layers: Any, expected: list[str]) -> None:
    assert names(pacswap.plan(resnet, layers, "input", example_input=EXAMPLE)) == expected


@pytest.mark.parametrize(
    ("model", "query", "expected"),
    [
        (
            "mobilenet_v2",
            {"depthwise": True, "last_of_stage": True},
            ["features.1.conv.0.0", *(f"features.{n}.conv.1.0" for n in (3, 6, 13, 17))],
        ),
        ("vgg11", {"last_of_stage": True}, [f"features.{n}" for n in (0, 3, 8, 13, 18)]),
    ],
)
def test_without_numbered_containers_a_stage_is_a_size(
    model: str, query: dict[str, Any], expected: list[str]
) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(model, weights=None)
    assert names(pacswap.plan(net, query, "input", example_input=EXAMPLE)) == expected


# ---- guidance


@pytest.mark.parametrize(
    ("guidance", "sources", "channels"),
    [
        pytest.param("layer1", {"layer1": (4, 16, 16)}, 4, id="name"),
        pytest.param("layer2.0.downsample", {"layer2.0.downsample": (4, 8, 8)}, 4, id="inner"),
        pytest.param("maxpoo?", {"maxpool": (4, 16, 16)}, 4, id="glob"),
        pytest.param("re:layer[1]", {"layer1": (4, 16, 16)}, 4, id="regex"),
        pytest.param(
            ["layer1", "conv1"], {"layer1": (4, 16, 16), "conv1": (4, 32, 32)}, 8, id="list"
        ),
        pytest.param("layer1.0.add", {"layer1.0.add": (4, 16, 16)}, 4, id="node"),
        pytest.param("layer1.0.relu_1", {"layer1.0.relu_1": (4, 16, 16)}, 4, id="second_call"),
        pytest.param("input", {"input": (3, 64, 64)}, 3, id="input"),
        pytest.param("input+position", {"input": (3, 64, 64)}, 5, id="position"),
        pytest.param(
            ["input", "layer1"], {"input": (3, 64, 64), "layer1": (4, 16, 16)}, 7, id="both"
        ),
        pytest.param("external", {"external": None}, None, id="external"),
        pytest.param({"from": "layer1"}, {"layer1": (4, 16, 16)}, 4, id="mapping"),
        pytest.param(
            {"from": ["layer1", "input"], "channels": 8, "resize": "area", "detach": True},
            {"layer1": (4, 16, 16), "input": (3, 64, 64)},
            8,
            id="projected",
        ),
        pytest.param(
            {"source": "input+position", "channels": 4}, {"input": (3, 64, 64)}, 4, id="source"
        ),
        pytest.param(GuidanceSpec("layer1", 2), {"layer1": (4, 16, 16)}, 2, id="spec"),
    ],
)
def test_guidance(
    resnet: nn.Module, guidance: Any, sources: dict[str, Any], channels: int | None
) -> None:
    plan = pacswap.plan(resnet, "layer4.1.conv2", guidance, example_input=EXAMPLE)
    (planned,) = plan.guidances
    assert planned.sources == tuple(sources)
    assert [shape and shape[1:] for shape in planned.shapes] == list(sources.values())
    assert planned.channels == channels


@pytest.mark.parametrize(
    ("source", "overwritten"),
    [
        ("layer1.0.add", True),
        ("layer1.0.relu_1", False),
        ("layer1.0.conv1", True),
        ("conv1", False),
    ],
)
def test_what_is_overwritten_later_is_copied(
    resnet: nn.Module, source: str, overwritten: bool
) -> None:
    plan = pacswap.plan(resnet, "layer4.1.conv2", source, example_input=EXAMPLE)
    assert plan.guidances[0].cloned == (overwritten,)


# ---- groups


def test_groups_keep_their_own_guidance_and_kernel(resnet: nn.Module) -> None:
    groups = [
        {"layers": "layer4.?.conv2", "guidance": "layer1", "kernel": {"normalize": "mean"}},
        pacswap.Group("layer3.?.conv2", GuidanceSpec("input"), pacswap.KernelSpec(blend=1.0)),
    ]
    plan = pacswap.plan(resnet, groups=groups, example_input=EXAMPLE)
    found = {
        layer.name: (
            layer.group,
            plan.guidance_of(layer).sources,
            plan.kernels[layer.kernel].spec.normalize,
            plan.kernels[layer.kernel].spec.blend,
        )
        for layer in plan.layers
    }
    assert found == {
        "layer3.0.conv2": (1, ("input",), "none", 1.0),
        "layer3.1.conv2": (1, ("input",), "none", 1.0),
        "layer4.0.conv2": (0, ("layer1",), "mean", 0.0),
        "layer4.1.conv2": (0, ("layer1",), "mean", 0.0),
    }


def test_a_later_group_overrides_an_earlier_one(resnet: nn.Module) -> None:
    groups = [
        {"layers": "layer[34].?.conv2", "guidance": "layer1"},
        {"layers": "layer4.1.conv2", "guidance": "input", "override": True},
    ]
    plan = pacswap.plan(resnet, groups=groups, example_input=EXAMPLE)
    assert [(layer.name, layer.group) for layer in plan.layers] == [
        ("layer3.0.conv2", 0),
        ("layer3.1.conv2", 0),
        ("layer4.0.conv2", 0),
        ("layer4.1.conv2", 1),
    ]


# ---- purity


@pytest.mark.parametrize("name", list(TINY))
def test_planning_leaves_the_model_alone(name: str) -> None:
    model = SWAPS[name].build()
    before = Untouched(model)
    SWAPS[name].plan(model)
    before.check()


class Counting(models.Body):
    """Keeps books, and draws random numbers, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.book: list[int] = []
        self.noise = Noise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.book.append(1)
        return self.target(self.noise(self.norm(self.stem(x))))


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(1).to(x.device)


def test_planning_runs_a_copy_and_restores_the_random_state() -> None:
    model, calls = Counting(), []
    model.noise.register_forward_hook(lambda *_: calls.append(1))
    before = Untouched(model)
    pacswap.plan(model, "target", "stem", example_input=SMALL)
    before.check()
    assert model.book == calls == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: nn.init.constant_(m.target.bias, 2.0),
        lambda m: m.norm.eval(),
        lambda m: m.target.requires_grad_(False),
        lambda m: m.register_forward_hook(models.doubled),
        lambda m: setattr(m, "note", 1),
        lambda m: setattr(m, "norm", nn.Identity()),
        lambda m: torch.rand(1),
        lambda m: m(torch.rand(2, 3, 8, 8)),
    ],
    ids=["weight", "mode", "frozen", "hook", "attribute", "module", "random", "statistics"],
)
def test_a_touched_model_is_noticed(change: Any) -> None:
    model = models.Body()
    before = Untouched(model)
    change(model)
    with pytest.raises(AssertionError):
        before.check()


@pytest.mark.parametrize("name", ["body", "auxiliary", "detector", "projected"])
def test_planning_twice_gives_one_plan(name: str) -> None:
    model = SWAPS[name].build()
    one, two = SWAPS[name].plan(model), SWAPS[name].plan(model)
    assert one == two
    assert str(one) == str(two)
    codes = [
        [trace.graph.python_code("self").src for scope in plan.scopes for trace in scope.traces]
        for plan in (one, two)
    ]
    assert codes[0] == codes[1]


# ---- what is shared, and what is rewired


@pytest.mark.parametrize(
    ("layers", "kernels"),
    [
        ("layer4.?.conv2", 1),
        ("layer[34].?.conv2", 2),
        (["layer4.0.conv1", "layer3.1.conv2"], 2),
        ([*STRIDED, *LAST], 7),
        (["layer4.1.conv1", "layer4.?.conv2"], 1),
    ],
    ids=["one_size", "two_sizes", "two_strides", "all", "one_stage"],
)
def test_layers_of_one_geometry_and_size_share_a_kernel(
    resnet: nn.Module, layers: Any, kernels: int
) -> None:
    plan = pacswap.plan(resnet, layers, "input", example_input=EXAMPLE)
    assert len(plan.kernels) == kernels
    assert {kernel.owner for kernel in plan.kernels} <= set(names(plan))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("tied", 1), ("two_branches", 2), ("two_geometries", 2), ("called_twice", 1)],
)
def test_a_size_that_agrees_by_chance_is_not_shared(name: str, kernels: int) -> None:
    assert len(SWAPS[name].plan(SWAPS[name].build()).kernels) == kernels


def test_groups_with_other_kernels_share_none(resnet: nn.Module) -> None:
    groups = [
        {"layers": "layer4.0.conv2", "guidance": "layer1"},
        {"layers": "layer4.1.conv2", "guidance": "layer1", "kernel": {"normalize": "mean"}},
    ]
    assert len(pacswap.plan(resnet, groups=groups, example_input=EXAMPLE).kernels) == 2


@pytest.mark.parametrize(
    ("name", "module", "method", "graphs"),
    [
        ("body", "", "forward", 1),
        ("split", "", "forward_features", 1),
        ("branch_at_root", "body", "forward", 1),
        ("detector", "body", "forward", 1),
        ("shared", "", "forward", 1),
        ("named_outside", "body", "forward", 1),
        ("dropping", "", "forward", 2),
        ("auxiliary", "", "forward", 2),
    ],
)
def test_the_deepest_method_that_runs_both_is_rewired(
    name: str, module: str, method: str, graphs: int
) -> None:
    (scope,) = SWAPS[name].plan(SWAPS[name].build()).scopes
    assert (scope.module, scope.method, len(scope.traces)) == (module, method, graphs)


def test_parts_that_have_nothing_in_common_are_rewired_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = models.Body(), models.Body()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    groups = [
        {"layers": f"{side}.target", "guidance": f"{side}.stem"} for side in ("left", "right")
    ]
    plan = pacswap.plan(Two(), groups=groups, example_input=SMALL)
    assert [scope.module for scope in plan.scopes] == ["left", "right"]
