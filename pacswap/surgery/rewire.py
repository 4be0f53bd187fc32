"""From traced graphs to graphs in which every planned layer receives its guidance."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx, nn
from torch.fx.node import Node

from pacswap.nn import resize_guidance
from pacswap.surgery.hooks import add_hooks
from pacswap.surgery.plan import Plan, PlannedGuidance, PlannedLayer, PlannedScope
from pacswap.surgery.program import Needs, Program
from pacswap.surgery.relay import Relay, RelayedGuidance, Supply
from pacswap.surgery.runtime import (
    blurred_size,
    fitting_features,
    fitting_kernel,
    needed,
    not_checkpointed,
    required_guidance,
    same_mode,
    target_size,
)
from pacswap.surgery.spec import FilterSpec
from pacswap.surgery.trace import INPUT_SIZE, OUTPUT_SIZE, Trace
from pacswap.surgery.wiring import source_node


def program_of(model: nn.Module, plan: Plan, scope: PlannedScope) -> Program:
    """The code that replaces a scope's method.

    Args:
        model: with the planned layers in it.
        plan: with its graphs.
        scope: one of the plan's.
    """
    external = any(
        guidance.is_external and plan.scopes[guidance.scope] is scope for guidance in plan.guidances
    )
    graphs = tuple(_rewired(model, trace, plan, scope, external) for trace in scope.traces)
    root = model.get_submodule(scope.module)
    entered = tuple(scope.traces[0].entered) if scope.traces else ()
    one_mode = entered if scope.evaluate is not None else ()
    return Program.of(
        scope.method,
        graphs,
        ("guidance",) if external else (),
        relay_of(model, plan, scope),
        Needs.of(getattr(type(root), scope.method), one_mode, entered),
    )


def relay_of(model: nn.Module, plan: Plan, scope: PlannedScope) -> Relay | None:
    """What feeds a scope's layers where its own code runs; None if only a graph can."""
    if scope.relayed is None:
        return None
    sources = dict(scope.relayed)
    guidances = tuple(
        RelayedGuidance(
            guidance.sources,
            scope.local(guidance.owner),
            guidance.spec.resize,
            tuple(source.cloned for source in sources[guidance.group]),
            tuple(scope.local(x.place) for x in plan.layers if _guidance_of(plan, x) == guidance),
        )
        for guidance in _guidances_in(plan, scope)
    )
    root = model.get_submodule(scope.module)
    flags = [name for name, m in root.named_modules() if hasattr(m, "grad_checkpointing")]
    return Relay(guidances, tuple(flags))


def hook_up(model: nn.Module, plan: Plan, scope: PlannedScope) -> None:
    """Let sources note what they return, and layers ask for it, where a scope's own code runs."""
    if scope.relayed is None:
        return
    guidances = _guidances_in(plan, scope)
    for layer in plan.layers:
        if plan.scope_of(layer) is scope:
            index = guidances.index(_guidance_of(plan, layer))
            owner = scope.local(plan.kernels[layer.kernel].owner)
            vars(model.get_submodule(layer.place))["supply"] = Supply(index, owner)
    tapped: dict[str, list[str]] = {}
    parted: dict[str, list[str]] = {}
    for source in {source for _, given in scope.relayed for source in given}:
        if source.name not in ("input", "external"):
            tapped.setdefault(source.module, []).append(source.name)
            name = source.module
            while name != source.name:
                name = name.rpartition(".")[0]
                parted.setdefault(name, []).append(source.name)
    places = [layer.place for layer in plan.layers if plan.scope_of(layer) is scope]
    around = {outer for name in (*places, *tapped) for outer in _around(name, scope.module)}
    for name in sorted(around | set(tapped) | set(parted) | set(places)):
        sources = tuple(tapped.get(name, ())), tuple(parted.get(name, ()))
        add_hooks(model.get_submodule(name), *sources)


