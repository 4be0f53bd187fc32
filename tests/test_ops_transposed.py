"""The transposed convolution and the pooling: torch's own layers, and loops, are their truth."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    BACKENDS,
    DIFFERS,
    HALVES,
    ONE_DIRECTION,
    all_backends,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    fresh_memory_is_nan,
    wide,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from pacswap import ops

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)


def length(side: int, k: int, s: int, p: int, op: int, d: int) -> int:
    """The output of torch's transposed convolution."""
    return (side - 1) * s - 2 * p + d * (k - 1) + op + 1


GRID = [
    (k, s, p, op, d)
    for k, s, p, op, d in product((1, 2, 3, 4, 5), (1, 2, 3), (0, 1, 3), (0, 1), (1, 2))
    if op < max(s, d) and length(3, k, s, p, op, d) > 0
]
# The shapes of the layers that networks have, and rectangles.
GROUPS = {"one": (1, 4, 6), "two": (2, 4, 6), "each": (4, 4, 4), "each_2": (4, 4, 8)}
FEW: dict[str, dict[str, Any]] = {
    "k4_s2_p1": {"kernel_size": (4, 4), "stride": 2, "padding": 1},
    "k2_s2": {"kernel_size": (2, 2), "stride": 2},
    "k3_s2_p1_op1": {"kernel_size": (3, 3), "stride": 2, "padding": 1, "output_padding": 1},
    "k5_s4_p2_op3": {"kernel_size": (5, 5), "stride": 4, "padding": 2, "output_padding": 3},
    "k3_d2_p2": {"kernel_size": (3, 3), "padding": 2, "dilation": 2},
    "k3x4_s2x3_p3x0": {"kernel_size": (3, 4), "stride": (2, 3), "padding": (3, 0)},
    "k1_s3": {"kernel_size": (1, 1), "stride": 3},
}
few = pytest.mark.parametrize("name", FEW)
all_groups = pytest.mark.parametrize("groups", GROUPS)


def geometry_of(name: str) -> dict[str, Any]:
    return {n: v for n, v in FEW[name].items() if n != "kernel_size"}


