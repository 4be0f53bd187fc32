"""Pixel-adaptive convolutions of sequences and volumes: the equation, derivatives, compilers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from numerics import (
    BACKENDS,
    DIFFERS,
    HALVES,
    ONE_DIRECTION,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    fresh_memory_is_nan,
    wide,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from volumes import CASES, OPERATIONS, Line, all_cases, few_cases, oracle, pac

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.ops import loops

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
all_three = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
DESIGN = {"standardize": True, "distance": "mean", "normalize": "mean"}
OPTIONS: dict[str, dict[str, Any]] = {
    "laplacian": {"form": "laplacian"},
    "inverse": {"form": "inverse", "alpha": 0.3, "lambd": -0.5},
    "constant": {"form": "constant"},
    "mean_distance": {"distance": "mean"},
    "standardize": {"standardize": True},
    "sum": {"normalize": "sum"},
    "mean": {"normalize": "mean"},
    "design": DESIGN,
}
FIXED = ("alpha", "lambd")  # the oracle knows but these
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@all_three
@all_cases
def test_it_is_the_papers_equation(case, backend):
    given = case.tensors()
    output, kernel = oracle(case)
    made = pac(case, given, backend)
    assert_close64(made["kernel"], kernel, name="kernel")
    assert_close64(made["output"], output, name="output")


@all_options
@pytest.mark.parametrize("name", ["line_s2_d2_p2", "2x2x2_same", "circular"])
def test_the_options_are_those_of_images(name, options):
    case = CASES[name]
    given = case.tensors()
    output, kernel = oracle(case, **{n: v for n, v in options.items() if n not in FIXED})
    made = pac(case, given, **options)
    assert_close64(made["kernel"], kernel, name="kernel")
    assert_close64(made["output"], output, name="output")


@all_options
@pytest.mark.parametrize("name", ["line_p1", "3x3x3_p1"])
def test_every_option_changes_the_kernel(name, options):
    given = CASES[name].tensors()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(
            pac(CASES[name], given, **options)["kernel"], pac(CASES[name], given)["kernel"]
        )


@all_cases
def test_the_oracle_sees_a_shuffled_guidance(case):
    given = case.tensors()
    if case.window.taps == 1:
        pytest.skip("a window of one tap has nothing to compare")
    shuffled = given | {"guidance": given["guidance"].flip(-1).roll(1, 0)}
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(pac(case, shuffled)["output"], oracle(case)[0])


@all_three
@all_cases
def test_a_kernel_of_ones_is_the_plain_convolution(case, backend):
    given = case.tensors()
    ones = torch.ones(case.batch, 1, case.window.taps, *case.output_size, dtype=torch.float64)
    names = ("weight", "bias")
    weight, bias = (given[name] for name in names)
    output = OPERATIONS[case.axes](
        given["input"], ones, weight, bias, **case.options, backend=backend
    )
    assert_close64(output, case.plain(given))


@pytest.mark.parametrize("backend", BACKENDS)
@all_cases
def test_gradients_are_the_references_in_float64(case, backend):
    given = case.tensors()
    assert_all_close64(
        pac(case, given, backend, **DESIGN), pac(case, given, "reference", **DESIGN), relative=1e-11
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@all_cases
def test_it_is_as_good_as_the_plain_convolution_in(case, dtype, backend):
    """With K ≡ 1, where torch has a baseline of its own."""
    given = case.tensors(dtype)
    ones = torch.ones(case.batch, 1, case.window.taps, *case.output_size, dtype=dtype)
    output = OPERATIONS[case.axes](
        given["input"], ones, given["weight"], given["bias"], **case.options, backend=backend
    )
    assert_as_good_as(output, case.plain(wide(given)), case.plain(given), 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@few_cases
def test_it_is_as_good_as_the_reference_in(case, dtype, backend):
    given = case.tensors(dtype)
    truth, baseline = (pac(case, t, "reference") for t in (wide(given), given))
    for name, value in pac(case, given, backend).items():
        if name not in ("grad_blend", "grad_bandwidth"):  # sums whose errors cancel in one draw
            factor = 3.0 if name.startswith("grad_") else 2.0
            assert_as_good_as(value, truth[name], baseline[name], factor, name=name)


def test_a_window_of_one_frame_is_the_convolution_of_each_frame():
    case = CASES["1x3x3"]
    given = case.tensors()
    made = pac(case, given)
    for t in range(case.size[0]):
        f, x = given["guidance"][:, :, t], given["input"][:, :, t]
        numbers = {name: given[name] for name in ("bandwidth", "blend")}
        kernel = ops.adapting_kernel(f, 3, padding=1, **numbers)
        output = ops.pac_conv2d(x, kernel, given["weight"][:, :, 0], given["bias"], padding=1)
        assert_close64(made["kernel"][:, :, :, t], kernel)
        assert_close64(made["output"][:, :, t], output)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("line")])
def test_a_sequence_is_an_image_of_height_1(name):
    case = CASES[name]
    given = case.tensors()
    row, made = case.window.row, pac(case, given, **DESIGN)
    numbers = {name: given[name] for name in ("bandwidth", "blend")}
    kernel = ops.adapting_kernel(given["guidance"][:, :, None], row, **numbers, **DESIGN)
    output = ops.convolve(
        *(t[:, :, None] for t in (given["input"],)),
        kernel,
        given["weight"][:, :, None],
        given["bias"],
        row,
        case.groups,
        "auto",
    )
    assert_equal(made["kernel"], kernel.squeeze(3))
    assert_equal(made["output"], output.squeeze(2))


def test_a_sequence_has_smoothing_masks_and_channels():
    case = CASES["line_p1"]
    f = case.tensors()["guidance"]
    smoothing, mask = ops.smoothing_filter("box", 3).sum(0), torch.rand(2, 1, 7) - 0.5
    options: dict[str, Any] = {"channel_wise": True, "form": "inverse", "alpha": f[0, :, 0]}
    made = ops.adapting_kernel(f, (3,), padding=1, smoothing=smoothing, mask=mask, **options)
    image = ops.adapting_kernel(
        f[:, :, None],
        (1, 3),
        padding=(0, 1),
        smoothing=smoothing[None],
        mask=mask[:, :, None],
        **options,
    )
    assert_equal(made, image.squeeze(3))


def test_a_volume_has_a_kernel_for_each_channel():
    case = CASES["3x3x3_p1"]
    given = case.tensors()
    f = torch.cat([given["guidance"], given["guidance"][:, :1]], 1)
    options = {"form": "inverse", "lambd": f[0, :, 0, 0, 0], "channel_wise": True}
    made = ops.adapting_kernel(f, 3, padding=1, **options)
    each = [
        ops.adapting_kernel(f[:, c : c + 1], 3, padding=1, form="inverse", lambd=lambd)
        for c, lambd in enumerate(f[0, :, 0, 0, 0])
    ]
    assert_close64(made, torch.cat(each, 1))
    output = ops.pac_conv3d(given["input"], made, given["weight"], padding=1)
    truth = ops.pac_conv3d(given["input"], made, given["weight"], padding=1, backend="reference")
    assert_close64(output, truth)


TINY = {
    "line": Line((3,), (4,), padding=1, channels=(2, 2), batch=1),
    "line_grouped": Line((2,), (5,), stride=2, groups=2, channels=(4, 2), batch=1),
    "volume": Line((2, 2, 1), (2, 3, 2), padding=(1, 1, 0), channels=(2, 2), batch=2),
    "volume_strided": Line((2, 1, 2), (5, 2, 3), stride=(2, 1, 1), channels=(1, 2), batch=1),
    "reflect": Line((3, 1, 1), (3, 1, 2), padding=(1, 0, 0), padding_mode="reflect", batch=1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])
@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_derivatives_are_those_of_finite_differences(case, check, backend):
    given = case.tensors()

    def function(x: Tensor, f: Tensor, w: Tensor, b: Tensor, blend: Tensor, width: Tensor):
        kernel = ops.adapting_kernel(
            f,
            case.kernel_size,
            **case.geometry,
            blend=blend,
            bandwidth=width,
            normalize="sum",
            backend=backend,
        )
        return OPERATIONS[case.axes](x, kernel, w, b, **case.options, backend=backend)

    names = ("input", "guidance", "weight", "bias", "blend", "bandwidth")
    check(function, [given[name].requires_grad_() for name in names], **ONE_DIRECTION)


@all_cases
def test_an_attached_gradient_is_that_of_a_kernel_of_ones(case):
    given = case.tensors()
    shape = (case.batch, 1, case.window.taps, *case.output_size)
    results = []
    for attached in (True, False):
        names = ("input", "weight", "bias")
        leaves = {name: given[name].detach().requires_grad_() for name in names}
        leaves["kernel"] = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        x, w, b, k = leaves.values()
        if attached:
            plain = case.plain(leaves)
            output = ops.attach_kernel_gradient(
                plain, x, k, w, window=case.window, groups=case.groups
            )
            assert_equal(output.detach(), case.plain(given))
        else:
            output = OPERATIONS[case.axes](x, k, w, b, **case.options)
        seen = list(leaves.values())
        once = torch.autograd.grad(output, seen, given["cotangent"], retain_graph=True)
        first = torch.autograd.grad(output, seen, given["cotangent"], create_graph=True)
        mixed = sum((grad * torch.ones_like(grad).cumsum(-1)).sum() for grad in first)
        second = torch.autograd.grad(mixed, seen, materialize_grads=True)
        kinds = {"grad": once, "differentiable": [g.detach() for g in first], "second": second}
        results.append(
            {
                f"{kind}_{n}": g
                for kind, gs in kinds.items()
                for n, g in zip(leaves, gs, strict=True)
            }
        )
    assert_all_close64(*results)


class _Chain(nn.Module):
    def __init__(self, case: Line):
        super().__init__()
        self.case = case
        given = case.tensors(torch.float32)
        self.weight, self.bias = given["weight"], given["bias"]

    def forward(self, input, guidance):
        kernel = ops.adapting_kernel(guidance, self.case.kernel_size, **self.case.geometry)
        operation = OPERATIONS[self.case.axes]
        return operation(input, kernel, self.weight, self.bias, **self.case.options)


# A compiler takes seconds for each tap of a window.
traced = pytest.mark.parametrize("name", ["line", "volume_strided"])


@traced
def test_it_exports_with_any_size(name):
    case = replace(TINY[name], batch=2)  # of a batch of 1, an export would take no other
    chain, given = _Chain(case), case.tensors(torch.float32)
    sizes = {0: torch.export.Dim.AUTO} | {2 + a: torch.export.Dim.AUTO for a in range(case.axes)}
    example = (given["input"], given["guidance"])
    program = torch.export.export(chain, example, dynamic_shapes=(sizes, sizes)).module()
    larger = [t.repeat(2, 1, *[2] * case.axes) for t in example]
    for inputs in (example, larger):
        torch.testing.assert_close(program(*inputs), chain(*inputs), rtol=1e-5, atol=1e-5)


@traced
def test_it_compiles_to_one_graph(name):
    case = replace(TINY[name], batch=2)  # of a batch of 1, an export would take no other
    chain, given = _Chain(case), case.tensors(torch.float32)
    made = torch.compile(chain, fullgraph=True, backend="eager")(given["input"], given["guidance"])
    torch.testing.assert_close(made, chain(given["input"], given["guidance"]), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_that_grows_with_the_taps(monkeypatch):
    """What the backward pass keeps: the volume, the kernel and the weight, each once."""
    case = Line((3, 3, 3), (6, 8, 8), padding=1, channels=(40, 2), batch=1)
    given = case.tensors(torch.float32)
    ones = torch.ones(1, 1, 27, *case.output_size).requires_grad_()
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        input, weight = (given[name].requires_grad_() for name in ("input", "weight"))
        ops.pac_conv3d(input, ones, weight, padding=1)
    padded = 40 * 8 * 10 * 10 * 4
    assert sum(storages.values()) <= padded + 2 * ones.nbytes + 2 * weight.nbytes
    assert len(storages) > 1


REFUSED = {
    "smoothing": (
        lambda f: ops.adapting_kernel(f, 3, smoothing=torch.ones(3, 3)),
        "smoothing of a volume's centre is not known. Leave smoothing out.",
    ),
    "mask": (
        lambda f: ops.adapting_kernel(f, 3, mask=torch.ones(1, 1, 3, 4, 5)),
        "a mask of a volume is not known. Leave mask out.",
    ),
    "too_small": (
        lambda f: ops.adapting_kernel(f, (5, 3, 3), padding=(0, 1, 1)),
        "the window is larger than the padded volume: kernel_size=(5, 3, 3), dilation=(1, 1, 1), "
        "padding=(1, 1, 1, 1, 0, 0), volume 3×4×5. Use a larger volume or more padding.",
    ),
    "stride": (
        lambda f: ops.adapting_kernel(f, 3, stride=(1, 2)),
        "stride must be an int or a tuple of 3 ints, got (1, 2).",
    ),
    "weight": (
        lambda f: ops.pac_conv3d(f, f, torch.ones(3, 3, 3, 3)),
        "weight must be [C_out, C_in/groups, KT, KH, KW], got [3, 3, 3, 3].",
    ),
    "input": (
        lambda f: ops.pac_conv1d(f, f, torch.ones(3, 2, 3)),
        "input must be [B, C_in, L]. Got input [1, 2, 3, 4, 5], kernel [1, 2, 3, 4, 5], weight "
        "[3, 2, 3], groups=1, stride=(1,), dilation=(1,), padding=(0, 0) (left, right).",
    ),
    "kernel": (
        lambda f: ops.pac_conv3d(f, f, torch.ones(3, 2, 3, 3, 3)),
        "kernel must be [B, 1, KT*KH*KW, T_out, H_out, W_out] = [1, 1, 27, 1, 2, 3]. Got input "
        "[1, 2, 3, 4, 5], kernel [1, 2, 3, 4, 5], weight [3, 2, 3, 3, 3], groups=1, stride=(1, 1, "
        "1), dilation=(1, 1, 1), padding=(0, 0, 0, 0, 0, 0) (left, right, top, bottom, front, "
        "back).",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_shape_errors(call, message):
    with pytest.raises(ShapeError) as raised:
        call(torch.ones(1, 2, 3, 4, 5))
    assert str(raised.value) == message


def test_gradcheck_of_volumes_goes_through_the_hand_written_backward(monkeypatch):
    called = []
    right = loops.gradients
    monkeypatch.setattr(loops, "gradients", lambda *args: called.append(1) or right(*args))
    pac(CASES["3x3x3_p1"], CASES["3x3x3_p1"].tensors())
    assert len(called) == 3  # one for each temporal tap
