"""Runs a graph, and the method that it stands for, and tells whether they do the same."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pacswap.surgery.modes import QuickShapes, quickly
from pacswap.surgery.trace import Trace


class ShapeRunner(fx.Interpreter):
    """Runs a graph and notes shapes and later in-place changes."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.shapes: dict[Node, tuple[int, ...]] = {}
        self.versions: dict[Node, tuple[Tensor, int]] = {}

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Plain lists and dictionaries, as the generated code makes them; fx keeps its own."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(tuple(args)), {key: _thawed(value) for key, value in kwargs.items()}

    def run_node(self, n: Node) -> Any:
        """Run one node and note what it made."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            self.versions[n] = (value, value._version)
        return value

    def overwritten(self) -> set[Node]:
        """Nodes whose value was changed in place after it was made."""
        return {n for n, (tensor, version) in self.versions.items() if tensor._version != version}


def _thawed(value: Any) -> Any:
    if isinstance(value, immutable_list):
        return [_thawed(item) for item in value]
    if isinstance(value, immutable_dict):
        return {key: _thawed(item) for key, item in value.items()}
    return tuple(map(_thawed, value)) if type(value) is tuple else value


def bound(trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Positional values for a graph's placeholders; missing ones keep their default."""
    values = list(args)
    for node in [n for n in trace.graph.nodes if n.op == "placeholder"][len(args) :]:
        values.append(kwargs.get(str(node.target), node.args[0] if node.args else None))
    return values


class _Operations(TorchDispatchMode):
    """Notes every operation with the shape of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note it."""
        output = func(*args, **(kwargs or {}))
        self.done.append(f"{func._overloadpacket.__name__} → {_structure(output)}")
        return output


def recorded(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """What a call returns, and the operations that it did."""

    def once() -> tuple[Any, list[str]]:
        copies = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        with torch.no_grad(), QuickShapes(), _Operations() as operations:
            return run(*copies[0], **copies[1]), operations.done

    return quickly(once, (args, kwargs))


def why_not_same(ours: tuple[Any, list[str]], theirs: tuple[Any, list[str]]) -> str | None:
    """Why a graph (ours) does not do what the method (theirs) does, or None."""
    if _structure(ours[0]) != _structure(theirs[0]):
        return (
            f"returns {_structure(ours[0])} where the model returns {_structure(theirs[0])}: it "
            "does something that a trace cannot see, such as collecting features by hooks."
        )
    for one, other in zip_longest(ours[1], theirs[1], fillvalue="nothing"):
        if one != other:
            return (
                f"does '{one}' where the model does '{other}': it depends on what a trace cannot "
                "see, such as the type of an argument, a random number or a cache."
            )
    return None


def _structure(output: Any) -> str:
    """Containers and shapes of an output, in words."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if isinstance(output, dict):
        inner = ", ".join(f"{key}: {_structure(value)}" for key, value in output.items())
        return f"{type(output).__name__}({inner})"
    if isinstance(output, tuple | list):
        return f"{type(output).__name__}({', '.join(map(_structure, output))})"
    return type(output).__name__
