"""What a review found: wrong types, foreign sources, frozen randomness, external guidance."""

import random
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import pacswap
from pacswap.errors import CheckpointError, PlanError

IMAGES = torch.randn(2, 3, 64, 64)


def upgraded(**options):
    net = timm.create_model("resnet18", **options)
    return pacswap.swap(net, "layer4.*.conv2", "layer1", example_input=IMAGES)


WRONG_TYPES = {
    "override": (
        {"groups": [{"layers": "conv1", "guidance": "input", "override": "false"}]},
        "groups[0].override: expected True or False, got 'false'.",
    ),
    "detach": (
        {"layers": "conv1", "guidance": {"from": "input", "detach": "false"}},
        "guidance.detach: expected True or False, got 'false'.",
    ),
    "standardize": (
        {"layers": "conv1", "guidance": "input", "kernel": {"standardize": "no"}},
        "kernel.standardize: expected True or False, got 'no'.",
    ),
    "kernel": (
        {"layers": "conv1", "guidance": "input", "kernel": False},
        "kernel: expected a KernelSpec or a mapping, got False.",
    ),
    "from and source": (
        {"layers": "conv1", "guidance": {"from": "input", "source": "layer1"}},
        "guidance: from and source are one key. Leave one out.",
    ),
    "query size": (
        {"layers": {"kernel_size": 3.0}, "guidance": "input"},
        "layers.kernel_size: expected an int or a pair of ints, got 3.0.",
    ),
    "query name": (
        {"layers": {"name": 3}, "guidance": "input"},
        "layers.name: expected a pattern or a list of them, got 3.",
    ),
    "groups": ({"groups": 5}, "groups: expected a list of groups, got 5."),
    "example": (
        {"layers": "layer4.1.conv2", "guidance": "layer1", "example_input": "foo"},
        "example_input: expected a tensor or a tuple of arguments with one, got str.",
    ),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_a_wrong_type_is_said(case):
    arguments, message = WRONG_TYPES[case]
    with pytest.raises(PlanError) as caught:
        pacswap.swap(timm.create_model("resnet18"), **arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("call", [pacswap.layers, lambda m: pacswap.swap(m, "a", "b")])
def test_nothing_is_no_network(call):
    with pytest.raises(PlanError, match=r"expected a torch\.nn\.Module, got NoneType"):
        call(None)


def test_a_callable_that_raises_is_named():
    with pytest.raises(PlanError, match=r"raised TypeError on 'conv1': .* called as"):
        pacswap.swap(timm.create_model("resnet18"), lambda name: True, "layer1")


def test_a_source_of_other_strides_is_refused(tmp_path):
    source = {"library": "timm", "name": "resnet18", "args": {"output_stride": 16}}
    with pytest.raises(CheckpointError, match=r"another network than this ResNet: 'layer4.0'"):
        pacswap.save(upgraded(), tmp_path / "m", source=source)
    assert not (tmp_path / "m").exists()


def test_an_option_that_repr_hides_is_kept(tmp_path):
    assert pacswap.load(pacswap.save(upgraded(drop_rate=0.4), tmp_path / "m")).drop_rate == 0.4


class Random(nn.Module):
    def __init__(self, draws):
        super().__init__()
        self.draws = draws
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.a(x)
        return x + self.b(x) * (random.random() if self.draws else 0.5)


def test_python_randomness_is_not_frozen():
    model = Random(True)
    plan = pacswap.plan(model, "b", "a", example_input=IMAGES)
    assert "it draws Python random numbers, which a trace would freeze" in str(plan)
    upgraded = pacswap.swap(model, "b", "a", example_input=IMAGES)
    outputs = []
    for network in (model, upgraded, upgraded):
        random.seed(len(outputs) // 2)
        outputs.append(network(IMAGES))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_where_only_a_graph_feeds_it_is_refused():
    with pytest.raises(PlanError, match="it draws Python random numbers"):
        pacswap.swap(Random(True), "b", "conv2d", example_input=IMAGES)


def test_without_randomness_it_is_swapped():
    pacswap.swap(Random(False), "b", "a", example_input=IMAGES)


def test_external_and_calibrated_groups_go_together():
    groups = [
        {"layers": "layer3.1.conv2", "guidance": "external"},
        {"layers": "layer4.1.conv2", "guidance": "layer1"},
    ]
    net = timm.create_model("resnet18").eval()
    both = pacswap.swap(net, groups=groups, example_input=IMAGES)
    kernels = [layer.adapting_kernel for layer in pacswap.surgery.pac_layers(both).values()]
    assert [bool(kernel.log_bandwidth == 0) for kernel in kernels] == [True, False]
    assert torch.equal(both(IMAGES, guidance=torch.randn(2, 5, 16, 16)), net(IMAGES))


@pytest.mark.parametrize("override", ["guidance=external", "kernel.blend=1.0"])
def test_recipes_of_every_kind_are_verified(override):
    report = pacswap.apply("quickstart", [f"swap[0].{override}"]).report
    assert report.verification.passed


def test_one_channel_needs_no_example():
    net = timm.create_model("resnet18", in_chans=1)
    assert pacswap.plan(net, "layer4.*.conv2", "input").input_shape == (1, 1, 224, 224)


def test_a_typed_path_starts_where_the_user_is(tmp_path, monkeypatch):
    shipped = Path(pacswap.__file__).parents[1] / "recipes" / "quickstart.safetensors"
    (tmp_path / "mine.safetensors").write_bytes(shipped.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert pacswap.apply("quickstart", ["model.weights=mine.safetensors"]).plan.layers
