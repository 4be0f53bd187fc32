"""What a plan costs and how it reads, and the list of a model's layers."""

from __future__ import annotations

import models
import torch
import torchvision
from swaps import SWAPS

import pacswap
from pacswap.surgery import LayerInfo

SMALL = torch.empty(1, 3, 16, 20, device="meta")


def test_cost_is_what_one_counts_by_hand() -> None:
    guidance = {"from": ["stem", "input"], "channels": 2}
    cost = pacswap.plan(models.Body(), "target", guidance, example_input=SMALL).cost
    pixels, taps = 16 * 20, 9
    assert cost.parameters == (3 * 4 * taps + 4) + (4 * 4 * taps + 4) + 2 * 4
    assert cost.added_parameters == 1 + 1 + 2 * (4 + 3)  # blend, bandwidth, projection
    assert cost.macs == pixels * taps * (3 * 4 + 4 * 4)
    assert cost.added_macs == pixels * (2 * (4 + 3) + taps * 2 + taps * 4)
    assert cost.added_bytes == pixels * (2 + 2 + taps) * 4


def test_cost_counts_what_is_shared_once_and_what_runs_twice_twice() -> None:
    cost = SWAPS["called_twice"].plan(SWAPS["called_twice"].build()).cost
    assert cost.added_macs == 16 * 20 * 9 * (4 + 2 * 4)


FCN = """\
FCN, input 3×224×224: 5 convolutions become pixel-adaptive

  layer                    convolution            output  guided by
  ───────────────────────  ─────────────────────  ──────  ───────────────
  backbone.layer2.3.conv2  Conv2d 128→128 3×3     28×28   backbone.layer1
  backbone.layer4.0.conv2  Conv2d 512→512 3×3 d2  28×28   backbone.layer1
  backbone.layer4.1.conv2  Conv2d 512→512 3×3 d4  28×28   backbone.layer1
  backbone.layer4.2.conv2  Conv2d 512→512 3×3 d4  28×28   backbone.layer1
  classifier.0             Conv2d 2048→512 3×3    28×28   backbone.layer1

  guidance    backbone.layer1, 256 channels at 56×56 → 16 (1×1 projection)
  kernel      gaussian, blend 0 (the plain convolution), bandwidth auto; 3 of them
  rewired     forward (FCN), the rest keeps its code
  parameters  33 M + 4.1 k (0.012 %)
  MACs        26.5 G + 39.4 M (0.15 %)
  memory      + 436 kB of activations for one image"""


def test_a_plan_prints_as_a_table() -> None:
    with torch.device("meta"):
        model = torchvision.models.segmentation.fcn_resnet50(weights_backbone=None)
    layers = ["backbone.layer2.3.conv2", "backbone.layer4.*.conv2", "classifier.0"]
    text = str(pacswap.plan(model, layers, {"from": "backbone.layer1", "channels": 16}))
    assert text == FCN
    assert max(map(len, text.splitlines())) == 82


def test_layers_lists_what_can_be_swapped_and_why_not() -> None:
    shape = (1, 4, 16, 20)
    assert pacswap.layers(models.OtherConvs(), SMALL) == [
        LayerInfo("stem", "Conv2d 3→4 3×3", shape, None),
        LayerInfo("target", "Conv2d 4→4 3×3", shape, None),
        LayerInfo(
            "standardized",
            "Standardized 4→4 3×3",
            shape,
            "Standardized has a forward of its own, and what it computes would be lost. Known are "
            "torch.nn.Conv1d, Conv2d and Conv3d, their subclasses that leave forward alone, and "
            "timm's Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d and ScaledStdConv2dSame",
        ),
        LayerInfo("renamed", "Renamed 4→4 3×3", shape, None),
        LayerInfo("line", "Conv1d 4→4 3", (1, 4, 320), None),
        LayerInfo("volume", "Conv3d 4→4 3×3×3", (1, 4, 1, 16, 20), None),
        LayerInfo(
            "up",
            "ConvTranspose2d 4→4 2×2 s2",
            (1, 4, 32, 40),
            "it is a ConvTranspose2d, which enlarges. Name it in an upsampling: "
            "operation='upsample', or upsample: in a recipe",
        ),
    ]


def test_layers_that_rest_come_last_without_a_size() -> None:
    listed = pacswap.layers(models.Auxiliary(), SMALL)
    assert [(info.name, info.output_shape) for info in listed][-1] == ("auxiliary", None)
