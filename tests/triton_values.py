"""Triton under its interpreter against the reference; `test_ops_triton.py` runs this file.

The rule is that of `test_ops`: at most twice the error of the reference in the same dtype, three
times for gradients, with the truth in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CASES,
    DIFFERS,
    HALVES,
    Case,
    assert_as_good_as,
    assert_equal,
    fresh_memory_is_nan,
    pac,
    plain,
    wide,
)
from torch import Tensor

from pacswap import ops
from pacswap.ops import reference, taps
from pacswap.ops.gpu import backend as triton_backend
from pacswap.ops.gpu import launch
from pacswap.ops.window import make_window

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

SCALARS = ("grad_blend", "grad_bandwidth")
# The interpreter takes a millisecond for each operation of each tap: few taps, any image. A program
# has 128 pixels and 16 channels at once here; the last four need several.
GEOMETRIES = {
    "3x3_p1": CASES["3x3_p1"],
    "1x1_s3_p1": CASES["1x1_s3_p1"],
    "2x3_s2x1_d1x2_p1x2": Case((2, 3), stride=(2, 1), dilation=(1, 2), padding=(1, 2)),
    "3x2_s2_d2_p2": Case((3, 2), stride=2, dilation=2, padding=2),
    "2x2_s3": CASES["2x2_s3"],
    "1x3_p1_one_pixel": Case((1, 3), padding=(0, 1), image=(1, 1, 1)),
    "3x1_reflect": Case((3, 1), padding=(1, 2), padding_mode="reflect"),
    "2x2_same_circular": Case(2, padding="same", padding_mode="circular"),
    "groups": Case(2, padding=1, groups=2),
    "groups_to_1_each": Case((1, 2), groups=2, channels=(6, 2)),
    "depthwise_s2": Case((2, 3), stride=2, padding=1, groups=4, channels=(4, 4)),
    "one_channel": Case((1, 2), channels=(1, 1)),
    "more_taps_than_31": Case((1, 33), padding=(0, 16), channels=(2, 3), image=(1, 1, 6)),
    "more_taps_than_63": Case((9, 8), padding=4, channels=(2, 3), image=(1, 4, 5)),
    "blocks_of_pixels": Case((1, 2), stride=(1, 2), channels=(5, 7), image=(3, 7, 27)),
    "blocks_of_channels": Case((1, 2), channels=(20, 36), image=(1, 4, 5)),
    "blocks_in_groups": Case((1, 2), groups=2, channels=(36, 4), image=(1, 4, 5)),
    "depthwise_blocks": Case((1, 2), padding=1, groups=18, channels=(18, 36), image=(1, 4, 5)),
}
LAST_FOUR = list(GEOMETRIES)[-4:]
geometries = pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)


def assert_rule(
    values: Mapping[str, Tensor], truths: Mapping[str, Tensor], baselines: Mapping[str, Tensor]
) -> None:
    if list(values) != list(truths) or not values:
        raise AssertionError(f"expected the quantities {list(truths)}, got {list(values)}")
    for name, value in values.items():
        factor = 3.0 if name.startswith("grad_") else 2.0
        assert_as_good_as(value, truths[name], baselines[name], factor, name=name)


def convolved(
    case: Case, backend: str, kernel: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A convolution with that adapting kernel and its gradients."""
    drawn = {"input": given["input"], "kernel": kernel, "weight": given["weight"]}
    leaves = {name: t.detach().requires_grad_() for name, t in drawn.items()}
    output = ops.pac_conv2d(*leaves.values(), **case.options, backend=backend)
    grads = torch.autograd.grad(output, list(leaves.values()), given["cotangent"])
    named = {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"output": output.detach(), **named}


def kernel_of(case: Case, channels: int, dtype: torch.dtype) -> Tensor:
    B, _, *size = case.output_shape
    return torch.rand(B, channels, case.window.taps, *size, dtype=torch.float64).to(dtype)


