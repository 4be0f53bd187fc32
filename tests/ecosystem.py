"""Upgraded networks for compilers, exporters and processes: fed by a graph, and by a relay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import models as m
import operations as o
import torch
import torch.nn.functional as F
from swaps import settled
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn

import pacswap

PROJECTED = {"from": ["stem", "input"], "channels": 3}


class Asks(nn.Module):
    """Looks at the size of its input, as timm's VGG does: a trace cannot, an exporter can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[-1] > 3 else x


class Relayed(m.Body):
    """Layers that no graph can feed, at two resolutions, the second rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Asks(), Asks()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(super().forward(x))
        return self.second(F.max_pool2d(x, 2, ceil_mode=True))


class Of(m.Body):
    """`target` is a convolution of a class of timm's."""

    def __init__(self, kind: type[nn.Conv2d], **geometry: Any) -> None:
        super().__init__()
        self.target = kind(4, 4, **geometry)


@dataclass(frozen=True)
class Network:
    """A network and what is changed in it.

    Attributes:
        make: builds it; the caller seeds.
        layers: what is swapped.
        guidance: what feeds it.
        groups: instead of the two.
        is_relayed: whether its layers are fed by a relay.
    """

    make: Callable[[], nn.Module]
    layers: Any = "target"
    guidance: Any = "stem"
    groups: tuple[Mapping[str, Any], ...] = ()
    is_relayed: bool = False

    def original(self) -> nn.Module:
        torch.manual_seed(0)
        return settled(self.make(), (images(),)).eval()

    def upgraded(self, blend: float) -> nn.Module:
        given = {"example_input": images(), "calibration": images()}
        original = self.original()
        if self.groups:
            model = pacswap.swap(original, groups=self.groups, **given)
        else:
            model = pacswap.swap(original, self.layers, self.guidance, **given)
        for layer in o.adaptive(model).values():
            nn.init.constant_(layer.blend, blend)
        programs = [m for m in model.modules() if hasattr(m, "_pacswap_program")]
        relayed = [p._pacswap_program.train is None for p in programs]
        assert relayed == [self.is_relayed], "fed in another way than this case is meant for"
        return model


def images(height: int = 16, width: int = 20, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator)


def body(guidance: Any = "stem", **geometry: Any) -> Network:
    return Network(functools.partial(m.Body, **geometry), guidance=guidance)


def operated(*names: str, make: Callable[[], nn.Module] | None = None) -> Network:
    groups = tuple(group for name in names for group in o.CASES[name].groups)
    return Network(make or o.CASES[names[0]].make, groups=groups)


# Compilers and exporters take their time for every tap: windows are narrow.
ROW: Mapping[str, Any] = {"kernel_size": (1, 3), "padding": (0, 1)}
COLUMN: Mapping[str, Any] = {"kernel_size": (3, 1), "padding": (1, 0)}

NETWORKS: Mapping[str, Network] = {
    "dense": body(kernel_size=2),
    "depthwise": body("input", groups=4, **ROW),
    "grouped": body("input+position", groups=2, **COLUMN),
    "strided": body(PROJECTED, kernel_size=(2, 3), stride=(2, 1)),
    "dilated": body("norm", kernel_size=(1, 3), dilation=2, padding=(0, 2)),
    "two_roundings": Network(m.TwoRoundings, ["left", "right"]),
    "same": Network(
        functools.partial(Of, Conv2dSame, kernel_size=(1, 3), stride=2, groups=4, bias=False)
    ),
    "scaled": Network(functools.partial(Of, ScaledStdConv2d, groups=2, **COLUMN), guidance="input"),
    "pool": operated("pool_max_ceil"),
    "upsample": operated("resized_bilinear"),
    "transposed": operated("transposed_3x3_s2_p1_op1"),
    "append": operated("append"),
    "relayed": Network(Relayed, ["first.conv", "second.conv"], PROJECTED, is_relayed=True),
    "relayed_image": Network(Relayed, "second.conv", "input+position", is_relayed=True),
}
