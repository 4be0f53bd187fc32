"""`plan`: from a request to a `Plan`, or to every reason why not, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from pacswap.errors import Fault, PlanError
from pacswap.ops import make_window
from pacswap.surgery.checks import why_not_conv, why_not_model
from pacswap.surgery.cost import added_cost, model_parameters
from pacswap.surgery.modes import kept_random
from pacswap.surgery.plan import (
    Cost,
    Plan,
    PlannedGuidance,
    PlannedKernel,
    PlannedLayer,
    PlannedScope,
    refusal,
)
from pacswap.surgery.scope import ScopeFinder, resolve_sources
from pacswap.surgery.select import convolutions, select
from pacswap.surgery.skeleton import ExampleInput, Observation, check_example, look, observe
from pacswap.surgery.spec import Group
from pacswap.surgery.wiring import Probe, locate_guidance, probe_scope, why_not_fed


def plan_groups(
    model: nn.Module,
    groups: Sequence[Group],
    example_input: ExampleInput,
    *,
    list_command: str = "List them: pacswap.layers(model).",
) -> Plan:
    """Plan the swap of several groups of layers; the model is not touched.

    Args:
        model: any module.
        groups: what to swap.
        example_input: a tensor, or a tuple of positional arguments; only shapes matter.
        list_command: how the user lists a model's layers, for messages.

    Raises:
        PlanError: with every fault of the request.
    """
    reason = why_not_model(model)
    if reason is not None:
        raise refusal(type(model).__name__, [Fault(f"{reason}.")], many_groups=False)
    check_example(example_input)
    with kept_random(), torch.inference_mode(False):
        return _Analysis(model, groups, example_input, list_command).plan()


@dataclass(frozen=True)
class _Claim:
    """A convolution and the group that wants it."""

    name: str
    group: int


class _Analysis:
    """The state of one call of `plan`: what was seen, and the faults found so far."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], example: ExampleInput, list_command: str
    ) -> None:
        self.model, self.groups = model, tuple(groups)
        self.example = example = _two_images(example)
        self.list_command = list_command
        self.batch = next((t.shape[0] for t in _tensors(example)), 1)
        self.faults: list[Fault] = []
        self.convs = convolutions(model)
        self.bones, self.seen = look(model, example)
        # Counted on two images: train mode needs them, the cost is for one.
        self.macs = self.seen.macs // self.batch
        self.seen_train: Observation | None = None

    def plan(self) -> Plan:
        claims = [claim for claim in self._claims() if self._accepted(claim)]
        for index, group in enumerate(self.groups):
            faults, _ = resolve_sources(group.guidance, self.model, self.seen)
            self.faults += [Fault(message, index, "guidance") for message in faults]
        self._stop_if_faulty()
        scopes = self._scopes(claims)
        self._stop_if_faulty()
        return self._assemble(claims, scopes)

    def _claims(self) -> list[_Claim]:
        """Which group gets which convolution."""
        owner: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            chosen, faults = select(group.layers, self.model, self.seen, self.list_command)
            self.faults += [Fault(message, index, "layers") for message in faults]
            for name in chosen:
                if name in owner and not group.override:
                    self._fault(
                        f"'{name}' is claimed by group {owner[name]} already. Exclude it from one "
                        "of them, or set override: true on this group.",
                        index,
                        "layers",
                    )
                owner[name] = index
        order = {call.name: call.order for call in reversed(self.seen.calls)}
        last = len(self.seen.calls)
        ranked = sorted(owner, key=lambda name: order.get(name, last))
        emptied = set(range(len(self.groups))) - set(owner.values())
        if not self.faults:
            for index in sorted(emptied):
                self._fault(
                    "every layer of this group is overridden by later ones.", index, "layers"
                )
        return [_Claim(name, owner[name]) for name in ranked]

    def _accepted(self, claim: _Claim) -> bool:
        reason = why_not_conv(self.convs[claim.name])
        if reason is None and not self._calls(claim.name):
            reason = "it never runs when the model does"
        if reason is not None:
            self._fault(f"cannot swap '{claim.name}': {reason}.", claim.group, "layers")
        return reason is None

    def _calls(self, name: str) -> int:
        """How often a layer runs, in eval mode or, where it rests there, in train mode."""
        calls = len(self.seen.of(name))
        if calls == 0:
            calls = len(self.train_observation().of(name))
        return calls

    def train_observation(self) -> Observation:
        """The calls of a forward pass in train mode."""
        if self.seen_train is None:
            self.bones.train()
            self.seen_train = observe(self.bones, self.example)
            self.bones.eval()
        return self.seen_train

    def _scopes(self, claims: list[_Claim]) -> list[tuple[PlannedScope, Probe, list[_Claim]]]:
        """Trace every scope and check that its guidances come before its layers."""
        finder = ScopeFinder(self.model, self.bones, self.seen, self.train_observation)
        for index, group in enumerate(self.groups):
            members = [claim.name for claim in claims if claim.group == index]
            if members:
                finder.add(index, group, members)
        found = []
        for scope, indices, faults in finder.traced():
            self.faults += [Fault(message, indices[0], "layers") for message in faults]
            if scope is None:
                continue
            members_of = [claim for claim in claims if claim.group in indices]
            probe, message = probe_scope(scope, self.bones, self.seen)
            if message is not None:
                self._fault(message)
            elif self._fed(scope, members_of, indices):
                found.append((scope, probe, members_of))
        return found

    def _fed(self, scope: PlannedScope, claims: list[_Claim], indices: list[int]) -> bool:
        """Whether every layer of a scope is reached after its guidance; notes why not."""
        before = len(self.faults)
        for index in indices:
            members = [claim.name for claim in claims if claim.group == index]
            for field, message in why_not_fed(
                scope, self.groups[index].guidance, members, self.seen
            ):
                self._fault(message, index, field)
        return len(self.faults) == before

    def _assemble(
        self, claims: list[_Claim], scopes: list[tuple[PlannedScope, Probe, list[_Claim]]]
    ) -> Plan:
        builder = _Builder(self)
        for index, (scope, probe, members) in enumerate(scopes):
            for claim in members:
                builder.add(index, scope, probe, claim)
        self._stop_if_faulty()
        order = {claim.name: rank for rank, claim in enumerate(claims)}
        first = next(t for t in _tensors(self.example))
        parameters, macs, size = added_cost(
            builder.layers, builder.kernels, builder.guidances, _number_size(self.model)
        )
        return Plan(
            model=type(self.model).__name__,
            input_shape=(1, *first.shape[1:]),
            groups=self.groups,
            scopes=tuple(scope for scope, _, _ in scopes),
            guidances=tuple(builder.guidances),
            kernels=tuple(builder.kernels),
            layers=tuple(sorted(builder.layers, key=lambda layer: order[layer.name])),
            cost=Cost(model_parameters(self.model), parameters, self.macs, macs, size),
        )

    def sizes(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Each layer's input sizes at the example input and, if the model takes it, another one.

        Two layers share a kernel where these agree: equal at one size alone could be chance.
        """
        observations = [self.seen]
        (first, *rest) = self.example if isinstance(self.example, tuple) else (self.example,)
        if not rest and isinstance(first, Tensor) and first.dim() == 4:
            larger = (*first.shape[:2], first.shape[2] + 37, first.shape[3] + 21)
            with suppress(PlanError):  # a model of one fixed size: one look says it all
                observations.append(observe(self.bones, first.new_empty(larger, device="meta")))
        return {
            name: tuple(
                tuple(call.input_shape[2:])
                for seen in observations
                for call in seen.of(name)[:1]
                if call.input_shape is not None
            )
            for name in self.convs
        }

    def _fault(self, message: str, group: int | None = None, field: str | None = None) -> None:
        self.faults.append(Fault(message, group, field))

    def _stop_if_faulty(self) -> None:
        if self.faults:
            unique = list(dict.fromkeys(self.faults))
            many = len(self.groups) > 1
            raise refusal(type(self.model).__name__, unique, many_groups=many)


class _Builder:
    """Collects layers into shared kernels and guidances."""

    def __init__(self, analysis: _Analysis) -> None:
        self.analysis = analysis
        self.sizes = analysis.sizes()
        self.guidances: list[PlannedGuidance] = []
        self.kernels: list[PlannedKernel] = []
        self.layers: list[PlannedLayer] = []
        self._kernel_keys: dict[object, int] = {}

    def add(self, index: int, scope: PlannedScope, probe: Probe, claim: _Claim) -> None:
        group = self.analysis.groups[claim.group]
        conv = self.analysis.convs[claim.name]
        guidance = self._guidance(index, scope, probe, claim)
        window = make_window(
            tuple(conv.kernel_size),
            stride=tuple(conv.stride),
            padding=conv.padding,
            dilation=tuple(conv.dilation),
            padding_mode=conv.padding_mode,
        )
        key = (guidance, group.kernel, window, self.sizes[claim.name])
        if key not in self._kernel_keys:
            height, width = probe.input_size(scope.local(claim.name))
            self._kernel_keys[key] = len(self.kernels)
            self.kernels.append(
                PlannedKernel(
                    guidance,
                    group.kernel,
                    claim.name,
                    (height, width),
                    window.output_size(height, width),
                    window.taps,
                )
            )
        self.layers.append(
            PlannedLayer(
                claim.name,
                claim.group,
                conv_in_words(conv),
                self._kernel_keys[key],
                conv.in_channels,
                self._aliases(claim.name),
                max(len(trace.calls.get(scope.local(claim.name), [])) for trace in scope.traces),
            )
        )

    def _aliases(self, name: str) -> tuple[str, ...]:
        model = self.analysis.model
        conv = model.get_submodule(name)
        everywhere = model.named_modules(remove_duplicate=False)
        return tuple(other for other, module in everywhere if module is conv and other != name)

    def _guidance(self, index: int, scope: PlannedScope, probe: Probe, claim: _Claim) -> int:
        for known, guidance in enumerate(self.guidances):
            if (guidance.group, guidance.scope) == (claim.group, index):
                return known
        spec = self.analysis.groups[claim.group].guidance
        located = locate_guidance(scope, spec, probe)
        planned = PlannedGuidance(
            group=claim.group,
            scope=index,
            sources=located.sources,
            spec=spec,
            shapes=located.shapes,
            owner=claim.name,
            cloned=located.cloned,
        )
        for message in located.faults(planned.in_channels):
            self.analysis._fault(message, claim.group, "guidance")
        self.guidances.append(planned)
        return len(self.guidances) - 1


def conv_in_words(conv: _ConvNd) -> str:
    """A convolution in a few words.

    >>> conv_in_words(nn.Conv2d(128, 256, 3, stride=2))
    'Conv2d 128→256 3×3 s2'
    >>> conv_in_words(nn.Conv2d(96, 96, 7, groups=96, dilation=2))
    'Conv2d 96→96 7×7 d2 depthwise'
    """
    words = [f"{type(conv).__name__} {conv.in_channels}→{conv.out_channels}"]
    words.append("×".join(map(str, conv.kernel_size)))
    for letter, value in (("s", conv.stride), ("d", conv.dilation)):
        if max(value) > 1:
            words.append(letter + ("×".join(map(str, dict.fromkeys(value)))))
    if conv.groups > 1:
        words.append("depthwise" if conv.groups == conv.in_channels else f"g{conv.groups}")
    return " ".join(words)


def _tensors(example: ExampleInput) -> list[Tensor]:
    leaves = pytree.tree_leaves(example)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _two_images(example: ExampleInput) -> ExampleInput:
    """An example of one image as two: BatchNorm in train mode refuses a single one."""

    def doubled(image: Tensor) -> Tensor:
        if image.dim() == 4 and image.shape[0] == 1:
            return image.new_empty(2, *image.shape[1:], device="meta")
        return image

    if isinstance(example, tuple):
        return tuple(doubled(arg) if isinstance(arg, Tensor) else arg for arg in example)
    return doubled(example)


def _number_size(model: nn.Module) -> int:
    return next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4)
