"""PAC tap by tap in ordinary torch operations: what `torch.compile`, `torch.export` and ONNX see.

Nothing here is larger than one input or one output, no gather and no unfold, so the code exports
with dynamic sizes; autograd differentiates it any number of times but keeps one product per tap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.ops.measure import PHI, Measure
from pacswap.ops.precision import compute_dtype
from pacswap.ops.window import Window


def tap_distance(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """As `reference.tap_distance`, one tap at a time."""
    size = window.output_size(guidance.shape[-2], guidance.shape[-1])
    padded = window.padded(guidance)
    seen = list(window.seen(padded, size))
    at = seen[window.centre] if centre is None else centre
    values = [PHI[measure](tap - at) for tap in seen]
    if not channel_wise:
        values = [value.sum(1, keepdim=True) for value in values]
    return torch.stack(values, dim=2)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """As `reference.pac_conv2d`: a sum of 1×1 convolutions, one per tap."""
    size = window.output_size(input.shape[-2], input.shape[-1])
    padded = window.padded(input)
    wide = compute_dtype(input.dtype)
    KW = window.kernel_size[1]
    output: Tensor | None = None
    for t, tap in enumerate(window.seen(padded, size)):
        seen = tap * kernel[:, :, t]  # [B, C_in, H_out, W_out]
        filters = weight[:, :, t // KW : t // KW + 1, t % KW : t % KW + 1]
        # Sums over taps in half precision would lose a digit that a plain convolution keeps.
        part = F.conv2d(seen, filters, groups=groups).to(wide)
        output = part if output is None else output + part
    assert output is not None
    if bias is not None:
        output = output + bias[:, None, None]
    return output.to(input.dtype)


def attach_kernel_gradient(
    output: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, window: Window, groups: int
) -> Tensor:
    """As `handwritten.attach_kernel_gradient`: what is added is 0, its derivatives are not."""
    return output + pac_conv2d(input, kernel - 1, weight, None, window, groups)
