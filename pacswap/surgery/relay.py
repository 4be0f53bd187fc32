"""Guidance that is handed on while a network's own code runs, where a graph cannot carry it.

A call of the rewired method opens a frame. What a source module returns is noted in it; a
pixel-adaptive layer that is called without a kernel asks it for one. When the call ends, so does
the frame: features never outlive the forward pass that made them.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pacswap.errors import GuidanceError
from pacswap.nn import resize_guidance, size_of
from pacswap.nn.guidance import Like, same_size
from pacswap.ops.transforms import is_transformed
from pacswap.surgery.modes import recomputed_whole
from pacswap.surgery.runtime import needed, required_guidance
from pacswap.surgery.spec import Resize


@dataclass(frozen=True)
class RelayedGuidance:
    """Features that are made as soon as their sources are there.

    Attributes:
        sources: as the plan names them.
        owner: the module under which the `Guidance` is stored, relative to the scope.
        resize: how the features get to a layer's resolution.
        cloned: which sources are overwritten in place later and so have to be copied.
        layers: the modules that it feeds, relative to the scope.
    """

    sources: tuple[str, ...]
    owner: str
    resize: Resize
    cloned: tuple[bool, ...]
    layers: tuple[str, ...]


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

    def takes(self, root: nn.Module, image: Any) -> bool:
        """Whether an argument is the image that guides; a head's argument is features."""
        if not isinstance(image, Tensor) or image.dim() < 3:
            return False
        owners = [_inner(root, g.owner) for g in self.guidances if g.sources == ("input",)]
        places = image.dim() - 2
        wanted = {o.guidance.in_channels - places * o.guidance.position for o in owners}
        return wanted <= {image.shape[1]}

    def is_checkpointing(self, root: nn.Module) -> bool:
        """Whether one of those flags is set."""
        return any(_inner(root, name).grad_checkpointing for name in self.checkpointing)


# The attribute of a tensor that its frames are tied to.
TAG = "_pacswap_frame"