def assert_convolved(case: Case, channels: int, dtype: torch.dtype) -> None:
    """By the rule, with an adapting kernel of so many channels."""
    given, kernel = case.tensors(dtype), kernel_of(case, channels, dtype)
    assert_rule(
        convolved(case, "triton", kernel, given),
        convolved(case, "reference", kernel.double(), wide(given)),
        convolved(case, "reference", kernel, given),
    )


@geometries
def test_float32_is_as_good_as_the_reference(case):
    assert_convolved(case, 1, torch.float32)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["3x2_s2_d2_p2", "groups", "depthwise_s2", "blocks_of_channels"])
def test_halves_are_as_good_as_the_reference(name, dtype):
    assert_convolved(GEOMETRIES[name], 1, dtype)


@pytest.mark.parametrize("name", ["2x3_s2x1_d1x2_p1x2", *LAST_FOUR])
def test_a_kernel_for_each_channel(name):
    case = GEOMETRIES[name]
    assert_convolved(case, case.channels[0], torch.float32)


@pytest.mark.parametrize("asked", ["input", "kernel", "weight"])
def test_a_gradient_alone_is_that_beside_the_others(asked):
    case = GEOMETRIES["groups_to_1_each"]
    given = case.tensors(torch.float32) | {"kernel": kernel_of(case, 1, torch.float32)}
    expected = convolved(case, "triton", given["kernel"], given)
    given[asked].requires_grad_()
    tensors = (given[name] for name in ("input", "kernel", "weight"))
    output = ops.pac_conv2d(*tensors, **case.options, backend="triton")
    (grad,) = torch.autograd.grad(output, given[asked], given["cotangent"])
    assert_equal(grad, expected[f"grad_{asked}"])


@pytest.mark.parametrize("name", ["input", "kernel", "weight", "cotangent"])
def test_the_rule_sees_a_changed(name):
    case = GEOMETRIES["groups_to_1_each"]
    given, kernel = case.tensors(torch.float32), kernel_of(case, 1, torch.float32)
    truth = convolved(case, "reference", kernel.double(), wide(given))
    baseline = convolved(case, "reference", kernel, given)
    changed = {**given, "kernel": kernel}
    changed[name] = changed[name] * (1 + 1e-4)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_rule(convolved(case, "triton", changed["kernel"], changed), truth, baseline)


