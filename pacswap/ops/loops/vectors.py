"""Vectors in compiled loops: what numba's compiler does not find by itself.

It vectorises a loop that adds to one sum, and each addition reads and writes that sum. Here the
sums of several outputs stay in registers while taps or channels pass by, which takes instructions
written down one by one. They are LLVM's for vectors of any width, and become those of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

_INDEX, _BYTE = ir.IntType(64), ir.IntType(8)
# By bytes of a number: the least that is not subnormal, digits, the last term of the series of e^x,
# and ln 2 in two parts, of which the first times a whole number is exact.
_EXPONENTIAL = {
    4: (2.0**-126, 23, 7, 355 / 512, math.log(2) - 355 / 512),
    8: (2.0**-1022, 52, 13, 0.6931471803691238, 1.9082149292705877e-10),
}


@lru_cache(maxsize=1)
def vector_bytes() -> int:
    """Of the machine that numba compiles for, which an environment variable may narrow."""
    if config.CPU_FEATURES is not None:
        has = {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    else:
        has = {name for name, there in llvm.get_host_cpu_features().items() if there}
    return 64 if "avx512f" in has else 32 if "avx" in has else 16


def lanes(dtype: torch.dtype) -> int:
    """Numbers of a vector."""
    return vector_bytes() // dtype.itemsize


@intrinsic
def copy(typingctx: Any, like: Any, to: Any, source: Any, count: Any) -> Any:
    """Copy so many numbers of the dtype of `like` from one address to another."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        _, to, source, count = args
        lanes = _INDEX(emit.lanes)
        with builder.if_else(builder.icmp_signed(">=", count, lanes)) as (then, otherwise):
            with then:
                with emit.repeated(builder.udiv(count, lanes)) as i:
                    emit.store(emit.load(emit.vector(source, i)), emit.vector(to, i))
                # The last vector, of which some were copied already.
                start = builder.sub(count, lanes)
                emit.store(emit.load(emit.place(source, start)), emit.place(to, start))
            with otherwise, emit.repeated(count) as i:
                emit.move(emit.place(source, 1, i), emit.place(to, 1, i))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64), code


@intrinsic
def clear(typingctx: Any, like: Any, to: Any, count: Any) -> Any:
    """Zeros for so many numbers of the dtype of `like`, and for the rest of the last vector."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        rounded = builder.add(args[2], _INDEX(emit.lanes - 1))
        with emit.repeated(builder.udiv(rounded, _INDEX(emit.lanes))) as i:
            emit.store(emit.zero(), emit.vector(args[1], i))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64), code


@intrinsic
def every(typingctx: Any, like: Any, to: Any, source: Any, count: Any, step: Any) -> Any:
    """Copy so many numbers of the dtype of `like`, each `step` after the one before."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        with emit.repeated(args[3]) as i:
            emit.move(emit.place(args[2], args[4], i), emit.place(args[1], 1, i))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64, types.int64), code


@intrinsic
def every_other(typingctx: Any, like: Any, to: Any, source: Any, count: Any) -> Any:
    """`every` with a step of 2. Reads nothing before the first number and after the last."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        _, to, source, count = args
        lanes = _INDEX(emit.lanes)
        is_long = builder.icmp_signed(">", count, lanes)
        with builder.if_else(is_long) as (then, otherwise):
            with then:
                whole = builder.udiv(builder.sub(count, _INDEX(1)), lanes)
                with emit.repeated(whole) as i:
                    at = emit.place(source, 2 * emit.lanes, i)
                    emit.store(emit.of_two(at, 0), emit.vector(to, i))
                # The last vector, of which some were copied already.
                start = builder.sub(count, lanes)
                before = emit.place(emit.place(source, start, 2), -1)
                emit.store(emit.of_two(before, 1), emit.place(to, start))
            with otherwise, emit.repeated(count) as i:
                emit.move(emit.place(source, 2, i), emit.place(to, 1, i))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.int64), code


@intrinsic
def number_of(typingctx: Any, bits: Any) -> Any:
    """The float64 of which a whole number holds the bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), code


