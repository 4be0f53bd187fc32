"""Blocks of sums in vector registers: of this machine's vectors, and of those that others have."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from numerics import Case, assert_all_close64, assert_as_good_as, fresh_memory_is_nan, pac, wide

from pacswap import ops
from pacswap.ops.loops import machine_dense, moves, registers, threads
from pacswap.ops.loops.registers import ACROSS, COLUMNS

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

AXES = (1, 2, 3)  # of vectors of 16, 32 and 64 bytes
DTYPES = (np.float32, np.float64)


@numba.njit
def multiply(like, across, a, b, c, total, run, jump, add):  # type: ignore[no-untyped-def]
    if across == 3:
        registers.multiply(like, 3, a, b, c, total, run, jump, add)
    else:
        registers.multiply(like, 2, a, b, c, total, run, jump, add)


@numba.njit
def multiply_turned(like, a, apart, b, c, total, run, jump, add):  # type: ignore[no-untyped-def]
    registers.multiply_turned(like, 2, a, apart, b, c, total, run, jump, add)


@numba.njit
def pull_turned(like, a, apart, b, total, rows, table, v, K, found, dots):  # type: ignore[no-untyped-def]
    registers.pull_turned(like, 2, a, apart, b, total, rows, table, v, K, found, dots)


@numba.njit
def weigh(like, a, b, c, total, run, jump):  # type: ignore[no-untyped-def]
    registers.weigh(like, 3, a, b, c, total, run, jump)


@numba.njit
def pull(like, a, b, total, rows, table, v, K, found, dots):  # type: ignore[no-untyped-def]
    registers.pull(like, 3, a, b, total, rows, table, v, K, found, dots)


@numba.njit
def adapt(like, K, line, v, channel, into, apart, table, taps, channels):  # type: ignore[no-untyped-def]
    registers.adapt(like, 2, K, line, v, channel, into, apart, table, taps, channels)


@numba.njit
def few(like, rest, is_even):  # type: ignore[no-untyped-def]
    return machine_dense.few(like, rest, is_even)


@numba.njit
def move(like, what, a, b, c, d):  # type: ignore[no-untyped-def]
    if what == 0:
        moves.turn(like, a, b, c, d)
    elif what == 1:
        moves.add(like, a, b, c)
    elif what == 2:
        moves.copy_rows(like, 2, a, d, b, 2 * d, c, 1)
    else:
        moves.add_steps(like, a, b, c, d)


class Machine:
    """Vectors of so many axes, and numbers to compute with."""

    def __init__(self, axes: int, dtype: Any) -> None:
        self.like = np.empty((0,) * axes, dtype)
        self.lanes, self.rows = (
            registers.lanes_of(axes, self.like.itemsize),
            registers.rows_of(axes),
        )
        self.wide, self.step = ACROSS * self.lanes, max(self.lanes, self.rows)
        self._draw, self._close = np.random.default_rng(0), 1e-5 if dtype is np.float32 else 1e-13

    def drawn(self, *shape: int) -> Any:
        return self._draw.standard_normal(shape).astype(self.like.dtype)

    def same(self, value: Any, truth: Any) -> None:
        """Raise unless they agree."""
        np.testing.assert_allclose(value, truth, rtol=0, atol=self._close * abs(truth).max())


@pytest.fixture(params=[(axes, dtype) for axes in AXES for dtype in DTYPES], ids=str)
def machine(request):
    return Machine(*request.param)


def at(array: Any) -> int:
    return array.ctypes.data


@pytest.mark.parametrize("across", [2, 3])
@pytest.mark.parametrize("add", [0, 1])
def test_a_block_is_the_sum_of_outer_products(machine, across, add):
    m, columns = machine, across * machine.lanes
    a, b, c = m.drawn(3, 9, m.step), m.drawn(21, m.wide), m.drawn(m.rows, m.wide)
    truth = add * c + 0.0
    truth[:, :columns] += np.einsum("kr,kw->rw", a[:, :7, : m.rows].reshape(21, -1), b[:, :columns])
    truth[:, columns:] = c[:, columns:]
    multiply(m.like, across, at(a), at(b), at(c), 21, 7, 2 * m.step, add)
    m.same(c, truth)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        m.same(c, truth + 0.01 * (np.arange(m.rows) == 1)[:, None])


@pytest.mark.parametrize("add", [0, 1])
def test_a_few_columns_are_computed_in_vectors_of_rows(machine, add):
    m = machine
    if m.step > m.wide:
        pytest.skip("a panel has more rows than a row of sums has numbers: never done")
    a, b, c = m.drawn(2, 3, 9, m.step), m.drawn(21, m.wide), m.drawn(2, m.step, m.wide)
    truth = c.copy()
    made = np.einsum("qkr,kw->qwr", a[:, :, :7].reshape(2, 21, m.step), b[:, :COLUMNS])
    truth[:, :COLUMNS, : m.step] = add * truth[:, :COLUMNS, : m.step] + made
    multiply_turned(m.like, at(a), a[0].size, at(b), at(c), 21, 7, 2 * m.step, add)
    m.same(c, truth)


def test_no_products_leave_zeros(machine):
    m = machine
    c = m.drawn(m.rows, m.wide)
    multiply(m.like, 3, 0, 0, at(c), 0, 1, 0, 0)
    np.testing.assert_array_equal(c, 0)


def test_a_sum_over_outputs_takes_block_after_block(machine):
    m = machine
    total = m.wide + 5
    a, b, c = m.drawn(2, m.rows, m.wide), m.drawn(total, m.wide), m.drawn(m.rows, m.wide)
    truth = c + np.concatenate([a[0], a[1, :, :5]], 1) @ b
    weigh(m.like, at(a), at(b), at(c), total, m.wide, (m.rows - 1) * m.wide)
    m.same(c, truth)


def test_both_gradients_of_a_block(machine):
    m, rows = machine, machine.rows - 1  # the last row belongs to nothing
    a, b = m.drawn(10, m.step), m.drawn(10, m.wide)
    v, K, found, dots = (m.drawn(300) for _ in range(4))
    table = np.random.default_rng(1).integers(0, 250 - m.wide, (m.rows, 2))
    truth = found.copy(), dots.copy()
    for (there, here), Z in zip(table[:rows], (a.T @ b)[:rows], strict=True):
        truth[0][there : there + m.wide] += K[here : here + m.wide] * Z
        truth[1][here : here + m.wide] += v[there : there + m.wide] * Z
    pull(m.like, at(a), at(b), 10, rows, at(table), at(v), at(K), at(found), at(dots))
    m.same(found, truth[0])
    m.same(dots, truth[1])


def test_both_gradients_of_a_few_columns(machine):
    m, rows = machine, 2 * machine.step - 1
    a, b = m.drawn(2, 10, m.step), m.drawn(10, m.wide)
    v, K, found, dots = (m.drawn(300) for _ in range(4))
    table = np.random.default_rng(1).integers(0, 290, (2 * m.step, 2))
    truth = found.copy(), dots.copy()
    made = np.einsum("qkr,kw->qrw", a, b[:, :COLUMNS]).reshape(-1, COLUMNS)
    for (there, here), Z in zip(table[:rows], made[:rows], strict=True):
        truth[0][there : there + COLUMNS] += K[here : here + COLUMNS] * Z
        truth[1][here : here + COLUMNS] += v[there : there + COLUMNS] * Z
    places = at(v), at(K), at(found), at(dots)
    pull_turned(m.like, at(a), a[0].size, at(b), 10, rows, at(table), *places)
    m.same(found, truth[0])
    m.same(dots, truth[1])
    with pytest.raises(AssertionError, match="Mismatched elements"):
        m.same(dots, truth[1] + 0.01 * (np.arange(300) == table[0, 1]))


def test_what_taps_see_times_their_factors(machine):
    m = machine
    K, v, table = m.drawn(2, 60), m.drawn(3, 90), np.array([4, 17])
    into = np.zeros((2, 4, m.wide), m.like.dtype)
    adapt(m.like, at(K), 60, at(v), 90, at(into), 4 * m.wide, at(table), 2, 3)
    columns = 2 * m.lanes
    for t, start in enumerate(table):
        m.same(into[t, :3, :columns], K[t, :columns] * v[:, start : start + columns])
    assert (into[:, 3] == 0).all() and (into[:, :, columns:] == 0).all()


def test_a_square_is_turned(machine):
    m = machine
    source, into = m.drawn(m.lanes, m.lanes + 3), np.zeros((m.lanes, m.lanes), m.like.dtype)
    lines, places = np.arange(m.lanes) * (m.lanes + 3), np.arange(m.lanes)[::-1] * m.lanes
    move(m.like, 0, at(source), at(lines), at(into), at(np.ascontiguousarray(places)))
    np.testing.assert_array_equal(into[::-1], source[:, : m.lanes].T)


@pytest.mark.parametrize("count", [0, 1, 7, 15, 16, 35])
def test_so_many_are_added_and_no_more(machine, count):
    m = machine
    into, source = m.drawn(80), m.drawn(40)
    truth, steps = into.copy(), into.copy()
    truth[:count] += source[:count]
    steps[: 2 * count : 2] += source[:count]
    other = into.copy()
    move(m.like, 1, at(into), at(source), count, 0)
    np.testing.assert_array_equal(into, truth)
    move(m.like, 3, at(other), at(source), count, 2)
    np.testing.assert_array_equal(other, steps)


def test_every_second_number_of_some_rows(machine):
    m = machine
    into, source = np.zeros((3, m.lanes), m.like.dtype), m.drawn(3, 2 * m.lanes)
    move(m.like, 2, at(into), at(source), 3, m.lanes)
    np.testing.assert_array_equal(into, source[:, ::2])


SMALL = {
    "odd": Case(padding=1, channels=(13, 11), image=(2, 9, 17)),
    "one_pixel": Case(padding=1, channels=(5, 3), image=(1, 1, 1)),
    "one_channel": Case(padding=1, channels=(1, 9), groups=1, image=(1, 5, 6)),
    "grouped": Case(padding=1, groups=3, channels=(9, 6), image=(1, 7, 6)),
    "strided": Case(3, stride=(2, 3), padding=1, channels=(10, 9), image=(1, 12, 19)),
    "a_few_columns": Case(padding=1, channels=(17, 32), image=(2, 7, 7)),
    "a_few_of_two_vectors": Case(padding=1, channels=(5, 32), image=(1, 5, 8)),
    "no_border": Case((2, 3), channels=(6, 10), image=(1, 8, 21)),
    "beyond": Case(padding=6, dilation=6, channels=(10, 9), image=(2, 8, 11)),
}


@pytest.fixture(params=AXES, ids=["16 bytes", "32 bytes", "64 bytes"])
def vectors(request, monkeypatch):
    """As if the machine had such vectors."""
    monkeypatch.setattr(registers, "vector_axes", lambda: request.param)
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    yield request.param
    torch.set_num_threads(1)


def assert_good(case: Case) -> None:
    """Raise unless the output and every gradient are as exact as torch's operations make them."""
    given = case.tensors(torch.float32)
    truth, plain = pac(case, wide(given), "reference"), pac(case, given, "taps")
    found = pac(case, given, "loops")
    for quantity in ("output", "grad_input", "grad_guidance", "grad_weight"):
        named = {"factor": 3.0 if quantity.startswith("grad_") else 2.0, "name": quantity}
        assert_as_good_as(found[quantity], truth[quantity], plain[quantity], **named)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("count", [1, 5])  # five threads are more than there is work
