"""The only code that changes a model, on a copy: all of a plan is carried out, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx.node import Node

from pacswap.errors import GuidanceError, PlanError
from pacswap.nn import AdaptingKernel, Guidance, PacConv2d, resize_guidance
from pacswap.surgery.analyse import conv_in_words
from pacswap.surgery.plan import Plan, PlannedKernel, PlannedScope
from pacswap.surgery.program import Program, install, is_installed, uninstall
from pacswap.surgery.skeleton import copy_model
from pacswap.surgery.trace import Trace
from pacswap.surgery.wiring import source_node

PLAN = "_pacswap_plan"


def rewrite(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry out a plan on a copy of `model`.

    Args:
        model: the model that was planned for, or one of the same structure.
        plan: what `plan` gave.

    Returns:
        A new model; the given one is untouched.

    Raises:
        PlanError: the model is not the one that was planned for, or cannot be copied.
    """
    _check_same(model, plan)
    upgraded = copy_model(model)
    for layer in plan.layers:
        _replace(upgraded, layer.name, _pac_layer(upgraded, plan, layer.name))
    for guidance in plan.guidances:
        owner = upgraded.get_submodule(guidance.owner)
        like = next(owner.parameters())
        owner.guidance = Guidance(
            guidance.in_channels,
            guidance.spec.channels,
            position=guidance.spec.source == "input+position",
            detach=guidance.spec.detach,
            device=like.device,
            dtype=like.dtype,
        ).train(owner.training)
    for scope in plan.scopes:
        _install_scope(upgraded, plan, scope)
    vars(upgraded)[PLAN] = plan.record()
    upgraded.register_load_state_dict_post_hook(_accept_old_checkpoint)
    return upgraded


def revert(model: nn.Module) -> nn.Module:
    """Give back plain convolutions, with the weights as they are now.

    Args:
        model: an upgraded model.

    Returns:
        A new model, of the original class and structure; the given one is untouched.

    Raises:
        PlanError: the model is not an upgraded one.
    """
    plan_of(model)
    plain = copy_model(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, PacConv2d):
            _replace(plain, name, module.to_conv())
        if is_installed(module):
            uninstall(module)
    del vars(plain)[PLAN]
    hooks = plain._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _accept_old_checkpoint]:
        del hooks[key]
    return plain


def plan_of(model: nn.Module) -> Plan:
    """The plan by which a model was upgraded.

    Raises:
        PlanError: the model is not an upgraded one.
    """
    plan = vars(model).get(PLAN)
    if plan is None:
        raise PlanError(
            f"this {type(model).__name__} was not upgraded by pacswap: there is nothing to undo or "
            "save. Upgrade it first: pacswap.swap(model, layers=…, guidance=…)."
        )
    return plan


def pac_layers(model: nn.Module) -> dict[str, PacConv2d]:
    """The swapped layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PacConv2d)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Plain convolutions for the moment: inside, the model is the original with today's weights.

    Args:
        model: an upgraded model, changed in place and restored on leaving.

    Raises:
        PlanError: the model has no pixel-adaptive layers.
    """
    parts = [m for m in model.modules() if isinstance(m, PacConv2d | AdaptingKernel | Guidance)]
    if not parts:
        raise PlanError(f"this {type(model).__name__} has no pixel-adaptive layers to disable.")
    before = [part.enabled for part in parts]
    try:
        for part in parts:
            part.enabled = False
        yield model
    finally:
        for part, enabled in zip(parts, before, strict=True):
            part.enabled = enabled


def required_guidance(guidance: Any) -> Any:
    """Refuse a call without the external guidance (called by the graph).

    Raises:
        GuidanceError: it is None.
    """
    if guidance is None:
        raise GuidanceError(
            "this network was upgraded with an external guidance and was called without one. "
            "Call it as model(input, guidance=features)."
        )
    return guidance


def _check_same(model: nn.Module, plan: Plan) -> None:
    """Raise unless every planned layer is the convolution that was planned for."""
    modules = dict(model.named_modules())
    faults = []
    for layer in plan.layers:
        module = modules.get(layer.name)
        found = conv_in_words(module) if type(module) is nn.Conv2d else type(module).__name__
        if found != layer.conv:
            faults.append(f"'{layer.name}' is {found}, the plan was made for {layer.conv}")
    if faults:
        raise PlanError(
            f"this {type(model).__name__} is not the model that was planned for: "
            f"{'; '.join(faults)}. Plan again."
        )


