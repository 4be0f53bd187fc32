"""Gradient checkpointing recomputes a part of the network, guided as it was the first time."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import models as m
import pytest
import timm
import torch
import torch.nn.functional as F
from refusals import IMAGES, KERNEL
from same import assert_same, run
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pacswap
from pacswap.errors import GuidanceError
from pacswap.surgery import relay

PICTURES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
# Few layers, few channels: what is shown does not depend on how many.
SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 2, 2), "channels": (8, 8, 16, 16)},
    "convnext_atto": {"depths": (1, 1, 2, 2), "dims": (8, 8, 16, 16)},
    "mobilenetv2_035": {"depth_multiplier": 0.3},
}
TIMM = {
    "resnet18": ("resnet18", "layer[34].?.conv2", "layer1"),
    "resnet18_projected": ("resnet18", "layer[34].?.conv2", {"from": "layer1", "channels": 4}),
    "resnet18_image": ("resnet18", "layer[34].?.conv2", "input"),
    "resnet18_inside": ("resnet18", "layer4.1.conv2", "layer4.0.conv1"),
    "convnext_atto": ("convnext_atto", "stages.[23].blocks.1.conv_dw", "stages.0"),
    "mobilenetv2_035": ("mobilenetv2_035", "blocks.[56].*.conv_dw", "blocks.1"),
}
NAMES = pytest.mark.parametrize("name", list(TIMM))


@pytest.fixture(autouse=True)
def no_frame_is_left() -> Iterator[None]:
    yield
    assert relay.local.frames == []


def network(name: str, *, before: bool = False) -> nn.Module:
    """Upgraded, in train mode, its norms in eval mode: a recomputation moves statistics twice."""
    return copy.deepcopy(built(name, before))


@functools.cache
def built(name: str, before: bool) -> nn.Module:
    arch, layers, guidance = TIMM[name]
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=7, **SMALL[arch])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if before:
        model.set_grad_checkpointing(True)
    model = pacswap.swap(model, layers, guidance, kernel=KERNEL, example_input=PICTURES).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def stepped(model: nn.Module, *images: Tensor) -> dict[str, Tensor | None]:
    """Gradients after one forward pass for each of the images and a backward pass for all."""
    model.zero_grad()
    outputs = [model(x) for x in images]
    sum(y.pow(2).sum() for y in outputs).backward()
    return copy.deepcopy(gradients(model))


def runs(model: nn.Module, name: str) -> list[int]:
    calls: list[int] = []
    model.get_submodule(name).register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def first_layer(model: nn.Module) -> str:
    return next(n for n, x in model.named_modules() if isinstance(x, pacswap.nn.PacConv2d))


@NAMES
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_gradients_are_those_without_it(name: str, before: bool) -> None:
    expected = stepped(network(name), PICTURES)
    model = network(name, before=before)
    if not before:
        model.set_grad_checkpointing(True)
    calls = runs(model, first_layer(model))
    assert_same(expected, stepped(model, PICTURES), tolerance=1e-5)
    assert len(calls) == 2  # it was recomputed indeed
    model.set_grad_checkpointing(False)
    stepped(model, PICTURES)
    assert len(calls) == 3


@NAMES
def test_two_forward_passes_may_come_before_the_backward_pass(name: str) -> None:
    model, images = network(name), (PICTURES, PICTURES.flip(-1) * 0.5)
    expected = stepped(model, *images)
    model.set_grad_checkpointing(True)
    assert_same(expected, stepped(model, *images), tolerance=1e-5)


def test_the_backward_pass_may_run_in_another_thread() -> None:
    model = network("resnet18")
    expected = stepped(model, PICTURES)
    model.set_grad_checkpointing(True)
    model.zero_grad()
    loss = model(PICTURES).pow(2).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_same(expected, gradients(model), tolerance=1e-5)


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "no_backward"])
@NAMES
def test_features_are_let_go_without_the_garbage_collector(name: str, backward: bool) -> None:
    model, seen = network(name), []
    model.set_grad_checkpointing(True)
    made = [x for x in model.modules() if isinstance(x, pacswap.nn.AdaptingKernel)]
    for module in made:
        module.register_forward_hook(lambda _, args, k: seen.extend(map(weakref.ref, (*args, k))))
    gc.disable()
    try:
        output = model(PICTURES)
        if backward:
            output.sum().backward()
        del output
        assert seen
        assert [ref() is None for ref in seen] == [True] * len(seen)
    finally:
        gc.enable()


def test_reentrant_checkpointing_is_an_error() -> None:
    model = network("resnet18")
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(GuidanceError) as caught:
            model(PICTURES.clone().requires_grad_())
    finally:
        set_reentrant_ckpt(False)
    assert str(caught.value) == (
        "the guidance 'layer1' runs under reentrant gradient checkpointing, which would cut its "
        "gradient off. Use the other kind: use_reentrant=False "
        "(timm.layers.set_reentrant_ckpt(False))."
    )


# ---- networks that checkpoint by themselves, and look at the size of their input


class ByHand(m.Body):
    """`part` of it is recomputed in training."""

    recomputes, reentrant = True, False

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.block = m.Wrapped(m.Wrapped(nn.Conv2d(4, 4, 3, padding=1)))

    def again(self, part: nn.Module, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(part, x, use_reentrant=self.reentrant)
        return part(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x
        x = F.relu(self.norm(self.stem(x)))
        x = self.target(x) + self.again(self.target, x)
        return self.again(self.block, self.second(x))


class Nested(ByHand):
    """Recomputes within what is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Inner(self.block.inner.inner)


