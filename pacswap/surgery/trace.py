"""From a module's method to a graph whose nodes include the wanted layers.

Only what must be seen is entered: the modules on the way from the traced module to a wanted layer
or guidance. All else stays a single node, so that its own control flow, hooks and checkpointing
survive. A module that must be entered and cannot be traced stays a node too, with the reason kept.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from pacswap.surgery.modes import keeps_otherwise
from pacswap.surgery.runtime import only_default

LABEL = "pacswap_label"
INPUT_SIZE = "pacswap_input_size"
OUTPUT_SIZE = "pacswap_output_size"


@dataclass
class Trace:
    """The graph of one method in one mode, and where things are in it.

    Attributes:
        graph: nodes named relative to the traced module.
        calls: the `call_module` nodes of each leaf, by name.
        outputs: what each module returned, call by call, by name (leaves and entered modules).
        labels: every node that makes a value, by its label: a module's name, or its surrounding
            module's name and the operation's, with `_1`, `_2`, … for repetitions.
        hidden: entered modules that could not be traced, with the reason.
        entered: the modules that dissolved into the graph, by name.
    """

    graph: fx.Graph
    calls: dict[str, list[Node]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    labels: dict[str, Node] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    entered: list[str] = field(default_factory=list)

    def nodes_of(self, name: str) -> list[Node]:
        """What makes the outputs of a module, call by call, or the node of that label."""
        if name in self.calls:
            return self.calls[name]
        if name in self.outputs:
            return [value.node for value in self.outputs[name] if isinstance(value, fx.Proxy)]
        return [self.labels[name]] if name in self.labels else []


class TraceFailure(Exception):
    """The traced method itself cannot be traced; holds the reason. Never leaves `surgery`."""


def trace_modes(
    root: nn.Module, method: str, enter: Iterable[str], set_mode: Callable[[bool], Any]
) -> tuple[Trace, Trace | None]:
    """The graph of train mode, and that of eval mode unless one serves both.

    One is traced as if autocast were on, the other as if it were off: a part that switches it to
    either is noticed in one of them.

    Args:
        root: a skeleton.
        method: as in `trace_method`, like the next.
        enter: names, relative to `root`.
        set_mode: sets the mode of the whole skeleton, train or eval.

    Raises:
        TraceFailure: as in `trace_method`.
    """
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    traces = []
    try:
        for training in (True, False):
            set_mode(training)
            for device in devices:
                torch.set_autocast_enabled(device, training)
            traces.append(trace_method(root, method, enter))
    finally:
        set_mode(False)
        for device, enabled in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, enabled)
    train, evaluate = traces
    return train, None if merge_modes(train, evaluate) else evaluate


def trace_method(root: nn.Module, method: str, enter: Iterable[str]) -> Trace:
    """Trace `root.method`, entering the named submodules.

    Args:
        root: a skeleton, in the mode to be traced.
        method: `"forward"` or another method of the class.
        enter: names, relative to `root`.

    Raises:
        TraceFailure: the method branches on data, or does what a trace cannot hold.
    """
    if method in vars(root) or not inspect.isfunction(getattr(type(root), method, None)):
        raise TraceFailure(f"its {method} is not a method of its class")
    tracer = _Tracer(set(enter))
    tracer.traced_func_name = method
    try:
        state = random.getstate()
        graph = tracer.trace(root)
        if random.getstate() != state:
            raise TraceFailure("it draws Python random numbers, which a trace would freeze")
    except Exception as error:  # the model's own code, run on proxies: anything can come of it
        raise TraceFailure(_reason(error)) from error
    graph._tracer_cls = None
    trace = tracer.found
    trace.graph = graph
    below = tuple(f"{name}." for name in trace.hidden)
    trace.entered = [n for n in trace.outputs if n in tracer.enter and not n.startswith(below)]
    _label(trace)
    return trace


class _Proxy(fx.Proxy):
    """A proxy that keeps `x += y` in place; fx makes it `x = x + y`, unseen by x's other names."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def assign(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


