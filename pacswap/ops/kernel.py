"""The adapting kernel K: one factor per output pixel and tap, from differences of the guidance."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pacswap.errors import ShapeError, nearest_hint
from pacswap.ops.backends import Backend, choose
from pacswap.ops.precision import check_floating, compute_dtype
from pacswap.ops.window import Padding, Size2, Window, make_window

FORMS = ("gaussian",)
NORMALIZATIONS = ("none", "sum", "mean")
DISTANCES = ("sum", "mean")


def adapting_kernel(
    guidance: Tensor,
    kernel_size: Size2,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
    form: Literal["gaussian"] = "gaussian",
    distance: Literal["sum", "mean"] = "sum",
    bandwidth: float | Tensor = 1.0,
    standardize: bool = False,
    normalize: Literal["none", "sum", "mean"] = "none",
    blend: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """The factor by which each tap counts at each output pixel.

    K(f_p, f_q) = exp(−½ · d² / bandwidth²), where d² is the squared difference of f_p and f_q,
    summed or averaged over channels (Su et al., CVPR 2019, eq. 3; the defaults are the paper's).
    Then the normalisation N, then the blend: 1 + blend · (N(K) − 1). See docs/math.md.

    Args:
        guidance: f, [B, D, H, W], float. Computed in float32 or better.
        kernel_size: KH, KW; the centre of an even side is the earlier of its two middle taps.
        stride: as in `torch.nn.Conv2d`, like the next three.
        padding: pixels, `"same"` or `"valid"`; zero padding pads the guidance with zeros too.
        dilation: pixels between taps.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        form: `"gaussian"`.
        distance: `"sum"` over channels (the paper's) or `"mean"`.
        bandwidth: width of the kernel, in units of the guidance; a positive number or scalar
            tensor.
        standardize: bring each channel of each image to mean 0 and variance 1 first.
        normalize: `"none"`; `"sum"`, K/ΣK over the taps inside the image, 0 outside (the paper's);
            `"mean"`, KH·KW·K/ΣK with taps outside the image counted as 1, and all taps where the
            centre is outside, so that a constant guidance gives exactly 1.
        blend: 0 gives 1 everywhere, 1 gives N(K); a number or a scalar tensor.
        backend: `"auto"`, `"reference"`, `"taps"` or `"eager"`; a named one runs or raises.

    Returns:
        K, [B, 1, KH*KW, H_out, W_out], the dtype of `guidance`.

    Raises:
        ShapeError: an option is out of range or the guidance has the wrong shape or dtype.
        BackendError: the named backend cannot run this call.

    Example:
        >>> adapting_kernel(torch.ones(1, 4, 8, 8), 3, padding=1).shape
        torch.Size([1, 1, 9, 8, 8])
    """
    window = make_window(
        kernel_size, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode
    )
    if guidance.dim() != 4:
        raise ShapeError(f"guidance must be [B, D, H, W], got {list(guidance.shape)}.")
    check_floating(guidance=guidance)
    check_options(form=form, distance=distance, normalize=normalize, bandwidth=bandwidth)
    features = guidance.to(compute_dtype(guidance.dtype))
    if standardize:
        features = standardized(features)
    squares = squared_distance(features, window, backend=backend)
    if distance == "mean":
        squares = squares / guidance.shape[1]
    if isinstance(bandwidth, Tensor):
        # Its square leaves the range of float16 at 256.
        bandwidth = bandwidth.to(features.dtype)
    kernel = torch.exp(-0.5 * squares / bandwidth**2)
    kernel = _normalized(kernel, normalize, window, (guidance.shape[-2], guidance.shape[-1]))
    kernel = blended(kernel[:, None], blend)
    return kernel.to(guidance.dtype)


def squared_distance(guidance: Tensor, window: Window, *, backend: Backend = "auto") -> Tensor:
    """‖f_p − f_q‖² for every output pixel p and tap q, summed over channels.

    Args:
        guidance: f, [B, D, H, W].
        window: the geometry.
        backend: as in `adapting_kernel`.

    Returns:
        [B, KH*KW, H_out, W_out], in the units of the guidance, squared.
    """
    return choose(backend).squared_distance(guidance, window)


def blended(kernel: Tensor, blend: float | Tensor) -> Tensor:
    """1 + blend · (kernel − 1): the plain convolution at 0, the adapting kernel at 1.

    Its derivative by `blend` is kernel − 1, alive at 0 (docs/math.md).

    Args:
        kernel: any shape.
        blend: a number or a scalar tensor, dimensionless.

    Example:
        >>> blended(torch.tensor([0.5, 1.0]), 0.0)
        tensor([1., 1.])
    """
    if isinstance(blend, float | int) and blend == 1:
        return kernel
    return 1 + blend * (kernel - 1)


def standardized(features: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and variance 1; a constant channel becomes 0.

    Args:
        features: [B, D, H, W].

    Returns:
        [B, D, H, W].
    """
    mean = features.mean((-2, -1), keepdim=True)
    centred = features - mean
    variance = centred.square().mean((-2, -1), keepdim=True)
    # Relative to the mean, so that the rounding noise of a constant channel is not blown up to 1.
    return centred * torch.rsqrt(variance + 1e-6 * mean.square() + 1e-12)


def _normalized(kernel: Tensor, normalize: str, window: Window, size: tuple[int, int]) -> Tensor:
    if normalize == "none":
        return kernel
    inside = window.inside(*size, kernel.device)
    if normalize == "mean":
        if inside is not None:
            # A centre in the padding has no guidance to compare with: all its taps count as 1.
            inside = inside & inside[:, window.centre : window.centre + 1]
            kernel = torch.where(inside, kernel, 1.0)
        # In this order: torch computes taps / ΣK as taps · (1/ΣK), which is not 1 for 49 / 49.
        return kernel * window.taps / kernel.sum(1, keepdim=True)
    if inside is not None:
        kernel = torch.where(inside, kernel, 0.0)
    total = kernel.sum(1, keepdim=True)
    # A window that lies in the padding entirely sees nothing: 0, not 0/0.
    return kernel / torch.where(total == 0, 1.0, total)


def check_options(*, form: str, distance: str, normalize: str, bandwidth: float | Tensor) -> None:
    """Raise unless `adapting_kernel` knows these options.

    Raises:
        ShapeError: an option is unknown or out of range.
    """
    for name, value, known in (
        ("form", form, FORMS),
        ("distance", distance, DISTANCES),
        ("normalize", normalize, NORMALIZATIONS),
    ):
        if value not in known:
            raise ShapeError(f"{name}={value!r} is unknown. {nearest_hint(str(value), known)}")
    if not isinstance(bandwidth, Tensor) and not (bandwidth > 0 and math.isfinite(bandwidth)):
        raise ShapeError(f"bandwidth must be positive and finite, got {bandwidth!r}.")
