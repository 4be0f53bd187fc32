"""Which parameters learn in a stage, and at what learning rate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pacswap.errors import TrainingError, nearest, quoted
from pacswap.recipes import FinetuneSection, StageSection
from pacswap.surgery import Plan
from pacswap.surgery.select import matching
from pacswap.zoo.heads import HEADS

# Of two groups that hold a parameter, the earlier one's learning rate counts.
PRECEDENCE = ("guidance", "added", "swapped", "head", "norm", "all")
# Where torchvision, timm, transformers and smp keep what gives the classes.
_HEADS = (*HEADS, "fc")
# timm's, for networks that don't say what their layers are.
_TENSORS_PER_LAYER = 12


@dataclass(frozen=True)
class Roles:
    """Names of parameters by what they are to the swap and to the network.

    Attributes:
        added: what the swap added, the guidance's included.
        swapped: weights and biases of the layers that became pixel-adaptive.
        guidance: the projections of guidances.
        head: what gives the classes; nothing that was added.
        norm: of normalisation layers; nothing that was added.
        lacking: groups that this network has no parameters of by design, because it is there to be
            compared with one that has; a stage may name them all the same.
        absent: what the network to compare with has more, added; a pattern may match it.
    """

    added: frozenset[str] = frozenset()
    swapped: frozenset[str] = frozenset()
    guidance: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset()
    norm: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()

    def named(self, group: str) -> frozenset[str]:
        """The names of a group of a recipe other than `all`."""
        names = getattr(self, group)
        assert isinstance(names, frozenset)
        return names


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn alike.

    Attributes:
        key: what sets their learning rate in the recipe: `default`, a group or a pattern.
        names: dotted, as `model.named_parameters()` spells them.
        lr: their learning rate before the schedule.
        weight_decay: 0 for biases, norms and all else of fewer than two dimensions.
    """

    key: str
    names: tuple[str, ...]
    lr: float
    weight_decay: float


def roles_of(
    model: nn.Module,
    plan: Plan | None,
    *,
    swapped: Collection[str] | None = None,
    absent: Collection[str] = (),
) -> Roles:
    """What the parameters of a network are.

    Args:
        model: an upgraded network, or one that is trained beside it to compare.
        plan: what was done to it; None for nothing.
        swapped: of a network to compare with: what is swapped in the upgraded one, so that the same
            convolutions learn in both. It may lack what a swap adds.
        absent: of a network to compare with: what was added to the upgraded one. What this network
            has of it nevertheless is not absent.

    Raises:
        TrainingError: `swapped` names a parameter that the network lacks.
    """
    own = _first_names(model)
    added: set[str] = set()
    inside = set(swapped or ())
    missing = sorted(inside - set(own))
    if missing:
        raise TrainingError(
            f"this {type(model).__name__} has no {quoted(missing[:3])}, which the upgraded network "
            "has. Take both from one recipe."
        )
    if plan is not None:
        added = {own[key] for key in plan.added_parameters() if key in own}
        places = [layer.place for layer in plan.layers if not layer.is_inserted]
        inside |= {own[name] for place in places for name in own if name.startswith(f"{place}.")}
    compared = plan is None or swapped is not None
    return Roles(
        added=frozenset(added),
        swapped=frozenset(inside - added),
        guidance=frozenset(name for name in added if name.endswith(".guidance.project.weight")),
        head=frozenset(_head(model, own) - added),
        norm=frozenset(_norm(model, own) - added),
        lacking=frozenset(("added", "guidance") if compared else ()),
        absent=frozenset(absent) - set(own),
    )


