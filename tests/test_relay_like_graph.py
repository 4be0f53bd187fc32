"""What a caller does to a network is the same whether a graph or a relay feeds its layers."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import models as m
import pytest
import torch
from refusals import IMAGES, KERNEL, untraceable
from same import assert_differ, assert_same
from torch import Tensor, nn

import pacswap
from pacswap.surgery import relay

FEATURES = torch.rand(2, 5, 16, 20, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def no_frame_is_left() -> Iterator[None]:
    yield
    assert relay.local.frames == []


class Masked(m.Body):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x if mask is None else x * mask


class Fronted(m.Body):
    """Its guidance is a Sequential, whose last entry the relay listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.front(x))


class FrontedInPlace(Fronted):
    """It overwrites that guidance."""

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.front(x).mul_(2))


class LookingMasked(Masked):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) if x.shape[-1] > 0 else x


class LookingBody(m.Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 0 else x


LOOKING = {m.Body: LookingBody, Masked: LookingMasked}


def both(cls: type[nn.Module], guidance: Any = "stem") -> dict[str, nn.Module]:
    """One network, upgraded as a graph and with a relay."""
    torch.manual_seed(0)
    plain, looking = cls(), LOOKING.get(cls, untraceable(cls))()
    looking.load_state_dict(plain.state_dict())
    options = {"kernel": KERNEL, "example_input": IMAGES}
    made = {
        name: pacswap.swap(model, "target", guidance, **options).eval()
        for name, model in (("graph", plain), ("relay", looking))
    }
    assert made["graph"]._pacswap_program.train is not None
    assert made["relay"]._pacswap_program.train is None
    return made


# ---- an external guidance by its place


@pytest.mark.parametrize("cls", [m.Body, Masked])
def test_an_external_guidance_may_be_given_by_its_place(cls: type[nn.Module]) -> None:
    before = () if cls is m.Body else (None,)
    outputs = []
    for model in both(cls, "external").values():
        named = model(IMAGES, *before, guidance=FEATURES)
        assert_same(named, model(IMAGES, *before, FEATURES), tolerance=0)
        assert_differ(named, model(IMAGES, *before, FEATURES.flip(-1)))
        outputs.append(named)
    assert_same(*outputs)


def test_a_place_before_it_is_not_its_own() -> None:
    outputs = []
    for model in both(Masked, "external").values():
        half = model(IMAGES, IMAGES[:, :1], FEATURES)
        assert_same(half, model(IMAGES, IMAGES[:, :1], guidance=FEATURES), tolerance=0)
        assert_differ(half, model(IMAGES, None, FEATURES))
        outputs.append(half)
    assert_same(*outputs)


@pytest.mark.parametrize("named", [{"guidance": FEATURES}, {}], ids=["twice", "one_more"])
@pytest.mark.parametrize("way", ["graph", "relay"])
def test_one_argument_too_many_is_pythons_own_error(way: str, named: dict[str, Tensor]) -> None:
    model, more = both(m.Body, "external")[way], () if named else (FEATURES,)
    with pytest.raises(TypeError, match=r"takes .*positional argument"):
        model(IMAGES, FEATURES, *more, **named)


# ---- a hook that is put on the guidance after the swap


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output + IMAGES[:, :1]


HOOKED = pytest.mark.parametrize(
    ("cls", "source"), [(m.Body, "stem"), (Fronted, "front"), (FrontedInPlace, "front")]
)


@HOOKED
@pytest.mark.parametrize("prepend", [False, True])
def test_the_guidance_is_what_its_source_returns_after_its_hooks(
    cls: type[nn.Module], source: str, prepend: bool
) -> None:
    found = []
    for model in both(cls, source).values():
        before, twin = model(IMAGES), copy.deepcopy(model)
        handle = model.get_submodule(source).register_forward_hook(doubled, prepend=prepend)
        twin.get_submodule(source).register_forward_hook(doubled)
        found.append((model(IMAGES), twin(IMAGES)))
        assert_differ(before, found[-1][0])
        handle.remove()
        assert_same(before, model(IMAGES), tolerance=0)
    assert_same(found[0], found[1])
    assert_same(*found[0], tolerance=0)


@HOOKED
def test_a_hook_that_the_guidance_did_not_see_would_be_noticed(
    cls: type[nn.Module], source: str
) -> None:
    """The twin: the same change behind what is noted gives another output."""
    model = both(cls, source)["relay"]
    model.get_submodule(source).register_forward_hook(doubled)
    after = model(IMAGES)
    hooks = model.get_submodule(source)._forward_hooks
    late = OrderedDict(sorted(hooks.items()))  # as they were registered: ours first
    model.get_submodule(source)._forward_hooks = late
    taps = [hook for hook in late.values() if isinstance(hook, pacswap.surgery.hooks.Tap)]
    assert len(taps) == 1
    assert_differ(after, model(IMAGES))


def test_gradients_go_through_the_hook() -> None:
    found = []
    for model in both(Fronted, {"from": "front", "channels": 2}).values():
        model.train()
        model.front.register_forward_hook(doubled)
        model(IMAGES).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(found[0], found[1], tolerance=1e-5)
    assert "front.0.weight" in found[0]


def test_a_compiled_network_sees_the_hook_too() -> None:
    torch._dynamo.reset()
    model = both(Fronted, "front")["relay"]
    model.front.register_forward_hook(doubled)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled(IMAGES), model(IMAGES))
    torch._dynamo.reset()


def test_a_reverted_network_has_hooks_as_any_other() -> None:
    plain = pacswap.revert(both(Fronted, "front")["relay"])
    assert [type(x._forward_hooks) for x in plain.modules()] == [OrderedDict] * len(
        [*plain.modules()]
    )
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in plain.modules())


# ---- the caller's tensors


class Seeing(m.Body):
    """Remembers its arguments."""

    def forward(self, x: Tensor, y: Tensor | None = None, whole: bool = False) -> Any:
        self.seen = [x, y]
        found = super().forward(x)
        return {"out": found, "given": [x, y]} if whole else found


def relayed_seeing() -> nn.Module:
    model = pacswap.swap(untraceable(Seeing)(), "target", "stem", example_input=IMAGES)
    return model.train()


def test_arguments_keep_their_attributes_and_what_they_share() -> None:
    model, x = relayed_seeing(), IMAGES.clone()
    x.tag = "mine"
    model(x, x)
    first, second = model.seen
    assert first is second
    assert first.tag == "mine"
    assert first.data_ptr() == x.data_ptr()
    assert vars(x) == {"tag": "mine"}
    model(x, x.clone())
    assert model.seen[0] is not model.seen[1]


def test_an_argument_that_comes_back_is_the_callers() -> None:
    model, x, y = relayed_seeing(), IMAGES.clone(), IMAGES.flip(0)
    returned = model(x, y, whole=True)
    assert returned["given"][0] is x
    assert returned["given"][1] is y
    assert returned["out"].requires_grad


def test_tensors_that_have_no_views_are_given_on() -> None:
    model, sparse = relayed_seeing(), torch.eye(3).to_sparse()
    model(IMAGES, sparse)
    assert model.seen[1] is sparse
