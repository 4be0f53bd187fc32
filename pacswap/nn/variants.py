"""Subclasses of convolutions that make their weight or their padding anew at each call.

They are known by name, because importing timm for an `isinstance` check would cost a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Variant:
    """What a convolution's `forward` does beside convolving.

    Attributes:
        weight: from the layer to the weight that it convolves with; None for the stored one.
        same: whether it pads to ⌈size/stride⌉ whatever the size (TensorFlow's SAME).
        parameters: what it learns beside weight and bias.
    """

    weight: Callable[[Any], Tensor] | None = None
    same: Callable[[Any], bool] = lambda conv: False
    parameters: tuple[str, ...] = ()


def _standardized(conv: Any, scale: Tensor | None = None) -> Tensor:
    """Each filter with mean 0 and variance 1 (Qiao et al., arXiv 1903.10520), times `scale`."""
    flat = conv.weight.reshape(1, conv.weight.shape[0], -1)
    made = F.batch_norm(flat, None, None, weight=scale, training=True, momentum=0.0, eps=conv.eps)
    return made.reshape_as(conv.weight)


def _scaled(conv: Any) -> Tensor:
    """Standardised, with a learned gain and 1/√fan-in (Brock et al., arXiv 2101.08692)."""
    return _standardized(conv, (conv.gain * conv.scale).view(-1))


_VARIANTS = {
    "timm.layers.conv2d_same.Conv2dSame": Variant(same=lambda conv: True),
    "timm.layers.std_conv.StdConv2d": Variant(_standardized),
    "timm.layers.std_conv.StdConv2dSame": Variant(_standardized, lambda conv: conv.same_pad),
    "timm.layers.std_conv.ScaledStdConv2d": Variant(_scaled, parameters=("gain",)),
    "timm.layers.std_conv.ScaledStdConv2dSame": Variant(
        _scaled, lambda conv: conv.same_pad, ("gain",)
    ),
}
_AS_STORED = Variant()


def variant_of(cls: type[Any]) -> Variant | None:
    """What a class of convolutions does beside convolving; None if that is not known.

    >>> variant_of(nn.Conv2d) == Variant()
    True
    >>> class Doubled(nn.Conv2d):
    ...     def forward(self, input):
    ...         return 2 * super().forward(input)
    >>> variant_of(Doubled) is None
    True
    """
    definer = _definer(cls, "forward")
    known = _VARIANTS.get(f"{definer.__module__}.{definer.__qualname__}")
    if known is not None:
        return known
    own = definer in PLAIN and _definer(cls, "_conv_forward") is definer
    return _AS_STORED if own else None


def plain_class(cls: type[Any]) -> type[_ConvNd]:
    """The class that a pixel-adaptive convolution's class was made from."""
    return next(c for c in cls.__mro__ if issubclass(c, _ConvNd) and not hasattr(c, "_adapt"))


def _definer(cls: type[Any], method: str) -> type[Any]:
    """The class that a method comes from."""
    return next(c for c in cls.__mro__ if method in vars(c))
