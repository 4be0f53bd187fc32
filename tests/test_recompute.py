"""`recompute`: what a layer adapts is computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counts import IMAGES, STEM, WAY, Four, Operations, assert_computed, four, gradients
from operations import CASES
from same import assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pacswap
from pacswap.errors import GuidanceError, PlanError
from pacswap.nn import (
    PacConv1d,
    PacConv2d,
    PacConv3d,
    PacConvTranspose2d,
    PacCRF,
    PacFilter2d,
    PacPool2d,
)
from pacswap.nn.recompute import _guarded
from pacswap.recipes import Recipe, recipe_schema
from pacswap.surgery import pac_layers
from pacswap.zoo import Source, build

# By torch itself where it can tell, and in these words where it cannot.
OVERWRITTEN = (
    "a layer with recompute=True computes again in the backward pass, and what it computed from "
    "was overwritten in place since. Swap it without recompute, or leave out the in-place "
    "operation that follows it."
)


def assert_gradients(model: nn.Module, expected: nn.Module, *, tolerance: float = 0.0) -> None:
    """Equal gradients of equal networks, and all of them there."""
    wanted, found = gradients(expected), gradients(model)
    assert list(wanted) == list(found)
    for name, gradient in wanted.items():
        assert gradient is not None, name
        assert_same(found[name], gradient, tolerance=tolerance)


@WAY
@pytest.mark.parametrize("blend", [0.0, 0.7])
@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_gradients_are_equal(way: str, blend: float, normalize: str) -> None:
    options = {"blend": blend, "normalize": normalize}
    assert_gradients(four(way, **options, recompute=True), four(way, **options))
    with pytest.raises(AssertionError):
        assert_gradients(four(way, **options, recompute=True), four(way, **options | {"blend": 1}))


@WAY
def test_under_autocast_they_are_equal_too(way: str) -> None:
    plain, model = four(way), four(way, recompute=True)
    exact = gradients(plain)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [m(IMAGES).float().pow(2).sum() for m in (plain, model)]
    for network, loss in zip((plain, model), losses, strict=True):
        network.zero_grad()
        loss.backward()  # outside: a recomputation without autocast would give other numbers
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, found[name].grad), name
    assert any(not torch.equal(exact[n], p.grad) for n, p in found.items())


@WAY
def test_a_second_derivative_is_equal(way: str) -> None:
    found = []
    for model in (four(way), four(way, recompute=True)):
        x = IMAGES.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        first.pow(2).sum().backward()
        found.append((x.grad, [p.grad for p in model.parameters()]))
    assert_same(found[0], found[1], tolerance=1e-6)


@WAY
def test_the_forward_pass_computes_no_more(way: str) -> None:
    assert_computed(four(way, recompute=True), kernels=2, projections=1, resizings=2)


@WAY
def test_inference_recomputes_nothing(way: str) -> None:
    model, plain = four(way, recompute=True).eval(), four(way).eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain(IMAGES))


# ---- what it saves


def kept(model: nn.Module, images: Tensor) -> int:
    """The bytes that a forward pass leaves for the backward pass, images and output aside."""
    with Operations() as operations:
        output = model(images)
    return operations.living(images, output)


def assert_saves(model: nn.Module, plain: nn.Module, images: Tensor, least: float) -> None:
    """`model` keeps less than `plain` by that share of what the swap itself makes it keep."""
    bare = kept(pacswap.revert(plain), images)
    more, less = kept(plain, images) - bare, kept(model, images) - bare
    saved = 1 - less / more
    assert saved >= least, f"{more} bytes are added, {less} with recompute: {saved:.0%} less"


@WAY
def test_it_keeps_less(way: str) -> None:
    images = torch.rand(2, 3, 128, 128)
    assert_saves(four(way, recompute=True), four(way), images, 0.5)
    with pytest.raises(AssertionError, match=": 0% less"):
        assert_saves(four(way), four(way), images, 0.5)


@WAY
def test_what_it_keeps_is_the_guidance_and_one_kernel_for_all(way: str) -> None:
    images = torch.rand(2, 3, 128, 128)
    model = four(way, recompute=True)
    bare, with_kernels = kept(pacswap.revert(model), images), kept(model, images)
    pixels = 2 * (64 * 64 + 32 * 32)  # of both resolutions, of two images
    source, guidance, kernels = 2 * 4 * 128 * 128, 2 * pixels, 9 * pixels
    assert with_kernels - bare <= 4 * (source + guidance + kernels) + 4096
    assert kept(four(way), images) - bare > 4 * (source + guidance + 3 * kernels)


def test_bytes_are_counted_once_and_only_while_they_are_held() -> None:
    with Operations() as operations:
        x = torch.ones(1000)
        y = x.view(10, 100)
        del x
        assert operations.living() == 4000
        z = y * 2
        assert operations.living() == 8000
        del y, z
    assert operations.living() == 0


# ---- all operations, all layers


@pytest.mark.parametrize("name", ["everything", "append", "headed", "transposed_3x3_s2_p1_op1"])
def test_every_operation_recomputes(name: str) -> None:
    case = CASES[name]
    original = case.build()
    models = []
    for recompute in (False, True):
        asked = [{**g, "kernel": {**g.get("kernel", {}), "blend": 0.5}} for g in case.groups]
        asked = [{**g, "kernel": {**g["kernel"], "recompute": recompute}} for g in asked]
        models.append(pacswap.swap(original, groups=asked, example_input=case.images()).train())
    plain, model = models
    assert all(layer.recompute for layer in pac_layers(model).values())
    for network in models:
        network.zero_grad()
        output = network(case.images())
        leaves = torch.utils._pytree.tree_leaves(output)
        sum(leaf.pow(2).sum() for leaf in leaves).backward()
    found = dict(model.named_parameters())
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert_same(found[key].grad, parameter.grad, tolerance=1e-5)


LAYERS = {
    "conv1d": (lambda **k: PacConv1d(3, 3, 3, padding=1, **k), (2, 3, 9)),
    "conv2d": (lambda **k: PacConv2d(3, 3, 3, padding=1, **k), (2, 3, 9, 8)),
    "smoothed": (lambda **k: PacConv2d(3, 3, 3, smoothing="box", **k), (2, 3, 9, 8)),
    "conv3d": (lambda **k: PacConv3d(3, 3, 3, padding=1, **k), (1, 3, 5, 6, 7)),
    "transposed": (lambda **k: PacConvTranspose2d(3, 3, 3, padding=1, **k), (2, 3, 9, 8)),
    "pool": (lambda **k: PacPool2d(3, stride=1, padding=1, **k), (2, 3, 9, 8)),
    "filter": (lambda **k: PacFilter2d(3, steps=2, **k), (2, 3, 9, 8)),
    "filter_blurred": (lambda **k: PacFilter2d(3, blur=2, **k), (2, 3, 9, 8)),
    "crf": (lambda **k: PacCRF(3, **k), (2, 3, 9, 8)),
}


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_gives_equal_gradients_and_keeps_less(kind: str, blend: float) -> None:
    make, shape = LAYERS[kind]
    found, held = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = make(blend=blend, recompute=recompute)
        x, f = (torch.rand(shape, requires_grad=True) for _ in range(2))
        assert layer.recompute == recompute
        with Operations() as operations:
            output = layer(x, f)
        held.append(operations.living(x, f, output))
        # Without what watches, which the fast loops do not run under.
        layer(x, f).pow(2).sum().backward()
        found.append((x.grad, f.grad, [p.grad for p in layer.parameters()]))
    plain, again = (torch.utils._pytree.tree_leaves(each) for each in found)
    assert len(plain) == len(again)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
    assert held[1] < held[0], f"{held[1]} bytes, {held[0]} without recompute"


# ---- compilers, exports, other recomputations


@WAY
def test_it_compiles(way: str) -> None:
    plain, model = four(way), four(way, recompute=True)
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(model, backend=backend, fullgraph=True)(IMAGES)
    assert sum("checkpoint" in target for target in seen) == 6  # two kernels, four layers
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted, found = gradients(plain), gradients(compiled)
    for gradient, other in zip(wanted.values(), found.values(), strict=True):
        assert_same(other, gradient, tolerance=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_has_no_recomputation_in_it(strict: bool) -> None:
    model = four(recompute=True).eval()
    program = torch.export.export(model, (IMAGES,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("checkpoint" in target for target in targets)
    assert_same(program.module()(IMAGES), model(IMAGES))


@WAY
def test_it_goes_inside_a_checkpointed_network(way: str) -> None:
    plain, model = four(way), four(way, recompute=True)
    model.zero_grad()
    checkpoint(model, IMAGES, use_reentrant=False).pow(2).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients(plain).items():
        assert torch.equal(found[name], gradient), name


class Overwriting(Four):
    """Changes what its first convolution has seen in place, which a frozen one allows."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        y = self.a(x)
        x += 1
        return self.c(F.relu(y)) + x


