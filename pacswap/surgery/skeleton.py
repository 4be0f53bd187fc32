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
from torch.utils.weak import WeakIdKeyDictionary

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
        images: of a network that takes several, by their places: those that the first argument was
            made from.
        image: the place of the one that it is.
    """

    order: int
    entry: Entry
    stack: tuple[tuple[int, Entry], ...]
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None = None
    words: str = ""
    images: frozenset[int] = frozenset()
    image: int | None = None

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
    return bones, observe(filled(bones), example_input)


def filled(bones: nn.Module) -> nn.Module:
    """A skeleton itself, with values on the CPU if it has none."""
    if not any(t.is_meta for t in (*bones.parameters(), *bones.buffers())):
        return bones
    bones.to_empty(device="cpu")
    with torch.no_grad(), kept_random():
        torch.manual_seed(0)
        for parameter in bones.parameters():
            parameter.normal_(std=0.02)
        for name, buffer in bones.named_buffers():
            buffer.fill_(1 if name.endswith("running_var") else 0)
    return bones


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
    functions = _Functions(seen, stack)
    args = functions.follow(args)
    undo = _watch(bones, functions, made)
    given = [(t, t._version) for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    try:
        with QuickShapes(), functions, MacCounter() as counter:
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


_SHAPE_ALONE = frozenset(
    {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, Tensor.new_zeros}
)


class _Functions(TorchFunctionMode):
    """Notes the calls of `F.interpolate`, under the labels that a trace will give them.

    Where a network takes several images, it also notes which of them each tensor was made from.
    """

    def __init__(self, seen: Observation, stack: list[tuple[int, Entry]]) -> None:
        super().__init__()
        self.seen, self.stack = seen, stack
        self.repeats: Counter[str] = Counter()
        self.images: list[Tensor] = []
        self.origins: Any = WeakIdKeyDictionary()

    def follow(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as they are to be given, each of several images a tensor of its own."""
        places = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.dim() > 2]
        if len(places) < 2:
            return args
        args = tuple(arg.view_as(arg) if isinstance(arg, Tensor) else arg for arg in args)
        self.images = [args[place] for place in places]
        for place, image in enumerate(self.images):
            self.origins[image] = frozenset((place,))
        return args

    def of(self, value: Any) -> tuple[frozenset[int], int | None]:
        """The images that a value was made from, and the one that it is."""
        if not self.images or not isinstance(value, Tensor):
            return frozenset(), None
        itself = (place for place, image in enumerate(self.images) if image is value)
        return self.origins.get(value, frozenset()), next(itself, None)

    def _mix(self, inputs: Any, output: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        mixed = frozenset().union(*(self.origins.get(t, ()) for t in tensors))
        made = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in made or tensors[:1]:  # `x[i] = y` returns nothing
            if all(tensor is not image for image in self.images):
                self.origins[tensor] = self.origins.get(tensor, frozenset()) | mixed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function, and note it if it interpolates."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.images and func not in _SHAPE_ALONE:
            self._mix((args, kwargs), output)
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
    bones: nn.Module, functions: _Functions, made: dict[int, tuple[Tensor, int]]
) -> list[Callable[[], None]]:
    """Wrap every module's `forward` and split methods; returns what undoes it."""
    undo: list[Callable[[], None]] = []
    for name, module in bones.named_modules():
        for method in ("forward", *SPLIT_METHODS):
            if callable(getattr(module, method, None)):
                undo.append(_watch_method(module, (name, method), functions, made))
    return undo


def _watch_method(
    module: nn.Module, entry: Entry, functions: _Functions, made: dict[int, tuple[Tensor, int]]
) -> Callable[[], None]:
    name, seen, stack = entry[1], functions.seen, functions.stack
    own = vars(module).get(name)
    original = getattr(module, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        order, first = len(seen.calls) + 1, next(iter(args), None)
        stack.append((order, entry))
        images, image = functions.of(first)
        call = Call(order, entry, tuple(stack), _shape(first), images=images, image=image)
        seen.calls.append(call)
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
