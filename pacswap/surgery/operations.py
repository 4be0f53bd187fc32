"""From a planned layer to its pixel-adaptive module and back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pacswap.nn import (
    AdaptingKernel,
    Adaptive,
    PacConv1d,
    PacConv2d,
    PacConv3d,
    PacConvTranspose2d,
    PacCRF,
    PacFilter2d,
    PacPool2d,
    PairwiseKernel,
)
from pacswap.nn.adaptive_conv import AdaptiveConv
from pacswap.surgery.spec import (
    CRFSpec,
    FilterSpec,
    Group,
    KernelSpec,
    Normalize,
    PairwiseSpec,
)
from pacswap.surgery.targets import Target, is_inserted

_CONVS: dict[type[nn.Module], type[AdaptiveConv]] = {
    nn.Conv1d: PacConv1d,
    nn.Conv2d: PacConv2d,
    nn.Conv3d: PacConv3d,
}

# What pixel-adaptive layers have and plain ones have not.
OWN_ATTRIBUTES = (
    "enabled",
    "held",
    "recompute",
    "guided_by",
    "supply",
    "shared_filters",
    "heads",
    "window",
)


def adaptive_module(
    group: Group, module: nn.Module | None, channels: int, like: Tensor
) -> Adaptive:
    """What an operation puts in a module's place, or behind it.

    Args:
        group: what was asked for.
        module: what is replaced, whose parameters the new layer shares; None where something is
            inserted.
        channels: of the value that is filtered, C.
        like: a tensor whose device and dtype new parameters get.

    Returns:
        The layer, with an adapting kernel of its own.
    """
    options = kernel_options(resolved_kernel(group, module))
    blend = group.kernel.blend
    for plain, adaptive in _CONVS.items():
        if isinstance(module, plain):
            assert isinstance(module, _ConvNd)
            return adaptive.from_conv(module, blend=blend, **options)
    if isinstance(module, nn.ConvTranspose2d):
        return PacConvTranspose2d.from_conv(module, blend=blend, **options)
    if isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
        return PacPool2d.from_pool(module, blend=blend, channels=channels, like=like, **options)
    made: dict[str, Any] = {"blend": blend, "device": like.device, "dtype": like.dtype}
    if group.operation == "upsample":
        spec = group.filter or FilterSpec()
        return PacFilter2d(
            channels,
            spec.kernel_size,
            dilation=spec.dilation,
            weights=spec.weights,
            steps=spec.steps,
            blur=spec.blur,
            **made,
            **options,
        )
    crf = group.crf or CRFSpec()
    width = options.pop("bandwidth")
    return PacCRF(
        channels,
        [_pairwise(kernel, width) for kernel in crf.kernels],
        steps=crf.steps,
        shared_steps=crf.shared_steps,
        unary_weight=crf.unary_weight,
        **made,
        **options,
    )


def plain_module(layer: Adaptive) -> nn.Module:
    """What was in a replaced layer's place, with the weights as they are now."""
    if isinstance(layer, PacPool2d):
        return layer.to_pool()
    assert isinstance(layer, AdaptiveConv | PacConvTranspose2d)
    return layer.to_conv()


def own_parameters(layer: Adaptive) -> set[str]:
    """The parameters of the plain layer that a pixel-adaptive one keeps."""
    if isinstance(layer, AdaptiveConv):
        return {"weight", "bias", *layer._variant.parameters}
    return {"weight", "bias"} if isinstance(layer, PacConvTranspose2d) else set()


def kernels_of(layer: Adaptive) -> dict[str, AdaptingKernel]:
    """The adapting kernels inside a layer, by the dotted path of what holds them ("" for it)."""
    assert isinstance(layer, nn.Module)
    return {
        name.removesuffix("adapting_kernel").removesuffix("."): module
        for name, module in layer.named_modules()
        if isinstance(module, AdaptingKernel)
    }


def resolved_kernel(group: Group, module: nn.Module | None) -> KernelSpec:
    """A group's kernel for one of its layers, with a `normalize` that was left open decided.

    What averages has to divide; a convolution keeps the scale of its weights, and so does a
    transposed one, by the mean of the taps that it sees.
    """
    if group.kernel.normalize is not None:
        return group.kernel
    normalize: Normalize = "none"
    if group.operation == "pool" or (group.operation == "upsample" and module is None):
        normalize = "sum"
    elif group.operation == "upsample" and not has_single_taps(module):
        normalize = "mean"
    return replace(group.kernel, normalize=normalize)


def has_single_taps(module: nn.Module | None) -> bool:
    """Whether every output pixel of a transposed convolution sees at most one of its input.

    A normalised kernel is constant there: there is nothing to weigh the one tap against.

    >>> has_single_taps(nn.ConvTranspose2d(4, 4, 2, stride=2))
    True
    >>> has_single_taps(nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1))
    False
    """
    if not isinstance(module, nn.ConvTranspose2d):
        return False
    sides = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    return all(size <= step // math.gcd(step, apart) for size, step, apart in sides)


def why_not_options(group: Group, target: Target) -> str | None:
    """Why a group's options make no sense for one of its targets, or None."""
    if is_inserted(group.operation, target):
        return None
    if group.filter is not None:
        return (
            "its own filter adapts, and the group's filter is for interpolations. Put it into a "
            "group of its own, without one"
        )
    constant = group.kernel.form == "constant"
    if constant and group.operation in ("swap", "upsample"):
        return (
            "a constant kernel leaves it the plain convolution, in which nothing can learn. Leave "
            "the group out"
        )
    divides = group.kernel.normalize in (None, "sum")
    if constant and isinstance(target.module, nn.AvgPool2d) and divides:
        return "a constant kernel leaves it the plain average, in which nothing can learn"
    if group.kernel.normalize in ("sum", "mean") and has_single_taps(target.module):
        return (
            "each pixel that it returns sees one of its input, so that a normalised kernel is "
            "constant. Leave normalize out"
        )
    return None


def kernel_options(spec: KernelSpec) -> dict[str, Any]:
    """A kernel's specification as the options of `AdaptingKernel`."""
    options = dict(vars(spec))
    del options["blend"]
    options["bandwidth"] = 1.0 if spec.bandwidth == "auto" else spec.bandwidth
    return options


def _pairwise(spec: PairwiseSpec, width: float) -> PairwiseKernel:
    options = dict(vars(spec))
    options["color"] = width if options.pop("guided") else None
    return PairwiseKernel(**options)
