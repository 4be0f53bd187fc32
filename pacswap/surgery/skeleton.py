"""A weightless copy of a model, and what can be seen by running it once.

Tracing and shape inference leave traces in a model (caches, counters), so they work on a copy whose
tensors live on the meta device: no memory, no arithmetic, nothing of the user's is touched.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pacswap.errors import PlanError
from pacswap.surgery.cost import MacCounter
from pacswap.surgery.modes import QuickShapes, kept_random, quickly

ExampleInput: TypeAlias = "Tensor | tuple[Any, ...]"

# Methods that classification networks split their `forward` into (timm's convention).
SPLIT_METHODS = ("forward_features",)


# A module's dotted name ("" for the model) and a method's, or a function's label and FUNCTION.
Entry: TypeAlias = "tuple[str, str]"
FUNCTION = "()"


@dataclass(frozen=True)
class Call:
    """One call of a module's `forward`, a split method or a function during a forward pass.

    Attributes:
        order: the position among all calls, from 1.
        entry: whose method ran.
        stack: the calls around it, outermost first, as (order, entry); this call is the last.
        input_shape: of the first argument if it is a tensor.
        output_shape: of the output if it is a tensor.
        words: how a function was called, in a word or two.
    """

    order: int
    entry: Entry
    stack: tuple[tuple[int, Entry], ...]
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None = None
    words: str = ""

    @property
    def name(self) -> str:
        """The module's dotted name, or the function's label."""
        return self.entry[0]


@dataclass
class Observation:
    """All calls of one forward pass, in the order in which they began.

    Attributes:
        calls: the calls of modules' methods.
        functions: the calls of `F.interpolate`, by the labels that a trace gives them.
        arguments: of the first call of each entry, on meta.
        macs: multiply-accumulates of convolutions and matrix products.
        overwritten: the orders of calls whose output was changed in place afterwards.
        overwrites_input: whether the model's own input was.
    """

    calls: list[Call] = field(default_factory=list)
    functions: dict[str, Call] = field(default_factory=dict)
    arguments: dict[Entry, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    macs: int = 0
    overwritten: set[int] = field(default_factory=set)
    overwrites_input: bool = False

    def of(self, name: str) -> list[Call]:
        """The calls of one module's `forward`, or that of a function with this label."""
        if name in self.functions:
            return [self.functions[name]]
        return [call for call in self.calls if call.entry == (name, "forward")]


def look(model: nn.Module, example_input: ExampleInput) -> tuple[nn.Module, Observation]:
    """A skeleton in eval mode, and what it does on an input.

    Where the meta device cannot run the model (the number of its boxes depends on values, it makes
    tensors on a device of its own), the skeleton is an ordinary copy.

    Raises:
        PlanError: the model cannot be copied, or does not run; the message has its own words.
    """
    check_example(example_input)
    bones = skeleton(model).eval()
    try:
        return bones, observe(bones, example_input)
    except PlanError:
        if all(parameter.is_meta for parameter in model.parameters()):
            return _look_empty(bones, example_input)
    bones = skeleton(model, meta=False).eval()
    return bones, observe(bones, example_input)


def _look_empty(bones: nn.Module, example_input: ExampleInput) -> tuple[nn.Module, Observation]:
    """As `look`, for a model without values that the meta device cannot run: it gets some."""
    bones.to_empty(device="cpu")
    with torch.no_grad(), kept_random():
        torch.manual_seed(0)
        for parameter in bones.parameters():
            parameter.normal_(std=0.02)
        for name, buffer in bones.named_buffers():
            buffer.fill_(1 if name.endswith("running_var") else 0)
    return bones, observe(bones, example_input)


def check_example(example_input: object) -> None:
    """Raise unless an example input holds a tensor.

    Raises:
        PlanError: it is something else.
    """
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_input)):
        raise PlanError(
            "example_input: expected a tensor or a tuple of arguments with one, got "
            f"{type(example_input).__name__}."
        )


def skeleton(model: nn.Module, *, meta: bool = True) -> nn.Module:
    """A structural copy of `model`, without the user's hooks and gradient checkpointing.

    Args:
        model: any module.
        meta: on the meta device, without values; otherwise an ordinary copy.

    Raises:
        PlanError: the model cannot be copied.
    """
    memo = _on_meta(model) if meta else {}
    bones = copy_model(model, memo)
    for module in bones.modules():
        if getattr(module, "grad_checkpointing", False):  # it walks past modules that are named
            module.grad_checkpointing = False  # type: ignore[assignment]
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for key in [k for k, hook in hooks.items() if not _is_library_hook(hook)]:
                del hooks[key]
    return bones


