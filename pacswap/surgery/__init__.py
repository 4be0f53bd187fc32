"""From a pretrained model to its upgraded twin: trace, select, plan, rewrite, verify."""

from pacswap.surgery.analyse import plan_groups
from pacswap.surgery.api import LayerInfo, carry_out, layers, plan, swap
from pacswap.surgery.calibrate import calibrate
from pacswap.surgery.example import default_input
from pacswap.surgery.plan import Plan
from pacswap.surgery.rewrite import disabled, pac_layers, plan_of, revert, rewrite
from pacswap.surgery.spec import Group, GuidanceSpec, KernelSpec, LayerQuery
from pacswap.surgery.verify import Check, Verification, verify

__all__ = [
    "Check",
    "Group",
    "GuidanceSpec",
    "KernelSpec",
    "LayerInfo",
    "LayerQuery",
    "Plan",
    "Verification",
    "calibrate",
    "carry_out",
    "default_input",
    "disabled",
    "layers",
    "pac_layers",
    "plan",
    "plan_groups",
    "plan_of",
    "revert",
    "rewrite",
    "swap",
    "verify",
]
