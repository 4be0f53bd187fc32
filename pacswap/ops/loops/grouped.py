"""The depthwise and the grouped convolution, some output channels at a time.

What the loops read by raw addresses is held by names here until they have come to their end.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from pacswap.ops.loops import machine_grouped as machine
from pacswap.ops.loops.emit import lanes
from pacswap.ops.loops.planes import Plan, layout
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.window import Window

_AT_ONCE = 4  # outputs
# Channels of a group: of more, the planes leave the cache, and matrix products are faster.
_NARROW = 32


def fits(weight: Tensor, groups: int) -> bool:
    """Whether a convolution with that weight, [C_out, C_in/groups, KH, KW], is one for here."""
    return weight.shape[1] == 1 or (groups > 1 and 1 < weight.shape[1] <= _NARROW)


def convolve(
    image: Tensor, kernel: Tensor, weight: Tensor, output: Tensor, window: Window, groups: int
) -> None:
    """Fill `output`, [B, C_out, H_out, W_out].

    Args:
        image: v, [B, C_in, H, W], contiguous like all that follow, in the weight's dtype.
        kernel: K, [B, 1, KH*KW, H_out, W_out].
        weight: W, [C_out, C_in/groups, KH, KW], float32 or float64.
        output: contiguous.
        window: the geometry, with a border of zeros.
        groups: of channels.
    """
    plan = planned(
        window, tuple(image.shape), tuple(weight.shape), image.dtype, torch.get_num_threads()
    )
    room = image.new_empty(plan.threads, plan.room)
    given = (
        *described(image), kernel.data_ptr(), weight.data_ptr(), *described(output),
        *described(room), *plan.numbers,
    )  # fmt: skip
    shared(machine.grouped, image, plan.units, plan.threads, given)


@lru_cache(maxsize=256)
def planned(
    window: Window,
    image: tuple[int, ...],
    weight: tuple[int, ...],
    dtype: torch.dtype,
    cores: int,
) -> Plan:
    """The plan of `convolve`.

    Args:
        window: its window.
        image: its shape.
        weight: its shape.
        dtype: of both.
        cores: that torch may use.
    """
    (B, C_in, H, W), (C_out, each), wide = image, weight[:2], lanes(dtype)
    groups = C_in // each
    apart = each == 1 and C_in == C_out
    inputs, outputs = (_AT_ONCE, _AT_ONCE) if apart else (each, C_out // groups)
    # Where there are fewer groups than cores, several share one.
    divided = 1 if apart else max(1, min(-(-outputs // _AT_ONCE), -(-cores // groups)))
    share = -(-outputs // (divided * _AT_ONCE)) * _AT_ONCE
    units = -(-C_in // inputs) * divided
    numbers = window.taps + inputs * math.prod(window.stride)
    lie = layout(window, (H, W), numbers=numbers)
    # The last row is read a vector long: of a narrow image, from memory of its own.
    narrow = lie.size[1] < wide
    factors = window.taps * lie.rows * lie.size[1] + wide if narrow else 0
    room = inputs * lie.stride + wide + factors + 2 * _AT_ONCE * wide
    told = (
        each, window.taps, inputs, outputs, divided, share, apart, wide, lie.stride, lie.rows,
        lie.address, *lie.numbers,
    )  # fmt: skip
    threads = parts(units, B * C_out * math.prod(lie.size) * window.taps * each)
    return Plan(lie, units, threads, room, told)


def depthwise_gradients(
    image: Tensor, kernel: Tensor, weight: Tensor, grad: Tensor, window: Window
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for image, kernel and weight of a depthwise convolution.

    Args:
        image: as in `convolve`, like `kernel` and `window`.
        kernel: K.
        weight: W, [C_out, 1, KH, KW].
        grad: of the output, [B, C_out, H_out, W_out].
        window: the window.
    """
    plan = planned_back(
        window, tuple(image.shape), weight.shape[0], image.dtype, torch.get_num_threads()
    )
    room = image.new_empty(plan.threads, plan.room)
    grad_image, grad_weight = torch.zeros_like(image), torch.zeros_like(weight)
    shares = kernel.new_zeros(plan.threads, *kernel.shape)
    given = (
        *described(image), kernel.data_ptr(), weight.data_ptr(), *described(grad),
        grad_image.data_ptr(), shares.data_ptr(), grad_weight.data_ptr(), *described(room),
        *plan.numbers,
    )  # fmt: skip
    shared(machine.depthwise_gradients, image, plan.units, plan.threads, given)
    return grad_image, shares[0] if plan.threads == 1 else shares.sum(0), grad_weight


@lru_cache(maxsize=256)
def planned_back(
    window: Window, image: tuple[int, ...], C_out: int, dtype: torch.dtype, cores: int
) -> Plan:
    """The plan of `depthwise_gradients`.

    Args:
        window: its window.
        image: its shape.
        C_out: outputs.
        dtype: of the image.
        cores: that torch may use.
    """
    (B, C_in, H, W), wide = image, lanes(dtype)
    inputs, outputs = (_AT_ONCE, _AT_ONCE) if C_in == C_out else (1, C_out // C_in)
    units = -(-C_in // inputs)
    # Numbers of K and of its gradient.
    lie = layout(window, (H, W), numbers=2 * window.taps)
    each = lie.rows * lie.row + wide
    planes = 2 * (inputs * lie.stride + wide)
    room = _AT_ONCE * wide + planes + (outputs + 2 * window.taps) * each
    told = (
        window.taps, inputs, outputs, wide, lie.stride, lie.rows, lie.address, *lie.numbers
    )  # fmt: skip
    threads = parts(units, B * C_out * math.prod(lie.size) * window.taps)
    return Plan(lie, units, threads, room, told)
