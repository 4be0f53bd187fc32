"""What the user asks for, as plain data: which layers, which guidance, which kernel.

These dataclasses are the one source of the defaults; the recipe schema and the Python API read
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import nn

Operation = Literal["swap", "pool", "upsample", "append"]
Resize = Literal["bilinear", "nearest", "area"]
Form = Literal["gaussian", "laplacian", "inverse", "constant"]
Normalize = Literal["none", "sum", "mean"]
Distance = Literal["mean", "sum"]
Smoothing = Literal["none", "gaussian", "box", "learned"]
FilterWeights = Literal["filter", "full"]
Compatibility = Literal["4d", "2d", "potts"]

LayerPredicate: TypeAlias = Callable[[str, "nn.Module | None"], bool]


@dataclass(frozen=True)
class LayerQuery:
    """Layers by their properties; a property left at None matches everything.

    Of convolutions to swap, only spatial ones (more than one tap) are considered. A stage is the
    convolutions with one output size inside one numbered container (`layer3`, `blocks.4`), or in
    the whole model where there are no such containers (VGG); `last_of_stage` keeps the match that
    runs last in each.
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
        form: the function of the distance; `constant` holds K at 1, the capacity control.
        normalize: `none`, `sum` (the paper's) or `mean` (keeps the pretrained weights' scale); None
            is the operation's own: `none` for convolutions and CRFs, `sum` for pooling and behind
            an interpolation, `mean` for transposed convolutions whose windows overlap.
        blend: where the learnable blend starts; 0 is what was there before, 1 the paper's PAC.
        bandwidth: the width of the kernel, or `auto`: the median off-centre K of a calibration
            batch is ½ (in the inverse form, it is the median distance).
        standardize: bring every guidance channel of every image to mean 0 and variance 1.
        distance: `mean` or `sum` of the differences over the channels.
        alpha: where α of the inverse form starts.
        lambd: where λ of the inverse form starts.
        asymmetric: in the inverse form, only what exceeds the centre counts.
        smoothing: of the centre's features.
        smoothing_size: side of the box or of the learned filter.
        channel_wise: a kernel for each channel; the guidance has as many as the layer's input.
        learnable: False holds bandwidth, α and λ where they start.
        recompute: for the backward pass a layer keeps its input and K, and what made K the guidance
            alone; distances and products are computed again. Less memory, more time.
    """

    form: Form = "gaussian"
    normalize: Normalize | None = None
    blend: float = 0.0
    bandwidth: float | Literal["auto"] = "auto"
    standardize: bool = True
    distance: Distance = "mean"
    alpha: float = 0.0
    lambd: float = -1.0
    asymmetric: bool = False
    smoothing: Smoothing = "none"
    smoothing_size: int = 3
    channel_wise: bool = False
    learnable: bool = True
    recompute: bool = False


@dataclass(frozen=True)
class FilterSpec:
    """The filter behind an interpolation that makes it a guided upsampling.

    Attributes:
        kernel_size: side of the window, odd.
        dilation: pixels between taps.
        weights: `filter`, one spatial filter for all channels, or `full`, a C×C matrix at every
            tap.
        steps: how often it is applied, each time with weights of its own and the same kernel.
        blur: the change is computed at a resolution so many times lower.
    """

    kernel_size: int = 5
    dilation: int = 2
    weights: FilterWeights = "filter"
    steps: int = 1
    blur: int = 1


@dataclass(frozen=True)
class PairwiseSpec:
    """A pairwise term of a CRF.

    Attributes:
        kernel_size: side of the window, odd.
        dilation: pixels between taps.
        blur: the message passes at a resolution so many times lower.
        compatibility: `4d` (a C×C matrix at every tap), `2d` (a spatial filter and one C×C matrix)
            or `potts` (a spatial filter; equal labels attract).
        spatial_filter: whether the spatial filter is learned; without it, every tap but the
            centre's counts 1.
        weight: how strong the message starts.
        guided: False for a term that does not look at the guidance (smoothness).
        position: where the scale of the distance between pixels starts, in pixels; None for none.
    """

    kernel_size: int = 5
    dilation: int = 1
    blur: int = 1
    compatibility: Compatibility = "potts"
    spatial_filter: bool = True
    weight: float = 1.0
    guided: bool = True
    position: float | None = None


@dataclass(frozen=True)
class CRFSpec:
    """A PAC-CRF behind a node that gives logits.

    Attributes:
        kernels: its pairwise terms.
        steps: of the mean-field iteration.
        shared_steps: whether all steps have the same weights.
        unary_weight: where the weight of the logits starts.
    """

    kernels: tuple[PairwiseSpec, ...] = (PairwiseSpec(),)
    steps: int = 5
    shared_steps: bool = True
    unary_weight: float = 1.0


@dataclass(frozen=True)
class Group:
    """Layers that get the same treatment.

    Attributes:
        layers: names, globs, `re:` regexes, a `LayerQuery`, a callable `(name, module) -> bool`, or
            a tuple of them.
        guidance: what feeds the adapting kernels.
        kernel: how the kernels are made.
        override: take layers away from earlier groups that claim them; without it that is an error.
        operation: `swap` (convolutions), `pool` (pooling layers), `upsample` (interpolations and
            transposed convolutions) or `append` (a CRF behind what gives logits).
        filter: of an `upsample` group's interpolations; None is `FilterSpec()`.
        crf: of an `append` group; None is `CRFSpec()`.
    """

    layers: Layers
    guidance: GuidanceSpec
    kernel: KernelSpec = field(default_factory=KernelSpec)
    override: bool = False
    operation: Operation = "swap"
    filter: FilterSpec | None = None
    crf: CRFSpec | None = None
