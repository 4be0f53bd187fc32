"""timm's own convolutions keep what they compute, their class and their keys when swapped."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from numerics import ONE_DIRECTION
from same import assert_differ, assert_same
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

import pacswap
from pacswap.errors import PlanError, ShapeError
from pacswap.nn import PacConv2d


class Plain(nn.Conv2d):
    """A subclass that leaves `forward` alone."""


CLASSES = {
    cls.__name__: cls
    for cls in (Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, Plain)
}
SAME = ("Conv2dSame", "StdConv2dSame", "ScaledStdConv2dSame")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3},
    "3x3_stride_2": {"kernel_size": 3, "stride": 2},
    "3x3_dilation_2": {"kernel_size": 3, "dilation": 2},
    "2x2": {"kernel_size": 2},
    "4x4_stride_2": {"kernel_size": 4, "stride": 2},
    "5x5_stride_2": {"kernel_size": 5, "stride": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise_stride_2": {"kernel_size": 3, "groups": 4, "stride": 2},
    "no_bias": {"kernel_size": 3, "bias": False},
}
NAMES = pytest.mark.parametrize("name", list(CLASSES))
SHAPES = pytest.mark.parametrize("geometry", list(GEOMETRIES))
SIZES = pytest.mark.parametrize("size", [(13, 17), (16, 20), (15, 16)], ids=str)


def conv(name: str, geometry: str = "3x3", dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    torch.manual_seed(0)
    options = dict(GEOMETRIES[geometry])
    if name not in SAME:
        size, dilation = options["kernel_size"], options.get("dilation", 1)
        options["padding"] = dilation * (size - 1) // 2
    made = CLASSES[name](4, 8, **options).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():  # a gain of 1, say, would hide a mistake
            parameter.add_(torch.rand_like(parameter))
    return made


def images(size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(plain: nn.Conv2d, blend: float) -> PacConv2d:
    return PacConv2d.from_conv(plain, blend=blend)


@SIZES
@SHAPES
@NAMES
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_constant_guidance_is_the_class_itself(
    name: str, geometry: str, size: tuple[int, int], blend: float
) -> None:
    plain, x = conv(name, geometry), images(size)
    layer = adapted(plain, blend)
    with torch.no_grad():
        made = layer(x, torch.ones(2, 3, *size))
    assert_same(plain(x).detach(), made, tolerance=0 if blend == 0 else 2e-6)


@SHAPES
@NAMES
def test_another_guidance_is_something_else(name: str, geometry: str) -> None:
    plain, x = conv(name, geometry), images((13, 17))
    with torch.no_grad():
        assert_differ(plain(x), adapted(plain, 1.0)(x, torch.randn(2, 3, 13, 17)))


@NAMES
def test_it_differs_from_an_ordinary_convolution(name: str) -> None:
    """… but for the subclass that leaves `forward` alone: what they add is kept, not dropped."""
    plain, x = conv(name), images((13, 17))
    ordinary = nn.Conv2d(4, 8, 3, padding=plain.padding, bias=plain.bias is not None)
    ordinary.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "gain"})
    if name == "Plain":
        assert_same(ordinary(x), plain(x), tolerance=0)
    elif name == "Conv2dSame":
        assert plain(x).shape != ordinary(x).shape
    else:
        ours, theirs = plain(x), ordinary(x)
        assert ours.shape != theirs.shape or (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("geometry", ["3x3", "4x4_stride_2", "depthwise_stride_2"])
@NAMES
def test_gradients_are_those_of_the_class(name: str, geometry: str, blend: float) -> None:
    plain = conv(name, geometry, torch.float64)
    layer = adapted(copy.deepcopy(plain), blend)
    inputs = [images((13, 17), torch.float64).requires_grad_() for _ in range(2)]
    guidance = torch.ones(2, 3, 13, 17, dtype=torch.float64)
    plain(inputs[0]).pow(2).sum().backward()
    layer(inputs[1], guidance).pow(2).sum().backward()
    assert_same(inputs[0].grad, inputs[1].grad, tolerance=1e-12)
    found = dict(layer.named_parameters())
    for key, parameter in plain.named_parameters():
        assert parameter.grad.abs().max() > 0, key
        assert_same(parameter.grad, found[key].grad, tolerance=1e-11)


@NAMES
def test_the_weight_learns_through_an_adapted_path(name: str) -> None:
    layer = adapted(conv(name, dtype=torch.float64), 0.7)
    x, guidance = (images((5, 6), torch.float64) for _ in range(2))
    names = [n for n, _ in layer.named_parameters() if n in ("weight", "gain", "bias", "blend")]

    def run(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(layer, given, (x, guidance))

    tensors = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, tensors, **ONE_DIRECTION)


@NAMES
def test_class_keys_and_copies(name: str) -> None:
    plain = conv(name)
    layer = adapted(plain, 0.5)
    assert isinstance(layer, (PacConv2d, CLASSES[name]))
    assert isinstance(layer, CLASSES[name])
    assert type(layer).__name__ == f"Pac{name}"
    assert type(adapted(conv(name), 0.5)) is type(layer)
    before = plain.state_dict()
    after = layer.state_dict()
    assert after.keys() - before.keys() == {"blend", "adapting_kernel.log_bandwidth"}
    assert all(torch.equal(before[key], after[key]) for key in before)
    x, guidance = images((13, 17)), torch.randn(2, 3, 13, 17)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert_same(layer(x, guidance), twin(x, guidance), tolerance=0)


@NAMES
def test_the_class_comes_back(name: str) -> None:
    plain = conv(name)
    layer = adapted(plain, 0.5)
    back = layer.to_conv()
    assert type(back) is CLASSES[name]
    assert vars(back).keys() == vars(plain).keys()
    assert back.weight is plain.weight
    x = images((13, 17))
    assert_same(plain(x), back(x), tolerance=0)


class Network(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.stem, self.target = nn.Conv2d(3, 4, 3, padding=1), conv(name, "3x3_stride_2")

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.stem(x))


@NAMES
def test_a_network_is_swapped_and_reverted(name: str) -> None:
    model, x = Network(name), torch.rand(2, 3, 17, 21)
    upgraded = pacswap.swap(model, "target", "stem", example_input=x, calibration=x)
    assert isinstance(upgraded.target, CLASSES[name])
    assert_same(model(x), upgraded(x), tolerance=0)
    pacswap.verify(model, upgraded, x).raise_if_failed()
    nn.init.constant_(upgraded.target.blend, 0.5)
    assert_differ(model(x).detach(), upgraded(x).detach())
    plain = pacswap.revert(upgraded)
    assert type(plain.target) is CLASSES[name]
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert_same(model(x), plain(x), tolerance=0)


class Doubled(StdConv2d):
    """Of a known class, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnPadding(nn.Conv2d):
    """Leaves `forward` alone, and not what it calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x + 1, weight, bias)


UNKNOWN = (
    "has a forward of its own, and what it computes would be lost. Known are torch.nn.Conv1d, "
    "Conv2d and Conv3d, their subclasses that leave forward alone, and timm's Conv2dSame, "
    "StdConv2d, StdConv2dSame, ScaledStdConv2d and ScaledStdConv2dSame."
)


@pytest.mark.parametrize("cls", [Doubled, OwnPadding])
def test_an_unknown_forward_is_refused(cls: type[nn.Conv2d]) -> None:
    with pytest.raises(ShapeError) as caught:
        PacConv2d.from_conv(cls(4, 8, 3))
    assert str(caught.value) == f"{cls.__name__} {UNKNOWN}"
    model = Network("Plain")
    model.target = cls(4, 8, 3)
    with pytest.raises(PlanError) as refused:
        pacswap.plan(model, "target", "stem", example_input=torch.rand(2, 3, 17, 21))
    assert str(refused.value) == (
        f"cannot upgrade Network: layers: cannot swap 'target': {cls.__name__} {UNKNOWN}"
    )
