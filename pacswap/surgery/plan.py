"""What a swap would do, as pure data: every layer, every guidance, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pacswap.errors import Fault, PlanError
from pacswap.surgery.spec import Group, GuidanceSpec, KernelSpec
from pacswap.surgery.table import columns, plus, quantity
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
    def is_external(self) -> bool:
        """Whether a source is the caller's own features."""
        return "external" in self.sources

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
        aliases: other names under which the same module is registered.
        calls: how often it runs in one forward pass.
    """

    name: str
    group: int
    conv: str
    kernel: int
    in_channels: int
    aliases: tuple[str, ...]
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
        renamed: (name in the model, name in here) of modules that were registered elsewhere first.

    The graphs are there until the plan has been carried out.
    """

    module: str
    method: str
    kind: str
    train: Trace | None = field(repr=False, compare=False)
    evaluate: Trace | None = field(repr=False, compare=False)
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def traces(self) -> tuple[Trace, ...]:
        """The one or two graphs."""
        return tuple(trace for trace in (self.train, self.evaluate) if trace is not None)

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
        owned = [(layer.name, "blend") for layer in self.layers]
        owned += [(kernel.owner, "adapting_kernel.log_bandwidth") for kernel in self.kernels]
        projected = (g for g in self.guidances if g.spec.channels is not None)
        owned += [(guidance.owner, "guidance.project.weight") for guidance in projected]
        aliases = {layer.name: (layer.name, *layer.aliases) for layer in self.layers}
        return sorted(f"{name}.{key}" for owner, key in owned for name in aliases[owner])

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
        return _in_words(self)


def names(layers: Iterable[PlannedLayer], group: int | None = None) -> list[str]:
    """The layers' names, of all groups or of one."""
    return [layer.name for layer in layers if group is None or layer.group == group]


def _in_words(plan: Plan) -> str:
    """The plan as a newcomer reads it: layers, guidance, kernels, what is rewired, the cost."""
    size = "×".join(map(str, plan.input_shape[1:]))
    count = len(plan.layers)
    many = len(plan.guidances) > 1
    rows = []
    for layer in plan.layers:
        kernel = plan.kernels[layer.kernel]
        row = [layer.name, layer.conv, "×".join(map(str, kernel.output_size))]
        row.append(", ".join(plan.guidance_of(layer).sources))
        rows.append(row)
    lines = [
        f"{plan.model}, input {size}: {count} convolution{'s' if count > 1 else ''} "
        f"become{'' if count > 1 else 's'} pixel-adaptive",
        "",
        *columns(["layer", "convolution", "output", "guided by"], rows),
        "",
    ]
    for index, guidance in enumerate(plan.guidances):
        kernels = [kernel for kernel in plan.kernels if kernel.guidance == index]
        title = f"guidance {index + 1}" if many else "guidance"
        lines.append(f"  {title:<12}{_guidance_in_words(guidance)}")
        lines.append(f"  {'kernel':<12}{_kernel_in_words(kernels, guidance.is_external)}")
    lines += [f"  {'rewired':<12}{_scope_in_words(scope)}" for scope in plan.scopes]
    cost = plan.cost
    lines += [
        f"  {'parameters':<12}{plus(cost.parameters, cost.added_parameters)}",
        f"  {'MACs':<12}{plus(cost.macs, cost.added_macs)}",
        f"  {'memory':<12}+ {quantity(cost.added_bytes, 'B')} of activations for one image",
    ]
    return "\n".join(lines)


def _guidance_in_words(guidance: PlannedGuidance) -> str:
    parts = []
    for name, shape in zip(guidance.sources, guidance.shapes, strict=True):
        if shape is None:
            parts.append(f"{name}, the keyword argument guidance=")
        else:
            parts.append(f"{name}, {shape[1]} channels at {shape[2]}×{shape[3]}")
    text = " and ".join(parts)
    if guidance.spec.source == "input+position":
        text += ", with the position of each pixel"
    if guidance.spec.channels is not None:
        text += f" → {guidance.spec.channels} (1×1 projection)"
    if guidance.spec.detach:
        text += ", no gradient"
    return text


def _kernel_in_words(kernels: Sequence[PlannedKernel], external: bool) -> str:
    spec = kernels[0].spec
    words: list[str] = [spec.form]
    if spec.normalize != "none":
        words.append(f"normalised by the {spec.normalize}")
    start = "0 (the plain convolution)" if spec.blend == 0 else f"{spec.blend:g}"
    words.append(f"blend {start}")
    unset = external and spec.bandwidth == "auto"
    words.append("bandwidth 1 (not calibrated)" if unset else f"bandwidth {spec.bandwidth}")
    count = len(kernels)
    shared = f"; {count} of them" if count > 1 else "; one for all"
    return ", ".join(words) + shared


def _scope_in_words(scope: PlannedScope) -> str:
    where = f"{scope.module}.{scope.method}" if scope.module else scope.method
    graphs = "" if scope.evaluate is None else ", a graph for each mode"
    return f"{where} ({scope.kind}){graphs}, the rest keeps its code"
