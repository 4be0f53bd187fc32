"""From claims that have been traced to the parts of a plan: layers, shared kernels, guidances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from pacswap.nn import Adaptive, PacCRF, PacFilter2d
from pacswap.surgery.cost import layer_macs, layer_numbers
from pacswap.surgery.heads import heads_of
from pacswap.surgery.operations import adaptive_module, kernels_of, resolved_kernel
from pacswap.surgery.plan import PlannedGuidance, PlannedKernel, PlannedLayer, PlannedScope
from pacswap.surgery.relaying import RelayProbe, why_not_batch
from pacswap.surgery.runtime import blurred_size
from pacswap.surgery.skeleton import FUNCTION, Call, Observation, skeleton
from pacswap.surgery.spec import Group
from pacswap.surgery.targets import Target, in_words, is_inserted
from pacswap.surgery.trace import LABEL
from pacswap.surgery.wiring import Probe

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MAPS = {1: "sequences [B, C, L]", 2: "maps [B, C, H, W]", 3: "clips [B, C, T, H, W]"}
_PREFIX = {"upsample": "guided", "append": "crf"}


@dataclass(frozen=True)
class Claim:
    """A target and the group that wants it."""

    target: Target
    group: int

    @property
    def name(self) -> str:
        """The target's name."""
        return self.target.name


