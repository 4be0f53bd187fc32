"""The hooks by which a relay learns what sources return, and finds its frame in a recomputation."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from pacswap.ops.transforms import is_transformed
from pacswap.surgery.modes import keeps_otherwise
from pacswap.surgery.relay import TAG, Frame, current, is_backward, local, storage_key


class Tap:
    """A forward hook on a source: it notes the output in the current frame.

    Args:
        sources: those that the module is, or whose last part it is.
        parted: those that it is whose last part notes its output before.
    """

    def __init__(self, sources: tuple[str, ...], parted: tuple[str, ...] = ()) -> None:
        self.sources, self.parted = sources, parted

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the output."""
        frame = current()
        if frame is not None:
            for source in self.sources:
                frame.give(source, output)
            for source in self.parted:
                frame.give(source, output, is_final=True)


class Resume:
    """A forward pre-hook on what gradient checkpointing may recompute.

    The recomputation runs in the backward pass, when the frame is long closed. It begins with what
    the forward pass began with, so that tensor carries the frame along, and its storage too: inside
    another recomputation the tensor comes back detached.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Tie the frame to the input, or open the one that is tied to it."""
        if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
            return
        if is_transformed():  # which has no checkpointing
            return
        frame, input = current(), args[0]
        if frame is None:
            if is_backward():
                self._open(module, input)
        elif torch.is_grad_enabled() and keeps_otherwise() is not False:
            again = frame.resumed_by is not None
            kept = frame.kept()
            _tie(input, module, kept, again=again)
            if storage_key(input) not in frame.given:  # others may begin with that one too
                _tie(input.untyped_storage(), module, kept, again=again)

    def _open(self, module: nn.Module, input: Tensor) -> None:
        for carrier in (input, input.untyped_storage()):
            tied: _Tied | None = getattr(carrier, TAG, None)
            if tied is not None and module in tied.frames:
                local.frames.append(tied.frames[module].resume(module))
                return


def _tie(carrier: Any, module: nn.Module, kept: Frame, *, again: bool) -> None:
    tied: _Tied | None = getattr(carrier, TAG, None)
    if tied is None:
        tied = _Tied()
        setattr(carrier, TAG, tied)
    if not again or module not in tied.frames:
        tied.frames[module] = kept


class _Tied:
    """The frames that a tensor carries, by the module that was called with it."""

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Frame] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the tensor carries none


class Leave:
    """A forward hook that closes what `Resume` opened, after an error too."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the frame if this module opened it."""
        frame = current()
        if frame is not None and frame.resumed_by is module:
            local.frames.pop()


HOOKS = (Tap, Resume, Leave)


class LastHooks(OrderedDict[int, Any]):
    """A module's forward hooks, those of a relay always the last.

    What guides is what a source returns to the network, after the hooks of others.
    """

    def __setitem__(self, key: int, hook: Any) -> None:
        super().__setitem__(key, hook)
        if not isinstance(hook, HOOKS):
            for ours in [k for k, known in self.items() if isinstance(known, HOOKS)]:
                self.move_to_end(ours)


def add_hooks(
    module: nn.Module, sources: tuple[str, ...] = (), parted: tuple[str, ...] = ()
) -> None:
    """Hook a module that is or contains a source or a layer.

    Args:
        module: the module.
        sources: as in `Tap`, like the next.
        parted: as in `Tap`.
    """
    if not isinstance(module._forward_hooks, LastHooks):
        module._forward_hooks = LastHooks(module._forward_hooks)
    module.register_forward_pre_hook(Resume())
    if sources or parted:
        module.register_forward_hook(Tap(sources, parted))
    module.register_forward_hook(Leave(), always_call=True)


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody else has hooked a module since it was upgraded."""
    held = (module._forward_hooks, module._forward_pre_hooks)
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not isinstance(hook, HOOKS) for hooks in held for hook in hooks.values())


def remove_hooks(module: nn.Module) -> None:
    """Undo `add_hooks`."""
    for held in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in held.items() if isinstance(hook, HOOKS)]:
            del held[key]
            module._forward_hooks_always_called.pop(key, None)
    if isinstance(module._forward_hooks, LastHooks):
        module._forward_hooks = OrderedDict(module._forward_hooks)
