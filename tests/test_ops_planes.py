"""The CPU's loops over planes: groups of few channels and the adapting kernel's distances."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import (
    DIFFERS,
    Case,
    assert_all_close64,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    fresh_memory_is_nan,
    pac,
    wide,
)
from test_ops_loops import forget_divisions
from test_ops_tiles import drawn_shape
from torch import Tensor

from pacswap import ops
from pacswap.ops import backends, make_window, window
from pacswap.ops.backends import Task
from pacswap.ops.loops import emit, machine_planes, planes, threads

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

CASES = {
    "one_pixel": Case(7, padding=3, groups=9, channels=(9, 9), image=(2, 1, 1)),
    "one_row": Case(padding=1, groups=5, channels=(5, 5), image=(1, 1, 40)),
    "one_column": Case(5, padding=2, groups=6, channels=(6, 6), image=(2, 37, 1)),
    "a_vector_less_one": Case(padding=1, groups=4, channels=(4, 4), image=(1, 5, 15)),
    "a_vector": Case(padding=1, groups=4, channels=(4, 4), image=(1, 6, 16)),
    "a_vector_and_one": Case(padding=1, groups=7, channels=(7, 7), image=(1, 3, 17)),
    "two_outputs_each": Case(7, padding=3, groups=6, channels=(6, 12), image=(2, 9, 11)),
    "three_of_a_group": Case(stride=2, padding=1, groups=3, channels=(9, 15), image=(2, 18, 35)),
    "a_group_for_two_threads": Case(padding=1, groups=2, channels=(6, 22), image=(1, 9, 17)),
    "eight_of_a_group": Case(5, padding=2, groups=4, channels=(32, 32), image=(1, 14, 14)),
    "dilated_beyond": Case(padding=9, dilation=9, groups=4, channels=(4, 4), image=(1, 7, 8)),
    "in_steps_of_three": Case(stride=3, padding=1, groups=4, channels=(4, 4), image=(2, 20, 61)),
    "in_steps_of_two": Case(5, stride=2, padding=2, groups=4, channels=(4, 4), image=(1, 21, 79)),
    "even": Case(4, padding=1, groups=6, channels=(6, 6), image=(1, 10, 13)),
}  # fmt: skip

SINGLE = ("one_column", "eight_of_a_group", "in_steps_of_two")


@pytest.fixture(params=["one thread", "three threads"])
def shares(request, monkeypatch):
    """Among how many threads the work is divided, more than some cases have rows."""
    forget_divisions()
    if request.param == "three threads":
        monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
        torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)
    forget_divisions()


@pytest.mark.parametrize("name", CASES)
def test_groups_of_few_channels_are_the_reference(name, shares):
    given = CASES[name].tensors()
    assert_all_close64(pac(CASES[name], given, "loops"), pac(CASES[name], given, "reference"))


@pytest.mark.parametrize("name", SINGLE)
def test_in_single_precision_it_is_as_good_as_torch(name):
    case = CASES[name]
    given = case.tensors(torch.float32)
    truth, plain = pac(case, wide(given), "reference"), pac(case, given, "taps")
    for quantity, value in pac(case, given, "loops").items():
        if quantity in ("grad_blend", "grad_bandwidth"):
            continue  # single sums: in tests/test_ops.py over many draws
        factor = 3.0 if quantity.startswith("grad_") else 2.0
        assert_as_good_as(value, truth[quantity], plain[quantity], factor, name=quantity)


def test_a_row_that_is_left_is_seen(monkeypatch):
    """The twin of the two tests above."""
    case = CASES["a_vector_and_one"]
    given = case.tensors()
    kernel = ops.adapting_kernel(given["guidance"], 3, **case.geometry, backend="reference")
    inputs = given["input"], kernel, given["weight"], given["bias"]
    truth = ops.pac_conv2d(*inputs, **case.options, backend="reference")
    right = planes.Layout.offsets.func
    monkeypatch.setattr(planes.Layout, "offsets", property(lambda lie: right(lie)[::-1]))
    forget_divisions()
    found = ops.pac_conv2d(*inputs, **case.options, backend="loops")
    forget_divisions()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(found, truth)


WINDOWS = {
    "3x3": make_window(3, padding=1),
    "7x7": make_window(7, padding=3),
    "1x1": make_window(1),
    "1x5_valid": make_window((1, 5)),
    "dilated_beyond": make_window(3, padding=20, dilation=20),
    "in_steps": make_window(3, stride=2, padding=1),
    "in_other_steps": make_window((5, 3), stride=(1, 3), padding=2),
    "even": make_window(2, padding=1),
}


@pytest.mark.parametrize("measure", ["square", "absolute"])
@pytest.mark.parametrize("channels", [1, 4, 38])
@pytest.mark.parametrize("name", WINDOWS)
def test_distances_are_those_of_eager(name, channels, measure, shares):
    leaf = torch.randn(2, channels, 18, 17, dtype=torch.float64, requires_grad=True)
    found = {}
    for backend in ("loops", "eager"):
        made = ops.tap_distance(leaf, WINDOWS[name], measure=measure, backend=backend)
        cotangent = torch.linspace(-1, 2, made.numel(), dtype=torch.float64).view(made.shape)
        found[backend] = made.detach(), torch.autograd.grad(made, leaf, cotangent)[0]
    for ours, theirs in zip(found["loops"], found["eager"], strict=True):
        assert_close64(ours, theirs)


@pytest.mark.parametrize("name", ["3x3", "7x7", "in_steps"])
def test_distances_in_single_precision_are_as_good_as_torch(name):
    leaf = torch.randn(1, 128, 15, 14, requires_grad=True)
    found = {}
    for backend, f in (("loops", leaf), ("taps", leaf), ("truth", leaf.detach().double())):
        f = f.detach().requires_grad_()
        by = "reference" if backend == "truth" else backend
        made = ops.tap_distance(f, WINDOWS[name], backend=by)
        found[backend] = made.detach(), torch.autograd.grad(made.sum(), f)[0]
    for factor, ours, theirs, truth in zip(
        (2.0, 3.0), found["loops"], found["taps"], found["truth"], strict=True
    ):
        assert_as_good_as(ours, truth, theirs, factor)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["3x3", "in_steps"])
def test_what_is_no_number_spoils_no_distance_beyond_its_reach(name, value):
    features = torch.randn(2, 5, 9, 21)
    features[0, 2, 0, 0] = features[1, 4, 8, 20] = features[0, 3, 5, 20] = value
    ours, theirs = (
        ops.tap_distance(features, WINDOWS[name], backend=backend) for backend in ("loops", "eager")
    )
    assert_equal(ours.isnan(), theirs.isnan())
    assert_equal(ours.isinf(), theirs.isinf())
    assert not ours.isfinite().all()


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("width", [5, 21])
def test_what_is_no_number_spoils_no_output_beyond_its_reach(width, groups):
    image = torch.randn(2, 8, 6, width)
    image[0, 1, 5, width - 1], image[1, 6, 0, 0] = torch.nan, torch.inf
    weight = torch.randn(8, 8 // groups, 3, 3)
    kernel = torch.ones(2, 1, 9, 6, width)
    made = ops.pac_conv2d(image, kernel, weight, padding=1, groups=groups, backend="loops")
    plain = F.conv2d(image, weight, padding=1, groups=groups)
    assert_equal(made.isnan(), plain.isnan())
    assert_equal(made.isinf(), plain.isinf())
    assert not made.isfinite().all()


def plane_of(window: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor, Any]:
    """(an image, its plane, how that lies)."""
    image = torch.randn(size, dtype=torch.float64)
    lie = planes.whole(window, size)
    room = torch.empty(lie.plane + emit.lanes(torch.float64), dtype=torch.float64)
    plane = room[: lie.plane]
    machine_planes.cut(image.numpy(), plane.numpy(), 0, np.array(lie.numbers))
    return image, plane, lie


def seen_in(plane: Tensor, lie: Any, tap: int) -> Tensor:
    """What a tap sees for all outputs, [H_out, W_out]."""
    H_out, W_out = lie.size
    return plane.as_strided((H_out, W_out), (lie.row, 1), lie.offsets[tap])


@pytest.mark.parametrize("seed", range(30))
def test_in_a_plane_each_tap_is_an_offset(seed):
    drawn = drawn_shape(seed)
    window, size = drawn.window, drawn.image
    image, plane, lie = plane_of(window, size)
    padded = window.padded(image[None, None])
    for tap, truth in enumerate(window.seen(padded, lie.size)):
        assert_equal(seen_in(plane, lie, tap), truth[0, 0])
    back = np.zeros(size)
    machine_planes.add_back(plane.numpy(), back, 0, np.array(lie.numbers))
    reached = torch.from_numpy(back)
    assert_equal(reached[reached != 0], image[reached != 0])


def test_a_plane_of_another_layout_is_seen():
    """The twin of the test above."""
    image, plane, lie = plane_of(make_window(3, padding=1, stride=2), (9, 8))
    truth = F.pad(image, (1, 1, 1, 1))[1::2, 0::2][:5, :4]  # tap (1, 0)
    assert_equal(seen_in(plane, lie, 3), truth)
    with pytest.raises(AssertionError, match="differ by"):
        assert_equal(seen_in(plane, lie, 4), truth)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_rows_of_any_width_are_cut(step):
    for width in (*range(1, 40), 64, 65):
        window = make_window((1, 3), stride=(1, step), padding=(0, 1))
        image, plane, lie = plane_of(window, (2, width))
        padded = window.padded(image[None, None])
        for tap, truth in enumerate(window.seen(padded, lie.size)):
            assert_equal(seen_in(plane, lie, tap), truth[0, 0])


NARROWER = """
import sys
import pytest
from pacswap.ops.loops import emit
import torch
assert emit.lanes(torch.float32) == int(sys.argv[1]), emit.lanes(torch.float32)
sys.exit(pytest.main([*sys.argv[2:], "-q", "-p", "no:cacheprovider", "-o", "addopts="]))
"""

IN_SINGLE = "test_in_single_precision_it_is_as_good_as_torch"
DISTANCES = "test_distances_in_single_precision_are_as_good_as_torch"


@pytest.mark.parametrize(
    ("features", "count"), [("", 4), ("+avx,+avx2,+fma", 8)], ids=["16 bytes", "32 bytes"]
)
def test_with_narrower_vectors_than_this_machines(features, count):
    """numba can be told to compile for a machine that has less."""
    if emit.lanes(torch.float32) < count:
        pytest.skip(f"this machine's vectors have {emit.lanes(torch.float32)} numbers")
    here = Path(__file__)
    tests = [f"{here}::{IN_SINGLE}[{name}]" for name in SINGLE]
    tests += [f"{here}::{DISTANCES}[{name}]" for name in ("3x3", "in_steps")]
    script = [sys.executable, "-c", NARROWER, str(count), *tests]
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        script, env={**os.environ, **settings}, capture_output=True, text=True, cwd=here.parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_plans_keep_no_tensor():
    image, kernel, weight = (
        torch.randn(1, 8, 5, 5),
        torch.rand(1, 1, 9, 5, 5),
        torch.randn(8, 1, 3, 3),
    )
    kept = [weakref.ref(tensor) for tensor in (image, kernel, weight)]
    leaves = [tensor.requires_grad_() for tensor in (image, kernel, weight)]
    made = ops.pac_conv2d(*leaves, padding=1, groups=8, backend="loops")
    made = made.sum() + ops.adapting_kernel(image, 3, padding=1, backend="loops").sum()
    made.backward()
    del image, kernel, weight, leaves, made
    assert [ref() for ref in kept] == [None] * 3


@pytest.mark.parametrize(
    "task",
    [
        None,
        Task((torch.zeros(1, 2, 4, 4),)),
        Task((torch.zeros(1, 2, 4, 4),), channel_wise=True),
        Task((torch.zeros(1, 2, 4, 4, dtype=torch.int32),)),
        Task((torch.zeros(1, 2, 4, 4, device="meta"),)),
    ],
    ids=["any", "plain", "channel_wise", "whole_numbers", "meta"],
)
def test_what_is_chosen_fast_is_what_is_explained(task):
    name = backends.explain("auto", task)[0]
    assert backends.choose("auto", task).__name__.split(".")[2] == name


def test_a_size_that_is_no_number_is_refused_however_often():
    """No cache takes True for 1."""
    assert window.make_window(1).kernel_size == (1, 1)
    with pytest.raises(Exception, match="kernel_size must be an int or a pair of ints, got True"):
        window.make_window(True)
