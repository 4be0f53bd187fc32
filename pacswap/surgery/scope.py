"""Which method's code has to be replaced: the deepest one that runs both a layer and its guidance.

Everything around that method (a detector's loop over images, a segmentation network's dictionary,
the classifier behind `forward_features`) keeps its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from pacswap.errors import nearest, quoted
from pacswap.surgery.checks import why_not_entered
from pacswap.surgery.images import (
    on_several_images,
    own_image_entries,
    why_not_image,
    why_not_parted,
)
from pacswap.surgery.plan import PlannedScope
from pacswap.surgery.select import is_pattern, matching
from pacswap.surgery.skeleton import FUNCTION, Call, Entry, Observation
from pacswap.surgery.spec import Group, GuidanceSpec
from pacswap.surgery.targets import KINDS
from pacswap.surgery.trace import TraceFailure, trace_modes

IMAGE_SOURCES = ("input", "input+position")
ROOT: Entry = ("", "forward")
_NEARER = "Choose a guidance nearer to the layers, inside a submodule that can be."


@dataclass
class _Draft:
    """A scope in the making."""

    entry: Entry
    groups: list[int]
    enter: set[str] = field(default_factory=set)
    layers: dict[str, str] = field(default_factory=dict)  # with what is done to them
    own: dict[int, Entry] = field(default_factory=dict)  # groups whose image is this method's


@dataclass
class TracedScope:
    """What became of a draft.

    Attributes:
        scope: with its graphs, unless there is a reason why not.
        groups: the indices of those that it serves.
        hidden: (layer, or None for the scope as a whole, and why) of what is not in the graphs.
    """

    scope: PlannedScope
    groups: list[int]
    hidden: list[tuple[str | None, str]]


class ScopeFinder:
    """Collects groups, merges the scopes that overlap, and traces them."""

    def __init__(
        self,
        model: nn.Module,
        bones: nn.Module,
        seen: Observation,
        seen_train: Callable[[], Observation],
    ) -> None:
        self.model, self.bones, self.seen, self.seen_train = model, bones, seen, seen_train
        self.drafts: list[_Draft] = []
        self.refused: list[tuple[int, str]] = []  # groups, and why their image is not known

    def add(self, index: int, group: Group, members: list[str]) -> None:
        """Find the scope of one group whose guidance can be resolved.

        Args:
            index: of the group.
            group: what was asked for.
            members: its layers.
        """
        _, sources = resolve_sources(group.guidance, self.model, self.seen)
        seen = self.seen
        if any(not seen.of(name) for name in members):
            seen = self.seen_train()  # an auxiliary head that rests in eval mode
        layer_calls = [call for name in members for call in _layer_calls(name, seen)]
        fed_by = [_guidance_calls(source, self.model, seen) for source in sources]
        shared = on_several_images(layer_calls) if "input" in sources else None
        # A list of modules is often walked through instead of called, and what is put behind one of
        # them would change its length. Nothing is put behind what runs on several images.
        lists = {n for n, m in self.model.named_modules() if n and is_list(m)}
        avoided = lists if shared is None else set()
        images = _image_entries(seen) if shared is None else own_image_entries(seen)
        entry = _deepest_common(layer_calls, fed_by, images, sources, avoided)
        if shared is not None and entry == ROOT:
            self.refused.append((index, why_not_image(shared, layer_calls, seen)))
            return
        verb = KINDS[group.operation].verb
        draft = _Draft(entry, [index], layers=dict.fromkeys(members, verb))
        if shared is not None:
            draft.own[index] = entry
        for call in layer_calls:
            draft.enter.update(_between(call.stack[:-1], entry))
        for calls, is_label in fed_by:
            for call in calls:
                draft.enter.update(_between(call.stack if is_label else call.stack[:-1], entry))
        self._merge(draft)

    def traced(self) -> Iterator[TracedScope]:
        """Each scope with its graphs, or why it cannot have them."""
        for draft in self.drafts:
            for index, entry in draft.own.items():
                if entry != draft.entry:
                    self.refused.append((index, why_not_parted(entry[0], draft.entry[0])))
            module = self.model.get_submodule(draft.entry[0])
            scope = PlannedScope(
                *draft.entry, type(module).__name__, None, None, self._renamed(draft)
            )
            faults = self._why_not(draft)
            if faults:
                yield TracedScope(scope, draft.groups, [(None, fault) for fault in faults])
                continue
            try:
                scope = self._trace(draft, scope)
            except TraceFailure as failure:
                where = (
                    f"'{draft.entry[0]}' ({type(module).__name__})"
                    if draft.entry[0]
                    else "the model"
                )
                fault = f"{where} cannot be traced: {failure}. {_NEARER}"
                yield TracedScope(scope, draft.groups, [(None, fault)])
                continue
            yield TracedScope(scope, draft.groups, _hidden_layers(scope, draft.layers))

    def _merge(self, draft: _Draft) -> None:
        """Add a scope, absorbing or being absorbed by those that it overlaps."""
        for other in [d for d in self.drafts if _overlap(d.entry[0], draft.entry[0])]:
            self.drafts.remove(other)
            outer, inner = sorted((other, draft), key=lambda d: len(d.entry[0]))
            entry = outer.entry
            if outer.entry[0] == inner.entry[0] and outer.entry != inner.entry:
                entry = (outer.entry[0], "forward")
            between = {inner.entry[0]} | set(_parents(inner.entry[0], entry[0]))
            draft = _Draft(
                entry,
                sorted(outer.groups + inner.groups),
                outer.enter | inner.enter | (between - {entry[0]}),
                outer.layers | inner.layers,
                outer.own | inner.own,
            )
        self.drafts.append(draft)

    def _why_not(self, draft: _Draft) -> list[str]:
        faults = []
        for inner in sorted(draft.enter):
            reason = why_not_entered(self.model.get_submodule(inner))
            if reason is not None:
                faults.append(f"'{inner}' has to be rewired, but {reason}.")
        return faults

    def _renamed(self, draft: _Draft) -> tuple[tuple[str, str], ...]:
        module = draft.entry[0]
        prefix = f"{module}." if module else ""
        names = {inner: name for name, inner in self.model.named_modules()}
        inside = self.model.get_submodule(module).named_modules()
        pairs = ((names[inner], name) for name, inner in inside if name)
        return tuple((full, name) for full, name in pairs if full != prefix + name)

    def _trace(self, draft: _Draft, scope: PlannedScope) -> PlannedScope:
        name, method = draft.entry
        enter = [scope.local(inner) for inner in draft.enter]
        module = self.bones.get_submodule(name)
        train, evaluate = trace_modes(module, method, enter, self.bones.train)
        return replace(scope, train=train, evaluate=evaluate)


def is_list(module: nn.Module) -> bool:
    """Whether a module does nothing but hold others in their order."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and (
        type(module).forward in (nn.Sequential.forward, nn.ModuleList.forward)
    )


