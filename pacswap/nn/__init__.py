"""Torch modules over `pacswap.ops`."""

from pacswap.nn.adaptive import Adaptive
from pacswap.nn.blur import reduced
from pacswap.nn.conv import PacConv2d
from pacswap.nn.crf import PacCRF, PairwiseKernel
from pacswap.nn.filter import PacFilter2d
from pacswap.nn.guidance import (
    Guidance,
    resize_guidance,
    size_of,
    to_sequence,
    why_not_project,
)
from pacswap.nn.joint import JointBilateralUpsample, JointUpsample
from pacswap.nn.kernel import AdaptingKernel, KernelOptions, TransposedKernel
from pacswap.nn.pairwise import PairwiseTerm
from pacswap.nn.pool import PacPool2d
from pacswap.nn.sequence import PacConv1d
from pacswap.nn.transpose import PacConvTranspose2d
from pacswap.nn.volume import PacConv3d

__all__ = [
    "AdaptingKernel",
    "Adaptive",
    "Guidance",
    "JointBilateralUpsample",
    "JointUpsample",
    "KernelOptions",
    "PacCRF",
    "PacConv1d",
    "PacConv2d",
    "PacConv3d",
    "PacConvTranspose2d",
    "PacFilter2d",
    "PacPool2d",
    "PairwiseKernel",
    "PairwiseTerm",
    "TransposedKernel",
    "reduced",
    "resize_guidance",
    "size_of",
    "to_sequence",
    "why_not_project",
]
