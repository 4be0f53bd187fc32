"""From patterns to layer names. Nothing matched is an error; nothing is left out in silence."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from pacswap.errors import nearest, quoted
from pacswap.surgery.skeleton import Observation
from pacswap.surgery.spec import Group, LayerPredicate, LayerQuery
from pacswap.surgery.targets import KINDS, Kind, Target, with_article


def select(
    group: Group,
    model: nn.Module,
    found: dict[str, Target],
    seen: Observation | None,
    describe: str,
) -> tuple[list[str], list[str]]:
    """What a group names.

    Args:
        group: its `layers` and its operation.
        model: where they are sought.
        found: what `targets` gave for the operation.
        seen: one observed forward pass, for `last_of_stage` (execution order, output sizes).
        describe: the command or call that lists what could be named, for messages.

    Returns:
        (names in the model's order, faults).
    """
    faults: list[str] = []
    chosen: set[str] = set()
    layers, kind = group.layers, KINDS[group.operation]
    parts = list(layers) if isinstance(layers, tuple | list) else [layers]
    if not parts:
        faults.append(f"nothing is named. Name at least one {kind.noun}.")
    for part in parts:
        if isinstance(part, LayerQuery):
            chosen.update(_by_query(part, model, kind, found, seen, faults))
        elif isinstance(part, str):
            chosen.update(_by_pattern(part, model, kind, found, describe, faults))
        elif callable(part):
            chosen.update(_by_callable(part, kind, found, faults))
        else:
            faults.append(
                f"expected names, patterns, queries or callables, got {part!r} "
                f"({type(part).__name__})."
            )
    return [name for name in found if name in chosen], faults


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
    pattern: str,
    model: nn.Module,
    kind: Kind,
    found: dict[str, Target],
    describe: str,
    faults: list[str],
) -> list[str]:
    try:
        names = matching(pattern, found)
    except ValueError as error:
        faults.append(f"{error}.")
        return []
    if not names:
        faults.append(_no_match(pattern, model, kind, found, describe))
    return names


def _no_match(
    pattern: str, model: nn.Module, kind: Kind, found: dict[str, Target], describe: str
) -> str:
    modules = dict(model.named_modules(remove_duplicate=False))
    twins = [n for n, target in found.items() if target.module is modules.get(pattern, model)]
    if twins:
        return f"'{pattern}' is another name of '{twins[0]}'. Use that one."
    if pattern in modules and kind is KINDS["append"]:
        type_name = type(modules[pattern]).__name__
        return (
            f"'{pattern}' ({type_name}) is never called when the model runs, so it has no output."
        )
    if pattern in modules:
        inner = [n for n in found if n.startswith(f"{pattern}.") and found[n].is_spatial]
        hint = f" {kind.nouns.capitalize()} in it: {quoted(inner[:3])}." if inner else ""
        found_type = with_article(type(modules[pattern]).__name__)
        return f"'{pattern}' is {found_type}, not {with_article(kind.noun)}.{hint}"
    text = pattern.removeprefix("re:")
    close = nearest(text, found)
    hint = f" Nearest: {quoted(close)}." if close else ""
    return f"'{pattern}' matches no {kind.noun} ({len(found)} found).{hint} {describe}"


def _by_callable(
    predicate: LayerPredicate, kind: Kind, found: dict[str, Target], faults: list[str]
) -> list[str]:
    title = getattr(predicate, "__name__", repr(predicate))
    names = []
    for name, target in found.items():
        try:
            if predicate(name, target.module):
                names.append(name)
        except Exception as error:  # the user's own code
            faults.append(
                f"the callable {title} raised {type(error).__name__} on '{name}': {error}. It is "
                "called as (name, module) and returns True or False."
            )
            return []
    if not names:
        faults.append(f"the callable {title} accepts none of the {len(found)} {kind.nouns}.")
    return names


def _by_query(
    query: LayerQuery,
    model: nn.Module,
    kind: Kind,
    found: dict[str, Target],
    seen: Observation | None,
    faults: list[str],
) -> list[str]:
    # Logits come from a 1×1 convolution as a rule.
    append = kind is KINDS["append"]
    spatial = {name: target for name, target in found.items() if append or target.is_spatial}
    nouns = f"spatial {kind.nouns}" if kind.noun == "convolution" else kind.nouns
    names = [name for name, target in spatial.items() if _has(target, query)]
    for pattern in _strings(query.name):
        if not _safely(pattern, spatial, faults):
            faults.append(f"name: '{pattern}' matches none of the {len(spatial)} {nouns}.")
    if query.name is not None:
        named = {n for pattern in _strings(query.name) for n in _safely(pattern, spatial, [])}
        names = [name for name in names if name in named]
    for pattern in _strings(query.exclude):
        excluded = _safely(pattern, spatial, faults)
        if not excluded:
            faults.append(
                f"exclude: '{pattern}' matches none of the {len(spatial)} {nouns}. Leave it out or "
                "mend it."
            )
        names = [name for name in names if name not in excluded]
    if query.last_of_stage and seen is not None:
        names = _last_of_stage(names, model, seen)
    if not names and not faults:
        asked = ", ".join(f"{k}={v!r}" for k, v in vars(query).items() if v not in (None, False))
        faults.append(f"none of the {len(spatial)} {nouns} has {asked}.")
    return names


def _has(target: Target, query: LayerQuery) -> bool:
    """Whether a target has every property that a query gives."""

    def same(wanted: int | tuple[int, ...] | None, attribute: str) -> bool:
        if wanted is None:
            return True
        got = target.sizes(attribute)
        if got is None:
            return False
        return got == ((wanted,) * len(got) if isinstance(wanted, int) else tuple(wanted))

    conv = target.module
    depthwise = isinstance(conv, _ConvNd) and conv.groups > 1 and conv.groups == conv.in_channels
    return (
        (query.type is None or target.type_name == query.type)
        and same(query.kernel_size, "kernel_size")
        and same(query.stride, "stride")
        and same(query.dilation, "dilation")
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
