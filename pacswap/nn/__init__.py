"""Torch modules over `pacswap.ops`."""

from pacswap.nn.conv import PacConv2d
from pacswap.nn.guidance import Guidance, resize_guidance, why_not_project
from pacswap.nn.kernel import AdaptingKernel

__all__ = ["AdaptingKernel", "Guidance", "PacConv2d", "resize_guidance", "why_not_project"]