class Frame:
    """What the source modules returned in one call of a scope, and what was made of it."""

    def __init__(self, root: nn.Module, relay: Relay, *, learns: bool) -> None:
        self.root, self.relay, self.learns = root, relay, learns
        self.maps: dict[tuple[int, int], Tensor] = {}
        self.noted: dict[tuple[int, int], Tensor] = {}  # `maps` before they were copied
        self.features: dict[int, Tensor | None] = {}
        # By guidance and by owner, in lists: a compiler's size has no hash.
        self.resized: dict[int, list[tuple[tuple[int, ...], Tensor | None]]] = {}
        self.kernels: dict[str, list[tuple[tuple[int, ...], Tensor | None]]] = {}
        self.resumed_by: nn.Module | None = None
        self.cut: list[tuple[str, Tensor]] = []  # what was noted without a gradient
        self.given: set[int] = set()  # the storages of the caller's tensors

    def kept(self) -> Frame:
        """The frame as it is now, for a recomputation in the backward pass: its values alone.

        A recomputation only fills in what the forward pass did not keep; gradients take the way of
        the forward pass. A frame that is tied to a tensor must not hold that tensor's graph.
        """
        kept = Frame(self.root, self.relay, learns=True)
        kept.given = self.given
        kept.maps = {key: _value(held) for key, held in self.maps.items()}
        kept.features = {key: _value(held) for key, held in self.features.items()}
        kept.resized = {key: _values(made) for key, made in self.resized.items()}
        kept.kernels = {owner: _values(made) for owner, made in self.kernels.items()}
        return kept

    def resume(self, module: nn.Module) -> Frame:
        """A kept frame as the recomputation of one of its modules finds it."""
        again = Frame(self.root, self.relay, learns=True)
        again.maps, again.features = dict(self.maps), dict(self.features)
        again.resized = {key: list(made) for key, made in self.resized.items()}
        again.kernels = {owner: list(made) for owner, made in self.kernels.items()}
        again.resumed_by, again.given = module, self.given
        return again

    def give(self, source: str, output: Any, *, is_final: bool = False) -> None:
        """Note what a source returned.

        Args:
            source: as the plan names it.
            output: what it returned.
            is_final: whether this stands in for what a part of the source gave before.

        Raises:
            GuidanceError: it returned something before, or something that cannot guide.
        """
        for index, guidance in enumerate(self.relay.guidances):
            for place, name in enumerate(guidance.sources):
                known = self.noted.get((index, place)) if is_final else None
                if name == source and (known is None or known is not output):
                    self._note(index, place, guidance, output, is_again=known is not None)

    def _note(
        self, index: int, place: int, guidance: RelayedGuidance, output: Any, *, is_again: bool
    ) -> None:
        name = guidance.sources[place]
        if not isinstance(output, Tensor):
            raise GuidanceError(
                f"the guidance '{name}' returned a {type(output).__name__}, expected one tensor."
            )
        if self.learns and not torch.is_grad_enabled() and self.relay.is_checkpointing(self.root):
            raise GuidanceError(_reentrant(name))
        if (index, place) in self.maps and self.resumed_by is None and not is_again:
            raise GuidanceError(
                f"the guidance '{name}' ran twice in one call of the network, so it is not known "
                "which of its outputs guides. Swap with another guidance."
            )
        if self.learns and not torch.is_grad_enabled():
            self.cut.append((name, output))
        self.noted[index, place] = output
        self.maps[index, place] = output.clone() if guidance.cloned[place] else output
        found = [self.maps.get((index, i)) for i in range(len(guidance.sources))]
        if all(value is not None for value in found):
            # Under no_grad too: what projects the guidance has to learn.
            with torch.set_grad_enabled(self.learns):
                layers = tuple(_inner(self.root, name) for name in guidance.layers)
                found[0] = needed(found[0], layers)
                self.features[index] = _inner(self.root, guidance.owner).guidance(*found)

    def kernel(self, index: int, owner: str, like: Like) -> Tensor | None:
        """The adapting kernel for a layer; None if its guidance has not been computed.

        Args:
            index: of the guidance.
            owner: the module under which the adapting kernel is stored, relative to the scope.
            like: what has the layer's resolution.
        """
        guidance = self.relay.guidances[index]
        if index not in self.features:
            if "external" in guidance.sources:
                required_guidance(None, enabled=True)
            return None
        for name, noted in self.cut:  # reentrant checkpointing gives it one when it has returned
            if noted.requires_grad:
                raise GuidanceError(_reentrant(name))
        with torch.set_grad_enabled(self.learns):
            return _once(
                self.kernels.setdefault(owner, []),
                size_of(like),
                lambda: _inner(self.root, owner).adapting_kernel(self._at(index, like)),
            )

    def _at(self, index: int, like: Like) -> Tensor | None:
        """A guidance at a layer's resolution."""
        features, mode = self.features[index], self.relay.guidances[index].resize
        return _once(
            self.resized.setdefault(index, []),
            size_of(like),
            lambda: resize_guidance(features, like, mode),
        )


class _Local(threading.local):
    def __init__(self) -> None:
        # None inside a graph, which feeds its layers itself.
        self.frames: list[Frame | None] = []


local = _Local()


def current() -> Frame | None:
    """The frame of the call that runs now in this thread, if there is one."""
    return local.frames[-1] if local.frames else None


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
    learns = torch.is_grad_enabled()
    frame = Frame(root, relay, learns=learns)
    own = None
    if learns and not torch.compiler.is_compiling() and not is_transformed():
        own = _Own()
        args, kwargs = pytree.tree_map_only(Tensor, own.view, (args, kwargs))
        frame.given = {storage_key(t) for t in pytree.tree_leaves((args, kwargs))}
    if relay.has("input"):
        image = args[0] if args else kwargs.get(_first_parameter(original))
        if relay.takes(root, image):
            frame.give("input", image)
    if relay.has("external") and external is not None:
        frame.give("external", required_guidance(external, enabled=True))
    local.frames.append(frame)
    try:
        if own is None:
            return original(root, *args, **kwargs)
        # A recomputation that stops early does not reach the parts inside it that are checkpointed
        # themselves, which find their frame by having been called.
        with recomputed_whole:
            return own.given_back(original(root, *args, **kwargs))
    finally:
        local.frames.pop()


