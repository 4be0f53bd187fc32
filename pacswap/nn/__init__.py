"""Torch modules over `pacswap.ops`."""

from pacswap.nn.adaptive import Adaptive, toward
from pacswap.nn.conv import PacConv2d
from pacswap.nn.filter import PacFilter2d
from pacswap.nn.guidance import Guidance, resize_guidance, why_not_project
from pacswap.nn.kernel import AdaptingKernel, KernelOptions, TransposedKernel
from pacswap.nn.pool import PacPool2d
from pacswap.nn.transpose import PacConvTranspose2d

__all__ = [
    "AdaptingKernel",
    "Adaptive",
    "Guidance",
    "KernelOptions",
    "PacConv2d",
    "PacConvTranspose2d",
    "PacFilter2d",
    "PacPool2d",
    "TransposedKernel",
    "resize_guidance",
    "toward",
    "why_not_project",
]
