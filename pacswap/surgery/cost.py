"""What a model costs and what a swap adds: parameters, multiply-accumulates, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from pacswap.surgery.plan import PlannedGuidance, PlannedKernel, PlannedLayer


@dataclass(frozen=True)
class Cost:
    """Figures for one image of the example input's size.

    Attributes:
        parameters: of the original model.
        added_parameters: by the swap.
        macs: multiply-accumulates of the original model (convolutions and matrix products).
        added_macs: by the swap: projections, distances, and the modulation of every tap.
        added_bytes: activations that the swap adds: features, resized features and kernels.
    """

    parameters: int
    added_parameters: int
    macs: int
    added_macs: int
    added_bytes: int


def model_parameters(model: nn.Module) -> int:
    """How many numbers a model's parameters hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def added_cost(
    layers: list[PlannedLayer],
    kernels: list[PlannedKernel],
    guidances: list[PlannedGuidance],
    bytes_per_number: int,
) -> tuple[int, int, int]:
    """Parameters, and MACs and bytes for one image, that a swap adds, from the shapes alone."""
    parameters, macs, numbers = len(layers) + len(kernels), 0, 0
    for guidance in guidances:
        shape = guidance.shapes[0]
        if guidance.spec.channels is not None and shape is not None:
            weights = guidance.spec.channels * (guidance.in_channels or 0)
            parameters += weights
            macs += weights * shape[2] * shape[3]
            numbers += guidance.spec.channels * shape[2] * shape[3]
    for kernel in kernels:
        channels = guidances[kernel.guidance].channels or 0
        out = kernel.output_size[0] * kernel.output_size[1]
        macs += kernel.taps * channels * out
        numbers += kernel.taps * out + channels * kernel.input_size[0] * kernel.input_size[1]
    for layer in layers:
        kernel = kernels[layer.kernel]
        out = kernel.output_size[0] * kernel.output_size[1]
        macs += kernel.taps * layer.in_channels * out * layer.calls
    return parameters, macs, numbers * bytes_per_number
