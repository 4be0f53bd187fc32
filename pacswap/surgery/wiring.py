"""Where a guidance is in a scope's graph, what shape it has, and whether it comes in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx.node import Node

from pacswap.errors import GuidanceError, quoted
from pacswap.nn import why_not_project
from pacswap.surgery.plan import PlannedScope
from pacswap.surgery.running import ShapeRunner, bound, recorded, why_not_same
from pacswap.surgery.scope import IMAGE_SOURCES, no_such_source
from pacswap.surgery.skeleton import Observation
from pacswap.surgery.spec import GuidanceSpec
from pacswap.surgery.trace import INPUT_SIZE, LABEL, OUTPUT_SIZE, Trace

_TAKEN = (
    "'external' would give forward a keyword argument 'guidance', and it has one of that name "
    "already. Rename that one, or feed the features through a layer of the model."
)


@dataclass
class Probe:
    """What a run of a scope's graphs on meta tensors showed.

    Attributes:
        shapes: of each node's value, if it is a tensor; one dictionary for each graph.
        overwritten: nodes whose value is changed in place after it was made.
    """

    scope: PlannedScope
    shapes: list[dict[Node, tuple[int, ...]]] = field(default_factory=list)
    overwritten: set[Node] = field(default_factory=set)

    def shape(self, node: Node) -> tuple[int, ...] | None:
        """The shape of a node's value, or None if it is not a tensor."""
        return next((shapes[node] for shapes in self.shapes if node in shapes), None)

    def feature_map(self, layer: str, *, inserted: bool = False, axes: int = 2) -> tuple[int, ...]:
        """C, H, W of what a layer filters: its first input, or what it is put behind."""
        for trace, shapes in zip(self.scope.traces, self.shapes, strict=True):
            for node in trace.nodes_of(self.scope.local(layer)):
                shape = shapes[node if inserted else node.all_input_nodes[0]]
                return shape[-axes - 1 :]
        raise AssertionError(f"{layer} has no node")

    def output_size(self, layer: str) -> tuple[int, ...]:
        """H, W of what a layer returns."""
        return self.feature_map(layer, inserted=True)[1:]

    def channels(self, layer: str, axes: int = 2) -> set[int]:
        """C of what a layer filters, at each of its calls."""
        shapes = [self.shape(node.all_input_nodes[0]) for node in self.scope.nodes_of(layer)]
        return {shape[-axes - 1] for shape in shapes if shape is not None}

    def calls(self, layer: str) -> int:
        """How often a layer runs."""
        local = self.scope.local(layer)
        return max(len(trace.nodes_of(local)) for trace in self.scope.traces)

    def overwritten_sources(self) -> set[str]:
        """The names of modules whose output, and `input` if the image, is changed in place."""
        found = set()
        for trace in self.scope.traces:
            for local, values in trace.outputs.items():
                if any(isinstance(v, fx.Proxy) and v.node in self.overwritten for v in values):
                    found.add(self.scope.full(local))
            first = next(node for node in trace.graph.nodes if node.op == "placeholder")
            if first in self.overwritten:
                found.add("input")
        return found

    def batches(self, layer: str, axes: int) -> set[int]:
        """How many maps a layer filters at its calls; none of what is not batched."""
        shapes = [self.shape(node.all_input_nodes[0]) for node in self.scope.nodes_of(layer)]
        return {shape[0] for shape in shapes if shape is not None and len(shape) == axes + 2}

    def locate(self, scope: PlannedScope, spec: GuidanceSpec) -> Located:
        """The sources of a guidance, with what they return."""
        return locate_guidance(scope, spec, self)


@dataclass(frozen=True)
class Located:
    """The sources of a guidance, found."""

    spec: GuidanceSpec
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    cloned: tuple[bool, ...]
    unusable: tuple[str, ...]

    def faults(self, in_channels: int | None) -> list[str]:
        """Why these features cannot be a guidance, with that projection."""
        faults = list(self.unusable)
        if faults:
            return faults
        if in_channels is None:
            if self.spec.channels is not None:
                faults.append(
                    "the number of channels of an external guidance is not known, so it cannot be "
                    "projected. Leave channels out and project it yourself."
                )
            return faults
        reason = why_not_project(in_channels, self.spec.channels)
        return [f"{reason}."] if reason is not None else []


