"""PAC tap by tap in torch operations, with a backward pass of its own.

y += (x shifted · K_t) @ W_t, in channels-last so that each tap is one matrix product. Half
precisions are computed in float32.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from pacswap.ops import handwritten, narrow
from pacswap.ops.format import as_convolved, unpadded
from pacswap.ops.measure import DERIVATIVE, PHI, Measure
from pacswap.ops.precision import compute_dtype
from pacswap.ops.window import Window

tap_distance, pac_conv2d, attach_kernel_gradient = handwritten.operations(sys.modules[__name__])


def distances(
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> Tensor:
    """As `handwritten.Engine` says, like all that follow."""
    size = window.output_size(guidance.shape[-2], guidance.shape[-1])
    padded = window.padded(guidance)
    at = _centre(padded, centre, window, size)
    channels = padded.shape[1] if channel_wise else 1
    distance = padded.new_zeros(padded.shape[0], channels, window.taps, *size)
    for t, (rows, columns) in enumerate(window.slices(size)):
        if centre is None and t == window.centre:
            continue  # the difference of a pixel to itself
        values = PHI[measure](padded[:, :, rows, columns] - at)
        distance[:, :, t] = values if channel_wise else values.sum(1, keepdim=True)
    return distance


def distance_gradients(
    guidance: Tensor,
    centre: Tensor | None,
    grad: Tensor,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of each difference, sent to its two ends."""
    size = (grad.shape[-2], grad.shape[-1])
    padded = window.padded(guidance)
    at = _centre(padded, centre, window, size)
    grad_padded, grad_centre = torch.zeros_like(padded), torch.zeros_like(at)
    for t, (rows, columns) in enumerate(window.slices(size)):
        if centre is None and t == window.centre:
            continue
        pull = DERIVATIVE[measure](padded[:, :, rows, columns] - at)
        pull *= grad[:, :, t]
        grad_padded[:, :, rows, columns] += pull
        grad_centre -= pull
    if centre is not None:
        return unpadded(grad_padded, guidance, window), grad_centre
    rows, columns = _at(window, size, window.centre)
    grad_padded[:, :, rows, columns] += grad_centre
    return unpadded(grad_padded, guidance, window), None


