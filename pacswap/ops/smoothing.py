"""Smoothing of the centre's features before they are compared with the taps'."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError, nearest_hint
from pacswap.ops.window import Window, make_window

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
    kh, kw = smoothing.shape
    # Reflection and the like go as far as the image does; zeros are what the paper's code pads.
    around = make_window((kh, kw), padding=(kh // 2, kw // 2)).padded(features)
    channels = features.shape[1]
    filters = smoothing.to(features.dtype).expand(channels, 1, kh, kw)
    smooth = window.padded(F.conv2d(around, filters, groups=channels))
    size = window.output_size(features.shape[-2], features.shape[-1])
    rows, columns = list(window.slices(size))[window.centre]
    return smooth[:, :, rows, columns]
