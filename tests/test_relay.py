"""Layers that are fed while a network's own code runs do what a graph makes them do."""

from __future__ import annotations

from typing import Any

import models as m
import pytest
import torch
import torch.nn.functional as F
from refusals import KERNEL, relayed_body, untraceable
from same import assert_differ, assert_same, run
from swaps import settled
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError
from pacswap.surgery import relay

IMAGES = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


class LateInPlace(m.Body):
    """A source in the middle of the network is overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return F.relu(self.target(x))


class Three(m.Body):
    """Three convolutions at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.third = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.max_pool2d(self.second(super().forward(x)), 2))


class Deep(nn.Module):
    """Layer and guidance in modules of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(m.Body(), nn.BatchNorm2d(4))
        self.back = nn.ModuleDict({"a": m.Wrapped(nn.Conv2d(4, 4, 3, padding=1))})

    def forward(self, x: Tensor) -> Tensor:
        return self.back["a"](self.front(x))


CASES: dict[str, tuple[type[nn.Module], Any, Any]] = {
    "body": (m.Body, "target", "stem"),
    "in_place": (m.InPlace, "target", "stem"),
    "in_place_late": (LateInPlace, "target", "norm"),
    "in_place_input": (m.InPlaceInput, "target", "input"),
    "in_place_after": (m.InPlaceAfter, "target", "stem"),
    "called_twice": (m.CalledTwice, "target", "stem"),
    "called_at_two_sizes": (m.CalledAtTwoSizes, "target", "stem"),
    "tied": (m.Tied, ["target", "second"], "stem"),
    "three": (Three, ["target", "second", "third"], "stem"),
    "deep": (Deep, ["front.0.target", "back.a.inner"], "front.0.stem"),
    "deep_sequential": (Deep, "back.a.inner", "front"),
    "image": (m.Body, "target", "input"),
    "position": (m.Body, "target", {"from": "input+position", "channels": 3}),
    "several": (m.Body, "target", ["stem", "norm", "input"]),
    "several_projected": (m.Body, "target", {"from": ["stem", "input"], "channels": 2}),
    "projected": (m.Body, "target", {"from": "stem", "channels": 2}),
    "detached": (m.Body, "target", {"from": "stem", "detach": True}),
    "nearest": (Three, ["target", "third"], {"from": "stem", "resize": "nearest"}),
}


def twins(case: str) -> tuple[nn.Module, nn.Module]:
    """One network, fed by its graph and fed by the relay, its blends at 0.7."""
    cls, layers, guidance = CASES[case]
    torch.manual_seed(0)
    model = settled(cls(), (IMAGES.clone(),))
    looking = settled(untraceable(cls)(), (IMAGES.clone(),))
    looking.load_state_dict(model.state_dict())
    graphed, relayed = (
        pacswap.swap(x, layers, guidance, kernel=KERNEL, example_input=IMAGES)
        for x in (model, looking)
    )
    for plain, fed in ((model, graphed), (looking, relayed)):
        fed.plain = [plain]  # not a submodule
    return graphed, relayed


def kernel_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, pacswap.nn.AdaptingKernel):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(autouse=True)
def no_frame_is_left() -> Any:
    yield
    assert relay.local.frames == []


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", list(CASES))
def test_outputs_are_those_of_the_graph(case: str, training: bool) -> None:
    graphed, relayed = twins(case)
    expected = run(graphed, (IMAGES,), training=training)
    assert_same(expected, run(relayed, (IMAGES,), training=training))
    assert_differ(expected[0], run(graphed.plain[0], (IMAGES,), training=training)[0])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", list(CASES))
def test_gradients_are_those_of_the_graph(case: str, training: bool) -> None:
    graphed, relayed = (model.train(training) for model in twins(case))
    images = [IMAGES.clone().requires_grad_(case != "in_place_input") for _ in range(2)]
    for model, x in zip((graphed, relayed), images, strict=True):
        torch.manual_seed(3)
        output = model(x)
        total = sum(y.pow(2).sum() for y in (output if isinstance(output, list) else [output]))
        total.backward()
    if images[0].requires_grad:
        assert_same(images[0].grad, images[1].grad, tolerance=1e-5)
    found = dict(relayed.named_parameters())
    for name, parameter in graphed.named_parameters():
        assert_same(parameter.grad, found[name].grad, tolerance=1e-4)
        if "adapting_kernel" in name or "project" in name or "blend" in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("case", "computed"),
    [("body", 1), ("called_twice", 1), ("called_at_two_sizes", 2), ("tied", 1), ("three", 2)],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_kernels_are_computed_once_for_each_resolution(
    case: str, computed: int, training: bool
) -> None:
    _, relayed = twins(case)
    calls = kernel_calls(relayed.train(training))
    relayed(IMAGES)
    assert len(calls) == computed
    relayed(IMAGES)
    assert len(calls) == 2 * computed


@pytest.mark.parametrize(
    ("cls", "source"), [(m.InPlace, "stem"), (LateInPlace, "norm")], ids=["first", "middle"]
)
def test_the_kernel_sees_a_source_before_it_is_overwritten(
    cls: type[nn.Module], source: str
) -> None:
    model, seen = relayed_body(cls, guidance=source).eval(), []
    model.target.adapting_kernel.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    before = model.stem(IMAGES) if source == "stem" else model.norm(model.stem(IMAGES))
    model(IMAGES)
    assert_same([before], seen, tolerance=0)
    assert before.min() < 0


# ---- what cannot guide, at run time


class Sometimes(m.Body):
    """Calls its stem again, calls it late, or filters other maps, when told to."""

    how = "as seen"

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x
        if self.how == "again":
            self.stem(x)
        if self.how == "late":
            return self.stem(self.target(x.mean(1, True).expand(-1, 4, -1, -1))[:, :3])
        if self.how == "batch":
            return self.target(torch.cat([self.norm(self.stem(x))] * 2))
        return super().forward(x)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "again",
            "the guidance 'stem' ran twice in one call of the network, so it is not known which of "
            "its outputs guides. Swap with another guidance.",
        ),
        (
            "late",
            "'target' (guided by 'stem') was called on a path through the model that does not "
            "compute its guidance. Call the model itself, or use `with pacswap.disabled(model):` "
            "to run that path as it was before the swap.",
        ),
    ],
)
def test_a_call_that_cannot_be_guided_is_an_error(how: str, words: str) -> None:
    model = pacswap.swap(Sometimes(), "target", "stem", kernel=KERNEL, example_input=IMAGES)
    model(IMAGES)
    model.how = how
    with pytest.raises(GuidanceError) as caught:
        model(IMAGES)
    assert str(caught.value) == words
    model.how = "as seen"
    model(IMAGES)


def test_guidance_of_another_batch_is_an_error() -> None:
    model = pacswap.swap(Sometimes(), "target", "stem", kernel=KERNEL, example_input=IMAGES)
    model.how = "batch"
    with pytest.raises(pacswap.errors.ShapeError):
        model(IMAGES)


def test_disabled_is_the_plain_network() -> None:
    _, relayed = twins("three")
    with pacswap.disabled(relayed):
        inside = run(relayed, (IMAGES,))
    assert_same(run(relayed.plain[0], (IMAGES,)), inside, tolerance=0)
