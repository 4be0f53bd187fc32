"""From numbers to colours: many channels to three, one number to a ramp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError

# From dark violet over red to pale yellow, ever lighter: it reads in grey too.
_RAMP = (
    (0.055, 0.035, 0.165),
    (0.215, 0.065, 0.400),
    (0.420, 0.110, 0.490),
    (0.640, 0.180, 0.455),
    (0.835, 0.290, 0.370),
    (0.960, 0.475, 0.290),
    (0.995, 0.700, 0.390),
    (0.990, 0.940, 0.730),
)
_CHROMA = 0.13  # of the second and third component, in Oklab
_LIGHTNESS = (0.22, 0.96)
_LEAST_VARIANCE = 1e-8  # of the first component's
_TAIL = 0.01  # of the values at each end are clipped


def guidance_image(features: Tensor) -> Tensor:
    """Features of many channels as colours, by their principal components.

    The first component is how light a pixel is, the second runs from green to red, the third from
    blue to yellow; each is scaled so that all but 2 % of the pixels fit. Pixels of one colour have
    like features. A component's sign is such that its largest loading is positive.

    Args:
        features: [D, H, W], float, finite.

    Returns:
        uint8 [H, W, 3], RGB; constant features are one grey.

    Raises:
        ShapeError: it is no feature map.

    Example:
        >>> guidance_image(torch.rand(8, 4, 6)).shape
        torch.Size([4, 6, 3])
    """
    if features.dim() != 3 or features.numel() == 0:
        raise ShapeError(f"features must be [D, H, W], got {list(features.shape)}.")
    D, H, W = features.shape
    flat = features.detach().double().cpu().flatten(1)  # [D, H*W]
    flat = flat - flat.mean(1, keepdim=True)
    components = torch.zeros(3, H * W, dtype=torch.float64)
    # What is left of constant features is the rounding of their mean.
    if flat.abs().max() > 1e-6 * features.detach().abs().max():
        variances, vectors = torch.linalg.eigh(flat @ flat.T)  # by rising variance
        loadings = vectors.T.flip(0)[:3]  # [up to 3, D]
        # What has no variance is not to be stretched to full colour: it is rounding.
        loadings = loadings * (variances.flip(0)[:3, None] > _LEAST_VARIANCE * variances[-1])
        largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))
        components[: min(3, D)] = (loadings * largest.sign()) @ flat
    light = _stretched(components[0])
    low, high = _LIGHTNESS
    chroma = [_CHROMA * (2 * _stretched(c, around_zero=True) - 1) for c in components[1:]]
    lab = torch.stack([low + (high - low) * light, *chroma])
    return _rgb_of_oklab(lab).view(3, H, W).permute(1, 2, 0).contiguous()


def heat_image(values: Tensor) -> Tensor:
    """Numbers in 0 … 1 as colours from dark (0) to light (1).

    Args:
        values: [H, W].

    Returns:
        uint8 [H, W, 3], RGB.

    Example:
        >>> heat_image(torch.tensor([[0.0, 1.0]]))[0].tolist()
        [[14, 9, 42], [252, 240, 186]]
    """
    ramp = torch.tensor(_RAMP, dtype=torch.float64)  # [N, 3]
    at = values.detach().double().cpu().clamp(0, 1) * (len(_RAMP) - 1)
    below = at.floor().clamp(max=len(_RAMP) - 2).long()
    part = (at - below)[..., None]
    colours = ramp[below] * (1 - part) + ramp[below + 1] * part
    return (255 * colours).round().to(torch.uint8)


def _stretched(values: Tensor, *, around_zero: bool = False) -> Tensor:
    """Values in 0 … 1, those at the ends clipped; constant ones are ½."""
    # Sorting, for quantile has a limit of 2²⁴ values.
    ranked = values.sort().values
    last = len(ranked) - 1
    low, high = ranked[round(_TAIL * last)], ranked[round((1 - _TAIL) * last)]
    if around_zero:
        high = torch.maximum(high, -low)
        low = -high
    if not high > low:
        low, high = ranked[0], ranked[-1]  # a few pixels on an even ground
        if around_zero:
            high = torch.maximum(high, -low)
            low = -high
    if not high > low:
        return torch.full_like(values, 0.5)
    return ((values - low) / (high - low)).clamp(0, 1)


def _rgb_of_oklab(lab: Tensor) -> Tensor:
    """Oklab [3, N] as sRGB, uint8 [3, N] (Ottosson, 2020)."""
    to_cones = torch.tensor(
        [
            [1.0, 0.3963377774, 0.2158037573],
            [1.0, -0.1055613458, -0.0638541728],
            [1.0, -0.0894841775, -1.2914855480],
        ],
        dtype=lab.dtype,
    )
    to_rgb = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ],
        dtype=lab.dtype,
    )
    linear = F.relu(to_rgb @ (to_cones @ lab) ** 3).clamp(max=1)
    curved = torch.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-12) ** (1 / 2.4) - 0.055
    )
    return (255 * curved).round().to(torch.uint8)
