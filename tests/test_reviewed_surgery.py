"""What a second review of the surgery found: hooks, kinds of guidance, torch's default device."""

from __future__ import annotations

from typing import Any

import models as m
import pytest
import torch
from counts import IMAGES, STEM, WAY, WAYS, Four
from refusals import untraceable
from same import assert_differ
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(x).relu()


class Blocks(nn.Module):
    """The call of `block` dissolves into a graph; `mul` is a node and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, padding=1), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x) * 2)


# ---- hooks on what dissolved


def blocks(guidance: str) -> tuple[nn.Module, list[str]]:
    """An upgraded network, and where a hook on its block notes that it ran."""
    model = pacswap.swap(Blocks(), "block.target", guidance, example_input=IMAGES)
    ran: list[str] = []
    model.block.register_forward_hook(lambda *_: ran.append("block"))
    return model, ran


def test_a_hook_that_would_not_run_is_an_error_where_only_a_graph_feeds() -> None:
    model, ran = blocks("mul")
    with pytest.raises(GuidanceError) as raised:
        model(IMAGES)
    assert str(raised.value) == (
        "'block' was hooked after the swap, and its call dissolved into the graph that "
        "feeds the pixel-adaptive layers, so that the hook would not run. Remove the hook, hook a "
        "layer inside it, or swap with a layer as the guidance instead of a node of the trace."
    )
    model.block._forward_hooks.clear()
    expected = model(IMAGES)
    model.block.target.register_forward_hook(lambda *_: ran.append("target"))
    assert torch.equal(model(IMAGES), expected)
    assert ran == ["target"]


def test_elsewhere_such_a_hook_runs() -> None:
    model, ran = blocks("stem")
    model(IMAGES)
    assert ran == ["block"]


# ---- what an external guidance can be


@pytest.mark.parametrize("body", [m.Body, untraceable(m.Body)], ids=["graph", "relay"])
@pytest.mark.parametrize(
    ("guidance", "shown"),
    [
        ("features", "a str"),
        (torch.ones(2, 4, 9, 9, dtype=torch.int64), "a tensor of torch.int64"),
    ],
    ids=["text", "whole numbers"],
)
def test_an_external_guidance_is_a_map_of_numbers(
    body: type[nn.Module], guidance: Any, shown: str
) -> None:
    model = pacswap.swap(body(), "target", "external", example_input=IMAGES)
    with pytest.raises(GuidanceError) as raised:
        model(IMAGES, guidance=guidance)
    assert str(raised.value) == (
        "the external guidance must be a tensor of floating-point numbers [B, D, H, W], got "
        f"{shown}."
    )
    assert model(IMAGES, guidance=torch.rand(2, 4, 9, 9)).shape == (2, 4, 32, 32)


# ---- another default device than the network's; "meta" stands for a GPU


@WAY
def test_torchs_default_device_is_not_the_networks(way: str) -> None:
    torch.manual_seed(0)
    network = WAYS[way](Four)()
    asked = {"layers": ["a", "b", "c", "d"], "guidance": STEM, "kernel": {"blend": 0.7}}
    expected = pacswap.swap(network, **asked, example_input=IMAGES)
    with torch.device("meta"):
        assert torch.rand(1).is_meta
        model = pacswap.swap(network, **asked, example_input=IMAGES)
        output = model(IMAGES)
        output.square().sum().backward()
        report = pacswap.verify(network, model, IMAGES)
    assert report.passed, str(report)
    assert torch.equal(output, expected(IMAGES))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
        assert parameter.grad is not None, name
    with torch.no_grad():
        model.get_parameter("a.adapting_kernel.log_bandwidth").add_(1.0)
    assert_differ(output, model(IMAGES))
