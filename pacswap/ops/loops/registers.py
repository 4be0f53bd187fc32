"""Products of blocks in a CPU's vector registers, written for numba's compiler directly.

A block of sums stays in registers while the products are added to it; vectors and registers are
named here, so that nothing depends on what a compiler makes of a loop. numba compiles for the types
of what it is given, so a type says which vectors to use: `like` is an empty array of the dtype with
one axis for vectors of 16 bytes, two for 32, three for 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pacswap.ops.loops.emit import INT, LANE, Vectors, vector_bytes

# Vectors of a block side by side: three, so that 8 rows of them, or 4, fill 24 or 12 registers; the
# others hold what is multiplied.
ACROSS = 3
# Columns of a block whose vectors hold rows.
COLUMNS = 4


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


class Block(Vectors):
    """Emits blocks of sums, for an intrinsic.

    Attributes:
        rows: of a block.
        steps: from one k to the next, numbers of what lies by rows and vectors of the other.
    """

    def __init__(self, builder: Any, like: Any) -> None:
        super().__init__(builder, like.dtype, lanes_of(like.ndim, like.dtype.bitwidth // 8))
        self.rows = rows_of(like.ndim)
        self.steps = max(self.lanes, self.rows), ACROSS

    def outer(
        self, across: int, steps: tuple[int, int], apart: int, places: Any, counts: Any
    ) -> list[list[Any]]:
        """Sums over k of left[k, row] · right[k, column], in vectors of columns.

        Args:
            across: vectors side by side.
            steps: as in `products`, like `places` and `counts`.
            apart: numbers of `left` from one row to the next.
            places: addresses.
            counts: of k.

        Returns:
            For each row the variables of its vectors.
        """
        sums = [self.sums(across) for _ in range(self.rows)]
        with self.products(steps, places, counts) as (a, b):
            columns = [self.load(self.at(b, v, self.bytes)) for v in range(across)]
            for r, line in enumerate(sums):
                self._add_products(self.spread(self.at(a, r * apart, self.size)), columns, line)
        return sums

    def outer_turned(self, panels: int, apart: Any, places: Any, counts: Any) -> list[list[Any]]:
        """The same for a few columns, in vectors of rows.

        Args:
            panels: of `left`, each of as many rows as it lies by.
            apart: numbers of `left` from one panel to the next.
            places: as in `products`, like `counts`.
            counts: of k.

        Returns:
            For each of `COLUMNS` columns the variables of its vectors.
        """
        each = range(self.steps[0] // self.lanes)
        sums = [self.sums(panels * len(each)) for _ in range(COLUMNS)]
        with self.products(self.steps, places, counts) as (a, b):
            rows = []
            for _ in range(panels):
                rows += [self.load(self.at(a, v, self.bytes)) for v in each]
                a = self.at(a, apart, self.size)
            for c, line in enumerate(sums):
                self._add_products(self.spread(self.at(b, c, self.size)), rows, line)
        return sums

    @contextmanager
    def products(
        self, steps: tuple[int, int], places: Any, counts: Any
    ) -> Iterator[tuple[Any, Any]]:
        """A loop over k, with the addresses of left[k] and right[k].

        Args:
            steps: from one k to the next, numbers of `left` and vectors of `right`.
            places: addresses of left and right.
            counts: how many k there are, after how many of them `left` jumps, and by how many
                numbers more.
        """
        to, (left, right), (total, run, jump) = self.to, map(self.variable, places), counts
        rest = self.variable(total)
        with cgutils.for_range(to, to.sdiv(to.sub(to.add(total, run), INT(1)), run)):
            left_over = to.load(rest)
            count = to.select(to.icmp_signed("<", left_over, run), left_over, run)
            to.store(to.sub(left_over, run), rest)
            with cgutils.for_range(to, count):
                a, b = to.load(left), to.load(right)
                yield a, b
                to.store(self.at(a, steps[0], self.size), left)
                to.store(self.at(b, steps[1], self.bytes), right)
            to.store(self.at(to.load(left), jump, self.size), left)

    def _add_products(self, factor: Any, vectors: list[Any], sums: list[Any]) -> None:
        for place, vector in zip(sums, vectors, strict=True):
            self.to.store(self.times_plus(factor, vector, self.to.load(place)), place)


def code_of(like: Any, constants: tuple[Any, ...], numbers: int, write: Any) -> Any:
    """What an intrinsic gives: its signature, and what writes it.

    Args:
        like: type of the first argument.
        constants: types of those that the compiler knows.
        numbers: how many follow.
        write: is called with a `Block`, the constants, and the values of the numbers.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        known = [constant.literal_value for constant in constants]
        write(Block(builder, like), *known, *args[1 + len(known) :])
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
        _leave(m, sums, into, INT(1))

    return code_of(like, (across,), 6, write)


