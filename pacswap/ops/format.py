"""What surrounds a computation: the memory format of its output, the border of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.window import Window


def as_convolved(output: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """[B, C, H, W] in the memory format that `F.conv2d` gives its output for these two.

    Args:
        output: [B, C_out, H_out, W_out].
        image: the input, with its border if that is not of zeros.
        weight: [C_out, C_in/groups, KH, KW].
    """
    last = any(
        not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
        for t in (image, weight)
    )
    # Models that call `.view` on a convolution's output rely on this.
    return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def unpadded(grad: Tensor, input: Tensor, window: Window) -> Tensor:
    """The gradient of the image from that of the image with its border, [B, C, H', W']."""
    H, W = input.shape[-2:]
    left, _, top, _ = window.border(H, W)
    # A transposed convolution that cuts more than its reach has a negative border.
    if min(window.pad) >= 0 and (window.padding_mode == "zeros" or not any(window.pad)):
        return grad[:, :, top : top + H, left : left + W].to(input.dtype)
    # The other borders repeat pixels of the image: let torch send their gradient back.
    with torch.enable_grad():
        leaf = torch.empty_like(input, dtype=grad.dtype).requires_grad_()
        (result,) = torch.autograd.grad(window.padded(leaf), leaf, grad)
    return result.to(input.dtype)