def chain(case: Case, given: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Guidance to output and back, without the scalars, whose error in one draw is luck."""
    return {k: v for k, v in pac(case, given, name).items() if k not in SCALARS}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_guidance_to_output(dtype):
    case = Case((1, 3), stride=(1, 2), padding=1, image=(2, 5, 6))
    given = case.tensors(dtype)
    truth, baseline = chain(case, wide(given), "reference"), chain(case, given, "reference")
    assert_rule(chain(case, given, "triton"), truth, baseline)


@pytest.mark.parametrize(
    ("groups", "image", "parts"),
    [(1, (2, 11, 14), 3), (3, (2, 11, 14), 3), (1, (5, 10, 11), 4), (1, (65, 1, 3), 2)],
    ids=["dense", "depthwise", "a part is empty", "images smaller than a block"],
)
def test_pixels_in_parts(groups, image, parts, monkeypatch):
    """The weight's gradient is summed from parts of the pixels where tiles are few."""
    monkeypatch.setattr(launch, "_PROGRAMS_EACH", 99)
    seen = []
    right = launch._parts
    monkeypatch.setattr(launch, "_parts", lambda *a: seen.append(right(*a)) or seen[-1])
    case = Case((1, 2), channels=(3, 6), groups=groups, image=image)
    assert_convolved(case, 1, torch.float32)
    assert seen == [parts]


@pytest.mark.parametrize(
    ("function", "quantity"), [("pull", "grad_input"), ("weight_gradient", "grad_weight")]
)
def test_the_rule_sees_a_wrong_gradient(function, quantity, monkeypatch):
    right = getattr(launch, function)

    def wrong(*args: Any) -> Any:
        made = right(*args)
        return (made[0] * 1.001, made[1]) if isinstance(made, tuple) else made * 1.001

    monkeypatch.setattr(launch, function, wrong)
    case = GEOMETRIES["groups_to_1_each"]
    given, kernel = case.tensors(torch.float32), kernel_of(case, 1, torch.float32)
    truth = convolved(case, "reference", kernel.double(), wide(given))
    baseline = convolved(case, "reference", kernel, given)
    with pytest.raises(AssertionError, match=f"^{quantity}: {DIFFERS}"):
        assert_rule(convolved(case, "triton", kernel, given), truth, baseline)


DISTANCES = {
    "strided": Case((2, 3), stride=2, padding=1, dilation=(2, 1), image=(2, 6, 5)),
    "even_reflect": Case(2, padding=1, padding_mode="reflect", image=(1, 5, 4)),
    "centre_in_padding": Case((1, 3), padding=2, image=(1, 4, 4)),
}
# Window, measure, channels apart, a separate centre: every pair of two of them.
PAIRS = [
    ("strided", "square", False, False),
    ("strided", "absolute", True, True),
    ("strided", "asymmetric", False, True),
    ("even_reflect", "square", True, True),
    ("even_reflect", "absolute", False, False),
    ("even_reflect", "asymmetric", True, False),
    ("centre_in_padding", "square", False, True),
    ("centre_in_padding", "absolute", True, False),
    ("centre_in_padding", "asymmetric", False, False),
]


def distances(
    module: Any, case: Case, measure: str, each: bool, separate: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    B, H, W = case.image
    size = case.window.output_size(H, W)
    leaves = {"guidance": draw(B, 18, H, W)}
    if separate:
        leaves["centre"] = draw(B, 18, *size)
    cotangent = draw(B, 18 if each else 1, case.window.taps, *size)
    for leaf in leaves.values():
        leaf.requires_grad_()
    made = module.tap_distance(leaves["guidance"], leaves.get("centre"), case.window, measure, each)
    grads = torch.autograd.grad(made, list(leaves.values()), cotangent)
    named = {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"distance": made.detach(), **named}


@pytest.mark.parametrize(("name", "measure", "each", "separate"), PAIRS)
def test_distances(name, measure, each, separate):
    options = DISTANCES[name], measure, each, separate
    assert_rule(
        distances(triton_backend, *options, torch.float32),
        distances(reference, *options, torch.float64),
        distances(reference, *options, torch.float32),
    )


def test_distances_see_another_measure():
    case = DISTANCES["strided"]
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_rule(
            distances(triton_backend, case, "asymmetric", False, False, torch.float32),
            distances(reference, case, "square", False, False, torch.float64),
            distances(reference, case, "square", False, False, torch.float32),
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_distance_of_halves_is_summed_in_float32(dtype):
    guidance = torch.randn(1, 18, 4, 4).to(dtype)
    window = make_window((2, 3), padding=1)
    made = triton_backend.tap_distance(guidance, None, window, "square", False)
    exact = reference.tap_distance(guidance.double(), None, window, "square", False)
    assert_equal(made, exact.to(dtype))
    summed = taps.tap_distance(guidance, None, window, "square", False)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(summed, exact.to(dtype))


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
def test_infinite_features_are_at_no_distance_from_themselves():
    window = make_window((2, 3), padding=1)
    guidance = torch.full((1, 2, 3, 3), float("inf"))
    made = triton_backend.tap_distance(guidance, None, window, "square", False)
    assert made[:, :, window.centre].eq(0).all()
    assert made.isnan().any()  # at the other taps: ∞ − ∞


@pytest.mark.parametrize("measure", ["square", "absolute", "asymmetric"])
def test_what_is_not_a_number_stays_so(measure):
    window, guidance = make_window((1, 3), padding=(0, 1)), torch.zeros(1, 1, 1, 4)
    guidance[..., 1] = float("nan")
    guidance.requires_grad_()
    made = triton_backend.tap_distance(guidance, None, window, measure, False)
    expected = reference.tap_distance(guidance, None, window, measure, False)
    expected[:, :, 1] = 0  # the centre's
    assert_equal(made.isnan(), expected.isnan())
    assert made.isnan().sum() == 4
    (grad,) = torch.autograd.grad(made.sum(), guidance)
    assert grad.isnan().flatten().tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["blocks_of_pixels", "depthwise_blocks"])
def test_channels_last_and_strided_inputs(name):
    case = GEOMETRIES[name]
    given, kernel = case.tensors(torch.float32), kernel_of(case, 1, torch.float32)
    expected = convolved(case, "triton", kernel, given)
    turned = given["input"].transpose(2, 3).contiguous().transpose(2, 3)
    last = given["input"].to(memory_format=torch.channels_last)
    grads_last = given["cotangent"].to(memory_format=torch.channels_last)
    for input, cotangent in ((turned, given["cotangent"]), (last, grads_last)):
        made = convolved(case, "triton", kernel, {**given, "input": input, "cotangent": cotangent})
        for quantity, value in made.items():
            assert_equal(value, expected[quantity], name=quantity)
        torch_made = plain(case, input, given["weight"], None)
        assert made["output"].stride() == torch_made.stride()
        assert made["grad_input"].stride() == (last if input is last else given["input"]).stride()


def test_the_kernel_of_ones_is_the_convolution_and_attaches():
    case = GEOMETRIES["3x2_s2_d2_p2"]
    given = case.tensors(torch.float32)
    kernel = torch.ones_like(kernel_of(case, 1, torch.float32)).requires_grad_()
    output = F.conv2d(given["input"], given["weight"], stride=2, padding=2, dilation=2)
    attached = triton_backend.attach_kernel_gradient(
        output.clone(), given["input"], kernel, given["weight"], case.window, 1
    )
    assert_equal(attached.detach(), output)
    (grad,) = torch.autograd.grad(attached, kernel, given["cotangent"])
    assert_equal(grad, convolved(case, "triton", kernel, given)["grad_kernel"])


SHAPES = {
    "sequence": (ops.pac_conv1d, (1, 2, 6), (1, 1, 2, 4), (3, 2, 2)),
    "volume": (ops.pac_conv3d, (1, 2, 3, 3, 4), (1, 1, 8, 2, 2, 3), (3, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_sequences_and_volumes(name):
    function, *shapes = SHAPES[name]
    dilation = 2 if name == "sequence" else 1
    drawn = [torch.rand(shape) for shape in shapes]

    def results(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in drawn]
        output = function(*leaves, dilation=dilation, backend=backend)
        grads = torch.autograd.grad(output.sum(), leaves)
        return {"output": output.detach(), **{f"grad_{i}": g for i, g in enumerate(grads)}}

    truth, baseline = results("reference", torch.float64), results("reference", torch.float32)
    assert_rule(results("triton", torch.float32), truth, baseline)


@pytest.mark.parametrize("image", [(0, 4, 5), (1, 4, 5)], ids=["no image", "one"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_batch_may_be_empty(image, groups):
    case = Case(2, padding=1, groups=groups, channels=(4, 4), image=image)
    made = pac(case, case.tensors(torch.float32), "triton")
    expected = pac(case, case.tensors(torch.float32), "reference")
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in expected.items()}
    assert all(t.isfinite().all() for t in made.values())


def test_a_border_may_be_cut():
    """A transposed convolution that cuts more than its reach has a negative border."""
    input, kernel = torch.randn(1, 2, 6, 7), torch.rand(1, 1, 4, 3, 4)
    weight, results = torch.randn(2, 3, 2, 2), {}
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (input, kernel, weight)]
        output = ops.pac_conv_transpose2d(*leaves, padding=2, backend=name)
        results[name] = output, *torch.autograd.grad(output.square().sum(), leaves)
    for made, expected in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(made, expected)
