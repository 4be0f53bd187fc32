"""Keeping a model's state while something is tried on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pacswap.nn import Adaptive


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own training flag on leaving, frozen BatchNorms included."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Let layers that rest make their kernels for the moment, to look at these."""
    layers = [module for module in model.modules() if isinstance(module, Adaptive)]
    fixed = [layer.blend for layer in layers if not layer.blend.requires_grad]
    try:
        for blend in fixed:
            blend.requires_grad_(True)
        yield
    finally:
        for blend in fixed:
            blend.requires_grad_(False)


# Functions whose result is like their first argument.
_LIKE_INPUT = (F.batch_norm, F.layer_norm, F.group_norm, F.gelu, F.softmax)


class QuickShapes(TorchFunctionMode):
    """Norms and their like give an empty tensor at once where the input is on meta.

    Their decompositions in Python take more time than all the rest of a network on meta.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, or say what it would return."""
        kwargs = kwargs or {}
        input = args[0] if args else kwargs.get("input")
        known = func in _LIKE_INPUT and isinstance(input, Tensor) and input.is_meta
        if not known or kwargs.get("dtype") is not None or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        if func is F.batch_norm and kwargs.get("training", args[5] if len(args) > 5 else False):
            F._verify_batch_size(input.size())  # type: ignore[attr-defined]
        if func is F.layer_norm:
            shape = tuple(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ()))
            if tuple(input.shape[input.dim() - len(shape) :]) != shape:
                return func(*args, **kwargs)  # which says what is wrong
            return torch.empty_like(input, memory_format=torch.contiguous_format)
        return torch.empty_like(input)


@contextmanager
def kept_random() -> Iterator[None]:
    """Restore the random states that a forward pass on the CPU or on meta moves."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


_saving = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def keeps_otherwise() -> bool | None:
    """Whether something, as gradient checkpointing does, keeps tensors for the backward pass.

    None if torch, before 2.7, cannot tell.
    """
    return None if _saving is None else _saving(True) is not None