class Assembly:
    """Collects layers into shared kernels and guidances.

    Attributes:
        faults: (message, group, field) of what cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Group, ...],
        sizes: Mapping[str, tuple[tuple[int, ...], ...]],
        seen: Observation,
    ) -> None:
        self.model, self.groups, self.sizes, self.seen = model, groups, sizes, seen
        self.guidances: list[PlannedGuidance] = []
        self.kernels: list[PlannedKernel] = []
        self.layers: list[PlannedLayer] = []
        self.faults: list[tuple[str, int, str]] = []
        self._shared: dict[object, int] = {}

    def add(self, index: int, scope: PlannedScope, probe: Probe | RelayProbe, claim: Claim) -> None:
        """Plan one layer of the scope with that index."""
        group, target = self.groups[claim.group], claim.target
        inserted = is_inserted(group.operation, target)
        place = self._new_place(group, scope, claim.name) if inserted else claim.name
        guidance = self._guidance(index, scope, probe, claim, place)
        axes = target.axes
        channels, *seen = probe.feature_map(claim.name, inserted=inserted, axes=axes)
        at_end = at_output(group, target)
        size = probe.output_size(claim.name) if at_end else tuple(seen)
        old = None if inserted else target.module
        twin = None if old is None else skeleton(old)
        module = adaptive_module(group, twin, channels, torch.empty(0, device="meta"))
        filtered = {channels} if inserted else probe.channels(claim.name, axes)
        self._check_axes(claim, guidance, axes)
        heads = 1 if inserted else self._heads(claim, guidance)
        batches = set() if inserted or heads > 1 else probe.batches(claim.name, axes)
        self._check_batch(claim, guidance, batches)
        for number in sorted(filtered):
            self._check_channels(claim, group, guidance, number)
        if isinstance(module, PacFilter2d):
            size = blurred_size(size, module.blur)
        self._check_reach(claim, group, module, size)
        kernels, added = self._kernels(claim, group, place, guidance, module, size)
        self.layers.append(
            PlannedLayer(
                claim.name,
                claim.group,
                group.operation,
                in_words(group.operation, target),
                place,
                tuple(kernels),
                tuple(added),
                layer_macs(module, channels, self.kernels[kernels[0]].output_size)
                * max(1, probe.calls(claim.name)),
                layer_numbers(module, channels, self.kernels[kernels[0]].output_size),
                channels,
                self._aliases(place),
                probe.calls(claim.name),
                heads,
            )
        )

    def _kernels(
        self,
        claim: Claim,
        group: Group,
        place: str,
        guidance: int,
        module: Adaptive,
        size: tuple[int, ...],
    ) -> tuple[list[int], list[tuple[str, int]]]:
        """The indices of a layer's kernels, and the tensors that the layer adds."""
        assert isinstance(module, nn.Module)
        kept = set() if claim.target.module is None else set(claim.target.module.state_dict())
        if place != claim.name:
            kept = set()
        added = {key: t.numel() for key, t in module.state_dict().items() if key not in kept}
        indices = []
        spec = resolved_kernel(group, None if place != claim.name else claim.target.module)
        for path, kernel in kernels_of(module).items():
            owner = f"{place}.{path}" if path else place
            key: object = owner
            if not isinstance(module, PacCRF):
                geometry = (kernel.window, getattr(kernel, "transposed", None))
                wide = tuple(p.shape for p in kernel.parameters())
                sizes = (self.sizes[claim.name], size)
                key = (guidance, spec, type(kernel), geometry, wide, sizes)
            if key not in self._shared:
                self._shared[key] = len(self.kernels)
                out = kernel.window.output_size(*size)
                self.kernels.append(
                    PlannedKernel(guidance, spec, owner, size, out, kernel.window.taps)
                )
            indices.append(self._shared[key])
            if self.kernels[indices[-1]].owner != owner:
                added = {k: n for k, n in added.items() if not k.startswith("adapting_kernel.")}
        return indices, list(added.items())

    def _guidance(
        self, index: int, scope: PlannedScope, probe: Probe | RelayProbe, claim: Claim, place: str
    ) -> int:
        for known, guidance in enumerate(self.guidances):
            if (guidance.group, guidance.scope) == (claim.group, index):
                return known
        group = self.groups[claim.group]
        located = probe.locate(scope, group.guidance)
        planned = PlannedGuidance(
            group=claim.group,
            scope=index,
            sources=located.sources,
            spec=group.guidance,
            shapes=located.shapes,
            owner=place,
            cloned=located.cloned,
            projected=group.kernel.form != "constant",
        )
        for message in located.faults(planned.in_channels):
            self.faults.append((message, claim.group, "guidance"))
        self.guidances.append(planned)
        return len(self.guidances) - 1

    def _check_reach(
        self, claim: Claim, group: Group, module: Adaptive, size: tuple[int, ...]
    ) -> None:
        """What is put behind a layer has to see a neighbour at the example input."""
        steps = {"filter": [module.window.dilation[0]]} if isinstance(module, PacFilter2d) else {}
        if isinstance(module, PacCRF):
            steps = {"crf": [t.options.dilation * t.options.blur for t in module.terms]}
        for field, reaches in steps.items():
            if max(reaches) >= max(size):
                self.faults.append(
                    (
                        f"a dilation of {max(reaches)} pixels is more than '{claim.name}' has at "
                        f"the example input, {size[0]}×{size[1]}: every neighbour is padding. Use "
                        "a smaller one, or a larger example input.",
                        claim.group,
                        field,
                    )
                )

    def _check_axes(self, claim: Claim, guidance: int, axes: int) -> None:
        """Features guide layers of as many axes; a map also clips, and channels that are one line.

        A convolution over the channels of a pooled map (ECA) reads a map as it reads its own input.
        """
        planned = self.guidances[guidance]
        shape = next((s for s in planned.shapes if s is not None), None)
        over_channels = axes == 1 and getattr(claim.target.module, "in_channels", 0) == 1
        if shape is None or len(shape) - 2 == axes or over_channels:
            return
        flat = getattr(claim.target.module, "kernel_size", (0,))[-1] == 1
        if (len(shape), axes) == (4, 3) and not flat:
            return
        why = f"the layer filters {_MAPS[axes]}"
        if (len(shape), axes) == (4, 3):
            why = (
                "a map is the same along the first axis, and the layer's window has a single tap "
                "along the last"
            )
        self.faults.append(
            (
                f"cannot feed '{claim.name}' from '{planned.sources[0]}', which returns "
                f"{list(shape)}: {why}. Name a guidance that returns what the layer filters.",
                claim.group,
                "guidance",
            )
        )

    def _heads(self, claim: Claim, guidance: int) -> int:
        """How many maps of each image a layer filters."""
        shape = next((s for s in self.guidances[guidance].shapes if s is not None), None)
        if shape is None:
            return 1
        return heads_of(claim.name, dict(self.model.named_modules()), self.seen, shape[0]) or 1

    def _check_batch(self, claim: Claim, guidance: int, batches: set[int]) -> None:
        """A layer sees as many maps as its guidance has."""
        planned = self.guidances[guidance]
        shape = next((s for s in planned.shapes if s is not None), None)
        for batch in sorted(batches):
            if shape is not None and batch != shape[0]:
                message = why_not_batch(claim.name, planned.sources[0], batch, shape[0])
                self.faults.append((message, claim.group, "guidance"))

    def _check_channels(self, claim: Claim, group: Group, guidance: int, channels: int) -> None:
        """A kernel for each channel needs a guidance of as many."""
        given = self.guidances[guidance].channels
        if group.kernel.channel_wise and given is not None and given != channels:
            self.faults.append(
                (
                    f"channel_wise needs as many guidance channels as '{claim.name}' has, "
                    f"{channels}, got {given}. Set the guidance's channels to {channels}.",
                    claim.group,
                    "kernel",
                )
            )

    def _aliases(self, place: str) -> tuple[str, ...]:
        """The other names under which a place, there or to come, is registered."""
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if place in modules:
            return tuple(n for n, m in modules.items() if m is modules[place] and n != place)
        around, _, own = place.rpartition(".")
        return tuple(
            f"{n}.{own}" for n, m in modules.items() if m is modules[around] and n != around
        )

    def _new_place(self, group: Group, scope: PlannedScope, name: str) -> str:
        """Where an inserted module lives: in the module around it that is no container.

        A Sequential would call it, and its length and slices would change.
        """
        owner, parts = name.rpartition(".")[0], [name.rpartition(".")[2]]
        while owner != scope.module and self._is_container(owner):
            owner, _, part = owner.rpartition(".")
            parts.insert(0, part)
        around = self.model.get_submodule(owner)
        word = f"{_PREFIX[group.operation]}_{'_'.join(parts)}"
        taken = {layer.place.rpartition(".")[2] for layer in self.layers}
        free, count = word, 0
        while hasattr(around, free) or free in taken:
            count += 1
            free = f"{word}_{count}"
        return f"{owner}.{free}" if owner else free

    def _is_container(self, name: str) -> bool:
        modules = dict(self.model.named_modules())
        return name not in modules or isinstance(modules[name], _CONTAINERS)


