"""What operations promise beside numbers: layouts, autocast, compilers, memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import (
    BACKENDS,
    CASES,
    Case,
    all_backends,
    assert_all_close64,
    assert_close64,
    assert_equal,
    few_cases,
    fresh_memory_is_nan,
    pac,
    plain,
)
from torch import Tensor, nn

from pacswap import ops

every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@all_backends
@pytest.mark.parametrize(
    "names",
    [("input",), ("weight",), ("input", "guidance", "weight")],
    ids=["input", "weight", "all"],
)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@few_cases
def test_any_layout_gives_the_same_and_the_format_of_conv2d(case, layout, names, backend):
    given = case.tensors()
    laid = {**given, **{name: layout(given[name]) for name in names}}
    results = pac(case, laid, backend)
    assert_all_close64(results, pac(case, given, "reference"))
    expected = plain(case, laid["input"], laid["weight"], laid["bias"])
    assert results["output"].stride() == expected.stride()


def test_layouts_differ_in_stride():
    given = CASES["3x3_p1"].tensors()["input"]
    strides = {layout(given).stride() for layout in LAYOUTS.values()}
    assert len(strides | {given.stride()}) == 5


@every_backend
@pytest.mark.parametrize(
    "name", ["3x3_p1", "depthwise", "groups2", "groups2_to_1_each", "circular"]
)
def test_a_batch_of_none(name, backend):
    given = {
        n: t[:0] if n in ("input", "guidance", "cotangent") else t
        for n, t in CASES[name].tensors().items()
    }
    results = pac(CASES[name], given, backend)
    assert results["output"].shape == (0, *CASES[name].output_shape[1:])
    assert results["grad_input"].shape == given["input"].shape
    assert_equal(results["grad_weight"], torch.zeros_like(given["weight"]))


def chain(case: Case, given: dict[str, Tensor], backend: str = "auto") -> Tensor:
    kernel = ops.adapting_kernel(
        given["guidance"],
        case.kernel_size,
        **case.geometry,
        normalize="mean",
        blend=given["blend"],
        bandwidth=given["bandwidth"],
        backend=backend,
    )
    return ops.pac_conv2d(
        given["input"], kernel, given["weight"], given["bias"], **case.options, backend=backend
    )


CONV_INPUTS = ("input", "kernel", "weight", "bias")


def conv_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    given = case.tensors(dtype)
    kernel = ops.adapting_kernel(given["guidance"], case.kernel_size, **case.geometry)
    return {name: {**given, "kernel": kernel}[name] for name in CONV_INPUTS}


@every_backend
@few_cases
def test_autocast_rounds_what_goes_in_and_nothing_else(case, backend):
    given = conv_inputs(case, torch.float32)
    rounded = {name: tensor.bfloat16() for name, tensor in given.items()}
    expected = ops.pac_conv2d(**rounded, **case.options, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(ops.pac_conv2d(**given, **case.options, backend=backend), expected)


@pytest.mark.parametrize(
    ("dtype", "enabled", "expected"),
    [
        (torch.float32, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float64, True, torch.float64),
    ],
    ids=["on", "off", "float64"],
)
def test_autocast_decides_the_dtype_as_for_conv2d(dtype, enabled, expected):
    case = CASES["3x3_p1"]
    given = conv_inputs(case, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        output = ops.pac_conv2d(**given, **case.options)
        convolved = plain(case, given["input"], given["weight"], given["bias"])
    assert (output.dtype, convolved.dtype) == (expected, expected)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_to_one_graph_with_its_gradients(compiler):
    case = CASES["2x2_p1"]
    given = {name: t.requires_grad_() for name, t in case.tensors().items()}
    cotangent = given.pop("cotangent").detach()
    compiled = torch.compile(lambda tensors: chain(case, tensors), fullgraph=True, backend=compiler)
    output, expected = compiled(given), chain(case, given)
    assert_close64(output.detach(), expected.detach())
    leaves = list(given.values())
    grads = torch.autograd.grad(output, leaves, cotangent)
    truths = torch.autograd.grad(expected, leaves, cotangent)
    names = list(given)
    assert_all_close64(dict(zip(names, grads, strict=True)), dict(zip(names, truths, strict=True)))


def test_compiling_refuses_a_backend_that_it_cannot_see_through():
    case = CASES["3x3_p1"]
    compiled = torch.compile(
        lambda tensors: chain(case, tensors, "eager"), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="its hand-written backward is opaque"):
        compiled(case.tensors())


class Chain(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case = case
        self.given = {n: t for n, t in case.tensors().items() if n not in ("input", "guidance")}

    def forward(self, input, guidance):
        return chain(self.case, {**self.given, "input": input, "guidance": guidance})


def exported(case: Case, sizes: dict[int, Any] | None) -> nn.Module:
    given = case.tensors()
    shapes = None if sizes is None else {"input": sizes, "guidance": sizes}
    args = (given["input"], given["guidance"])
    return torch.export.export(Chain(case), args, dynamic_shapes=shapes).module()


BATCH, HEIGHT, WIDTH = (torch.export.Dim(name) for name in ("batch", "height", "width"))
DYNAMIC = {
    "3x3_p1": {0: BATCH, 2: HEIGHT, 3: WIDTH},
    # The end of a strided slice is a floor division, about which torch proves nothing for a named
    # dimension: it checks at run time.
    "3x3_s2_p1": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),
}
ELSEWHERE = {"batch": (5, 7, 8), "height": (2, 17, 8), "width": (2, 7, 5), "all": (1, 9, 31)}


@pytest.fixture(scope="module", params=DYNAMIC)
def dynamic(request):
    return CASES[request.param], exported(CASES[request.param], DYNAMIC[request.param])


def resized(case: Case, image: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    given = Case(**{**vars(case), "image": image}).tensors(seed=1)
    return given["input"], given["guidance"]


@pytest.mark.parametrize("image", ELSEWHERE.values(), ids=ELSEWHERE)
def test_exports_with_any_batch_height_and_width(image, dynamic):
    case, program = dynamic
    args = resized(case, image)
    assert_close64(program(*args), Chain(case)(*args))


def test_an_export_of_one_size_takes_no_other():
    case = CASES["3x3_p1"]
    with pytest.raises(AssertionError, match=re.escape("input.size()[0] == 2")):
        exported(case, None)(*resized(case, ELSEWHERE["all"]))


def saved_bytes(case: Case, backend: str) -> tuple[int, int]:
    """What a convolution keeps for its backward pass, and what input, kernel and weight take."""
    given = {n: t.detach().requires_grad_() for n, t in conv_inputs(case, torch.float32).items()}
    given["bias"] = None
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = ops.pac_conv2d(**given, **case.options, backend=backend)
    # What a function of ours kept behind autograd's back.
    kept += [t for t in getattr(output.grad_fn, "__dict__", {}).values() if isinstance(t, Tensor)]
    owned = sum(given[name].nbytes for name in ("input", "kernel", "weight"))
    return sum(t.nbytes for t in kept), owned


@few_cases
def test_eager_keeps_input_kernel_and_weight_for_the_backward_pass(case):
    kept, owned = saved_bytes(case, "eager")
    assert kept == owned


@pytest.mark.parametrize("backend", ["reference", "taps"])
@few_cases
def test_the_others_keep_more(case, backend):
    kept, owned = saved_bytes(case, backend)
    assert kept > 1.5 * owned


def test_eager_keeps_the_guidance_for_the_backward_pass_of_its_distances():
    case, kept = CASES["3x3_valid"], []
    guidance = case.tensors()["guidance"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.tap_distance(guidance, case.window, backend="eager")
    assert [tensor.shape for tensor in kept] == [guidance.shape]
