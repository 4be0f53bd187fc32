"""The reference against the paper's equation in seven loops over plain Python floats."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from numerics import (
    CASES,
    DIFFERS,
    Case,
    all_cases,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    fresh_memory_is_nan,
    pac,
    plain,
)
from torch import Tensor

from pacswap import ops

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
KERNEL_OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"normalize": "sum"},
    "mean": {"normalize": "mean"},
    "blend_0": {"blend": 0.0},
    "blend_-1": {"blend": -1.0},
    "sum_blend_0.3": {"blend": 0.3, "normalize": "sum"},
    "standardize": {"standardize": True},
    "mean_distance": {"distance": "mean"},
    "bandwidth_0.5": {"bandwidth": 0.5},
    "design": {"standardize": True, "distance": "mean", "bandwidth": 1.3, "normalize": "mean"},
}
OPTION_CASES = ("1x1_s3_p1", "3x3_p1", "3x3_s2_d2_p2", "2x2_p1", "4x4_s2_p1", "reflect_5x5_s2")


def source(index: int, length: int, mode: str) -> int | None:
    """The pixel that a border pixel repeats; None for a zero."""
    if 0 <= index < length:
        return index
    if mode == "reflect":
        return -index if index < 0 else 2 * (length - 1) - index
    if mode == "replicate":
        return min(max(index, 0), length - 1)
    return index % length if mode == "circular" else None


def positions(case: Case, y: int, x: int) -> list[tuple[int | None, int | None]]:
    """The pixel that each tap sees at output pixel (y, x)."""
    window = case.window
    left, _, top, _ = window.pad
    return [
        (
            source(y * window.stride[0] + i * window.dilation[0] - top, case.image[1], mode),
            source(x * window.stride[1] + j * window.dilation[1] - left, case.image[2], mode),
        )
        for mode in [case.padding_mode]
        for i, j in product(*map(range, window.kernel_size))
    ]


def at(image: Any, b: int, c: int, place: tuple[int | None, int | None]) -> float:
    return 0.0 if None in place else image[b][c][place[0]][place[1]]


def oracle_standardized(guidance: Any) -> Any:
    def channel(rows: list[list[float]]) -> list[list[float]]:
        values = [v for row in rows for v in row]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        deviation = math.sqrt(variance + 1e-6 * mean**2 + 1e-12)
        return [[(v - mean) / deviation for v in row] for row in rows]

    return [[channel(rows) for rows in image] for image in guidance]


def oracle_kernel(
    case: Case,
    guidance: Any,
    b: int,
    places: list[tuple[int | None, int | None]],
    options: dict[str, Any],
) -> list[float]:
    """K_a(f_p, f_q) of one output pixel for each tap."""
    # The earlier of the two middle taps of an even side: docs/math.md.
    row, column = ((k - 1) // 2 for k in case.window.kernel_size)
    centre = places[row * case.window.kernel_size[1] + column]
    channels = range(len(guidance[b]))
    kernel = []
    for place in places:
        square = sum(
            (at(guidance, b, d, centre) - at(guidance, b, d, place)) ** 2 for d in channels
        )
        if options.get("distance") == "mean":
            square /= len(channels)
        kernel.append(math.exp(-0.5 * square / options.get("bandwidth", 1.0) ** 2))
    normalize = options.get("normalize", "none")
    if normalize == "mean":
        outside = [None in place or None in centre for place in places]
        kernel = [1.0 if out else k for k, out in zip(kernel, outside, strict=True)]
        kernel = [len(places) * k / sum(kernel) for k in kernel]
    if normalize == "sum":
        kernel = [0.0 if None in place else k for k, place in zip(kernel, places, strict=True)]
        kernel = [k / (sum(kernel) or 1.0) for k in kernel]
    return [1 + options.get("blend", 1.0) * (k - 1) for k in kernel]


def oracle(case: Case, given: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """y_p = b + Σ_{q∈Ω(p)} K(f_p, f_q)·W[p−q]·v_q, a number at a time."""
    v, f, W, bias = (given[n].tolist() for n in ("input", "guidance", "weight", "bias"))
    if options.get("standardize"):
        f = oracle_standardized(f)
    B, C_out, H_out, W_out = case.output_shape
    KW, per_group = case.window.kernel_size[1], case.channels[0] // case.groups
    output = torch.zeros(case.output_shape, dtype=torch.float64)
    factors = torch.zeros(B, 1, case.window.taps, H_out, W_out, dtype=torch.float64)
    for b, y, x in product(range(B), range(H_out), range(W_out)):
        places = positions(case, y, x)
        kernel = oracle_kernel(case, f, b, places, options)
        factors[b, 0, :, y, x] = torch.tensor(kernel, dtype=torch.float64)
        for o in range(C_out):
            first = o // (C_out // case.groups) * per_group
            total = bias[o]
            for t, place in enumerate(places):
                for c in range(per_group):
                    tap = W[o][c][t // KW][t % KW]
                    total += kernel[t] * tap * at(v, b, first + c, place)
            output[b, o, y, x] = total
    return {"output": output, "kernel": factors}


def reference(case: Case, given: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    kernel = ops.adapting_kernel(
        given["guidance"], case.kernel_size, **case.geometry, **options, backend="reference"
    )
    output = ops.pac_conv2d(
        given["input"],
        kernel,
        given["weight"],
        given["bias"],
        **case.options,
        backend="reference",
    )
    return {"output": output, "kernel": kernel}


@all_cases
def test_reference_is_the_papers_equation(case):
    given = case.tensors()
    assert_all_close64(reference(case, given, {}), oracle(case, given, {}))


@pytest.mark.parametrize("name", OPTION_CASES)
@pytest.mark.parametrize("options", KERNEL_OPTIONS.values(), ids=KERNEL_OPTIONS)
def test_reference_options_are_the_designs(name, options):
    case, given = CASES[name], CASES[name].tensors()
    assert_all_close64(reference(case, given, options), oracle(case, given, options))


@pytest.mark.parametrize("options", KERNEL_OPTIONS.values(), ids=KERNEL_OPTIONS)
def test_every_option_changes_the_kernel(options):
    case, given = CASES["3x3_p1"], CASES["3x3_p1"].tensors()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_all_close64(reference(case, given, options), oracle(case, given, {}))


@pytest.mark.parametrize("other", ["3x3_same_d2", "reflect", "replicate", "circular"])
def test_oracle_knows_dilation_and_borders(other):
    given = CASES["3x3_p1"].tensors()
    changed = Case(**{**vars(CASES[other]), "padding": 1 if other != "3x3_same_d2" else 2})
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_all_close64(reference(CASES["3x3_p1"], given, {}), oracle(changed, given, {}))


def constant(case: Case) -> dict[str, Tensor]:
    """Guidance that is the same at every pixel, one value per channel."""
    given = case.tensors()
    values = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)[:, None, None]
    return {**given, "guidance": values.expand_as(given["guidance"])}


def convolution(case: Case, given: dict[str, Tensor]) -> Tensor:
    return plain(case, given["input"], given["weight"], given["bias"])


CENTRED = {name: case for name, case in CASES.items() if not case.centre_in_padding}
OFF_CENTRE = {name: case for name, case in CASES.items() if case.centre_in_padding}


@pytest.mark.parametrize("case", CENTRED.values(), ids=CENTRED)
def test_constant_guidance_is_the_plain_convolution(case):
    given = constant(case)
    assert_close64(reference(case, given, {})["output"], convolution(case, given))


@all_cases
@pytest.mark.parametrize(
    "options",
    [{"normalize": "mean"}, {"standardize": True}, {"blend": 0.0}],
    ids=["mean", "standardize", "blend_0"],
)
def test_constant_guidance_is_the_plain_convolution_with(case, options):
    given = constant(case)
    results = reference(case, given, options)
    assert_close64(results["output"], convolution(case, given))
    if "standardize" not in options:
        assert_equal(results["kernel"], torch.ones_like(results["kernel"]))


OFF_CENTRE_TAPS = {name: case for name, case in OFF_CENTRE.items() if case.window.taps > 1}


@pytest.mark.parametrize("case", OFF_CENTRE_TAPS.values(), ids=OFF_CENTRE_TAPS)
def test_a_centre_in_the_padding_compares_with_zero(case):
    """f_p is 0 there, as the paper pads: constant guidance is then no constant."""
    given = constant(case)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(reference(case, given, {})["output"], convolution(case, given))


SPREAD = {name: case for name, case in CASES.items() if case.window.taps > 1}
SPREAD = {name: case for name, case in SPREAD.items() if case.image[1:] != (1, 1)}


@pytest.mark.parametrize("case", SPREAD.values(), ids=SPREAD)
def test_varying_guidance_is_not_the_plain_convolution(case):
    given = case.tensors()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(reference(case, given, {})["output"], convolution(case, given))


def interior(case: Case, output: Tensor) -> Tensor:
    """The output pixels whose window lies in the image."""
    inside = case.window.inside(*case.image[1:], torch.device("cpu"))
    return output if inside is None else output[:, :, inside[0].all(0)]


WITH_INTERIOR = {n: c for n, c in SPREAD.items() if interior(c, torch.ones(c.output_shape)).numel()}


@pytest.mark.parametrize("case", WITH_INTERIOR.values(), ids=WITH_INTERIOR)
def test_sum_of_constant_guidance_divides_by_the_taps(case):
    given = constant(case)
    output = reference(case, given, {"normalize": "sum"})["output"] - given["bias"][:, None, None]
    expected = plain(case, given["input"], given["weight"], None) / case.window.taps
    assert_close64(interior(case, output), interior(case, expected))


def test_sum_of_constant_guidance_is_larger_at_a_border_of_zeros():
    case, given = CASES["3x3_p1"], constant(CASES["3x3_p1"])
    output = reference(case, given, {"normalize": "sum"})["output"] - given["bias"][:, None, None]
    expected = plain(case, given["input"], given["weight"], None) / case.window.taps
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(output, expected)


@pytest.mark.parametrize("name", ["grad_input", "grad_weight", "grad_guidance", "grad_blend"])
def test_gradients_are_those_of_finite_differences(name):
    """Along one random direction; the backends' gradients are compared with these in test_ops."""
    case, leaf = CASES["groups2"], name.removeprefix("grad_")
    given = case.tensors()
    direction = torch.randn_like(given[leaf], generator=torch.Generator().manual_seed(5))

    def loss(step: float) -> Tensor:
        moved = {**given, leaf: given[leaf] + step * direction}
        output = pac(case, moved, "reference", derivatives=False)["output"]
        return (output * given["cotangent"]).sum()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    gradient = pac(case, given, "reference")[name]
    assert_close64((gradient * direction).sum(), slope, relative=1e-8)