def located(claim: Claim, scope: PlannedScope, probe: Probe) -> Claim:
    """A claim on a node that only the trace shows, with the shape of what that returns."""
    target = claim.target
    nodes = scope.nodes_of(claim.name)
    if target.module is not None or target.call is not None or not nodes:
        return claim
    call = Call(0, (claim.name, FUNCTION), (), None, probe.shape(nodes[0]))
    return replace(claim, target=replace(target, call=call))


def why_not_label(scope: PlannedScope, claim: Claim, seen: Observation) -> str | None:
    """Why nothing can be put behind the call of a function that has this label, or None.

    Args:
        scope: with its traces.
        claim: on a label.
        seen: a forward pass.
    """
    runs = sum(call.entry == (scope.module, scope.method) for call in seen.calls)
    if runs > 1:
        return f"it runs {runs} times in one forward pass, and one layer is put behind it"
    nodes = scope.nodes_of(claim.name)
    inputs = [node.all_input_nodes[0] for node in nodes if node.all_input_nodes]
    if len({node.meta.get(LABEL, node.target) for node in inputs}) > 1:
        return (
            "in train mode another call has that name than in eval mode. Make a module of the "
            "call, which keeps its name"
        )
    return None


def at_output(group: Group, target: Target) -> bool:
    """Whether a layer's guidance has the resolution of its output, and not of its input."""
    if is_inserted(group.operation, target):
        return True
    return isinstance(target.module, nn.ConvTranspose2d)
