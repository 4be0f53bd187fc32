"""Instructions on vectors, written down for numba's compiler one by one.

It vectorises a loop that adds to one sum, and each addition reads and writes that sum. Where the
sums of several outputs are to stay in registers while taps or channels pass by, an intrinsic says
so in LLVM's instructions for vectors of any width; they become those of the machine.
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

from pacswap.ops.forms import LEAST

INT, LANE = ir.IntType(64), ir.IntType(32)
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


class Vectors:
    """Emits instructions on vectors, for an intrinsic.

    Addresses and numbers are values of LLVM, whole numbers of 64 bits. Additions may be fused with
    products, which each says: numba lets what says nothing be reordered. NaN and infinity stay what
    they are.
    """

    def __init__(self, builder: Any, kind: types.Float, lanes: int | None = None) -> None:
        self.to = builder
        self.size = kind.bitwidth // 8
        self.number = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.lanes = lanes or vector_bytes() // self.size
        self.bytes = self.lanes * self.size
        self.kind = ir.VectorType(self.number, self.lanes)
        self._bits = ir.VectorType(ir.IntType(8 * self.size), self.lanes)

    def parts(self, given: Any) -> list[Any]:
        """The numbers of a tuple."""
        return [self.to.extract_value(given, i) for i in range(given.type.count)]

    def place(self, address: Any, step: Any, times: Any = 1) -> Any:
        """An address moved on by `step` numbers, so many times."""
        if times == 0:
            return address
        step, times = (INT(n) if isinstance(n, int) else n for n in (step, times))
        moved = self.to.mul(step, times)
        return self.to.add(address, self.to.mul(moved, INT(self.size)))

    def nth(self, address: Any, i: Any) -> Any:
        """The address i vectors on."""
        return self.place(address, self.lanes, i)

    def at(self, address: Any, offset: Any = 0, times: int = 1) -> Any:
        """An address so many times `times` bytes further."""
        if isinstance(offset, int):
            return self.to.add(address, INT(offset * times))
        return self.to.add(address, self.to.mul(offset, INT(times)))

    def load(self, address: Any, kind: Any = None) -> Any:
        """The vector that begins at an address, or what `kind` says."""
        place = self.to.inttoptr(address, (kind or self.kind).as_pointer())
        return self.to.load(place, align=self.size)

    def store(self, value: Any, address: Any) -> None:
        """The reverse, of vectors and numbers."""
        place = self.to.inttoptr(address, value.type.as_pointer())
        self.to.store(value, place, align=self.size)

    def of_two(self, address: Any, first: int) -> Any:
        """Every other number of the two vectors that begin at an address."""
        pair = self.load(address), self.load(self.nth(address, 1))
        return self.shuffled(*pair, [first + 2 * i for i in range(self.lanes)])

    def move(self, source: Any, to: Any) -> None:
        """Copy a number."""
        self.store(self.load(source, self.number), to)

    def shuffled(self, one: Any, other: Any, lanes: list[int]) -> Any:
        """Lanes of two vectors, those of the other counted on."""
        return self.to.shuffle_vector(
            one, other, ir.Constant(ir.VectorType(LANE, len(lanes)), lanes)
        )

    def index(self, address: Any, i: Any) -> Any:
        """The whole number that is the i-th from an address."""
        return self.load(self.at(address, i, 8), INT)

    def spread(self, address: Any) -> Any:
        """The number at an address, in every lane."""
        return self.in_all(self.load(address, self.number))

    def in_all(self, value: Any) -> Any:
        """A number in every lane."""
        nothing = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.to.insert_element(nothing, value, LANE(0))
        return self.shuffled(first, nothing, [0] * self.lanes)

    def rounded(self, value: Any) -> Any:
        """A float64 as a number of these vectors."""
        return self.to.fptrunc(value, self.number) if self.size == 4 else value

    def lanes_below(self, count: Any) -> Any:
        """Which lanes are among the first `count`."""
        each = ir.Constant(ir.VectorType(INT, self.lanes), list(range(self.lanes)))
        return self.to.icmp_signed("<", each, self.in_all(count))

    def choose(self, where: Any, a: Any, b: Any) -> Any:
        """A in the lanes of `where`, else b."""
        return a if where is None else self.to.select(where, a, b)

    def zero(self) -> Any:
        """0 in every lane."""
        return self._same(0.0)

    def product(self, a: Any, b: Any) -> Any:
        """a·b."""
        return self.to.fmul(a, b, flags=("contract",))

    def sum(self, a: Any, b: Any) -> Any:
        """A + b; with a product for b, in one instruction where the machine has one."""
        return self.to.fadd(a, b, flags=("contract",))

    def times_plus(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c, rounded once where the machine can."""
        kind = ir.FunctionType(a.type, [a.type] * 3)
        name = f"llvm.fmuladd.v{a.type.count}f{8 * self.size}"
        function = cgutils.get_or_insert_function(self.to.module, kind, name)
        return self.to.call(function, [a, b, c])

    def difference(self, a: Any, b: Any) -> Any:
        """A − b."""
        return self.to.fsub(a, b, flags=("contract",))

    def quotient(self, a: Any, b: Any) -> Any:
        """A / b."""
        return self.to.fdiv(a, b, flags=("contract",))

    def absolute(self, a: Any) -> Any:
        """|a|."""
        most = ir.Constant(self._bits, [(1 << (8 * self.size - 1)) - 1] * self.lanes)
        without_sign = self.to.and_(self.to.bitcast(a, self._bits), most)
        return self.to.bitcast(without_sign, self.kind)

    def signed(self, s: Any, a: Any) -> Any:
        """S with the sign of a, 0·s where that is 0."""
        zero = self.zero()
        below = self.to.fcmp_ordered("<", a, zero)
        above = self.to.fcmp_ordered(">", a, zero)
        neither = self.choose(below, self.difference(zero, s), self.product(zero, s))
        return self.choose(above, s, neither)

    def exponential(self, x: Any) -> Any:
        """e^x of x ≤ 0, as e^r · 2ⁿ with n the whole number next to x / ln 2; NaN of NaN.

        x is raised to where `forms.exponential` raises it. The series of e^r, |r| ≤ ln 2 / 2, ends
        where its rest is below a tenth of a rounding.
        """
        tiny, digits, terms, high, low = _EXPONENTIAL[self.size]
        least = self._same(math.log(LEAST * tiny))
        x = self.choose(self.to.fcmp_ordered("<", x, least), least, x)
        # Beside a number this large there is no room for a fraction: its last digits are n.
        magic = self._same(1.5 * 2.0**digits)
        scaled = self.sum(self.product(x, self._same(1 / math.log(2))), magic)
        n = self.difference(scaled, magic)
        r = self.difference(x, self.product(n, self._same(high)))
        r = self.difference(r, self.product(n, self._same(low)))
        made = self._same(1 / math.factorial(terms))
        for k in reversed(range(terms)):
            made = self.sum(self.product(made, r), self._same(1 / math.factorial(k)))
        last = self.to.bitcast(scaled, self._bits)
        one = self.to.bitcast(self._same(1.0), self._bits)
        power = self.to.shl(last, ir.Constant(self._bits, [digits] * self.lanes))
        power = self.to.bitcast(self.to.add(one, power), self.kind)
        return self.product(made, power)

    def _same(self, number: float) -> Any:
        return ir.Constant(self.kind, [number] * self.lanes)

    def variable(self, value: Any) -> Any:
        """What the compiler keeps in a register, if there are enough."""
        return cgutils.alloca_once_value(self.to, value)

    def sums(self, count: int) -> list[Any]:
        """Variables of so many sums, 0 yet."""
        return [self.variable(self.zero()) for _ in range(count)]

    def add(self, total: Any, value: Any) -> None:
        """Add to a sum."""
        self.to.store(self.sum(self.total(total), value), total)

    def total(self, total: Any) -> Any:
        """A sum as it is now."""
        return self.to.load(total)

    def fetch(self, address: Any) -> None:
        """Have the cache get what lies at an address; any address may be named."""
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, LANE, LANE, LANE])
        function = self.to.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, often, data = LANE(0), LANE(3), LANE(1)
        self.to.call(function, [self.to.inttoptr(address, pointer), read, often, data])

    @contextmanager
    def repeated(self, count: Any) -> Iterator[Any]:
        """A loop over range(count)."""
        with cgutils.for_range(self.to, count, intp=INT) as loop:
            yield loop.index