def test_an_input_that_is_overwritten_is_refused() -> None:
    torch.manual_seed(0)
    net = Overwriting()
    kernel = {"blend": 0.7, "bandwidth": 1.0, "recompute": True}
    model = pacswap.swap(net, "a", STEM, kernel=kernel, example_input=IMAGES)
    loss = model(IMAGES).pow(2).sum()
    with pytest.raises(RuntimeError, match=r"in place since|an inplace operation"):
        loss.backward()
    with torch.no_grad():
        model(IMAGES)


def test_the_words_for_what_is_overwritten() -> None:
    x = torch.ones(3)
    run = _guarded(torch.exp, (x,))
    assert torch.equal(run(x), x.exp())
    x += 1
    with pytest.raises(GuidanceError) as caught:
        run(x)
    assert str(caught.value) == OVERWRITTEN


# ---- the option


def test_the_plan_says_it() -> None:
    asked = {"layers": ["a", "c"], "guidance": STEM}
    plan = pacswap.plan(Four(), **asked, kernel={"recompute": True}, example_input=IMAGES)
    assert (
        "kernel      gaussian, blend 0 (the plain convolution), bandwidth auto, recomputed in the "
        "backward pass; 2 of them"
    ) in str(plan)
    assert "recomputed" not in str(pacswap.plan(Four(), **asked, example_input=IMAGES))


