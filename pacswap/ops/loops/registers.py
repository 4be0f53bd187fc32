"""Products of blocks in a CPU's vector registers, written for numba's compiler directly.

A block of sums stays in registers while the products are added to it; vectors and registers are
named here, so that nothing depends on what a compiler makes of a loop. numba compiles for the types
of what it is given, so a type says which vectors to use: `like` is an empty array of the dtype with
one axis for vectors of 16 bytes, two for 32, three for 64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pacswap.ops.loops.vectors import vector_bytes

# Vectors of a block side by side: three, so that 8 rows of them, or 4, fill 24 or 12 registers; the
# others hold what is multiplied.
ACROSS = 3
INT = ir.IntType(64)
INDEX = ir.IntType(32)


@lru_cache(maxsize=1)
def vector_axes() -> int:
    """Axes of `like` for this machine's vectors."""
    return {16: 1, 32: 2, 64: 3}[vector_bytes()]


def lanes_of(axes: int, itemsize: int) -> int:
    """Numbers of a vector."""
    return (8 << axes) // itemsize


def rows_of(axes: int) -> int:
    """Rows of a block: x86 has 16 registers of 32 bytes, 32 of 64; ARM has 32 of 16."""
    return 4 if axes == 2 else 8


class Maker:
    """What an intrinsic writes its instructions with."""

    def __init__(self, builder: Any, like: Any) -> None:
        self.to = builder
        self.size = like.dtype.bitwidth // 8
        self.number = ir.FloatType() if self.size == 4 else ir.DoubleType()
        self.lanes, self.rows = lanes_of(like.ndim, self.size), rows_of(like.ndim)
        self.bytes = self.lanes * self.size
        self.steps = max(self.lanes, self.rows), ACROSS  # of what `multiply` is given
        self.vector = ir.VectorType(self.number, self.lanes)
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f{8 * self.size}"
        self._product = cgutils.get_or_insert_function(builder.module, kind, name)

    def at(self, address: Any, offset: Any = 0, times: int = 1) -> Any:
        """An address so many times `times` bytes further."""
        if isinstance(offset, int):
            return self.to.add(address, ir.Constant(INT, offset * times))
        return self.to.add(address, self.to.mul(offset, ir.Constant(INT, times)))

    def load(self, address: Any, kind: Any = None) -> Any:
        """A vector, or what `kind` says."""
        read = self.to.load(self.to.inttoptr(address, (kind or self.vector).as_pointer()))
        read.align = self.size
        return read

    def store(self, value: Any, address: Any) -> None:
        """A vector or a number."""
        place = self.to.inttoptr(address, value.type.as_pointer())
        self.to.store(value, place).align = self.size

    def all_lanes(self, address: Any) -> Any:
        """One number in every lane."""
        none = ir.Constant(self.vector, ir.Undefined)
        first = ir.Constant(INDEX, 0)
        one = self.to.insert_element(none, self.load(address, self.number), first)
        return self.shuffled(one, none, [0] * self.lanes)

    def shuffled(self, one: Any, other: Any, lanes: list[int]) -> Any:
        """Lanes of two vectors, those of the other counted on."""
        return self.to.shuffle_vector(
            one, other, ir.Constant(ir.VectorType(INDEX, self.lanes), lanes)
        )

    def times_plus(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c, rounded once where the machine can."""
        return self.to.call(self._product, [a, b, c])

    def place(self, value: Any) -> Any:
        """A variable, which the compiler keeps in a register."""
        return cgutils.alloca_once_value(self.to, value)

    def outer(
        self, across: int, steps: tuple[int, int], apart: int, places: Any, counts: Any
    ) -> list[list[Any]]:
        """Sums over k of left[k, row] · right[k, column].

        Args:
            across: vectors side by side.
            steps: from one k to the next, numbers of `left` and vectors of `right`.
            apart: numbers of `left` from one row to the next.
            places: addresses of left and right.
            counts: how many k there are, after how many of them `left` jumps, and by how many
                numbers more.

        Returns:
            For each row the variables of its vectors.
        """
        to, (left, right), (total, run, jump) = self.to, map(self.place, places), counts
        zero = ir.Constant(self.vector, None)
        sums = [[self.place(zero) for _ in range(across)] for _ in range(self.rows)]
        rest = self.place(total)
        with cgutils.for_range(to, to.sdiv(to.sub(to.add(total, run), ir.Constant(INT, 1)), run)):
            left_over = to.load(rest)
            count = to.select(to.icmp_signed("<", left_over, run), left_over, run)
            to.store(to.sub(left_over, run), rest)
            with cgutils.for_range(to, count):
                a, b = to.load(left), to.load(right)
                columns = [self.load(self.at(b, v, self.bytes)) for v in range(across)]
                for r, line in enumerate(sums):
                    factor = self.all_lanes(self.at(a, r * apart, self.size))
                    for place, column in zip(line, columns, strict=True):
                        to.store(self.times_plus(factor, column, to.load(place)), place)
                to.store(self.at(a, steps[0], self.size), left)
                to.store(self.at(b, steps[1], self.bytes), right)
            to.store(self.at(to.load(left), jump, self.size), left)
        return sums


def code_of(like: Any, constants: tuple[Any, ...], numbers: int, write: Any) -> Any:
    """What an intrinsic gives: its signature, and what writes it.

    Args:
        like: type of the first argument.
        constants: types of those that the compiler knows.
        numbers: how many follow.
        write: is called with a `Maker`, the constants, and the values of the numbers.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        known = [constant.literal_value for constant in constants]
        write(Maker(builder, like), *known, *args[1 + len(known) :])
        return context.get_dummy_value()

    return types.void(like, *constants, *[types.int64] * numbers), code


@intrinsic(prefer_literal=True)
def multiply(typingctx, like, across, left, right, into, total, run, jump, add):
    """into[row, column] = or += Σ_k left[k, row] · right[k, column].

    Args:
        across: vectors of columns, a constant.
        left: address; the rows of a k lie together, and from a k to the next there are as many
            numbers as a vector has lanes, or as a block has rows if these are more.
        right: address, `ACROSS` vectors for each k.
        into: address; rows lie `ACROSS` vectors apart.
        total: how many k.
        run: after so many of them `left` jumps,
        jump: so many numbers.
        add: to what is there, unless 0.
    """

    def write(m, across, left, right, into, total, run, jump, add):
        sums = m.outer(across, m.steps, 1, (left, right), (total, run, jump))
        _leave(m, sums, into, add)

    return code_of(like, (across,), 7, write)


@intrinsic(prefer_literal=True)
def weigh(typingctx, like, across, left, right, into, total, run, jump):
    """As `multiply` that adds, with the k of a row together.

    Rows lie `ACROSS` vectors apart, and `right` has no more vectors for each k than columns.
    """

    def write(m, across, left, right, into, total, run, jump):
        sums = m.outer(across, (1, across), ACROSS * m.lanes, (left, right), (total, run, jump))
        _leave(m, sums, into, ir.Constant(INT, 1))

    return code_of(like, (across,), 6, write)


def _leave(m: Maker, sums: list[list[Any]], into: Any, add: Any) -> None:
    """Sums go to memory, rows `ACROSS` vectors apart, or are added to it."""
    lines = [m.at(into, r * ACROSS, m.bytes) for r in range(m.rows)]
    places = [[m.at(line, v, m.bytes) for v in range(len(sums[0]))] for line in lines]
    pairs = [pair for line in zip(sums, places, strict=True) for pair in zip(*line, strict=True)]
    with m.to.if_then(m.to.icmp_signed("!=", add, ir.Constant(INT, 0))):
        for variable, place in pairs:
            m.to.store(m.to.fadd(m.to.load(variable), m.load(place)), variable)
    for variable, place in pairs:
        m.store(m.to.load(variable), place)


@intrinsic(prefer_literal=True)
def pull(typingctx, like, across, left, right, total, rows, table, image, kernel, found, dots):
    """Z = Σ_k left[k, row] · right[k, column], of which found += K · Z and dots += v · Z.

    Args:
        across: vectors of columns, a constant.
        left: address, as in `multiply`.
        right: address.
        total: how many k.
        rows: that count, at most those of a block.
        table: address of two int64 for each row: numbers from `image` and `found`, and from
            `kernel` and `dots`, to the row's first column.
        image: address of v.
        kernel: address of K.
        found: address.
        dots: address.
    """

    def write(m, across, left, right, total, rows, table, image, kernel, found, dots):
        to = m.to
        counts = (total, total, ir.Constant(INT, 0))
        for r, line in enumerate(m.outer(across, m.steps, 1, (left, right), counts)):
            with to.if_then(to.icmp_signed("<", ir.Constant(INT, r), rows)):
                there, here = (m.load(m.at(table, 2 * r + n, 8), INT) for n in range(2))
                for v, variable in enumerate(line):
                    Z, further = to.load(variable), v * m.bytes
                    x, k = m.at(image, there, m.size), m.at(kernel, here, m.size)
                    f, d = m.at(found, there, m.size), m.at(dots, here, m.size)
                    x, k, f, d = (m.at(place, further) for place in (x, k, f, d))
                    m.store(m.times_plus(m.load(k), Z, m.load(f)), f)
                    m.store(m.times_plus(m.load(x), Z, m.load(d)), d)

    return code_of(like, (across,), 10, write)


@intrinsic(prefer_literal=True)
def adapt(
    typingctx, like, across, kernel, line, image, channel, into, apart, table, taps, channels
):
    """into[t, c, column] = K[t, column] · v[c, column + t].

    Args:
        across: vectors of columns, a constant; `into` has room for `ACROSS` of them.
        kernel: address of K.
        line: numbers of K from a tap to the next.
        image: address of v.
        channel: numbers of v from a channel to the next.
        into: address.
        apart: numbers of `into` from a tap to the next.
        table: address of an int64 for each tap: numbers from v to what it sees first.
        taps: how many.
        channels: how many.
    """

    def write(m, across, kernel, line, image, channel, into, apart, table, taps, channels):
        to = m.to
        with cgutils.for_range(to, taps) as tap:
            first = m.at(kernel, to.mul(tap.index, line), m.size)
            factors = [m.load(m.at(first, v, m.bytes)) for v in range(across)]
            x = m.place(m.at(image, m.load(m.at(table, tap.index, 8), INT), m.size))
            y = m.place(m.at(into, to.mul(tap.index, apart), m.size))
            with cgutils.for_range(to, channels):
                for v, factor in enumerate(factors):
                    seen = m.load(m.at(to.load(x), v, m.bytes))
                    m.store(to.fmul(factor, seen), m.at(to.load(y), v, m.bytes))
                to.store(m.at(to.load(x), channel, m.size), x)
                to.store(m.at(to.load(y), ACROSS, m.bytes), y)

    return code_of(like, (across,), 9, write)
