"""Classes that are made at run time, and modules that change to one without being built anew.

An upgraded layer or network is of a subclass of its own class, so that `isinstance` holds. Such a
subclass has no importable name; it is pickled as the call that makes it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def made_class(
    name: str,
    bases: tuple[type, ...],
    namespace: dict[str, Any],
    maker: Callable[..., type],
    *args: Any,
) -> type[Any]:
    """A class whose instances are copied and pickled although it has no importable name.

    Args:
        name: of the class.
        bases: as for `type`.
        namespace: as for `type`.
        maker: an importable function that gives this class again, for the next arguments.
        *args: of `maker`.
    """

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        reduced = super(made, self).__reduce_ex__(protocol)
        if type(self) is not made:  # a subclass, which has to say itself how it is pickled
            return reduced
        rest = tuple(argument for argument in reduced[1] if argument is not made)
        return (_new, (maker, args, *rest), *reduced[2:])

    made: type[Any] = type(name, bases, {**namespace, "__reduce_ex__": reduce_ex})
    return made


def alike(module: nn.Module, cls: type[Any], *, without: Collection[str] = ()) -> Any:
    """A new module of class `cls` that holds what `module` does: the same parameter objects.

    Args:
        module: any module; it is not changed.
        cls: the class of the new one, whose `__init__` is not run.
        without: attributes, parameters and submodules to leave behind.
    """
    new: Any = object.__new__(cls)
    for key, value in vars(module).items():
        if key in without:
            continue
        held = isinstance(value, dict | set)
        vars(new)[key] = copy.copy(value) if held else value
        if isinstance(value, dict):
            for name in without:
                vars(new)[key].pop(name, None)
    return new


def _new(maker: Callable[..., type[Any]], args: tuple[Any, ...], *rest: Any) -> Any:
    cls = maker(*args)
    return cls.__new__(cls, *rest)
