"""What a swap would do, as pure data: every layer, every guidance, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pacswap.errors import Fault, PlanError
from pacswap.surgery.cost import Cost
from pacswap.surgery.spec import Group, GuidanceSpec, KernelSpec
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
        return PlanError(f"cannot swap in {model}: {lines[0]}", faults)
    listed = "\n".join(f"  - {line}" for line in lines)
    return PlanError(f"cannot swap in {model}, {len(lines)} faults:\n{listed}", faults)


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
    """

    group: int
    scope: int
    sources: tuple[str, ...]
    spec: GuidanceSpec
    shapes: tuple[tuple[int, ...] | None, ...]
    owner: str
    cloned: tuple[bool, ...]

    @property
    def in_channels(self) -> int | None:
        """D of the concatenated sources, positions included; None if one is not known yet."""
        if any(shape is None for shape in self.shapes):
            return None
        positions = 2 if self.spec.source == "input+position" else 0
        return positions + sum(shape[1] for shape in self.shapes if shape is not None)

    @property
    def channels(self) -> int | None:
        """D of the features that the kernels see."""
        return self.spec.channels or self.in_channels


@dataclass(frozen=True)
class PlannedKernel:
    """An adapting kernel, computed once for all layers that share it.

    Attributes:
        guidance: index of its guidance.
        spec: what the user asked for.
        owner: the layer under which its bandwidth is stored, the first one that runs.
        input_size: H, W at the example input.
        output_size: H_out, W_out at the example input.
        taps: KH·KW.
    """

    guidance: int
    spec: KernelSpec
    owner: str
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    taps: int


@dataclass(frozen=True)
class PlannedLayer:
    """One convolution that becomes pixel-adaptive.

    Attributes:
        name: dotted, as `model.named_modules()` spells it.
        group: the group that claims it.
        conv: what it is, in words: `Conv2d 128→128 3×3`.
        kernel: index of its adapting kernel.
        in_channels: C_in.
        calls: how often it runs in one forward pass.
    """

    name: str
    group: int
    conv: str
    kernel: int
    in_channels: int
    calls: int


@dataclass(frozen=True)
class PlannedScope:
    """A method whose code is replaced by its rewritten graph; all around it stays as it is.

    Attributes:
        module: dotted name, "" for the model.
        method: `forward` or `forward_features`.
        kind: the module's class name.
        train: the graph of train mode, which serves both modes if `evaluate` is None.
        evaluate: the graph of eval mode, where it differs in more than mode flags.

    The graphs are there until the plan has been carried out.
    """

    module: str
    method: str
    kind: str
    train: Trace | None = field(repr=False, compare=False)
    evaluate: Trace | None = field(repr=False, compare=False)

    @property
    def traces(self) -> tuple[Trace, ...]:
        """The one or two graphs."""
        return tuple(trace for trace in (self.train, self.evaluate) if trace is not None)

    def local(self, name: str) -> str:
        """A dotted name relative to this module."""
        return name.removeprefix(f"{self.module}.") if self.module else name


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
        layers: the swapped convolutions, in the order in which they run.
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
        """The `state_dict` keys that the swap adds."""
        names = [f"{layer.name}.blend" for layer in self.layers]
        names += [f"{kernel.owner}.adapting_kernel.log_bandwidth" for kernel in self.kernels]
        projected = (g for g in self.guidances if g.spec.channels is not None)
        names += [f"{guidance.owner}.guidance.project.weight" for guidance in projected]
        return sorted(names)

    def record(self) -> Plan:
        """The plan as an upgraded model keeps it: layers by name, without graphs."""
        groups = tuple(
            replace(group, layers=tuple(names(self.layers, index)), override=False)
            for index, group in enumerate(self.groups)
        )
        scopes = tuple(replace(scope, train=None, evaluate=None) for scope in self.scopes)
        return replace(self, groups=groups, scopes=scopes)

    def __str__(self) -> str:
        """The plan as a table."""
        from pacswap.surgery.table import plan_table

        return plan_table(self)


def names(layers: Iterable[PlannedLayer], group: int | None = None) -> list[str]:
    """The layers' names, of all groups or of one."""
    return [layer.name for layer in layers if group is None or layer.group == group]
