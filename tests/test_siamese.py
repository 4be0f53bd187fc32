"""`input` in a network that takes two images and runs one part on each: each call's own image."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import models as m
import pytest
import torch
from refusals import IMAGES, KERNEL
from same import assert_differ, assert_same
from torch import Tensor, nn

import pacswap
from pacswap.errors import PlanError

OTHERS = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(5))
PAIR = (IMAGES, OTHERS)


class Looking(m.Body):
    """A body that no trace can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 0 else x


class Siamese(nn.Module):
    """One encoder for two images."""

    def __init__(self, body: type[nn.Module] = m.Body) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"body": body()})["body"]
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.last(self.encoder(one) - self.encoder(other))


def listed() -> nn.Sequential:
    body = m.Body()
    parts = {"stem": body.stem, "norm": body.norm, "relu": nn.ReLU(), "target": body.target}
    return nn.Sequential(OrderedDict(parts))


class Normalised(Siamese):
    """The encoder is given what was made of the images."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return super().forward(one * 2 - 1, other * 2 - 1)


class AtRoot(Siamese):
    """Runs the convolutions of the encoder itself."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        first, second = (self.encoder.target(self.encoder.stem(x)) for x in (one, other))
        return self.last(first - second)


class Masked(Siamese):
    """Two scales of one image; the other argument is no image of its own for any call."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.encoder(one) + self.encoder(one.flip(-1))) * other[:, :1]


class Depth(Siamese):
    """Another encoder for the other image."""

    def __init__(self) -> None:
        super().__init__()
        self.second = m.Body()

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.encoder(one) + self.second(other)


class Written(Siamese):
    """The images are written into tensors that the network made."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        made = [torch.zeros_like(one), one.new_zeros(one.shape)]
        for mine, image in zip(made, (one, other), strict=True):
            mine[:] = image
        return super().forward(*made)


def swapped(model: nn.Module, layers: Any = "encoder.target", guidance: Any = "input") -> nn.Module:
    torch.manual_seed(0)
    made = pacswap.swap(model, layers, guidance, kernel=KERNEL, example_input=PAIR)
    return made.eval()


def seeded(cls: type[nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(*args)


@pytest.mark.parametrize("body", [m.Body, Looking, listed], ids=["graph", "relay", "list"])
@pytest.mark.parametrize("guidance", ["input", "input+position", ["input", "encoder.stem"]])
def test_each_call_is_guided_by_its_own_image(body: type[nn.Module], guidance: Any) -> None:
    model = swapped(seeded(Siamese, body), guidance=guidance)
    alone = [model.encoder(x) for x in PAIR]
    assert_same(model(*PAIR), model.last(alone[0] - alone[1]))
    seen: list[Tensor] = []
    hook = model.encoder.target.guidance.register_forward_hook(
        lambda _, args, output: seen.append(args[0])
    )
    model(*PAIR)
    hook.remove()
    assert_same(seen, list(PAIR), tolerance=0)
    plan = pacswap.surgery.plan_of(model)
    assert [scope.module for scope in plan.scopes] == ["encoder"]


def test_the_other_image_guides_nothing_of_the_first() -> None:
    """The twin: one image for both calls, as it once was, gives another output."""
    model = swapped(seeded(Siamese))
    alone = model.encoder(OTHERS)
    guidance = model.encoder.target.guidance
    handle = guidance.register_forward_pre_hook(lambda *_: (IMAGES,))
    assert_differ(alone, model.encoder(OTHERS))
    handle.remove()
    assert_same(alone, model.encoder(OTHERS), tolerance=0)


def refusal(model: nn.Module, **options: Any) -> str:
    with pytest.raises(PlanError) as caught:
        pacswap.plan(model, example_input=PAIR, **options)
    return str(caught.value)


UNKNOWN = (
    "'input' is the first image, and 'encoder.target' runs on others too. Which image belongs to "
    "which of its calls is known only where a part of the network that contains the layer is given "
    "the images themselves, one at each call, as its first argument. Name a layer that runs before "
    "it on the same image"
)


@pytest.mark.parametrize(
    ("cls", "hint"),
    [
        (Normalised, ", such as 'encoder.stem', 'encoder.norm'."),
        (Written, ", such as 'encoder.stem', 'encoder.norm'."),
        (AtRoot, "."),
    ],
)
def test_an_image_that_is_not_known_is_refused(cls: type[nn.Module], hint: str) -> None:
    said = refusal(cls(), layers="encoder.target", guidance="input")
    assert said == f"cannot upgrade {cls.__name__}: guidance: {UNKNOWN}{hint}"


def test_what_it_names_instead_works() -> None:
    model = swapped(seeded(Normalised), guidance="encoder.stem")
    one, other = (model.encoder(2 * x - 1) for x in PAIR)
    assert_same(model(*PAIR), model.last(one - other))


def test_another_group_that_needs_the_whole_network_is_refused() -> None:
    groups = [
        {"layers": "encoder.target", "guidance": "input"},
        {"layers": "last", "guidance": "encoder.stem"},
    ]
    said = refusal(Siamese(), groups=groups)
    assert (
        "'input' is the image that each call of 'encoder' is given, and another group has the "
        "whole network rewired, which knows the first image alone. Name a layer of 'encoder' "
        "instead of 'input', or leave the other group out."
    ) in said


@pytest.mark.parametrize(
    ("cls", "layer"),
    [(Masked, "encoder.target"), (Depth, "second.target"), (Siamese, "last")],
)
def test_where_one_image_is_meant_it_is_the_first(cls: type[nn.Module], layer: str) -> None:
    model = swapped(seeded(cls), layer)
    seen: list[Tensor] = []
    for guidance in (x for x in model.modules() if isinstance(x, pacswap.nn.Guidance)):
        guidance.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    model(*PAIR)
    assert len(seen) == 1
    assert_same(seen[0], IMAGES, tolerance=0)


def test_one_tensor_given_twice_is_two_images() -> None:
    plan = pacswap.plan(Siamese(), "encoder.target", "input", example_input=(IMAGES, IMAGES))
    assert [scope.module for scope in plan.scopes] == ["encoder"]
    assert vars(IMAGES) == {}
