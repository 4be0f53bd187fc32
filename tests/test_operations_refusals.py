"""What pool, upsample and append refuse, word for word, in Python and in recipes."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import operations as o
import pytest
import torch
import torch.nn.functional as F
import torchvision
from operations import Everything, Half, group
from refusals import Wrong, assert_refused
from timm.layers import AvgPool2dSame
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError, RecipeError
from pacswap.upgrade import plan_recipe

DOORS = pytest.mark.parametrize("door", [pacswap.plan, pacswap.swap], ids=["plan", "swap"])


class Resizing(Half):
    """Brings its features to a size."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.features(x), size=self.size)


class Line(Half):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.features(x).flatten(2), scale_factor=2)


class Single(Half):
    def forward(self, x: Tensor) -> Tensor:
        small = self.features(x).mean((2, 3), keepdim=True)
        return F.interpolate(small, size=x.shape[-2:])


class Resting(Half):
    """Holds what never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.pool = nn.Upsample(scale_factor=2), nn.MaxPool2d(2)
        self.transposed = nn.ConvTranspose2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Twice(Half):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.up(self.features(x)))


class OtherInTraining(Half):
    """In train mode the first interpolation is another one than in eval mode."""

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        if self.training:
            return F.interpolate(x, scale_factor=2), F.interpolate(self.head(x), scale_factor=2)
        return F.interpolate(self.head(x), scale_factor=2)


class Nodes(Half):
    """Nodes that are no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        flat = x.flatten(2) * 2
        return self.one(x), self.one(x) + 1, flat.flatten(1), torch.max(x, 1), x.chunk(2, 1)[0]


