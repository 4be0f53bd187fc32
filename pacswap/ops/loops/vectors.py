"""Moves of numbers and the exponential, in this machine's vectors."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from pacswap.ops.loops.emit import INT, Vectors


@intrinsic
def copy(typingctx: Any, like: Any, to: Any, source: Any, count: Any) -> Any:
    """Copy so many numbers of the dtype of `like` from one address to another."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        _, to, source, count = args
        lanes = INT(emit.lanes)
        with builder.if_else(builder.icmp_signed(">=", count, lanes)) as (then, otherwise):
            with then:
                with emit.repeated(builder.udiv(count, lanes)) as i:
                    emit.store(emit.load(emit.nth(source, i)), emit.nth(to, i))
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
        rounded = builder.add(args[2], INT(emit.lanes - 1))
        with emit.repeated(builder.udiv(rounded, INT(emit.lanes))) as i:
            emit.store(emit.zero(), emit.nth(args[1], i))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64), code


@intrinsic
def every_other(typingctx: Any, like: Any, to: Any, source: Any, count: Any) -> Any:
    """Copy so many numbers, every second of the source.

    Reads nothing before the first number and after the last.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit = Vectors(builder, like.dtype)
        _, to, source, count = args
        lanes = INT(emit.lanes)
        is_long = builder.icmp_signed(">", count, lanes)
        with builder.if_else(is_long) as (then, otherwise):
            with then:
                whole = builder.udiv(builder.sub(count, INT(1)), lanes)
                with emit.repeated(whole) as i:
                    at = emit.place(source, 2 * emit.lanes, i)
                    emit.store(emit.of_two(at, 0), emit.nth(to, i))
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
        by = emit.in_all(emit.rounded(args[3]))
        rounded = builder.add(args[2], INT(emit.lanes - 1))
        with emit.repeated(builder.udiv(rounded, INT(emit.lanes))) as i:
            place = emit.nth(args[1], i)
            emit.store(emit.exponential(emit.quotient(emit.load(place), by)), place)
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.float64), code
