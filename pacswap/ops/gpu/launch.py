"""Runs the Triton kernels of PAC: allocates, packs the weight, sums what was split."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pacswap.ops.gpu import dense, depthwise
from pacswap.ops.gpu.geometry import Geometry, empty, is_last
from pacswap.ops.gpu.refusal import INTERPRETS
from pacswap.ops.gpu.tuning import channel_block, precision, size_class

# A part of the pixels has a multiple of so many: of every block of `tuning`.
_CHUNK = 128 if INTERPRETS else 512
# So many programs keep a multiprocessor busy while some wait for memory.
_PROGRAMS_EACH = 4


def without_bfloat16(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under the interpreter compute bfloat16 in float32, and round what is returned.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers, and cuts where a
    GPU rounds.
    """

    @functools.wraps(function)
    def widened(first: Tensor, *others: Any) -> Any:
        if first.dtype != torch.bfloat16:
            return function(first, *others)
        made = function(*(t.float() if isinstance(t, Tensor) else t for t in (first, *others)))
        return tuple(t.bfloat16() for t in made) if isinstance(made, tuple) else made.bfloat16()

    return widened if INTERPRETS else function


@without_bfloat16
def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, geometry: Geometry, groups: int, last: bool
) -> Tensor:
    """PAC without a bias; the output has its channels last in memory if `last`."""
    B, CO = input.shape[0], weight.shape[0]
    output = empty(input, (B, CO, geometry.HO, geometry.WO), last)
    M = B * geometry.HO * geometry.WO
    if not output.numel():
        return output
    programs, given = _call(input, kernel, CO, geometry, groups)
    filters = _by_tap(weight, groups)  # [T, G, C_out/G, C_in/G]

    def grid(m: dict[str, int]) -> tuple[int, int]:
        each, block = (CO, m["BC"]) if programs is depthwise else (CO // groups, m["BO"])
        return blocks(M, m["BP"]), (1 if programs is depthwise else groups) * blocks(each, block)

    w = filters.transpose(2, 3).contiguous()
    run(
        programs.forward, grid, output, **given, w=w, y=output, M=M, size=size_class(M), Y_LAST=last
    )
    return output


@without_bfloat16
def pull(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    geometry: Geometry,
    groups: int,
    want_input: bool,
    want_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the input and of the adapting kernel, empty where not wanted."""
    B, C, H, W = input.shape
    CO, alone = weight.shape[0], _is_depthwise(input, groups)
    last = is_last(input)
    grad_input = empty(input, (B, C, H, W) if want_input else (0, 0, 0, 0), last)
    block = channel_block(C if alone else C // groups)
    columns = blocks(C, block) if alone else groups * blocks(C // groups, block)
    # Taps that see the border are nobody's: their gradient stays 0.
    if not want_kernel:
        shares = kernel.new_empty(0)
    elif kernel.shape[1] > 1:
        shares = torch.zeros_like(kernel, memory_format=torch.contiguous_format)
    else:
        shares = grad.new_zeros(columns, *kernel.shape, dtype=torch.float32)
    if grad.numel() and input.numel():
        programs, given = _call(input, kernel, CO, geometry, groups)
        dy, dy_last = laid(grad)
        rows, strides = phases(input, geometry)

        def grid(m: dict[str, int]) -> tuple[int, int]:
            return blocks(rows, m["BP"]) * strides, columns

        given |= geometry.lift | {"WANT_INPUT": want_input, "WANT_KERNEL": want_kernel}
        given |= {"dy": dy, "Y_LAST": dy_last, "w": _by_tap(weight, groups).contiguous()}
        given |= {"dx": grad_input, "D_LAST": last, "dk": shares, "B": B, "BC": block}
        run(programs.pull, grid, grad, **given, size=size_class(rows))
    else:
        grad_input.zero_()
    if want_kernel and kernel.shape[1] == 1:
        shares = shares.sum(0).to(kernel.dtype)
    return grad_input, shares


@without_bfloat16
def weight_gradient(
    grad: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, geometry: Geometry, groups: int
) -> Tensor:
    """The gradient of the weight; of `weight` only the shape counts."""
    CO, C, T = weight.shape[0], input.shape[1], geometry.KH * geometry.KW
    M = grad.shape[0] * geometry.HO * geometry.WO
    if not (M and weight.numel()):
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    programs, given = _call(input, kernel, CO, geometry, groups)
    alone = programs is depthwise
    CG, OG = C // groups, CO // groups
    tiles = T * (blocks(CO, 16) if alone else groups * blocks(CG, 64) * blocks(OG, 64))
    chunk = blocks(M, _parts(input, tiles, M) * _CHUNK) * _CHUNK
    parts = blocks(M, chunk)
    shape = (T, CO) if alone else (T, groups, CG, OG)
    sums = grad.new_empty(parts, *shape, dtype=torch.float32)
    dy, dy_last = laid(grad)

    def grid(m: dict[str, int]) -> tuple[int, int]:
        if alone:
            return T * blocks(CO, m["BC"]), parts
        return T * groups * blocks(CG, m["BC"]) * blocks(OG, m["BO"]), parts

    given |= {"dy": dy, "Y_LAST": dy_last, "dw": sums, "M": M, "CHUNK": chunk}
    run(programs.weight_gradient, grid, grad, **given, size=size_class(M))
    total = sums.sum(0).to(weight.dtype)
    total = total.T if alone else total.permute(1, 3, 2, 0)
    return total.reshape(weight.shape).contiguous()


def run(
    program: Any, grid: Callable[[dict[str, int]], tuple[int, int]], on: Tensor, **given: Any
) -> None:
    """Run a Triton kernel on the device of a tensor, with those of the arguments that it has."""
    with torch.cuda.device_of(on):
        program[grid](**{name: given[name] for name in program.arg_names if name in given})


def blocks(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return (length + block - 1) // block


def laid(image: Tensor) -> tuple[Tensor, bool]:
    """An image as Triton kernels read it, and whether its channels are last in memory."""
    return (image, True) if is_last(image) else (image.contiguous(), False)


def sizes(image: Tensor, geometry: Geometry) -> dict[str, Any]:
    """The arguments that say where pixels and taps lie."""
    _, C, H, W = image.shape
    return {"C": C, "H": H, "W": W, **geometry._asdict()}


def _call(
    input: Tensor, kernel: Tensor, out_channels: int, geometry: Geometry, groups: int
) -> tuple[Any, dict[str, Any]]:
    """The module of the Triton kernels, and the arguments that all of them take."""
    x, last = laid(input)
    given = {**sizes(input, geometry), "CO": out_channels, "EACH": kernel.shape[1] > 1}
    given |= {"x": x, "X_LAST": last, "k": kernel.contiguous()}
    if _is_depthwise(input, groups):
        return depthwise, given
    return dense, given | {"G": groups, "PRECISION": precision()}


def _is_depthwise(input: Tensor, groups: int) -> bool:
    return groups > 1 and groups == input.shape[1]


def _by_tap(weight: Tensor, groups: int) -> Tensor:
    """[C_out, C_in/G, KH, KW] to [KH*KW, G, C_out/G, C_in/G]."""
    CO, CG = weight.shape[:2]
    return weight.reshape(groups, CO // groups, CG, -1).permute(3, 0, 1, 2)


def phases(image: Tensor, geometry: Geometry) -> tuple[int, int]:
    """How many pixels of a batch the same taps see, and how many such sets there are."""
    B, _, H, W = image.shape
    return B * blocks(H, geometry.SH) * blocks(W, geometry.SW), geometry.SH * geometry.SW


def _parts(input: Tensor, tiles: int, pixels: int) -> int:
    """Into how many parts the pixels are split so that the device is busy."""
    processors = 1
    if input.is_cuda:
        processors = torch.cuda.get_device_properties(input.device).multi_processor_count
    wanted = blocks(_PROGRAMS_EACH * processors, tiles)
    return max(1, min(wanted, blocks(pixels, _CHUNK)))