def convolve(input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """Tap by tap; all taps of some rows at once where there are few channels."""
    size = window.output_size(input.shape[-2], input.shape[-1])
    wide = compute_dtype(input.dtype)
    image = window.padded(input)
    if narrow.fits(input.shape[1], groups):
        made = narrow.pac_conv2d(image.to(wide), kernel.to(wide), weight.to(wide), window, size)
        return as_convolved(made.to(input.dtype), image, weight)
    padded = _channels_last(image, wide)  # [B, H', W', C_in]
    factors = _factors(kernel, wide)  # [KH*KW, B, H_out, W_out, 1 or C_in]
    filters = _filters(weight.to(wide), groups)  # [KH*KW, G, C_in/G, C_out/G]
    B, C_out = input.shape[0], weight.shape[0]
    output = padded.new_zeros(B, *size, C_out)
    seen = padded.new_empty(B, *size, input.shape[1])
    for t, (rows, columns) in enumerate(window.slices(size)):
        torch.mul(padded[:, rows, columns], factors[t], out=seen)
        _add_product(output, seen, filters[t])
    return as_convolved(output.permute(0, 3, 1, 2).to(input.dtype), image, weight)


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    window: Window,
    groups: int,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients for input, kernel and weight. Z = dY·W_tᵀ serves the first two."""
    input, kernel, weight = inputs
    need_input, need_kernel, need_weight = needed
    wide = compute_dtype(input.dtype)
    size = (grad.shape[-2], grad.shape[-1])
    image = window.padded(input)
    if narrow.fits(input.shape[1], groups):
        found = narrow.gradients(
            image.to(wide), kernel.to(wide), weight.to(wide), grad.to(wide), window, needed
        )
        return [
            None if found[0] is None else unpadded(found[0], input, window),
            None if found[1] is None else found[1].to(kernel.dtype),
            None if found[2] is None else found[2].to(weight.dtype),
        ]
    padded = _channels_last(image, wide)
    factors = _factors(kernel, wide)
    filters = _filters(weight.to(wide), groups)
    output = _channels_last(grad, wide)  # [B, H_out, W_out, C_out]
    grad_padded = torch.zeros_like(padded) if need_input else None
    grad_factors = torch.empty_like(factors) if need_kernel else None
    grad_filters = torch.zeros_like(filters) if need_weight else None
    for t, (rows, columns) in enumerate(window.slices(size)):
        seen = padded[:, rows, columns]
        if grad_filters is not None:
            _add_filter_gradient(grad_filters[t], seen * factors[t], output)
        if grad_padded is None and grad_factors is None:
            continue
        pulled = torch.zeros_like(seen, memory_format=torch.contiguous_format)
        _add_product(pulled, output, filters[t].transpose(1, 2))
        if grad_factors is not None:
            product = pulled * seen
            grad_factors[t] = product if factors.shape[-1] > 1 else product.sum(-1, keepdim=True)
        if grad_padded is not None:
            grad_padded[:, rows, columns] += pulled.mul_(factors[t])
    return [
        None if grad_padded is None else unpadded(grad_padded.permute(0, 3, 1, 2), input, window),
        None if grad_factors is None else grad_factors.permute(1, 4, 0, 2, 3).to(kernel.dtype),
        None if grad_filters is None else _weight_layout(grad_filters, weight),
    ]


def _add_product(output: Tensor, seen: Tensor, filters: Tensor) -> None:
    """Output += seen @ filters, group by group; [.., G·c] and [G, c, o] make [.., G·o]."""
    G, c, o = filters.shape
    if G == 1:
        output.view(-1, o).addmm_(seen.view(-1, c), filters[0])
    elif c == 1:
        output.view(-1, G, o).addcmul_(seen.view(-1, G, 1), filters[:, 0])
    elif o == 1:
        output.view(-1, G).add_((seen.view(-1, G, c) * filters[:, :, 0]).sum(-1))
    else:
        # In place, which autocast leaves in the precision of its operands; it would round `bmm`.
        grouped = output.view(-1, G, o).transpose(0, 1)  # [G, N, o]
        grouped.baddbmm_(seen.view(-1, G, c).transpose(0, 1), filters)


def _add_filter_gradient(grad_filters: Tensor, seen: Tensor, output: Tensor) -> None:
    """grad_filters [G, c, o] += seenᵀ @ output, group by group."""
    G, c, o = grad_filters.shape
    left, right = seen.reshape(-1, G, c), output.reshape(-1, G, o)
    if G == 1:
        grad_filters[0].addmm_(left[:, 0].T, right[:, 0])
    elif c == 1 or o == 1:
        grad_filters.add_((left.unsqueeze(-1) * right.unsqueeze(-2)).sum(0))
    else:
        grad_filters.baddbmm_(left.permute(1, 2, 0), right.transpose(0, 1))


def _centre(padded: Tensor, centre: Tensor | None, window: Window, size: tuple[int, int]) -> Tensor:
    """f_p, [B, D, H_out, W_out]."""
    if centre is not None:
        return centre
    rows, columns = _at(window, size, window.centre)
    return padded[:, :, rows, columns]


def _at(window: Window, size: tuple[int, int], tap: int) -> tuple[slice, slice]:
    return list(window.slices(size))[tap]


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, C, H, W] to contiguous [B, H, W, C]."""
    return x.to(dtype).permute(0, 2, 3, 1).contiguous()


def _factors(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1 or C, KH*KW, H_out, W_out] to [KH*KW, B, H_out, W_out, 1 or C]."""
    return kernel.to(dtype).permute(2, 0, 3, 4, 1)


def _filters(weight: Tensor, groups: int) -> Tensor:
    """[C_out, C_in/G, KH, KW] to [KH*KW, G, C_in/G, C_out/G]."""
    C_out, c = weight.shape[:2]
    return weight.reshape(groups, C_out // groups, c, -1).permute(3, 0, 2, 1).contiguous()


def _weight_layout(filters: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_filters`."""
    return filters.permute(1, 3, 2, 0).reshape(weight.shape).to(weight.dtype)
