"""What the tests of pool, upsample and append change: tiny networks, and a zoo."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from same import Untouched
from swaps import settled
from torch import Tensor, nn

import pacswap

CRF = {
    "steps": 2,
    "kernels": [
        {"kernel_size": 3, "compatibility": "2d", "position": 4.0},
        {"kernel_size": 3, "guided": False, "spatial_filter": False},
    ],
}


class Half(nn.Module):
    """Features at full and at half resolution; what comes between and behind is a subclass's."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stem(x)))


class Resized(Half):
    """`F.interpolate` to the image's size."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        small = self.head(self.features(x))
        how = self.how if "scale_factor" in self.how else {"size": x.shape[-2:], **self.how}
        return F.interpolate(small, **how) * 2


class Overwritten(Half):
    """What the interpolation gave is changed in place, and used under its first name too."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.head(self.features(x)), size=x.shape[-2:])
        y += 0.1
        return y * F.relu(y, inplace=True)


class UsedTwice(Half):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = F.interpolate(self.head(self.features(x)), size=x.shape[-2:])
        return {"out": y, "more": (y.mean(1), [y * 2])}


class TwoSteps(Half):
    """Two interpolations to one resolution."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small, size = self.head(self.features(x)), x.shape[-2:]
        return F.interpolate(small, size=size), F.interpolate(small * 2, size, mode="bicubic")


class Split(Half):
    """timm's way to be two methods."""

    def forward_features(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.features(x)), size=x.shape[-2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((-2, -1))


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.conv(x), scale_factor=2)


class Blocks(Half):
    """An interpolation in a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Doubling()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.up(self.head(self.features(x))))


class TwoNames(Half):
    """A block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.late = Doubling()
        self.early = self.late

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.head(self.features(x)))


