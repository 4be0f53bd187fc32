"""The exponential forms of the adapting kernel, and the loops that compute them in one pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import (
    DIFFERS,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    fresh_memory_is_nan,
)
from torch import Tensor

from pacswap import ops
from pacswap.ops import forms, make_window
from pacswap.ops.loops import distance

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

FORMS = ("gaussian", "laplacian")
WINDOWS = {
    "3x3": make_window(3, padding=1),
    "in_steps": make_window(3, stride=2, padding=1),
    "even": make_window(2, padding=1),
    "reflect": make_window(5, padding=2, padding_mode="reflect"),
    "same_below": make_window((3, 5), dilation=2, padding="same"),
}
every_form = pytest.mark.parametrize("form", FORMS)
every_window = pytest.mark.parametrize("name", WINDOWS)


def made(
    guidance: Tensor, width: Any, name: str, form: str, backend: str, **options: Any
) -> Tensor:
    given: Any = {"form": form, "bandwidth": width, "backend": backend, **options}
    return ops.adapting_kernel(guidance, WINDOWS[name], **given)


def with_gradients(backend: str, name: str, form: str, dtype: torch.dtype) -> list[Tensor]:
    """K, and the gradients of guidance, bandwidth and smoothing."""
    torch.manual_seed(3)
    guidance = (torch.randn(2, 5, 9, 21).to(dtype)).requires_grad_()
    width = torch.tensor(1.7).to(dtype).requires_grad_()
    smoothing = torch.rand(3, 3).to(dtype).requires_grad_()
    kernel = made(guidance, width, name, form, backend, smoothing=smoothing)
    cotangent = torch.randn(kernel.shape).to(dtype)
    leaves = [guidance, width, smoothing]
    return [kernel.detach(), *torch.autograd.grad(kernel, leaves, cotangent)]


@every_form
@every_window
def test_one_pass_gives_what_the_reference_gives(name, form):
    found = with_gradients("loops", name, form, torch.float64)
    truths = with_gradients("reference", name, form, torch.float64)
    for value, truth in zip(found, truths, strict=True):
        assert_close64(value, truth)


@every_form
@every_window
def test_one_pass_is_as_good_as_torch_in_single_precision(name, form):
    torch.manual_seed(3)
    guidance = torch.randn(2, 37, 9, 21)
    for width in (3.0, 30.0, 0.7):
        truth = made(guidance.double(), width, name, form, "reference")
        found = made(guidance, width, name, form, "loops")
        assert_as_good_as(found, truth, made(guidance, width, name, form, "taps"), 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_exponential_is_right_to_the_last_digits(dtype):
    """Where d is exact: one channel, whose differences are roots of what is asked for."""
    least = -math.log(torch.finfo(dtype).tiny)
    asked = torch.cat([torch.linspace(0, 0.99 * least, 4001), torch.rand(2000) * 2])
    guidance = torch.stack([torch.zeros(6001), asked.sqrt()], dim=1).to(dtype)[None, None]
    window = make_window((1, 2))
    d = ops.tap_distance(guidance, window, backend="loops")

    def wrong(divisor: float) -> float:
        kernel = distance.distances(guidance, None, window, square=True, divisor=divisor)
        truth = (-d.double()).exp()
        return ((kernel.double() - truth).abs() / truth).max().item() / torch.finfo(dtype).eps

    assert wrong(-1.0) <= 1.5
    assert wrong(-1.0 - 2 * torch.finfo(dtype).eps) > 1.5  # the twin


@every_form
def test_what_learns_changes_no_number(form):
    guidance = torch.randn(1, 7, 12, 19)
    width = torch.tensor(1.3)
    plain = made(guidance, width, "3x3", form, "loops")
    for leaf in (guidance, width):
        leaf.requires_grad_()
        assert_equal(made(guidance, width, "3x3", form, "loops").detach(), plain)
        leaf.requires_grad_(False)
    assert_equal(made(guidance, width.item(), "3x3", form, "loops"), plain)


@every_form
@pytest.mark.parametrize("learned", ["guidance", "width", "both"])
def test_first_and_second_derivatives(form, learned):
    torch.manual_seed(1)
    guidance = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=learned != "width")
    width = torch.tensor([1.6], dtype=torch.float64, requires_grad=learned != "guidance")

    def kernel(f: Tensor, s: Tensor) -> Tensor:
        return made(f, s, "3x3", form, "loops")

    assert torch.autograd.gradcheck(kernel, (guidance, width), fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, (guidance, width), fast_mode=True)


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The twin of the tests of derivatives."""
    from pacswap.ops import handwritten

    right = handwritten.pulls
    monkeypatch.setattr(handwritten, "pulls", lambda *given: 1.01 * right(*given))
    found = with_gradients("loops", "3x3", "gaussian", torch.float64)
    truths = with_gradients("reference", "3x3", "gaussian", torch.float64)
    assert_close64(found[0], truths[0])
    for value, truth in zip(found[1:], truths[1:], strict=True):
        with pytest.raises(AssertionError, match=DIFFERS):
            assert_close64(value, truth)