def _around(name: str, scope: str) -> Iterator[str]:
    """The modules between a scope and one of its layers."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        outer = ".".join(parts[:depth])
        if not scope or outer.startswith(f"{scope}."):
            yield outer


def _guidances_in(plan: Plan, scope: PlannedScope) -> list[PlannedGuidance]:
    """Those that are computed in a scope: of several that hold the same features, the first."""
    kept = sorted({_same_features(plan, index) for index in range(len(plan.guidances))})
    return [plan.guidances[i] for i in kept if plan.scopes[plan.guidances[i].scope] is scope]


def _guidance_of(plan: Plan, layer: PlannedLayer) -> PlannedGuidance:
    """What feeds a layer, of several guidances that hold the same features the first."""
    return plan.guidances[_same_features(plan, plan.kernels[layer.kernel].guidance)]


def _same_features(plan: Plan, index: int) -> int:
    """The first guidance with the same features: those that nothing projects learn nothing."""
    wanted = plan.guidances[index]
    if wanted.projection is not None:
        return index
    for other, guidance in enumerate(plan.guidances[:index]):
        if guidance.projection is None and _made_from(guidance) == _made_from(wanted):
            return other
    return index


def _made_from(guidance: PlannedGuidance) -> tuple[object, ...]:
    spec = guidance.spec
    return guidance.scope, guidance.sources, spec.source, spec.resize, spec.detach


def _rewired(
    model: nn.Module, trace: Trace, plan: Plan, scope: PlannedScope, external: bool
) -> fx.Graph:
    """A copy of a graph in which every planned layer receives its adapting kernel."""
    graph = fx.Graph()
    twin: dict[Node, Node] = {}
    result = graph.graph_copy(trace.graph, twin)
    end = graph.output(result)
    wiring = _Wiring(graph, trace, twin, plan, scope)
    wiring.add_guards(model)
    if external:
        wiring.add_external_input()
    original = {*twin.values(), end}
    at: dict[Node, list[PlannedLayer]] = {}
    for layer in plan.layers:
        if plan.scope_of(layer) is scope:
            for node in trace.nodes_of(scope.local(layer.name)):
                at.setdefault(twin[node], []).append(layer)
                wiring.note(layer, twin[node])
    # In the order in which they run, so that what is shared is made before its first use.
    for node in [node for node in graph.nodes if node in at]:
        value = node
        # A CRF comes behind what another operation makes of the same node.
        ranked = sorted(at[node], key=lambda x: (x.is_inserted, x.operation == "append"))
        for layer in ranked:
            if layer.is_inserted:
                value = wiring.insert(layer, node, value, original)
            else:
                wiring.feed(layer, node)
    graph.lint()
    return graph


class _Wiring:
    """Adds guidance → project → resize → adapting kernel to a graph, each once."""

    def __init__(
        self, graph: fx.Graph, trace: Trace, twin: dict[Node, Node], plan: Plan, scope: PlannedScope
    ) -> None:
        self.graph, self.trace, self.twin, self.plan, self.scope = graph, trace, twin, plan, scope
        self.external: Node | None = None
        self.features: dict[int, Node] = {}
        self.resized: dict[tuple[int, tuple[int, int]], Node] = {}
        self.kernels: dict[tuple[int, tuple[int, int]], tuple[Node, Node]] = {}
        # The layers that need a guidance, its features at a resolution, or a kernel.
        self.users: dict[object, dict[str, PlannedLayer]] = {}

    def note(self, layer: PlannedLayer, node: Node) -> None:
        """Note what a layer needs, before anything is made: it is made for all of them."""
        size = self._resolution(layer, node)
        guidance = self._guidance(layer.kernel)
        for key in (guidance, ("features", guidance, size), ("kernel", layer.kernel, size)):
            self.users.setdefault(key, {})[layer.place] = layer

    def _guidance(self, kernel: int) -> int:
        """Index of what feeds a kernel."""
        return _same_features(self.plan, self.plan.kernels[kernel].guidance)

    def _resolution(self, layer: PlannedLayer, node: Node) -> tuple[int, int]:
        """What resolution a layer's guidance has at the example input."""
        if not layer.is_inserted and layer.operation != "upsample":
            return node.meta[INPUT_SIZE]
        size = node.meta[OUTPUT_SIZE]
        if not layer.is_inserted or layer.operation == "append":
            return size
        blur = (self.plan.groups[layer.group].filter or FilterSpec()).blur
        return blurred_size(size, blur) if blur > 1 else size

    def _needed(self, value: Node, key: object) -> Node:
        """The value, or None in a call in which all its users rest."""
        layers = tuple(self._attribute(self.scope.local(place)) for place in self.users[key])
        return self.graph.call_function(needed, (value, layers))

    def add_guards(self, model: nn.Module) -> None:
        """Check at each call that what the trace took for granted still holds.

        Where a relay can do without the graph, `Program` asks before it runs one.
        """
        if self.scope.relayed is not None:
            return
        root = model.get_submodule(self.scope.module)
        inside = {name: root.get_submodule(name) for name in ("", *self.trace.entered)}
        paths = {name: f"{name}." if name else "" for name in inside}
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            flags = [n for n, module in inside.items() if hasattr(module, "grad_checkpointing")]
            if flags:
                values = tuple(self._attribute(f"{paths[n]}grad_checkpointing") for n in flags)
                self.graph.call_function(not_checkpointed, (values,))
            if self.scope.evaluate is not None:
                modes = {n: self._attribute(f"{paths[n]}training") for n in self.trace.entered}
                training = self.trace is self.scope.train
                self.graph.call_function(same_mode, (training, modes))

    def add_external_input(self) -> None:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(inputs[-1]):
            given = self.graph.create_node("placeholder", "guidance", (None,), {})
        owner = next(g.owner for g in self.plan.guidances if g.is_external)
        with self.graph.inserting_after(given):
            enabled = self._attribute(f"{self.scope.local(owner)}.guidance.enabled")
        with self.graph.inserting_after(enabled):
            self.external = self.graph.call_function(required_guidance, (given, enabled))

    def feed(self, layer: PlannedLayer, call: Node) -> None:
        """Give a call of a replaced layer its adapting kernel."""
        size, like = self._resolution(layer, call), call.all_input_nodes[0]
        with self.graph.inserting_before(call):
            if layer.operation == "upsample":  # transposed: the guidance is as large as the output
                like = self._output_size(layer, call)
            call.kwargs = {**call.kwargs, "kernel": self.kernel(layer.kernel, size, like)}

    def _output_size(self, layer: PlannedLayer, call: Node) -> Node:
        """(H_out, W_out) of a transposed convolution: as the call asks for it, or its own."""
        input, *given = call.args
        if given:  # by its name, for the pixel-adaptive layer has the guidance in that place
            call.args, call.kwargs = (input,), {**call.kwargs, "output_size": given[0]}
        asked = call.kwargs.get("output_size")
        if asked is not None:
            last = slice(-2, None)  # it may name batch and channels too
            asked = self.graph.call_function(tuple, (asked,))
            return self.graph.call_function(operator.getitem, (asked, last))
        make = self._attribute(f"{self.scope.local(layer.place)}.output_size")
        return self.graph.call_function(target_size, (call.all_input_nodes[0], make))

    def insert(self, layer: PlannedLayer, node: Node, value: Node, original: set[Node]) -> Node:
        """Put a layer behind a value; what the model did with the value, it does with the result.

        Args:
            layer: what is inserted.
            node: what the model computes.
            value: that, or what was put behind it before.
            original: the nodes of the model.
        """
        users = [user for user in value.users if user in original]
        size, target = self._resolution(layer, node), self.scope.local(layer.place)
        guidance = self._guidance(layer.kernel)
        mode = self.plan.guidances[guidance].spec.resize
        features = self._features(guidance)
        order = {n: rank for rank, n in enumerate(self.graph.nodes)}
        with self.graph.inserting_before(max(value, features, key=order.__getitem__).next):
            if layer.operation == "append":
                how = (features, value, mode)
                resized = self._at_resolution(guidance, size, how)
                new = self.graph.create_node("call_module", target, (value, resized), {})
            else:
                blur = (self.plan.groups[layer.group].filter or FilterSpec()).blur
                like = value
                if blur > 1:
                    like = self.graph.call_function(blurred_size, (value, blur))
                kernel = self.kernel(layer.kernel, size, like)
                new = self.graph.create_node("call_module", target, (value,), {"kernel": kernel})
        for user in users:
            user.replace_input_with(value, new)
        return new

    def kernel(self, index: int, size: tuple[int, int], like: Node) -> Node:
        """An adapting kernel for a layer at that resolution, made unless it is there already."""
        guidance = self._guidance(index)
        target = f"{self.scope.local(self.plan.kernels[index].owner)}.adapting_kernel"
        mode = self.plan.guidances[guidance].spec.resize
        features = self._features(guidance)
        if (index, size) in self.kernels:
            shared = self.kernels[index, size]
            make = self._attribute(target)
            return self.graph.call_function(fitting_kernel, (*shared, features, like, mode, make))
        resized = self._at_resolution(guidance, size, (features, like, mode))
        given = resized
        users = self.users["kernel", index, size]
        if users.keys() != self.users["features", guidance, size].keys():
            given = self._needed(resized, ("kernel", index, size))
        kernel = self.graph.create_node("call_module", target, (given,), {})
        self.kernels[index, size] = kernel, resized
        return kernel

    def _at_resolution(
        self, guidance: int, size: tuple[int, int], how: tuple[Node, Node, str]
    ) -> Node:
        if (guidance, size) in self.resized:
            shared = self.resized[guidance, size]
            return self.graph.call_function(fitting_features, (shared, *how))
        users = self.users["features", guidance, size]
        if users.keys() != self.users[guidance].keys():
            how = (self._needed(how[0], ("features", guidance, size)), *how[1:])
        self.resized[guidance, size] = self.graph.call_function(resize_guidance, how)
        return self.resized[guidance, size]

    def _features(self, index: int) -> Node:
        """The projected guidance, computed as soon as its last source is there."""
        if index not in self.features:
            guidance = self.plan.guidances[index]
            sources = []
            for name, cloned in zip(guidance.sources, guidance.cloned, strict=True):
                node = self._source(name)
                if cloned:  # the model overwrites it in place; the copy keeps what was there
                    with self.graph.inserting_after(node):
                        node = self.graph.call_method("clone", (node,))
                sources.append(node)
            order = {node: rank for rank, node in enumerate(self.graph.nodes)}
            with self.graph.inserting_before(max(sources, key=order.__getitem__).next):
                target = f"{self.scope.local(guidance.owner)}.guidance"
                sources = [self._needed(sources[0], index), *sources[1:]]
                self.features[index] = self.graph.create_node(
                    "call_module", target, tuple(sources), {}
                )
        return self.features[index]

    def _attribute(self, target: str) -> Node:
        return self.graph.create_node("get_attr", target)

    def _source(self, name: str) -> Node:
        if name == "external":
            assert self.external is not None
            return self.external
        node = source_node(self.trace, self.scope, name)
        assert node is not None
        return self.twin[node]