def resolve_sources(
    spec: GuidanceSpec, model: nn.Module, seen: Observation
) -> tuple[list[str], list[str]]:
    """(faults, sources): a source is `input`, `external`, a module that ran or a node's label."""
    if spec.source in IMAGE_SOURCES:
        return [], ["input"]
    faults: list[str] = []
    sources: list[str] = []
    ran = list(dict.fromkeys(call.name for call in seen.calls if call.name))
    modules = dict(model.named_modules())
    given = (spec.source,) if isinstance(spec.source, str) else spec.source
    if not given:
        faults.append("nothing is named. Name a layer, 'input' or 'external'.")
    for text in given:
        if text in ("input", "external") or text in ran:
            sources.append(text)
        elif is_pattern(text):
            message, found = _one_match(text, ran)
            faults += [message] if message else []
            sources += found
        elif text in modules:
            faults.append(_resting(text, modules[text], ran))
        elif _owner_of(text, ran) is None and "." in text:
            faults.append(no_such_source(text, ran))
        else:
            sources.append(text)  # perhaps a node's label: the trace will tell
    if len(set(sources)) < len(sources):
        again = [name for name in dict.fromkeys(sources) if sources.count(name) > 1]
        faults.append(f"{quoted(again)} is named twice. Once is enough.")
    return faults, sources


def no_such_source(text: str, known: list[str]) -> str:
    """The message for a guidance that is neither a module nor a node."""
    close = nearest(text, known)
    hint = f" Nearest: {quoted(close)}." if close else ""
    return f"'{text}' is no layer of the model and no node of its trace.{hint}"


def _one_match(pattern: str, ran: list[str]) -> tuple[str | None, list[str]]:
    try:
        found = matching(pattern, ran)
    except ValueError as error:
        return f"{error}.", []
    if len(found) == 1:
        return None, found
    if not found:
        close = nearest(pattern.removeprefix("re:"), ran)
        hint = f" Nearest: {quoted(close)}." if close else ""
        return f"'{pattern}' matches no layer.{hint}", []
    return (
        f"'{pattern}' matches {len(found)} layers: {quoted(found[:4])}"
        f"{', …' if len(found) > 4 else ''}. Name one, or give a list to concatenate several.",
        [],
    )


def _resting(name: str, module: nn.Module, ran: list[str]) -> str:
    inner = [n for n in ran if n.startswith(f"{name}.") and "." not in n[len(name) + 1 :]]
    hint = f" Layers in it that are: {quoted(inner[-3:])}." if inner else ""
    return (
        f"'{name}' ({type(module).__name__}) is never called when the model runs, so it has "
        f"no output.{hint}"
    )


