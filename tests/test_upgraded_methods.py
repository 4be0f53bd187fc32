"""timm's other ways through a network: each as before at blend 0, and guided beyond."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from same import assert_differ, assert_same, backward
from swaps import settled
from torch import Tensor, nn

import pacswap

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
Method = Callable[[nn.Module, Tensor], Any]

GUIDANCES: dict[str, Any] = {
    "layer": "layer1",
    "image": "input",
    "image_projected": {"from": "input+position", "channels": 3},
}
METHODS: dict[str, Method] = {
    "forward": lambda m, x: m(x),
    "features": lambda m, x: m.forward_features(x),
    "head": lambda m, x: m.forward_head(m.forward_features(x)),
    "pre_logits": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "intermediates": lambda m, x: m.forward_intermediates(x),
    "indices": lambda m, x: m.forward_intermediates(x, indices=[2, 4]),
    "last": lambda m, x: m.forward_intermediates(x, indices=1),
    "only": lambda m, x: m.forward_intermediates(x, intermediates_only=True),
    "stop_early": lambda m, x: m.forward_intermediates(
        x, indices=[1, 3], stop_early=True, intermediates_only=True
    ),
    "norm": lambda m, x: m.forward_intermediates(x, norm=True),
    "by_keyword": lambda m, x: m.forward_intermediates(indices=[3], x=x),
}


@functools.cache
def networks(guidance: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The original, the upgraded network, and that with its blends at ½."""
    torch.manual_seed(0)
    original = settled(timm.create_model("resnet18", num_classes=7), (IMAGES,)).eval()
    upgraded = pacswap.swap(
        original,
        "layer[34].?.conv2",
        GUIDANCES[guidance],
        kernel={"bandwidth": 1.0},
        example_input=IMAGES,
    )
    return original, upgraded, learned(upgraded)


def learned(upgraded: nn.Module) -> nn.Module:
    twin = copy.deepcopy(upgraded)
    for module in twin.modules():
        if isinstance(module, pacswap.nn.PacConv2d):
            nn.init.constant_(module.blend, 0.5)
    return twin


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("guidance", list(GUIDANCES))
@torch.no_grad()
def test_every_way_is_as_before_and_guided(guidance: str, method: str) -> None:
    original, upgraded, taught = networks(guidance)
    call = METHODS[method]
    before = call(original, IMAGES)
    assert_same(before, call(upgraded, IMAGES))
    assert_differ(before, call(taught, IMAGES))


@torch.no_grad()
def test_every_way_is_guided_alike() -> None:
    _, _, taught = networks("layer")
    features = taught.forward_features(IMAGES)
    final, found = taught.forward_intermediates(IMAGES)
    assert_same(features, final)
    assert_same(features, found[-1])
    assert_same(taught(IMAGES), taught.forward_head(features))


@torch.no_grad()
def test_a_way_that_runs_no_swapped_layer_is_untouched() -> None:
    original, _, taught = networks("layer")
    early = {"indices": [0, 1, 2], "stop_early": True, "intermediates_only": True}
    assert_same(
        original.forward_intermediates(IMAGES, **early),
        taught.forward_intermediates(IMAGES, **early),
    )


@pytest.mark.parametrize("guidance", list(GUIDANCES))
def test_intermediates_have_live_gradients(guidance: str) -> None:
    twin = copy.deepcopy(networks(guidance)[1])
    final, found = twin.forward_intermediates(IMAGES)
    sum(x.pow(2).sum() for x in (final, *found)).backward()
    for name, parameter in twin.named_parameters():
        if name.endswith("blend"):
            assert parameter.grad.abs() > 0, name


@torch.no_grad()
def test_the_head_needs_no_external_guidance() -> None:
    original = networks("layer")[0]
    upgraded = pacswap.swap(original, "layer4.?.conv2", "external", example_input=IMAGES)
    given = torch.rand(2, 2, 16, 16)
    features = upgraded.forward_features(IMAGES, guidance=given)
    assert_same(original(IMAGES), upgraded.forward_head(features))
    taught = learned(upgraded)
    assert_differ(features, taught.forward_features(IMAGES, guidance=given))
    with pytest.raises(pacswap.errors.GuidanceError) as caught:
        taught.forward_features(IMAGES)
    assert str(caught.value) == (
        "this network was upgraded with an external guidance and was called without one. Call it "
        "as model(input, guidance=features)."
    )


@pytest.mark.parametrize("guidance", list(GUIDANCES))
def test_a_new_classifier_trains(guidance: str) -> None:
    twin = copy.deepcopy(networks(guidance)[1]).train()
    twin.reset_classifier(3)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    before = twin.get_parameter("layer4.1.conv2.blend").item()
    backward(twin, (IMAGES,))
    optimizer.step()
    assert twin(IMAGES).shape == (2, 3)
    assert twin.get_parameter("layer4.1.conv2.blend").item() != before
    assert twin.fc.weight.grad.abs().max() > 0


LISTS = {
    "list": ({}, "FeatureListNet", ""),
    "getter": ({"feature_cls": "getter"}, "FeatureGetterNet", "model."),
}


@pytest.mark.parametrize("kind", list(LISTS))
@torch.no_grad()
def test_networks_of_features_are_as_before_and_guided(kind: str) -> None:
    options, cls, prefix = LISTS[kind]
    model = timm.create_model("resnet18", features_only=True, **options)
    model = settled(model, (IMAGES,)).eval()
    assert type(model).__name__ == cls
    upgraded = pacswap.swap(
        model,
        f"{prefix}layer[34].?.conv2",
        f"{prefix}layer1",
        kernel={"bandwidth": 1.0},
        example_input=IMAGES,
    )
    before = model(IMAGES)
    assert_same(before, upgraded(IMAGES))
    after = learned(upgraded)(IMAGES)
    assert_same(before[:3], after[:3])
    assert_differ(before[3], after[3])
    assert_differ(before[4], after[4])
    assert [x["module"] for x in upgraded.feature_info.info] == [
        x["module"] for x in model.feature_info.info
    ]
