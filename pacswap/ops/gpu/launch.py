"""Runs the Triton kernels of PAC: allocates, packs the weight, sums what was split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pacswap.ops.gpu import dense, depthwise
from pacswap.ops.gpu.geometry import Geometry, empty, is_last
from pacswap.ops.gpu.refusal import INTERPRETS
from pacswap.ops.gpu.tuning import Grid, Program, channel_block, precision, size_class

Given: TypeAlias = dict[str, Any]  # arguments of a Triton kernel by name

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
    output = empty(input, (B, CO, geometry.HO, geometry.WO), True)
    M = B * geometry.HO * geometry.WO
    if output.numel():
        programs, given = _call(input, kernel, CO, geometry, groups)
        each, side = (1, "BC") if programs is depthwise else (groups, "BO")

        def grid(m: Mapping[str, int]) -> tuple[int]:
            return (blocks(M, m["BP"]) * each * blocks(CO // each, m[side]),)

        given |= {"w": _filters(weight, programs), "y": output, "M": M, "size": size_class(M)}
        run(programs.forward, grid, output, given)
    return output if last else output.contiguous()


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
    """The gradients of the input, channels last in memory, and of the adapting kernel.

    Empty where not wanted.
    """
    B, C, H, W = input.shape
    alone = _is_depthwise(input, groups)
    CO, each = weight.shape[0], 1 if alone else groups
    grad_input = empty(input, (B, C, H, W) if want_input else (0, 0, 0, 0), True)
    rows, strides = phases(input, geometry)
    # Few large blocks would leave processors idle.
    many = blocks(rows, 128) * strides * blocks(C, 128) >= 1.5 * _processors(input)
    # Without a matrix product more channels take more registers than there are.
    block = channel_block(C // each, 32 if alone else 128 if many else 64)
    columns = each * blocks(C // each, block)
    # Taps that see the border are nobody's: their gradient stays 0. Shares are summed in float32.
    is_shared = want_kernel and kernel.shape[1] == 1 and columns > 1
    if is_shared:
        shares = kernel.new_zeros(columns, *kernel.shape, dtype=torch.float32)
    else:
        shares = kernel.new_zeros(kernel.shape if want_kernel else (0,))
    if grad.numel() and input.numel():
        programs, given = _call(input, kernel, CO, geometry, groups)
        given |= {"WANT_INPUT": want_input, "WANT_KERNEL": want_kernel, "B": B, "BC": block}
        given |= {"dy": channels_last(grad), "w": _filters(weight, programs)}
        given |= {"dx": grad_input, "dk": shares, "size": size_class(rows)}
        run(programs.pull, lambda m: (blocks(rows, m["BP"]) * strides * columns,), grad, given)
    else:
        grad_input.zero_()
    return grad_input, shares.sum(0).to(kernel.dtype) if is_shared else shares


@without_bfloat16
def weight_gradient(
    grad: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, geometry: Geometry, groups: int
) -> Tensor:
    """The gradient of the weight; of `weight` only shape and memory format count."""
    CO, C, T = weight.shape[0], input.shape[1], geometry.KH * geometry.KW
    M = grad.shape[0] * geometry.HO * geometry.WO
    if not (M and weight.numel()):
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    programs, given = _call(input, kernel, CO, geometry, groups)
    alone = programs is depthwise
    CG, OG = C // groups, CO // groups
    tiles = T * (blocks(CO, 16) if alone else groups * blocks(CG, 128) * blocks(OG, 128))
    chunk = blocks(M, _parts(input, tiles, M) * _CHUNK) * _CHUNK
    parts = blocks(M, chunk)
    dtype = weight.dtype if parts == 1 else torch.float32
    sums = grad.new_empty(parts, *((T, CO) if alone else (CO, T, CG)), dtype=dtype)

    def grid(m: Mapping[str, int]) -> tuple[int, int]:
        if alone:
            return T * blocks(CO, m["BC"]), parts
        return T * groups * blocks(CG, m["BC"]) * blocks(OG, m["BO"]), parts

    given |= {"dy": channels_last(grad), "dw": sums, "size": size_class(M)}
    given |= {"M": M, "CHUNK": chunk} if alone else {"B": grad.shape[0], "PARTS": parts}
    run(programs.weight_gradient, grid, grad, given)
    total = sums[0] if parts == 1 else sums.sum(0).to(weight.dtype)
    found = total.T.reshape(weight.shape) if alone else total.unflatten(1, weight.shape[2:])
    found = found if alone else found.permute(0, 3, 1, 2)
    return found if is_last(weight) else found.contiguous()


def gradients(
    inputs: Sequence[Tensor],
    grad: Tensor,
    geometry: Geometry,
    groups: int,
    needed: Sequence[bool],
    by: Any,
) -> list[Tensor | None]:
    """For input, kernel and weight, None where not needed.

    Args:
        inputs: of the convolution.
        grad: of its output.
        geometry: of the convolution, as the groups.
        groups: of channels.
        needed: which gradients are.
        by: whose `pull` and `weight_gradient` compute: this module, or `library` with operators.
    """
    input, *factors = inputs
    # Turned once for both.
    given = channels_last(grad), channels_last(input), *factors, geometry, groups
    found: list[Tensor | None] = [None, None, None]
    if needed[0] or needed[1]:
        found[0], found[1] = by.pull(*given, needed[0], needed[1])
    if needed[2]:
        found[2] = by.weight_gradient(*given)
    if needed[0] and found[0] is not None and not is_last(input):
        found[0] = found[0].contiguous()
    return [made if need else None for made, need in zip(found, needed, strict=True)]


def run(program: Program, grid: Grid, on: Tensor, given: Given) -> None:
    """Run a Triton kernel on the device of a tensor."""
    if not on.is_cuda or on.device.index == torch.cuda.current_device():
        program(grid, given, on)
    else:
        with torch.cuda.device_of(on):
            program(grid, given, on)


def blocks(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return (length + block - 1) // block


def power_of_two(number: int) -> int:
    """The largest that divides a number, up to the largest block.

    >>> power_of_two(96), power_of_two(2048)
    (32, 256)
    """
    return min(number & -number, 256)


def channels_last(image: Tensor) -> Tensor:
    """An image as Triton kernels read it: a pixel's channels side by side, [B, H, W, C]."""
    return image.contiguous(memory_format=torch.channels_last)