class Inner(m.Wrapped):
    recomputes = True

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return F.relu(checkpoint(self.inner, x * 2, use_reentrant=False))
        return F.relu(self.inner(x * 2))


class Whole(m.Body):
    """All of it is recomputed, guidance included; the image is what it begins with."""

    recomputes = True

    def __init__(self) -> None:
        super().__init__()
        self.all = m.Wrapped(m.Body())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 0 and self.recomputes and torch.is_grad_enabled():
            return checkpoint(self.all, x, use_reentrant=False) * self.target(self.stem(x))
        return self.all(x) * self.target(self.stem(x))


IN_BACKWARD = (
    "a layer of 'target' runs again in the backward pass, by gradient checkpointing, and what "
    "guides it is not known there. Checkpoint a module that contains the layer, with "
    "use_reentrant=False (timm.layers.set_reentrant_ckpt(False))."
)
HAND_MADE = {
    "shared": (ByHand, ["target", "second"], "stem"),
    "block": (ByHand, ["target", "second", "block.inner.inner"], "stem"),
    "image": (ByHand, ["target", "block.inner.inner"], "input"),
    "nested": (Nested, ["target", "block.inner"], "stem"),
    "whole": (Whole, "all.inner.target", "input"),
    "whole_inside": (Whole, ["all.inner.target", "target"], "all.inner.stem"),
}


def hand_made(case: str) -> nn.Module:
    cls, layers, guidance = HAND_MADE[case]
    torch.manual_seed(0)
    return pacswap.swap(cls(), layers, guidance, kernel=KERNEL, example_input=IMAGES).eval()


def resting(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "recomputes"):
            module.recomputes = False
    return model


@pytest.mark.parametrize("case", list(HAND_MADE))
def test_hand_made_checkpoints_have_the_gradients_of_none(case: str) -> None:
    expected = stepped(resting(hand_made(case)), IMAGES, IMAGES)
    assert_same(expected, stepped(hand_made(case), IMAGES, IMAGES), tolerance=1e-5)


def test_two_networks_may_recompute_from_one_image() -> None:
    one, two = hand_made("whole"), hand_made("whole")
    with torch.no_grad():
        two.all.inner.target.weight.mul_(2)
        two.all.inner.target.adapting_kernel.log_bandwidth.add_(1)
    expected = stepped(one, IMAGES), stepped(two, IMAGES)
    one.zero_grad()
    two.zero_grad()
    (one(IMAGES).pow(2).sum() + two(IMAGES).pow(2).sum()).backward()
    assert_same(expected, (gradients(one), gradients(two)), tolerance=1e-5)


def early_stop() -> bool | None:
    return torch.utils.checkpoint._enable_checkpoint_early_stop


def test_threads_that_overlap_leave_the_flag_for_early_stops_as_it_was() -> None:
    expected = stepped(resting(hand_made("nested")), IMAGES)
    one, two = hand_made("nested"), hand_made("nested")
    entered, left = threading.Event(), threading.Event()
    one.stem.register_forward_hook(lambda *_: (entered.set(), left.wait(60))[:0] or None)
    other: list[Tensor] = []
    thread = threading.Thread(target=lambda: other.append(one(IMAGES)))
    thread.start()
    assert entered.wait(60)
    hook = two.stem.register_forward_hook(lambda *_: (left.set(), thread.join(60))[:0] or None)
    output = two(IMAGES)  # goes on when the first to enter has left
    hook.remove()
    assert early_stop() is None
    for model, found in ((one, other[0]), (two, output)):
        model.zero_grad()
        found.pow(2).sum().backward()
        assert_same(expected, gradients(model), tolerance=1e-5)


def test_the_flag_is_off_while_one_runs_and_kept_after_an_error() -> None:
    model, seen = hand_made("nested"), []
    hook = model.stem.register_forward_hook(lambda *_: seen.append(early_stop()))
    model(IMAGES)
    hook.remove()
    assert seen == [False]
    with torch.utils.checkpoint.set_checkpoint_early_stop(True):
        with pytest.raises(RuntimeError):
            model(IMAGES[:, :1])
        assert early_stop() is True
    assert early_stop() is None


def test_a_layer_under_a_hand_made_reentrant_checkpoint_is_an_error_in_the_backward_pass() -> None:
    model = hand_made("shared")
    model.reentrant = True
    assert_same(run(resting(hand_made("shared")), (IMAGES,)), run(model, (IMAGES,)))
    loss = model(IMAGES).sum()
    with pytest.raises(GuidanceError) as caught:
        loss.backward()
    assert str(caught.value) == IN_BACKWARD


class Traceable(nn.Module):
    """A forward that could be traced, with a checkpoint that a trace would drop."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_checkpoint_of_the_networks_own_still_recomputes() -> None:
    upgraded = pacswap.swap(Traceable(), "block.0", "stem", example_input=torch.rand(2, 3, 16, 20))
    assert "which a graph drops" in str(pacswap.surgery.plan_of(upgraded).scopes[0].untraced)
    calls: list[str] = []
    upgraded.block[1].register_forward_hook(lambda *args: calls.append("tanh"))
    upgraded(torch.rand(2, 3, 16, 20)).sum().backward()
    assert calls == ["tanh", "tanh"]