class TwoWidths(Half):
    """A pooling of 4 and of 6 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.wide = nn.MaxPool2d(2), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.wide(self.pool(self.features(x))))


class Other(nn.MaxPool2d):
    """A subclass that computes the same."""


def pooled(pool: nn.Module) -> Callable[[], nn.Module]:
    return lambda: o.Pooled(pool)


def transposed(*geometry: int, **more: Any) -> Callable[[], nn.Module]:
    return lambda: o.Transposed(*geometry, **more)


def hooked() -> nn.Module:
    model = o.Pooled(nn.MaxPool2d(2))
    model.pool.register_forward_hook(lambda *args: None)
    return model


def deeplab() -> nn.Module:
    return torchvision.models.get_model(
        "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None
    )


def wrong(
    message: str,
    make: Callable[[], nn.Module],
    operation: str,
    layers: Any,
    guidance: Any = "input",
    **more: Any,
) -> Wrong:
    return Wrong(message, make, layers, guidance, {"operation": operation, **more})


def several(message: str, *groups: Mapping[str, Any]) -> Wrong:
    return Wrong(message, Everything, None, None, {"groups": groups})


CHANNEL_WISE = {"channel_wise": True}
WRONG: dict[str, Wrong] = {
    # names
    "no_match": wrong("cannot upgrade Everything: layers: 'interpolat' matches no upsampling step (2 found). Nearest: 'interpolate'. List them: pacswap.layers(model, operation='upsample').", Everything, "upsample", "interpolat"),
    "no_match_pool": wrong("cannot upgrade Everything: layers: 'pol' matches no pooling layer (1 found). Nearest: 'pool'. List them: pacswap.layers(model, operation='pool').", Everything, "pool", "pol"),
    "no_match_append": wrong("cannot upgrade Everything: layers: 'nothing.like.it' matches no layer (7 found). List them: pacswap.layers(model, operation='append').", Everything, "append", "nothing.like.it"),
    "label": wrong("cannot upgrade Everything: layers: cannot append to 'interpolate_1': no node of the trace has that name. Nearest: 'interpolate', 'pool_1'.", Everything, "append", "interpolate_1"),
    "label_inside": wrong("cannot upgrade Everything: layers: cannot append to 'stem.cnv2d': no node of the trace has that name. Nearest: 'stem.conv2d'.", Everything, "append", "stem.cnv2d"),
    "another_kind": wrong("cannot upgrade Everything: layers: 'pool' is an AvgPool2d, not an upsampling step.", Everything, "upsample", "pool"),
    "resting_up": wrong("cannot upgrade Resting: layers: cannot guide 'up': it never runs when the model does.", Resting, "upsample", "up"),
    "resting_pool": wrong("cannot upgrade Resting: layers: cannot swap 'pool': it never runs when the model does.", Resting, "pool", "pool"),
    "resting_transposed": wrong("cannot upgrade Resting: layers: cannot guide 'transposed': it never runs when the model does.", Resting, "upsample", "transposed"),
    "resting_append": wrong("cannot upgrade Resting: layers: 'up' (Upsample) is never called when the model runs, so it has no output.", Resting, "append", "up"),
    "unknown_operation": wrong("operation: expected one of 'swap', 'pool', 'upsample', 'append', got 'upsampl'.", Everything, "upsampl", "interpolate"),
    # upsampling
    "smaller": wrong("cannot upgrade Resizing: layers: cannot guide 'interpolate': it makes 16×20 to 8×10, which is no upsampling.", lambda: Resizing(8, 10), "upsample", "interpolate"),
    "same": wrong("cannot upgrade Resizing: layers: cannot guide 'interpolate': it makes 16×20 to 16×20, which is no upsampling.", lambda: Resizing(16, 20), "upsample", "interpolate"),
    "larger_and_smaller": wrong("cannot upgrade Resizing: layers: cannot guide 'interpolate': it makes 16×20 to 8×40, which is no upsampling.", lambda: Resizing(8, 40), "upsample", "interpolate"),
    "line": wrong("cannot upgrade Line: layers: cannot guide 'interpolate': it returns [2, 4, 640]; a guided upsampling needs [B, C, H, W].", Line, "upsample", "interpolate"),
    "single": wrong("cannot upgrade Single: layers: cannot guide 'interpolate': its input is a single pixel, which has no edges to guide.", Single, "upsample", "interpolate"),
    "deeplab": wrong("cannot upgrade DeepLabV3: layers: cannot guide 'classifier.0.convs.4.interpolate': its input is a single pixel, which has no edges to guide.", deeplab, "upsample", "*interpolate", example_input=torch.rand(2, 3, 64, 64)),
    "twice": wrong("cannot upgrade Twice: layers: cannot guide 'up': it runs 2 times in one forward pass, and one layer is put behind it.", Twice, "upsample", "up"),
    "twice_inside": wrong("cannot upgrade Blocks: layers: cannot guide 'up.interpolate': it runs 2 times in one forward pass, and one layer is put behind it.", o.Blocks, "upsample", "up.interpolate", "up.conv"),
    "other_in_training": wrong("cannot upgrade OtherInTraining: layers: cannot guide 'interpolate': in train mode another call has that name than in eval mode. Make a module of the call, which keeps its name.", OtherInTraining, "upsample", "interpolate"),
    "transposed_1x1": wrong("cannot upgrade Transposed: layers: cannot guide 'up': it is 1×1: a single tap has no neighbours to weigh.", transposed(1, 2), "upsample", "up"),
    "transposed_levelled": wrong("cannot upgrade Transposed: layers: cannot guide 'up': each pixel that it returns sees one of its input, so that a normalised kernel is constant. Leave normalize out.", transposed(2, 2), "upsample", "up", kernel={"normalize": "mean"}),
    "transposed_constant": wrong("cannot upgrade Transposed: layers: cannot guide 'up': a constant kernel leaves it the plain convolution, in which nothing can learn. Leave the group out.", transposed(4, 2, 1), "upsample", "up", kernel={"form": "constant"}),
    "transposed_filter": wrong("cannot upgrade Transposed: layers: cannot guide 'up': its own filter adapts, and the group's filter is for interpolations. Put it into a group of its own, without one.", transposed(4, 2, 1), "upsample", "up", filter={}),
    # pooling
    "adaptive": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': the window of AdaptiveAvgPool2d depends on the size of the image.", pooled(nn.AdaptiveAvgPool2d(1)), "pool", "pool"),
    "adaptive_max": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': the window of AdaptiveMaxPool2d depends on the size of the image.", pooled(nn.AdaptiveMaxPool2d(2)), "pool", "pool"),
    "lp": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': it is a LPPool2d; only AvgPool2d and MaxPool2d can become pixel-adaptive.", pooled(nn.LPPool2d(2, 2)), "pool", "pool"),
    "subclass": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': it is an Other; only AvgPool2d and MaxPool2d can become pixel-adaptive.", pooled(Other(2)), "pool", "pool"),
    "timm": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': it is an AvgPool2dSame; only AvgPool2d and MaxPool2d can become pixel-adaptive.", pooled(AvgPool2dSame(2, 2)), "pool", "pool"),
    "pool_1x1": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': its window is 1×1: a single tap has no neighbours to weigh.", pooled(nn.MaxPool2d(1, 2)), "pool", "pool"),
    "hook": wrong("cannot upgrade Pooled: layers: cannot swap 'pool': it has a forward hook, which would be lost. Remove it and register it again after the swap.", hooked, "pool", "pool"),
    "two_widths": wrong("cannot upgrade TwoWidths: kernel: channel_wise needs as many guidance channels as 'pool' has, 6, got 4. Set the guidance's channels to 6.", TwoWidths, "pool", "pool", "stem", kernel=CHANNEL_WISE),
    # appending
    "one_class": wrong("cannot upgrade Nodes: layers: cannot append to 'one': it returns [2, 1, 16, 20]; a CRF needs logits [B, C, H, W] of at least two classes.", Nodes, "append", "one", example_input=torch.rand(2, 3, 16, 20)),
    "one_class_node": wrong("cannot upgrade Nodes: layers: cannot append to 'add': it returns [2, 1, 16, 20]; a CRF needs logits [B, C, H, W] of at least two classes.", Nodes, "append", "add"),
    "three_dimensions": wrong("cannot upgrade Nodes: layers: cannot append to 'mul': it returns [2, 4, 320]; a CRF needs logits [B, C, H, W] of at least two classes.", Nodes, "append", "mul"),
    "two_dimensions": wrong("cannot upgrade Nodes: layers: cannot append to 'flatten_1': it returns [2, 1280]; a CRF needs logits [B, C, H, W] of at least two classes.", Nodes, "append", "flatten_1"),
    "two_tensors": wrong("cannot upgrade Nodes: layers: cannot append to 'max': it does not return one tensor.", Nodes, "append", "max"),
    "a_list": wrong("cannot upgrade Nodes: layers: cannot append to 'chunk': it does not return one tensor.", Nodes, "append", "chunk"),
    "append_twice": wrong("cannot upgrade Twice: layers: cannot append to 'up': it runs 2 times in one forward pass, and one layer is put behind it.", Twice, "append", "up"),
    # options
    "filter_to_swap": wrong("filter: belongs to operation 'upsample'. Leave it out.", Everything, "swap", "body", filter={}),
    "crf_to_pool": wrong("2 faults in the request:\n  - filter: belongs to operation 'upsample'. Leave it out.\n  - crf: belongs to operation 'append'. Leave it out.", Everything, "pool", "pool", crf={}, filter={"steps": 2}),
    "filter_words": wrong("filter.step: unknown key. Nearest: 'steps'.", Everything, "upsample", "interpolate", filter={"kernel_size": 4, "dilation": 0, "weights": "fll", "steps": 1.5, "step": 2}),
    "filter_values": wrong("4 faults in the request:\n  - filter.kernel_size: expected an odd int of at least 3, got 4.\n  - filter.dilation: expected a positive int, got 0.\n  - filter.steps: expected a positive int, got 1.5.\n  - filter.weights: expected one of 'filter', 'full', got 'fll'.", Everything, "upsample", "interpolate", filter={"kernel_size": 4, "dilation": 0, "weights": "fll", "steps": 1.5}),
    "filter_text": wrong("filter: expected a FilterSpec or a mapping, got 'full'.", Everything, "upsample", "interpolate", filter="full"),
    "crf_values": wrong("12 faults in the request:\n  - crf.kernels[2].kernal_size: unknown key. Nearest: 'kernel_size'.\n  - crf.steps: expected a positive int, got 0.\n  - crf.shared_steps: expected True or False, got 1.\n  - crf.unary_weight: expected a finite number, got nan.\n  - crf.kernels[0].kernel_size: expected an odd int of at least 3, got 4.\n  - crf.kernels[0].dilation: expected a positive int, got -1.\n  - crf.kernels[0].blur: expected a positive int, got 0.\n  - crf.kernels[0].compatibility: expected one of '4d', '2d', 'potts', got '3d'.\n  - crf.kernels[0].guided: expected True or False, got 1.\n  - crf.kernels[0].weight: expected a finite number, got None.\n  - crf.kernels[0].position: expected a positive number or None, got 0.\n  - crf.kernels[1].spatial_filter: '4d' has a matrix at every tap, which is its filter. Leave it at True, or use compatibility '2d'.", Everything, "append", "interpolate", crf={"steps": 0, "shared_steps": 1, "unary_weight": float("nan"), "kernels": [{"kernel_size": 4, "blur": 0, "dilation": -1, "compatibility": "3d", "weight": None, "guided": 1, "position": 0}, {"compatibility": "4d", "spatial_filter": False}, {"kernal_size": 3}]}),
    "crf_unguided": wrong("crf.kernels: no kernel looks at the guidance. Set guided: true on one of them.", Everything, "append", "interpolate", crf={"kernels": [{"guided": False}]}),
    "crf_empty": wrong("crf.kernels: expected a list of pairwise kernels, got [].", Everything, "append", "interpolate", crf={"kernels": []}),
    "kernel_values": wrong("7 faults in the request:\n  - kernel.form: expected one of 'gaussian', 'laplacian', 'inverse', 'constant', got 'gausian'.\n  - kernel.normalize: expected one of 'none', 'sum', 'mean', got 'max'.\n  - kernel.learnable: expected True or False, got 1.\n  - kernel.alpha: expected a finite number, got 'x'.\n  - kernel.lambd: expected a finite number, got None.\n  - kernel.smoothing_size: the gaussian has size 3, got 5.\n  - kernel.asymmetric: belongs to form 'inverse', got 'gausian'.", Everything, "pool", "pool", kernel={"form": "gausian", "normalize": "max", "smoothing": "gaussian", "smoothing_size": 5, "asymmetric": True, "learnable": 1, "alpha": "x", "lambd": None}),
    "channel_wise": wrong("cannot upgrade Everything: kernel: channel_wise needs as many guidance channels as 'interpolate' has, 5, got 3. Set the guidance's channels to 5.", Everything, "upsample", "interpolate", kernel=CHANNEL_WISE),
    "constant_swap": wrong("cannot upgrade Everything: layers: cannot swap 'body': a constant kernel leaves it the plain convolution, in which nothing can learn. Leave the group out.", Everything, "swap", "body", kernel={"form": "constant"}),
    # groups
    "claimed": several("cannot upgrade Everything: group 1 layers: 'interpolate' is claimed by group 0 already. Exclude it from one of them, or set override: true on this group.", group("upsample", "interpolate"), group("upsample", "interpolate", "stem")),
    "overridden": several("cannot upgrade Everything: group 0 layers: every layer of this group is overridden by later ones.", group("append", "interpolate"), group("append", "interpolate", override=True)),
    "late": several("cannot upgrade Everything, 3 faults:\n  - group 0 guidance: cannot feed 'up' from 'classify', which is ready only after the layer has run (it begins at call 8, the layer is call 7). Layers that run earlier: 'stem', 'norm', 'body', 'pool_1'.\n  - group 1 guidance: cannot feed 'classify' from 'interpolate', which is ready only after the layer has run. Layers that run earlier: 'stem', 'norm', 'pool_1', 'up'.\n  - group 2 guidance: 'mul' is no layer of the model and no node of its trace.", group("upsample", "up", "classify"), group("append", "classify", "interpolate"), group("upsample", "interpolate", "mul")),
    "itself": several("cannot upgrade Everything, 2 faults:\n  - group 0 guidance: 'up' cannot guide itself. Name a layer that runs earlier.\n  - group 1 guidance: 'body' cannot guide itself. Name a layer that runs earlier.", group("upsample", "up", "up"), group("swap", "body", "body")),
}  # fmt: skip


@DOORS
@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_request_is_refused_and_nothing_is_touched(
    case: str, door: Callable[..., Any]
) -> None:
    assert_refused(WRONG[case], door)


def test_the_same_requests_mended_are_planned() -> None:
    """… so that the refusals are about what they say."""
    for mended in (
        group("upsample", "up", kernel={"normalize": "mean"}),
        group("upsample", "interpolate", kernel={"form": "constant"}, filter={"kernel_size": 3}),
        group("append", {"name": "classify"}, crf={"kernels": [{}, {"guided": False}]}),
        group("pool", "pool", {"from": "stem", "channels": 4}, kernel=CHANNEL_WISE),
    ):
        plan = pacswap.plan(Everything(), groups=[mended], example_input=torch.rand(2, 3, 16, 20))
        assert len(plan.layers) == 1


def test_a_later_group_may_take_a_layer_away() -> None:
    groups = (
        group("upsample", ["interpolate", "up"]),
        group("append", "interpolate"),
        group("upsample", "interpolate", "stem", override=True),
    )
    plan = pacswap.plan(Everything(), groups=groups, example_input=torch.rand(2, 3, 16, 20))
    assert [(layer.name, layer.group) for layer in plan.layers] == [
        ("up", 0),
        ("interpolate", 2),
        ("interpolate", 1),
    ]


def test_a_listed_operation_is_one_of_four() -> None:
    with pytest.raises(pacswap.errors.PlanError) as raised:
        pacswap.layers(Everything(), torch.rand(2, 3, 16, 20), operation="apend")
    assert str(raised.value) == "operation='apend' is unknown. Nearest: 'append'."


def test_a_call_without_the_external_guidance() -> None:
    images = torch.rand(2, 3, 16, 20)
    model = pacswap.swap(
        Everything(), "interpolate", "external", operation="append", example_input=images
    )
    with pytest.raises(GuidanceError) as raised:
        model(images)
    assert str(raised.value) == (
        "this network was upgraded with an external guidance and was called without one. Call it "
        "as model(input, guidance=features)."
    )
    model(images, guidance=images)


RECIPE = """\
version: 1
model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 48]}
swap:
  - {layers: head.conv, guidance: layer1}