def probe_scope(
    scope: PlannedScope, bones: nn.Module, seen: Observation
) -> tuple[Probe, str | None]:
    """Run a scope's method and its graphs on the arguments that it was seen with.

    Returns:
        The probe, and what is wrong if a graph does not do what the method does.
    """
    probe = Probe(scope)
    module = bones.get_submodule(scope.module)
    where = f"'{scope.module}'" if scope.module else "the model"
    for training in (True, False):
        trace = scope.train if training or scope.evaluate is None else scope.evaluate
        assert trace is not None
        args, kwargs = seen.arguments[scope.module, scope.method]
        runner = ShapeRunner(module, trace.graph)
        bones.train(training)
        doing = f"{where} does not run"
        try:
            theirs = recorded(getattr(module, scope.method), *args, **kwargs)
            doing = f"the trace of {where} does not run"
            ours = recorded(runner.run, *bound(trace, args, kwargs))
        except GuidanceError as error:
            return probe, f"the example input cannot be traced: {str(error).splitlines()[0]}"
        except Exception as error:  # the model's own code
            reason = (str(error).splitlines() or [""])[0].removesuffix(".")
            return probe, f"{doing} in {_mode(training)} mode: {type(error).__name__}: {reason}."
        finally:
            bones.eval()
        fault = why_not_same(ours, theirs)
        if fault is not None:
            return probe, f"the trace of {where} {fault}"
        if training or scope.evaluate is not None:
            probe.shapes.append(runner.shapes)
        probe.overwritten |= runner.overwritten()
        _note_sizes(trace, runner.shapes)
    return probe, None


def _note_sizes(trace: Trace, shapes: dict[Node, tuple[int, ...]]) -> None:
    for node in trace.graph.nodes:
        node.meta[OUTPUT_SIZE] = _size(shapes.get(node, ()))
        if node.op == "call_module" and node.all_input_nodes:
            node.meta[INPUT_SIZE] = _size(shapes.get(node.all_input_nodes[0], ()))


def _size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What tells resolutions apart: all behind batch and channels."""
    return shape[2:] if len(shape) > 4 else shape[-2:]


def _mode(training: bool) -> str:
    return "train" if training else "eval"


def source_node(trace: Trace, scope: PlannedScope, source: str) -> Node | None:
    """The node that makes a source, or None if the graph has none."""
    if source == "input":
        return next(node for node in trace.graph.nodes if node.op == "placeholder")
    local = scope.local(source)
    outputs = trace.outputs.get(local)
    if outputs:
        value = outputs[0]
        return value.node if isinstance(value, fx.Proxy) else None
    return trace.labels.get(local)


def locate_guidance(scope: PlannedScope, spec: GuidanceSpec, probe: Probe) -> Located:
    """Find a guidance's sources in a scope whose wiring has been checked."""
    shapes: list[tuple[int, ...] | None] = []
    cloned: list[bool] = []
    sources = source_names(scope, spec)
    for source in sources:
        nodes = [source_node(trace, scope, source) for trace in scope.traces]
        present = [node for node in nodes if node is not None]
        shape = probe.shape(present[0]) if present else None
        shapes.append(shape)
        cloned.append(any(node in probe.overwritten for node in present))
    unusable = why_not_maps(sources, shapes)
    return Located(spec, tuple(sources), tuple(shapes), tuple(cloned), tuple(unusable))


def why_not_maps(sources: list[str], shapes: Sequence[tuple[int, ...] | None]) -> list[str]:
    """Why what these sources return is no guidance; an external one is not known yet."""
    unusable = []
    first = shapes[0] if shapes else None
    for source, shape in zip(sources, shapes, strict=True):
        if source == "external":
            continue
        if shape is None:
            unusable.append(
                f"'{source}' does not return one tensor. Name a layer in it that returns a "
                "feature map."
            )
        elif len(shape) not in (3, 4, 5):
            unusable.append(
                f"'{source}' returns {list(shape)}; a guidance is a feature map [B, D, H, W], a "
                "sequence [B, D, L] or a clip [B, D, T, H, W]."
            )
        elif first is not None and len(shape) != len(first):
            unusable.append(
                f"'{source}' returns {list(shape)} and '{sources[0]}' {list(first)}, which cannot "
                "be concatenated. Name sources of as many axes."
            )
    return unusable


