"""A layer whose blend is fixed at 0 is the plain layer, and nothing is computed for it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from counts import IMAGES, STEM, WAY, Four, assert_computed, counted, four, freeze, gradients
from operations import CASES
from same import assert_differ, assert_same
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError
from pacswap.nn import PacConv1d, PacConv2d, PacConv3d, PacConvTranspose2d, PacFilter2d, PacPool2d
from pacswap.surgery import calibrate, pac_layers, plan_of
from pacswap.surgery.watch import Seen, watch
from pacswap.zoo import Source, build

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def resting(way: str, *names: str, **kernel: Any) -> nn.Module:
    """`Four` upgraded, of which these layers are frozen at 0; all if none is named."""
    model = four(way, **kernel)
    layers = pac_layers(model)
    freeze(*(layers[name] for name in names or layers))
    return model


@WAY
@MODES
def test_nothing_is_computed_where_all_rest(way: str, training: bool) -> None:
    model = resting(way).train(training)
    assert_computed(model, kernels=0, projections=0, resizings=0)
    assert torch.equal(model(IMAGES), pacswap.revert(model)(IMAGES))


@WAY
@MODES
def test_what_one_layer_needs_is_computed(way: str, training: bool) -> None:
    model = resting(way, "a", "b", "c").train(training)
    with pytest.raises(AssertionError, match=r"kernels, projections, resizings: \(1, 1, 1\)"):
        assert_computed(model, kernels=0, projections=0, resizings=0)
    assert_computed(resting(way, "a").train(training), kernels=2, projections=1, resizings=2)
    model = four(way, second=5).train(training)  # two kernels at each resolution
    freeze(model.a)
    assert_computed(model, kernels=3, projections=1, resizings=2)


@WAY
def test_a_blend_of_0_that_learns_is_awake(way: str) -> None:
    assert_computed(four(way, blend=0.0), kernels=2, projections=1, resizings=2)


@WAY
def test_a_frozen_blend_that_is_not_0_is_awake(way: str) -> None:
    model = four(way)
    expected = model(IMAGES)
    for layer in pac_layers(model).values():
        layer.blend.requires_grad_(False)
    assert_computed(model, kernels=2, projections=1, resizings=2)
    assert torch.equal(model(IMAGES), expected)


@WAY
def test_gradients_are_those_of_the_plain_network(way: str) -> None:
    model = resting(way)
    plain = pacswap.revert(model)
    expected, found = gradients(plain), gradients(model)
    for name, gradient in expected.items():
        assert torch.equal(found.pop(name), gradient), name
    assert len(found) == 7  # four blends, two bandwidths, a projection
    assert all(gradient is None for gradient in found.values())


@WAY
def test_a_loaded_blend_is_honoured(way: str) -> None:
    donor, model = four(way), resting(way)
    before = model(IMAGES)
    model.load_state_dict(donor.state_dict())
    assert torch.equal(model(IMAGES), donor(IMAGES))
    assert_differ(model(IMAGES), before)
    assert_computed(model, kernels=2, projections=1, resizings=2)


@WAY
@pytest.mark.parametrize("write", ["fill", "data", "assign", "learn"])
def test_a_blend_that_is_written_is_honoured(way: str, write: str) -> None:
    model, expected = resting(way), four(way)(IMAGES)
    for layer in pac_layers(model).values():
        if write == "data":  # which no version of the tensor counts
            layer.blend.data.fill_(0.7)
        elif write == "assign":
            layer.blend = nn.Parameter(torch.tensor(0.7), requires_grad=False)
        else:
            layer.blend.requires_grad_(write == "learn")
            with torch.no_grad():
                layer.blend.fill_(0.7)
    assert torch.equal(model(IMAGES), expected)


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    net = build(Source("pacswap", "scene_net", None))
    images = torch.rand(1, 3, 32, 32)
    model = pacswap.swap(net, "layer3.*.conv2", "layer1", example_input=images).eval()
    freeze(*pac_layers(model).values())
    before = model(images)
    pacswap.save(model, tmp_path / "resting")
    loaded = pacswap.load(tmp_path / "resting")
    assert torch.equal(loaded(images), before)
    for layer in pac_layers(loaded).values():
        nn.init.constant_(layer.blend, 0.7)
    pacswap.save(loaded, tmp_path / "awake")
    awake = pacswap.load(tmp_path / "awake")
    assert torch.equal(awake(images), loaded(images))
    assert_differ(awake(images), before)


@WAY
def test_disabled_and_resting_go_together(way: str) -> None:
    model = resting(way, "a", "b")
    with pacswap.disabled(model):
        assert_computed(model, kernels=0, projections=0, resizings=0)
    assert_computed(model, kernels=1, projections=1, resizings=1)


@WAY
def test_copies_rest_too(way: str) -> None:
    model = resting(way)
    model.c.rest()
    twins = [copy.deepcopy(model)]
    if way == "graph":  # the other's class is made by a function and has no importable name
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert_computed(twin, kernels=0, projections=0, resizings=0)
        assert [layer.held for layer in pac_layers(twin).values()] == [False, False, True, False]


@WAY
def test_what_looks_at_kernels_wakes_them(way: str) -> None:
    model, seen = resting(way), []

    def see(one: Seen) -> None:
        seen.append(one.layer)

    watch(model, IMAGES, see)
    assert seen == ["a", "b", "c", "d"]
    assert_computed(model, kernels=0, projections=0, resizings=0)


@WAY
def test_bandwidths_are_calibrated_all_the_same(way: str) -> None:
    model, expected = resting(way, bandwidth="auto"), four(way, bandwidth="auto")
    wanted = calibrate(expected, plan_of(expected), IMAGES)
    assert calibrate(model, plan_of(model), IMAGES) == wanted
    assert min(wanted.values()) != 1.0


@pytest.mark.parametrize("name", ["everything", "append", "headed"])
def test_every_operation_rests(name: str) -> None:
    case = CASES[name]
    original = case.build().eval()
    model = case.swap(original)
    args = (case.images(),)
    with counted(model) as awake:
        model(*args)
    freeze(*pac_layers(model).values())
    with counted(model) as asleep:
        output = model(*args)
    assert_same(output, original(*args), tolerance=0)
    assert awake["kernels"] > 0
    assert asleep["kernels"] == asleep["projections"] == 0
    assert asleep["resizings"] <= awake["resizings"]


LAYERS = {
    "conv1d": (lambda blend: PacConv1d(3, 3, 3, blend=blend), (2, 3, 9)),
    "conv2d": (lambda blend: PacConv2d(3, 3, 3, blend=blend), (2, 3, 9, 8)),
    "conv3d": (lambda blend: PacConv3d(3, 3, 3, blend=blend), (1, 3, 5, 6, 7)),
    "transposed": (lambda blend: PacConvTranspose2d(3, 3, 3, blend=blend), (2, 3, 9, 8)),
    "pool": (lambda blend: PacPool2d(3, blend=blend), (2, 3, 9, 8)),
    "filter": (lambda blend: PacFilter2d(3, blend=blend), (2, 3, 9, 8)),
    "crf": (lambda blend: pacswap.nn.PacCRF(3, blend=blend), (2, 3, 9, 8)),
}


@pytest.mark.parametrize("kind", list(LAYERS))
def test_a_resting_layer_asks_for_no_guidance(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(0.0), torch.rand(shape)
    with pytest.raises(GuidanceError, match="without a guidance"):
        layer(x)
    layer.enabled = False
    expected = layer(x)
    layer.enabled = True
    freeze(layer)
    assert torch.equal(layer(x), expected)
    layer.blend.data.fill_(0.5)
    with pytest.raises(GuidanceError, match="without a guidance"):
        layer(x)


# ---- where no value can be looked at


def test_elsewhere_than_on_the_cpu_a_layer_rests_if_it_was_told_to() -> None:
    frozen, told = (PacConv2d(3, 3, 3, blend=0.5) for _ in range(2))
    freeze(frozen)
    told.rest()
    assert frozen.is_resting
    assert told.is_resting
    assert told.blend.item() == 0
    assert not frozen.to("meta").is_resting  # stands for a GPU, whose queue a look would stall
    assert told.to("meta").is_resting
    told.blend.requires_grad_()
    assert not told.is_resting


def compiled_operations(model: nn.Module) -> tuple[list[str], Tensor]:
    """What a compiler was given, and the output."""
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    return names, torch.compile(model, backend=backend, fullgraph=True)(IMAGES)


@WAY
def test_under_a_compiler_a_layer_rests_if_it_was_told_to(way: str) -> None:
    frozen = resting(way)
    plain = pacswap.revert(frozen)(IMAGES)
    names, output = compiled_operations(frozen)
    assert "exp" in names  # its value cannot be looked at
    assert_same(output, plain)
    for layer in pac_layers(frozen).values():
        layer.rest()
    names, output = compiled_operations(frozen)
    assert "exp" not in names
    assert "interpolate" not in names
    assert torch.equal(output, plain)


def test_a_compiled_network_wakes() -> None:
    donor, model = four(), four()
    for layer in pac_layers(model).values():
        layer.rest()
    plain = pacswap.revert(model)(IMAGES)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(run(IMAGES), plain)
    model.load_state_dict(donor.state_dict())
    assert not any(layer.held for layer in pac_layers(model).values())
    assert_same(run(IMAGES), donor(IMAGES))
    assert_differ(run(IMAGES), plain)
    for layer in pac_layers(model).values():
        layer.rest()
    assert torch.equal(run(IMAGES), plain)
    for layer in pac_layers(model).values():
        layer.blend.requires_grad_()
    assert run(IMAGES).requires_grad
    gradients(run)
    assert all(layer.blend.grad.abs() > 0 for layer in pac_layers(model).values())


def test_an_exported_network_that_rests_is_the_plain_one() -> None:
    model = four().eval()
    for layer in pac_layers(model).values():
        layer.rest()
    program = torch.export.export(model, (IMAGES,))
    assert not any("exp." in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(IMAGES), pacswap.revert(model)(IMAGES))


def test_loading_a_blend_of_0_leaves_a_layer_at_rest() -> None:
    model = four()
    for layer in pac_layers(model).values():
        layer.rest()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert all(layer.held for layer in pac_layers(model).values())
    assert Four().load_state_dict(pacswap.revert(model).state_dict())
    assert "held" not in vars(pacswap.revert(model).a)


def test_a_wrapped_layer_counts_as_awake() -> None:
    """Adapters such as LoRA's hold the layer inside a module of their own."""

    class Wrapper(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer
            self.guidance, self.adapting_kernel = layer.guidance, layer.adapting_kernel

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.layer(*args, **kwargs)

    model = four("graph", {"layers": ["a", "b"], "guidance": STEM})
    expected = model(IMAGES)
    model.a = Wrapper(model.a)
    assert torch.equal(model(IMAGES), expected)