def test_a_value_that_is_no_flag_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        pacswap.plan(Four(), "a", STEM, kernel={"recompute": 1}, example_input=IMAGES)
    assert str(caught.value) == "kernel.recompute: expected True or False, got 1."


def test_a_recipe_has_it_and_a_directory_keeps_it(tmp_path: Any) -> None:
    properties = recipe_schema()["$defs"]["KernelSection"]["properties"]
    assert properties["recompute"]["type"] == "boolean"
    assert properties["recompute"]["default"] is False
    group = {"layers": "a", "guidance": "stem", "kernel": {"recompute": True}}
    data = {"version": 1, "model": {"library": "timm", "name": "x"}, "swap": [group]}
    (section,) = Recipe.model_validate(data).swap
    assert section.to_group("swap").kernel.recompute
    net = build(Source("pacswap", "scene_net", None))
    for recompute in (True, False):
        options = {"kernel": {"recompute": recompute}, "example_input": torch.rand(1, 3, 32, 32)}
        model = pacswap.swap(net, "layer3.*.conv2", "layer1", **options)
        pacswap.save(model, tmp_path / str(recompute))
        loaded = pac_layers(pacswap.load(tmp_path / str(recompute)))
        assert loaded
        for layer in loaded.values():
            assert layer.recompute == recompute
            assert layer.adapting_kernel is None or layer.adapting_kernel.recompute == recompute


def test_a_reverted_network_has_nothing_of_it() -> None:
    plain = pacswap.revert(four(recompute=True))
    assert type(plain.a) is nn.Conv2d
    assert "recompute" not in vars(plain.a)


def test_the_kernel_prints_it() -> None:
    assert repr(pacswap.nn.AdaptingKernel(3, recompute=True)).endswith(", recompute=True)")
    assert "recompute" not in repr(pacswap.nn.AdaptingKernel(3))