upsample:
  - layers: interpolate
    guidance: {from: [input, layer1], channels: 8}
    filter: {kernel_size: 3, dilation: 1, weights: full, steps: 2}
append:
  - layers: head.classifier
    guidance: layer1
    crf: {steps: 2, kernels: [{kernel_size: 3, compatibility: 2d}, {guided: false}]}
"""
# id: (what of the recipe is replaced, by what, the message)
RECIPES = {
    "no step": ("interpolate", "interpolat", "r.yaml:6:13: upsample[0].layers: 'interpolat' matches no upsampling step (1 found). Nearest: 'interpolate'. List them: pacswap ls layers pacswap/scene_net --operation upsample"),
    "no pool": ("swap:\n  - {layers: head.conv,", "pool:\n  - {layers: 'pool*',", "r.yaml:4:14: pool[0].layers: 'pool*' matches no pooling layer (0 found). List them: pacswap ls layers pacswap/scene_net --operation pool"),
    "filter to swap": ("guidance: layer1}", "guidance: layer1, filter: {steps: 2}}", "r.yaml:4:43: swap[0].filter: unknown key. Nearest: 'layers'."),
    "crf to upsample": ("filter: {", "crf: {", "r.yaml:8:5: upsample[0].crf: unknown key. Known: 'layers', 'guidance', 'kernel', 'override', 'filter'."),
    "even": ("kernel_size: 3, d", "kernel_size: 4, d", "r.yaml:8:27: upsample[0].filter.kernel_size: expected an odd number, got 4."),
    "too small": ("kernel_size: 3, d", "kernel_size: 1, d", "r.yaml:8:27: upsample[0].filter.kernel_size: expected at least 3, got 1."),
    "word": ("full", "ful", "r.yaml:8:52: upsample[0].filter.weights: expected 'filter' or 'full', got 'ful'. Nearest: 'full'."),
    "steps": ("steps: 2}", "steps: 0}", "r.yaml:8:65: upsample[0].filter.steps: expected at least 1, got 0."),
    "compatibility": ("compatibility: 2d", "compatibility: 3d", "r.yaml:12:63: append[0].crf.kernels[0].compatibility: expected '4d', '2d' or 'potts', got '3d'. Nearest: '4d'."),
    "matrix at every tap": ("compatibility: 2d", "compatibility: 4d, spatial_filter: false", "r.yaml:12:83: append[0].crf.kernels[0].spatial_filter: '4d' has a matrix at every tap, which is its filter. Leave it at true."),
    "unguided": ("{kernel_size: 3, compatibility: 2d}, ", "", "r.yaml:12:30: append[0].crf.kernels: no kernel looks at the guidance. Set guided: true on one of them."),
    "no kernels": ("[{kernel_size: 3, compatibility: 2d}, {guided: false}]", "[]", "r.yaml:12:30: append[0].crf.kernels: expected at least 1 in the list, got 0."),
    "misspelt pairwise key": ("{guided: false}", "{giuded: false}", "r.yaml:12:69: append[0].crf.kernels[1].giuded: unknown key. Nearest: 'guided'."),
    "position": ("{guided: false}", "{position: 0}", "r.yaml:12:79: append[0].crf.kernels[1].position: expected more than 0, got 0."),
    "claimed": ("append:", "  - {layers: interpolate, guidance: input}\nappend:", "r.yaml:9:14: upsample[1].layers: 'interpolate' is claimed by upsample[0] already. Exclude it from one of them, or set override: true on this group."),
    "late": ("append:\n  - layers: head.classifier\n    guidance: layer1", "append:\n  - layers: head.classifier\n    guidance: interpolate", "r.yaml:11:15: append[0].guidance: cannot feed 'head.classifier' from 'interpolate', which is ready only after the layer has run. Layers that run earlier: 'stem', 'layer1', 'head.relu', 'head.dropout'."),
    "asymmetric": ("    filter:", "    kernel: {asymmetric: true}\n    filter:", "r.yaml:8:26: upsample[0].kernel.asymmetric: belongs to form 'inverse', got 'gaussian'."),
    "smoothing": ("    filter:", "    kernel: {smoothing: gaussian, smoothing_size: 5}\n    filter:", "r.yaml:8:51: upsample[0].kernel.smoothing_size: the gaussian has size 3, got 5."),
}  # fmt: skip


def planned(folder: Path, old: str, new: str) -> pacswap.Plan:
    assert RECIPE.count(old) >= 1
    (folder / "r.yaml").write_text(RECIPE.replace(old, new, 1))
    return plan_recipe(folder / "r.yaml")[1]


@pytest.mark.parametrize("case", RECIPES)
def test_a_wrong_recipe_is_refused_at_its_place(case: str, tmp_path: Path) -> None:
    old, new, message = RECIPES[case]
    with pytest.raises(RecipeError) as raised:
        planned(tmp_path, old, new)
    assert str(raised.value).replace(f"{tmp_path}/", "") == message


def test_the_recipe_itself_is_planned(tmp_path: Path) -> None:
    plan = planned(tmp_path, "version", "version")
    assert [(layer.operation, layer.name) for layer in plan.layers] == [
        ("swap", "head.conv"),
        ("append", "head.classifier"),
        ("upsample", "interpolate"),
    ]


def test_a_misspelt_node_is_refused_at_its_place_beside_other_groups(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        planned(tmp_path, "head.classifier", "head.clasifier")
    assert str(raised.value).replace(f"{tmp_path}/", "") == (
        "r.yaml:10:13: append[0].layers: cannot append to 'head.clasifier': no node of the trace "
        "has that name. Nearest: 'head.classifier', 'head.relu', 'head.conv'."
    )
