"""What a review of the relay found, each by the network that showed it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from same import assert_differ, assert_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pacswap
from pacswap.errors import GuidanceError, PlanError

IMAGES = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x))


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 100 else super().forward(x)


class Listed(Untraceable):
    """Holds its modules in a list and a dictionary of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = [self.stem, (self.conv,)]
        self.named = {"conv": self.conv}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            return x
        return self.named["conv"](self.ops[1][0](self.ops[0](x)))


class Dropping(Net):
    """Overwrites its guidance in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.drop(self.stem(x)))

    def forward_all(self, x: Tensor) -> Tensor:
        return self.conv(self.drop(self.stem(x)))


class Reentrant(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 100:
            return x
        return self.conv(checkpoint(self.stem, x, use_reentrant=True).detach())


class Windows(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.conv(torch.cat(torch.chunk(x, 4, 2), 0))


class Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Hooked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block(self.conv)
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.stem(x))


class Open(Net):
    """Takes whatever it is given, and has a static method that is called like the others."""

    @staticmethod
    def forward_scale(x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor, size: Any = None, **more: Any) -> Tensor:
        x = super().forward(x)
        return self.forward_scale(x) if more.get("double") else x


def swapped(model: nn.Module, guidance: Any = "stem", blend: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    upgraded = pacswap.swap(model, "conv", guidance, example_input=IMAGES)
    nn.init.constant_(upgraded.conv.blend, blend)
    return upgraded


def test_modules_that_a_network_lists_itself_are_the_swapped_ones() -> None:
    model = Listed()
    upgraded = swapped(model)
    assert upgraded.ops[1][0] is upgraded.conv is upgraded.named["conv"]
    assert_differ(model(IMAGES), upgraded(IMAGES))
    plain = pacswap.revert(upgraded)
    assert plain.ops[1][0] is plain.conv is plain.named["conv"]
    assert_same(model(IMAGES), plain(IMAGES), tolerance=0)


@pytest.mark.parametrize("guidance", ["stem", {"from": "stem", "channels": 4}])
def test_a_map_that_train_mode_overwrites_is_copied_by_the_relay_too(guidance: Any) -> None:
    upgraded = swapped(Dropping(), guidance).train()
    outputs = []
    for way in (upgraded, upgraded.forward_all):
        torch.manual_seed(1)
        outputs.append(way(IMAGES))
        outputs[-1].sum().backward()
    assert_same(*outputs)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_gradient_that_reentrant_checkpointing_cuts_is_told() -> None:
    upgraded = swapped(Reentrant(), {"from": "stem", "channels": 4})
    with pytest.raises(GuidanceError, match="'stem' runs under reentrant gradient checkpointing"):
        upgraded.train()(IMAGES.clone().requires_grad_())


def test_windows_are_refused_in_a_graph_too() -> None:
    with pytest.raises(PlanError) as caught:
        pacswap.plan(Windows(), "conv", "stem", example_input=IMAGES)
    assert str(caught.value) == (
        "cannot upgrade Windows: guidance: cannot feed 'conv' from 'stem': it filters 8 maps where "
        "the guidance has 2. It runs on regions or windows of the image, or on several images at "
        "once; name a guidance that runs on the same ones."
    )


def test_a_hook_on_a_module_that_dissolved_into_the_graph_runs() -> None:
    model = Hooked()
    torch.manual_seed(0)
    upgraded = pacswap.swap(model, "block.0", "stem", example_input=IMAGES)
    before, calls = upgraded(IMAGES), []
    handle = upgraded.block.register_forward_hook(lambda *args: calls.append(args))
    assert_same(before, upgraded(IMAGES), tolerance=0)
    handle.remove()
    upgraded(IMAGES)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{"double": True}, {"size": torch.zeros(3).numpy()}])
def test_arguments_that_no_graph_takes_go_to_the_network(options: dict[str, Any]) -> None:
    model = Open()
    upgraded = swapped(model, blend=0.0)
    assert_same(model(IMAGES, **options), upgraded(IMAGES, **options), tolerance=0)


def test_a_static_method_stays_one() -> None:
    assert torch.equal(swapped(Open()).forward_scale(IMAGES), 2 * IMAGES)


def test_a_subclass_of_an_upgraded_network_is_copied() -> None:
    upgraded = swapped(Net())
    upgraded.__class__ = type("Sub", (type(upgraded),), {})
    twin = copy.deepcopy(upgraded)
    assert type(twin) is type(upgraded)
    assert_same(upgraded(IMAGES), twin(IMAGES), tolerance=0)


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 100 else self.conv(x)


def test_positions_of_a_clip_go_through_the_relay() -> None:
    clips = torch.rand(2, 3, 4, 16, 20)
    model = Clip()
    upgraded = pacswap.swap(model, "conv", "input+position", example_input=clips)
    assert_same(model(clips), upgraded(clips), tolerance=0)


def test_a_norm_of_another_size_is_noticed_at_the_plan() -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm([8, 9, 9])

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.stem(x)))

    with pytest.raises(PlanError, match="does not run on an example input"):
        pacswap.plan(Normed(), "conv", "stem", example_input=IMAGES)


def test_an_upgraded_network_inside_another_is_reverted_with_it() -> None:
    outer, inner = swapped(Net()), swapped(Net())
    outer.extra = inner
    plain = pacswap.revert(outer)
    with pytest.raises(PlanError, match="was not upgraded by pacswap"):
        pacswap.revert(plain.extra)
