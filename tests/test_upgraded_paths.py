"""What a rewritten graph takes for granted: obeyed through the relay, or an error in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from same import assert_differ, assert_same, run
from swaps import SWAPS, Swap, learned, pair
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet() -> tuple[nn.Module, nn.Module]:
    """timm's resnet18, which nobody may change, and an upgraded copy of one's own."""
    original, upgraded = pair("timm_resnet18")
    return original, copy.deepcopy(upgraded).eval()


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        (lambda m: m.layer4(torch.rand(1, 256, 4, 4)), "layer4.0.conv2"),
        (lambda m: m.layer4[1].conv2(torch.rand(1, 512, 4, 4)), "layer4.1.conv2"),
    ],
    ids=["stage", "layer"],
)
def test_a_path_without_guidance_is_an_error(path: Callable[[nn.Module], Any], layer: str) -> None:
    _, upgraded = resnet()
    with pytest.raises(GuidanceError) as caught:
        path(upgraded)
    assert str(caught.value) == (
        f"'{layer}' (guided by 'layer1') was called on a path through the model that does not "
        "compute its guidance. Call the model itself, or use `with pacswap.disabled(model):` to "
        "run that path as it was before the swap."
    )
    with pacswap.disabled(upgraded):
        path(upgraded)


def test_a_slice_of_a_sequential_is_such_a_path() -> None:
    upgraded = copy.deepcopy(pair("sequential")[1])
    assert_same(upgraded[:3](IMAGES), pacswap.revert(upgraded)[:3](IMAGES))
    with pytest.raises(GuidanceError, match=r"^'3' \(guided by '0'\) was called on a path"):
        upgraded[:4](IMAGES)


class LabelOnly(models.Assigned):
    """What it does hangs on a flag, an argument and a part's mode; a node guides."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = x * scale
        return super().forward(x if mask is None else x * mask)


def label_only() -> nn.Module:
    """An upgraded network that only its graph can feed."""
    return Swap(LabelOnly, guidance="mul_1").swap(LabelOnly())


def test_checkpointing_turned_on_later_is_an_error_where_only_a_graph_feeds() -> None:
    upgraded = label_only().train()
    before = run(upgraded, (IMAGES,))
    upgraded.set_grad_checkpointing(True)
    with pytest.raises(GuidanceError) as caught:
        upgraded(IMAGES)
    assert str(caught.value) == (
        "gradient checkpointing was turned on after the swap, and the rewritten graph does not "
        "recompute. Call set_grad_checkpointing(False)."
    )
    upgraded.set_grad_checkpointing(False)
    assert_same(before, run(upgraded, (IMAGES,)))


ARGUMENTS = pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"mask": torch.full((2, 1, 1, 1), 0.5)}, "mask=None only, got mask=a tensor [2, 1, 1, 1]"),
        ({"scale": 2.0}, "scale=1.0 only, got scale=2.0"),
    ],
    ids=["tensor", "number"],
)


@ARGUMENTS
def test_another_argument_than_the_traced_one_is_an_error_where_only_a_graph_feeds(
    arguments: dict[str, Any], shown: str
) -> None:
    upgraded = label_only()
    with pytest.raises(GuidanceError) as caught:
        upgraded(IMAGES, **arguments)
    assert str(caught.value) == (
        f"the upgraded network runs with {shown}: its graph was traced with that default. Leave "
        "the argument out, or pacswap.revert the model first."
    )


@ARGUMENTS
def test_elsewhere_another_argument_is_obeyed_and_guided(
    arguments: dict[str, Any], shown: str
) -> None:
    original, upgraded = pair("optional")
    before = run(original, (IMAGES,), **arguments)
    assert_differ(before, run(original, (IMAGES,)))
    assert_same(before, run(upgraded, (IMAGES,), **arguments))
    assert_differ(before, run(learned("optional"), (IMAGES,), **arguments))


def test_the_traced_arguments_may_be_given() -> None:
    original, upgraded = pair("optional")
    args = SWAPS["optional"].arguments()
    assert_same(run(original, args), run(upgraded, (*args, None), scale=1.0))


class TwoGraphs(models.Wrapped):
    """A node guides, and its part runs other operations in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


PARTS = Swap(lambda: models.Wrapped(models.Dropping()), "inner.target", "input")


def test_parts_in_two_modes_are_an_error_where_only_a_graph_feeds() -> None:
    swap = Swap(lambda: TwoGraphs(models.Dropping()), "inner.target", "mul")
    upgraded = swap.swap(swap.build())
    upgraded.train().inner.eval()
    with pytest.raises(GuidanceError) as caught:
        upgraded(IMAGES)
    assert str(caught.value) == (
        "'inner' is in eval mode inside a network in train mode. This network runs other "
        "operations in train mode than in eval mode, and has one graph for each. Set both to the "
        "same mode; normalisation layers may keep theirs."
    )


@pytest.mark.parametrize("training", [True, False], ids=["eval_part", "train_part"])
def test_elsewhere_a_part_may_have_a_mode_of_its_own(training: bool) -> None:
    original = PARTS.build()
    upgraded = PARTS.swap(original)
    for model in (original, upgraded):
        model.train(training).inner.train(not training)
    before = run(original, (IMAGES,), training=training)
    assert_same(before, run(upgraded, (IMAGES,), training=training))
    nn.init.constant_(upgraded.inner.target.blend, 0.5)
    assert_differ(before, run(upgraded, (IMAGES,), training=training))
