"""What a swap would do, as pure data: every layer, every guidance, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch.fx.node import Node

from pacswap.errors import Fault, PlanError
from pacswap.surgery.spec import Group, GuidanceSpec, KernelSpec, Operation
from pacswap.surgery.trace import Trace


def refusal(model: str, faults: Sequence[Fault], *, many_groups: bool) -> PlanError:
    """The error for a request with these faults."""
    lines = []
    for fault in faults:
        place = fault.field or ""
        if many_groups and fault.group is not None:
            place = f"group {fault.group} {place}".strip()
        lines.append(f"{place}: {fault.message}" if place else fault.message)
    if len(lines) == 1:
        return PlanError(f"cannot upgrade {model}: {lines[0]}", faults)
    listed = "\n".join(f"  - {line}" for line in lines)
    return PlanError(f"cannot upgrade {model}, {len(lines)} faults:\n{listed}", faults)


@dataclass(frozen=True)
class PlannedGuidance:
    """Features that feed adapting kernels, computed once.

    Attributes:
        group: the group that asked for it.
        scope: index of the scope it lives in.
        sources: module names, node labels, `input` or `external`.
        spec: what the user asked for.
        shapes: of each source's output, (B, D, H, W); None for `external`.
        owner: the layer under which its projection is stored.
        cloned: which sources are overwritten in place later and so have to be copied.
        projected: False where no kernel looks at the features: then nothing is projected.
    """

    group: int
    scope: int
    sources: tuple[str, ...]
    spec: GuidanceSpec
    shapes: tuple[tuple[int, ...] | None, ...]
    owner: str
    cloned: tuple[bool, ...]
    projected: bool = True

    @property
    def is_external(self) -> bool:
        """Whether a source is the caller's own features."""
        return "external" in self.sources

    @property
    def in_channels(self) -> int | None:
        """D of the concatenated sources, positions included; None if one is not known yet."""
        if any(shape is None for shape in self.shapes):
            return None
        positions = self.axes if self.spec.source == "input+position" else 0
        return positions + sum(shape[1] for shape in self.shapes if shape is not None)

    @property
    def axes(self) -> int:
        """How many axes the features have beside batch and channels; 2 for maps."""
        return max((len(shape) - 2 for shape in self.shapes if shape is not None), default=2)

    @property
    def channels(self) -> int | None:
        """D of the features that the kernels see."""
        return self.projection or self.in_channels

    @property
    def projection(self) -> int | None:
        """To how many channels the features are projected; None if they are not."""
        return self.spec.channels if self.projected else None


@dataclass(frozen=True)
class PlannedKernel:
    """An adapting kernel, computed once for all layers that share it.

    Attributes:
        guidance: index of its guidance.
        spec: what the user asked for.
        owner: dotted name of the layer, or of the part of one, under which its learnable numbers
            are stored: of those that share it, the first one that runs.
        input_size: H, W of the features at the example input.
        output_size: H_out, W_out at the example input.
        taps: KH·KW.
    """

    guidance: int
    spec: KernelSpec
    owner: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    taps: int

    @property
    def is_calibrated(self) -> bool:
        """Whether its bandwidth is set on images."""
        return self.spec.bandwidth == "auto" and self.spec.form != "constant"


@dataclass(frozen=True)
class PlannedLayer:
    """One layer, or one call of a function, that becomes pixel-adaptive.

    Attributes:
        name: dotted, as `model.named_modules()` spells it, or the label of a call.
        group: the group that claims it.
        operation: what happens to it.
        what: what it is, in words: `Conv2d 128→128 3×3`.
        place: dotted name of the pixel-adaptive module: the layer's own where it is replaced, a new
            one where something is put behind it.
        kernels: indices of its adapting kernels; only a CRF has several.
        added: the `state_dict` keys that its module adds, relative to `place`, with their sizes.
        macs: multiply-accumulates for one image that it adds, beside its kernels'.
        numbers: activations for one image that it keeps, beside its kernels'.
        channels: C of what is filtered.
        aliases: other names under which the same module is registered.
        calls: how often it runs in one forward pass.
        heads: maps of each image that it filters, as inside attention.
    """

    name: str
    group: int
    operation: Operation
    what: str
    place: str
    kernels: tuple[int, ...]
    added: tuple[tuple[str, int], ...]
    macs: int
    numbers: int
    channels: int
    aliases: tuple[str, ...]
    calls: int
    heads: int = 1

    @property
    def kernel(self) -> int:
        """Index of its first adapting kernel."""
        return self.kernels[0]

    @property
    def is_inserted(self) -> bool:
        """Whether its module is new, behind what was there."""
        return self.place != self.name


@dataclass(frozen=True)
class RelayedSource:
    """A source of a guidance that can be noted while the network's own code runs.

    Attributes:
        name: as in `PlannedGuidance.sources`.
        module: dotted name of the module that returns it (not for `input` and `external`).
        cloned: whether it is overwritten in place later and so has to be copied.
    """

    name: str
    module: str
    cloned: bool


