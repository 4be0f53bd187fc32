"""Whether torch.func, or anything like it, is at work: hand-written code is opaque to it then."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether tensors may stand for many (vmap), or carry tangents or levels of their own.

    Their values cannot be looked at, and only ordinary operations are transformed with them. Not
    under a compiler, which sees ordinary operations anyway.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or is_forward()


def is_forward() -> bool:
    """Whether derivatives are carried along with values, by forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_batched(grad: Tensor) -> bool:
    """Whether a gradient stands for several, by vmap or `is_grads_batched`, which has its own."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch._C._functorch.is_legacy_batchedtensor(grad)
