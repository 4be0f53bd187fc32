"""PAC tap by tap with a backward of its own, which keeps the input, the kernel and the weight only.

y += (x shifted · K_t) @ W_t, in channels-last so that each tap is one matrix product. Half
precisions are computed in float32. A second derivative goes through `taps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pacswap.ops import narrow, taps
from pacswap.ops.measure import DERIVATIVE, PHI, Measure
from pacswap.ops.precision import compute_dtype, differentiable_vjp
from pacswap.ops.window import Window


def tap_distance(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """As `reference.tap_distance`; keeps only the guidance (padded) and the centre for backward."""
    size = window.output_size(guidance.shape[-2], guidance.shape[-1])
    return _TapDistance.apply(window.padded(guidance), centre, window, size, measure, channel_wise)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """As `reference.pac_conv2d`; the output has the memory format that `F.conv2d` would give it."""
    output = _PacConv2d.apply(input, kernel, weight, window, groups)
    return output if bias is None else output + bias[:, None, None]


def attach_kernel_gradient(
    output: Tensor,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    window: Window,
    groups: int,
    *,
    gradients: Callable[..., list[Tensor | None]] | None = None,
) -> Tensor:
    """Give a plain convolution's output the gradient of the adapting kernel that is 1 everywhere.

    At K ≡ 1 PAC is the convolution, but ∂y/∂K = W·v is not zero. So `output` may come from
    `F.conv2d`, bit for bit, and the kernel still learns. `output` is changed in place (as autograd
    sees it; its values stay). `gradients` computes the first derivatives in place of `_gradients`.
    """
    given = output, input, kernel, weight, window, groups
    return _KernelGradient.apply(*given, _gradients if gradients is None else gradients)


class _TapDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        padded: Tensor,
        centre: Tensor | None,
        window: Window,
        size: tuple[int, int],
        measure: Measure,
        channel_wise: bool,
    ) -> Tensor:
        at = _centre(padded, centre, window, size)
        channels = padded.shape[1] if channel_wise else 1
        distance = padded.new_zeros(padded.shape[0], channels, window.taps, *size)
        for t, (rows, columns) in enumerate(window.slices(size)):
            if centre is None and t == window.centre:
                continue  # the difference of a pixel to itself
            values = PHI[measure](padded[:, :, rows, columns] - at)
            distance[:, :, t] = values if channel_wise else values.sum(1, keepdim=True)
        return distance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        padded, centre, ctx.window, ctx.size, ctx.measure, ctx.channel_wise = inputs
        ctx.has_centre = centre is not None
        ctx.save_for_backward(*([padded] if centre is None else [padded, centre]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        padded = ctx.saved_tensors[0]
        centre = ctx.saved_tensors[1] if ctx.has_centre else None
        window, size = ctx.window, ctx.size
        if torch.is_grad_enabled():
            results = differentiable_vjp(
                lambda f, c: taps.tap_distance(
                    f, c, window.unpadded, ctx.measure, ctx.channel_wise
                ),
                (padded, centre),
                ctx.needs_input_grad[:2],
                grad,
            )
            return *results, None, None, None, None
        at = _centre(padded, centre, window, size)
        grad_padded, grad_centre = torch.zeros_like(padded), torch.zeros_like(at)
        for t, (rows, columns) in enumerate(window.slices(size)):
            if centre is None and t == window.centre:
                continue
            pull = DERIVATIVE[ctx.measure](padded[:, :, rows, columns] - at)
            pull *= grad[:, :, t]
            grad_padded[:, :, rows, columns] += pull
            grad_centre -= pull
        if centre is not None:
            return grad_padded, grad_centre, None, None, None, None
        rows, columns = _at(window, size, window.centre)
        grad_padded[:, :, rows, columns] += grad_centre
        return grad_padded, None, None, None, None, None


class _PacConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
    ) -> Tensor:
        size = window.output_size(input.shape[-2], input.shape[-1])
        wide = compute_dtype(input.dtype)
        image = window.padded(input)
        if narrow.fits(input.shape[1], groups):
            made = narrow.pac_conv2d(image.to(wide), kernel.to(wide), weight.to(wide), window, size)
            return _formatted(made, like=image, filter=weight)
        padded = _channels_last(image, wide)  # [B, H', W', C_in]
        factors = _factors(kernel, wide)  # [KH*KW, B, H_out, W_out, 1 or C_in]
        filters = _filters(weight.to(wide), groups)  # [KH*KW, G, C_in/G, C_out/G]
        B, C_out = input.shape[0], weight.shape[0]
        output = padded.new_zeros(B, *size, C_out)
        seen = padded.new_empty(B, *size, input.shape[1])
        for t, (rows, columns) in enumerate(window.slices(size)):
            torch.mul(padded[:, rows, columns], factors[t], out=seen)
            _add_product(output, seen, filters[t])
        return _formatted(output.permute(0, 3, 1, 2), like=image, filter=weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, kernel, weight, ctx.window, ctx.groups = inputs
        ctx.save_for_backward(input, kernel, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            grads = differentiable_vjp(
                lambda x, k, w: taps.pac_conv2d(x, k, w, None, ctx.window, ctx.groups),
                inputs,
                needed,
                grad,
            )
        else:
            grads = _gradients(inputs, grad, ctx.window, ctx.groups, needed)
        return *grads, None, None


class _KernelGradient(torch.autograd.Function):
    @staticmethod
    def forward(output: Tensor, *given: Any) -> Tensor:
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        changed, input, kernel, weight, ctx.window, ctx.groups, ctx.gradients = inputs
        # An output that is an input counts as a view otherwise, and views of a custom function
        # refuse the in-place activation that often follows.
        ctx.mark_dirty(changed)
        ctx.save_for_backward(input, kernel, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            # y = conv(v) + Σ (K−1)·W·v: at K = 1 the sum is 0, its mixed second derivatives are
            # not.
            grads = differentiable_vjp(
                lambda x, k, w: taps.pac_conv2d(x, k - 1, w, None, ctx.window, ctx.groups),
                inputs,
                ctx.needs_input_grad[1:4],
                grad,
            )
        else:
            grads = ctx.gradients(inputs, grad, ctx.window, ctx.groups, (False, True, False))
        return grad, *grads, None, None, None


def _gradients(
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
            None if found[0] is None else _unpadded(found[0], input, window),
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
        None if grad_padded is None else _unpadded(grad_padded.permute(0, 3, 1, 2), input, window),
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


def _formatted(output: Tensor, *, like: Tensor, filter: Tensor) -> Tensor:
    """[B, C, H, W] in the dtype and the memory format that `F.conv2d` gives its output."""
    last = any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (like, filter)
    )
    # Models that call `.view` on a convolution's output rely on this.
    return output.to(like.dtype).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )


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


def _unpadded(grad: Tensor, input: Tensor, window: Window) -> Tensor:
    """The gradient of the image from that of the image with its border, [B, C, H', W']."""
    H, W = input.shape[-2:]
    left, _, top, _ = window.border(H, W)
    # A transposed convolution that cuts more than its reach has a negative border.
    if min(window.pad) >= 0 and (window.padding_mode == "zeros" or not any(window.pad)):
        return grad[:, :, top : top + H, left : left + W].to(input.dtype)
    # The other borders repeat pixels of the image: let torch send their gradient back.
    with torch.enable_grad():
        leaf = torch.empty_like(input, dtype=grad.dtype).requires_grad_()
        (result,) = torch.autograd.grad(window.padded(leaf), leaf, grad)
    return result.to(input.dtype)
