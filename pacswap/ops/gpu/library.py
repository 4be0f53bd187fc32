"""PAC and its distance as operators of torch, `torch.ops.pacswap.*`, opaque to compilers.

Each is registered with its shapes (for compilers) and its gradient. A second derivative goes
through `taps`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from pacswap.ops import taps
from pacswap.ops.gpu import distances, launch
from pacswap.ops.gpu.geometry import Geometry, empty, is_last
from pacswap.ops.precision import differentiable_vjp

_CALL = "SymInt[] geometry, SymInt groups"
_TENSORS = "Tensor input, Tensor kernel, Tensor weight"
_PLACES = "SymInt[] geometry, str measure, bool channel_wise"


def _operator(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"pacswap::{name}", mutates_args=(), schema=schema)


@_operator("pac_conv2d", f"({_TENSORS}, {_CALL}, bool last) -> Tensor")
def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, geometry: list[int], groups: int, last: bool
) -> Tensor:
    """As `launch.pac_conv2d`."""
    return launch.pac_conv2d(input, kernel, weight, Geometry(*geometry), groups, last)


@_operator(
    "pac_conv2d_pull",
    f"(Tensor grad, {_TENSORS}, {_CALL}, bool want_input, bool want_kernel) -> (Tensor, Tensor)",
)
def pull(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    geometry: list[int],
    groups: int,
    want_input: bool,
    want_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """As `launch.pull`."""
    wanted = want_input, want_kernel
    return launch.pull(grad, input, kernel, weight, Geometry(*geometry), groups, *wanted)


@_operator("pac_conv2d_weight_gradient", f"(Tensor grad, {_TENSORS}, {_CALL}) -> Tensor")
def weight_gradient(
    grad: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, geometry: list[int], groups: int
) -> Tensor:
    """As `launch.weight_gradient`."""
    return launch.weight_gradient(grad, input, kernel, weight, Geometry(*geometry), groups)


@_operator("tap_distance", f"(Tensor guidance, Tensor? centre, {_PLACES}) -> Tensor")
def tap_distance(
    guidance: Tensor, centre: Tensor | None, geometry: list[int], measure: str, channel_wise: bool
) -> Tensor:
    """As `distances.tap_distance`."""
    return distances.tap_distance(guidance, centre, Geometry(*geometry), measure, channel_wise)


@_operator(
    "tap_distance_gradients",
    f"(Tensor grad, Tensor guidance, Tensor? centre, {_PLACES}) -> (Tensor, Tensor)",
)
def tap_distance_gradients(
    grad: Tensor,
    guidance: Tensor,
    centre: Tensor | None,
    geometry: list[int],
    measure: str,
    channel_wise: bool,
) -> tuple[Tensor, Tensor]:
    """As `distances.gradients`."""
    given = guidance, centre, Geometry(*geometry), measure, channel_wise
    return distances.gradients(grad, *given)


@pac_conv2d.register_fake
def _(input: Tensor, kernel: Tensor, weight: Tensor, geometry: list[int], groups: int, last: bool):  # type: ignore[no-untyped-def]
    return empty(input, (input.shape[0], weight.shape[0], *geometry[-2:]), last)


@pull.register_fake
def _(grad, input, kernel, weight, geometry, groups, want_input, want_kernel):  # type: ignore[no-untyped-def]
    size = tuple(input.shape) if want_input else (0, 0, 0, 0)
    grad_kernel = torch.empty_like(kernel, memory_format=torch.contiguous_format)
    made = grad_kernel if want_kernel else kernel.new_empty(0)
    return empty(input, size, True), made


@weight_gradient.register_fake
def _(grad, input, kernel, weight, geometry, groups):  # type: ignore[no-untyped-def]
    return empty(weight, tuple(weight.shape), is_last(weight))


@tap_distance.register_fake
def _(guidance, centre, geometry, measure, channel_wise):  # type: ignore[no-untyped-def]
    B, D = guidance.shape[:2]
    T = geometry[0] * geometry[1]
    return guidance.new_empty(B, D if channel_wise else 1, T, *geometry[-2:])


@tap_distance_gradients.register_fake
def _(grad, guidance, centre, geometry, measure, channel_wise):  # type: ignore[no-untyped-def]
    size = (*guidance.shape[:2], *geometry[-2:])
    made = empty(guidance, tuple(guidance.shape), is_last(guidance))
    return made, guidance.new_empty(size if centre is not None else (0,))


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, kernel, weight, ctx.geometry, ctx.groups, _ = inputs
    ctx.save_for_backward(input, kernel, weight)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
    geometry, groups = Geometry(*ctx.geometry), ctx.groups
    if torch.is_grad_enabled():
        window = geometry.window(*inputs[0].shape[2:])
        found = differentiable_vjp(
            lambda x, k, w: taps.pac_conv2d(x, k, w, None, window, groups), inputs, needed, grad
        )
    else:
        found = launch.gradients(inputs, grad, geometry, groups, needed, sys.modules[__name__])
    return *found, None, None, None


def _keep_distance(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    guidance, centre, ctx.geometry, ctx.measure, ctx.channel_wise = inputs
    ctx.save_for_backward(guidance, centre)


def _distance_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    guidance, centre = ctx.saved_tensors
    if torch.is_grad_enabled():
        window = Geometry(*ctx.geometry).window(*guidance.shape[2:])
        made = differentiable_vjp(
            lambda f, c: taps.tap_distance(f, c, window, ctx.measure, ctx.channel_wise),
            (guidance, centre),
            ctx.needs_input_grad[:2],
            grad,
        )
        return *made, None, None, None
    given = guidance, centre, list(ctx.geometry), ctx.measure, ctx.channel_wise
    grad_guidance, grad_centre = tap_distance_gradients(grad, *given)
    return grad_guidance, None if centre is None else grad_centre, None, None, None


pac_conv2d.register_autograd(_conv_backward, setup_context=_keep_conv)
tap_distance.register_autograd(_distance_backward, setup_context=_keep_distance)
