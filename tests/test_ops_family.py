"""Every form of the adapting kernel: each backend against loops over pixels and the reference."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from numerics import (
    BACKENDS,
    CASES,
    DIFFERS,
    HALVES,
    ONE_DIRECTION,
    Case,
    all_backends,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    fresh_memory_is_nan,
    looped_kernel,
    wide,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.ops import eager

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])

DRAWN = {
    "alpha": torch.tensor(0.3),
    "lambd": torch.tensor(-0.7),
    "alphas": torch.tensor([0.3, 0.1, -0.2]),
    "lambds": torch.tensor([0.6, -0.5, 1.1]),
    "bandwidth": torch.tensor(1.3),
    "blend": torch.tensor(0.8),
    "smoothing": torch.tensor([[0.1, 0.2, 0.05], [0.0, 0.3, 0.15], [0.1, -0.1, 0.2]]),
    "wide_smoothing": torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2]]),
}
# A form of the kernel: its options, of which those that name something drawn are tensors.
INVERSE: dict[str, Any] = {"form": "inverse", "alpha": "alpha", "lambd": "lambd"}
CHANNELS = {"channel_wise": True, "form": "inverse", "alpha": "alphas", "lambd": "lambds"}
KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {"bandwidth": "bandwidth", "blend": "blend"},
    "laplacian": {"form": "laplacian", "bandwidth": "bandwidth"},
    "laplacian_mean": {"form": "laplacian", "distance": "mean", "normalize": "mean"},
    "inverse": {**INVERSE, "bandwidth": "bandwidth", "blend": "blend"},
    "inverse_sum": {**INVERSE, "distance": "mean", "normalize": "sum"},
    "asymmetric": {**INVERSE, "asymmetric": True},
    "asymmetric_mean": {**INVERSE, "asymmetric": True, "normalize": "mean", "blend": "blend"},
    "constant": {"form": "constant", "normalize": "sum"},
    "constant_channels": {"form": "constant", "channel_wise": True},
    "smoothed": {"smoothing": "smoothing"},
    "smoothed_1x5": {"smoothing": "wide_smoothing", "normalize": "sum", "form": "laplacian"},
    "detail": {**INVERSE, "asymmetric": True, "smoothing": "smoothing", "normalize": "sum"},
    "channels": {"channel_wise": True, "distance": "mean", "bandwidth": "bandwidth"},
    "channels_inverse": {**CHANNELS, "normalize": "sum"},
    "channels_asymmetric": {**CHANNELS, "asymmetric": True, "smoothing": "smoothing"},
    "masked": {"masked": True, "blend": "blend"},
    "masked_sum": {"masked": True, "normalize": "sum", "smoothing": "smoothing"},
    "masked_mean": {"masked": True, "normalize": "mean", "form": "laplacian", "blend": "blend"},
    "masked_channels": {**CHANNELS, "masked": True, "normalize": "sum"},
}
PLACES = (
    "1x1_s3_p1", "3x3_p1", "3x3_p2", "3x3_s2_d2_p2", "5x3_s1x2", "4x4_s2_p1", "2x2_p1", "circular",
    "reflect_5x5_s2", "3x3_p1_one_pixel", "5x5_p2_small_image",
)  # fmt: skip
all_kinds = pytest.mark.parametrize("kind", KINDS)
all_places = pytest.mark.parametrize("case", [CASES[name] for name in PLACES], ids=PLACES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


def drawn(case: Case, kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The tensors of a kernel of that kind: guidance, a cotangent, and what the options name."""
    options, generator = KINDS[kind], torch.Generator().manual_seed(0)
    given = {"guidance": case.tensors(dtype)["guidance"]}
    for name in options.values():
        if isinstance(name, str) and name in DRAWN:
            given[name] = DRAWN[name].to(dtype)
    size = case.window.output_size(*case.image[1:])
    shape = (case.image[0], 3 if "channel_wise" in options else 1, case.window.taps, *size)
    given["cotangent"] = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return given


