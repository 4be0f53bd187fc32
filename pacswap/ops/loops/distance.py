"""How far each tap's features are from the centre's: half of the taps where the others mirror them.

d(p, q) = d(q, p): in a window that is symmetric about its centre and moves pixel by pixel, what a
tap differs from the centre is found again where the roles are exchanged. What the loops read by raw
addresses is held by names here until they have come to their end.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache

import torch
from torch import Tensor

from pacswap.ops.loops import machine_distance as machine
from pacswap.ops.loops.emit import lanes
from pacswap.ops.loops.planes import Layout, Plan, layout, whole
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.window import Window

_AT_ONCE = 4  # taps, and backward channels
_VECTORS = 2  # that loops read at once, perhaps beyond what is computed


def distances(
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    *,
    square: bool,
    divisor: float | None = None,
) -> Tensor:
    """Σ_c φ(f_q − f_p) = d, or e^(d / divisor) without subnormal numbers.

    Args:
        guidance: f, [B, D, H, W], contiguous, float32 or float64.
        centre: f_p, [B, D, H_out, W_out], or None where it is the centre tap's.
        window: the geometry, with a border of zeros.
        square: φ is the square, else the absolute value.
        divisor: negative; None for d.

    Returns:
        [B, 1, KH*KW, H_out, W_out].
    """
    shape, dtype = tuple(guidance.shape), guidance.dtype
    plan = planned(window, shape, dtype, centre is None, torch.get_num_threads())
    output = guidance.new_empty(shape[0], 1, window.taps, *plan.lie.size)
    if shape[1] == 0:
        return output.zero_() if divisor is None else output.fill_(1)
    room = guidance.new_empty(plan.threads, plan.room)
    apart = None if centre is None else plan.lie.outputs(centre, _VECTORS * lanes(dtype))
    given = (
        guidance.data_ptr(), *shape, 0 if apart is None else apart.data_ptr(), output.data_ptr(),
        shape[0], *output.shape[2:], *described(room), square, _bits(divisor), *plan.numbers,
    )  # fmt: skip
    shared(machine.distances, guidance, plan.units, plan.threads, given)
    return output


@lru_cache(maxsize=256)
def planned(
    window: Window, shape: tuple[int, ...], dtype: torch.dtype, is_own: bool, cores: int
) -> Plan:
    """The plan of `distances`.

    Args:
        window: its window.
        shape: of its guidance.
        dtype: of its guidance.
        is_own: whether the centre is a tap's.
        cores: that torch may use.
    """
    B, D, H, W = shape
    halves = is_own and _mirrors(window)
    reach = window.dilation[0] * (window.kernel_size[0] // 2)
    # What is computed beyond a block to mirror it is lost: let it be a small part.
    numbers = math.prod(shape) * window.taps // (2 if halves else 1)
    each = -(-parts(numbers, numbers) // max(1, B))
    least = 4 * reach if halves else 1
    phases = math.prod(window.stride)
    channels, sums = min(D, machine.CHANNELS), window.centre if halves else window.taps
    numbers_each = channels * phases + sums
    lie = layout(window, (H, W), numbers=numbers_each, least=least, blocks=each)
    count = B * -(-lie.size[0] // lie.rows)
    beyond = lie.offsets[window.centre] - lie.offsets[0] if halves else 0
    wide = lanes(dtype)
    stretch = lie.rows * lie.row + beyond + _VECTORS * wide
    room = channels * lie.stride + _VECTORS * wide + sums * stretch
    told = (
        stretch, wide, lie.stride, lie.rows, window.centre if is_own else -1, halves, lie.address,
        *lie.numbers,
    )  # fmt: skip
    return Plan(lie, count, parts(count, numbers), room, told)


def gradients(
    guidance: Tensor, centre: Tensor | None, grad: Tensor, window: Window, *, square: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the features and for the centre, if that was given.

    Args:
        guidance: as in `distances`, like `centre` and `window`.
        centre: f_p or None.
        grad: of the distances, [B, 1, KH*KW, H_out, W_out], contiguous, in the features' dtype.
        window: the window.
        square: as in `distances`.
    """
    B, D, H, W = guidance.shape
    lie = whole(window, (H, W))
    if centre is None and _mirrors(window):
        return _mirrored_gradients(guidance, grad[:, 0], lie, square), None
    size = (B, D, lie.size[0] * lie.row)
    pulls = lie.outputs(grad[:, 0], 0)
    found = torch.zeros_like(guidance)
    apart = found_apart = guidance.new_empty(0)
    if centre is not None:
        apart = lie.outputs(centre, 0)
        found_apart = torch.zeros_like(apart)
    channels = B * D
    threads = parts(channels, grad.numel() * D)
    room = guidance.new_empty(threads, 2 * lie.plane + lanes(guidance.dtype))
    given = (
        *described(guidance), apart.data_ptr(), *size, pulls.data_ptr(), B, window.taps, size[2],
        *described(found), found_apart.data_ptr(), *described(room),
        window.centre if centre is None else -1, square, lie.address, lie.plane,
        *lie.numbers,
    )  # fmt: skip
    shared(machine.distance_gradients, guidance, channels, threads, given)
    return found, None if centre is None else lie.sized(found_apart, centre.shape)


def _mirrored_gradients(guidance: Tensor, grad: Tensor, lie: Layout, square: bool) -> Tensor:
    """For the features, where each tap has an opposite one; grad is [B, taps, H_out, W_out]."""
    B, D = guidance.shape[:2]
    found, wide = torch.zeros_like(guidance), lanes(guidance.dtype)
    others = lie.window.taps - 1
    if others == 0:
        return found
    pulls = guidance.new_zeros(B * others * lie.plane + _VECTORS * wide)
    given: tuple[int, ...] = (
        *described(grad), pulls.data_ptr(), B * others, lie.plane, lie.window.centre, lie.row,
        lie.address,
    )  # fmt: skip
    threads = parts(B * others, pulls.numel())
    shared(machine.both_ends, guidance, B * others, threads, given)
    blocks = B * -(-D // _AT_ONCE)
    threads = parts(blocks, grad.numel() * D)
    plane = lie.stride + lie.farthest
    stretch = lie.plane + _VECTORS * wide
    size = lie.farthest + _AT_ONCE * plane + _VECTORS * wide + _AT_ONCE * stretch
    room = guidance.new_empty(threads, size)
    given = (
        *described(guidance), pulls.data_ptr(), others, *described(found), *described(room),
        wide, lie.farthest, plane, lie.plane, square, lie.address_from_centre, *lie.numbers,
    )  # fmt: skip
    shared(machine.mirrored_gradients, guidance, blocks, threads, given)
    return found


def _bits(number: float | None) -> int:
    """Of a float64; 0, which only zero has, for none."""
    return 0 if number is None else struct.unpack("q", struct.pack("d", number))[0]


def _mirrors(window: Window) -> bool:
    """Whether each tap has an opposite one, and each pixel is a centre."""
    return window.stride == (1, 1) and all(side % 2 == 1 for side in window.kernel_size)
