"""An upgraded model is still the model that its user knows: class, methods, copies, devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import timm
import torch
from same import assert_differ, assert_same, backward
from swaps import SWAPS, Swap, learned, pair
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError, PlanError

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet() -> tuple[nn.Module, nn.Module]:
    """timm's resnet18, which nobody may change, and an upgraded copy of one's own."""
    original, upgraded = pair("timm_resnet18")
    return original, copy.deepcopy(upgraded).eval()


# ---- class, attributes, methods


def test_the_class_is_its_own() -> None:
    original, upgraded = resnet()
    assert isinstance(upgraded, timm.models.ResNet)
    assert type(upgraded) is not timm.models.ResNet
    assert type(upgraded).__name__ == "ResNet"
    assert type(upgraded).__qualname__ == "ResNet"
    assert type(upgraded).__module__ == "timm.models.resnet"
    assert type(upgraded).__doc__ == type(original).__doc__


def test_two_upgraded_models_have_one_class() -> None:
    swap = SWAPS["body"]
    assert type(swap.swap(swap.build())) is type(swap.swap(swap.build()))


def test_parts_that_are_not_rewired_keep_their_very_class() -> None:
    original, upgraded = resnet()
    assert type(upgraded.layer4) is type(original.layer4) is nn.Sequential
    assert type(upgraded.layer4[0]) is type(original.layer4[0])


@pytest.mark.parametrize(
    "attribute", ["num_classes", "num_features", "pretrained_cfg", "default_cfg", "feature_info"]
)
def test_timm_attributes_stay(attribute: str) -> None:
    original, upgraded = resnet()
    assert getattr(upgraded, attribute) == getattr(original, attribute)


@pytest.mark.parametrize(
    "method",
    [
        lambda m, x: m.forward_features(x),
        lambda m, x: m.forward_head(m.forward_features(x)),
        lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
        lambda m, x: m.forward(x),
    ],
    ids=["features", "head", "pre_logits", "forward"],
)
def test_timm_methods_are_guided(method: Callable[[nn.Module, Tensor], Tensor]) -> None:
    original, upgraded = resnet()
    original = copy.deepcopy(original).eval()
    with torch.no_grad():
        before = method(original, IMAGES)
        assert_same(before, method(upgraded, IMAGES))
        nn.init.constant_(upgraded.layer4[0].conv2.blend, 0.5)
        assert_differ(before, method(upgraded, IMAGES))


def test_a_new_classifier_trains() -> None:
    _, upgraded = resnet()
    assert upgraded.get_classifier() is upgraded.fc
    upgraded.reset_classifier(3)
    backward(upgraded.train(), (IMAGES,))
    assert upgraded(IMAGES).shape == (2, 3)
    for name in ("layer3.0.conv2.blend", "layer4.1.conv2.blend", "fc.weight"):
        assert upgraded.get_parameter(name).grad.abs().max() > 0


# ---- external guidance


def external() -> tuple[nn.Module, nn.Module]:
    model = SWAPS["body"].build().eval()
    upgraded = pacswap.swap(
        model, "target", "external", kernel={"bandwidth": 1.0}, example_input=IMAGES
    )
    return model, upgraded


def test_external_guidance_guides() -> None:
    model, upgraded = external()
    features = torch.rand(2, 5, 9, 11)
    assert_same(model(IMAGES), upgraded(IMAGES, guidance=features))
    nn.init.constant_(upgraded.target.blend, 0.5)
    learned_output = upgraded(IMAGES, guidance=features)
    assert_differ(model(IMAGES), learned_output)
    assert_differ(learned_output, upgraded(IMAGES, guidance=features.flip(-1)))


def test_without_external_guidance_is_an_error_unless_disabled() -> None:
    model, upgraded = external()
    with pytest.raises(GuidanceError) as caught:
        upgraded(IMAGES)
    assert str(caught.value) == (
        "this network was upgraded with an external guidance and was called without one. Call it "
        "as model(input, guidance=features)."
    )
    with pacswap.disabled(upgraded):
        assert_same(model(IMAGES), upgraded(IMAGES), tolerance=0)


# ---- modes, freezing, hooks, random numbers


@pytest.mark.parametrize("name", ["body", "dropping", "auxiliary", "timm_resnet18"])
@pytest.mark.parametrize("modes", ["ete", "tet", "tteet"])
def test_modes_may_alternate(name: str, modes: str) -> None:
    original, upgraded = (copy.deepcopy(model) for model in pair(name))
    for step, mode in enumerate(modes):
        outputs = []
        for model in (original, upgraded):
            model.train(mode == "t")
            torch.manual_seed(step)
            with torch.no_grad():
                outputs.append(model(*SWAPS[name].arguments()))
        assert_same(*outputs)


def test_what_is_frozen_stays_frozen() -> None:
    original, upgraded = pair("frozen")
    assert upgraded.training
    assert not upgraded.norm.training
    trained = [name for name, p in upgraded.named_parameters() if p.requires_grad]
    assert trained == ["target.blend", "target.adapting_kernel.log_bandwidth"]
    args = SWAPS["frozen"].arguments()
    before = copy.deepcopy(upgraded)
    torch.manual_seed(0)
    assert_same(original(*args), before(*args))
    assert_same(dict(original.named_buffers()), dict(before.named_buffers()), tolerance=0)


def test_hooks_on_other_modules_run_once_for_each_call() -> None:
    original, _ = pair("timm_resnet18")
    model, calls = copy.deepcopy(original).eval(), []
    for name in ("", "layer1", "layer4.1.bn2", "fc"):
        model.get_submodule(name).register_forward_hook(lambda m, *_: calls.append(type(m)))
    upgraded = SWAPS["timm_resnet18"].swap(model)
    calls.clear()
    upgraded(IMAGES)
    assert [kind.__name__ for kind in calls] == ["Sequential", "BatchNorm2d", "Linear", "ResNet"]


def test_random_layers_draw_as_before() -> None:
    original, upgraded = (copy.deepcopy(model).train() for model in pair("dropping"))
    args = SWAPS["dropping"].arguments()
    states = []
    for model in (original, upgraded):
        torch.manual_seed(7)
        model(*args)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_swapped_without_gradients_learns_all_the_same(mode: Callable[[], Any]) -> None:
    with mode():
        upgraded = SWAPS["projected"].swap(SWAPS["projected"].build())
    backward(upgraded.train(), SWAPS["projected"].arguments())
    assert upgraded.target.blend.grad.abs() > 0


# ---- the adapting kernel is computed once


@pytest.mark.parametrize(
    ("name", "size", "computed"),
    [
        ("timm_resnet18", (64, 64), 2),
        ("called_twice", (16, 20), 1),
        ("tied", (16, 20), 1),
        ("called_at_two_sizes", (16, 20), 2),
        ("two_branches", (16, 20), 2),
        ("two_roundings", (16, 20), 1),
        ("two_roundings", (19, 23), 2),
        ("two_geometries", (16, 20), 2),
        ("two_geometries", (19, 23), 2),
    ],
)
def test_kernels_are_computed_once_for_each_resolution(
    name: str, size: tuple[int, int], computed: int
) -> None:
    model, calls = learned(name).eval(), []
    for module in model.modules():
        if isinstance(module, pacswap.nn.AdaptingKernel):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(*SWAPS[name].arguments(size=size))
    assert len(calls) == computed


class Pyramid(models.Body):
    """Two convolutions shared by two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norm(self.stem(x))
        return [self.second(self.target(y)) for y in (x, x[..., ::2, ::2])]