def _on_meta(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: every tensor of a model with its twin on the meta device."""
    memo: dict[int, Any] = {}
    attributes = (value for module in model.modules() for value in vars(module).values())
    unregistered = (value for value in attributes if isinstance(value, Tensor))
    for tensor in [*model.parameters(), *model.buffers(), *unregistered]:
        meta = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            meta = nn.Parameter(meta, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = meta
    return memo


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of `model`.

    Raises:
        PlanError: with the reason why it cannot be copied.
    """
    try:
        return copy.deepcopy(model, {} if memo is None else memo)
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise PlanError(
            f"cannot copy {type(model).__name__}: {error}. pacswap works on a copy and leaves the "
            "given model untouched; remove attributes that cannot be copied (open files, locks, "
            "tensors that belong to an autograd graph) and try again."
        ) from error


def _is_library_hook(hook: Any) -> bool:
    """Whether a hook is part of how a module works (weight norm, timm's feature hooks)."""
    function = getattr(hook, "func", hook)
    origin = getattr(function, "__module__", None) or type(function).__module__
    return origin.split(".")[0] in ("torch", "timm", "torchvision")


def observe(bones: nn.Module, example_input: ExampleInput) -> Observation:
    """Run a skeleton once and note every call.

    Args:
        bones: what `skeleton` gave; its mode decides which path is seen.
        example_input: a tensor, or a tuple of positional arguments; its values do not matter.

    Raises:
        PlanError: the model does not run on that input; the message has the model's own words.
    """
    device = next((p.device for p in bones.parameters()), torch.device("meta"))
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    args = pytree.tree_map_only(Tensor, lambda t: _moved(t, device), args)
    try:
        with torch.no_grad(), kept_random():
            return quickly(lambda: _observed(bones, args), args)
    except Exception as error:  # the model's own code: anything can come out of it
        shapes = [
            tuple(t.shape) for t in pytree.tree_leaves(example_input) if isinstance(t, Tensor)
        ]
        raise PlanError(
            f"{type(bones).__name__} does not run on an example input of shape "
            f"{', '.join(map(str, shapes))}: {type(error).__name__}: {str(error).rstrip('.')}. "
            "Pass example_input=… with a shape that the model takes."
        ) from error


def _observed(bones: nn.Module, args: tuple[Any, ...]) -> Observation:
    seen = Observation()
    stack: list[tuple[int, Entry]] = []
    made: dict[int, tuple[Tensor, int]] = {}
    undo = _watch(bones, seen, stack, made)
    given = [(t, t._version) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    try:
        with QuickShapes(), _Functions(seen, stack), MacCounter() as counter:
            bones(*args)
    finally:
        for restore in undo:
            restore()
    seen.macs = counter.macs
    seen.overwrites_input = any(t._version != version for t, version in given)
    seen.overwritten = {n for n, (t, version) in made.items() if t._version != version}
    return seen


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; one that has no values yet gets some."""
    if not tensor.is_meta or device.type == "meta":
        return tensor.to(device)
    like = torch.rand_like if tensor.is_floating_point() else torch.zeros_like
    return like(tensor, device=device)


class _Functions(TorchFunctionMode):
    """Notes the calls of `F.interpolate`, under the labels that a trace will give them."""

    def __init__(self, seen: Observation, stack: list[tuple[int, Entry]]) -> None:
        super().__init__()
        self.seen, self.stack = seen, stack
        self.repeats: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and note it if it interpolates."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.interpolate and self.stack:
            owner = self.stack[-1][1][0]
            base = f"{owner}.interpolate" if owner else "interpolate"
            label = f"{base}_{self.repeats[base]}" if self.repeats[base] else base
            self.repeats[base] += 1
            order = len(self.seen.calls) + 1
            self.seen.functions[label] = Call(
                order,
                (label, FUNCTION),
                (*self.stack, (order, (label, FUNCTION))),
                _shape(args[0] if args else kwargs.get("input")),
                _shape(output),
                str(kwargs.get("mode", args[3] if len(args) > 3 else "nearest")),
            )
        return output


def _watch(
    bones: nn.Module,
    seen: Observation,
    stack: list[tuple[int, Entry]],
    made: dict[int, tuple[Tensor, int]],
) -> list[Callable[[], None]]:
    """Wrap every module's `forward` and split methods; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for name, module in bones.named_modules():
        for method in ("forward", *SPLIT_METHODS):
            if callable(getattr(module, method, None)):
                undo.append(_watch_method(module, (name, method), seen, stack, made))
    return undo


def _watch_method(
    module: nn.Module,
    entry: Entry,
    seen: Observation,
    stack: list[tuple[int, Entry]],
    made: dict[int, tuple[Tensor, int]],
) -> Callable[[], None]:
    name = entry[1]
    own = vars(module).get(name)
    original = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        order = len(seen.calls) + 1
        stack.append((order, entry))
        seen.calls.append(Call(order, entry, tuple(stack), _shape(next(iter(args), None))))
        seen.arguments.setdefault(entry, (args, kwargs))
        output = original(*args, **kwargs)
        stack.pop()
        seen.calls[order - 1] = replace(seen.calls[order - 1], output_shape=_shape(output))
        if isinstance(output, Tensor):
            made[order] = output, output._version
        return output

    def restore() -> None:
        if own is None:
            del vars(module)[name]
        else:
            vars(module)[name] = own

    vars(module)[name] = watched
    return restore


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
