"""Guidance that is handed on while a network's own code runs, where a graph cannot carry it.

A call of the rewired method opens a frame. What a source module returns is noted in it; a
pixel-adaptive layer that is called without a kernel asks it for one. When the call ends, so does
the frame: features never outlive the forward pass that made them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pacswap.errors import GuidanceError
from pacswap.nn import resize_guidance, size_of
from pacswap.nn.guidance import Like, same_size
from pacswap.surgery.runtime import required_guidance
from pacswap.surgery.spec import Resize

_TAG = "_pacswap_frame"


@dataclass(frozen=True)
class RelayedGuidance:
    """Features that are made as soon as their sources are there.

    Attributes:
        sources: as the plan names them.
        owner: the module under which the `Guidance` is stored, relative to the scope.
        resize: how the features get to a layer's resolution.
        cloned: which sources are overwritten in place later and so have to be copied.
    """

    sources: tuple[str, ...]
    owner: str
    resize: Resize
    cloned: tuple[bool, ...]


@dataclass(frozen=True)
class Relay:
    """What a scope's layers are fed with where no graph does it.

    Attributes:
        guidances: the features.
        checkpointing: modules of the scope that have a flag for gradient checkpointing.
    """

    guidances: tuple[RelayedGuidance, ...]
    checkpointing: tuple[str, ...]

    def has(self, source: str) -> bool:
        """Whether a guidance has that source."""
        return any(source in guidance.sources for guidance in self.guidances)

    def is_checkpointing(self, root: nn.Module) -> bool:
        """Whether one of those flags is set."""
        return any(_inner(root, name).grad_checkpointing for name in self.checkpointing)


class Frame:
    """What the source modules returned in one call of a scope, and what was made of it."""

    def __init__(self, root: nn.Module, relay: Relay) -> None:
        self.root, self.relay = root, relay
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.features: dict[int, Tensor | None] = {}
        # By owner, in a list: a compiler's size has no hash.
        self.kernels: dict[str, list[tuple[tuple[int, ...], Tensor | None]]] = {}
        # What a checkpointed part computes has to be computed again by its recomputation.
        self.checkpointed = torch.is_grad_enabled() and relay.is_checkpointing(root)
        self.resumed_by: nn.Module | None = None

    def resume(self, module: nn.Module) -> Frame:
        """The frame as a recomputation of one of its modules in the backward pass finds it."""
        again = Frame(self.root, self.relay)
        again.maps, again.features = dict(self.maps), dict(self.features)
        again.checkpointed, again.resumed_by = True, module
        return again

    def give(self, source: str, output: Any) -> None:
        """Note what a source returned.

        Raises:
            GuidanceError: it returned something before, or something that cannot guide.
        """
        for index, guidance in enumerate(self.relay.guidances):
            for place, name in enumerate(guidance.sources):
                if name == source:
                    self._note(index, place, guidance, output)

    def _note(self, index: int, place: int, guidance: RelayedGuidance, output: Any) -> None:
        name = guidance.sources[place]
        if not isinstance(output, Tensor):
            raise GuidanceError(
                f"the guidance '{name}' returned a {type(output).__name__}, expected one tensor."
            )
        if self.checkpointed and not torch.is_grad_enabled():
            raise GuidanceError(
                f"the guidance '{name}' runs under reentrant gradient checkpointing, which would "
                "cut its gradient off. Use the other kind: use_reentrant=False "
                "(timm.layers.set_reentrant_ckpt(False))."
            )
        if (index, place) in self.maps and self.resumed_by is None:
            raise GuidanceError(
                f"the guidance '{name}' ran twice in one call of the network, so it is not known "
                "which of its outputs guides. Swap with another guidance."
            )
        self.maps[index, place] = output.clone() if guidance.cloned[place] else output
        found = [self.maps.get((index, i)) for i in range(len(guidance.sources))]
        if all(value is not None for value in found):
            self.features[index] = _inner(self.root, guidance.owner).guidance(*found)

    def kernel(self, index: int, owner: str, like: Like) -> Tensor | None:
        """The adapting kernel for a layer; None if its guidance has not been computed.

        Args:
            index: of the guidance.
            owner: the module under which the adapting kernel is stored, relative to the scope.
            like: what has the layer's resolution.
        """
        if index not in self.features:
            return None
        made, size = self.kernels.setdefault(owner, []), size_of(like)
        for known, kernel in made:
            if same_size(known, size) and not self.checkpointed:
                return kernel
        features = self.features[index]
        resized = resize_guidance(features, like, self.relay.guidances[index].resize)
        kernel = _inner(self.root, owner).adapting_kernel(resized)
        made.append((size, kernel))
        return kernel


class _Local(threading.local):
    def __init__(self) -> None:
        # None inside a graph, which feeds its layers itself.
        self.frames: list[Frame | None] = []


_local = _Local()


def current() -> Frame | None:
    """The frame of the call that runs now in this thread, if there is one."""
    return _local.frames[-1] if _local.frames else None


def relayed(
    root: nn.Module,
    relay: Relay,
    external: Tensor | None,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a module's own method in a frame.

    Args:
        root: the module.
        relay: what its layers are fed with.
        external: the caller's own features.
        original: the method, unbound.
        args: its arguments.
        kwargs: its arguments.
    """
    running = current()
    if running is not None and running.root is root:  # one method calls another
        return original(root, *args, **kwargs)
    frame = Frame(root, relay)
    if relay.has("input"):
        frame.give("input", next(iter((*args, *kwargs.values())), None))
    if relay.has("external"):
        enabled = all(_inner(root, guidance.owner).guidance.enabled for guidance in relay.guidances)
        given = required_guidance(external, enabled)
        if given is not None:
            frame.give("external", given)
    _local.frames.append(frame)
    try:
        return original(root, *args, **kwargs)
    finally:
        _local.frames.pop()


