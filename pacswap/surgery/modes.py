"""Keeping a model's state while something is tried on it."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from pacswap.nn import Adaptive

T = TypeVar("T")


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


_aten = torch.ops.aten
# Nearly all of a network's arithmetic.
_SUMS = (
    _aten.convolution.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
)


class QuickSums(TorchDispatchMode):
    """Convolutions and matrix products give numbers of the right shape that are not computed.

    For networks that meta tensors cannot go through, where only shapes are asked for: a detector
    enlarges its image to 800 pixels. The same shape gets the same numbers, between -1 and 1.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, or make up what it would return."""
        kwargs = kwargs or {}
        if func not in _SUMS or not _is_real(args[0]):
            return func(*args, **kwargs)
        shaped = func(*pytree.tree_map_only(Tensor, _to_meta, args), **kwargs)
        output = torch.empty_strided(shaped.shape, shaped.stride(), dtype=shaped.dtype)
        numbers = _numbers(shaped.dtype)
        flat = output.as_strided((output.numel(),), (1,))
        whole = len(flat) // len(numbers) * len(numbers)
        flat[:whole].view(-1, len(numbers)).copy_(numbers)
        flat[whole:].copy_(numbers[: len(flat) - whole])
        return output


def _is_real(value: Tensor) -> bool:
    """Whether a tensor holds numbers on the CPU that may be made up."""
    return value.device.type == "cpu" and value.is_floating_point()


def _to_meta(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@functools.cache
def _numbers(dtype: torch.dtype) -> Tensor:
    made = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0), device="cpu")
    return (2 * made - 1).to(dtype)


def quickly(run: Callable[[], T], arguments: Any) -> T:
    """Run a network for its shapes: without its sums, or with them where it fails on what they are.

    Args:
        run: runs it. May be called twice.
        arguments: what it runs on; nothing is computed on meta tensors anyway.
    """
    leaves = pytree.tree_leaves(arguments)
    if all(leaf.is_meta for leaf in leaves if isinstance(leaf, Tensor)):
        return run()
    try:
        with QuickSums():
            return run()
    except Exception:  # the model's own code: it may want an index, a box, a finite number
        return run()


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


class _RecomputedWhole:
    """While it is open, gradient checkpointing sets out to recompute each of its parts to the end.

    torch has one flag for all threads: the first to enter sets it, the last to leave restores it.
    Each restoring what it found would leave the flag set for ever where two threads overlap.
    """

    def __init__(self) -> None:
        self._lock, self._open, self._flag = threading.Lock(), 0, set_checkpoint_early_stop(False)

    def __enter__(self) -> None:
        with self._lock:
            if self._open == 0:
                self._flag = set_checkpoint_early_stop(False)
                self._flag.__enter__()
            self._open += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self._flag.__exit__(None, None, None)


recomputed_whole = _RecomputedWhole()