def test_a_pyramid_computes_one_kernel_for_each_level() -> None:
    swap, calls = Swap(Pyramid, ["target", "second"]), []
    upgraded = swap.swap(swap.build()).eval()
    hook = upgraded.target.adapting_kernel.register_forward_hook(lambda *_: calls.append(1))
    upgraded(*swap.arguments())
    hook.remove()
    assert len(calls) == 2
    nn.init.constant_(upgraded.second.blend, 0.5)
    assert [y.shape[-2:] for y in upgraded(*swap.arguments(size=swap.odd))] == [(19, 23), (10, 12)]


@pytest.mark.parametrize(
    ("name", "tapped"),
    [
        ("in_place", lambda m, x: m.stem(x)),
        ("in_place_input", lambda m, x: x),
        ("assigned", lambda m, x: m.norm(m.stem(x)) * 2),
        ("sequential", lambda m, x: m[0](x)),
    ],
)
def test_the_kernel_sees_the_guidance_before_it_was_overwritten(
    name: str, tapped: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    model, seen = learned(name).eval(), []
    for module in model.modules():
        if isinstance(module, pacswap.nn.AdaptingKernel):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    (x,) = SWAPS[name].arguments()
    expected = tapped(model, x.clone())
    model(x)
    assert_same([expected], seen, tolerance=0)


# ---- what a convolution carries


def test_attributes_and_hooks_of_a_layer_survive_there_and_back() -> None:
    model = SWAPS["body"].build()
    model.target.note = "mine"
    upgraded = SWAPS["body"].swap(model)
    assert upgraded.target.note == "mine"
    upgraded.target.register_forward_hook(models.doubled)
    plain = pacswap.revert(upgraded)
    assert plain.target.note == "mine"
    assert not hasattr(plain.target, "guided_by")
    assert list(plain.target._forward_hooks.values()) == [models.doubled]


def test_a_layer_that_was_parametrized_since_is_not_reverted() -> None:
    upgraded = copy.deepcopy(pair("body")[1])
    nn.utils.parametrizations.weight_norm(upgraded.target)
    with pytest.raises(PlanError) as caught:
        pacswap.revert(upgraded)
    assert str(caught.value) == (
        "cannot revert Body: 'target' holds 'parametrizations', which a plain convolution would "
        "lose. Remove the parametrization, weight norm or pruning first."
    )