def graphed(
    root: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a rewritten graph, which needs no frame, whatever runs around it."""
    if not _local.frames:
        return function(root, *args, **kwargs)
    _local.frames.append(None)
    try:
        return function(root, *args, **kwargs)
    finally:
        _local.frames.pop()


class Supply:
    """On a pixel-adaptive layer: where its kernel comes from when it is called without one.

    Args:
        guidance: index in the relay.
        owner: the module under which the adapting kernel is stored, relative to the scope.
    """

    def __init__(self, guidance: int, owner: str) -> None:
        self.guidance, self.owner = guidance, owner

    def __call__(self, like: Like) -> Tensor | None:
        """The kernel for a layer of that resolution; None outside a frame."""
        frame = current()
        return None if frame is None else frame.kernel(self.guidance, self.owner, like)


class Tap:
    """A forward hook on a source: it notes the output in the current frame."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        self.sources = sources

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the output."""
        frame = current()
        if frame is not None:
            for source in self.sources:
                frame.give(source, output)


class Resume:
    """A forward pre-hook on what gradient checkpointing may recompute.

    The recomputation runs in the backward pass, when the frame is long closed. It begins with the
    very tensor that the forward pass began with, so that tensor carries the frame along.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Tie the frame to the input, or open the one that is tied to it."""
        if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
            return
        frame = current()
        if frame is not None:
            if frame.checkpointed and frame.resumed_by is None:
                setattr(args[0], _TAG, frame)
        elif torch._C._current_graph_task_id() != -1:
            tied = getattr(args[0], _TAG, None)
            if tied is not None:
                _local.frames.append(tied.resume(module))


class Leave:
    """A forward hook that closes what `Resume` opened, after an error too."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Close the frame if this module opened it."""
        frame = current()
        if frame is not None and frame.resumed_by is module:
            _local.frames.pop()


HOOKS = (Tap, Resume, Leave)


def add_hooks(module: nn.Module, sources: tuple[str, ...]) -> None:
    """Hook a module that is a source, contains one, or contains a layer.

    Args:
        module: the module.
        sources: the names of those that it is, if any.
    """
    module.register_forward_pre_hook(Resume())
    if sources:
        module.register_forward_hook(Tap(sources))
    module.register_forward_hook(Leave(), always_call=True)


def remove_hooks(module: nn.Module) -> None:
    """Undo `add_hooks`."""
    for held in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in held.items() if isinstance(hook, HOOKS)]:
            del held[key]
            module._forward_hooks_always_called.pop(key, None)


def _inner(root: nn.Module, name: str) -> Any:
    return root.get_submodule(name) if name else root
