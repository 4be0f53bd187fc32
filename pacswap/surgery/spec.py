"""What the user asks for, as plain data: which layers, which guidance, which kernel.

These dataclasses are the one source of the defaults; the recipe schema and the Python API read
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn

Resize = Literal["bilinear", "nearest", "area"]
Form = Literal["gaussian"]
Normalize = Literal["none", "sum", "mean"]
Distance = Literal["mean", "sum"]

LayerPredicate: TypeAlias = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class LayerQuery:
    """Convolutions by their properties; a property left at None matches everything.

    Only spatial convolutions (more than one tap) are considered. A stage is the convolutions with
    one output size inside one numbered container (`layer3`, `blocks.4`), or in the whole model
    where there are no such containers (VGG); `last_of_stage` keeps the match that runs last in
    each.
    """

    type: str | None = None
    kernel_size: int | tuple[int, int] | None = None
    stride: int | tuple[int, int] | None = None
    dilation: int | tuple[int, int] | None = None
    depthwise: bool | None = None
    name: str | tuple[str, ...] | None = None
    last_of_stage: bool = False
    exclude: str | tuple[str, ...] | None = None


Layers: TypeAlias = "str | LayerQuery | LayerPredicate | tuple[str | LayerQuery, ...]"


@dataclass(frozen=True)
class GuidanceSpec:
    """Where the adapting features come from and what happens to them before they become kernels.

    Attributes:
        source: a module name, glob, `re:` regex or traced node's name; several of them
            (concatenated); `input` (the image), `input+position` (x, y and the image) or `external`
            (an argument).
        channels: project to so many channels by a learned 1×1 convolution; None keeps them as they
            are.
        resize: how the features get to a layer's resolution.
        detach: stop the gradient into the layers that compute the guidance.
    """

    source: str | tuple[str, ...]
    channels: int | None = None
    resize: Resize = "bilinear"
    detach: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """The adapting kernel of a group of layers (paper.md's forms; docs/math.md has the equations).

    Attributes:
        form: the function of the distance.
        normalize: `none`, `sum` (the paper's) or `mean` (keeps the pretrained weights' scale).
        blend: where the learnable blend starts; 0 is the plain convolution, 1 the paper's PAC.
        bandwidth: the width of the kernel, or `auto`: the median off-centre K of a calibration
            batch is ½.
        standardize: bring every guidance channel of every image to mean 0 and variance 1.
        distance: `mean` or `sum` of the squared differences over the channels.
    """

    form: Form = "gaussian"
    normalize: Normalize = "none"
    blend: float = 0.0
    bandwidth: float | Literal["auto"] = "auto"
    standardize: bool = True
    distance: Distance = "mean"


@dataclass(frozen=True)
class Group:
    """Layers that get the same treatment.

    Attributes:
        layers: names, globs, `re:` regexes, a `LayerQuery`, a callable `(name, module) -> bool`, or
            a tuple of them.
        guidance: what feeds the adapting kernels.
        kernel: how the kernels are made.
        override: take layers away from earlier groups that claim them; without it that is an error.
    """

    layers: Layers
    guidance: GuidanceSpec
    kernel: KernelSpec = field(default_factory=KernelSpec)
    override: bool = False