def drawn(
    name: str,
    groups: str = "one",
    *,
    dtype: torch.dtype = torch.float64,
    image: tuple[int, int, int] = (2, 6, 5),
    channel_wise: bool = False,
) -> dict[str, Tensor]:
    """All that a transposed convolution takes, and a cotangent."""
    G, C_in, C_out = GROUPS[groups]
    B, H, W = image
    generator = torch.Generator().manual_seed(0)
    window, steps = ops.transposed_window(FEW[name]["kernel_size"], **geometry_of(name))
    size = window.output_size((H - 1) * steps[0] + 1, (W - 1) * steps[1] + 1)
    shapes = {
        "input": (B, C_in, H, W),
        "kernel": (B, C_in if channel_wise else 1, window.taps, *size),
        "weight": (C_in, C_out // G, *window.kernel_size),
        "bias": (C_out,),
        "cotangent": (B, C_out, *size),
    }
    return {
        n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for n, shape in shapes.items()
    }


def results(name: str, groups: str, given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The output, and the gradient of all that it was made of."""
    leaves = {n: t.detach().requires_grad_() for n, t in given.items() if n != "cotangent"}
    output = ops.pac_conv_transpose2d(
        **leaves, **geometry_of(name), groups=GROUPS[groups][0], backend=backend
    )
    grads = torch.autograd.grad(output, list(leaves.values()), given["cotangent"])
    named = {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"output": output.detach(), **named}


def scattered(name: str, groups: str, given: dict[str, Tensor]) -> Tensor:
    """The transposed convolution pixel by pixel: where each input pixel adds to the output."""
    G = GROUPS[groups][0]
    input, kernel, weight = (given[n].numpy() for n in ("input", "kernel", "weight"))
    pair = {"stride": 1, "padding": 0, "dilation": 1, **geometry_of(name)}
    s, p, d = (v if isinstance(v, tuple) else (v, v) for v in list(pair.values())[:3])
    output = given["bias"].numpy()[None, :, None, None] + 0 * given["cotangent"].numpy()
    (B, C_in, H, W), o, (KH, KW) = input.shape, weight.shape[1], weight.shape[2:]
    places = product(range(B), range(C_in), range(o), range(H), range(W), range(KH), range(KW))
    for b, c, out, y, x, i, j in places:
        row, column = y * s[0] - p[0] + i * d[0], x * s[1] - p[1] + j * d[1]
        if 0 <= row < output.shape[2] and 0 <= column < output.shape[3]:
            factor = kernel[b, c % kernel.shape[1], KH * KW - 1 - (i * KW + j), row, column]
            channel = c // (C_in // G) * o + out
            output[b, channel, row, column] += factor * weight[c, out, i, j] * input[b, c, y, x]
    return torch.from_numpy(output)


@all_backends
@pytest.mark.parametrize(("k", "s", "p", "op", "d"), GRID)
def test_a_kernel_of_ones_is_torchs_transposed_convolution(k, s, p, op, d, backend):
    input, weight, bias = torch.randn(2, 4, 3, 4), torch.randn(4, 3, k, k), torch.randn(6)
    geometry = {"stride": s, "padding": p, "output_padding": op, "dilation": d, "groups": 2}
    expected = F.conv_transpose2d(input.double(), weight.double(), bias.double(), **geometry)
    ones = torch.ones(2, 1, k * k, *expected.shape[2:], dtype=torch.float64)
    output = ops.pac_conv_transpose2d(
        input.double(), ones, weight.double(), bias.double(), **geometry, backend=backend
    )
    assert_close64(output, expected)


@every_backend
@all_groups
@few
def test_transposed_is_what_loops_over_pixels_make(name, groups, backend):
    given = drawn(name, groups, image=(1, 3, 4))
    truth = scattered(name, groups, given)
    assert_close64(results(name, groups, given, backend)["output"], truth)


@pytest.mark.parametrize("name", [n for n in FEW if n != "k1_s3"])
def test_the_loops_see_taps_in_another_order(name):
    given = drawn(name, image=(1, 3, 4))
    turned = {**given, "kernel": given["kernel"].flip(2)}
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(
            results(name, "one", turned, "eager")["output"], scattered(name, "one", given)
        )


@all_backends
@all_groups
@pytest.mark.parametrize("channel_wise", [False, True], ids=["one_kernel", "channel_wise"])
@few
def test_transposed_backend_is_the_reference_in_float64(name, channel_wise, groups, backend):
    given = drawn(name, groups, channel_wise=channel_wise)
    truth = results(name, groups, given, "reference")
    assert_all_close64(results(name, groups, given, backend), truth)


@all_backends
@dtypes
@few
def test_transposed_is_as_good_as_the_reference_in(name, dtype, backend):
    given = drawn(name, dtype=dtype, image=(2, 9, 8))
    truth = results(name, "one", wide(given), "reference")
    baseline = results(name, "one", given, "reference")
    for quantity, value in results(name, "one", given, backend).items():
        factor = 3.0 if quantity.startswith("grad_") else 2.0
        assert_as_good_as(value, truth[quantity], baseline[quantity], factor, name=quantity)


@every_backend
@pytest.mark.parametrize("image", [(0, 3, 4), (1, 1, 1), (2, 1, 7)], ids=str)
@pytest.mark.parametrize("name", [n for n in FEW if n not in ("k3x4_s2x3_p3x0",)])
def test_transposed_takes_small_images_and_none(name, image, backend):
    given = drawn(name, image=image)
    made = results(name, "one", given, backend)
    ones = {**given, "kernel": torch.ones_like(given["kernel"])}
    output = results(name, "one", ones, backend)["output"]
    assert made["grad_input"].shape == given["input"].shape
    plain = F.conv_transpose2d(given["input"], given["weight"], given["bias"], **geometry_of(name))
    assert output.shape == plain.shape
    if image[0]:
        assert_close64(output, plain)


CHECKED = {
    "transposed": lambda x, k, w, b, backend: ops.pac_conv_transpose2d(
        x, k, w, b, stride=2, padding=3, output_padding=1, backend=backend
    ),
    "pool": lambda x, k, w, b, backend: ops.pac_pool2d(
        x, k, (2, 3), stride=2, ceil_mode=True, backend=backend
    ),
}
SHAPES = {
    "transposed": [(1, 2, 3, 3), (1, 1, 9, 2, 2), (2, 1, 3, 3), (1,)],
    "pool": [(1, 2, 3, 4), (1, 2, 6, 2, 2), (), ()],
}


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["first", "second"])
@all_backends
@pytest.mark.parametrize("operation", CHECKED)
def test_gradients(operation, backend, check):
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES[operation]]
    needed = 4 if operation == "transposed" else 2
    for tensor in tensors[:needed]:
        tensor.requires_grad_()
    check(lambda *leaves: CHECKED[operation](*leaves, backend), tensors, **ONE_DIRECTION)


POOLS = [
    (k, s, p, side)
    for k, s, p, side in product((1, 2, 3, 5), (1, 2, 3, 4), (0, 1, 2), (1, 2, 3, 4, 5, 6, 9))
    if p <= k // 2 and side + 2 * p + s - 1 >= k
]


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize(("k", "s", "p", "side"), POOLS)
def test_a_constant_kernel_of_sum_1_is_average_pooling(k, s, p, side, ceil_mode):
    image = torch.randn(1, 2, side, side + 1, dtype=torch.float64)
    options = {"stride": s, "padding": p, "ceil_mode": ceil_mode}
    if not ceil_mode and side + 2 * p < k:
        return
    expected = F.avg_pool2d(image, k, **options, count_include_pad=False)
    window = ops.make_window(k, stride=s, padding=p, ceil=ceil_mode)
    kernel = ops.adapting_kernel(image, window, form="constant", normalize="sum")
    assert_close64(ops.pac_pool2d(image, kernel, k, **options), expected)
    assert_close64(ops.pac_pool2d(image, kernel, window), expected)


@every_backend
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("dilation", [1, 2, (3, 1)], ids=str)
def test_pooling_is_the_depthwise_convolution_with_ones(dilation, ceil_mode, backend):
    image = torch.randn(2, 3, 10, 11, dtype=torch.float64)
    options = {"stride": 2, "padding": 1, "dilation": dilation, "ceil_mode": ceil_mode}
    size = F.max_pool2d(image, 3, **options).shape[2:]
    kernel = torch.randn(2, 3, 9, *size, dtype=torch.float64)
    window = ops.make_window(3, stride=2, padding=1, dilation=dilation, ceil=ceil_mode)
    padded = F.pad(image, window.border(10, 11))
    down, across = window.dilation
    truth = sum(
        kernel[:, :, t] * padded[:, :, i * down :: 2, j * across :: 2][:, :, : size[0], : size[1]]
        for t, (i, j) in enumerate(product(range(3), range(3)))
    )
    assert_close64(ops.pac_pool2d(image, kernel, 3, **options, backend=backend), truth)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(ops.pac_pool2d(image, kernel.flip(2), 3, **options), truth)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, (2, 0)], ids=str)
def test_output_mask_is_where_the_mask_pools_to_something(stride, padding):
    mask = (torch.rand(2, 1, 9, 8) < 0.1).double()
    pair = padding if isinstance(padding, tuple) else (padding, padding)
    padded = F.pad(mask, (pair[1], pair[1], pair[0], pair[0]))
    window = ops.make_window(3, stride=stride, padding=padding)
    expected = F.max_pool2d(padded, 3, stride=stride)
    assert torch.equal(ops.output_mask(mask, window), expected)
    assert 0 < expected.mean() < 1
    assert torch.equal(ops.output_mask(mask.bool(), window), expected.bool())


@few
def test_inserted_mask_is_where_the_input_lies_in_the_outputs_plane(name):
    geometry, size = geometry_of(name), FEW[name]["kernel_size"]
    window, steps = ops.transposed_window(size, **geometry)
    mask = ops.inserted_mask((4, 5), window, steps, torch.device("cpu"))
    # A tap alone at the centre of the guidance's window shows each pixel where it lies.
    taps = torch.zeros(1, 1, *size)
    taps[0, 0, size[0] // 2, size[1] // 2] = 1
    assert torch.equal(mask, F.conv_transpose2d(torch.ones(1, 1, 4, 5), taps, **geometry))


# A compiler sees every tap: two along one axis are enough.
class Upsample(nn.Module):
    def forward(self, input: Tensor, guidance: Tensor, weight: Tensor) -> Tensor:
        kernel = ops.adapting_kernel(
            guidance,
            ops.guidance_window((1, 2)),
            form="inverse",
            smoothing=torch.full((1, 3), 1 / 3),
        )
        return ops.pac_conv_transpose2d(input, kernel, weight, stride=(1, 2))


class Pool(nn.Module):
    def forward(self, input: Tensor, guidance: Tensor, weight: Tensor) -> Tensor:
        window = ops.make_window((1, 2), stride=(1, 2), ceil=True)
        mask = (input[:, :1] > 0).double()
        kernel = ops.adapting_kernel(
            input, window, form="laplacian", channel_wise=True, mask=mask, normalize="sum"
        )
        return ops.pac_pool2d(input, kernel, window) * weight.sum()


MODULES = {"upsample": Upsample(), "pool": Pool()}
modules = pytest.mark.parametrize("name", MODULES)


def arguments(B: int, H: int, W: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((B, 3, H, W), (B, 2, H, 2 * W), (3, 2, 1, 2))
    input, guidance, weight = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return input, guidance, weight


@modules
def test_compiles_to_one_graph_for_any_size(name):
    # Graphs of the backward pass are made in test_operations_mixed.py.
    compiled = torch.compile(MODULES[name], fullgraph=True, dynamic=True, backend="eager")
    for size in ((2, 6, 7), (3, 9, 8)):
        given = [t.requires_grad_() for t in arguments(*size)]
        output, expected = compiled(*given), MODULES[name](*given)
        grads = torch.autograd.grad(output.sum(), given[0])[0]
        assert_close64(output.detach(), expected.detach())
        assert_close64(grads, torch.autograd.grad(expected.sum(), given[0])[0])


@modules
def test_exports_for_any_size(name):
    auto = torch.export.Dim.DYNAMIC
    sizes = dict.fromkeys((0, 2, 3), auto)
    program = torch.export.export(
        MODULES[name], arguments(2, 6, 7), dynamic_shapes=(sizes, sizes, None)
    ).module()
    given = arguments(3, 9, 8)  # other sides hang over
    assert_close64(program(*given), MODULES[name](*given))
