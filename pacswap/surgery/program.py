"""A module that runs a rewritten graph and is otherwise itself.

Same class for `isinstance`, same attributes and methods; copied, pickled and moved like before.

The graph's code lives on the instance as a `Program`; the instance's class is a subclass of its own
class whose one replaced method runs it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from pacswap.errors import GuidanceError
from pacswap.nn.made import made_class
from pacswap.surgery.hooks import is_hooked
from pacswap.surgery.relay import Relay, graphed, relayed

_SLOT = "_pacswap_program"
_counter = itertools.count()


@dataclass(frozen=True)
class Needs:
    """What a graph takes for granted.

    Attributes:
        required: how many arguments have no default.
        defaults: the others, each with the default that the graph was traced with.
        names: of the arguments without a default.
        one_mode: modules that have to be in the mode of the whole, because each mode has a graph.
        entered: modules that dissolved into the graph: no hook of theirs would run.
        places: how many arguments may be given by their place; -1 if any number.
    """

    required: int
    defaults: tuple[tuple[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    one_mode: tuple[str, ...] = ()
    entered: tuple[str, ...] = ()
    places: int = -1

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        one_mode: tuple[str, ...] = (),
        entered: tuple[str, ...] = (),
    ) -> Needs:
        """Those of a method's graph."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = list(inspect.signature(function).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in kinds]
        defaults = tuple((p.name, p.default) for p in named if p.default is not p.empty)
        names = tuple(p.name for p in named if p.default is p.empty)
        placed = sum(p.kind is not p.KEYWORD_ONLY for p in named)
        any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        places = -1 if any_number else placed
        return cls(len(names), defaults, names, one_mode, entered, places)


_COMPARED = (bool, int, float, str, tuple, torch.dtype)


def is_default(value: Any, defaults: tuple[tuple[str, Any], ...], name: str) -> bool:
    """Whether an argument has its default; one without a default may be anything."""
    for known, default in defaults:
        if known == name:
            if value is default:
                return True
            return isinstance(value, _COMPARED) and bool(value == default)
    return True