def parameter_groups(
    model: nn.Module, roles: Roles, stage: StageSection, section: FinetuneSection
) -> list[ParameterGroup]:
    """Who learns in a stage, at what learning rate.

    A pattern matches parameters by their names (a `*` also crosses dots), or all parameters of the
    module that it names. Where several keys of `lr` hold a parameter, patterns beat groups, and
    among groups guidance beats added, then swapped, head, norm and all.

    Args:
        model: the network.
        roles: of its parameters.
        stage: which of them learn.
        section: weight decay and layer decay.

    Returns:
        In the order of the network's parameters; none if the stage trains nothing but what this
        network lacks by design.

    Raises:
        TrainingError: a name matches nothing, or two patterns give a parameter two learning rates;
            all such faults of the stage together.
    """
    groups, faults = _groups(model, roles, stage, section)
    if faults:
        raise TrainingError("\n".join(faults))
    return groups


def groups_of_stages(
    model: nn.Module, roles: Roles, section: FinetuneSection
) -> list[list[ParameterGroup]]:
    """`parameter_groups` of every stage; the faults of all stages are raised together.

    Raises:
        TrainingError: with every fault.
    """
    found = [_groups(model, roles, stage, section) for stage in section.stages]
    faults = [fault for _, some in found for fault in some]
    if not faults and not any(groups for groups, _ in found):
        faults = [
            "finetune.stages: no stage trains anything of a network without a swap, so there is "
            "nothing to compare. Let a stage train swapped or head too."
        ]
    if faults:
        head = f"finetune.stages has {len(faults)} faults:\n" if len(faults) > 1 else ""
        raise TrainingError(head + "\n".join(faults))
    return [groups for groups, _ in found]


def _groups(
    model: nn.Module, roles: Roles, stage: StageSection, section: FinetuneSection
) -> tuple[list[ParameterGroup], list[str]]:
    faults: list[str] = []
    names = [n for n, p in model.named_parameters() if p.is_floating_point()]

    def found(name: str, where: str, among: Collection[str], what: str) -> set[str]:
        """What a group or pattern stands for; nothing found is a fault."""
        chosen = _named(name, names, roles) & set(among)
        forgiven = name in roles.lacking or (
            name not in PRECEDENCE and _named(name, roles.absent, roles)
        )
        if not chosen and not forgiven:
            text = f"stage '{stage.name}': {where}: {_nothing(name, model, roles, what, among)}"
            faults.append(text)
        return chosen

    parts = [found(name, "train", names, f"of {type(model).__name__}") for name in stage.train]
    learning = set().union(*parts)
    if faults or not learning:
        return [], faults
    lr = stage.lr if isinstance(stage.lr, Mapping) else {"default": stage.lr}
    rates = {
        key: found(key, "lr", learning, "that learns in this stage")
        for key in lr
        if key != "default"
    }
    keys = _keys(learning, rates, lr, stage.name, faults)
    scales = _layer_scales(model, roles, section.layer_decay)
    undecayed = _undecayed(model)
    members: dict[tuple[str, float, float], list[str]] = {}
    for name in filter(learning.__contains__, names):
        key = keys[name]
        decay = 0.0 if name in undecayed else section.optimizer.weight_decay
        members.setdefault((key, lr[key] * scales.get(name, 1.0), decay), []).append(name)
    groups = [ParameterGroup(k, tuple(some), rate, wd) for (k, rate, wd), some in members.items()]
    return groups, faults


def _named(name: str, names: Iterable[str], roles: Roles) -> set[str]:
    """The parameters that a group or a pattern stands for."""
    if name == "all":
        return set(names)
    if name in PRECEDENCE:
        return set(roles.named(name))
    inside = [] if name.startswith("re:") else matching(f"{name}.*", names)
    return {*matching(name, names), *inside}


def _nothing(name: str, model: nn.Module, roles: Roles, what: str, among: Collection[str]) -> str:
    text = f"'{name}' matches no parameter {what}."
    if name == "guidance" and not roles.guidance:
        return f"{text} No guidance is projected: set guidance.channels in the recipe, or drop it."
    if name in PRECEDENCE:
        known = ["added", "swapped", "guidance", "head", "norm"]
        there = [group for group in known if roles.named(group) & set(among)]
        return f"{text} Groups with parameters: {', '.join(there)}, all."
    modules = {name.rpartition(".")[0] for name in among}
    close = nearest(name, [*sorted(modules), *among], most=2)
    return f"{text} Nearest: {quoted(close)}." if close else text


