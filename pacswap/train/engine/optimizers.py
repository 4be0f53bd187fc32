"""Optimizers by timm's factory, refused in words where they cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from pacswap.errors import TrainingError, nearest_hint
from pacswap.recipes import OptimizerSection
from pacswap.train.engine.groups import ParameterGroup

if TYPE_CHECKING:
    import torch

_LOOKAHEAD = "lookahead_"
_MOMENTUM = 0.9


def make_optimizer(
    model: nn.Module, section: OptimizerSection, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """A new optimizer for a stage.

    Args:
        model: the network.
        section: which optimizer, with which options.
        groups: what learns. Each becomes one of the optimizer's, with `base_lr` and `key` beside
            torch's own entries.

    Raises:
        TrainingError: timm has no optimizer of that name, or it does not take these options.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    name = section.name.lower()
    plain = name.removeprefix(_LOOKAHEAD)
    known = list_optimizers()
    if plain not in known:
        raise TrainingError(
            f"finetune.optimizer.name: timm has no optimizer '{section.name}' ({len(known)} are "
            f"known). {nearest_hint(plain, known)}".rstrip()
        )
    info = get_optimizer_info(plain)
    if info.second_order:
        raise TrainingError(
            f"finetune.optimizer.name: '{section.name}' needs second derivatives, which this "
            "training does not compute. Take adamw or sgd."
        )
    if section.momentum is not None and not info.has_momentum:
        raise TrainingError(
            f"finetune.optimizer.momentum: '{section.name}' has no momentum. Remove the key, or "
            "set its own options in args."
        )
    args = dict(section.args)
    if section.momentum == 0 and "nesterov" in (info.defaults or {}):
        args.setdefault("nesterov", False)  # which would need some
    parameters = dict(model.named_parameters())
    entries = [
        {
            "params": [parameters[one] for one in group.names],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "base_lr": group.lr,
            "key": group.key,
        }
        for group in groups
    ]
    try:
        return create_optimizer_v2(
            entries,
            opt=name,
            lr=groups[0].lr,
            weight_decay=section.weight_decay,
            momentum=_MOMENTUM if section.momentum is None else section.momentum,
            **args,
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise TrainingError(
            f"finetune.optimizer: '{section.name}' cannot be made with args {section.args}: {error}"
        ) from error