def _pac_layer(model: nn.Module, plan: Plan, name: str) -> PacConv2d:
    """The pixel-adaptive twin of a convolution, over the same parameters."""
    layer = next(layer for layer in plan.layers if layer.name == name)
    kernel: PlannedKernel = plan.kernels[layer.kernel]
    spec = kernel.spec
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    pac = PacConv2d.from_conv(
        conv,
        form=spec.form,
        distance=spec.distance,
        bandwidth=1.0 if spec.bandwidth == "auto" else spec.bandwidth,
        standardize=spec.standardize,
        normalize=spec.normalize,
        blend=spec.blend,
        own_kernel=kernel.owner == name,
    )
    sources = ", ".join(f"'{source}'" for source in plan.guidance_of(layer).sources)
    pac.guided_by = f"'{name}' (guided by {sources})"
    return pac


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module of that name is registered, under all of its names."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new


def _install_scope(model: nn.Module, plan: Plan, scope: PlannedScope) -> None:
    external = any(
        "external" in guidance.sources and plan.scopes[guidance.scope] is scope
        for guidance in plan.guidances
    )
    graphs = tuple(_rewired(trace, plan, scope, external) for trace in scope.traces)
    keywords = ("guidance",) if external else ()
    install(model.get_submodule(scope.module), Program.of(scope.method, graphs, keywords))


def _rewired(trace: Trace, plan: Plan, scope: PlannedScope, external: bool) -> fx.Graph:
    """A copy of a graph in which every planned layer receives its adapting kernel."""
    graph = fx.Graph()
    twin: dict[Node, Node] = {}
    result = graph.graph_copy(trace.graph, twin)
    graph.output(result)
    wiring = _Wiring(graph, trace, twin, plan, scope)
    if external:
        wiring.add_external_input()
    for layer in plan.layers:
        if plan.scope_of(layer) is scope:
            for call in trace.calls.get(scope.local(layer.name), []):
                node = twin[call]
                with graph.inserting_before(node):
                    node.kwargs = {**node.kwargs, "kernel": wiring.kernel(layer.kernel, node)}
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
        self.kernels: dict[int, Node] = {}

    def add_external_input(self) -> None:
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        with self.graph.inserting_after(inputs[-1]):
            given = self.graph.create_node("placeholder", "guidance", (None,), {})
        with self.graph.inserting_after(given):
            self.external = self.graph.call_function(required_guidance, (given,))

    def kernel(self, index: int, layer: Node) -> Node:
        """The adapting kernel for a layer's call, made before it unless it is there already."""
        if index not in self.kernels:
            planned = self.plan.kernels[index]
            features = self._at_resolution(planned, layer)
            target = f"{self.scope.local(planned.owner)}.adapting_kernel"
            self.kernels[index] = self.graph.create_node("call_module", target, (features,), {})
        return self.kernels[index]

    def _at_resolution(self, kernel: PlannedKernel, layer: Node) -> Node:
        key = (kernel.guidance, kernel.input_size)
        if key not in self.resized:
            spec = self.plan.guidances[kernel.guidance].spec
            like = layer.all_input_nodes[0]
            features = self._features(kernel.guidance)
            self.resized[key] = self.graph.call_function(
                resize_guidance, (features, like, spec.resize)
            )
        return self.resized[key]

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
            with self.graph.inserting_after(max(sources, key=order.__getitem__)):
                target = f"{self.scope.local(guidance.owner)}.guidance"
                self.features[index] = self.graph.create_node(
                    "call_module", target, tuple(sources), {}
                )
        return self.features[index]

    def _source(self, name: str) -> Node:
        if name == "external":
            assert self.external is not None
            return self.external
        node = source_node(self.trace, self.scope, name)
        assert node is not None
        return self.twin[node]


def _accept_old_checkpoint(module: nn.Module, incompatible: Any) -> None:
    """Let `load_state_dict` take a checkpoint of the original model, strictly.

    A checkpoint that holds none of the added tensors is one of before the swap; what it lacks keeps
    its value. One that holds some of them is damaged, and stays an error.
    """
    plan = vars(module).get(PLAN)
    if plan is None:
        return
    missing = incompatible.missing_keys
    added = plan.added_parameters()
    prefixes = {key.removesuffix(added[0]) for key in missing if key.endswith(added[0])}
    for prefix in prefixes:
        full = {prefix + name for name in added}
        if full <= set(missing):
            missing[:] = [key for key in missing if key not in full]
