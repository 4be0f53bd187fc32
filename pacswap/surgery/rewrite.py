"""The only code that changes a model, on a copy: all of a plan is carried out, or nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pacswap.errors import PlanError, quoted
from pacswap.nn import AdaptingKernel, Adaptive, Guidance
from pacswap.surgery.base import BASE, retake_base
from pacswap.surgery.hooks import remove_hooks
from pacswap.surgery.operations import OWN_ATTRIBUTES, adaptive_module, own_parameters, plain_module
from pacswap.surgery.plan import Plan, PlannedLayer
from pacswap.surgery.program import install, is_installed, uninstall
from pacswap.surgery.rewire import hook_up, program_of
from pacswap.surgery.skeleton import copy_model
from pacswap.surgery.targets import Target, in_words, why_not

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
    retake_base(upgraded, set())
    for layer in plan.layers:
        _put(upgraded, plan, layer)
    for guidance in plan.guidances:
        owner = upgraded.get_submodule(guidance.owner)
        like = next(p for p in owner.parameters() if p.is_floating_point())
        owner.guidance = Guidance(
            guidance.in_channels,
            guidance.projection,
            position=guidance.spec.source == "input+position",
            detach=guidance.spec.detach,
            axes=guidance.axes,
            device=like.device,
            dtype=like.dtype,
        ).train(owner.training)
    for scope in plan.scopes:
        install(upgraded.get_submodule(scope.module), program_of(upgraded, plan, scope))
        hook_up(upgraded, plan, scope)
    vars(upgraded)[PLAN] = plan.record()
    upgraded.register_load_state_dict_post_hook(_accept_old_checkpoint)
    return upgraded


def revert(model: nn.Module) -> nn.Module:
    """Give back the plain network, with its weights as they are now.

    Args:
        model: an upgraded model.

    Returns:
        A new model, of the original class and structure; the given one is untouched.

    Raises:
        PlanError: the model is not an upgraded one, or a swapped layer was parametrized since.
    """
    plan = plan_of(model)
    plain = copy_model(model)
    _check_revertible(model)
    for module in plain.modules():
        remove_hooks(module)
    for layer in plan.layers:
        if layer.is_inserted:
            parent, _, name = layer.place.rpartition(".")
            del plain.get_submodule(parent)._modules[name]
    for name, module in list(plain.named_modules()):
        if isinstance(module, Adaptive):
            _replace(plain, name, plain_module(module), forget=OWN_ATTRIBUTES)
        if is_installed(module):
            uninstall(module)
    for module in plain.modules():  # an upgraded network may hold another one
        vars(module).pop(PLAN, None)
        vars(module).pop(BASE, None)
        hooks = module._load_state_dict_post_hooks
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


def pac_layers(model: nn.Module) -> dict[str, Adaptive]:
    """The pixel-adaptive layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adaptive)}


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Plain layers for the moment: inside, the model is the original with today's weights.

    Args:
        model: an upgraded model, changed in place and restored on leaving.

    Raises:
        PlanError: the model has no pixel-adaptive layers.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    parts = [m for m in modules if isinstance(m, Adaptive | AdaptingKernel | Guidance)]
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
    if any(not scope.traces and scope.untraced is None for scope in plan.scopes):
        raise PlanError(
            "this plan was carried out already and has no graphs any more. Plan again: "
            "pacswap.plan(model, …)."
        )
    modules = dict(model.named_modules())
    faults = []
    for layer in plan.layers:
        if layer.is_inserted:
            continue  # a node is checked with the graph that holds it
        module = modules.get(layer.name)
        target = Target(layer.name, module)
        known = module is not None and why_not(layer.operation, target) is None
        found = in_words(layer.operation, target) if known else type(module).__name__
        if found != layer.what:
            faults.append(f"'{layer.name}' is {found}, the plan was made for {layer.what}")
    if faults:
        raise PlanError(
            f"this {type(model).__name__} is not the model that was planned for: "
            f"{'; '.join(faults)}. Plan again."
        )


def _put(model: nn.Module, plan: Plan, layer: PlannedLayer) -> None:
    """Put a pixel-adaptive layer where it is planned."""
    old = None if layer.is_inserted else model.get_submodule(layer.name)
    nearest = [] if old is None else list(old.parameters())
    numbers = (p for p in (*nearest, *model.parameters()) if p.is_floating_point())
    like: Tensor = next(numbers, torch.empty(0))
    new = adaptive_module(plan.groups[layer.group], old, layer.channels, like)
    assert isinstance(new, nn.Module)
    kernel = plan.kernels[layer.kernel]
    is_own = kernel.owner == layer.place or kernel.owner.startswith(f"{layer.place}.")
    if len(layer.kernels) == 1 and not is_own:
        new.adapting_kernel = None
    sources = ", ".join(f"'{source}'" for source in plan.guidance_of(layer).sources)
    new.guided_by = f"'{layer.name}' (guided by {sources})"
    if layer.heads > 1:
        vars(new)["heads"] = layer.heads
    if old is not None:
        _replace(model, layer.name, new)
        return
    parent, _, name = layer.place.rpartition(".")
    around = model.get_submodule(parent)
    around.add_module(name, new.train(around.training))


def _check_revertible(model: nn.Module) -> None:
    """Raise if a swapped layer holds what a plain convolution over the same weights would lose."""
    faults = []
    known = {"adapting_kernel", "guidance", "plain", "blend"}
    for layer in plan_of(model).layers:
        name, module = layer.place, model.get_submodule(layer.place)
        if layer.is_inserted or not isinstance(module, Adaptive):
            continue
        own = {*module._buffers, *module._modules, *module._parameters}
        own -= known | own_parameters(module)
        if own:
            faults.append(f"'{name}' holds {quoted(sorted(own))}")
    if faults:
        raise PlanError(
            f"cannot revert {type(model).__name__}: {'; '.join(faults)}, which a plain convolution "
            "would lose. Remove the parametrization, weight norm or pruning first."
        )


def _replace(model: nn.Module, name: str, new: nn.Module, *, forget: Collection[str] = ()) -> None:
    """Put `new` wherever the module of that name is registered, with its hooks and attributes."""
    old = model.get_submodule(name)
    for key, value in vars(old).items():
        if "hook" in key:
            # A pooling lives on inside its twin: what is hooked to one must not run for both.
            vars(new)[key] = copy.copy(value)
        elif key not in vars(new) and key not in forget:
            vars(new)[key] = value
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new
        for key, value in list(vars(parent).items()):
            if isinstance(value, list | tuple | dict) and key not in _OWN_OF_MODULES:
                vars(parent)[key] = _with(value, old, new)


_OWN_OF_MODULES = frozenset(vars(nn.Module()))


def _with(held: Any, old: nn.Module, new: nn.Module) -> Any:
    """A list, tuple or dictionary of a network's own, with one module in another's place."""
    if held is old:
        return new
    if type(held) in (list, tuple):
        made = [_with(item, old, new) for item in held]
        if type(held) is list:
            held[:] = made
            return held
        return tuple(made) if any(a is not b for a, b in zip(made, held, strict=True)) else held
    if type(held) in (dict, OrderedDict):
        for key, item in held.items():
            held[key] = _with(item, old, new)
    return held


def _accept_old_checkpoint(module: nn.Module, incompatible: Any) -> None:
    """Let `load_state_dict` take a checkpoint of the original model, strictly.

    A checkpoint that holds none of the added tensors is one of before the swap; what it lacks keeps
    its value. One that holds some of them is damaged, and stays an error. One that holds all else
    makes another network the base.
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
            if not (missing or incompatible.unexpected_keys):
                retake_base(module, set(added))
