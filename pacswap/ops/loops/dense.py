"""The dense and the grouped convolution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from pacswap.ops.loops import machine_dense as machine
from pacswap.ops.loops import registers
from pacswap.ops.loops.threads import parts, shared
from pacswap.ops.window import Window

_CACHE = 160 << 10
_DEEP = 144


@dataclass(frozen=True)
class Blocks:
    window: Window
    image: tuple[int, int]
    batch: int
    channels: tuple[int, int]
    groups: int
    threads: int
    lanes: int
    high: int
    chunks: int
    pieces: int
    parts: int

    @cached_property
    def size(self):
        return self.window.output_size(*self.image)

    @cached_property
    def step(self):
        return max(self.lanes, self.high)

    @cached_property
    def wide(self):
        return registers.ACROSS * self.lanes

    @cached_property
    def count(self):
        """Most outputs of a chunk."""
        return -(-self.size[0] // self.chunks) * self.size[1]

    @cached_property
    def line(self):
        return -(-self.count // self.lanes) * self.lanes

    @cached_property
    def column(self):
        deep = (self.window.kernel_size[0] - 1) * self.window.dilation[0] // self.window.stride[0]
        return self.line + deep * self.size[1]

    @cached_property
    def numbers(self):
        left, _, top, _ = self.window.border(*self.image)
        w = self.window
        return (*self.image, *self.size, top, left, *w.stride, *w.dilation, *w.kernel_size, 0,
                self.chunks, self.column, self.line, w.taps, *self.offsets)

    @cached_property
    def offsets(self):
        found = []
        for i in range(self.window.kernel_size[0]):
            down, above = divmod(i * self.window.dilation[0], self.window.stride[0])
            for j in range(self.window.kernel_size[1]):
                found.append((j * self.window.stride[0] + above) * self.column + down * self.size[1])
        return found

    @cached_property
    def each(self):
        """most channels of a piece"""
        return -(-self.channels[0] // self.pieces)

    @cached_property
    def columns(self):
        return self.each * self.window.kernel_size[1] * self.window.stride[0] * self.column


@lru_cache(maxsize=256)
def forward_blocks(window, image, batch, channels, groups, threads, lanes, high):
    size = window.output_size(*image)
    C, O = channels
    taps = window.taps
    pieces = -(-C // max(1, _DEEP // taps))
    each = -(-C // pieces)
    units = groups * -(-O // high)
    best = None
    for parts in (p for p in range(1, threads + 1) if threads % p == 0):
        if parts > units:
            break
        outs = min(-(-O // high), -(-units // parts)) * high
        numbers = each * (taps + window.kernel_size[1] * window.stride[0]) + outs
        rows = max(1, _CACHE // (numbers * size[1]))
        chunks = -(-size[0] // rows)
        others = threads // parts
        while batch * chunks % others and chunks < size[0]:
            chunks += 1
        items = -(-batch * chunks * parts // threads)
        vectors = -(-(-(-size[0] // chunks) * size[1]) // lanes)
        cost = items * vectors * (-(-units // parts) * high + 6)
        if best is None or cost < best[0]:
            best = (cost, chunks, parts)
    _, chunks, parts = best
    return Blocks(window, image, batch, channels, groups, threads, lanes, high, chunks, pieces, parts)


def convolve(image, kernel, weight, output, window, groups):
    axes = registers.vector_axes()
    lanes, high = registers.lanes(axes, image.itemsize), registers.rows(axes)
    O, C = weight.shape[0] // groups, weight.shape[1]
    macs = output.numel() * C * window.taps
    threads = parts(output.shape[0] * output.shape[2] * -(-weight.shape[0] // high), macs // 16)
    B = image.shape[0]
    lie = forward_blocks(window, tuple(image.shape[2:]), B, (C, O), groups, threads, lanes, high)
    factors = image.new_empty(B * lie.chunks * window.taps * lie.line)
    packed = image.new_empty(groups * -(-O // lie.step) * C * window.taps * lie.step)
    n = B * lie.chunks * window.taps
    shared(machine.mask, image, n, parts(n, factors.numel()),
           [kernel.data_ptr(), factors.data_ptr(), B, *lie.numbers], axes=axes)
    n = groups * -(-O // lie.step)
    shared(machine.pack, image, n, parts(n, packed.numel()),
           [weight.data_ptr(), packed.data_ptr(), groups, O, C * window.taps, lie.step, lie.step], axes=axes)
    blocks = -(-lie.count // lie.wide)
    begin_sums = lie.each * window.taps * lie.wide
    units = -(-groups * -(-O // high) // lie.parts)
    begin_columns = begin_sums + min(units, -(-O // high)) * high * blocks * lie.wide
    each = begin_columns + lie.columns
    each = -(-each // 16) * 16
    room = image.new_empty(threads * each)
    shared(machine.forward, image, B * lie.chunks * lie.parts, threads,
           [image.data_ptr(), factors.data_ptr(), packed.data_ptr(), output.data_ptr(), room.data_ptr(),
            each, begin_sums, begin_columns, B, groups, C, O, lie.pieces, lie.parts, *lie.numbers], axes=axes)


@lru_cache(maxsize=256)
def backward_blocks(window, image, batch, channels, groups, threads, lanes, high):
    size = window.output_size(*image)
    C, O = channels
    pieces = -(-C // max(1, _DEEP // window.taps))
    while groups * pieces % threads and pieces < C:
        pieces += 1
    each = -(-C // pieces)
    numbers = each * (2 * window.kernel_size[1] * window.stride[0])
    rows = max(1, _CACHE // (numbers * size[1]))
    chunks = -(-size[0] // rows)
    return Blocks(window, image, batch, channels, groups, threads, lanes, high, chunks, pieces, 1)


@lru_cache(maxsize=256)
def table_of(lie):
    found = [(c * lie.columns // lie.each + x, t * lie.line) for c in range(lie.each) for t, x in enumerate(lie.offsets)]
    return torch.tensor(found, dtype=torch.int64)


def gradients(image, kernel, weight, grad, window, groups, needed):
    axes = registers.vector_axes()
    lanes, high = registers.lanes(axes, image.itemsize), registers.rows(axes)
    O, C = weight.shape[0] // groups, weight.shape[1]
    macs = grad.numel() * C * window.taps
    B, (H_out, W_out) = image.shape[0], grad.shape[2:]
    threads = parts(image.shape[1], macs // 16)
    lie = backward_blocks(window, tuple(image.shape[2:]), B, (C, O), groups, threads, lanes, high)
    size = B * lie.chunks * window.taps * lie.line
    factors = image.new_empty(size)
    n = B * lie.chunks * window.taps
    shared(machine.mask, image, n, parts(n, size),
           [kernel.data_ptr(), factors.data_ptr(), B, *lie.numbers], axes=axes)
    found = dK = dW = None
    wide = lie.wide
    if needed[0] or needed[1]:
        most = -(-lie.count // wide)
        blocks = image.new_empty(B * lie.chunks * most * groups * O * wide)
        n = B * lie.chunks
        shared(machine.lay, image, n, parts(n, blocks.numel()),
               [grad.data_ptr(), blocks.data_ptr(), B, groups * O, most, *lie.numbers], axes=axes)
        found, dots = torch.zeros_like(image), image.new_zeros(threads * size)
        begin = -(-lie.each * window.taps // lie.step) * lie.step * O
        columns = lie.columns + lie.wide
        each = -(-(begin + 2 * columns) // 16) * 16
        room = image.new_empty(threads * each)
        shared(machine.backward, image, groups * lie.pieces, threads,
               [image.data_ptr(), factors.data_ptr(), weight.data_ptr(), blocks.data_ptr(), found.data_ptr(),
                dots.data_ptr(), room.data_ptr(), each, begin, B, groups, C, O, lie.pieces, most,
                table_of(lie).data_ptr(), *lie.numbers], axes=axes)
        dK = torch.zeros_like(kernel)
        n = B * lie.chunks * window.taps
        shared(machine.collect, image, n, parts(n, threads * size),
               [dots.data_ptr(), dK.data_ptr(), threads, B, *lie.numbers], axes=axes)
    if needed[2]:
        panels = -(-O // wide)
        turned = image.new_empty(B * groups * panels * H_out * W_out * wide)
        n = B * groups * panels
        shared(machine.pack, image, n, parts(n, turned.numel()),
               [grad.data_ptr(), turned.data_ptr(), B * groups, O, H_out * W_out, wide, wide], axes=axes)
        dW = torch.empty_like(weight)
        once = 3
        deep = -(-lie.each * window.taps // high) * high
        begin_sums = once * deep * wide
        begin_columns = begin_sums + panels * deep * wide
        each = -(-(begin_columns + lie.columns + lie.wide) // 16) * 16
        room = image.new_empty(threads * each)
        shared(machine.weights, image, groups * lie.pieces, threads,
               [image.data_ptr(), factors.data_ptr(), turned.data_ptr(), dW.data_ptr(), room.data_ptr(), each,
                begin_sums, begin_columns, once, B, groups, C, O, lie.pieces, *lie.numbers], axes=axes)
    return found if needed[0] else None, dK if needed[1] else None, dW
