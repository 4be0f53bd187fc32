"""Every backend against the reference: values and derivatives in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import (
    CASES,
    DIFFERS,
    HALVES,
    ONE_DIRECTION,
    Case,
    all_backends,
    all_cases,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    few_cases,
    fresh_memory_is_nan,
    pac,
    plain,
    wide,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from pacswap import ops
from pacswap.ops import eager, handwritten

DESIGN = {"standardize": True, "distance": "mean", "normalize": "mean"}
SCALARS = ("grad_blend", "grad_bandwidth")


fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)


@all_backends
@all_cases
def test_backend_is_the_reference_in_float64(case, backend):
    given = case.tensors()
    assert_all_close64(pac(case, given, backend), pac(case, given, "reference"))


@all_backends
@few_cases
def test_backend_is_the_reference_with_the_designs_kernel(case, backend):
    given = case.tensors()
    truth = pac(case, given, "reference", **DESIGN)
    assert_all_close64(pac(case, given, backend, **DESIGN), truth)


CHANGED_BY = {
    "input": ("output", "grad_guidance", "grad_weight", "grad_blend", "grad_bandwidth"),
    "guidance": ("output", "kernel", "grad_input", "grad_guidance", "grad_weight"),
    "weight": ("output", "grad_input", "grad_guidance", "grad_blend"),
    "bias": ("output",),
    "blend": ("output", "kernel", "grad_bandwidth"),
    "bandwidth": ("output", "kernel", "grad_blend"),
    "cotangent": ("grad_input", "grad_bias", "grad_weight", "grad_guidance"),
}
CHANGES = [(given, seen) for given, results in CHANGED_BY.items() for seen in results]


@all_backends
@pytest.mark.parametrize(("name", "result"), CHANGES, ids=map("->".join, CHANGES))
def test_comparison_sees_a_changed(name, result, backend):
    case = CASES["3x3_p1"]
    given = case.tensors()
    changed = {**given, name: given[name] * (1 + 1e-9)}
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(pac(case, changed, backend)[result], pac(case, given, "reference")[result])


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@all_cases
def test_backend_is_as_good_as_the_reference_in(case, dtype, backend):
    given = case.tensors(dtype)
    truth = pac(case, wide(given), "reference")
    baseline = pac(case, given, "reference")
    for name, value in pac(case, given, backend).items():
        if name not in SCALARS:
            factor = 3.0 if name.startswith("grad_") else 2.0
            assert_as_good_as(value, truth[name], baseline[name], factor, name=name)


def scalar_gradients(case: Case, draws: list[dict[str, Tensor]], backend: str) -> dict[str, Tensor]:
    results = [pac(case, given, backend) for given in draws]
    return {name: torch.stack([result[name] for result in results]) for name in SCALARS}


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["3x3_p1", "4x4_s2_p1", "circular"])
def test_scalar_gradients_are_as_good_as_the_reference_in(name, dtype, backend):
    """Over many draws: in a single one the rounding errors of the baseline may cancel."""
    case = CASES[name]
    draws = [case.tensors(dtype, seed=seed) for seed in range(16)]
    truth = scalar_gradients(case, [wide(given) for given in draws], "reference")
    baseline = scalar_gradients(case, draws, "reference")
    for scalar, value in scalar_gradients(case, draws, backend).items():
        assert_as_good_as(value, truth[scalar], baseline[scalar], 3.0, name=scalar)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_kernel_rounded_once_more_is_not_as_good(dtype):
    case = CASES["3x3_p1"]
    given = case.tensors(torch.float32)
    coarse = pac(case, {n: t.to(dtype).float() for n, t in given.items()}, "eager")
    truth, baseline = pac(case, wide(given), "reference"), pac(case, given, "reference")
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_as_good_as(coarse["output"], truth["output"], baseline["output"], 2.0)


TINY = {
    "plain": Case(2, padding=1, channels=(2, 2), image=(1, 3, 3)),
    "groups_strided": Case((1, 3), stride=2, groups=2, channels=(4, 4), image=(1, 3, 5)),
    "depthwise": Case(padding=1, groups=2, channels=(2, 4), image=(1, 3, 3)),
    "groups_to_1_each": Case(2, groups=2, channels=(4, 2), image=(1, 3, 3)),
    "reflect": Case(padding=1, padding_mode="reflect", channels=(1, 2), image=(2, 3, 2)),
}
tiny_cases = pytest.mark.parametrize("case", TINY.values(), ids=TINY)


def chain(case: Case, backend: str) -> tuple[Any, list[Tensor]]:
    """Guidance to output as a function of tensors alone, and what to call it with."""
    names = ("input", "guidance", "weight", "bias", "blend", "bandwidth")
    given = case.tensors()

    def function(input, guidance, weight, bias, blend, bandwidth):
        kernel = ops.adapting_kernel(
            guidance,
            case.kernel_size,
            **case.geometry,
            blend=blend,
            bandwidth=bandwidth,
            normalize="sum",
            backend=backend,
        )
        return ops.pac_conv2d(input, kernel, weight, bias, **case.options, backend=backend)

    return function, [given[name].requires_grad_() for name in names]


@all_backends
@tiny_cases
def test_gradcheck(case, backend):
    gradcheck(*chain(case, backend), **ONE_DIRECTION)


@all_backends
@tiny_cases
def test_gradgradcheck(case, backend):
    gradgradcheck(*chain(case, backend), **ONE_DIRECTION)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["input", "kernel", "weight"])
def test_gradcheck_sees_a_wrong_gradient(which, monkeypatch):
    right = eager.gradients

    def wrong(*args):
        grads = right(*args)
        return [1.01 * grad if i == which else grad for i, grad in enumerate(grads)]

    monkeypatch.setattr(eager, "gradients", wrong)
    with pytest.raises(GradcheckError):
        gradcheck(*chain(TINY["plain"], "eager"), **ONE_DIRECTION)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])
def test_gradgradcheck_sees_a_wrong_second_derivative(check, monkeypatch):
    right = handwritten.differentiable_vjp

    def wrong(*args):
        # The value stays, its derivative is 1.01 times as large.
        return [None if g is None else g + 0.01 * (g - g.detach()) for g in right(*args)]

    monkeypatch.setattr(handwritten, "differentiable_vjp", wrong)
    function, inputs = chain(TINY["plain"], "eager")
    if check is gradcheck:  # which never asks for a second derivative
        check(function, inputs, **ONE_DIRECTION)
    else:
        with pytest.raises(GradcheckError):
            check(function, inputs, **ONE_DIRECTION)


def derivatives(case: Case, given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The gradient of an input that guides itself, plain and differentiable, and the second."""
    image = given["input"].detach().requires_grad_()
    kernel = ops.adapting_kernel(image, case.kernel_size, **case.geometry, backend=backend)
    output = ops.pac_conv2d(image, kernel, given["weight"], **case.options, backend=backend)
    once = torch.autograd.grad(output, image, given["cotangent"], retain_graph=True)[0]
    again = torch.autograd.grad(output, image, given["cotangent"], create_graph=True)[0]
    second = torch.autograd.grad(again.square().sum(), image)[0]
    return {"gradient": once, "differentiable": again.detach(), "second": second}


