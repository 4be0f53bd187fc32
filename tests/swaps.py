"""What the surgery tests swap: the tiny networks, and a zoo of timm's and torchvision's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import models as m
import refusals as r
import timm
import torch
import torchvision
from same import Untouched
from torch import Tensor, nn

import pacswap


@dataclass(frozen=True)
class Swap:
    """A network and what becomes pixel-adaptive in it.

    Attributes:
        make: builds the network; the caller seeds.
        layers: what is swapped.
        guidance: what feeds it.
        size: of the image.
        odd: another size.
        inputs: makes the arguments from a batch of images.
    """

    make: Callable[[], nn.Module]
    layers: Any = "target"
    guidance: Any = "stem"
    size: tuple[int, int] = (16, 20)
    odd: tuple[int, int] = (19, 23)
    inputs: Callable[[Tensor], tuple[Any, ...]] = field(default=lambda images: (images,))

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return settled(self.make(), self.arguments()).to(dtype)

    def arguments(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        size: tuple[int, int] | None = None,
        batch: int = 2,
    ) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(batch, 3, *(size or self.size), generator=generator)
        return self.inputs(images.to(dtype))

    def swap(self, model: nn.Module, **options: Any) -> nn.Module:
        dtype = next(model.parameters()).dtype
        example = self.arguments(dtype)
        defaults = {"example_input": example, "calibration": example}
        return pacswap.swap(model, self.layers, self.guidance, **(defaults | options))

    def plan(self, model: nn.Module, **options: Any) -> pacswap.Plan:
        example = self.arguments(next(model.parameters()).dtype)
        options = {"example_input": example} | options
        return pacswap.plan(model, self.layers, self.guidance, **options)


def settled(model: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """Scales and statistics as training leaves them: initial ones hide mistakes, stop gradients."""
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):  # of ConvNeXt
            nn.init.constant_(parameter, 0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
            module.momentum = 0.9
    with torch.no_grad():
        model(*args)
    return model


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A network, which the swap left as it was, and its upgraded twin. Copy before changing one."""
    return _pair(name, dtype)


@functools.lru_cache(maxsize=8)
def _pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    original = SWAPS[name].build(dtype)
    before = Untouched(original)
    upgraded = SWAPS[name].swap(original)
    before.check()
    return original, upgraded