def _owner_of(label: str, ran: list[str]) -> str | None:
    """The module in whose forward a label's node would lie: its longest dotted prefix that ran."""
    parts = label.split(".")[:-1]
    for depth in range(len(parts), 0, -1):
        if ".".join(parts[:depth]) in ran:
            return ".".join(parts[:depth])
    return None if parts else ""


def _layer_calls(name: str, seen: Observation) -> list[Call]:
    """The calls of a layer, or of the module in whose forward a node of that label lies."""
    calls = seen.of(name)
    if calls:
        return calls
    owner = _owner_of(name, [call.name for call in seen.calls]) or ""
    inside = [(call.stack[-1][0], (name, FUNCTION)) for call in seen.of(owner)]
    return [
        replace(call, entry=entry, stack=(*call.stack, (order, entry)))
        for call, (order, entry) in zip(seen.of(owner), inside, strict=True)
    ]


def _guidance_calls(source: str, model: nn.Module, seen: Observation) -> tuple[list[Call], bool]:
    """The calls that make a source, and whether it is a label (then its owner's calls)."""
    if source in ("input", "external"):
        return [], False
    calls = seen.of(source)
    if calls:
        return calls, False
    owner = _owner_of(source, [call.name for call in seen.calls])
    return seen.of(owner or ""), True


def _image_entries(seen: Observation) -> list[Entry]:
    """The methods that receive the model's own first argument as theirs."""
    image = next(iter(seen.arguments[ROOT][0]), None)
    split = ("", "forward_features")
    received = next(iter(seen.arguments.get(split, ((), {}))[0]), None)
    return [ROOT, split] if received is not None and received is image else [ROOT]


def _deepest_common(
    layers: list[Call],
    guidances: list[tuple[list[Call], bool]],
    image_entries: list[Entry],
    sources: list[str],
    avoided: set[str],
) -> Entry:
    """The deepest method whose every call that runs a layer also runs all of its sources."""
    for _, entry in reversed(layers[0].stack[:-1]):
        if ("external" in sources and entry != ROOT) or entry[0] in avoided:
            continue
        if "input" in sources and entry not in image_entries:
            continue
        around = [{e: order for order, e in call.stack[:-1]}.get(entry) for call in layers]
        if any(order is None for order in around):
            continue
        if all(
            set(around)
            <= {order for call in calls for order, e in _upper(call, label) if e == entry}
            for calls, label in guidances
            if calls
        ):
            return entry
    return ROOT


def _upper(call: Call, is_label: bool) -> tuple[tuple[int, Entry], ...]:
    return call.stack if is_label else call.stack[:-1]


def _between(stack: tuple[tuple[int, Entry], ...], entry: Entry) -> list[str]:
    """The modules on a call stack below a scope."""
    entries = [e for _, e in stack]
    if entry not in entries:
        return []
    below = entries[len(entries) - entries[::-1].index(entry) :]
    return [name for name, _ in below if name != entry[0]]


def _overlap(a: str, b: str) -> bool:
    return a == b or not a or not b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _parents(name: str, above: str) -> list[str]:
    """The dotted names strictly between two modules."""
    parts = name.split(".")
    names = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return [n for n in names if len(n) > len(above)]


def _hidden_layers(scope: PlannedScope, layers: dict[str, str]) -> list[tuple[str | None, str]]:
    """(layer, why) of those that are no nodes of a scope's graph."""
    faults: list[tuple[str | None, str]] = []
    hidden = {name: why for trace in scope.traces for name, why in trace.hidden.items()}
    for layer, verb in layers.items():
        local = scope.local(layer)
        if scope.nodes_of(layer):
            continue
        inside = [(n, why) for n, why in hidden.items() if local.startswith(f"{n}.")]
        if inside:
            name, why = max(inside, key=lambda pair: len(pair[0]))
            full = f"{scope.module}.{name}" if scope.module else name
            faults.append(
                (layer, f"cannot {verb} '{layer}': '{full}' around it cannot be traced: {why}.")
            )
        elif verb == "swap":
            faults.append(
                (layer, f"cannot swap '{layer}': it is not called as a module where it runs.")
            )
        else:
            prefix = f"{scope.module}." if scope.module else ""
            known = [f"{prefix}{label}" for trace in scope.traces for label in trace.labels]
            close = nearest(layer, dict.fromkeys(known))
            hint = f" Nearest: {quoted(close)}." if close else ""
            faults.append(
                (layer, f"cannot {verb} '{layer}': no node of the trace has that name.{hint}")
            )
    return faults
