"""What feeds the layers: AdaptingKernel, Guidance and its resizing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from numerics import CASES, DIFFERS, all_cases, assert_close64, assert_equal, fresh_memory_is_nan
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.nn import AdaptingKernel, Guidance, resize_guidance, why_not_project

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
BASE = CASES["3x3_p1"]
DESIGN = {"standardize": True, "distance": "mean", "normalize": "mean"}


def features(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, DESIGN], ids=["paper", "design"])
@all_cases
def test_adapting_kernel_is_the_operation(case, options):
    guidance = case.tensors()["guidance"]
    module = AdaptingKernel(
        case.kernel_size, **case.geometry, **options, bandwidth=1.6, dtype=torch.float64
    )
    expected = ops.adapting_kernel(
        guidance, case.kernel_size, **case.geometry, **options, bandwidth=1.6
    )
    assert_close64(module(guidance).detach(), expected)


def test_the_bandwidth_of_an_adapting_kernel_counts_and_learns():
    guidance = BASE.tensors()["guidance"]
    narrow, broad = (AdaptingKernel(3, bandwidth=b, dtype=torch.float64) for b in (1.0, 2.0))
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(narrow(guidance).detach(), broad(guidance).detach())
    broad(guidance).sum().backward()
    assert broad.log_bandwidth.grad > 0
    assert_close64(broad.bandwidth.detach(), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("bandwidth", [300.0, 1e-3], ids=str)
def test_a_half_bandwidth_is_rounded_once(bandwidth):
    """As its logarithm, the parameter, and not again as itself."""
    guidance = BASE.tensors(torch.float32)["guidance"] * bandwidth
    module = AdaptingKernel(3, bandwidth=bandwidth, dtype=torch.float16)
    logarithm = module.log_bandwidth.detach().double()
    expected = ops.adapting_kernel(guidance.double(), 3, bandwidth=logarithm.exp())
    twice = ops.adapting_kernel(guidance.double(), 3, bandwidth=logarithm.exp().half())
    kernel = module(guidance).double().detach()
    torch.testing.assert_close(kernel, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(kernel, twice, rtol=1e-5, atol=1e-7)


def test_a_half_bandwidth_of_an_operation_is_squared_in_float32():
    guidance = (BASE.tensors()["guidance"] * 300).half()
    kernel = ops.adapting_kernel(guidance, 3, bandwidth=torch.tensor(300.0).half())
    assert_equal(kernel, ops.adapting_kernel(guidance, 3, bandwidth=300.0))
    assert kernel.min() < 0.5


@pytest.mark.parametrize("empty", ["disabled", "no_guidance"])
def test_a_disabled_adapting_kernel_computes_nothing(empty):
    module = AdaptingKernel(3)
    module.enabled = empty != "disabled"
    assert module(None if empty == "no_guidance" else features(1, 3, 5, 5)) is None
    module.enabled = True
    assert module(features(1, 3, 5, 5)) is not None


def test_repr_of_an_adapting_kernel():
    assert repr(AdaptingKernel((3, 5), stride=2, padding=1, **DESIGN)) == (
        "AdaptingKernel(kernel_size=(3, 5), stride=(2, 2), pad=(1, 1, 1, 1), dilation=(1, 1), "
        "padding_mode='zeros', form='gaussian', distance='mean', standardize=True, "
        "normalize='mean', smoothing='none', channel_wise=False)"
    )


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("module", [AdaptingKernel(3), Guidance(4, 2)], ids=["kernel", "guidance"])
def test_copies_are_equal_and_independent(module, copied):
    guidance = features(1, 4, 5, 5).float()
    twin, expected = copied(module), module(guidance).detach()
    assert_equal(twin(guidance).detach(), expected)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert_equal(module(guidance).detach(), expected)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(twin(guidance).detach(), expected)


def test_guidance_leaves_a_map_as_it_is():
    only = features(2, 3, 4, 5)
    assert Guidance(None)(only) is only


def test_guidance_concatenates_at_the_first_maps_resolution():
    first, second, third = features(1, 2, 6, 8), features(1, 3, 3, 4), features(1, 1, 12, 16)
    joined = Guidance(6)(first, second, third)
    resized = [
        F.interpolate(f, (6, 8), mode="bilinear", align_corners=False) for f in (second, third)
    ]
    assert_equal(joined, torch.cat([first, *resized], 1))


def test_guidance_heeds_the_order_of_its_maps():
    first, second = features(1, 2, 4, 4), features(1, 2, 4, 4, seed=1)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(Guidance(4)(first, second), Guidance(4)(second, first))


@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (1, 1)], ids=str)
def test_position_is_column_and_row_with_one_unit_on_both_axes(shape):
    H, W = shape
    given = features(2, 3, H, W)
    result = Guidance(5, position=True)(given)
    x = [[(2 * j - (W - 1)) / max(H, W) for j in range(W)]] * H
    y = [[(2 * i - (H - 1)) / max(H, W)] * W for i in range(H)]
    expected = torch.tensor([x, y], dtype=torch.float64).expand(2, 2, H, W)
    torch.testing.assert_close(result[:, :2], expected, rtol=0, atol=1e-15)
    assert_equal(result[:, 2:], given)
    assert result[:, :2].abs().max() <= 1


@pytest.mark.parametrize("detach", [True, False], ids=["detach", "attach"])
def test_detach_stops_the_gradient_before_the_projection(detach):
    given = features(1, 4, 3, 3).requires_grad_()
    guidance = Guidance(4, 2, detach=detach, dtype=torch.float64)
    guidance(given).square().sum().backward()
    assert (given.grad is None) is detach
    assert guidance.project.weight.grad.abs().sum() > 0


def test_projection_is_a_1x1_convolution_without_bias():
    guidance, given = Guidance(6, 4, position=True, dtype=torch.float64), features(1, 4, 3, 5)
    unprojected = Guidance(6, position=True)(given)
    matrix = guidance.project.weight[:, :, 0, 0]
    assert_close64(
        guidance(given).detach(), torch.einsum("od,bdhw->bohw", matrix, unprojected).detach()
    )
    assert guidance.project.bias is None
    assert list(guidance.state_dict()) == ["project.weight"]


def gram(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return matrix @ matrix.T if rows <= columns else matrix.T @ matrix


@pytest.mark.parametrize(
    ("in_channels", "channels"), [(64, 16), (16, 64), (5, 5), (3, 1), (2, 7)], ids=str
)
def test_projection_starts_orthonormal(in_channels, channels):
    matrix = Guidance(in_channels, channels).project.weight.detach()[:, :, 0, 0]
    torch.testing.assert_close(gram(matrix), torch.eye(min(matrix.shape)), rtol=0, atol=1e-5)


def test_an_ordinary_convolution_does_not_start_orthonormal():
    matrix = nn.Conv2d(64, 16, 1).weight.detach()[:, :, 0, 0]
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(gram(matrix), torch.eye(16), rtol=0, atol=1e-5)


def test_projection_is_the_same_every_time_and_takes_no_random_number():
    before = torch.get_rng_state()
    first, second = Guidance(8, 4), Guidance(8, 4)
    assert_equal(first.project.weight.detach(), second.project.weight.detach())
    assert torch.equal(torch.get_rng_state(), before)
    nn.Conv2d(8, 4, 1)
    assert not torch.equal(torch.get_rng_state(), before)


MERE_SCALE = (
    "a guidance of 1 channel cannot be projected: the 1×1 convolution would be a mere scale, which "
    "the standardisation undoes. Leave channels out"
)
REFUSALS = {
    "one_channel": (1, 4, MERE_SCALE),
    "no_channel": (8, 0, "channels must be at least 1, got 0"),
    "unknown": (None, 4, "the number of channels to project from is not known"),
}


@pytest.mark.parametrize(("in_channels", "channels", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refused_projections(in_channels, channels, message):
    with pytest.raises(ShapeError) as raised:
        Guidance(in_channels, channels)
    assert str(raised.value) == why_not_project(in_channels, channels) == message


@pytest.mark.parametrize(("in_channels", "channels"), [(1, None), (None, None), (2, 1)], ids=str)
def test_accepted_projections(in_channels, channels):
    assert why_not_project(in_channels, channels) is None
    assert (Guidance(in_channels, channels).project is None) is (channels is None)


def test_a_disabled_guidance_computes_nothing():
    guidance = Guidance(4, 2)
    guidance.enabled = False
    assert guidance(features(1, 4, 3, 3).float()) is None
    guidance.enabled = True
    assert guidance(features(1, 4, 3, 3).float()) is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_guidance_in_the_dtype_of_its_maps(dtype):
    guidance = Guidance(6, 3, position=True).to(dtype)
    assert guidance(features(1, 4, 3, 3).to(dtype)).dtype == dtype


def test_repr_of_a_guidance():
    assert repr(Guidance(8, 4, position=True)).startswith(
        "Guidance(\n  8, 4, position=True, detach=False\n"
    )


RESIZED = {
    "bilinear": lambda f, size: F.interpolate(f, size, mode="bilinear", align_corners=False),
    "nearest": lambda f, size: F.interpolate(f, size, mode="nearest"),
    "area": F.adaptive_avg_pool2d,
}
SIZES = {"up": (9, 12), "down": (2, 3), "uneven": (5, 3)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("mode", "expected"), RESIZED.items(), ids=RESIZED)
def test_resize(mode, expected, size):
    given, like = features(2, 3, 4, 6), features(2, 7, *size)
    assert_close64(resize_guidance(given, like, mode), expected(given, size))


@pytest.mark.parametrize(("one", "other"), [("bilinear", "nearest"), ("nearest", "area")])
def test_resize_modes_differ(one, other):
    given, like = features(2, 3, 4, 6), features(2, 7, 3, 4)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(*[resize_guidance(given, like, mode) for mode in (one, other)])


@pytest.mark.parametrize("mode", RESIZED)
def test_resize_leaves_what_fits_and_what_is_disabled(mode):
    given = features(1, 2, 4, 6)
    assert resize_guidance(given, features(1, 9, 4, 6), mode) is given
    assert resize_guidance(None, given, mode) is None