@intrinsic
def exponentials(typingctx: Any, like: Any, at: Any, count: Any, divisor: Any) -> Any:
    """e^(x / divisor) of so many numbers x, and of the rest of the last vector, in their place.

    Not above 1, and nowhere below the least number that is not subnormal.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        by = emit.all_lanes(args[3])
        rounded = builder.add(args[2], _INDEX(emit.lanes - 1))
        with emit.repeated(builder.udiv(rounded, _INDEX(emit.lanes))) as i:
            place = emit.vector(args[1], i)
            emit.store(emit.exponential(emit.quotient(emit.load(place), by)), place)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.float64), code


class Vectors:
    """Emits instructions on vectors, for an intrinsic.

    Addresses and numbers are values of LLVM, whole numbers of 64 bits. Additions may be fused with
    products, which each says: numba lets what says nothing be reordered. NaN and infinity stay what
    they are.
    """

    def __init__(self, builder: Any, kind: types.Float) -> None:
        self._builder = builder
        self._number = ir.FloatType() if kind.bitwidth == 32 else ir.DoubleType()
        self._size = kind.bitwidth // 8
        self.lanes = vector_bytes() // self._size
        self._vector = ir.VectorType(self._number, self.lanes)

    def parts(self, given: Any) -> list[Any]:
        """The numbers of a tuple."""
        return [self._builder.extract_value(given, i) for i in range(given.type.count)]

    def place(self, address: Any, step: Any, times: Any = 1) -> Any:
        """An address moved on by `step` numbers, so many times."""
        if times == 0:
            return address
        step, times = (_INDEX(n) if isinstance(n, int) else n for n in (step, times))
        moved = self._builder.mul(step, times)
        return self._builder.add(address, self._builder.mul(moved, _INDEX(self._size)))

    def vector(self, address: Any, i: Any) -> Any:
        """The address i vectors on."""
        return self.place(address, self.lanes, i)

    def load(self, address: Any) -> Any:
        """The vector that begins at an address."""
        return self._builder.load(self._at(address), align=self._size)

    def store(self, vector: Any, address: Any) -> None:
        """The reverse."""
        self._builder.store(vector, self._at(address), align=self._size)

    def of_two(self, address: Any, first: int) -> Any:
        """Every other number of the two vectors that begin at an address."""
        pair = self.load(address), self.load(self.vector(address, 1))
        which = [first + 2 * i for i in range(self.lanes)]
        kind = ir.VectorType(ir.IntType(32), self.lanes)
        return self._builder.shuffle_vector(*pair, ir.Constant(kind, which))

    def move(self, source: Any, to: Any) -> None:
        """Copy a number."""
        source, to = (self._builder.inttoptr(a, self._number.as_pointer()) for a in (source, to))
        self._builder.store(self._builder.load(source), to)

    def _at(self, address: Any) -> Any:
        return self._builder.inttoptr(address, self._vector.as_pointer())

    def index(self, address: Any, i: Any) -> Any:
        """The whole number that is the i-th from an address."""
        bytes_on = _INDEX(8 * i) if isinstance(i, int) else self._builder.mul(i, _INDEX(8))
        where = self._builder.add(address, bytes_on)
        return self._builder.load(self._builder.inttoptr(where, _INDEX.as_pointer()))

    def spread(self, address: Any) -> Any:
        """The number at an address, in every lane."""
        return self._in_all(
            self._builder.load(self._builder.inttoptr(address, self._number.as_pointer()))
        )

    def _in_all(self, number: Any) -> Any:
        nothing, position = ir.Constant(self._vector, ir.Undefined), ir.IntType(32)
        first = self._builder.insert_element(nothing, number, position(0))
        zeros = ir.Constant(ir.VectorType(position, self.lanes), [0] * self.lanes)
        return self._builder.shuffle_vector(first, nothing, zeros)

    def lanes_below(self, count: Any) -> Any:
        """Which lanes are among the first `count`."""
        kind = ir.VectorType(_INDEX, self.lanes)
        nothing, position = ir.Constant(kind, ir.Undefined), ir.IntType(32)
        first = self._builder.insert_element(nothing, count, position(0))
        zeros = ir.Constant(ir.VectorType(position, self.lanes), [0] * self.lanes)
        counts = self._builder.shuffle_vector(first, nothing, zeros)
        return self._builder.icmp_signed("<", ir.Constant(kind, list(range(self.lanes))), counts)

    def choose(self, where: Any, a: Any, b: Any) -> Any:
        """A in the lanes of `where`, else b."""
        return a if where is None else self._builder.select(where, a, b)

    def zero(self) -> Any:
        """0 in every lane."""
        return ir.Constant(self._vector, [0.0] * self.lanes)

    def product(self, a: Any, b: Any) -> Any:
        """a·b."""
        return self._builder.fmul(a, b, flags=("contract",))

    def sum(self, a: Any, b: Any) -> Any:
        """A + b; with a product for b, in one instruction where the machine has one."""
        return self._builder.fadd(a, b, flags=("contract",))

    def difference(self, a: Any, b: Any) -> Any:
        """A − b."""
        return self._builder.fsub(a, b, flags=("contract",))

    def quotient(self, a: Any, b: Any) -> Any:
        """A / b."""
        return self._builder.fdiv(a, b, flags=("contract",))

    def absolute(self, a: Any) -> Any:
        """|a|."""
        bits = ir.VectorType(ir.IntType(8 * self._size), self.lanes)
        most = ir.Constant(bits, [(1 << (8 * self._size - 1)) - 1] * self.lanes)
        without_sign = self._builder.and_(self._builder.bitcast(a, bits), most)
        return self._builder.bitcast(without_sign, self._vector)

    def signed(self, s: Any, a: Any) -> Any:
        """S with the sign of a, 0·s where that is 0."""
        zero = self.zero()
        below = self._builder.fcmp_ordered("<", a, zero)
        above = self._builder.fcmp_ordered(">", a, zero)
        neither = self.choose(below, self.difference(zero, s), self.product(zero, s))
        return self.choose(above, s, neither)

    def all_lanes(self, number: Any) -> Any:
        """A float64 in every lane."""
        if self._size == 4:
            number = self._builder.fptrunc(number, self._number)
        return self._in_all(number)

    def exponential(self, x: Any) -> Any:
        """e^x of x ≤ 0, as e^r · 2ⁿ with n the whole number next to x / ln 2; NaN of NaN.

        x is raised to where e^x is nearly subnormal. The series of e^r, |r| ≤ ln 2 / 2, ends where
        its rest is below a tenth of a rounding.
        """
        tiny, digits, terms, high, low = _EXPONENTIAL[self._size]
        least = self._same(math.log(2 * tiny))
        x = self.choose(self._builder.fcmp_ordered("<", x, least), least, x)
        # Beside a number this large there is no room for a fraction: its last digits are n.
        magic = self._same(1.5 * 2.0**digits)
        scaled = self.sum(self.product(x, self._same(1 / math.log(2))), magic)
        n = self.difference(scaled, magic)
        r = self.difference(x, self.product(n, self._same(high)))
        r = self.difference(r, self.product(n, self._same(low)))
        made = self._same(1 / math.factorial(terms))
        for k in reversed(range(terms)):
            made = self.sum(self.product(made, r), self._same(1 / math.factorial(k)))
        bits = ir.VectorType(ir.IntType(8 * self._size), self.lanes)
        last = self._builder.bitcast(scaled, bits)
        one = self._builder.bitcast(self._same(1.0), bits)
        power = self._builder.shl(last, ir.Constant(bits, [digits] * self.lanes))
        power = self._builder.bitcast(self._builder.add(one, power), self._vector)
        return self.product(made, power)

    def _same(self, number: float) -> Any:
        return ir.Constant(self._vector, [number] * self.lanes)

    def sums(self, count: int) -> list[Any]:
        """Places of so many sums, 0 yet; registers, if there are enough."""
        return [cgutils.alloca_once_value(self._builder, self.zero()) for _ in range(count)]

    def add(self, total: Any, value: Any) -> None:
        """Add to a sum."""
        self._builder.store(self.sum(self.total(total), value), total)

    def total(self, total: Any) -> Any:
        """A sum as it is now."""
        return self._builder.load(total)

    def fetch(self, address: Any) -> None:
        """Have the cache get what lies at an address; any address may be named."""
        pointer, flag = _BYTE.as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = self._builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, often, data = flag(0), flag(3), flag(1)
        self._builder.call(function, [self._builder.inttoptr(address, pointer), read, often, data])

    @contextmanager
    def repeated(self, count: Any) -> Iterator[Any]:
        """A loop over range(count)."""
        with cgutils.for_range(self._builder, count, intp=_INDEX) as loop:
            yield loop.index
