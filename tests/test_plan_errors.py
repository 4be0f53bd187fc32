"""Wrong layers and wrong guidance: refused in whole sentences, with the model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models as m
import pytest
import refusals as r
import torch
from refusals import IMAGES, Wrong, assert_refused, changed
from torch import nn
from torch.nn.utils import prune

import pacswap
from pacswap.errors import PlanError

INDEX = torch.zeros(2, dtype=torch.long)

WRONG: dict[str, Wrong] = {
    # selection
    "no_match": Wrong(
        "cannot upgrade Body: layers: 'targt' matches no convolution (2 found). Nearest: "
        "'target'. List them: pacswap.layers(model).",
        layers="targt",
    ),
    "no_match_glob": Wrong(
        "cannot upgrade Body: layers: 'layer9.*' matches no convolution (2 found). List them: "
        "pacswap.layers(model).",
        layers="layer9.*",
    ),
    "no_match_regex": Wrong(
        "cannot upgrade Body: layers: 're:x+' matches no convolution (2 found). List them: "
        "pacswap.layers(model).",
        layers="re:x+",
    ),
    "bad_regex": Wrong(
        "cannot upgrade Body: layers: 're:(' is not a regular expression: missing ), "
        "unterminated subpattern at position 0.",
        layers="re:(",
    ),
    "not_a_conv": Wrong(
        "cannot upgrade Body: layers: 'norm' is a BatchNorm2d, not a convolution.", layers="norm"
    ),
    "container": Wrong(
        "cannot upgrade BranchAtRoot: layers: 'body' is a Body, not a convolution. "
        "Convolutions in it: 'body.stem', 'body.target'.",
        m.BranchAtRoot,
        layers="body",
        guidance="body.stem",
    ),
    "alias": Wrong(
        "cannot upgrade TwoNames: layers: 'alias' is another name of 'target'. Use that one.",
        m.TwoNames,
        layers="alias",
    ),
    "empty_list": Wrong(
        "cannot upgrade Body: layers: nothing is named. Name at least one convolution.", layers=[]
    ),
    "number": Wrong(
        "cannot upgrade Body: layers: expected names, patterns, queries or callables, got 7 (int).",
        layers=[7],
    ),
    "callable": Wrong(
        "cannot upgrade Body: layers: the callable <lambda> accepts none of the 2 convolutions.",
        layers=lambda name, conv: False,
    ),
    "query": Wrong(
        "cannot upgrade Body: layers: none of the 2 spatial convolutions has kernel_size=5, "
        "stride=2.",
        layers={"kernel_size": 5, "stride": 2},
    ),
    "query_key": Wrong("layers.kernel: unknown key. Nearest: 'kernel_size'.", layers={"kernel": 3}),
    "query_name": Wrong(
        "cannot upgrade Body: layers: name: 'layer*' matches none of the 2 spatial convolutions.",
        layers={"name": "layer*"},
    ),
    "query_exclude": Wrong(
        "cannot upgrade Body: layers: exclude: 'aux.*' matches none of the 2 spatial "
        "convolutions. Leave it out or mend it.",
        layers={"kernel_size": 3, "exclude": "aux.*"},
    ),
    # layers that cannot be swapped
    "one_by_one": Wrong(
        "cannot upgrade OtherConvs: layers: cannot swap 'point': it is 1×1: a single tap has "
        "no neighbours to weigh. Name the spatial convolutions only.",
        m.OtherConvs,
        layers="point",
    ),
    "transposed": Wrong(
        "cannot upgrade OtherConvs: layers: cannot swap 'up': it is a ConvTranspose2d, which "
        "enlarges. Name it in an upsampling: operation='upsample', or upsample: in a recipe.",
        m.OtherConvs,
        layers="up",
    ),
    "other_forward": Wrong(
        "cannot upgrade OtherConvs: layers: cannot swap 'standardized': Standardized has a "
        "forward of its own, and what it computes would be lost. Known are torch.nn.Conv1d, "
        "Conv2d and Conv3d, their subclasses that leave forward alone, and timm's Conv2dSame, "
        "StdConv2d, StdConv2dSame, ScaledStdConv2d and ScaledStdConv2dSame.",
        m.OtherConvs,
        layers="standardized",
    ),
    "all_at_once": Wrong(
        "cannot upgrade OtherConvs, 2 faults:\n"
        "  - layers: cannot swap 'point': it is 1×1: a single tap has no neighbours to weigh. "
        "Name the spatial convolutions only.\n"
        "  - layers: cannot swap 'up': it is a ConvTranspose2d, which enlarges. Name it in an "
        "upsampling: operation='upsample', or upsample: in a recipe.",
        m.OtherConvs,
        layers=["point", "up", "target"],
    ),
    "parametrized": Wrong(
        "cannot upgrade BranchInBlock: layers: cannot swap 'branching.conv': its weight is "
        "parametrized, and a swap would freeze what the parametrization computes. Remove it "
        "first: torch.nn.utils.parametrize.remove_parametrizations.",
        m.normed,
        layers="branching.conv",
    ),
    "pruned": Wrong(
        "cannot upgrade Body: layers: cannot swap 'target': its weight is recomputed by a "
        "hook (weight_norm, spectral_norm or pruning). Remove it first: "
        "torch.nn.utils.remove_weight_norm and its siblings.",
        changed(lambda x: prune.random_unstructured(x.target, "weight", 0.5)),
    ),
    "hook": Wrong(
        "cannot upgrade Body: layers: cannot swap 'target': it has a forward hook, which "
        "would be lost. Remove it and register it again after the swap.",
        changed(lambda x: x.target.register_forward_hook(m.doubled)),
    ),
    "pre_hook": Wrong(
        "cannot upgrade Body: layers: cannot swap 'target': it has a forward pre-hook, which "
        "would be lost. Remove it and register it again after the swap.",
        changed(lambda x: x.target.register_forward_pre_hook(m.shifted)),
    ),
    "own_forward": Wrong(
        "cannot upgrade Body: layers: cannot swap 'target': its forward was replaced on the "
        "instance, which would be lost.",
        changed(lambda x: setattr(x.target, "forward", x.target.forward)),
    ),
    "buffer": Wrong(
        "cannot upgrade Body: layers: cannot swap 'target': it holds more than a weight and a "
        "bias, which would be lost: 'mask'.",
        changed(lambda x: x.target.register_buffer("mask", torch.ones(1))),
    ),
    "never_runs": Wrong(
        "cannot upgrade Body: layers: cannot swap 'more': it never runs when the model does.",
        changed(lambda x: setattr(x, "more", nn.Conv2d(4, 4, 3))),
        "more",
    ),
    "functional": Wrong(
        "cannot upgrade Functional: layers: cannot swap 'target': it never runs when the "
        "model does.",
        r.Functional,
    ),
    # guidance
    "unknown": Wrong(
        "cannot upgrade Body: guidance: 'stm' is no layer of the model and no node of its "
        "trace. Nearest: 'stem'.",
        guidance="stm",
    ),
    "unknown_inner": Wrong(
        "cannot upgrade Body: guidance: 'stem.relu.add' is no layer of the model and no node "
        "of its trace. Nearest: 'stem.conv2d'.",
        guidance="stem.relu.add",
    ),
    "many": Wrong(
        "cannot upgrade OtherConvs: guidance: '*' matches 9 layers: 'stem', 'norm', 'target', "
        "'standardized', …. Name one, or give a list to concatenate several.",
        m.OtherConvs,
        guidance="*",
    ),
    "none": Wrong("cannot upgrade Body: guidance: 'layer?' matches no layer.", guidance="layer?"),
    "guidance_regex": Wrong(
        "cannot upgrade Body: guidance: 're:[' is not a regular expression: unterminated "
        "character set at position 0.",
        guidance="re:[",
    ),
    "twice": Wrong(
        "cannot upgrade Body: guidance: 'stem' is named twice. Once is enough.",
        guidance=["stem", "stem"],
    ),
    "empty": Wrong(
        "cannot upgrade Body: guidance: nothing is named. Name a layer, 'input' or 'external'.",
        guidance=[],
    ),
    "itself": Wrong(
        "cannot upgrade Body: guidance: 'target' cannot guide itself. Name a layer that runs "
        "earlier.",
        guidance="target",
    ),
    "later": Wrong(
        "cannot upgrade OtherConvs: guidance: cannot feed 'target' from 'up', which is ready "
        "only after the layer has run (it begins at call 10, the layer is call 4). Layers "
        "that run earlier: 'stem', 'norm'.",
        m.OtherConvs,
        guidance="up",
    ),
    "around": Wrong(
        "cannot upgrade Wrapped: guidance: cannot feed 'inner.target' from 'inner', which "
        "contains the layer (it begins at call 2, the layer is call 5). Layers that run "
        "earlier: 'inner.stem', 'inner.norm'.",
        lambda: m.Wrapped(m.Body()),
        "inner.target",
        "inner",
    ),
    "called_often": Wrong(
        "cannot upgrade Shared: guidance: 'late.inner' runs several times in one forward "
        "pass. Name one of its calls: 'late.inner_1', or another layer.",
        m.Shared,
        layers="late.inner",
        guidance="late.inner",
    ),
    "ambiguous": Wrong(
        "cannot upgrade CalledTwice: guidance: 'target' runs several times in one forward "
        "pass. Name one of its calls: 'target_1', or another layer.",
        m.CalledTwice,
        layers="stem",
        guidance="target",
    ),
    "resting": Wrong(
        "cannot upgrade Body: guidance: 'idle' (Body) is never called when the model runs, so "
        "it has no output.",
        changed(lambda x: setattr(x, "idle", m.Body())),
        guidance="idle",
    ),
    "flat": Wrong(
        "cannot upgrade TwoInputs, 2 faults:\n"
        "  - guidance: 'embedding' returns [2, 4]; a guidance is a feature map [B, D, H, W], a "
        "sequence [B, D, L] or a clip [B, D, T, H, W].\n"
        "  - guidance: cannot feed 'target' from 'embedding', which returns [2, 4]: the layer "
        "filters maps [B, C, H, W]. Name a guidance that returns what the layer filters.",
        m.TwoInputs,
        "target",
        "embedding",
        {"example_input": (IMAGES, INDEX)},
    ),
    "tuple": Wrong(
        "cannot upgrade AfterPair: guidance: 'pair' does not return one tensor. Name a layer "
        "in it that returns a feature map.",
        r.AfterPair,
        guidance="pair",
    ),
    "one_channel": Wrong(
        "cannot upgrade Body: guidance: a guidance of 1 channel cannot be projected: the 1×1 "
        "convolution would be a mere scale, which the standardisation undoes. Leave channels "
        "out.",
        lambda: m.Body(1),
        guidance={"from": "stem", "channels": 2},
    ),
    "projected_external": Wrong(
        "cannot upgrade Body: guidance: the number of channels of an external guidance is not "
        "known, so it cannot be projected. Leave channels out and project it yourself.",
        guidance={"from": "external", "channels": 2},
    ),
    "taken": Wrong(
        "cannot upgrade Guided: guidance: 'external' would give forward a keyword argument "
        "'guidance', and it has one of that name already. Rename that one, or feed the "
        "features through a layer of the model.",
        r.Guided,
        guidance="external",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
@pytest.mark.parametrize("door", [pacswap.plan, pacswap.swap], ids=["plan", "swap"])
def test_a_wrong_request_is_refused_and_nothing_is_touched(
    case: str, door: Callable[..., Any]
) -> None:
    assert_refused(WRONG[case], door)


def test_the_right_request_is_not_refused() -> None:
    pacswap.swap(m.Body(), "target", "stem", example_input=IMAGES)


def test_a_lazy_model_has_nothing_to_swap_yet() -> None:
    with pytest.raises(PlanError) as caught:
        pacswap.plan(nn.Sequential(nn.LazyConv2d(4, 3)), "0", "input", example_input=IMAGES)
    assert str(caught.value) == (
        "cannot upgrade Sequential: '0.weight' is lazy and has no value yet: run the model once "
        "first."
    )


def test_faults_say_which_group_and_field_they_belong_to() -> None:
    groups = [
        {"layers": "target", "guidance": "no.stem"},
        {"layers": ["x.y", "*"], "guidance": "target"},
    ]
    with pytest.raises(PlanError) as caught:
        pacswap.plan(m.Body(), groups=groups, example_input=IMAGES)
    found = [(fault.group, fault.field) for fault in caught.value.faults]
    assert found == [(1, "layers"), (1, "layers"), (0, "guidance")]
    assert str(caught.value) == (
        "cannot upgrade Body, 3 faults:\n"
        "  - group 1 layers: 'x.y' matches no convolution (2 found). List them: "
        "pacswap.layers(model).\n"
        "  - group 1 layers: 'target' is claimed by group 0 already. Exclude it from one of them, "
        "or set override: true on this group.\n"
        "  - group 0 guidance: 'no.stem' is no layer of the model and no node of its trace. "
        "Nearest: 'stem', 'norm'."
    )
