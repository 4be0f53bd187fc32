"""Masks: which pixels of the input are valid, and what that makes of taps and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.ops.window import Window


def output_mask(mask: Tensor, window: Window) -> Tensor:
    """Which output pixels have a valid tap.

    An output without one is 0 and not its bias (Su et al., CVPR 2019, supplement): multiply it by
    this mask.

    Args:
        mask: [B, 1, H, W], above 0 where the input is valid.
        window: the geometry.

    Returns:
        [B, 1, H_out, W_out], 1 or 0, the dtype of `mask`.

    Raises:
        ShapeError: the mask has another shape.

    Example:
        >>> from pacswap.ops import make_window
        >>> mask = torch.tensor([[[[1.0, 0, 0, 0]]]])
        >>> output_mask(mask, make_window((1, 3), padding=(0, 1)))
        tensor([[[[1., 1., 0., 0.]]]])
    """
    if mask.dim() != 4 or mask.shape[1] != 1:
        raise ShapeError(f"mask must be [B, 1, H, W], got {list(mask.shape)}.")
    return valid_taps(mask, window).any(2).to(mask.dtype)


def valid_taps(mask: Tensor, window: Window) -> Tensor:
    """Which taps see a valid pixel of the image: bool [B, 1, KH*KW, H_out, W_out]."""
    size = window.output_size(mask.shape[-2], mask.shape[-1])
    padded = window.padded(mask)
    seen = [tap > 0 for tap in window.seen(padded, size)]
    return torch.stack(seen, dim=2)


def masked(
    kernel: Tensor, valid: Tensor, normalize: str, window: Window, size: tuple[int, ...]
) -> Tensor:
    """0 at invalid taps; without normalisation the valid ones stand in for them.

    Args:
        kernel: [B, 1 or D, KH*KW, H_out, W_out], normalised already if it is to be.
        valid: bool [B, 1, KH*KW, H_out, W_out], what `valid_taps` gives.
        normalize: how the kernel was normalised.
        window: the geometry.
        size: (H, W) of the input.

    Returns:
        The kernel's shape. Without normalisation valid taps are multiplied by (taps inside the
        image)/(valid taps), the paper's Z = ΣM/Σ1.
    """
    kernel = torch.where(valid, kernel, 0.0)
    if normalize != "none":
        return kernel
    inside = window.inside(size[0], size[1], kernel.device)
    total = window.taps if inside is None else inside.sum(1, keepdim=True)[:, None]
    # In the kernel's precision: a quotient of integers would be float32.
    counted = valid.sum(2, keepdim=True).clamp(min=1).to(kernel.dtype)
    return kernel * (total / counted)