_ASSIGNMENTS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior")
for _name in _ASSIGNMENTS:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def __init__(self, enter: set[str]) -> None:
        super().__init__(autowrap_functions=tuple(_notrace_functions()), param_shapes_constant=True)
        self.enter = enter
        self.found = Trace(fx.Graph())
        self.proxies: dict[str, fx.Proxy] = {}
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.enter

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = self.path_of_module(m)
        mark, stack = len(self.graph.nodes), self.module_stack.copy()
        try:
            output = super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.is_leaf_module(m, name):
                raise
            self.module_stack = stack
            self._retract(mark)
            self.enter.discard(name)
            self.found.hidden[name] = _reason(error)
            output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy) and self.is_leaf_module(m, name):
            self.found.calls.setdefault(name, []).append(output.node)
        self.found.outputs.setdefault(name, []).append(output)
        return output

    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if _context() != self.context:
            raise TraceFailure(
                "part of it runs under torch.no_grad, autocast or the like, which a graph drops"
            )
        return super().create_node(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        self.proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, OrderedDict) and type(a) is OrderedDict:
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise TraceFailure(f"it returns a {type(a).__name__}, which a graph cannot hold")
        known = isinstance(a, nn.Parameter) or not isinstance(a, Tensor) or a in self.tensor_attrs
        if not known and not any(a is buffer for buffer in self.root.buffers()):
            raise TraceFailure("it makes a constant tensor, whose device would be frozen")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Arguments without a default become inputs; the others keep their default, checked."""
        values: dict[str, Any] = {}
        guards: list[tuple[fx.Proxy, Any, str]] = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is parameter.empty:
                values[parameter.name] = self.create_proxy("placeholder", parameter.name, (), {})
                continue
            default = values[parameter.name] = parameter.default
            optional = self.create_proxy("placeholder", parameter.name, (default,), {})
            guards.append((optional, default, parameter.name))
        for guard in guards:
            self.create_proxy("call_function", only_default, guard, {})
        return lambda root: root_fn(root, **values), [self.root]

    def _retract(self, mark: int) -> None:
        """Forget the nodes that a failed module left behind, and the parameters fetched in it."""
        for node in list(self.graph.nodes)[mark:][::-1]:
            self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        for name in [n for n, proxy in self.proxies.items() if proxy.node not in alive]:
            del self.proxies[name]
        for found in (self.found.calls, self.found.outputs):
            for name, values in list(found.items()):
                found[name] = [v for v in values if _node_of(v) is None or _node_of(v) in alive]


def merge_modes(train: Trace, evaluate: Trace) -> bool:
    """Make the train-mode graph right in both modes, if the two differ in nothing but mode flags.

    Functional dropout and its like receive `self.training` as a constant of the trace. Where the
    two graphs disagree in such a constant, the train-mode graph is changed to read the flag of the
    module that made the call, each time it runs.

    Returns:
        Whether the graphs could be merged; if not, both are needed and neither was changed.
    """
    pairs = list(zip(train.graph.nodes, evaluate.graph.nodes, strict=False))
    if len(train.graph.nodes) != len(evaluate.graph.nodes):
        return False
    twin = dict(pairs)
    flags: list[tuple[Node, Any, Any]] = []
    for a, b in pairs:
        same = a.op == b.op and a.target == b.target
        if not same or not _agree((a.args, a.kwargs), (b.args, b.kwargs), twin):
            return False
        if _differ((a.args, a.kwargs), (b.args, b.kwargs)):
            flags.append((a, (a.args, a.kwargs), (b.args, b.kwargs)))
    for node, ours, theirs in flags:
        owner = _owner(node)
        with train.graph.inserting_before(node):
            flag = train.graph.create_node("get_attr", f"{owner}.training" if owner else "training")
        args, kwargs = _with_flag(ours, theirs, flag)
        node.args, node.kwargs = args, kwargs
    return True


def _agree(ours: Any, theirs: Any, twin: dict[Node, Node]) -> bool:
    """Whether two arguments are the same but for True in train mode and False in eval mode."""
    if isinstance(ours, Node):
        return twin[ours] is theirs
    if _is_flag(ours, theirs):
        return True
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(_agree(ours[k], theirs[k], twin) for k in ours)
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(
            _agree(a, b, twin) for a, b in zip(ours, theirs, strict=True)
        )
    if isinstance(ours, slice):
        return _agree(
            (ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step), twin
        )
    return bool(ours == theirs)


def _is_flag(ours: Any, theirs: Any) -> bool:
    return ours is True and theirs is False


def _differ(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return any(_differ(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, tuple | list):
        return any(_differ(a, b) for a, b in zip(ours, theirs, strict=True))
    return _is_flag(ours, theirs)


def _with_flag(ours: Any, theirs: Any, flag: Node) -> Any:
    if isinstance(ours, dict):
        return {k: _with_flag(ours[k], theirs[k], flag) for k in ours}
    if isinstance(ours, tuple | list):
        return type(ours)(_with_flag(a, b, flag) for a, b in zip(ours, theirs, strict=True))
    return flag if _is_flag(ours, theirs) else ours


def _owner(node: Node) -> str:
    """The innermost module, relative to the root, in whose forward a node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()]
    return names[-1] if names else ""


def _label(trace: Trace) -> None:
    """Name every node after its place in the module tree, whatever else was entered."""
    repeats: Counter[str] = Counter()
    for node in trace.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if node.op == "call_module":
            base = str(node.target)
        else:
            owner = _owner(node)
            operation = node.target if node.op == "call_method" else _function_name(node.target)
            base = f"{owner}.{operation}" if owner else str(operation)
        label = base if repeats[base] == 0 else f"{base}_{repeats[base]}"
        repeats[base] += 1
        trace.labels[label] = node
        node.meta[LABEL] = label


def _function_name(function: Any) -> str:
    name = str(getattr(function, "__name__", function)).strip("_")
    return name[1:] if name in _ASSIGNMENTS else name


def _node_of(value: Any) -> Node | None:
    if isinstance(value, fx.Proxy):
        return value.node
    return value if isinstance(value, Node) else None


def _reason(error: BaseException) -> str:
    """What a tracing error says, in one line."""
    if isinstance(error, TraceFailure):
        return str(error)
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if "control flow" in first:
        return "its forward branches on the data or the size of its input"
    return f"{type(error).__name__}: {first}"


def _context() -> tuple[bool | None, ...]:
    """What `with` statements and checkpointing change without leaving a node in a graph."""
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast
    return *modes, keeps_otherwise()


def _notrace_functions() -> Iterator[Callable[..., Any]]:
    """Functions that timm keeps out of traces, if timm is loaded (a timm model has loaded it)."""
    timm_fx = sys.modules.get("timm.layers._fx")
    if timm_fx is not None:
        yield from (f for f in timm_fx.get_notrace_functions() if callable(f))
