"""The loops of the CPU: what they refuse, how they divide the work, and who may call them."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from numerics import (
    CASES,
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pacswap import ops
from pacswap.errors import BackendError
from pacswap.ops import backends, make_window
from pacswap.ops.backends import Task
from pacswap.ops.loops import blocks, dense, distance, grouped, machine_grouped, planes, threads

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

IMAGE = torch.zeros(1, 2, 4, 4)


class Mine(Tensor):
    pass


def task(**changed: Any) -> Task:
    return Task(
        **{"tensors": (IMAGE, torch.ones(1, 1, 9, 4, 4), torch.zeros(2, 2, 3, 3)), **changed}
    )


REFUSED = {
    "whole numbers": (task(tensors=(IMAGE.int(),)), "its loops compute floating-point numbers, and the tensors are torch.int32"),
    "device": (task(tensors=(IMAGE.to("meta"),)), "its loops run on a CPU, and the tensors are on meta"),
    "class": (task(tensors=(IMAGE.as_subclass(Mine),)), "its loops read plain tensors, and one is a Mine"),
    "channels": (task(channel_wise=True), "its loops know one kernel for all channels, not one for each"),
    "asymmetric": (task(measure="asymmetric"), "its loops know no asymmetric difference"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    asked, reason = REFUSED[name]
    can = "'reference', 'taps', 'eager'"
    with pytest.raises(BackendError) as raised:
        ops.explain("loops", asked)
    assert str(raised.value) == f"backend='loops' cannot run this call: {reason}. Can: {can}."
    assert ops.explain("auto", asked) == (
        "eager",
        "tap by tap, keeps only input, kernel and weight for the backward pass; "
        f"triton is out: {backends.why_not('triton', asked)}; loops is out: {reason}",
    )


def test_the_estimate_is_that_of_the_model():
    tensors = torch.ones(1, 8, 28, 28), torch.ones(1, 1, 9, 28, 28), torch.ones(30, 8, 3, 3)
    _, reason = ops.explain("auto", Task(tensors, make_window(3, padding=1)))
    # writing costs as much as 6 products
    cost = "(about 1.20 times it, forward, by the model of docs/performance.md)"
    assert reason.startswith(f"compiled loops, near the price of the convolution on a CPU {cost}; ")


WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "numba":
            raise {fault}

sys.meta_path.insert(0, Missing())
import torch
from pacswap import ops
from pacswap.ops import backends
print(backends.why_not("loops"))
x = torch.ones(1, 2, 4, 4)
K = ops.adapting_kernel(x, 3, padding=1)
print(ops.explain()[0], ops.pac_conv2d(x, K, torch.ones(2, 2, 3, 3), padding=1).shape)
"""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ('ModuleNotFoundError("no numba", name="numba")', "numba is not installed (pip install numba)"),
        ('ImportError("Numba needs NumPy 9")', "numba is broken: Numba needs NumPy 9"),
    ],
)  # fmt: skip
def test_where_numba_is_missing_or_broken_eager_does_it(fault, reason):
    script = [sys.executable, "-c", WITHOUT.format(fault=fault)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.stdout.splitlines() == [reason, "eager torch.Size([1, 2, 4, 4])"], done.stderr


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_nothing_watches_or_transforms_what_it_cannot_see():
    watched = "its loops are opaque to what traces or watches torch's operations now"
    seen = []
    with TorchDispatchMode():
        seen.append(backends.why_not("loops"))
    traced = lambda x: (seen.append(backends.why_not("loops")), x + 1)[1]  # noqa: E731
    torch.jit.trace(traced, IMAGE, check_trace=False)
    assert seen == [watched, watched]
    found = []
    torch.func.vmap(lambda x: (found.append(backends.why_not("loops")), x)[1])(IMAGE)
    assert found == ["its loops are opaque to torch.func"]
    assert backends.why_not("loops") is None


LARGE = {
    "many_channels": Case(padding=1, channels=(70, 9), image=(2, 23, 19)),
    "strided": Case(5, stride=(2, 3), padding=2, channels=(33, 40), image=(1, 41, 37)),
    "beyond_the_image": Case(padding=12, dilation=12, channels=(20, 6), image=(2, 20, 22)),
    "one_axis_beyond": Case((3, 5), padding=(0, 20), dilation=(1, 10), channels=(6, 8), image=(1, 9, 14)),
    "more_border_than_image": Case(padding=6, channels=(6, 5), image=(1, 5, 4)),
    "groups": Case(padding=1, groups=3, channels=(18, 12), image=(2, 17, 15)),
    "groups_beyond": Case(padding=8, dilation=8, groups=2, channels=(8, 4), image=(1, 12, 10)),
    "depthwise": Case(7, padding=3, groups=12, channels=(12, 24), image=(2, 25, 18)),
    "depthwise_strided": Case(3, stride=(3, 2), padding=1, groups=5, channels=(5, 5), image=(1, 31, 28)),
    "replicate": Case(padding=2, dilation=2, padding_mode="replicate", channels=(9, 7), image=(2, 14, 11)),
}  # fmt: skip


def forget_divisions() -> None:
    """How work was divided before a test changed how it is."""
    for known in (blocks.forward_blocks, blocks.backward_blocks, blocks._shape):
        known.cache_clear()
    for known in (planes.layout, planes.whole):
        known.cache_clear()
    for known in (distance.planned, grouped.planned, grouped.planned_back):
        known.cache_clear()


@pytest.fixture(params=["as it is", "small", "two threads", "three threads, small"])
def division(request, monkeypatch):
    """How the work is divided: into chunks and pieces, and among threads."""
    if "small" in request.param:
        for name, value in (("_CACHE", 900), ("_LEAST", 1), ("_DEEP", 20)):
            monkeypatch.setattr(blocks, name, value)
        monkeypatch.setattr(dense, "_LEAST_DOTS", 1)
        monkeypatch.setattr("pacswap.ops.loops.planes._CACHE", 300)
    forget_divisions()
    if "threads" in request.param:
        monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
        torch.set_num_threads(2 if "two" in request.param else 3)
    yield request.param
    torch.set_num_threads(1)
    forget_divisions()


@pytest.mark.parametrize("name", LARGE)
def test_however_the_work_is_divided_it_is_the_reference(name, division):
    given = LARGE[name].tensors()
    assert_all_close64(pac(LARGE[name], given, "loops"), pac(LARGE[name], given, "reference"))


@pytest.mark.parametrize("name", ["many_channels", "beyond_the_image", "depthwise"])
def test_in_single_precision_it_is_as_good_as_torch(name):
    case = LARGE[name]
    given = case.tensors(torch.float32)
    truth, plain = pac(case, wide(given), "reference"), pac(case, given, "taps")
    for quantity, value in pac(case, given, "loops").items():
        if quantity in ("grad_blend", "grad_bandwidth"):
            continue  # single sums: in tests/test_ops.py over many draws
        factor = 3.0 if quantity.startswith("grad_") else 2.0
        assert_as_good_as(value, truth[quantity], plain[quantity], factor, name=quantity)


def test_a_forgotten_chunk_is_seen(monkeypatch):
    """The twin of the two tests above."""
    case = LARGE["many_channels"]
    given = case.tensors()
    truth = pac(case, given, "reference")
    monkeypatch.setattr(blocks, "_CACHE", 900)
    forget_divisions()
    whole = dense.forward_blocks
    lost = lambda *a: replace(whole(*a), chunks=whole(*a).chunks[:-1])  # noqa: E731
    monkeypatch.setattr(dense, "forward_blocks", lost)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(pac(case, given, "loops")["output"], truth["output"])
    forget_divisions()


def test_nan_and_infinity_stay_what_they_are():
    case = CASES["3x3_p1"]
    given = case.tensors(torch.float32)
    given["input"][0, 1, 2, 3], given["input"][1, 0, 0, 0] = torch.nan, torch.inf
    kernel = torch.ones(2, 1, 9, 7, 8)
    made = ops.pac_conv2d(given["input"], kernel, given["weight"], padding=1, backend="loops")
    plain = torch.conv2d(given["input"], given["weight"], padding=1)
    assert_equal(made.isnan(), plain.isnan())
    assert_equal(made.isinf(), plain.isinf())
    assert made.isnan().any() and made.isinf().any()


def test_a_far_guidance_gives_no_subnormal_numbers():
    """With which a CPU computes a hundred times as long."""
    guidance = 9 * torch.randn(1, 64, 6, 6, requires_grad=True)
    kernel = ops.adapting_kernel(guidance, 3, padding=1)
    tiny = torch.finfo(torch.float32).tiny
    assert ((kernel == 1) | (kernel >= tiny)).all() and kernel.min() < 1e-37
    assert torch.autograd.grad(kernel.sum(), guidance)[0].isfinite().all()
    assert torch.exp(torch.tensor(-90.0)) < tiny  # what it would be


def test_two_threads_of_python_at_once(monkeypatch):
    forget_divisions()
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    names = ["many_channels", "depthwise", "groups", "strided"]
    truths = {name: pac(LARGE[name], LARGE[name].tensors(), "reference") for name in names}
    found: dict[str, Any] = {}

    def compute(name: str) -> None:
        torch.set_num_threads(2)
        for _ in range(5):
            found[name] = pac(LARGE[name], LARGE[name].tensors(), "loops")

    workers = [threading.Thread(target=compute, args=(name,)) for name in names]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    for name in names:
        assert_all_close64(found[name], truths[name])


def test_without_an_entry_to_openmp_one_thread_does_it_all(monkeypatch):
    monkeypatch.setattr(threads, "_parallel", lambda: None)
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    forget_divisions()
    torch.set_num_threads(2)
    assert threads.parts(100, 1 << 30) == 1
    case = LARGE["depthwise"]
    assert_all_close64(pac(case, case.tensors(), "loops"), pac(case, case.tensors(), "reference"))
    torch.set_num_threads(1)
    forget_divisions()


def test_torchs_own_threads_are_lent():
    """The entry is that of the OpenMP which torch has loaded."""
    assert threads._parallel() is not None
    torch.set_num_threads(2)
    assert threads.parts(100, 1 << 30) == 2 and threads.parts(1, 1 << 30) == 1
    assert threads.parts(100, 10) == 1
    torch.set_num_threads(1)


def test_inference_mode():
    case = CASES["3x3_p1"]
    given = case.tensors()
    truth = pac(case, given, "reference", derivatives=False)
    with torch.inference_mode():
        found = pac(case, given, "loops", derivatives=False)
    assert_all_close64(found, truth)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_forward_derivatives_are_not_lost():
    case = CASES["3x3_p1"]
    given = case.tensors()
    kernel = torch.ones(2, 1, 9, 7, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given["input"], torch.ones_like(given["input"]))
        found = ops.pac_conv2d(dual, kernel, given["weight"], padding=1)
        tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
        ones = torch.ones_like(given["input"])
        expected = torch.nn.functional.conv2d(ones, given["weight"], padding=1)
        assert_all_close64({"tangent": tangent}, {"tangent": expected})
        with pytest.raises(BackendError, match="opaque to forward-mode differentiation"):
            ops.pac_conv2d(dual, kernel, given["weight"], padding=1, backend="loops")


FEWER = """
import torch
from pacswap import ops
from pacswap.ops.loops import threads
threads._WORTH_A_THREAD = 1
torch.set_num_threads(2)
x, w, K = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.rand(1, 1, 9, 9, 9)
made, true = (
    ops.pac_conv2d(x, K, w, padding=1, groups=8, backend=b) for b in ("loops", "reference")
)
assert threads.parts(8, 1 << 20) == 2
assert (made - true).abs().max() < 1e-5, (made - true).abs().max()
"""


@pytest.mark.parametrize("setting", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true"])
def test_all_is_computed_where_openmp_gives_fewer_threads(setting):
    environment = {**os.environ, **dict([setting.split("=")])}
    done = subprocess.run([sys.executable, "-c", FEWER], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_part_that_does_not_come_to_its_end_is_seen(monkeypatch):
    monkeypatch.setattr(threads, "_parallel", lambda: lambda *given: None)
    with pytest.raises(RuntimeError, match="0 of 2 parts of a compiled loop came to their end"):
        threads.shared(machine_grouped.grouped, IMAGE, 2, 2, [0] * 8)


NO_MIRROR = {
    "four": Case((1, 4), padding=(0, 1), channels=(3, 3), image=(2, 1, 9)),
    "seven_strided": Case((1, 7), stride=(1, 2), padding=(0, 3), channels=(3, 3), image=(2, 1, 9)),
}


@pytest.mark.parametrize("name", NO_MIRROR)
def test_gradients_of_a_distance_stay_in_their_memory(name):
    """In a row of its own, what lies after the last output belongs to others."""
    case = NO_MIRROR[name]
    given = case.tensors()
    for _ in range(20):
        assert_all_close64(pac(case, given, "loops"), pac(case, given, "reference"))


def test_lazy_signs_and_zeros_without_memory_are_numbers():
    case = CASES["3x3_p1"]
    given = case.tensors()
    truth = pac(case, {**given, "input": -given["input"]}, "reference", derivatives=False)
    lazy = torch._neg_view(given["input"])
    assert lazy.is_neg()
    found = pac(case, {**given, "input": lazy}, "loops", derivatives=False)
    assert_close64(found["output"], truth["output"])
    none = torch._efficientzerotensor(given["input"].shape, dtype=torch.float64)
    kernel = torch.ones(2, 1, 9, 7, 8, dtype=torch.float64)
    made = ops.pac_conv2d(none, kernel, given["weight"], padding=1, backend="loops")
    assert_equal(made, torch.zeros_like(made))


@pytest.mark.parametrize("groups", [1, 4])
def test_infinity_in_the_middle_spoils_no_gradient_beyond_its_reach(groups):
    given = Case(padding=1, channels=(4, 4), groups=groups, image=(1, 6, 7)).tensors()
    given["input"][0, 1, 3, 6] = torch.inf
    leaves = [given["input"], torch.rand(1, 1, 9, 6, 7).double(), given["weight"]]
    found = {}
    for backend in ("loops", "eager"):
        x, K, w = (leaf.clone().requires_grad_() for leaf in leaves)
        y = ops.pac_conv2d(x, K, w, padding=1, groups=groups, backend=backend)
        found[backend] = torch.autograd.grad(y, (x, K, w), torch.ones_like(y))
    for ours, theirs in zip(found["loops"], found["eager"], strict=True):
        assert_equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_distances_in_half_precision(dtype):
    guidance = torch.randn(1, 3, 5, 6, dtype=dtype)
    found, eager = (
        ops.tap_distance(guidance, make_window(3, padding=1), backend=b) for b in ("loops", "eager")
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), eager.float(), rtol=0.02, atol=0.02)


def test_a_guidance_of_no_channels():
    kernel = ops.adapting_kernel(torch.zeros(2, 0, 4, 5), 3, padding=1, backend="loops")
    assert_equal(kernel, torch.ones(2, 1, 9, 4, 5))
