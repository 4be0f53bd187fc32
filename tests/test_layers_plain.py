"""Transposed convolutions, poolings and filters: the plain layers that they start from."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import DIFFERS, assert_all_close64, assert_close64, assert_equal, fresh_memory_is_nan
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.nn import (
    AdaptingKernel,
    PacConvTranspose2d,
    PacFilter2d,
    PacPool2d,
    TransposedKernel,
)

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
normalizations = pytest.mark.parametrize("normalize", ["none", "sum", "mean"])

TRANSPOSED: dict[str, dict[str, Any]] = {
    "k4_s2_p1": {"kernel_size": 4, "stride": 2, "padding": 1},
    "k2_s2": {"kernel_size": 2, "stride": 2},
    "k3_s2_p1_op1": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "k16_s8_p4": {"kernel_size": 16, "stride": 8, "padding": 4},
    "k5_s3x2_op1x0": {"kernel_size": 5, "stride": (3, 2), "padding": 2, "output_padding": (1, 0)},
    "k3_d2_op1": {"kernel_size": 3, "dilation": 2, "output_padding": 1, "padding": 2},
    "k3_s2_d3_op2": {"kernel_size": 3, "stride": 2, "dilation": 3, "output_padding": 2},
    "k4_p4_cut": {"kernel_size": 4, "padding": 3},
    "groups": {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    "depthwise_nobias": {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 4, "bias": False},
}
transposed = pytest.mark.parametrize("options", TRANSPOSED.values(), ids=TRANSPOSED)


def pair(options: dict[str, Any], dtype: torch.dtype = torch.float32, **kernel: Any):
    """A transposed convolution, and the layer made of a twin of it."""
    conv = nn.ConvTranspose2d(4, 4, **options, dtype=dtype)
    return conv, PacConvTranspose2d.from_conv(copy.deepcopy(conv), **kernel)


def inputs(layer: PacConvTranspose2d, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    size = layer.output_size(6, 5)
    return torch.randn(2, 4, 6, 5, dtype=dtype), torch.randn(2, 3, *size, dtype=dtype)


@trainings
@transposed
def test_transposed_at_blend_0_is_the_convolution_to_the_bit(options, training):
    conv, layer = pair(options)
    input, guidance = inputs(layer)
    assert guidance.shape[2:] == conv(input).shape[2:]
    assert_equal(layer.train(training)(input, guidance), conv(input))


@transposed
def test_transposed_at_blend_0_has_the_convolutions_gradients_and_one_of_its_own(options):
    conv, layer = pair(options, torch.float64)
    image, guidance = inputs(layer, torch.float64)

    def gradients(module: nn.Module, *more: Tensor) -> dict[str, Tensor]:
        input = image.clone().requires_grad_()
        module(input, *more).square().sum().backward()
        named = {n: p.grad for n, p in module.named_parameters() if n in ("weight", "bias")}
        return {"input": input.grad, **named}

    assert_all_close64(gradients(layer, guidance), gradients(conv))
    assert layer.blend.grad.abs() > 1e-3


@transposed
def test_transposed_of_ones_is_the_convolution(options):
    conv, layer = pair(options, torch.float64, blend=1.0, form="constant")
    input, guidance = inputs(layer, torch.float64)
    assert_close64(layer(input, guidance).detach(), conv(input).detach())
    other = PacConvTranspose2d.from_conv(conv, blend=0.01)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(other(input, guidance).detach(), conv(input).detach())


@transposed
def test_to_conv_undoes_from_conv(options):
    conv = nn.ConvTranspose2d(4, 4, **options).eval()
    back = PacConvTranspose2d.from_conv(conv).to_conv()
    assert back.weight is conv.weight
    assert back.bias is conv.bias
    assert (repr(back), back.training, type(back)) == (repr(conv), False, nn.ConvTranspose2d)


EXTRAS = [
    (options, own, asked)
    for options in (
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 5, "stride": 3, "padding": 3},
        {"kernel_size": 3, "stride": 2, "dilation": 3},
    )
    for own, asked in product(range(2), range(options["stride"]))
]


@normalizations
@pytest.mark.parametrize(("options", "own", "asked"), EXTRAS, ids=str)
def test_output_size_is_that_of_a_layer_with_that_output_padding(options, own, asked, normalize):
    conv = nn.ConvTranspose2d(4, 4, **options, output_padding=asked, dtype=torch.float64)
    conv_own = nn.ConvTranspose2d(4, 4, **options, output_padding=own, dtype=torch.float64)
    conv_own.weight, conv_own.bias = conv.weight, conv.bias
    expected_of, layer = (
        PacConvTranspose2d.from_conv(c, blend=0.5, normalize=normalize) for c in (conv, conv_own)
    )
    input, guidance = inputs(expected_of, torch.float64)
    size = list(guidance.shape[2:])
    output = layer(input, guidance, output_size=size)
    assert_close64(output.detach(), expected_of(input, guidance).detach())
    layer.blend.data.zero_()
    assert_equal(layer(input, guidance, output_size=size), conv_own(input, size))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@transposed
def test_mean_leaves_a_constant_guidance_at_exactly_1(options, dtype):
    geometry = {n: v for n, v in options.items() if n not in ("groups", "bias")}
    kernel = TransposedKernel(**geometry, normalize="mean", dtype=dtype)
    layer = PacConvTranspose2d(4, 4, **options, dtype=dtype)
    _, guidance = inputs(layer, dtype)
    # Far from the border, where guidance meets zeros.
    made = kernel(torch.full_like(guidance, 3.0))
    size, window = guidance.shape[2:], kernel.window
    inner = window.inside(*size, torch.device("cpu"))
    whole = torch.ones(made.shape[-2:], dtype=torch.bool) if inner is None else inner[0].all(0)
    seen = made[..., whole]
    assert_equal(seen[seen != 0], torch.ones_like(seen[seen != 0]))
    # 0 where a tap lies on a zero between the pixels, 1 where it lies on one.
    ones = ops.pac_conv_transpose2d(
        torch.ones(2, 1, 6, 5, dtype=dtype),
        (made != 0).to(dtype),
        torch.ones(1, 1, *window.kernel_size, dtype=dtype),
        **{n: v for n, v in geometry.items() if n != "kernel_size"},
    )
    plain = F.conv_transpose2d(
        torch.ones(2, 1, 6, 5, dtype=dtype),
        torch.ones(1, 1, *window.kernel_size, dtype=dtype),
        **{n: v for n, v in geometry.items() if n != "kernel_size"},
    )
    assert_equal(ones, plain)


@pytest.mark.parametrize(
    "options", [TRANSPOSED[n] for n in ("k4_s2_p1", "k3_s2_p1_op1", "k16_s8_p4")]
)
def test_sum_makes_an_average_of_the_inputs_pixels(options):
    layer = PacConvTranspose2d(1, 1, **options, normalize="sum", bias=False, dtype=torch.float64)
    layer.weight.data.fill_(1.0)
    guidance = torch.randn(1, 3, *layer.output_size(6, 5), dtype=torch.float64)
    ones = torch.ones(1, 1, 6, 5, dtype=torch.float64)
    assert_close64(layer(ones, guidance).detach(), torch.ones_like(guidance[:, :1]))


@pytest.mark.parametrize("normalize", ["sum", "mean"])
def test_normalised_where_no_two_pixels_meet_nothing_is_adapted(normalize):
    """Each output of a 2×2 layer of stride 2 sees one pixel: K / ΣK is 1 whatever the guidance."""
    layer = PacConvTranspose2d(4, 4, 2, 2, normalize=normalize, dtype=torch.float64)
    input, guidance = inputs(layer, torch.float64)
    assert_close64(layer(input, guidance).detach(), layer.to_conv()(input).detach())


def test_the_mask_of_a_transposed_kernel_is_that_of_the_input():
    with pytest.raises(ShapeError) as raised:
        TransposedKernel(3)(torch.ones(1, 1, 5, 5), mask=torch.ones(1, 1, 5, 5))
    assert str(raised.value) == "mask must be [B, 1, H, W] = [B, 1, 3, 3], got [1, 1, 5, 5]."


# Pooling.

POOLS: dict[str, Callable[[], nn.Module]] = {
    "average_2": lambda: nn.AvgPool2d(2),
    "average_3_s2_p1": lambda: nn.AvgPool2d(3, 2, 1),
    "average_3_s2_p1_inside": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average_3_s2_ceil": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average_2_s2_ceil_inside": lambda: nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
    "average_5_s4_ceil": lambda: nn.AvgPool2d(5, 4, ceil_mode=True),
    "average_divisor": lambda: nn.AvgPool2d((2, 3), (1, 2), divisor_override=5),
    "max_2": lambda: nn.MaxPool2d(2),
    "max_3_s2_p1": lambda: nn.MaxPool2d(3, 2, 1),
    "max_3_d2_ceil": lambda: nn.MaxPool2d(3, (2, 1), 1, 2, ceil_mode=True),
    "max_3_s2_ceil": lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
}
pools = pytest.mark.parametrize("pool", [make() for make in POOLS.values()], ids=POOLS)


@trainings
@pytest.mark.parametrize("image", [(2, 4, 7, 9), (1, 1, 8, 5), (4, 6, 6)], ids=str)
@pools
def test_pool_at_blend_0_is_the_plain_one_to_the_bit(pool, image, training):
    layer = PacPool2d.from_pool(pool).train(training)
    input = torch.randn(image)
    output = layer(input, torch.randn(image))
    assert_equal(output, pool(input))
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(PacPool2d.from_pool(pool, blend=0.1)(input, torch.randn(image)), pool(input))
    if training:
        output.square().sum().backward()
        assert layer.blend.grad.abs() > 1e-4


@pools
def test_a_pool_comes_back_as_it_went(pool):
    layer = PacPool2d.from_pool(pool.eval())
    assert layer.to_pool() is pool
    assert not layer.training
    assert list(layer.state_dict()) == ["blend", "adapting_kernel.log_bandwidth"]


@pytest.mark.parametrize("side", range(2, 7))
@pytest.mark.parametrize("name", ["average_2_s2_ceil_inside", "max_3_s2_ceil", "average_5_s4_ceil"])
def test_a_pool_takes_every_size_that_the_plain_one_takes(name, side):
    pool, image = POOLS[name](), torch.randn(1, 2, side, side)
    layer = PacPool2d.from_pool(pool, form="constant", normalize="sum")
    assert_equal(layer(image, image), pool(image))
    layer.blend.data.fill_(1.0)
    assert layer(image, image).shape == pool(image).shape


def test_pool_between_is_between():
    input, guidance = torch.randn(2, 3, 7, 7).double(), torch.randn(2, 2, 7, 7).double()
    outputs = {}
    for blend in (0.0, 0.25, 1.0):
        layer = PacPool2d(3, 2, 1, plain="max", blend=blend, normalize="sum", dtype=torch.float64)
        outputs[blend] = layer(input, guidance).detach()
    assert_close64(outputs[0.25], 0.75 * outputs[0.0] + 0.25 * outputs[1.0])
    kernel = ops.adapting_kernel(guidance, 3, stride=2, padding=1, normalize="sum")
    assert_close64(outputs[1.0], ops.pac_pool2d(input, kernel, 3, stride=2, padding=1))


# Filters.


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("weights", ["filter", "full"])
def test_filter_at_blend_1_is_a_joint_bilateral_filter(weights, steps):
    layer = PacFilter2d(3, 5, weights=weights, steps=steps, dtype=torch.float64)
    input, guidance = torch.randn(2, 3, 7, 8).double(), torch.randn(2, 2, 7, 8).double()
    expected = input
    for _ in range(steps):
        kernel = ops.adapting_kernel(guidance, 5, padding=2, normalize="sum")
        expected = ops.pac_pool2d(expected, kernel, 5, stride=1, padding=2)
    assert_close64(layer(input, guidance).detach(), expected)
    layer.weight.data[-3 if weights == "full" else -1, 0, 1, 1] += 0.1
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(layer(input, guidance).detach(), expected)


def test_full_weights_move_mass_between_channels():
    layer = PacFilter2d(3, 3, weights="full", dtype=torch.float64)
    input = torch.zeros(1, 3, 5, 5).double()
    input[:, 0] = 1
    assert layer(input, torch.ones(1, 1, 5, 5).double())[:, 1].abs().max() == 0
    layer.weight.data[1, 0] = 0.5
    moved = layer(input, torch.ones(1, 1, 5, 5).double())[:, 1, 1:-1, 1:-1]
    assert_close64(moved.detach(), torch.full_like(moved, 0.5).detach())


@trainings
def test_filter_at_blend_0_gives_the_input_itself(training):
    layer = PacFilter2d(3, blend=0.0).train(training)
    input = torch.randn(1, 3, 6, 6)
    assert_equal(layer(input, torch.randn(1, 2, 6, 6)), input)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_blurred_filter_adds_the_change_of_the_smaller_image(steps):
    """At even sizes, by torch's own pooling and interpolation."""
    layer = PacFilter2d(3, 3, weights="full", steps=steps, blur=2, blend=0.7, dtype=torch.float64)
    small = PacFilter2d(3, 3, weights="full", steps=steps, blend=0.7, dtype=torch.float64)
    input, guidance = torch.randn(2, 3, 8, 10).double(), torch.randn(2, 2, 8, 10).double()
    less, seen = F.avg_pool2d(input, 2), F.avg_pool2d(guidance, 2)
    change = small(less, seen) - less
    expected = input + F.interpolate(change, scale_factor=2, mode="bilinear")
    assert_close64(layer(input, guidance).detach(), expected.detach())
    small.blend.data.fill_(0.6)
    change = small(less, seen) - less
    other = input + F.interpolate(change, scale_factor=2, mode="bilinear")
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(layer(input, guidance).detach(), other.detach())


