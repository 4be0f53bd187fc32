"""Whether a scope's layers can be fed while its own code runs, as forward passes showed it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pacswap.errors import quoted
from pacswap.surgery.heads import heads_of
from pacswap.surgery.plan import PlannedScope, RelayedSource
from pacswap.surgery.scope import is_list, resolve_sources
from pacswap.surgery.skeleton import Call, Entry, Observation
from pacswap.surgery.spec import Group, GuidanceSpec
from pacswap.surgery.wiring import Located, why_not_maps


@dataclass(frozen=True)
class Request:
    """What one group wants in a scope.

    Attributes:
        index: of the group.
        group: the group.
        layers: its layers there.
        inserts: whether something is put behind one of them.
    """

    index: int
    group: Group
    layers: tuple[str, ...]
    inserts: bool


class RelayProbe:
    """What forward passes showed of a scope that keeps its own code.

    Args:
        model: the network.
        entry: the module's name and the method.
        passes: the network's forward passes, in eval mode first.
    """

    def __init__(self, model: nn.Module, entry: Entry, passes: Sequence[Observation]) -> None:
        self.model, self.entry, self.passes = model, entry, tuple(passes)
        self.modules = dict(model.named_modules())

    def runs(self, name: str) -> list[tuple[Observation, int, list[Call]]]:
        """(pass, order of the scope's call, calls of a module inside) for each call of the scope.

        A call that runs the module not once is left out.
        """
        found = []
        for seen in self.passes:
            for scope in (call for call in seen.calls if call.entry == self.entry):
                inside = [c for c in seen.of(name) if (scope.order, self.entry) in c.stack[:-1]]
                if inside:
                    found.append((seen, scope.order, inside))
        return found

    def first(self, name: str) -> Call:
        """The first call of a module in the scope."""
        return self.runs(name)[0][2][0]

    def feature_map(self, layer: str, *, inserted: bool = False, axes: int = 2) -> tuple[int, ...]:
        """C, H, W of what a layer filters, or of what it returns."""
        call = self.first(layer)
        shape = call.output_shape if inserted else call.input_shape
        assert shape is not None
        return tuple(shape[-axes - 1 :])

    def output_size(self, layer: str) -> tuple[int, ...]:
        """H, W of what a layer returns."""
        return self.feature_map(layer, inserted=True)[1:]

    def channels(self, layer: str, axes: int = 2) -> set[int]:
        """C of what a layer filters, at each of its calls."""
        calls = [call for _, _, inside in self.runs(layer) for call in inside]
        return {call.input_shape[-axes - 1] for call in calls if call.input_shape is not None}

    def batches(self, layer: str, axes: int) -> set[int]:
        """None: `faults` has compared them."""
        return set()

    def calls(self, layer: str) -> int:
        """How often a layer runs in one call of the scope."""
        return max(len(inside) for _, _, inside in self.runs(layer))

    def locate(self, scope: PlannedScope, spec: GuidanceSpec) -> Located:
        """The sources of a guidance, with what they return."""
        _, names = resolve_sources(spec, self.model, self.passes[0])
        shapes, cloned = [], []
        for name in names:
            shapes.append(None if name == "external" else self._shape(name))
            cloned.append(self._is_overwritten(name))
        unusable = why_not_maps(names, shapes)
        return Located(spec, tuple(names), tuple(shapes), tuple(cloned), tuple(unusable))

    def _shape(self, source: str) -> tuple[int, ...] | None:
        if source == "input":
            seen = self.passes[0]
            image = next(iter(seen.arguments[self.entry][0]), None)
            return tuple(image.shape) if isinstance(image, Tensor) else None
        return self.first(source).output_shape

    def _is_overwritten(self, source: str) -> bool:
        if source in ("input", "external"):
            return source == "input" and any(seen.overwrites_input for seen in self.passes)
        calls = [(seen, call) for seen, _, inside in self.runs(source) for call in inside]
        return any(call.order in seen.overwritten for seen, call in calls)

    def sources(self, spec: GuidanceSpec, copied: set[str]) -> tuple[RelayedSource, ...]:
        """Where each source is noted, and whether it has to be copied.

        Args:
            spec: the guidance.
            copied: those that the graphs, of train mode too, overwrite.
        """
        names = resolve_sources(spec, self.model, self.passes[0])[1]
        return tuple(
            RelayedSource(name, self._tapped(name), name in copied or self._is_overwritten(name))
            for name in names
        )

    def _tapped(self, source: str) -> str:
        """The module that returns a source's output: of a Sequential, its last entry.

        Gradient checkpointing runs the entries of a Sequential and not the Sequential itself.
        """
        module = self.modules.get(source)
        while isinstance(module, nn.Sequential) and is_list(module) and len(module) > 0:
            last = list(module._modules)[-1]
            inner = f"{source}.{last}"
            if self.modules.get(inner) is None or not self.runs(inner):
                break
            if any(len(inside) > 1 for _, _, inside in self.runs(inner)):
                break  # it runs elsewhere too: one ReLU for all
            source, module = inner, self.modules[inner]
        return source

    def faults(self, requests: Iterable[Request]) -> list[tuple[str | None, int, str, str]]:
        """(layer, group, field, why) of what cannot be fed at run time."""
        found: list[tuple[str | None, int, str, str]] = []
        for request in requests:
            names = resolve_sources(request.group.guidance, self.model, self.passes[0])[1]
            for name in names:
                fault = self._why_not_source(name)
                if fault is not None:
                    found.append((None, request.index, "guidance", fault))
                    continue
                for layer in request.layers:
                    fault = self._why_not_fed(layer, name)
                    if fault is not None:
                        found.append((layer, request.index, "guidance", fault))
        return list(dict.fromkeys(found))

    def _why_not_source(self, name: str) -> str | None:
        if name in ("input", "external"):
            return None
        times = max((len(inside) for _, _, inside in self.runs(name)), default=0)
        if times > 1:
            return f"'{name}' runs {times} times in one forward pass. Name another layer."
        if times == 0:
            return f"'{name}' does not run where the layers do. Name another layer."
        return None

    def _why_not_fed(self, layer: str, source: str) -> str | None:
        for seen, order, inside in self.runs(layer):
            made = None if source in _GIVEN else self._made(source, seen, order)
            if made is None and source not in _GIVEN:
                return f"cannot feed '{layer}' from '{source}', which does not run beside it."
            if made is not None:
                late = made.order > inside[0].order or (made.order, made.entry) in inside[0].stack
                if late:
                    return self._too_late(layer, source, made, inside[0], seen)
            batch = self._batch(source, made)
            for call in inside:
                if call.input_shape is None:
                    return f"cannot feed '{layer}': what it filters is not one tensor."
                if batch is None or heads_of(layer, self.modules, seen, batch) is not None:
                    continue
                return why_not_batch(layer, source, call.input_shape[0], batch)
        return None

    def _made(self, source: str, seen: Observation, order: int) -> Call | None:
        """The call of a source in one call of the scope."""
        for other, at, calls in self.runs(source):
            if other is seen and at == order:
                return calls[0]
        return None

    def _batch(self, source: str, made: Call | None) -> int | None:
        if source == "external":
            return None
        shape = self._shape(source) if made is None else made.output_shape
        return None if shape is None else shape[0]

    def _too_late(self, layer: str, source: str, made: Call, call: Call, seen: Observation) -> str:
        if source == layer:
            return f"'{layer}' cannot guide itself. Name a layer that runs earlier."
        around = (made.order, made.entry) in call.stack
        verb = "contains the layer" if around else "is ready only after the layer has run"
        names = [c.name for c in seen.calls if c.order < call.order and c.name in self.modules]
        leaves = [n for n in dict.fromkeys(names) if n and not list(self.modules[n].children())]
        shown = leaves[:2] + leaves[2:][-2:]
        hint = f" Layers that run earlier: {quoted(shown)}." if shown else ""
        return f"cannot feed '{layer}' from '{source}', which {verb}.{hint}"


def why_not_batch(layer: str, source: str, has: int, guidance: int) -> str:
    """The words for a layer that sees another number of maps than its guidance has."""
    return (
        f"cannot feed '{layer}' from '{source}': it filters {has} maps where the guidance has "
        f"{guidance}. It runs on regions or windows of the image, or on several images at once; "
        "name a guidance that runs on the same ones."
    )


_GIVEN = ("input", "external")


def why_not_relayed(
    requests: Iterable[Request], model: nn.Module, entry: Entry, seen: Observation
) -> str | None:
    """Why only a graph could do what is asked for in a scope, or None."""
    modules = dict(model.named_modules())
    if entry[1] in vars(modules[entry[0]]):
        return "its forward is not a method of its class"
    for request in requests:
        if request.inserts:
            return "what is put behind a layer needs a graph"
        for name in resolve_sources(request.group.guidance, model, seen)[1]:
            if name not in _GIVEN and name not in modules:
                return f"'{name}' is a node of a graph and no module"
    return None