def source_names(scope: PlannedScope, spec: GuidanceSpec) -> list[str]:
    """The sources by name; patterns (which match one layer) replaced by what they match."""
    if spec.source in IMAGE_SOURCES:
        return ["input"]
    given = (spec.source,) if isinstance(spec.source, str) else spec.source
    return [_unpattern(scope, text) for text in given]


def why_not_fed(
    scope: PlannedScope,
    spec: GuidanceSpec,
    layers: list[str],
    inserted: set[str],
    seen: Observation,
) -> list[tuple[str, str]]:
    """(field, message) for each source that a graph lacks or computes after its use.

    Args:
        scope: with its traces.
        spec: the guidance.
        layers: those that it feeds.
        inserted: those of them behind which something is put.
        seen: a forward pass.
    """
    faults: list[tuple[str, str]] = []
    for trace in scope.traces:
        rank = {node: index for index, node in enumerate(trace.graph.nodes)}
        for source in source_names(scope, spec):
            if source == "external":
                if any(n.op == "placeholder" and n.target == "guidance" for n in rank):
                    faults.append(("guidance", _TAKEN))
                continue
            node = source_node(trace, scope, source)
            if node is None:
                faults.append(("guidance", _missing(trace, scope, source, seen)))
                continue
            if len(trace.outputs.get(scope.local(source), [])) > 1:
                values = trace.outputs[scope.local(source)]
                labels = [v.node.meta[LABEL] for v in values if isinstance(v, fx.Proxy)]
                faults.append(("guidance", _ambiguous(scope, source, labels)))
                continue
            for layer in layers:
                calls = trace.nodes_of(scope.local(layer))
                # What is put behind a layer may look at the layer's own output.
                ready = rank[node] - (layer in inserted)
                if calls and ready >= rank[calls[0]]:
                    faults.append(
                        ("guidance", _too_late(layer, source, calls[0], trace, scope, seen))
                    )
    return list(dict.fromkeys(faults))


def _unpattern(scope: PlannedScope, text: str) -> str:
    from pacswap.surgery.select import is_pattern, matching

    if not is_pattern(text):
        return text
    prefix = f"{scope.module}." if scope.module else ""
    known = {f"{prefix}{name}" for trace in scope.traces for name in trace.outputs}
    found = matching(text, sorted(known))
    return found[0] if found else text


def _missing(trace: Trace, scope: PlannedScope, source: str, seen: Observation) -> str:
    local = scope.local(source)
    inside = [(n, why) for n, why in trace.hidden.items() if local.startswith(f"{n}.")]
    if inside:
        name, why = max(inside, key=lambda pair: len(pair[0]))
        return f"'{source}' lies in '{name}', which cannot be traced: {why}."
    if local in trace.outputs:
        return (
            f"'{source}' does not return one tensor. Name a layer in it that returns a feature map."
        )
    prefix = f"{scope.module}." if scope.module else ""
    ran = [call.name for call in seen.calls if call.name]
    return no_such_source(source, ran + [f"{prefix}{label}" for label in trace.labels])


def _ambiguous(scope: PlannedScope, source: str, labels: list[str]) -> str:
    prefix = f"{scope.module}." if scope.module else ""
    return (
        f"'{source}' runs several times in one forward pass. Name one of its calls: "
        f"{quoted([prefix + label for label in labels[1:4]])}, or another layer."
    )


def _too_late(
    layer: str, source: str, call: Node, trace: Trace, scope: PlannedScope, seen: Observation
) -> str:
    """The message for a guidance that is computed after, or by, the layer that it should feed."""
    earlier = []
    for node in trace.graph.nodes:
        if node is call:
            break
        if node.op == "call_module":
            earlier.append(node.meta[LABEL])
    if source == layer:
        return f"'{layer}' cannot guide itself. Name a layer that runs earlier."
    prefix = f"{scope.module}." if scope.module else ""
    order = {c.name: c.order for c in reversed(seen.calls)}
    numbers = ""
    if source in order and layer in order:
        numbers = f" (it begins at call {order[source]}, the layer is call {order[layer]})"
    shown = [prefix + name for name in earlier[:2] + earlier[2:][-2:]]
    hint = f" Layers that run earlier: {quoted(shown)}." if shown else ""
    around = layer.startswith(f"{source}.")
    verb = "contains the layer" if around else "is ready only after the layer has run"
    return f"cannot feed '{layer}' from '{source}', which {verb}{numbers}.{hint}"
