"""Networks that no graph can stand in for, requests wrong as a whole, plans carried out wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models as m
import pytest
import refusals as r
import torch
from refusals import IMAGES, Wrong, assert_refused, changed
from same import Untouched
from torch import nn

import pacswap
from pacswap.errors import PlanError

G = {"layers": "target", "guidance": "stem"}

NEARER = "Choose a guidance nearer to the layers, inside a submodule that can be."
UNSEEN = (
    "it depends on what a trace cannot see, such as the type of an argument, a random number or a "
    "cache."
)


def label_only(
    reason: str,
    make: Callable[[], nn.Module],
    layers: str = "target",
    guidance: str = "conv2d",
    **more: Any,
) -> Wrong:
    """A request that only a graph could meet, and why there is none."""
    return Wrong(
        f"cannot upgrade {type(make()).__name__}: layers: {reason}", make, layers, guidance, more
    )


WRONG: dict[str, Wrong] = {
    # what only a graph can feed (a node's label), in networks that no graph can hold
    "branch": label_only(
        "the model cannot be traced: its forward branches on the data or the size of its input. "
        f"{NEARER}",
        r.Branch,
    ),
    "block": label_only(
        "cannot swap 'branching.conv': 'branching' around it cannot be traced: its forward "
        "branches on the data or the size of its input.",
        m.BranchInBlock,
        "branching.conv",
    ),
    "no_grad": label_only(
        "the model cannot be traced: part of it runs under torch.no_grad, autocast or the like, "
        f"which a graph drops. {NEARER}",
        r.NoGrad,
    ),
    "autocast": label_only(
        "the model cannot be traced: part of it runs under torch.no_grad, autocast or the like, "
        f"which a graph drops. {NEARER}",
        r.Island,
    ),
    "kind": label_only(
        "the trace of the model does 'convolution → [2, 4, 16, 20]' where the model does "
        f"'mul → [2, 3, 16, 20]': {UNSEEN}",
        r.Kind,
    ),
    "warming": label_only(
        "the trace of the model does 'convolution → [2, 4, 16, 20]' where the model does "
        f"'add → [2, 3, 16, 20]': {UNSEEN}",
        r.Warming,
    ),
    "constant": label_only(
        "the model cannot be traced: it makes a constant tensor, whose device would be frozen. "
        f"{NEARER}",
        r.Constant,
    ),
    "collector": label_only(
        "the trace of the model returns list() where the model returns list([2, 4, 16, 20]): it "
        "does something that a trace cannot see, such as collecting features by hooks.",
        r.Collector,
    ),
    "checkpointing": label_only(
        "the model cannot be rewired: gradient checkpointing is on, which a graph would drop. "
        "Turn it off first: model.set_grad_checkpointing(False).",
        changed(lambda x: setattr(x, "grad_checkpointing", True), m.Assigned),
        guidance="mul",
    ),
    "entered_hook": label_only(
        "'inner' has to be rewired, but it has a forward hook, which would not run any more. "
        "Remove it first.",
        r.hooked_block,
        "inner.target",
        "mul",
    ),
    "mask": label_only(
        "the example input cannot be traced: the upgraded network runs with mask=None only, got "
        "mask=a tensor [1]: its graph was traced with that default. Leave the argument out, or "
        "pacswap.revert the model first.",
        m.Optional,
        guidance="mul",
        example_input=(IMAGES, torch.ones(1)),
    ),
    "appended": label_only(
        "the model cannot be traced: its forward branches on the data or the size of its input. "
        f"{NEARER}",
        r.Branch,
        guidance="stem",
        operation="append",
    ),
    "root_own_forward": Wrong(
        "cannot upgrade Body: layers: the model cannot be traced: its forward is not a method "
        "of its class. Choose a guidance nearer to the layers, inside a submodule that can "
        "be.",
        changed(lambda x: setattr(x, "forward", x.forward)),
    ),
    # what no relay can feed either
    "windows": Wrong(
        "cannot upgrade Windows: guidance: cannot feed 'target' from 'stem': it filters 4 maps "
        "where the guidance has 2. It runs on regions or windows of the image, or on several "
        "images at once; name a guidance that runs on the same ones.",
        r.Windows,
    ),
    "source_twice": Wrong(
        "cannot upgrade Again: guidance: 'stem' runs 2 times in one forward pass. Name another "
        "layer.",
        r.Again,
    ),
    "late_source": Wrong(
        "cannot upgrade Branch: guidance: cannot feed 'stem' from 'target', which is ready only "
        "after the layer has run.",
        r.Branch,
        "stem",
        "target",
    ),
    "itself": Wrong(
        "cannot upgrade Branch: guidance: 'target' cannot guide itself. Name a layer that runs "
        "earlier.",
        r.Branch,
        guidance="target",
    ),
    "around": Wrong(
        "cannot upgrade Counting: guidance: cannot feed 'inner.target' from 'inner', which "
        "contains the layer. Layers that run earlier: 'inner.stem', 'inner.norm'.",
        lambda: r.Counting(m.Body()),
        "inner.target",
        "inner",
    ),
    # the request as a whole
    "nothing": Wrong(
        "name what to change: layers=… and guidance=…, or groups=[…] for several kinds.",
        layers=None,
    ),
    "both": Wrong(
        "give 'layers', 'guidance' or groups, not both: a group has them itself.",
        more={"groups": [G]},
    ),
    "no_groups": Wrong(
        "groups is empty. Give at least one group.", layers=None, guidance=None, more={"groups": []}
    ),
    "odd_groups": Wrong(
        "6 faults in the request:\n"
        "  - groups[0]: expected a pacswap.Group or a mapping, got 3.\n"
        "  - groups[1].layer: unknown key. Nearest: 'layers', 'filter'.\n"
        "  - groups[1].layers: missing.\n"
        "  - groups[1].guidance: missing.\n"
        "  - groups[2].kernel.form: expected one of 'gaussian', 'laplacian', 'inverse', "
        "'constant', got 'box'.\n"
        "  - groups[2].kernel.blend: expected a finite number, got None.",
        layers=None,
        guidance=None,
        more={"groups": [3, {"layer": "target"}, {**G, "kernel": {"blend": None, "form": "box"}}]},
    ),
    "kernel": Wrong(
        "kernel.bandwith: unknown key. Nearest: 'bandwidth'.", more={"kernel": {"bandwith": 1.0}}
    ),
    "bandwidth": Wrong(
        "kernel.bandwidth: expected a positive number or 'auto', got 0.",
        more={"kernel": {"bandwidth": 0}},
    ),
    "guidance_keys": Wrong(
        "3 faults in the request:\n"
        "  - guidance.from: expected a name or a list of names, got 3.\n"
        "  - guidance.channels: expected a positive int or None, got 0.\n"
        "  - guidance.resize: expected one of 'bilinear', 'nearest', 'area', got 'cubic'.",
        guidance={"from": 3, "channels": 0, "resize": "cubic"},
    ),
    "no_source": Wrong("guidance.from: missing.", guidance={"channels": 3}),
    "claimed": Wrong(
        "cannot upgrade Body: group 1 layers: 'target' is claimed by group 0 already. Exclude "
        "it from one of them, or set override: true on this group.",
        layers=None,
        guidance=None,
        more={"groups": [G, G]},
    ),
    "emptied": Wrong(
        "cannot upgrade Body: group 0 layers: every layer of this group is overridden by "
        "later ones.",
        layers=None,
        guidance=None,
        more={"groups": [G, {**G, "override": True}]},
    ),
    "wrapped": Wrong(
        "cannot upgrade DataParallel: the model is wrapped in DataParallel: swap before "
        "wrapping the model for several devices.",
        lambda: nn.DataParallel(m.Body()),
    ),
    "compiled": Wrong(
        "cannot upgrade OptimizedModule: the model is wrapped in OptimizedModule: swap before "
        "torch.compile.",
        lambda: torch.compile(m.Body()),
    ),
    "upgraded": Wrong(
        "cannot upgrade Body: the model is upgraded already (1 layers, the first is "
        "'target'). Name all groups in one call, or pacswap.revert the model first.",
        lambda: pacswap.swap(m.Body(), "target", "stem", example_input=IMAGES),
    ),
    "shape": Wrong(
        "Body does not run on an example input of shape (2, 5, 16, 16): RuntimeError: Given "
        "groups=1, weight of size [4, 3, 3, 3], expected input[2, 5, 16, 16] to have 3 "
        "channels, but got 5 channels instead. Pass example_input=… with a shape that the "
        "model takes.",
        more={"example_input": torch.rand(1, 5, 16, 16)},
    ),
    "uncopiable": Wrong(
        "cannot copy Uncopiable: cannot pickle 'generator' object. pacswap works on a copy "
        "and leaves the given model untouched; remove attributes that cannot be copied (open "
        "files, locks, tensors that belong to an autograd graph) and try again.",
        r.Uncopiable,
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
@pytest.mark.parametrize("door", [pacswap.plan, pacswap.swap], ids=["plan", "swap"])
def test_a_wrong_request_is_refused_and_nothing_is_touched(
    case: str, door: Callable[..., Any]
) -> None:
    assert_refused(WRONG[case], door)


# ---- carrying out, undoing


def test_a_plan_for_another_model_is_refused() -> None:
    plan = pacswap.plan(m.Body(8), "target", "stem", example_input=IMAGES)
    model = m.Body()
    before = Untouched(model)
    with pytest.raises(PlanError) as caught:
        pacswap.rewrite(model, plan)
    before.check()
    assert str(caught.value) == (
        "this Body is not the model that was planned for: 'target' is Conv2d 4→4 3×3, the plan was "
        "made for Conv2d 8→8 3×3. Plan again."
    )


def test_the_record_of_a_plan_cannot_be_carried_out() -> None:
    plan = pacswap.plan(m.Body(), "target", "stem", example_input=IMAGES)
    with pytest.raises(PlanError) as caught:
        pacswap.rewrite(m.Body(), plan.record())
    assert str(caught.value) == (
        "this plan was carried out already and has no graphs any more. Plan again: "
        "pacswap.plan(model, …)."
    )


def test_a_plain_model_cannot_be_reverted() -> None:
    with pytest.raises(PlanError) as caught:
        pacswap.revert(m.Body())
    assert str(caught.value) == (
        "this Body was not upgraded by pacswap: there is nothing to undo or save. Upgrade it "
        "first: pacswap.swap(model, layers=…, guidance=…)."
    )


def test_a_plain_model_has_nothing_to_disable() -> None:
    with pytest.raises(PlanError) as caught, pacswap.disabled(m.Body()):
        pass
    assert str(caught.value) == "this Body has no pixel-adaptive layers to disable."
