"""The dense and the grouped convolution: K·v and Z block by block, in registers and first caches.

Z = Wᵀ·dY is the gradient of K·v: that of v is K·Z, and that of K is v·Z, tap by tap.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pacswap.ops.loops import machine_dense, machine_gradients, machine_panels
from pacswap.ops.loops.blocks import (
    Blocks,
    backward_blocks,
    forward_blocks,
    shape_of,
    vectors_of,
)
from pacswap.ops.loops.rooms import Room, blocks_at_once, forward_room, pull_room, weigh_room
from pacswap.ops.loops.threads import parts, shared
from pacswap.ops.window import Window

# Multiply-adds in the time of one number of another loop.
_PRODUCTS = 16
# Numbers that the threads' gradients of K may have in any case: 1 MB of float32.
_LEAST_DOTS = 1 << 18


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
    shape, vectors = shape_of(image, weight, window, groups), vectors_of(image.dtype)
    if not image.numel() or not output.numel():
        output.zero_()
        return
    units = groups * -(-shape.outs // vectors.high)
    threads = parts(shape.batch * shape.size[0] * units, shape.products // _PRODUCTS)
    work = forward_blocks(shape, vectors, threads)
    factors = _factors(kernel, work)
    packed = _packed(weight, work) if work.is_packed else None
    room, begins = _room(image, threads, forward_room(work))
    given = [
        *(image.data_ptr(), factors.data_ptr(), weight.data_ptr()),
        *(0 if packed is None else packed.data_ptr(), output.data_ptr(), room.data_ptr()),
        *(work.orders_address, *begins),
        *(shape.batch, groups, shape.ins, shape.outs, work.pieces, work.parts, work.run),
    ]
    _run(machine_dense.forward, work, image, work.items, threads, given)


def gradients(
    image: Tensor,
    kernel: Tensor,
    weight: Tensor,
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for image, kernel and weight.

    Args:
        image: as in `convolve`, like `kernel`, `weight`, `window` and `groups`.
        kernel: K.
        weight: W.
        grad: of the output, [B, C_out, H_out, W_out].
        window: the window.
        groups: of channels.
        needed: which of the three are wanted.

    Returns:
        The three, each of its tensor's shape, None where not wanted.
    """
    found = torch.zeros_like(image) if needed[0] or needed[1] else None
    grad_kernel = torch.zeros_like(kernel) if needed[1] else None
    is_empty = not image.numel() or not grad.numel()
    made = torch.zeros_like if is_empty else torch.empty_like
    grad_weight = made(weight) if needed[2] else None
    if not is_empty:
        shape, vectors = shape_of(image, weight, window, groups), vectors_of(image.dtype)
        threads = parts(image.shape[1], shape.products // _PRODUCTS)
        work = backward_blocks(shape, vectors, threads)
        factors = _factors(kernel, work)
        if found is not None:
            _pull(image, factors, weight, grad, found, grad_kernel, work)
        if grad_weight is not None:
            _weigh(image, factors, grad, grad_weight, work)
    return found if needed[0] else None, grad_kernel, grad_weight


def _pull(
    image: Tensor,
    factors: Tensor,
    weight: Tensor,
    grad: Tensor,
    found: Tensor,
    grad_kernel: Tensor | None,
    work: Blocks,
) -> None:
    """Add to the gradients of the image and the kernel what comes from Z."""
    shape, vectors, images = work.shape, work.vectors, work.shape.batch * len(work.chunks)
    channels = shape.groups * shape.outs
    laid = image.new_empty(images * work.blocks * channels * vectors.wide)
    given = [grad.data_ptr(), laid.data_ptr(), channels, work.blocks]
    _run(machine_panels.lay, work, image, images, parts(images, laid.numel()), given)
    each = shape.window.taps * work.line  # numbers of K for a chunk
    # Each thread has its own gradient of K, of some chunks: no more than the image has numbers.
    once = max(1, min(images, max(image.numel(), _LEAST_DOTS) // (work.threads * each)))
    dots = image.new_empty(work.threads * once * each)
    room, (own, begin, _, apart) = _room(image, work.threads, pull_room(work))
    for first in range(0, images, once):
        last = min(images, first + once)
        dots.zero_()
        given = [
            *(image.data_ptr(), factors.data_ptr(), weight.data_ptr(), laid.data_ptr()),
            *(found.data_ptr(), dots.data_ptr(), room.data_ptr(), work.pulls_address),
            *(once * each, own, begin, work.columns, shape.batch, shape.groups),
            *(shape.ins, shape.outs, work.pieces, work.blocks, work.lot, first, last, apart),
        ]
        _run(
            machine_gradients.backward, work, image, shape.groups * work.pieces, work.threads, given
        )
        if grad_kernel is not None:
            given = [dots.data_ptr(), grad_kernel.data_ptr(), work.threads, once * each, first]
            count = last - first
            _run(machine_panels.collect, work, image, count, parts(count, dots.numel()), given)


def _weigh(image: Tensor, factors: Tensor, grad: Tensor, grad_weight: Tensor, work: Blocks) -> None:
    """Fill the weight's gradient."""
    shape, wide = work.shape, work.vectors.wide
    matrices, outputs = shape.batch * shape.groups, shape.size[0] * shape.size[1]
    panels = -(-shape.outs // wide)
    turned = image.new_empty(matrices * panels * outputs * wide)
    given = [grad.data_ptr(), turned.data_ptr(), work.places.ctypes.data, work.places.size]
    given += [shape.outs, outputs, wide, 1]
    count = matrices * panels
    _run(machine_panels.pack, work, image, count, parts(count, turned.numel()), given)
    room, (each, sums, columns) = _room(image, work.threads, weigh_room(work))
    given = [
        *(image.data_ptr(), factors.data_ptr(), turned.data_ptr(), grad_weight.data_ptr()),
        *(room.data_ptr(), each, sums, columns, blocks_at_once(work), shape.batch, shape.groups),
        *(shape.ins, shape.outs, work.pieces, work.lot),
    ]
    _run(machine_gradients.weights, work, image, shape.groups * work.pieces, work.threads, given)


def _factors(kernel: Tensor, work: Blocks) -> Tensor:
    """K as loops read it, chunk by chunk, 0 beyond the image."""
    items = work.shape.batch * len(work.chunks)
    factors = kernel.new_empty(items * work.shape.window.taps * work.line)
    threads = parts(items, factors.numel())
    given = [kernel.data_ptr(), factors.data_ptr()]
    _run(machine_panels.mask, work, kernel, items, threads, given)
    return factors


def _packed(weight: Tensor, work: Blocks) -> Tensor:
    """The weight as panels [G, panels, C_in/G·taps, step]: outputs' channels lie together."""
    shape, step = work.shape, work.vectors.step
    count, deep = shape.groups * -(-shape.outs // step), shape.ins * shape.window.taps
    packed = weight.new_empty(count * deep * step)
    order = work.whole_order
    given = [weight.data_ptr(), packed.data_ptr(), order.ctypes.data, order.size]
    given += [shape.outs, deep, step, 0]
    _run(machine_panels.pack, work, weight, count, parts(count, packed.numel()), given)
    return packed


def _room(like: Tensor, threads: int, room: Room) -> tuple[Tensor, tuple[int, ...]]:
    """Memory for all threads, and (numbers of one, where each part but the first begins)."""
    return like.new_empty(threads * room.each), (room.each, *room.begins)


def _run(
    loop: object, work: Blocks, like: Tensor, count: int, threads: int, given: Sequence[int]
) -> None:
    """A loop, with the vectors and the numbers of the work."""
    shared(loop, like, count, threads, [*given, *work.numbers], work.vectors.axes)
