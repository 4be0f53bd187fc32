"""Smoothing of the centre's features before they are compared with the taps'."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError, nearest_hint
from pacswap.ops.window import Window

KINDS = ("gaussian", "box")


def smoothing_filter(
    kind: Literal["gaussian", "box"], size: int = 3, *, device: torch.device | str | None = None
) -> Tensor:
    """A filter of sum 1 for the centre's features.

    Args:
        kind: `"gaussian"` (¼ ½ ¼ in each direction, size 3) or `"box"`.
        size: odd.
        device: of the filter.

    Returns:
        [size, size], float64.

    Raises:
        ShapeError: an unknown kind or size.

    Example:
        >>> smoothing_filter("gaussian")[1]
        tensor([0.1250, 0.2500, 0.1250], dtype=torch.float64)
    """
    if kind not in KINDS:
        raise ShapeError(f"smoothing={kind!r} is unknown. {nearest_hint(str(kind), KINDS)}")
    if type(size) is not int or size < 1 or size % 2 == 0:
        raise ShapeError(f"a smoothing filter needs an odd size, got {size!r}.")
    if kind == "box":
        return torch.full((size, size), 1 / size**2, dtype=torch.float64, device=device)
    if size != 3:
        raise ShapeError(f"the gaussian smoothing filter has size 3, got {size}. Use 'box'.")
    side = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64, device=device)
    return side[:, None] * side


def smoothed_centre(features: Tensor, smoothing: Tensor, window: Window) -> Tensor:
    """f̃_p, the smoothed features at the window's centre.

    Args:
        features: f, [B, D, H, W].
        smoothing: the filter, [kh, kw] of odd sides, the same for all channels.
        window: the geometry.

    Returns:
        [B, D, H_out, W_out].
    """
    size = window.output_size(features.shape[-2], features.shape[-1])
    rows, columns = list(window.slices(size))[window.centre]
    # A border of zeros is smoothed as if it were image, like the paper's code does; another border
    # repeats what the image's pixels became.
    if window.padding_mode == "zeros":
        return _smooth(window.padded(features), smoothing)[:, :, rows, columns]
    return window.padded(_smooth(features, smoothing))[:, :, rows, columns]


def _smooth(x: Tensor, smoothing: Tensor) -> Tensor:
    """`x` [B, D, H, W] filtered, with zeros beyond its border."""
    H, W = x.shape[-2:]
    kh, kw = smoothing.shape
    filter = smoothing.to(x.dtype)
    around = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
    # Not `conv2d`: autocast would round it to a half precision.
    shifted = (
        around[:, :, i : i + H, j : j + W] * filter[i, j] for i in range(kh) for j in range(kw)
    )
    return functools.reduce(torch.add, shifted)