@pytest.mark.parametrize("steps", [1, 2])
def test_the_gradient_of_a_blurred_filter_at_blend_0_is_that_next_to_it(steps):
    input, guidance = torch.rand(1, 2, 9, 8).double(), torch.rand(1, 3, 9, 8).double()
    gradients = []
    for blend in (0.0, 1e-9):
        layer = PacFilter2d(2, 3, blend=blend, blur=2, steps=steps, dtype=torch.float64)
        layer(input, guidance).square().sum().backward()
        gradients.append(layer.blend.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)
    assert gradients[0].abs() > 1e-3


POOLED = nn.MaxPool2d(2, return_indices=True)
MESSAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "pool_plain": (lambda: PacPool2d(2, plain="maximum"), "plain='maximum' is unknown. Nearest: 'max'."),
    "pool_dilation": (lambda: PacPool2d(2, dilation=2), "average pooling has no dilation, got dilation=2."),
    "pool_indices": (lambda: PacPool2d.from_pool(POOLED), "a pooling with return_indices=True has no pixel-adaptive twin."),
    "filter_weights": (lambda: PacFilter2d(3, weights="ful"), "weights='ful' is unknown. Nearest: 'full'."),
    "filter_steps": (lambda: PacFilter2d(3, steps=0), "steps must be an int of at least 1, got 0."),
    "filter_blur": (lambda: PacFilter2d(3, blur=0), "blur must be an int of at least 1, got 0."),
    "filter_even": (lambda: PacFilter2d(3, (3, 4)), "kernel_size must be odd, got (3, 4): no tap is the centre."),
    "smoothing": (lambda: AdaptingKernel(3, smoothing="boxes"), "smoothing='boxes' is unknown. Nearest: 'box'."),
    "smoothing_size": (lambda: AdaptingKernel(3, smoothing="learned", smoothing_size=2), "a smoothing filter needs an odd size, got 2."),
    "asymmetric": (lambda: PacPool2d(2, asymmetric=True), "asymmetric belongs to form='inverse', got form='gaussian'."),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages(call, message):
    with pytest.raises(ShapeError) as raised:
        call()
    assert str(raised.value) == message
