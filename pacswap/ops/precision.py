"""Which dtype an operation computes in, and second derivatives of hand-written backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pacswap.errors import ShapeError


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions, else the dtype itself.

    >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_floating(**tensors: Tensor | None) -> None:
    """Raise unless all tensors are real floating point, of one dtype, on one device.

    Raises:
        ShapeError: with every tensor's dtype and device.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given.values()
    if first.is_floating_point():
        dtype, device = first.dtype, first.device
        if all(tensor.dtype == dtype and tensor.device == device for tensor in others):
            return
    listed = ", ".join(
        f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in given.items()
    )
    raise ShapeError(f"expected floating-point tensors of one dtype on one device, got {listed}.")


def autocast_to(dtype_of: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype if autocast is on for their device, else as they are.

    Autocast knows `conv2d` by name and not our operations, so they do themselves what it would do.
    """
    device = dtype_of.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # Like autocast itself: float64 is left alone.
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def differentiable_vjp(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor,
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again.

    Used inside a hand-written backward when the caller asked for `create_graph=True`.
    """
    with torch.enable_grad():
        # Views: if one input was computed from another (the kernel from the image), a gradient must
        # not follow that path too, which autograd walks by itself.
        views = [None if x is None else x.view_as(x) for x in inputs]
        wanted = [x for x, need in zip(views, needed, strict=True) if need and x is not None]
        grads = iter(
            torch.autograd.grad(
                function(*views), wanted, grad_output, create_graph=True, allow_unused=True
            )
        )
        return [
            next(grads) if need and x is not None else None
            for x, need in zip(views, needed, strict=True)
        ]
