"""Backward passes by hand, which keep the input, the kernel and the weight only.

An engine (`eager`, `loops`) computes; here is what autograd is told. A second derivative, and one
for many gradients at once, goes through `taps`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pacswap.ops import taps
from pacswap.ops.forms import exponential, pulls
from pacswap.ops.measure import Measure
from pacswap.ops.precision import differentiable_vjp
from pacswap.ops.transforms import is_batched
from pacswap.ops.window import Window


class Engine(Protocol):
    """What computes, without autograd."""

    def convolve(
        self, input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
    ) -> Tensor:
        """The convolution, in the dtype of `input` and the memory format `F.conv2d` gives."""

    def gradients(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        grad: Tensor,
        window: Window,
        groups: int,
        needed: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """For input, kernel and weight, each in its dtype, None where not needed."""

    def distances(
        self,
        guidance: Tensor,
        centre: Tensor | None,
        window: Window,
        measure: Measure,
        channel_wise: bool,
    ) -> Tensor:
        """[B, 1 or D, KH*KW, H_out, W_out], as `reference.tap_distance`."""

    def distance_gradients(
        self,
        guidance: Tensor,
        centre: Tensor | None,
        grad: Tensor,
        window: Window,
        measure: Measure,
        channel_wise: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """For the guidance, and for the centre if that was given."""


class ExponentialEngine(Engine, Protocol):
    """One that also computes the adapting kernel of a distance, in the same pass."""

    def exponentials(
        self,
        guidance: Tensor,
        centre: Tensor | None,
        window: Window,
        measure: Measure,
        divisor: float,
    ) -> Tensor:
        """As `forms.exponential` of the distances; one kernel for all channels."""


def tap_distance(
    engine: Engine,
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    measure: Measure,
    channel_wise: bool,
) -> Tensor:
    """As `reference.tap_distance`; keeps only the guidance and the centre for backward."""
    if _learns(guidance, centre):
        return _TapDistance.apply(guidance, centre, window, measure, channel_wise, engine)
    return engine.distances(guidance, centre, window, measure, channel_wise)


def tap_exponential(
    engine: ExponentialEngine,
    guidance: Tensor,
    centre: Tensor | None,
    window: Window,
    measure: Measure,
    divisor: float | Tensor,
) -> Tensor:
    """e^(d / divisor) of `tap_distance`; keeps itself, the guidance and the centre for backward.

    d is computed again where the divisor, a scalar, learns. Where there is no such pass (a divisor
    that is not negative, features of inference mode) it is made of `tap_distance`.
    """
    scale, number = None, divisor
    if isinstance(divisor, Tensor):
        scale, number = divisor, divisor.detach().item()
    learns = _learns(guidance, centre, scale)
    if not number < 0 or (learns and _is_unkept(guidance, centre)):
        return exponential(tap_distance(engine, guidance, centre, window, measure, False), divisor)
    if learns:
        given = (guidance, centre, scale, number, window, measure, engine)
        return _TapExponential.apply(*given)
    return engine.exponentials(guidance, centre, window, measure, float(number))


def pac_conv2d(
    engine: Engine,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
) -> Tensor:
    """As `reference.pac_conv2d`; the output has the memory format that `F.conv2d` would give it."""
    if _learns(input, kernel, weight):
        output = _PacConv2d.apply(input, kernel, weight, window, groups, engine)
    else:
        output = engine.convolve(input, kernel, weight, window, groups)
    return output if bias is None else output + bias[:, None, None]


def attach_kernel_gradient(
    engine: Engine,
    output: Tensor,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    window: Window,
    groups: int,
) -> Tensor:
    """Give a plain convolution's output the gradient of the adapting kernel that is 1 everywhere.

    At K ≡ 1 PAC is the convolution, but ∂y/∂K = W·v is not zero. So `output` may come from
    `F.conv2d`, bit for bit, and the kernel still learns. `output` is changed in place (as autograd
    sees it; its values stay).
    """
    return _KernelGradient.apply(output, input, kernel, weight, window, groups, engine)


def operations(engine: Any) -> tuple[partial[Tensor], partial[Tensor], partial[Tensor]]:
    """The three functions that every backend has, of one engine."""
    return (
        partial(tap_distance, engine),
        partial(pac_conv2d, engine),
        partial(attach_kernel_gradient, engine),
    )


def _learns(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know: it takes longer than a small layer."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _is_unkept(*tensors: Tensor | None) -> bool:
    """Whether autograd refuses to keep one: it was made in inference mode."""
    return any(t is not None and t.is_inference() for t in tensors)


# Each has one `forward`, without a `setup_context`: torch would look at its signature in each call,
# which takes as long as a small layer. torch.func, which wants that, has other backends.


class _TapDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        guidance: Tensor,
        centre: Tensor | None,
        window: Window,
        measure: Measure,
        channel_wise: bool,
        engine: Engine,
    ) -> Tensor:
        ctx.window, ctx.engine, ctx.options = window, engine, (measure, channel_wise)
        ctx.save_for_backward(guidance, centre)
        return engine.distances(guidance, centre, window, measure, channel_wise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: a checkpoint that recomputes them gives them once.
        guidance, centre = ctx.saved_tensors
        window, options = ctx.window, ctx.options
        results: Any
        if torch.is_grad_enabled() or is_batched(grad):
            results = differentiable_vjp(
                lambda f, c: taps.tap_distance(f, c, window, *options),
                (guidance, centre),
                ctx.needs_input_grad[:2],
                grad,
            )
        else:
            results = ctx.engine.distance_gradients(guidance, centre, grad, window, *options)
        return *results, None, None, None, None


class _TapExponential(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        guidance: Tensor,
        centre: Tensor | None,
        scale: Tensor | None,
        divisor: float,
        window: Window,
        measure: Measure,
        engine: ExponentialEngine,
    ) -> Tensor:
        ctx.divisor, ctx.window, ctx.measure, ctx.engine = divisor, window, measure, engine
        output = engine.exponentials(guidance, centre, window, measure, divisor)
        ctx.save_for_backward(guidance, centre, scale, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        guidance, centre, scale, kernel = ctx.saved_tensors
        window, options = ctx.window, (ctx.measure, False)
        results: Any
        if torch.is_grad_enabled() or is_batched(grad):

            def made(f: Tensor, c: Tensor | None, s: Tensor | None) -> Tensor:
                d = taps.tap_distance(f, c, window, *options)
                return exponential(d, ctx.divisor if s is None else s)

            inputs, needed = (guidance, centre, scale), ctx.needs_input_grad[:3]
            results = differentiable_vjp(made, inputs, needed, grad)
        else:
            pulled, results = pulls(grad, kernel, ctx.divisor), [None, None, None]
            if any(ctx.needs_input_grad[:2]):
                given = (guidance, centre, pulled, window, *options)
                results[:2] = ctx.engine.distance_gradients(*given)
            if ctx.needs_input_grad[2]:
                d = ctx.engine.distances(guidance, centre, window, *options)
                results[2] = ((pulled * d).sum() / -ctx.divisor).to(scale.dtype).view_as(scale)
        return *results, None, None, None, None


class _PacConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        kernel: Tensor,
        weight: Tensor,
        window: Window,
        groups: int,
        engine: Engine,
    ) -> Tensor:
        ctx.window, ctx.groups, ctx.engine = window, groups, engine
        ctx.save_for_backward(input, kernel, weight)
        return engine.convolve(input, kernel, weight, window, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_batched(grad):
            grads = differentiable_vjp(
                lambda x, k, w: taps.pac_conv2d(x, k, w, None, ctx.window, ctx.groups),
                inputs,
                needed,
                grad,
            )
        else:
            grads = ctx.engine.gradients(inputs, grad, ctx.window, ctx.groups, needed)
        return *grads, None, None, None


class _KernelGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        input: Tensor,
        kernel: Tensor,
        weight: Tensor,
        window: Window,
        groups: int,
        engine: Engine,
    ) -> Tensor:
        ctx.window, ctx.groups, ctx.engine = window, groups, engine
        # An output that is an input counts as a view otherwise, and views of a custom function
        # refuse the in-place activation that often follows.
        ctx.mark_dirty(output)
        ctx.save_for_backward(input, kernel, weight)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):
            # y = conv(v) + Σ (K−1)·W·v: at K = 1 the sum is 0, its mixed second derivatives are
            # not.
            grads = differentiable_vjp(
                lambda x, k, w: taps.pac_conv2d(x, k - 1, w, None, ctx.window, ctx.groups),
                inputs,
                ctx.needs_input_grad[1:4],
                grad,
            )
        else:
            needed = (False, True, False)
            grads = ctx.engine.gradients(inputs, grad, ctx.window, ctx.groups, needed)
        return grad, *grads, None, None, None
