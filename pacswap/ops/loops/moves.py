"""Moving numbers between addresses, written for numba's compiler directly, as in `registers`."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from pacswap.ops.loops.emit import INT
from pacswap.ops.loops.registers import code_of


@intrinsic
def turn(typingctx, like, source, lines, into, places):
    """into[places[j] + i] = source[lines[i] + j], for as many i and j as a vector has lanes.

    Args:
        source: address.
        lines: address of an int64 for each i.
        into: address.
        places: address of an int64 for each j.
    """

    def write(m, source, lines, into, places):
        starts = [m.load(m.at(lines, i, 8), INT) for i in range(m.lanes)]
        held = [m.load(m.at(source, start, m.size)) for start in starts]
        distance = 1
        while distance < m.lanes:  # exchange squares of that side
            turned = list(held)
            for i in (i for i in range(m.lanes) if not i & distance):
                one, other = held[i], held[i + distance]
                high = [j & distance for j in range(m.lanes)]
                first = [j + m.lanes - distance if up else j for j, up in enumerate(high)]
                second = [j + m.lanes if up else j + distance for j, up in enumerate(high)]
                turned[i] = m.shuffled(one, other, first)
                turned[i + distance] = m.shuffled(one, other, second)
            held, distance = turned, 2 * distance
        for j, line in enumerate(held):
            m.store(line, m.at(into, m.load(m.at(places, j, 8), INT), m.size))

    return code_of(like, (), 4, write)


@intrinsic(prefer_literal=True)
def copy_rows(typingctx, like, step, into, apart, source, further, rows, vectors):
    """Rows of whole vectors, of the source every number or every second.

    Args:
        step: 1 or 2, a constant.
        into: address.
        apart: numbers of `into` from a row to the next.
        source: address.
        further: numbers of the source from a row to the next.
        rows: how many.
        vectors: of a row.
    """

    def write(m, step, into, apart, source, further, rows, vectors):
        to, even = m.to, [2 * lane for lane in range(m.lanes)]
        y, x = m.variable(into), m.variable(source)
        with cgutils.for_range(to, rows):
            with cgutils.for_range(to, vectors) as vector:
                start = m.at(to.load(x), vector.index, step * m.bytes)
                held = [m.load(m.at(start, n, m.bytes)) for n in range(step)]
                one = held[0] if step == 1 else m.shuffled(held[0], held[1], even)
                m.store(one, m.at(to.load(y), vector.index, m.bytes))
            to.store(m.at(to.load(y), apart, m.size), y)
            to.store(m.at(to.load(x), further, m.size), x)

    return code_of(like, (step,), 6, write)


@intrinsic
def copy_steps(typingctx, like, into, source, count, step):
    """So many numbers, of the source every so many."""

    def write(m, into, source, count, step):
        with cgutils.for_range(m.to, count) as n:
            held = m.load(m.at(source, m.to.mul(n.index, step), m.size), m.number)
            m.store(held, m.at(into, n.index, m.size))

    return code_of(like, (), 4, write)


@intrinsic
def add_steps(typingctx, like, into, source, count, step):
    """So many numbers are added, each to one so many further."""

    def write(m, into, source, count, step):
        with cgutils.for_range(m.to, count) as n:
            place = m.at(into, m.to.mul(n.index, step), m.size)
            added = m.load(m.at(source, n.index, m.size), m.number)
            m.store(m.to.fadd(m.load(place, m.number), added), place)

    return code_of(like, (), 4, write)


@intrinsic
def add(typingctx, like, into, source, count):
    """So many numbers are added to what is at an address."""

    def write(m, into, source, count):
        to = m.to
        whole = to.sdiv(count, INT(m.lanes))
        with cgutils.for_range(to, whole) as n:
            place = m.at(into, n.index, m.bytes)
            m.store(to.fadd(m.load(place), m.load(m.at(source, n.index, m.bytes))), place)
        done, width = to.mul(whole, INT(m.lanes)), m.lanes // 2
        while width:  # a rest of fewer lanes: 8, 4, 2 and 1 of them
            wanted = to.and_(count, INT(width))
            with to.if_then(to.icmp_signed("!=", wanted, INT(0))):
                kind = ir.VectorType(m.number, width)
                place, start = m.at(into, done, m.size), m.at(source, done, m.size)
                m.store(to.fadd(m.load(place, kind), m.load(start, kind)), place)
            done, width = to.add(done, wanted), width // 2

    return code_of(like, (), 3, write)


@intrinsic
def clear(typingctx, like, into, count):
    """So many zeros."""

    def write(m, into, count):
        size = m.to.mul(count, INT(m.size))
        cgutils.memset(m.to, m.to.inttoptr(into, cgutils.voidptr_t), size, 0)

    return code_of(like, (), 2, write)


@intrinsic
def clear_steps(typingctx, like, into, count, step):
    """So many zeros, one every so many numbers."""

    def write(m, into, count, step):
        with cgutils.for_range(m.to, count) as n:
            m.store(ir.Constant(m.number, 0), m.at(into, m.to.mul(n.index, step), m.size))

    return code_of(like, (), 3, write)