class Program:
    """What runs in place of a method. Immutable; copies are the object itself.

    Attributes:
        method: the name of the method that it replaces.
        sources: generated Python for train mode and for eval mode (the same where one graph does);
            None where the method keeps its code and its layers are fed by the relay.
        names: what the generated code refers to: functions and classes, by the name it uses.
        keywords: keyword arguments that the method gains.
        relay: what feeds the layers where no graph runs; None if only the graph can.
        needs: what must hold at a call for the graphs to be right.
    """

    def __init__(
        self,
        method: str,
        sources: tuple[str, str] | None,
        names: tuple[dict[str, Any], dict[str, Any]],
        keywords: tuple[str, ...],
        relay: Relay | None,
        needs: Needs,
    ) -> None:
        self.method, self.sources, self.names, self.keywords = method, sources, names, keywords
        self.relay, self.needs = relay, needs
        self.train = self.evaluate = None
        if sources is not None:
            train = _compiled(sources[0], names[0])
            self.train = train
            self.evaluate = train if sources[0] == sources[1] else _compiled(sources[1], names[1])

    @classmethod
    def of(
        cls,
        method: str,
        graphs: tuple[fx.Graph, ...],
        keywords: tuple[str, ...],
        relay: Relay | None,
        needs: Needs,
    ) -> Program:
        """The program of no graph, of one for both modes, or of a train and an eval graph."""
        if not graphs:
            return cls(method, None, ({}, {}), keywords, relay, needs)
        codes = [graph.python_code("self") for graph in graphs]
        first, last = codes[0], codes[-1]
        names = (first.globals, last.globals)
        return cls(method, (first.src, last.src), names, keywords, relay, needs)

    def run(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the method: by its graph where that is right, in its own words elsewhere."""
        args, kwargs = self._named(args, kwargs)
        function = self.train if module.training else self.evaluate
        if function is not None and (self.relay is None or self._is_right(module, args, kwargs)):
            if self.relay is None:
                self._refuse_hooks(module)
            return graphed(module, function, args, kwargs)
        return self.hand_on(module, original, args, kwargs)

    def _named(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """An external guidance given by its place, behind all others, by its name."""
        if not self.keywords or self.needs.places < 0 or len(args) != self.needs.places + 1:
            return args, kwargs
        if self.keywords[0] in kwargs:  # twice: the method refuses one argument too many
            return args, kwargs
        return args[:-1], {**kwargs, self.keywords[0]: args[-1]}

    def hand_on(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a method's own code, whose layers are fed by the relay."""
        if self.relay is None:
            return original(module, *args, **kwargs)
        given = kwargs
        external = None
        if self.keywords:
            given = {key: value for key, value in kwargs.items() if key not in self.keywords}
            external = kwargs.get(self.keywords[0])
        return relayed(module, self.relay, external, original, args, given)

    def _is_right(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether all is as it was when the graphs were traced."""
        assert self.relay is not None
        if self.relay.checkpointing and self.relay.is_checkpointing(module):
            return False
        needs = self.needs
        if needs.one_mode:
            training = module.training
            if any(module.get_submodule(name).training != training for name in needs.one_mode):
                return False
        if self._hooked(module) is not None:
            return False  # it would not be called, nor its hooks
        extra = args[needs.required :]
        if not extra and not kwargs:
            return True
        names = [name for name, _ in needs.defaults]
        known = {*names, *needs.names, *self.keywords}
        if len(extra) > len(names) or not known.issuperset(kwargs):
            return False
        asked = [*zip(names, extra, strict=False), *kwargs.items()]
        return all(is_default(value, needs.defaults, name) for name, value in asked)

    def _hooked(self, module: nn.Module) -> str | None:
        """A module that dissolved into the graph and that somebody has hooked since."""
        if torch.compiler.is_compiling():
            return None
        entered = self.needs.entered
        return next((name for name in entered if is_hooked(module.get_submodule(name))), None)

    def _refuse_hooks(self, module: nn.Module) -> None:
        """Refuse a hook that would not run, where no relay can do without the graph.

        Raises:
            GuidanceError: a module has one that dissolved into the graph.
        """
        name = self._hooked(module)
        if name is not None:
            raise GuidanceError(
                f"'{name}' was hooked after the swap, and its call dissolved into the graph that "
                "feeds the pixel-adaptive layers, so that the hook would not run. Remove the hook, "
                "hook a layer inside it, or swap with a layer as the guidance instead of a node of "
                "the trace."
            )

    def __copy__(self) -> Program:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        names = tuple({k: _Module.wrap(v) for k, v in part.items()} for part in self.names)
        rest = (self.keywords, self.relay, self.needs)
        return _restored, (self.method, self.sources, names, *rest)


class _Module:
    """A Python module, by name: generated code refers to `torch`, and modules cannot be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    @staticmethod
    def wrap(value: Any) -> Any:
        return _Module(value.__name__) if inspect.ismodule(value) else value

    @staticmethod
    def unwrap(value: Any) -> Any:
        return importlib.import_module(value.name) if isinstance(value, _Module) else value


def _restored(
    method: str,
    sources: tuple[str, str] | None,
    names: tuple[dict[str, Any], dict[str, Any]],
    *rest: Any,
) -> Program:
    train, evaluate = ({k: _Module.unwrap(v) for k, v in part.items()} for part in names)
    return Program(method, sources, (train, evaluate), *rest)


def install(module: nn.Module, program: Program) -> None:
    """Make `module.method` run the program."""
    vars(module)[_SLOT] = program
    module.__class__ = upgraded_class(type(module), program.method)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    base = getattr(type(module), "_pacswap_base", None)
    if base is not None:
        del vars(module)[_SLOT]
        if "_pacswap_base" in vars(type(module)):  # not a subclass that was made of it since
            module.__class__ = base


def is_installed(module: nn.Module) -> bool:
    """Whether a module runs a rewritten graph."""
    return _SLOT in vars(module)


_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def upgraded_class(base: type[nn.Module], method: str) -> type[nn.Module]:
    """The subclass of `base` whose `method` runs the instance's program; the same one each time."""
    if (base, method) not in _classes:
        _classes[base, method] = _subclass(base, method)
    return _classes[base, method]


def _subclass(base: type[nn.Module], method: str) -> type[nn.Module]:
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_pacswap_base": base,
        "_pacswap_method": method,
        method: _replaced(base, method, "run"),
    }
    for name in _other_ways(base, method):
        namespace[name] = _replaced(base, name, "hand_on")
    return made_class(base.__name__, (base,), namespace, upgraded_class, base, method)


def _other_ways(base: type[nn.Module], method: str) -> list[str]:
    """Methods that also run layers of the network, such as timm's `forward_intermediates`.

    `forward` is none where another method is replaced: it calls that one.
    """
    names = [n for n in dir(base) if n.startswith("forward") or n == "get_intermediate_layers"]
    functions = [n for n in names if inspect.isfunction(inspect.getattr_static(base, n))]
    return [name for name in functions if name not in (method, "forward")]


def _replaced(base: type[nn.Module], name: str, how: str) -> Callable[..., Any]:
    """A method that lets the instance's program answer."""
    original = getattr(base, name)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        program = vars(self).get(_SLOT)
        if program is None:  # made by the class itself, as slicing a Sequential does
            return original(self, *args, **kwargs)
        return getattr(program, how)(self, original, args, kwargs)

    functools.update_wrapper(run, original)
    return run


def _compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function `forward` of generated code, readable in tracebacks."""
    filename = f"<pacswap graph {next(_counter)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(names)
    exec(compile(source, filename, "exec"), namespace)
    function = namespace["forward"]
    assert inspect.isfunction(function)
    return function