@all_backends
@few_cases
def test_an_input_may_guide_itself(case, backend):
    """A differentiable gradient must not follow the path input → kernel twice."""
    given = case.tensors()
    results = derivatives(case, given, backend)
    assert_all_close64(results, derivatives(case, given, "reference"))
    assert_close64(results["differentiable"], results["gradient"])


def unit_kernel(case: Case, value: float = 1.0) -> Tensor:
    B, _, H_out, W_out = case.output_shape
    return torch.full((B, 1, case.window.taps, H_out, W_out), value, dtype=torch.float64)


def two_derivatives(case: Case, kernel: Tensor, *, attached: bool) -> dict[str, Tensor]:
    """First and second derivatives of a convolution by all that goes in, at this kernel."""
    given = case.tensors()
    drawn = {name: given[name] for name in ("input", "weight", "bias")} | {"kernel": kernel}
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in drawn.items()}
    x, w, b, k = leaves.values()
    if attached:
        output = ops.attach_kernel_gradient(
            plain(case, x, w, b), x, k, w, window=case.window, groups=case.groups
        )
    else:
        output = ops.pac_conv2d(x, k, w, b, **case.options, backend="reference")
    seen = list(leaves.values())
    once = torch.autograd.grad(output, seen, given["cotangent"], retain_graph=True)
    first = torch.autograd.grad(output, seen, given["cotangent"], create_graph=True)
    mixed = sum((grad * torch.ones_like(grad).cumsum(-1)).sum() for grad in first)
    second = torch.autograd.grad(mixed, seen, materialize_grads=True)
    results = {"output": output.detach()}
    results |= {f"grad_{n}": g for n, g in zip(leaves, once, strict=True)}
    results |= {f"differentiable_{n}": g.detach() for n, g in zip(leaves, first, strict=True)}
    return results | {f"second_{n}": g for n, g in zip(leaves, second, strict=True)}


@all_cases
def test_attached_kernel_gradient_is_that_of_a_kernel_of_ones(case):
    ones = unit_kernel(case)
    assert_all_close64(
        two_derivatives(case, ones, attached=True), two_derivatives(case, ones, attached=False)
    )


@all_cases
def test_attached_kernel_gradient_keeps_every_bit_of_the_output(case):
    given = case.tensors()
    output = plain(case, given["input"], given["weight"], given["bias"])
    attached = ops.attach_kernel_gradient(
        output.clone(),
        given["input"],
        unit_kernel(case).requires_grad_(),
        given["weight"],
        window=case.window,
        groups=case.groups,
    )
    assert attached.requires_grad
    assert_equal(attached.detach(), output)


@few_cases
def test_attached_kernel_gradient_is_wrong_for_any_other_kernel(case):
    other = unit_kernel(case, 0.9)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_all_close64(
            two_derivatives(case, other, attached=True),
            two_derivatives(case, other, attached=False),
        )