def test_many_gradients_at_once():
    guidance = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    kernel = made(guidance, 1.5, "3x3", "gaussian", "loops")
    cotangents = torch.randn(3, *kernel.shape, dtype=torch.float64)
    options: Any = {"retain_graph": True}
    (many,) = torch.autograd.grad(kernel, guidance, cotangents, is_grads_batched=True, **options)
    each = [torch.autograd.grad(kernel, guidance, one, **options)[0] for one in cotangents]
    assert_close64(many, torch.stack(each))


def test_nothing_but_the_kernel_and_the_guidance_is_kept():
    guidance = torch.randn(1, 3, 8, 9, requires_grad=True)
    width = torch.tensor(1.0, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel = made(guidance, width, "3x3", "gaussian", "loops")
    large = {t.data_ptr() for t in kept if t.numel() > 1}
    assert large == {guidance.data_ptr(), kernel.data_ptr()}


def test_nan_and_infinity_are_not_hidden():
    guidance = torch.zeros(1, 2, 5, 40)
    guidance[0, 0, 2, 3], guidance[0, 0, 2, 20] = torch.nan, torch.inf
    found = made(guidance, 1.0, "3x3", "gaussian", "loops")
    plain = made(guidance, 1.0, "3x3", "gaussian", "taps")
    others = [t for t in range(9) if t != 4]  # the centre's distance from itself is 0 here
    assert_equal(found.isnan()[:, :, others], plain.isnan()[:, :, others])
    assert found.isnan().any() and found[:, :, others].isnan().sum() == 16


@pytest.mark.parametrize("distance", ["sum", "mean"])
@pytest.mark.parametrize("backend", ["loops", "taps", "eager"])
def test_a_guidance_of_no_channels_is_alike_everywhere(backend, distance):
    width = torch.tensor(2.0, requires_grad=True)
    given: Any = {"distance": distance}
    kernel = made(torch.zeros(2, 0, 4, 5), width, "3x3", "gaussian", backend, **given)
    assert_equal(kernel.detach(), torch.ones(2, 1, 9, 4, 5))
    assert_equal(torch.autograd.grad(kernel.sum(), width)[0], torch.tensor(0.0))


@pytest.mark.parametrize("width", [-1.5, -0.0, 0.0])
def test_a_width_that_is_not_positive_is_as_wrong_as_elsewhere(width):
    """The library cannot look at a tensor's value on every device."""
    guidance = torch.randn(1, 2, 6, 7)
    found, plain = (
        made(guidance, torch.tensor(width), "3x3", "laplacian", backend)
        for backend in ("loops", "taps")
    )
    torch.testing.assert_close(found, plain, equal_nan=True)


def test_features_of_inference_mode_and_a_width_that_learns():
    with torch.inference_mode():
        guidance = torch.randn(1, 3, 6, 7)
    found = []
    for backend in ("loops", "taps"):
        width = torch.tensor(1.5, requires_grad=True)
        kernel = made(guidance, width, "3x3", "gaussian", backend)
        found.append(torch.autograd.grad(kernel.sum(), width)[0])
    torch.testing.assert_close(*found)


def test_a_gradient_without_memory():
    guidance = torch.randn(1, 3, 6, 7, requires_grad=True)
    kernel = made(guidance, 1.5, "3x3", "gaussian", "loops")
    none = torch._efficientzerotensor(kernel.shape)
    assert_equal(torch.autograd.grad(kernel, guidance, none)[0], torch.zeros(1, 3, 6, 7))


def test_a_width_of_another_kind_of_tensor_stays_one():
    class Kind(Tensor):
        pass

    width = torch.tensor(1.5).as_subclass(Kind)
    kernel = made(torch.randn(1, 3, 6, 7), width, "3x3", "gaussian", "loops")
    assert type(kernel) is Kind


def test_half_precision_is_rounded_once():
    guidance = torch.randn(1, 8, 9, 10).bfloat16()
    found = made(guidance, 2.0, "3x3", "gaussian", "loops")
    truth = made(guidance.double(), 2.0, "3x3", "gaussian", "reference")
    assert found.dtype == torch.bfloat16
    assert_equal(found, truth.bfloat16())


def test_where_the_kernel_is_at_its_least_the_gradient_is_0():
    kernel = torch.tensor([0.5, 1e-3, forms.LEAST * torch.finfo(torch.float32).tiny])
    pulled = forms.pulls(torch.full((3,), 0.25), kernel, -2.0)
    assert_equal(pulled, torch.tensor([-0.0625, -1.25e-4, 0.0]))