def _keys(
    learning: Collection[str],
    rates: Mapping[str, Collection[str]],
    lr: Mapping[str, float],
    stage: str,
    faults: list[str],
) -> dict[str, str]:
    """What sets each parameter's learning rate."""
    patterns = [key for key in rates if key not in PRECEDENCE]
    keys = {}
    for name in sorted(learning):
        by_pattern = [key for key in patterns if name in rates[key]]
        by_group = [key for key in PRECEDENCE if name in rates.get(key, ())]
        if len({lr[key] for key in by_pattern}) > 1:
            faults.append(
                f"stage '{stage}': lr: {quoted(by_pattern)} give '{name}' several learning rates. "
                "Let only one of them match it."
            )
        keys[name] = [*by_pattern, *by_group, "default"][0]
    return keys


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter, and the one under which it is registered first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every}


def _head(model: nn.Module, own: Mapping[str, str]) -> set[str]:
    names = {first for name, first in own.items() if name.partition(".")[0] in _HEADS}
    get_classifier = getattr(model, "get_classifier", None)  # timm's
    found = get_classifier() if callable(get_classifier) else ()
    modules = found if isinstance(found, tuple | list) else (found,)
    inside = {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()}
    return names | {name for name, p in model.named_parameters() if id(p) in inside}


def _norm(model: nn.Module, own: Mapping[str, str]) -> set[str]:
    """Norms of timm and transformers are subclasses of torch's, or are called so."""
    return {
        own[f"{place}.{name}" if place else name]
        for place, module in model.named_modules()
        if "Norm" in type(module).__name__
        or isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
        for name, _ in module.named_parameters(recurse=False)
    }


def _undecayed(model: nn.Module) -> set[str]:
    """As timm does: biases, norms, scalars, and what the network itself excludes."""
    no_weight_decay = getattr(model, "no_weight_decay", None)
    listed = set(no_weight_decay()) if callable(no_weight_decay) else set()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith(".bias") or name in listed
    }


def _layer_scales(model: nn.Module, roles: Roles, decay: float | None) -> dict[str, float]:
    """The factor of each parameter's learning rate: 1 in the last layer, then `decay` per layer.

    Layers are those that timm's networks name; of others, a dozen parameters each in the order of
    registration, as timm groups them, below the head. What a swap added is in the layer beside it,
    and moves no other parameter into another layer.
    """
    if decay is None:
        return {}
    if hasattr(model, "group_matcher"):
        return _scales_by_timm(model, decay)
    old = [name for name, _ in model.named_parameters() if name not in roles.added]
    trunk = [name for name in old if name not in roles.head]
    layers = {name: index // _TENSORS_PER_LAYER for index, name in enumerate(trunk)}
    top = max(layers.values(), default=-1) + (1 if roles.head else 0)
    layers |= {name: top for name in old if name in roles.head}
    layers |= {name: _layer_beside(name, layers, top) for name in roles.added}
    return {name: decay ** (top - layer) for name, layer in layers.items()}


def _layer_beside(name: str, layers: Mapping[str, int], top: int) -> int:
    place = name
    while "." in place:
        place = place.rpartition(".")[0]
        beside = [layer for other, layer in layers.items() if other.startswith(f"{place}.")]
        if beside:
            return max(beside)
    return top


def _scales_by_timm(model: nn.Module, decay: float) -> dict[str, float]:
    from timm.optim import param_groups_layer_decay

    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)  # timm leaves out what is frozen
        groups = param_groups_layer_decay(model, layer_decay=decay)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {n: scales[id(p)] for n, p in model.named_parameters() if id(p) in scales}


def numbers_in(model: nn.Module, groups: Iterable[ParameterGroup]) -> int:
    """How many numbers the groups hold."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    return sum(parameters[name].numel() for group in groups for name in group.names)