def mask_of(case: Case) -> Tensor:
    B, H, W = case.image
    mask = (torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(4)) < 0.3).double()
    mask[:, :, : H // 2] = 0  # so that some windows see nothing
    return mask


def options_of(case: Case, kind: str, given: dict[str, Tensor]) -> dict[str, Any]:
    options = {
        name: given.get(value, value) if isinstance(value, str) else value
        for name, value in KINDS[kind].items()
    }
    return {**options, "mask": mask_of(case)} if options.pop("masked", False) else options


def kernel_of(case: Case, kind: str, given: dict[str, Tensor], backend: str) -> Tensor:
    return ops.adapting_kernel(
        given["guidance"], case.window, **options_of(case, kind, given), backend=backend
    )


def results(case: Case, kind: str, given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The kernel, and the gradient of all it was made of."""
    leaves = {n: t.detach().requires_grad_() for n, t in given.items() if n != "cotangent"}
    kernel = kernel_of(case, kind, leaves, backend)
    if not kernel.requires_grad:
        return {"kernel": kernel}
    grads = torch.autograd.grad(
        kernel, list(leaves.values()), given["cotangent"], materialize_grads=True
    )
    named = {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"kernel": kernel.detach(), **named}


@functools.cache
def looped(case: Case, kind: str) -> Tensor:
    given = drawn(case, kind)
    return looped_kernel(given["guidance"], case.window, **options_of(case, kind, given))


@every_backend
@all_kinds
@all_places
def test_kernel_is_what_loops_over_pixels_make(case, kind, backend):
    assert_close64(kernel_of(case, kind, drawn(case, kind), backend), looped(case, kind))


OTHERS: dict[str, Any] = {
    "form": "constant",
    "normalize": "mean",
    "blend": 0.5,
    "bandwidth": 1.31,
    "smoothing": DRAWN["smoothing"].double().mT,
    "mask": torch.ones(2, 1, 7, 8).index_fill(3, torch.tensor([4]), 0),
}
CHANGES = [
    (kind, name)
    for kind, name in product(KINDS, OTHERS)
    if KINDS[kind].get("form") != "constant" and KINDS[kind].get(name) != OTHERS[name]
]


@pytest.mark.parametrize(("kind", "name"), CHANGES, ids=map("-".join, CHANGES))
def test_the_loops_see_another_option(kind, name):
    case = CASES["3x3_p2"]
    given = drawn(case, kind)
    changed = {**options_of(case, kind, given), name: OTHERS[name]}
    if changed.get("form") == "constant":
        changed["asymmetric"] = False
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(
            looped_kernel(given["guidance"], case.window, **changed),
            kernel_of(case, kind, given, "reference"),
        )


@functools.cache
def by_reference(case: Case, kind: str) -> dict[str, Tensor]:
    return results(case, kind, drawn(case, kind), "reference")


@all_backends
@all_kinds
@all_places
def test_backend_is_the_reference_in_float64(case, kind, backend):
    found = results(case, kind, drawn(case, kind), backend)
    assert_all_close64(found, by_reference(case, kind))


@all_backends
@dtypes
@all_kinds
def test_backend_is_as_good_as_the_reference_in(kind, dtype, backend):
    case = Case(3, stride=2, padding=1, image=(2, 12, 13))
    given = drawn(case, kind, dtype)
    truth, baseline = (
        results(case, kind, tensors, "reference") for tensors in (wide(given), given)
    )
    for name, value in results(case, kind, given, backend).items():
        # A sum over all pixels: in a single draw the baseline's rounding errors may cancel.
        if truth[name].dim() >= 4:
            factor = 3.0 if name.startswith("grad_") else 2.0
            assert_as_good_as(value, truth[name], baseline[name], factor, name=name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@all_kinds
def test_kernel_in_half_precision_is_rounded_once(kind, dtype):
    """As good as the float64 result of the same inputs, rounded to that dtype."""
    case = CASES["3x3_p1"]
    given = drawn(case, kind, dtype)
    truth = kernel_of(case, kind, wide(given), "reference")
    value = kernel_of(case, kind, given, "auto")
    assert_as_good_as(value, truth, truth.to(dtype), 1.0)


@every_backend
@pytest.mark.parametrize("normalize", ["none", "sum", "mean"])
def test_a_mask_of_taps_is_the_mask_they_came_from(normalize, backend):
    case = CASES["3x3_s2_p1"]
    guidance, mask = case.tensors()["guidance"], mask_of(case)
    taps = ops.valid_taps(mask, case.window)

    def kernel_with(mask: Tensor) -> Tensor:
        return ops.adapting_kernel(
            guidance, case.window, mask=mask, normalize=normalize, backend=backend
        )

    expected = kernel_with(mask)
    if normalize == "mean":  # the taps that count stand for all of them
        expected = expected * (taps.sum(2, keepdim=True).double() / case.window.taps)
    assert_close64(kernel_with(taps), expected)
    assert_close64(kernel_with(taps.double()), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(kernel_with(taps.flip(2)), expected)


TINY = Case((1, 3), padding=(0, 1), image=(1, 2, 4))


def function_of(kind: str, backend: str) -> tuple[Any, list[Tensor]]:
    given = drawn(TINY, kind)
    names = [name for name in given if name != "cotangent"]

    def function(*tensors: Tensor) -> Tensor:
        return kernel_of(TINY, kind, dict(zip(names, tensors, strict=True)), backend)

    return function, [given[name].requires_grad_() for name in names]


differentiable = pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("const")])


@all_backends
@differentiable
def test_gradcheck(kind, backend):
    gradcheck(*function_of(kind, backend), **ONE_DIRECTION)


@all_backends
@differentiable
def test_gradgradcheck(kind, backend):
    gradgradcheck(*function_of(kind, backend), **ONE_DIRECTION)


@pytest.mark.parametrize("kind", ["laplacian", "asymmetric", "detail"])
def test_gradcheck_sees_a_wrong_derivative(kind, monkeypatch):
    wrong = {n: (lambda x, f=f: 1.01 * f(x)) for n, f in eager.DERIVATIVE.items()}
    monkeypatch.setattr(eager, "DERIVATIVE", wrong)
    with pytest.raises(GradcheckError):
        gradcheck(*function_of(kind, "eager"), **ONE_DIRECTION)


@every_backend
@all_kinds
def test_a_batch_of_none(kind, backend):
    case = Case(padding=1, image=(0, 5, 4))
    made = results(case, kind, drawn(case, kind), backend)
    assert made["kernel"].shape == (0, 3 if "channel_wise" in KINDS[kind] else 1, 9, 5, 4)


@every_backend
@all_kinds
def test_channels_last_guidance_gives_the_same(kind, backend):
    case = CASES["3x3_s2_p1"]
    given = drawn(case, kind)
    last = given["guidance"].contiguous(memory_format=torch.channels_last)
    truth = results(case, kind, given, backend)
    assert_all_close64(results(case, kind, {**given, "guidance": last}, backend), truth)


@all_kinds
def test_autocast_leaves_the_kernel_alone(kind):
    case = CASES["3x3_p1"]
    given = drawn(case, kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = kernel_of(case, kind, given, "auto")
    assert torch.equal(kernel, kernel_of(case, kind, given, "auto"))


def kernel(kernel_size: Any = 3, **changed: Any) -> Tensor:
    return ops.adapting_kernel(torch.zeros(2, 3, 4, 5), kernel_size, **changed)


def transposed(**changed: Any) -> Tensor:
    """A call that is right but for what is changed."""
    call: dict[str, Any] = {
        "input": torch.zeros(2, 4, 3, 5),
        "kernel": torch.ones(2, 1, 9, 5, 9),
        "weight": torch.zeros(4, 3, 3, 3),
        "bias": torch.zeros(6),
        "stride": 2,
        "padding": 1,
        "groups": 2,
    }
    return ops.pac_conv_transpose2d(**{**call, **changed})


def pool(kernel_size: Any = 2, **changed: Any) -> Tensor:
    call = {"input": torch.zeros(2, 4, 6, 6), "kernel": torch.ones(2, 1, 4, 3, 3)}
    return ops.pac_pool2d(**{**call, **changed}, kernel_size=kernel_size)


INVERSE_D = {"form": "inverse", "channel_wise": True}
MASKS = "mask must be [B, 1, H, W] = [2, 1, 4, 5] or [B, 1, KH*KW, H_out, W_out] = [2, 1, 9, 2, 3], got "
WINDOW = "a Window has stride, padding and dilation itself. Leave them out."
GOT = "Got input [2, 4, 3, 5], kernel [2, 1, 9, 5, 9], weight [4, 3, 3, 3], bias [6], groups=2, stride=(2, 2)."
SIDES = "input must be [B, C_in, H, W] and weight [C_in, C_out/groups, KH, KW], got "
POOLED = "kernel [2, 1, 4, 3, 3], weight [4, 1, 2, 2], groups=4, stride=(2, 2), dilation=(1, 1), padding=(0, 0, 0, 0) (left, right, top, bottom)."
SHAPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "form": (lambda: kernel(form="laplace"), "form='laplace' is unknown. Nearest: 'laplacian'."),
    "alpha_nan": (lambda: kernel(form="inverse", alpha=float("nan")), "alpha must be finite, got nan."),
    "lambd_inf": (lambda: kernel(form="inverse", lambd=float("-inf")), "lambd must be finite, got -inf."),
    "asymmetric": (lambda: kernel(asymmetric=True), "asymmetric belongs to form='inverse', got form='gaussian'."),
    "alpha_of_one_kernel": (lambda: kernel(form="inverse", alpha=torch.zeros(3)), "alpha must be a number, or [D] = [3] with channel_wise=True, got [3]."),
    "alpha_of_4_channels": (lambda: kernel(**INVERSE_D, alpha=torch.zeros(4)), "alpha must be a number, or [D] = [3] with channel_wise=True, got [4]."),
    "lambd_matrix": (lambda: kernel(**INVERSE_D, lambd=torch.zeros(3, 1)), "lambd must be a number, or [D] = [3] with channel_wise=True, got [3, 1]."),
    "bandwidths": (lambda: kernel(bandwidth=torch.ones(3)), "bandwidth must be a number or a scalar, got [3]."),
    "blends": (lambda: kernel(blend=torch.ones(1, 3)), "blend must be a number or a scalar, got [1, 3]."),
    "mask_2d": (lambda: kernel(mask=torch.ones(4, 5)), MASKS + "[4, 5]."),
    "mask_of_3_channels": (lambda: kernel(mask=torch.ones(2, 3, 4, 5)), MASKS + "[2, 3, 4, 5]."),
    "mask_of_3_images": (lambda: kernel(mask=torch.ones(3, 1, 4, 5)), MASKS + "[3, 1, 4, 5]."),
    "mask_of_other_taps": (lambda: kernel(mask=torch.ones(2, 1, 9, 4, 5)), MASKS + "[2, 1, 9, 4, 5]."),
    "smoothing_even": (lambda: kernel(smoothing=torch.ones(2, 3)), "smoothing must be [kh, kw] of odd sides, got [2, 3]."),
    "smoothing_4d": (lambda: kernel(smoothing=torch.ones(1, 1, 3, 3)), "smoothing must be [kh, kw] of odd sides, got [1, 1, 3, 3]."),
    "smoothing_word": (lambda: ops.smoothing_filter("gauss"), "smoothing='gauss' is unknown. Nearest: 'gaussian'."),
    "smoothing_size": (lambda: ops.smoothing_filter("box", 4), "a smoothing filter needs an odd size, got 4."),
    "smoothing_gaussian_5": (lambda: ops.smoothing_filter("gaussian", 5), "the gaussian smoothing filter has size 3, got 5. Use 'box'."),
    "window_and_stride": (lambda: kernel(ops.make_window(3), stride=2), WINDOW),
    "output_mask": (lambda: ops.output_mask(torch.ones(2, 3, 4, 5), ops.make_window(3)), "mask must be [B, 1, H, W], got [2, 3, 4, 5]."),
    "ceil_reflect": (lambda: ops.make_window(3, padding_mode="reflect", ceil=True), "ceil needs padding_mode='zeros', got 'reflect'."),
    "output_padding": (lambda: transposed(output_padding=2), "output_padding=2 must be smaller than stride=2 or dilation=1."),
    "padding_-1": (lambda: transposed(padding=-1), "padding must be at least 0, got -1."),
    "padding_word": (lambda: transposed(padding="full"), "padding='full' is unknown. Use an int, a pair of ints, 'same' or 'valid'."),
    "too_much_cut": (lambda: transposed(padding=4), "the window is larger than the padded image: kernel_size=(3, 3), dilation=(1, 1), padding=(-2, -2, -2, -2) (left, right, top, bottom), image 5×9. Use a larger image or more padding."),
    "transposed_3d": (lambda: transposed(input=torch.zeros(4, 3, 5)), SIDES + "input [4, 3, 5], weight [4, 3, 3, 3]."),
    "transposed_channels": (lambda: transposed(input=torch.zeros(2, 3, 3, 5)), SIDES + "input [2, 3, 3, 5], weight [4, 3, 3, 3]."),
    "transposed_groups": (lambda: transposed(groups=3), "C_in=4 must be divisible by groups=3."),
    "transposed_kernel": (lambda: transposed(kernel=torch.ones(2, 1, 9, 3, 5)), "kernel must be [B, 1, KH*KW, H_out, W_out] = [2, 1, 9, 5, 9]. " + GOT.replace("9, 5, 9]", "9, 3, 5]")),
    "transposed_bias": (lambda: transposed(bias=torch.zeros(3)), "bias must be [C_out] = [6]. " + GOT.replace("[6]", "[3]")),
    "pool_window_and_stride": (lambda: pool(ops.make_window(2, stride=2), stride=2), WINDOW),
    "pool_3d": (lambda: pool(input=torch.zeros(4, 6, 6)), "input must be [B, C, H, W], got [4, 6, 6]."),
    "pool_too_small": (lambda: pool(3, input=torch.zeros(2, 4, 2, 6)), "the window is larger than the padded image: kernel_size=(3, 3), dilation=(1, 1), padding=(0, 0, 0, 0) (left, right, top, bottom), image 2×6. Use a larger image or more padding."),
    "pool_kernel": (lambda: pool(input=torch.zeros(2, 4, 9, 6)), "kernel must be [B, 1, KH*KW, H_out, W_out] = [2, 1, 4, 4, 3]. Got input [2, 4, 9, 6], " + POOLED),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), SHAPE_ERRORS.values(), ids=SHAPE_ERRORS)
def test_shape_errors(call, message):
    with pytest.raises(ShapeError) as raised:
        call()
    assert str(raised.value) == message


def test_the_calls_of_these_errors_are_right_unchanged():
    assert transposed().shape == (2, 6, 5, 9)
    assert pool().shape == (2, 4, 3, 3)
    assert kernel(**INVERSE_D, alpha=torch.zeros(3)).shape == (2, 3, 9, 2, 3)
    assert kernel(mask=torch.ones(1, 1, 9, 2, 3)).shape == (2, 1, 9, 2, 3)
