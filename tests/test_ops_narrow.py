"""Both fast ways of a dense convolution, whatever the number of channels, against the reference."""

from __future__ import annotations

import pytest
import torch
from numerics import (
    CASES,
    DIFFERS,
    ONE_DIRECTION,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    fresh_memory_is_nan,
    pac,
    wide,
)

from pacswap import ops
from pacswap.ops import narrow

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

DENSE = {name: case for name, case in CASES.items() if case.groups == 1}
dense = pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)


@pytest.fixture(params=["a product per tap", "a row at a time", "three rows", "all rows"])
def way(request, monkeypatch):
    """Each of the two ways, the joined one also with blocks that cut the image."""
    monkeypatch.setattr(narrow, "MOST_CHANNELS", 0 if request.param.startswith("a p") else 99)
    numbers = {"a row at a time": 1, "three rows": None, "all rows": 1 << 30}
    if request.param == "three rows":
        blocks = narrow._blocks

        def by_three(picture, weight, size):
            rows = [row for block in blocks(picture, weight, size) for row in range(size[0])[block]]
            return [slice(first, min(first + 3, size[0])) for first in rows[::3]]

        monkeypatch.setattr(narrow, "_blocks", by_three)
    elif request.param in numbers:
        monkeypatch.setitem(narrow._BLOCK, "cpu", numbers[request.param])
    return request.param


@dense
def test_each_way_is_the_reference_in_float64(case, way):
    given = case.tensors()
    assert_all_close64(pac(case, given, "eager"), pac(case, given, "reference"))


@pytest.mark.parametrize("way", ["a product per tap", "all rows"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_way_is_as_good_as_torch(way, dtype):
    case = CASES["3x3_p1"]
    given = case.tensors(dtype)
    truth = pac(case, wide(given), "reference")
    found, plain = pac(case, given, "eager"), pac(case, given, "taps")
    for name, value in found.items():
        assert_as_good_as(value, truth[name], plain[name], 2.0)


def test_channel_wise_kernels(way):
    """A kernel for each channel of the input."""
    torch.manual_seed(0)
    input = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    kernel = torch.rand(2, 4, 9, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    found = {}
    for backend in ("eager", "reference"):
        output = ops.pac_conv2d(input, kernel, weight, padding=1, backend=backend)
        grads = torch.autograd.grad(output.square().sum(), (input, kernel, weight))
        found[backend] = dict(zip("oikw", (output.detach(), *grads), strict=True))
    assert_all_close64(found["eager"], found["reference"])
    turned = ops.pac_conv2d(input, kernel.flip(1), weight, padding=1, backend="eager").detach()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(turned, found["reference"]["o"])


def test_second_derivatives(way):
    torch.manual_seed(1)
    input, kernel = torch.randn(1, 2, 4, 4).double(), torch.rand(1, 1, 9, 4, 4).double()
    weight = torch.randn(2, 2, 3, 3).double()
    given = [tensor.requires_grad_() for tensor in (input, kernel, weight)]

    def convolve(*tensors):
        return ops.pac_conv2d(*tensors, padding=1, backend="eager")

    assert torch.autograd.gradgradcheck(convolve, given, **ONE_DIRECTION)


def test_few_channels_take_the_joined_way(monkeypatch):
    taken = []
    joined = narrow.pac_conv2d
    monkeypatch.setattr(narrow, "pac_conv2d", lambda *a: taken.append(a) or joined(*a))
    for channels in (narrow.MOST_CHANNELS, narrow.MOST_CHANNELS + 1):
        input, kernel = torch.rand(1, channels, 4, 4), torch.rand(1, 1, 9, 4, 4)
        ops.pac_conv2d(input, kernel, torch.rand(2, channels, 3, 3), padding=1, backend="eager")
    assert [a[0].shape[1] for a in taken] == [narrow.MOST_CHANNELS]