@functools.cache
def _first_parameter(method: Callable[..., Any]) -> str:
    return list(inspect.signature(method).parameters)[1]


class _Own:
    """A caller's tensors as tensors of one call alone, because frames are tied to them."""

    def __init__(self) -> None:
        self.views: dict[int, Tensor] = {}
        self.originals: dict[int, Tensor] = {}

    def view(self, tensor: Tensor) -> Tensor:
        """The same numbers and attributes as another tensor object, the same one each time."""
        if not _is_plain(tensor):
            return tensor
        if id(tensor) not in self.views:
            view = tensor.view_as(tensor)
            vars(view).update({key: v for key, v in vars(tensor).items() if key != TAG})
            self.views[id(tensor)], self.originals[id(view)] = view, tensor
        return self.views[id(tensor)]

    def given_back(self, output: Any) -> Any:
        """What a method returned; an argument that it gave on is the caller's again."""
        if not any(id(leaf) in self.originals for leaf in pytree.tree_leaves(output)):
            return output
        return pytree.tree_map_only(Tensor, lambda t: self.originals.get(id(t), t), output)


def graphed(
    root: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a rewritten graph, which needs no frame, whatever runs around it."""
    if not local.frames:
        return function(root, *args, **kwargs)
    local.frames.append(None)
    try:
        return function(root, *args, **kwargs)
    finally:
        local.frames.pop()


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
        if frame is not None:
            return frame.kernel(self.guidance, self.owner, like)
        if not torch.compiler.is_compiling() and is_backward():
            raise GuidanceError(
                f"a layer of '{self.owner}' runs again in the backward pass, by gradient "
                "checkpointing, and what guides it is not known there. Checkpoint a module that "
                "contains the layer, with use_reentrant=False "
                "(timm.layers.set_reentrant_ckpt(False))."
            )
        return None


def _reentrant(name: str) -> str:
    return (
        f"the guidance '{name}' runs under reentrant gradient checkpointing, which would cut its "
        "gradient off. Use the other kind: use_reentrant=False "
        "(timm.layers.set_reentrant_ckpt(False))."
    )


def _once(
    made: list[tuple[tuple[int, ...], Tensor | None]],
    size: tuple[int, ...],
    make: Callable[[], Tensor | None],
) -> Tensor | None:
    """What was made for that resolution already, or else what `make` gives, which is noted."""
    for known, value in made:
        if same_size(known, size):
            return value
    made.append((size, make()))
    return made[-1][1]


def _values(
    made: list[tuple[tuple[int, ...], Tensor | None]],
) -> list[tuple[tuple[int, ...], Tensor | None]]:
    return [(size, _value(held)) for size, held in made]


def _value(tensor: Any) -> Any:
    """What a tensor holds, without its graph; None of what is disabled."""
    return None if tensor is None else tensor.data.requires_grad_(tensor.requires_grad)


def _inner(root: nn.Module, name: str) -> Any:
    return root.get_submodule(name) if name else root


def is_backward() -> bool:
    """Whether this runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def storage_key(value: Any) -> int:
    """What tells the storages of tensors apart; 0 of anything else."""
    return value.untyped_storage()._cdata if _is_plain(value) else 0


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor with one storage: no sparse one, no nested one, no subclass."""
    return type(value) is Tensor and value.layout == torch.strided and not value.is_nested
