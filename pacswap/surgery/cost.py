"""What a model costs and what a swap adds: parameters, multiply-accumulates, memory."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
