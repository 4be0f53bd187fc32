"""The only code that changes a model, on a copy: all of a plan is carried out, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node

from pacswap.errors import PlanError, quoted
from pacswap.nn import AdaptingKernel, Guidance, PacConv2d, resize_guidance
from pacswap.surgery.analyse import conv_in_words
from pacswap.surgery.plan import Plan, PlannedKernel, PlannedScope
from pacswap.surgery.program import Program, install, is_installed, uninstall
from pacswap.surgery.runtime import (
    fitting_features,
    fitting_kernel,
    not_checkpointed,
    required_guidance,
    same_mode,
)
from pacswap.surgery.skeleton import copy_model
from pacswap.surgery.trace import INPUT_SIZE, Trace
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
    with torch.inference_mode(False):  # what is made in that mode never learns
        return _rewritten(copy_model(model), plan)


def _rewritten(upgraded: nn.Module, plan: Plan) -> nn.Module:
    """`upgraded` itself, changed by the plan."""
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
        PlanError: the model is not an upgraded one, or a swapped layer was parametrized since.
    """
    plan_of(model)
    plain = copy_model(model)
    _check_revertible(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, PacConv2d):
            _replace(plain, name, module.to_conv(), forget=("enabled", "guided_by", "shared_filters"))
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
    plan = vars(model).get(PLAN) if isinstance(model, nn.Module) else None
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
    modules = model.modules() if isinstance(model, nn.Module) else ()
    parts = [m for m in modules if isinstance(m, PacConv2d | AdaptingKernel | Guidance)]
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


def _check_same(model: nn.Module, plan: Plan) -> None:
    """Raise unless every planned layer is the convolution that was planned for."""
    if any(not scope.traces for scope in plan.scopes):
        raise PlanError(
            "this plan was carried out already and has no graphs any more. Plan again: "
            "pacswap.plan(model, …)."
        )
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


def _check_revertible(model: nn.Module) -> None:
    """Raise if a swapped layer holds what a plain convolution over the same weights would lose."""
    faults = []
    for name, layer in pac_layers(model).items():
        own = [*layer._buffers, *(layer._modules.keys() - {"adapting_kernel", "guidance"})]
        own += layer._parameters.keys() - {"weight", "bias", "blend"}
        if own:
            faults.append(f"'{name}' holds {quoted(sorted(own))}")
    if faults:
        raise PlanError(
            f"cannot revert {type(model).__name__}: {'; '.join(faults)}, which a plain convolution "
            "would lose. Remove the parametrization, weight norm or pruning first."
        )


def _replace(model: nn.Module, name: str, new: nn.Module, *, forget: tuple[str, ...] = ()) -> None:
    """Put `new` wherever the module of that name is registered, with its hooks and attributes."""
    old = model.get_submodule(name)
    for key, value in vars(old).items():
        if "hook" in key or (key not in vars(new) and key not in forget):
            vars(new)[key] = value
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new


def _install_scope(model: nn.Module, plan: Plan, scope: PlannedScope) -> None:
    external = any(
        guidance.is_external and plan.scopes[guidance.scope] is scope for guidance in plan.guidances
    )
    graphs = tuple(_rewired(model, trace, plan, scope, external) for trace in scope.traces)
    keywords = ("guidance",) if external else ()
    install(model.get_submodule(scope.module), Program.of(scope.method, graphs, keywords))


def _rewired(
    model: nn.Module, trace: Trace, plan: Plan, scope: PlannedScope, external: bool
) -> fx.Graph:
    """A copy of a graph in which every planned layer receives its adapting kernel."""
    graph = fx.Graph()
    twin: dict[Node, Node] = {}
    result = graph.graph_copy(trace.graph, twin)
    graph.output(result)
    wiring = _Wiring(graph, trace, twin, plan, scope)
    wiring.add_guards(model)
    if external:
        wiring.add_external_input()
    kernel_of: dict[Node, int] = {}
    for layer in plan.layers:
        if plan.scope_of(layer) is scope:
            calls = trace.calls.get(scope.local(layer.name), [])
            kernel_of |= {twin[call]: layer.kernel for call in calls}
    for node in list(graph.nodes):
        if node in kernel_of:
            with graph.inserting_before(node):
                node.kwargs = {**node.kwargs, "kernel": wiring.kernel(kernel_of[node], node)}
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

    def add_guards(self, model: nn.Module) -> None:
        """Check at each call that what the trace took for granted still holds."""
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

    def kernel(self, index: int, layer: Node) -> Node:
        """The adapting kernel for a layer's call, made before it unless it is there already."""
        planned = self.plan.kernels[index]
        target = f"{self.scope.local(planned.owner)}.adapting_kernel"
        size, like = layer.meta[INPUT_SIZE], layer.all_input_nodes[0]
        mode = self.plan.guidances[planned.guidance].spec.resize
        features = self._features(planned.guidance)
        if (index, size) in self.kernels:
            shared = self.kernels[index, size]
            make = self._attribute(target)
            return self.graph.call_function(fitting_kernel, (*shared, features, like, mode, make))
        resized = self._at_resolution(planned.guidance, size, (features, like, mode))
        kernel = self.graph.create_node("call_module", target, (resized,), {})
        self.kernels[index, size] = kernel, resized
        return kernel

    def _at_resolution(
        self, guidance: int, size: tuple[int, int], how: tuple[Node, Node, str]
    ) -> Node:
        if (guidance, size) in self.resized:
            shared = self.resized[guidance, size]
            return self.graph.call_function(fitting_features, (shared, *how))
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
            with self.graph.inserting_after(max(sources, key=order.__getitem__)):
                target = f"{self.scope.local(guidance.owner)}.guidance"
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