def sizes(image: Tensor, geometry: Geometry) -> Given:
    """The arguments that say where pixels and taps lie."""
    _, C, H, W = image.shape
    return {"C": C, "H": H, "W": W, **geometry._asdict()}


def _call(
    input: Tensor, kernel: Tensor, out_channels: int, geometry: Geometry, groups: int
) -> tuple[Any, Given]:
    """The module of the Triton kernels, and the arguments that all of them take."""
    given = {**sizes(input, geometry), "CO": out_channels, "EACH": kernel.shape[1] > 1}
    given |= {"x": channels_last(input), "k": kernel.contiguous()}
    if _is_depthwise(input, groups):
        return depthwise, given
    divisors = {
        "CF": power_of_two(input.shape[1] // groups),
        "OF": power_of_two(out_channels // groups),
    }
    return dense, given | divisors | {"G": groups, "PRECISION": precision()}


def _is_depthwise(input: Tensor, groups: int) -> bool:
    return groups > 1 and groups == input.shape[1]


def _filters(weight: Tensor, programs: Any) -> Tensor:
    """[C_out, C_in/G, KH, KW] as Triton kernels read it: [C_out, T, C_in/G], or [T, C_out]."""
    if programs is depthwise:
        return weight.flatten(1).T.contiguous()
    return weight.contiguous(memory_format=torch.channels_last)


def phases(image: Tensor, geometry: Geometry) -> tuple[int, int]:
    """How many pixels of a batch the same taps see, and how many such sets there are."""
    B, _, H, W = image.shape
    return B * blocks(H, geometry.SH) * blocks(W, geometry.SW), geometry.SH * geometry.SW


def _processors(input: Tensor) -> int:
    """Of the device; 1 under the interpreter."""
    if not input.is_cuda:
        return 1
    return torch.cuda.get_device_properties(input.device).multi_processor_count


def _parts(input: Tensor, tiles: int, pixels: int) -> int:
    """Into how many parts the pixels are split so that the device is busy."""
    wanted = blocks(_PROGRAMS_EACH * _processors(input), tiles)
    return max(1, min(wanted, blocks(pixels, _CHUNK)))
