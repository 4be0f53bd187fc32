"""Lower resolutions under torch.export and torch.compile: sizes of every parity, as in eager."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_equal
from torch import Tensor, nn
from torch.export import Dim

import pacswap
from pacswap.nn import PacCRF, PacFilter2d, PairwiseKernel
from pacswap.nn.blur import reduced, restored

SIZES = [(12, 16), (13, 17), (12, 17), (13, 16), (14, 15)]


class Blurred(nn.Module):
    """There and back."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        small = reduced(image, self.factor)
        return small, restored(small, self.factor, (image.shape[-2], image.shape[-1]))


class Small(nn.Module):
    """Half the size and back to that of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits = self.classifier(self.conv(image))
        return nn.functional.interpolate(logits, size=image.shape[-2:], mode="bilinear")


def exported(model: nn.Module, channels: tuple[int, ...], size: tuple[int, int], named: bool):
    dims = {2: Dim("H", min=4, max=64), 3: Dim("W", min=4, max=64)}
    dims = dims if named else {2: Dim.AUTO, 3: Dim.AUTO}
    example = tuple(torch.rand(1, c, *size) for c in channels)
    shapes = tuple(dims for _ in channels)
    return torch.export.export(model, example, dynamic_shapes=shapes).module()


def assert_same_at_every_size(model: nn.Module, program: nn.Module, channels: tuple[int, ...]):
    for size in SIZES:
        given = tuple(torch.rand(1, c, *size) for c in channels)
        torch.testing.assert_close(program(*given), model(*given), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("factor", "size", "named"),
    [(2, (9, 13), True), (2, (8, 12), False), (3, (9, 13), True)],
)
def test_it_exports_for_every_size(factor, size, named):
    model = Blurred(factor)
    assert_same_at_every_size(model, exported(model, (2,), size, named), (2,))


@pytest.mark.parametrize(
    ("size", "named"), [((8, 12), True), ((9, 13), False)], ids=["even", "odd"]
)
def test_a_filter_exports_for_every_size(size, named):
    model = PacFilter2d(2, 3, blur=2).eval()
    assert_same_at_every_size(model, exported(model, (2, 3), size, named), (2, 3))


@pytest.mark.parametrize("size", [(8, 12), (9, 13)], ids=["even", "odd"])
def test_an_upgraded_network_exports_for_every_size(size):
    model = pacswap.swap(
        Small().eval(),
        "interpolate",
        {"from": "input"},
        operation="upsample",
        filter={"kernel_size": 3, "blur": 2},
        kernel={"bandwidth": 1.0},
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("blend"):
                parameter.fill_(1.0)
    assert_same_at_every_size(model, exported(model, (3,), size, False), (3,))


@pytest.mark.parametrize("size", [(8, 12), (9, 13)], ids=["even", "odd"])
def test_a_crf_exports_for_every_size(size):
    model = PacCRF(2, PairwiseKernel(kernel_size=3, blur=2), steps=1).eval()
    assert_same_at_every_size(model, exported(model, (2, 3), size, False), (2, 3))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_compiled_values_are_those_of_eager(factor, size, monkeypatch):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    small, back = Blurred(factor)(image)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiled_small, compiled_back = Blurred(factor)(image)
    assert_equal(compiled_small, small)
    assert_equal(compiled_back, back)
