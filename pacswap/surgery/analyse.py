"""`plan`: from a request to a `Plan`, or to every reason why not, before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pacswap.errors import Fault, PlanError
from pacswap.surgery.assemble import Assembly, Claim, at_output, located, why_not_label
from pacswap.surgery.checks import why_not_model
from pacswap.surgery.cost import added_cost, model_parameters
from pacswap.surgery.modes import kept_random
from pacswap.surgery.operations import why_not_options
from pacswap.surgery.plan import Cost, Plan, PlannedLayer, PlannedScope, RelayedSource, refusal
from pacswap.surgery.relaying import RelayProbe, Request, why_not_relayed
from pacswap.surgery.scope import ScopeFinder, TracedScope, resolve_sources
from pacswap.surgery.select import is_pattern, select
from pacswap.surgery.skeleton import ExampleInput, Observation, check_example, look, observe
from pacswap.surgery.spec import Group, Operation
from pacswap.surgery.targets import KINDS, Target, is_inserted, targets, why_not
from pacswap.surgery.wiring import Probe, probe_scope, why_not_fed


def list_in_python(operation: Operation) -> str:
    """How a Python user lists what an operation can change."""
    option = "" if operation == "swap" else f", operation={operation!r}"
    return f"List them: pacswap.layers(model{option})."


def plan_groups(
    model: nn.Module,
    groups: Sequence[Group],
    example_input: ExampleInput,
    *,
    list_command: Callable[[Operation], str] = list_in_python,
    group_name: Callable[[int], str] = "group {}".format,
) -> Plan:
    """Plan the swap of several groups of layers; the model is not touched.

    Args:
        model: any module.
        groups: what to swap.
        example_input: a tensor, or a tuple of positional arguments; only shapes matter.
        list_command: how the user lists what an operation can change, for messages.
        group_name: what the user calls a group, by its index.

    Raises:
        PlanError: with every fault of the request.
    """
    reason = why_not_model(model)
    if reason is not None:
        raise refusal(type(model).__name__, [Fault(f"{reason}.")], many_groups=False)
    check_example(example_input)
    with kept_random(), torch.inference_mode(False):
        return _Analysis(model, groups, example_input, list_command, group_name).plan()


class _Analysis:
    """The state of one call of `plan`: what was seen, and the faults found so far."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        example: ExampleInput,
        list_command: Callable[[Operation], str],
        group_name: Callable[[int], str],
    ) -> None:
        self.model, self.groups = model, tuple(groups)
        self.example = example = _two_images(example)
        self.list_command, self.group_name = list_command, group_name
        self.batch = next((t.shape[0] for t in _tensors(example)), 1)
        self.faults: list[Fault] = []
        self.bones, self.seen = look(model, example)
        self.targets = {
            operation: targets(operation, model, self.seen)
            for operation in dict.fromkeys(group.operation for group in self.groups)
        }
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

    def _claims(self) -> list[Claim]:
        """Which group gets what."""
        owner: dict[tuple[str, bool], int] = {}
        for index, group in enumerate(self.groups):
            found = self.targets[group.operation]
            if group.operation == "append":
                self._add_labels(group, found)
            command = self.list_command(group.operation)
            chosen, faults = select(group, self.model, found, self.seen, command)
            self.faults += [Fault(message, index, "layers") for message in faults]
            for name in chosen:
                # A CRF may come behind what another group changes.
                key = (name, group.operation == "append")
                if key in owner and not group.override:
                    self._fault(
                        f"'{name}' is claimed by {self.group_name(owner[key])} already. Exclude it "
                        "from one of them, or set override: true on this group.",
                        index,
                        "layers",
                    )
                owner[key] = index
        order = {call.name: call.order for call in reversed(self.seen.calls)}
        order |= {label: call.order for label, call in self.seen.functions.items()}
        last = len(self.seen.calls)
        ranked = sorted(owner, key=lambda key: (order.get(key[0], last), key[1]))
        emptied = set(range(len(self.groups))) - set(owner.values())
        if not self.faults:
            for index in sorted(emptied):
                self._fault(
                    "every layer of this group is overridden by later ones.", index, "layers"
                )
        claimed = [(key[0], owner[key]) for key in ranked]
        return [Claim(self.targets[self.groups[i].operation][name], i) for name, i in claimed]

    def _add_labels(self, group: Group, found: dict[str, Target]) -> None:
        """A CRF may be put behind any node, and most have no name before the trace."""
        layers = group.layers if isinstance(group.layers, tuple | list) else (group.layers,)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for text in layers:
            if isinstance(text, str) and not is_pattern(text) and text not in modules:
                owner, _, label = text.rpartition(".")
                if label and (not owner or self.seen.of(owner)):
                    found.setdefault(text, Target(text, None))

    def _accepted(self, claim: Claim) -> bool:
        group = self.groups[claim.group]
        reason = (
            why_not(group.operation, claim.target)
            or self._why_not_running(claim)
            or why_not_options(group, claim.target)
        )
        return not self._refused(claim, reason)

    def _why_not_running(self, claim: Claim) -> str | None:
        """Why a layer's calls cannot be changed: there are none, or too many."""
        calls = self._calls(claim.name)
        # What has a label in the trace only is looked for there.
        is_label = claim.target.module is None and claim.name not in self.seen.functions
        if not calls and not is_label:
            return "it never runs when the model does"
        if calls > 1 and is_inserted(self.groups[claim.group].operation, claim.target):
            return f"it runs {calls} times in one forward pass, and one layer is put behind it"
        return None

    def _refused(self, claim: Claim, reason: str | None) -> bool:
        """Whether there is a reason why a claim cannot be met; notes it."""
        verb = KINDS[self.groups[claim.group].operation].verb
        if reason is not None:
            self._fault(f"cannot {verb} '{claim.name}': {reason}.", claim.group, "layers")
        return reason is not None

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

    def _scopes(
        self, claims: list[Claim]
    ) -> list[tuple[PlannedScope, Probe | RelayProbe, list[Claim]]]:
        """Trace every scope and check that its guidances come before its layers.

        A scope that cannot have a graph keeps its own code, and its layers are fed while it runs.
        """
        finder = ScopeFinder(self.model, self.bones, self.seen, self.train_observation)
        for index, group in enumerate(self.groups):
            own = [claim for claim in claims if claim.group == index]
            if own:
                finder.add(index, group, [claim.name for claim in own])
        found: list[tuple[PlannedScope, Probe | RelayProbe, list[Claim]]] = []
        for traced in finder.traced():
            members = [claim for claim in claims if claim.group in traced.groups]
            graph = self._graph(traced, members)
            relay = self._relay(traced, members, None if graph is None else graph[1])
            if graph is not None:
                scope, probe, members = graph
                if relay is None:
                    self._not_checkpointed(scope, traced.groups[0])
                found.append((replace(scope, relayed=relay and relay[0]), probe, members))
            elif relay is not None:
                why = traced.hidden[0][1]
                scope = replace(traced.scope, train=None, evaluate=None, untraced=why)
                found.append((replace(scope, relayed=relay[0]), relay[1], members))
        for index, message in finder.refused:
            self._fault(message, index, "guidance")
        return found

    def _graph(
        self, traced: TracedScope, members: list[Claim]
    ) -> tuple[PlannedScope, Probe, list[Claim]] | None:
        """A scope with its graphs, checked; without them, `traced.hidden` says why."""
        if traced.hidden:
            return None
        scope = traced.scope
        probe, message = probe_scope(scope, self.bones, self.seen)
        if message is not None:
            traced.hidden.append((None, message))
            return None
        members = [located(claim, scope, probe) for claim in members]
        self._fed(scope, members, traced.groups)
        return scope, probe, members

    def _not_checkpointed(self, scope: PlannedScope, group: int) -> None:
        """Note that gradient checkpointing is on where only a graph can feed the layers."""
        root = self.model.get_submodule(scope.module)
        if any(getattr(module, "grad_checkpointing", False) for module in root.modules()):
            where = f"'{scope.module}' ({scope.kind})" if scope.module else "the model"
            self._fault(
                f"{where} cannot be rewired: gradient checkpointing is on, which a graph would "
                "drop. Turn it off first: model.set_grad_checkpointing(False).",
                group,
                "layers",
            )

    def _relay(
        self, traced: TracedScope, members: list[Claim], graph: Probe | None
    ) -> tuple[tuple[tuple[int, tuple[RelayedSource, ...]], ...], RelayProbe] | None:
        """What feeds a scope's layers while its own code runs, or None.

        Where there is no graph that could do it, notes why not.
        """
        alone = graph is None
        requests = [
            Request(
                index,
                self.groups[index],
                tuple(claim.name for claim in members if claim.group == index),
                any(is_inserted(self.groups[index].operation, c.target) for c in members),
            )
            for index in traced.groups
        ]
        entry = (traced.scope.module, traced.scope.method)
        reason = why_not_relayed(requests, self.model, entry, self.seen)
        if reason is not None:
            group_of = {claim.name: claim.group for claim in members}
            for layer, fault in traced.hidden if alone else ():
                self._fault(fault, group_of.get(layer or "", traced.groups[0]), "layers")
            return None
        passes = [self.seen]
        one_graph = traced.scope.train is not None and traced.scope.evaluate is None
        if alone or not one_graph:  # else both modes run the same modules in the same order
            with suppress(PlanError):  # train mode may want more than the example: targets, say
                passes.append(self.train_observation())
        probe = RelayProbe(self.model, entry, passes)
        faults = probe.faults(requests)
        for _, group, field, fault in faults if alone else ():
            self._fault(fault, group, field)
        if faults:
            return None
        copied = set() if graph is None else graph.overwritten_sources()
        sources = tuple((r.index, probe.sources(r.group.guidance, copied)) for r in requests)
        return sources, probe

    def _fed(self, scope: PlannedScope, claims: list[Claim], indices: list[int]) -> None:
        """Note which layers of a scope are not reached after their guidance."""
        for claim in claims:
            operation = self.groups[claim.group].operation
            if claim.target.module is None:
                reason = why_not_label(scope, claim, self.seen) or why_not(operation, claim.target)
                self._refused(claim, reason)
        for index in indices:
            members = [claim.name for claim in claims if claim.group == index]
            group = self.groups[index]
            behind = {
                claim.name
                for claim in claims
                if claim.group == index and is_inserted(group.operation, claim.target)
            }
            for field, message in why_not_fed(scope, group.guidance, members, behind, self.seen):
                self._fault(message, index, field)

    def _assemble(
        self,
        claims: list[Claim],
        scopes: list[tuple[PlannedScope, Probe | RelayProbe, list[Claim]]],
    ) -> Plan:
        builder = Assembly(self.model, self.groups, self.sizes(claims), self.seen)
        for index, (scope, probe, members) in enumerate(scopes):
            for claim in members:
                builder.add(index, scope, probe, claim)
        self.faults += [Fault(*fault) for fault in builder.faults]
        self._stop_if_faulty()
        order = {(claim.name, claim.group): number for number, claim in enumerate(claims)}

        def rank(layer: PlannedLayer) -> int:
            return order[layer.name, layer.group]

        first = next(t for t in _tensors(self.example))
        parameters, macs, size = added_cost(
            builder.layers, builder.kernels, builder.guidances, _number_size(self.model)
        )
        return Plan(
            model=type(self.model).__name__,
            input_shape=(1, *(first.shape if first.dim() == 3 else first.shape[1:])),
            groups=self.groups,
            scopes=tuple(scope for scope, _, _ in scopes),
            guidances=tuple(builder.guidances),
            kernels=tuple(builder.kernels),
            layers=tuple(sorted(builder.layers, key=rank)),
            cost=Cost(model_parameters(self.model), parameters, self.macs, macs, size),
        )

    def sizes(self, claims: list[Claim]) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The sizes of each layer's kernel's guidance at the example input and at another one.

        Two layers share a kernel where these agree: equal at one size alone could be chance.
        """
        observations = [self.seen]
        (first, *rest) = self.example if isinstance(self.example, tuple) else (self.example,)
        if not rest and isinstance(first, Tensor) and first.dim() == 4:
            larger = (*first.shape[:2], first.shape[2] + 37, first.shape[3] + 21)
            with suppress(PlanError):  # a model of one fixed size: one look says it all
                observations.append(observe(self.bones, first.new_empty(larger, device="meta")))
        sizes = {}
        for claim in claims:
            at = at_output(self.groups[claim.group], claim.target)
            calls = [call for seen in observations for call in seen.of(claim.name)[:1]]
            shapes = [call.output_shape if at else call.input_shape for call in calls]
            sizes[claim.name] = tuple(shape[2:] for shape in shapes if shape is not None)
        return sizes

    def _fault(self, message: str, group: int | None = None, field: str | None = None) -> None:
        self.faults.append(Fault(message, group, field))

    def _stop_if_faulty(self) -> None:
        if self.faults:
            unique = list(dict.fromkeys(self.faults))
            many = len(self.groups) > 1
            raise refusal(type(self.model).__name__, unique, many_groups=many)


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