def _leave(m: Block, sums: list[list[Any]], into: Any, add: Any) -> None:
    """Sums go to memory, lines `ACROSS` vectors apart, or are added to it."""
    lines = [m.at(into, r * ACROSS, m.bytes) for r in range(len(sums))]
    _put(m, [(line, at) for line, at in zip(sums, lines, strict=True)], add)


def _put(m: Block, lines: list[tuple[list[Any], Any]], add: Any) -> None:
    """Each line of vectors to its address, or added to what is there."""
    pairs = [(v, m.at(at, n, m.bytes)) for line, at in lines for n, v in enumerate(line)]
    with m.to.if_then(m.to.icmp_signed("!=", add, INT(0))):
        for variable, place in pairs:
            m.to.store(m.to.fadd(m.to.load(variable), m.load(place)), variable)
    for variable, place in pairs:
        m.store(m.to.load(variable), place)


@intrinsic(prefer_literal=True)
def multiply_turned(typingctx, like, panels, left, apart, right, into, total, run, jump, add):
    """`multiply` for a few columns and whole panels of rows.

    Column j of a panel, a number for each row, is where the other's row j would begin.

    Args:
        panels: of rows, a constant.
        left: address, as in `multiply` like all that follow but one.
        apart: numbers of `left` from a panel to the next.
        right: address.
        into: address.
        total: how many k.
        run: after how many of them `left` jumps.
        jump: how many numbers.
        add: or not.
    """

    def write(m, panels, left, apart, right, into, total, run, jump, add):
        sums, each = m.outer_turned(panels, apart, (left, right), (total, run, jump)), m.steps[0]
        lines = []
        for c, line in enumerate(sums):
            for panel in range(panels):
                at = m.at(into, (panel * each + c) * ACROSS, m.bytes)
                lines.append((line[panel * each // m.lanes : (panel + 1) * each // m.lanes], at))
        _put(m, lines, add)

    return code_of(like, (panels,), 8, write)


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
        to, places = m.to, (image, kernel, found, dots)
        counts = (total, total, INT(0))
        for r, line in enumerate(m.outer(across, m.steps, 1, (left, right), counts)):
            with to.if_then(to.icmp_signed("<", INT(r), rows)):
                columns = [m.load(m.at(table, 2 * r + n, 8), INT) for n in range(2)]
                for v, variable in enumerate(line):
                    _share(m, to.load(variable), v * m.lanes, columns, places)

    return code_of(like, (across,), 10, write)


def _share(m: Block, Z: Any, further: int, columns: Any, places: Any) -> None:
    """What some numbers Z of a row give to the gradients of image and kernel."""
    there, here = (m.at(place, further) for place in columns)
    image, kernel, found, dots = places
    x, f = m.at(image, there, m.size), m.at(found, there, m.size)
    k, d = m.at(kernel, here, m.size), m.at(dots, here, m.size)
    kind = Z.type
    m.store(m.times_plus(m.load(k, kind), Z, m.load(f, kind)), f)
    m.store(m.times_plus(m.load(x, kind), Z, m.load(d, kind)), d)


@intrinsic(prefer_literal=True)
def pull_turned(
    typingctx, like, panels, left, apart, right, total, rows, table, image, kernel, found, dots
):
    """`pull` for a few columns and whole panels of rows.

    Args:
        panels: of rows, a constant.
        left: address, as in `pull` like all that follow but one.
        apart: numbers of `left` from a panel to the next.
        right: address.
        total: how many k.
        rows: that count, at most those of the panels.
        table: address.
        image: address.
        kernel: address.
        found: address.
        dots: address.
    """

    def write(m, panels, left, apart, right, total, rows, table, image, kernel, found, dots):
        to, places = m.to, (image, kernel, found, dots)
        counts = (total, total, INT(0))
        sums = m.outer_turned(panels, apart, (left, right), counts)
        sums = [[to.load(variable) for variable in line] for line in sums]
        for r in range(panels * m.steps[0]):
            with to.if_then(to.icmp_signed("<", INT(r), rows)):
                columns = [m.load(m.at(table, 2 * r + n, 8), INT) for n in range(2)]
                Z = ir.Constant(ir.VectorType(m.number, COLUMNS), ir.Undefined)
                for c, line in enumerate(sums):
                    lane = LANE(r % m.lanes)
                    one = to.extract_element(line[r // m.lanes], lane)
                    Z = to.insert_element(Z, one, LANE(c))
                _share(m, Z, 0, columns, places)

    return code_of(like, (panels,), 10, write)


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
            x = m.variable(m.at(image, m.load(m.at(table, tap.index, 8), INT), m.size))
            y = m.variable(m.at(into, to.mul(tap.index, apart), m.size))
            with cgutils.for_range(to, channels):
                for v, factor in enumerate(factors):
                    seen = m.load(m.at(to.load(x), v, m.bytes))
                    m.store(to.fmul(factor, seen), m.at(to.load(y), v, m.bytes))
                to.store(m.at(to.load(x), channel, m.size), x)
                to.store(m.at(to.load(y), ACROSS, m.bytes), y)

    return code_of(like, (across,), 9, write)
