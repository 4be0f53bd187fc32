"""From patterns to layer names. Nothing matched is an error; nothing is left out in silence."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pacswap.errors import nearest, quoted
from pacswap.surgery.skeleton import Observation
from pacswap.surgery.spec import LayerPredicate, LayerQuery, Layers


def convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    """All convolutions of a model by dotted name, 1×1 ones included, each under its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}


def is_spatial(conv: _ConvNd) -> bool:
    """Whether a convolution has more than one tap."""
    return max(conv.kernel_size) > 1


def select(
    layers: Layers | Iterable[str | LayerQuery],
    model: nn.Module,
    seen: Observation | None,
    describe: str,
) -> tuple[list[str], list[str]]:
    """The convolutions that a group names.

    Args:
        layers: what `Group.layers` takes.
        model: where they are sought.
        seen: one observed forward pass, for `last_of_stage` (execution order, output sizes).
        describe: the command or call that lists a model's layers, for messages.

    Returns:
        (names in the model's order, faults).
    """
    convs = convolutions(model)
    faults: list[str] = []
    chosen: set[str] = set()
    parts = list(layers) if isinstance(layers, tuple | list) else [layers]
    if not parts:
        faults.append("nothing is named. Name at least one convolution.")
    for part in parts:
        if isinstance(part, LayerQuery):
            chosen.update(_by_query(part, model, convs, seen, faults))
        elif isinstance(part, str):
            chosen.update(_by_pattern(part, model, convs, describe, faults))
        elif callable(part):
            chosen.update(_by_callable(part, convs, faults))
        else:
            faults.append(
                f"expected names, patterns, queries or callables, got {part!r} "
                f"({type(part).__name__})."
            )
    return [name for name in convs if name in chosen], faults


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a dotted name, a glob or a `re:` regex matches (a `*` also crosses dots).

    Raises:
        ValueError: the regex is not one; the message says why.

    Example:
        >>> matching("layer?.*.conv2", ["layer1.0.conv2", "layer1.0.conv1", "conv1"])
        ['layer1.0.conv2']
        >>> matching("re:layer[12].*", ["layer1.0.conv2", "layer3.0.conv2"])
        ['layer1.0.conv2']
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression: {error}") from error
        return [name for name in names if expression.fullmatch(name)]
    return [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]


def is_pattern(text: str) -> bool:
    """Whether a string is a glob or a `re:` regex and not a plain name."""
    return text.startswith("re:") or any(c in text for c in "*?[")


def _by_pattern(
    pattern: str, model: nn.Module, convs: dict[str, _ConvNd], describe: str, faults: list[str]
) -> list[str]:
    try:
        found = matching(pattern, convs)
    except ValueError as error:
        faults.append(f"{error}.")
        return []
    if not found:
        faults.append(_no_match(pattern, model, convs, describe))
    return found


def _no_match(pattern: str, model: nn.Module, convs: dict[str, _ConvNd], describe: str) -> str:
    modules = dict(model.named_modules(remove_duplicate=False))
    if pattern in modules and isinstance(modules[pattern], _ConvNd):
        first = next(name for name, conv in convs.items() if conv is modules[pattern])
        return f"'{pattern}' is another name of '{first}'. Use that one."
    if pattern in modules:
        inner = [
            name for name in convs if name.startswith(f"{pattern}.") and is_spatial(convs[name])
        ]
        hint = f" Convolutions in it: {quoted(inner[:3])}." if inner else ""
        return f"'{pattern}' is a {type(modules[pattern]).__name__}, not a convolution.{hint}"
    text = pattern.removeprefix("re:")
    close = nearest(text, convs)
    hint = f" Nearest: {quoted(close)}." if close else ""
    return f"'{pattern}' matches no convolution ({len(convs)} found).{hint} {describe}"


def _by_callable(
    predicate: LayerPredicate, convs: dict[str, _ConvNd], faults: list[str]
) -> list[str]:
    title = getattr(predicate, "__name__", repr(predicate))
    found = []
    for name, conv in convs.items():
        try:
            if predicate(name, conv):
                found.append(name)
        except Exception as error:  # the user's own code
            faults.append(
                f"the callable {title} raised {type(error).__name__} on '{name}': {error}. It is "
                "called as (name, module) and returns True or False."
            )
            return []
    if not found:
        name = title
        faults.append(f"the callable {name} accepts none of the {len(convs)} convolutions.")
    return found


def _by_query(
    query: LayerQuery,
    model: nn.Module,
    convs: dict[str, _ConvNd],
    seen: Observation | None,
    faults: list[str],
) -> list[str]:
    spatial = {name: conv for name, conv in convs.items() if is_spatial(conv)}
    found = [name for name, conv in spatial.items() if _has(conv, query)]
    for pattern in _strings(query.name):
        if not _safely(pattern, spatial, faults):
            faults.append(
                f"name: '{pattern}' matches none of the {len(spatial)} spatial convolutions."
            )
    if query.name is not None:
        named = {n for pattern in _strings(query.name) for n in _safely(pattern, spatial, [])}
        found = [name for name in found if name in named]
    for pattern in _strings(query.exclude):
        excluded = _safely(pattern, spatial, faults)
        if not excluded:
            faults.append(
                f"exclude: '{pattern}' matches none of the {len(spatial)} spatial convolutions. "
                "Leave it out or mend it."
            )
        found = [name for name in found if name not in excluded]
    if query.last_of_stage and seen is not None:
        found = _last_of_stage(found, model, seen)
    if not found and not faults:
        asked = ", ".join(f"{k}={v!r}" for k, v in vars(query).items() if v not in (None, False))
        faults.append(f"none of the {len(spatial)} spatial convolutions has {asked}.")
    return found


def _has(conv: _ConvNd, query: LayerQuery) -> bool:
    """Whether a convolution has every property that a query gives."""
    n = len(conv.kernel_size)

    def same(wanted: int | tuple[int, ...] | None, got: tuple[int, ...]) -> bool:
        if wanted is None:
            return True
        return got == ((wanted,) * n if isinstance(wanted, int) else tuple(wanted))

    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    return (
        (query.type is None or type(conv).__name__ == query.type)
        and same(query.kernel_size, conv.kernel_size)
        and same(query.stride, conv.stride)
        and same(query.dilation, conv.dilation)
        and (query.depthwise is None or depthwise == query.depthwise)
    )


def _last_of_stage(names: list[str], model: nn.Module, seen: Observation) -> list[str]:
    """Of each stage, the match that runs last (see `LayerQuery`)."""
    modules = dict(model.named_modules())
    last: dict[tuple[object, ...], str] = {}
    for call in seen.calls:
        if call.name in names and call.output_shape is not None:
            last[(_stage_container(call.name, modules), call.output_shape[2:])] = call.name
    return list(last.values())


def _stage_container(name: str, modules: dict[str, nn.Module]) -> str:
    """The outermost enclosing container whose name ends in a number (`backbone.layer3`), or ""."""
    parts = name.split(".")[:-1]
    for depth, part in enumerate(parts, start=1):
        if part[-1:].isdigit():
            outermost = ".".join(parts[:depth])
            is_container = isinstance(modules[outermost], nn.Sequential | nn.ModuleList)
            return outermost if is_container else ""
    return ""


def _strings(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def _safely(pattern: str, names: Iterable[str], faults: list[str]) -> list[str]:
    try:
        return matching(pattern, names)
    except ValueError as error:
        faults.append(f"{error}.")
        return []