def learned(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """An upgraded network as training may leave it: its blends are ½."""
    model = copy.deepcopy(pair(name, dtype)[1])
    for module in model.modules():
        if isinstance(module, pacswap.nn.PacConv2d):
            nn.init.constant_(module.blend, 0.5)
    return model


def listed(images: Tensor) -> tuple[Any, ...]:
    return ([images[0], *(image[:, 2:, 1:] for image in images[1:])],)


def indexed(images: Tensor) -> tuple[Any, ...]:
    return images, torch.arange(len(images)) % 5


GEOMETRIES: Mapping[str, dict[str, Any]] = {
    "2x2": {"kernel_size": 2, "padding": 1},
    "3x3_same": {"padding": "same"},
    "1x5": {"kernel_size": (1, 5), "padding": (0, 2)},
    "5x3_stride_2x1": {"kernel_size": (5, 3), "stride": (2, 1), "padding": 1},
    "valid": {"padding": 0},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "reflect": {"padding_mode": "reflect"},
    "replicate": {"padding_mode": "replicate"},
    "circular": {"padding_mode": "circular"},
    "no_bias": {"bias": False},
}

# Networks that no graph can hold: they keep their code, and their layers are fed while it runs.
RELAYED: Mapping[str, Swap] = {
    "relayed_branch": Swap(r.Branch),
    "relayed_branch_projected": Swap(
        r.Branch, guidance={"from": ["stem", "input"], "channels": 3, "resize": "area"}
    ),
    "relayed_input": Swap(r.Branch, guidance={"from": "input+position", "channels": 2}),
    "relayed_block": Swap(r.EvenInBlock, "branching.conv"),
    "relayed_no_grad": Swap(r.NoGrad),
    "relayed_no_grad_projected": Swap(r.NoGrad, guidance={"from": "stem", "channels": 3}),
    "relayed_autocast": Swap(r.Island),
    "relayed_kind": Swap(r.Kind),
    "relayed_warming": Swap(r.Warming),
    "relayed_constant": Swap(r.Constant),
    "relayed_collector": Swap(r.Collector),
    "relayed_hook": Swap(r.hooked_block, "inner.target", "input"),
    "relayed_mask": Swap(m.Optional, inputs=lambda x: (x, torch.linspace(0.5, 1, x.shape[-1]))),
    "relayed_in_place": Swap(r.InPlaceBranch),
    "relayed_twice": Swap(r.TwiceBranch),
}

TINY: Mapping[str, Swap] = {
    **RELAYED,
    "body": Swap(m.Body),
    "in_place": Swap(m.InPlace),
    "in_place_input": Swap(m.InPlaceInput, guidance="input"),
    "in_place_after": Swap(m.InPlaceAfter),
    "assigned": Swap(m.Assigned, guidance="mul"),
    "dropping": Swap(m.Dropping),
    "called_twice": Swap(m.CalledTwice),
    "called_at_two_sizes": Swap(m.CalledAtTwoSizes),
    "two_names": Swap(m.TwoNames),
    "tied": Swap(m.Tied, ["target", "second"]),
    "auxiliary": Swap(m.Auxiliary, ["target", "auxiliary"]),
    **{pack: Swap(functools.partial(m.Packed, pack)) for pack in m.PACKS},
    "optional": Swap(m.Optional),
    "optional_input": Swap(m.Optional, guidance={"from": "input+position", "channels": 2}),
    "two_inputs": Swap(m.TwoInputs, inputs=indexed),
    "branch_in_block": Swap(m.BranchInBlock),
    "branch_at_root": Swap(m.BranchAtRoot, "body.target", "body.stem"),
    "detector": Swap(m.Detector, "body.target", "body.stem", inputs=listed),
    "sparse": Swap(m.Sparse),
    "split": Swap(m.Split),
    "split_more": Swap(m.SplitMore),
    "sequential": Swap(m.sequential, "3", "0"),
    "frozen": Swap(m.frozen),
    "weight_norm_beside": Swap(m.normed),
    "hooks_beside": Swap(m.hooked),
    "own_forward_beside": Swap(m.own_forward),
    "other_convs": Swap(m.OtherConvs),
    "two_branches": Swap(m.TwoBranches, ["left", "right"]),
    "two_roundings": Swap(m.TwoRoundings, ["left", "right"]),
    "two_geometries": Swap(lambda: m.TwoRoundings(5), ["left", "right"]),
    "checkpointing_off": Swap(m.Checkpointing),
    "constant_in_block": Swap(m.ConstantInBlock),
    "shared": Swap(m.Shared, "late.inner"),
    "named_outside": Swap(m.NamedOutside, "conv", "body.stem"),
    "projected": Swap(
        m.Body, guidance={"from": ["stem", "input"], "channels": 3, "resize": "area"}
    ),
    **{
        f"geometry_{name}": Swap(functools.partial(m.Body, **geometry))
        for name, geometry in GEOMETRIES.items()
    },
}


def _zoo(make: Callable[..., nn.Module], layers: Any, guidance: Any, **arguments: Any) -> Swap:
    return Swap(functools.partial(make, **arguments), layers, guidance, (64, 64), (75, 97))


def _timm(name: str, layers: Any, guidance: Any) -> Swap:
    return _zoo(timm.create_model, layers, guidance, model_name=name, num_classes=7)


def _torchvision(name: str, layers: Any, guidance: Any, **arguments: Any) -> Swap:
    arguments = {"name": name, "weights": None, "num_classes": 7} | arguments
    return _zoo(torchvision.models.get_model, layers, guidance, **arguments)


def _vgg(name: str, layers: Any, guidance: Any) -> Swap:
    def make(**arguments: Any) -> nn.Module:
        model = torchvision.models.get_model(name, weights=None, **arguments)
        model.classifier = nn.Linear(512 * 7 * 7, 7)  # its own has 120 million parameters
        return model

    return _zoo(make, layers, guidance, init_weights=False)


def _backbone(name: str, layers: Any, guidance: Any, **arguments: Any) -> Swap:
    return _torchvision(name, layers, guidance, weights_backbone=None, **arguments)


ZOO: Mapping[str, Swap] = {
    "timm_resnet18": _timm("resnet18", "layer[34].?.conv2", "layer1"),
    "timm_resnet26d": _timm("resnet26d", {"kernel_size": 3, "last_of_stage": True}, "input"),
    "timm_regnetx_002": _timm("regnetx_002", "s4.b[67].conv2.conv", "s1"),
    "timm_mobilenetv2_100": _timm(
        "mobilenetv2_100", {"depthwise": True, "exclude": "blocks.[01234].*"}, "blocks.1"
    ),
    "timm_mobilenetv3_small_100": _timm(
        "mobilenetv3_small_100", "blocks.4.?.conv_dw", {"from": "blocks.0", "channels": 4}
    ),
    "timm_efficientnet_b0": _timm("efficientnet_b0", "blocks.5.[12].conv_dw", "bn1"),
    "timm_convnext_atto": _timm("convnext_atto", "stages.[23].blocks.1.conv_dw", "stages.0"),
    "timm_densenet121": _timm(
        "densenet121", "features.denseblock4.denselayer1?.conv2", "features.pool0"
    ),
    "timm_ghostnet_100": _timm(
        "ghostnet_100", "blocks.8.*.cheap_operation.0", "blocks.1.0.ghost1.primary_conv"
    ),
    "torchvision_vgg11": _vgg("vgg11", ["features.13", "features.18"], "features.3"),
    "torchvision_vgg11_bn": _vgg(
        "vgg11_bn", ["features.18", "features.22", "features.25"], "features.4"
    ),
    "torchvision_squeezenet1_1": _torchvision(
        "squeezenet1_1", "features.1[012].expand3x3", "features.0"
    ),
    "torchvision_mobilenet_v2": _torchvision(
        "mobilenet_v2", "features.1[1-6].conv.1.0", "features.1"
    ),
    "torchvision_regnet_x_400mf": _torchvision(
        "regnet_x_400mf", "trunk_output.block4.*.f.b.0", "trunk_output.block1"
    ),
    "torchvision_densenet121": _torchvision(
        "densenet121", "features.denseblock4.denselayer1?.conv2", "features.denseblock1"
    ),
    "torchvision_fcn_resnet50": _backbone(
        "fcn_resnet50", ["backbone.layer4.?.conv2", "classifier.0"], "backbone.layer1"
    ),
    # Larger: at 64×64 all taps of its dilated convolutions but the centre see padding only.
    "torchvision_deeplabv3_mobilenet_v3_large": replace(
        _backbone(
            "deeplabv3_mobilenet_v3_large", "classifier.0.convs.1.0", "backbone.3", aux_loss=True
        ),
        size=(224, 224),
        odd=(225, 231),
    ),
    "torchvision_lraspp_mobilenet_v3_large": _backbone(
        "lraspp_mobilenet_v3_large", "backbone.[35].block.1.0", "backbone.1"
    ),
    "torchvision_googlenet": _torchvision(
        "googlenet",
        ["inception5b.branch2.1.conv", "inception4a.branch3.1.conv"],
        "conv3",
        init_weights=False,
        aux_logits=True,
    ),
}

SWAPS: Mapping[str, Swap] = {**TINY, **ZOO}