TRUTH = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
NAN = torch.tensor([1.0, float("nan"), 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TRUTH + 1e-10, "value: max |difference| 1e-10 > 3e-12 = 1e-12 × max |truth|"),
        (NAN, "value: max |difference| inf > 3e-12 = 1e-12 × max |truth|"),
        (TRUTH[:2], "shape [2], expected [3]"),
        (TRUTH.float(), "value: expected float64 twice, got torch.float32, torch.float64"),
    ],
    ids=["far", "nan", "shape", "dtype"],
)
def test_assert_close64_raises(value, message):
    with pytest.raises(AssertionError) as raised:
        assert_close64(value, TRUTH)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("off", "baseline_off", "factor"),
    [(3e-3, 1e-3, 2.0), (1e-3, 0.0, 2.0), (float("nan"), 1.0, 2.0), (float("inf"), 1.0, 3.0)],
    ids=["three_times", "perfect_baseline", "nan", "inf"],
)
def test_assert_as_good_as_raises(off, baseline_off, factor):
    value, baseline = (TRUTH.float() + off), (TRUTH.float() + baseline_off)
    with pytest.raises(AssertionError, match=DIFFERS + r" .* × baseline \+ floor"):
        assert_as_good_as(value, TRUTH, baseline, factor)


@pytest.mark.parametrize("off", [0.0, 1.9e-3], ids=["exact", "within"])
def test_assert_as_good_as_accepts(off):
    assert_as_good_as(TRUTH.float() + off, TRUTH, TRUTH.float() + 1e-3, 2.0)


def test_assert_as_good_as_wants_one_dtype():
    with pytest.raises(AssertionError, match="expected a float64 truth and one dtype"):
        assert_as_good_as(TRUTH.float(), TRUTH, TRUTH.half(), 2.0)


@pytest.mark.parametrize("other", [TRUTH.float(), TRUTH + 1e-15], ids=["dtype", "bits"])
def test_assert_equal_raises(other):
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(other, TRUTH)


@pytest.mark.parametrize("values", [{}, {"a": TRUTH}], ids=["nothing", "other_names"])
def test_assert_all_close64_raises_when_names_differ(values):
    with pytest.raises(AssertionError, match="expected the quantities"):
        assert_all_close64(values, {"b": TRUTH} if values else {})
