"""What a model costs and what a swap adds: parameters, multiply-accumulates, memory."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pacswap.nn import Adaptive, PacConvTranspose2d, PacCRF, PacFilter2d, PacPool2d
from pacswap.nn.adaptive_conv import AdaptiveConv
from pacswap.surgery.plan import PlannedGuidance, PlannedKernel, PlannedLayer


class MacCounter(TorchDispatchMode):
    """Counts the multiply-accumulates of convolutions and matrix products while it is open.

    `torch.utils.flop_counter.FlopCounterMode` without its module tracker, which hooks every module
    and fails on tensors that lost their gradient function.

    Attributes:
        macs: counted so far.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # brings triton: not at import

        super().__init__()
        self.macs = 0
        self._registry = flop_registry

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and add what it costs."""
        output = func(*args, **(kwargs or {}))
        formula = self._registry.get(func._overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **(kwargs or {}), out_val=output) // 2
        return output


def model_parameters(model: nn.Module) -> int:
    """How many numbers a model's parameters hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def added_cost(
    layers: list[PlannedLayer],
    kernels: list[PlannedKernel],
    guidances: list[PlannedGuidance],
    bytes_per_number: int,
) -> tuple[int, int, int]:
    """Parameters, and MACs and bytes for one image, that a plan adds, from the shapes alone."""
    parameters = sum(size for layer in layers for _, size in layer.added)
    macs = sum(layer.macs for layer in layers)
    numbers = sum(layer.numbers for layer in layers)
    for guidance in guidances:
        channels = guidance.projection
        if channels is None:
            continue
        parameters += channels * (guidance.in_channels or 0)
        for shape in guidance.shapes:
            if shape is not None:  # each map is projected at its own resolution
                macs += channels * math.prod(shape[1:])
        if guidance.shapes[0] is not None:
            numbers += channels * math.prod(guidance.shapes[0][2:])
    for kernel in kernels:
        channels = guidances[kernel.guidance].channels or 0
        out = math.prod(kernel.output_size)
        per_tap = channels if kernel.spec.channel_wise else 1
        if kernel.spec.form != "constant":
            macs += kernel.taps * channels * out
        numbers += kernel.taps * out * per_tap
        numbers += channels * math.prod(kernel.input_size)
    return parameters, macs, numbers * bytes_per_number


def layer_numbers(module: Adaptive, channels: int, size: tuple[int, ...]) -> int:
    """Activations that an inserted layer keeps, beside its kernels'; none for a replaced one."""
    pixels = channels * math.prod(size)
    if isinstance(module, PacFilter2d):
        # What is adapted and what is given on, and the image that the change is added to.
        return (2 * module.steps + (module.blur**2 if module.blur > 1 else 0)) * pixels
    if isinstance(module, PacCRF):
        return module.steps * (2 + len(module.terms)) * pixels  # beliefs, messages, log Q
    return 0


def layer_macs(module: Adaptive, channels: int, size: tuple[int, ...]) -> int:
    """Multiply-accumulates that a pixel-adaptive layer adds, beside its kernels'.

    Args:
        module: the layer.
        channels: C of what it filters.
        size: of its kernel, (H, W) as a rule.
    """
    pixels = math.prod(size)
    if isinstance(module, PacCRF):
        return module.macs(pixels)
    if isinstance(module, PacFilter2d):
        # K times the value, then the filter.
        per_tap = channels + (channels if module.weights == "filter" else channels**2)
        return module.steps * module.window.taps * per_tap * pixels
    assert isinstance(module, AdaptiveConv | PacConvTranspose2d | PacPool2d)
    taps = 1
    for side in module.adapting_kernel.window.kernel_size if module.adapting_kernel else ():
        taps *= side
    return taps * channels * pixels