@dataclass(frozen=True)
class PlannedScope:
    """A method whose code is replaced by its rewritten graph; all around it stays as it is.

    Attributes:
        module: dotted name, "" for the model.
        method: `forward` or `forward_features`.
        kind: the module's class name.
        train: the graph of train mode, which serves both modes if `evaluate` is None.
        evaluate: the graph of eval mode, where it differs in more than mode flags.
        renamed: (name in the model, name in here) of modules that were registered elsewhere first.
        untraced: why there is no graph, so that the method keeps its code and its layers are fed
            while it runs; None where there is one.
        relayed: what feeds the layers then, or on the way of another method: of each group, its
            sources; None if only a graph can.

    The graphs are there until the plan has been carried out.
    """

    module: str
    method: str
    kind: str
    train: Trace | None = field(repr=False, compare=False)
    evaluate: Trace | None = field(repr=False, compare=False)
    renamed: tuple[tuple[str, str], ...] = ()
    untraced: str | None = None
    relayed: tuple[tuple[int, tuple[RelayedSource, ...]], ...] | None = None

    @property
    def traces(self) -> tuple[Trace, ...]:
        """The one or two graphs."""
        return tuple(trace for trace in (self.train, self.evaluate) if trace is not None)

    def nodes_of(self, name: str) -> list[Node]:
        """What makes the outputs of a module, or the node of that label, in all graphs."""
        return [node for trace in self.traces for node in trace.nodes_of(self.local(name))]

    def full(self, local: str) -> str:
        """A name relative to this module as the model spells it; the inverse of `local`."""
        for name, inner in self.renamed:
            if inner == local:
                return name
        return f"{self.module}.{local}" if self.module else local

    def local(self, name: str) -> str:
        """A dotted name relative to this module."""
        plain = name.removeprefix(f"{self.module}.") if self.module else name
        return dict(self.renamed).get(name, plain)


@dataclass(frozen=True)
class Cost:
    """Figures for one image of the example input's size.

    Attributes:
        parameters: of the original model.
        added_parameters: by the swap.
        macs: multiply-accumulates of the original model (convolutions and matrix products).
        added_macs: by the swap: projections, distances, and the modulation of every tap.
        added_bytes: activations that the swap adds: features, resized features and kernels.
    """

    parameters: int
    added_parameters: int
    macs: int
    added_macs: int
    added_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a swap will do. Pure data: printing it changes nothing, `rewrite` carries it out.

    Attributes:
        model: the class name.
        input_shape: of the example input.
        groups: what was asked for.
        scopes: the methods that are replaced by graphs.
        guidances: the features, in the order of the groups.
        kernels: the adapting kernels.
        layers: what becomes pixel-adaptive, in the order in which it runs.
        cost: parameters, MACs and memory, before and added.
    """

    model: str
    input_shape: tuple[int, ...]
    groups: tuple[Group, ...]
    scopes: tuple[PlannedScope, ...]
    guidances: tuple[PlannedGuidance, ...]
    kernels: tuple[PlannedKernel, ...]
    layers: tuple[PlannedLayer, ...]
    cost: Cost

    def guidance_of(self, layer: PlannedLayer) -> PlannedGuidance:
        """What feeds a layer."""
        return self.guidances[self.kernels[layer.kernel].guidance]

    def scope_of(self, layer: PlannedLayer) -> PlannedScope:
        """Where a layer is rewired."""
        return self.scopes[self.guidance_of(layer).scope]

    def added_parameters(self) -> list[str]:
        """The `state_dict` keys that the change adds."""
        keys = [
            f"{place}.{key}"
            for layer in self.layers
            for place in (layer.place, *layer.aliases)
            for key, _ in layer.added
        ]
        aliases = {layer.place: (layer.place, *layer.aliases) for layer in self.layers}
        for guidance in self.guidances:
            if guidance.projection is not None:
                keys += [f"{o}.guidance.project.weight" for o in aliases[guidance.owner]]
        return sorted(keys)

    def record(self) -> Plan:
        """The plan as an upgraded model keeps it: layers by name, without graphs."""
        groups = tuple(
            replace(group, layers=tuple(names(self.layers, index)), override=False)
            for index, group in enumerate(self.groups)
        )
        scopes = tuple(replace(scope, train=None, evaluate=None) for scope in self.scopes)
        return replace(self, groups=groups, scopes=scopes)

    def __str__(self) -> str:
        """The plan as a table that fits a terminal."""
        from pacswap.surgery.words import plan_in_words

        return plan_in_words(self)


def names(layers: Iterable[PlannedLayer], group: int | None = None) -> list[str]:
    """The layers' names, of all groups or of one."""
    return [layer.name for layer in layers if group is None or layer.group == group]
