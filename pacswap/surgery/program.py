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
from typing import Any

from torch import fx, nn

_SLOT = "_pacswap_program"
_counter = itertools.count()


class Program:
    """The code of one or two graphs (train and eval mode). Immutable; copies are the object itself.

    Attributes:
        method: the name of the method that it replaces.
        sources: generated Python for train mode and for eval mode (the same where one graph does).
        names: what the generated code refers to: functions and classes, by the name it uses.
        keywords: keyword arguments that the method gains.
    """

    def __init__(
        self,
        method: str,
        sources: tuple[str, str],
        names: tuple[dict[str, Any], dict[str, Any]],
        keywords: tuple[str, ...],
    ) -> None:
        self.method, self.sources, self.names, self.keywords = method, sources, names, keywords
        train = _compiled(sources[0], names[0])
        self.train = train
        self.evaluate = train if sources[0] == sources[1] else _compiled(sources[1], names[1])

    @classmethod
    def of(cls, method: str, graphs: tuple[fx.Graph, ...], keywords: tuple[str, ...]) -> Program:
        """The program of one graph for both modes, or of a train and an eval graph."""
        codes = [graph.python_code("self") for graph in graphs]
        first, last = codes[0], codes[-1]
        return cls(method, (first.src, last.src), (first.globals, last.globals), keywords)

    def __copy__(self) -> Program:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        names = tuple({k: _Module.wrap(v) for k, v in part.items()} for part in self.names)
        return _restored, (self.method, self.sources, names, self.keywords)


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
    sources: tuple[str, str],
    names: tuple[dict[str, Any], dict[str, Any]],
    keywords: tuple[str, ...],
) -> Program:
    train, evaluate = ({k: _Module.unwrap(v) for k, v in part.items()} for part in names)
    return Program(method, sources, (train, evaluate), keywords)


def install(module: nn.Module, program: Program) -> None:
    """Make `module.method` run the program."""
    vars(module)[_SLOT] = program
    module.__class__ = upgraded_class(type(module), program.method)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    base = vars(type(module)).get("_pacswap_base")
    if base is not None:
        del vars(module)[_SLOT]
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
    original = getattr(base, method)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        program = vars(self).get(_SLOT)
        if (
            program is None
        ):  # made by the class itself, as slicing a Sequential does: no graph, no swap
            return original(self, *args, **kwargs)
        function = program.train if self.training else program.evaluate
        return function(self, *args, **kwargs)

    functools.update_wrapper(run, original)
    namespace = {
        method: run,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_pacswap_base": base,
        "_pacswap_method": method,
    }
    return type(base.__name__, (base,), namespace)


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by base class and method: the subclass has no importable name."""
    cls = type(self)
    reduced = super(cls, self).__reduce_ex__(protocol)
    assert isinstance(reduced, tuple)
    made_by, arguments = reduced[0], reduced[1]
    assert arguments[0] is cls or made_by is not None
    rest = tuple(a for a in arguments if a is not cls)
    return (
        _new_upgraded,
        (vars(cls)["_pacswap_base"], vars(cls)["_pacswap_method"], *rest),
        *reduced[2:],
    )


def _new_upgraded(base: type[nn.Module], method: str, *args: Any) -> nn.Module:
    cls = upgraded_class(base, method)
    return cls.__new__(cls, *args)


def _compiled(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function `forward` of generated code, readable in tracebacks."""
    filename = f"<pacswap graph {next(_counter)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(names)
    exec(compile(source, filename, "exec"), namespace)
    function = namespace["forward"]
    assert inspect.isfunction(function)
    return function