def test_it_is_the_reference(name, count, monkeypatch):
    monkeypatch.setattr(threads, "_WORTH_A_THREAD", 1)
    torch.set_num_threads(count)
    given = SMALL[name].tensors()
    assert_all_close64(pac(SMALL[name], given, "loops"), pac(SMALL[name], given, "reference"))
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("count", [1, 5])
def test_with_other_vectors_it_is_as_good_as_torch(name, count, vectors):
    torch.set_num_threads(count)
    assert_good(SMALL[name])


@pytest.mark.parametrize("count", range(1, 49))
def test_any_number_of_columns(count, vectors):
    """Of which some are computed in vectors of rows."""
    assert_good(Case((1, 3), padding=(0, 1), channels=(3, 16), image=(1, 1, count)))


@pytest.mark.parametrize("channels", [16, 17, 24, 40])
@pytest.mark.parametrize("count", [1, 3])  # a thread may begin within a panel
def test_a_few_columns_of_any_number_of_rows(channels, count, vectors):
    torch.set_num_threads(count)
    for size in ((7, 7), (3, 13), (5, 11)):
        assert_good(Case(padding=1, channels=(11, channels), image=(2, *size)))


def test_a_wrong_column_is_seen(monkeypatch):
    """The twin of the tests above."""
    right = ops.pac_conv2d

    def shifted(*given: Any, **options: Any) -> torch.Tensor:
        return right(*given, **options).roll(int(options["backend"] == "loops"), -1)

    monkeypatch.setattr(ops, "pac_conv2d", shifted)
    with pytest.raises(AssertionError, match="× baseline"):
        assert_good(SMALL["a_few_columns"])


