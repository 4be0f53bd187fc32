"""The networks of a comparison: upgraded, untouched, and upgraded with nothing that adapts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pacswap.errors import PlanError
from pacswap.recipes import LoadedRecipe
from pacswap.surgery import Group, KernelSpec, Plan, calibrate, plan_groups, rewrite
from pacswap.train.engine.groups import Roles, roles_of
from pacswap.train.measure.summary import CAPACITY, CONTROL, UPGRADED
from pacswap.upgrade import planned

# Where each arm's trainings lie in the folder of a run.
FOLDERS = {UPGRADED: "upgraded", CONTROL: "control", CAPACITY: "capacity"}


@dataclass(frozen=True)
class Arm:
    """A network that is ready to be trained.

    Attributes:
        name: `UPGRADED`, `CONTROL` or `CAPACITY`.
        model: the network.
        roles: of its parameters.
        plan: what was done to it; None for the control.
    """

    name: str
    model: nn.Module
    roles: Roles
    plan: Plan | None


def make_arm(name: str, loaded: LoadedRecipe, original: nn.Module, images: Tensor) -> Arm | None:
    """Make the network of an arm.

    Args:
        name: of the arm.
        loaded: the recipe.
        original: its network, untouched; the control is this very one. Arms that are to be compared
            need originals with the same weights, those of a new head too.
        images: [B, 3, H, W], normalised: what bandwidths are set on.

    Returns:
        The arm; None for a capacity control in which nothing would be added.

    Raises:
        RecipeError: the recipe asks for what the network cannot give.
    """
    plan = planned(loaded, original)
    model = rewrite(original, plan)
    roles = roles_of(model, plan)
    if name == CONTROL:
        control = roles_of(original, None, swapped=roles.swapped, absent=roles.added)
        return Arm(name, original, control, None)
    if name == CAPACITY:
        held = _constant(original, plan)
        if held is None:
            return None
        model, plan = rewrite(original, held), held
        roles = roles_of(model, plan, swapped=roles.swapped, absent=roles.added)
    calibrate(model, plan, images)
    return Arm(name, model, roles, plan)


def _constant(original: nn.Module, plan: Plan) -> Plan | None:
    """The plan with every kernel held constant; without groups that add nothing then."""
    example = torch.empty(plan.input_shape, device="meta")
    kept: list[Group] = []
    for group in plan.record().groups:
        asked = group.kernel
        kernel = KernelSpec(form="constant", normalize=asked.normalize, blend=asked.blend)
        held = replace(group, kernel=kernel)
        try:
            plan_groups(original, (held,), example)
        except PlanError:  # its constant kernel leaves the plain layer, in which nothing can learn
            continue
        kept.append(held)
    return plan_groups(original, tuple(kept), example) if kept else None