class Numbered(Half):
    """Modules of which one's name begins with another's."""

    def __init__(self) -> None:
        super().__init__()
        self.up10 = nn.Upsample(size=(16, 16))
        self.up1 = nn.Upsample(size=(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.up1(self.head(self.up10(self.head(self.features(x)))))


class Headed(Half):
    """A Sequential head with an `nn.Upsample` in it."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=2, mode="bicubic"))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.head(self.features(x)))


class Transposed(Half):
    """`nn.ConvTranspose2d`; `asked` is how it is told the size of its output."""

    def __init__(self, *geometry: int, asked: str = "", **more: Any) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, *geometry, **more)
        self.out = nn.Conv2d(4, 4, 1)
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        small = self.head(x)
        if self.asked == "keyword":
            return self.out(self.up(small, output_size=x.shape[-2:]) + x)
        if self.asked == "positional":
            return self.out(self.up(small, x.shape) + x)
        if self.asked == "list":
            return self.out(self.up(small, output_size=[x.shape[-2], x.shape[-1]]) + x)
        return self.out(self.up(small))


class Pooled(Half):
    """A pooling layer, called `times`."""

    def __init__(self, pool: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.pool, self.times, self.out = pool, times, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for _ in range(self.times):
            x = self.pool(x)
        return self.out(x)


class Unet(nn.Module):
    """Down by a pooling that is used twice, up by transposed convolutions, with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.up2 = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.up1 = nn.ConvTranspose2d(6, 4, 2, 2)
        self.classify = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.second(self.pool(a)))
        c = F.relu(self.third(self.pool(b)))
        b = b + self.up2(c)[..., : b.shape[-2], : b.shape[-1]]
        a = a + self.up1(F.relu(b))[..., : a.shape[-2], : a.shape[-1]]
        return self.classify(a)


class Everything(Half):
    """Something for each of the four operations."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 4, 2, 1)
        self.classify = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.body(self.pool(self.features(x)))
        logits = self.classify(self.up(self.pool(small)))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Case:
    """A network and the groups that change it."""

    make: Callable[[], nn.Module]
    groups: tuple[Mapping[str, Any], ...]
    size: tuple[int, int] = (16, 20)
    odd: tuple[int, int] = (19, 23)

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return settled(self.make(), (self.images(),)).to(dtype)

    def images(self, size: tuple[int, int] | None = None, dtype: Any = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(2, 3, *(size or self.size), generator=generator).to(dtype)

    def swap(self, model: nn.Module) -> nn.Module:
        images = self.images(None, next(model.parameters()).dtype)
        return pacswap.swap(model, groups=self.groups, example_input=images, calibration=images)

    def plan(self, model: nn.Module) -> pacswap.Plan:
        return pacswap.plan(model, groups=self.groups, example_input=self.images())


def group(operation: str, layers: Any, guidance: Any = "input", **more: Any) -> dict[str, Any]:
    return {"layers": layers, "guidance": guidance, "operation": operation, **more}


def _case(make: Callable[[], nn.Module], *groups: dict[str, Any]) -> Case:
    return Case(make, groups)


RESIZED = {
    "nearest": {},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "align_corners": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic"},
    "scale": {"scale_factor": 2},
    "scale_1.5": {"scale_factor": 1.5, "mode": "bilinear"},
    "exact": {"mode": "nearest-exact"},
}
TRANSPOSED = {
    **{"2x2_s2": ((2, 2), {}), "4x4_s2_p1": ((4, 2, 1), {})},
    "3x3_s2_p1_op1": ((3, 2, 1, 1), {}),
    "groups": ((3, 2, 1, 1), {"groups": 2}),
    "depthwise": ((4, 2, 1), {"groups": 4, "bias": False}),
    "dilated": ((3, 2, 1), {"dilation": 2}),
    "stride_1": ((3, 1, 1), {}),
    "asked_keyword": ((3, 2, 1), {"asked": "keyword"}),
    "asked_positional": ((3, 2, 1), {"asked": "positional"}),
    "asked_list": ((3, 2, 1, 1), {"asked": "list"}),
}
POOLS = {
    "average": nn.AvgPool2d(2),
    "average_overlapping": nn.AvgPool2d(3, 2, 1),
    "average_ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average_inside": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average_divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "average_1x3": nn.AvgPool2d((1, 3), stride=1),
    "max": nn.MaxPool2d(2),
    "max_overlapping": nn.MaxPool2d(3, 2, 1),
    "max_ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max_dilated": nn.MaxPool2d((2, 3), (2, 1), (1, 0), dilation=(1, 2)),
}
POSITION = {"from": "input+position", "channels": 3}
FULL = {"weights": "full", "steps": 2, "kernel_size": 3}

TINY: Mapping[str, Case] = {
    **{
        f"resized_{name}": _case(
            functools.partial(Resized, **how), group("upsample", "interpolate")
        )
        for name, how in RESIZED.items()
    },
    **{
        f"transposed_{name}": _case(
            functools.partial(Transposed, *given, **more), group("upsample", "up", POSITION)
        )
        for name, (given, more) in TRANSPOSED.items()
    },
    **{
        f"pool_{name}": _case(
            functools.partial(lambda p: Pooled(copy.deepcopy(p)), pool), group("pool", "pool")
        )
        for name, pool in POOLS.items()
    },
    "pool_twice": _case(lambda: Pooled(nn.MaxPool2d(2), 2), group("pool", "pool", "stem")),
    "overwritten": _case(Overwritten, group("upsample", "interpolate", "stem", filter=FULL)),
    "overwritten_itself": _case(Overwritten, group("upsample", "interpolate", "interpolate")),
    "used_twice": _case(UsedTwice, group("upsample", "interpolate", filter={"blur": 2})),
    "two_steps": _case(TwoSteps, group("upsample", "interpolate*", "stem")),
    "split": _case(Split, group("upsample", "interpolate", "norm")),
    "blocks": _case(Blocks, group("upsample", "up.interpolate*")),
    "two_names": _case(
        TwoNames, group("upsample", "late.interpolate", {"from": "stem", "channels": 2})
    ),
    "numbered": _case(Numbered, group("upsample", "up*")),
    "headed": _case(Headed, group("upsample", "up.1")),
    "sequential": _case(
        lambda: nn.Sequential(
            Half().stem, nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Upsample(None, 2)
        ),
        group("upsample", "3", "1"),
        group("pool", "2", "0"),
    ),
    "append": _case(Headed, group("append", "up", "stem", crf=CRF)),
    "append_overwritten": _case(Overwritten, group("append", "interpolate", crf=CRF)),
    "append_to_logits": _case(Unet, group("append", "classify", "classify", crf=CRF)),
    "append_to_a_node": _case(Unet, group("append", "add_1", crf=CRF)),
    "unet": _case(Unet, group("upsample", "up?", "first"), group("pool", "pool", "first")),
    "everything": _case(
        Everything,
        group("append", "interpolate", "interpolate", crf=CRF),
        group("upsample", "interpolate", {"from": ["input", "stem"], "channels": 4}, filter=FULL),
        group("upsample", "up", POSITION),
        group("swap", "body", "stem"),
        group("pool", "pool", "stem"),
    ),
}


def _segments(name: str, **more: Any) -> Callable[[], nn.Module]:
    arguments = {"weights": None, "weights_backbone": None, "num_classes": 5} | more
    return functools.partial(torchvision.models.get_model, name, **arguments)


def _classifies(name: str) -> Callable[[], nn.Module]:
    return functools.partial(timm.create_model, name, num_classes=5)


def _zoo(make: Callable[[], nn.Module], *groups: dict[str, Any]) -> Case:
    return Case(make, groups, (64, 64), (75, 97))


ZOO: Mapping[str, Case] = {
    "fcn_resnet50": _zoo(
        _segments("fcn_resnet50"),
        group("upsample", "interpolate", {"from": ["input", "backbone.relu"], "channels": 8}),
        group("append", "classifier", "backbone.layer1", crf=CRF),
    ),
    "lraspp": _zoo(
        _segments("lraspp_mobilenet_v3_large"),
        group("upsample", "*interpolate"),
        group("append", "classifier.add", "backbone.1", crf=CRF),
    ),
    "deeplabv3": _zoo(
        _segments("deeplabv3_mobilenet_v3_large", aux_loss=True),
        group("upsample", "interpolate"),
        group("append", "interpolate_1", crf=CRF),
    ),
    "resnet26d": _zoo(
        _classifies("resnet26d"), group("pool", ["maxpool", "layer?.0.downsample.0"])
    ),
    "densenet121": _zoo(_classifies("densenet121"), group("pool", "features.*pool*", "input")),
    "squeezenet1_1": _zoo(
        functools.partial(torchvision.models.squeezenet1_1, num_classes=5),
        group("pool", {"type": "MaxPool2d"}, "features.0"),
    ),
}

CASES: Mapping[str, Case] = {**TINY, **ZOO}


@functools.lru_cache(maxsize=8)
def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A network, which the swap left as it was, and its upgraded twin. Copy before changing one."""
    original = CASES[name].build(dtype)
    before = Untouched(original)
    upgraded = CASES[name].swap(original)
    before.check()
    return original, upgraded


def learned(model: nn.Module, blend: float = 0.5) -> nn.Module:
    """A copy as training may leave it."""
    twin = copy.deepcopy(model)
    for layer in adaptive(twin).values():
        nn.init.constant_(layer.blend, blend)
    return twin


def adaptive(model: nn.Module) -> dict[str, Any]:
    """The pixel-adaptive layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, pacswap.nn.Adaptive)}