@pytest.mark.parametrize("channels", [(16, 32), (256, 16), (1024, 8), (384, 384)], ids=str)
def test_long_sums_are_as_exact_as_torchs(channels):
    """Channels are summed up piece by piece, forward and for K's gradient; 384 are depthwise."""
    groups = 384 if channels == (384, 384) else 1
    shapes = (1, channels[0], 10, 10), (1, 1, 9, 10, 10), (channels[1], channels[0] // groups, 3, 3)
    given = [torch.rand(shape) - 0.5 for shape in shapes]
    cotangent = torch.randn(1, channels[1], 10, 10)

    def made(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in given]
        output = ops.pac_conv2d(*leaves, padding=1, groups=groups, backend=backend)
        return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(dtype))]

    truth, plain = made("reference", torch.float64), made("taps", torch.float32)
    for value, true, baseline in zip(made("loops", torch.float32), truth, plain, strict=True):
        assert_as_good_as(value, true, baseline, 2.0)
    error = (plain[2].double() - truth[2]).abs().max()
    with pytest.raises(AssertionError, match="× baseline"):  # the twin
        assert_as_good_as(plain[2] + 5 * error.float(), truth[2], plain[2], 2.0)


def test_which_columns_are_computed_in_vectors_of_rows():
    like = np.empty((0, 0, 0), np.float32)  # 16 lanes, panels of 16 rows
    asked = {rest: few(like, rest, True) for rest in range(1, 49)}
    assert [*asked.values()] == [*range(1, 13), 0, 0, 0, 0] * 3
    assert not any(few(like, rest, False) for rest in asked)
    short = np.empty(0, np.float32)  # 4 lanes, panels of 8 rows: no room beside two vectors
    assert [few(short, n, True) for n in (3, 4, 7, 8, 9)] == [3, 0, 3, 0, 0]


def test_a_run_is_like_the_one_before():
    """Threads add in an order of their own choice to nothing."""
    torch.set_num_threads(2)
    case = Case(padding=1, channels=(64, 48), image=(2, 24, 31))
    given = case.tensors(torch.float32)
    first = pac(case, given, "loops")
    for _ in range(5):
        again = pac(case, given, "loops")
        for name, value in first.items():
            torch.testing.assert_close(again[name], value, rtol=0, atol=0)
    torch.set_num_threads(1)


@pytest.mark.skipif(registers.vector_axes() != 3, reason="this machine has no such vectors")
def test_sums_stay_in_registers():
    """The loop over k has 24 products and writes nothing to memory."""
    kinds = (numba.typeof(np.empty((0, 0, 0), np.float32)), *[numba.int64] * 8)
    multiply.compile(kinds)
    code = multiply.inspect_asm(kinds)
    loops = [part for part in code.split("\n.LBB") if part.count("vfmadd") == 24]
    assert loops, "no loop with 24 products"
    for part in loops:
        stores = [line for line in part.splitlines() if "zmm" in line and line.endswith(")")]
        assert not stores, stores
