"""The adapting kernel K: one factor per output pixel and tap, from differences of the guidance."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pacswap.errors import ShapeError, nearest_hint
from pacswap.ops import volume
from pacswap.ops.backends import Backend, Task, choose
from pacswap.ops.dimensions import AnyWindow, SequenceWindow, VolumeWindow, any_window, axes_of
from pacswap.ops.forms import divisor_of, exponential, kernel_of
from pacswap.ops.mask import masked
from pacswap.ops.measure import Measure
from pacswap.ops.normalize import counted_taps, normalized, valid_of
from pacswap.ops.precision import check_floating, compute_dtype
from pacswap.ops.smoothing import smoothed_centre
from pacswap.ops.window import Padding, Size2, Window

FORMS = ("gaussian", "laplacian", "inverse", "constant")
NORMALIZATIONS = ("none", "sum", "mean")
DISTANCES = ("sum", "mean")


def adapting_kernel(
    guidance: Tensor,
    kernel_size: Size2 | AnyWindow,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
    form: Literal["gaussian", "laplacian", "inverse", "constant"] = "gaussian",
    alpha: float | Tensor = 0.0,
    lambd: float | Tensor = -1.0,
    asymmetric: bool = False,
    smoothing: Tensor | None = None,
    channel_wise: bool = False,
    mask: Tensor | None = None,
    distance: Literal["sum", "mean"] = "sum",
    bandwidth: float | Tensor = 1.0,
    standardize: bool = False,
    normalize: Literal["none", "sum", "mean"] = "none",
    blend: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """The factor by which each tap counts at each output pixel.

    `gaussian`   K = exp(−½ · d² / bandwidth²)
    `laplacian`  K = exp(−d₁ / bandwidth)
    `inverse`    K = α + (d² / bandwidth² + 10⁻⁴)^(λ/2)
    `constant`   K = 1

    where d² is the squared and d₁ the absolute difference of f_p and f_q, summed or averaged over
    channels (Su et al., CVPR 2019, section 3; the defaults are the paper's). Then the normalisation
    N, then the blend, 1 + blend · (N(K) − 1), then the mask. See docs/math.md.

    Args:
        guidance: f, [B, D, H, W], float. Computed in float32 or better. Also a volume,
            [B, D, T, H, W], or, with `kernel_size=(K,)`, a sequence, [B, D, L].
        kernel_size: KH, KW; the centre of an even side is the earlier of its two middle taps.
            KT, KH, KW of a volume. Or a window, which has the next four options too.
        stride: as in `torch.nn.Conv2d`, like the next three.
        padding: pixels, `"same"` or `"valid"`; zero padding pads the guidance with zeros too.
        dilation: pixels between taps.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        form: `"gaussian"`, `"laplacian"`, `"inverse"` or `"constant"` (the capacity control).
        alpha: α of the inverse form, a number, a scalar tensor, or [D] with `channel_wise`.
        lambd: λ of the inverse form, likewise.
        asymmetric: in the inverse form, only what exceeds the centre counts: relu(f_q − f_p).
        smoothing: a filter [kh, kw] of odd sides (`smoothing_filter` makes one) by which f_p is
            smoothed first; the features at the taps stay as they are. [k] of a sequence; not of
            a volume.
        channel_wise: a kernel for each channel of the guidance instead of one for all.
        mask: [B, 1, H, W], above 0 where the input is valid, or [B, 1, KH*KW, H_out, W_out], above
            0 at the taps that count. Invalid taps get 0, and without normalisation the others are
            multiplied by (taps inside)/(valid taps). Taps that are given themselves also stand for
            KH·KW in `normalize="mean"`. Of a sequence without the H; not of a volume.
        distance: `"sum"` over channels (the paper's) or `"mean"`.
        bandwidth: width of the kernel, in units of the guidance; a positive number or scalar
            tensor.
        standardize: bring each channel of each image to mean 0 and variance 1 first.
        normalize: `"none"`; `"sum"`, K/ΣK over the taps inside the image, 0 outside (the paper's);
            `"mean"`, KH·KW·K/ΣK with taps outside the image counted as 1, and all taps where the
            centre is outside, so that a constant guidance gives exactly 1.
        blend: 0 gives 1 everywhere, 1 gives N(K); a number or a scalar tensor.
        backend: `"auto"` or a name that `explain` knows; a named one runs or raises.

    Returns:
        K, [B, 1, KH*KW, H_out, W_out] (D instead of 1 with `channel_wise`), the dtype of
        `guidance`. [B, 1, K, L_out] of a sequence, [B, 1, KT*KH*KW, T_out, H_out, W_out] of a
        volume.

    Raises:
        ShapeError: an option is out of range or a tensor has the wrong shape or dtype.
        BackendError: the named backend cannot run this call.

    Example:
        >>> adapting_kernel(torch.ones(1, 4, 8, 8), 3, padding=1).shape
        torch.Size([1, 1, 9, 8, 8])
    """
    window = any_window(
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        axes=_axes(guidance, kernel_size),
    )
    numbers: Any = {"bandwidth": bandwidth, "alpha": alpha, "lambd": lambd}
    names: Any = {"form": form, "distance": distance, "normalize": normalize}
    check_options(**names, **numbers, asymmetric=asymmetric)
    _check_tensors(guidance, window, smoothing, alpha, lambd, channel_wise)
    _check_scalars(bandwidth=bandwidth, blend=blend)
    _check_mask(mask, guidance, window)
    features = guidance.to(compute_dtype(guidance.dtype))
    features = standardized(features) if standardize else features
    features, plane, mask, smoothing = _as_image(features, window, mask, smoothing)
    valid, taps = valid_of(mask, plane)
    counted = counted_taps(normalize, plane, features.shape[2:], valid, guidance.device)
    if form == "constant":
        kernel = _ones(features, plane, channel_wise)
    else:
        count = max(1, guidance.shape[1]) if distance == "mean" and not channel_wise else 1
        divisor = None  # of what is computed in one pass
        if form != "inverse" and not counted.divides:
            divisor = divisor_of(form, count, bandwidth, features)
        how = (_measure(form, asymmetric), channel_wise, smoothing, backend, divisor)
        kernel = _distance(features, plane, *how)
        if divisor is None:
            kernel = kernel_of(kernel, count, form, bandwidth, alpha, lambd, counted)
    kernel = blended(normalized(kernel, normalize, counted.seen, taps), blend)
    if valid is not None:
        assert isinstance(plane, Window)  # a mask of a volume is refused
        kernel = masked(kernel, valid, normalize, plane, features.shape[2:])
    kernel = kernel if kernel.dtype == guidance.dtype else kernel.to(guidance.dtype)
    return kernel if plane is window else kernel.squeeze(-2)


def _measure(form: str, asymmetric: bool) -> Measure:
    if form == "laplacian":
        return "absolute"
    return "asymmetric" if asymmetric else "square"


def _ones(features: Tensor, window: Window | VolumeWindow, channel_wise: bool) -> Tensor:
    """K ≡ 1, [B, 1 or D, KH*KW, H_out, W_out]."""
    B, D, *size = features.shape
    return features.new_ones(B, D if channel_wise else 1, window.taps, *window.output_size(*size))


def tap_distance(
    guidance: Tensor,
    window: AnyWindow,
    *,
    measure: Measure = "square",
    channel_wise: bool = False,
    smoothing: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """How far each tap's features are from the centre's, Σ φ(f_q − f_p) over channels.

    Args:
        guidance: f, [B, D, H, W]; [B, D, L] or [B, D, T, H, W], as the window is.
        window: the geometry.
        measure: φ, `"square"`, `"absolute"` or `"asymmetric"` (the square of what is above 0).
        channel_wise: leave the channels apart.
        smoothing: as in `adapting_kernel`, like the next.
        backend: as in `adapting_kernel`.

    Returns:
        [B, 1 or D, KH*KW, H_out, W_out].
    """
    features, plane, _, smoothing = _as_image(guidance, window, None, smoothing)
    made = _distance(features, plane, measure, channel_wise, smoothing, backend)
    return made if plane is window else made.squeeze(-2)


def _distance(
    features: Tensor,
    window: Window | VolumeWindow,
    measure: Measure,
    channel_wise: bool,
    smoothing: Tensor | None,
    backend: Backend,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """`tap_distance` of an image or a volume, d; or e^(d / divisor)."""
    module = choose(backend, _task(features, window, measure, channel_wise))
    if isinstance(window, VolumeWindow):
        d = volume.tap_distance(module, features, window, measure, channel_wise)
    else:
        centre = None if smoothing is None else smoothed_centre(features, smoothing, window)
        # What a subclass of Tensor does with a division is its own.
        is_plain = type(divisor) in (int, float, Tensor)
        if is_plain and hasattr(module, "tap_exponential"):
            return module.tap_exponential(features, centre, window, measure, divisor)
        d = module.tap_distance(features, centre, window, measure, channel_wise)
    return d if divisor is None else exponential(d, divisor)


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
    # In a half precision K − 1 would round away what a small K is.
    wide = compute_dtype(kernel.dtype)
    if isinstance(blend, Tensor):
        blend = blend.to(wide)
    return (1 + blend * (kernel.to(wide) - 1)).to(kernel.dtype)


def standardized(features: Tensor) -> Tensor:
    """Each channel of each image with mean 0 and variance 1; a constant channel becomes 0.

    Args:
        features: [B, D, H, W], [B, D, L] or [B, D, T, H, W].

    Returns:
        Their shape.
    """
    places = tuple(range(2, features.dim()))
    mean = features.mean(places, keepdim=True)
    centred = features - mean
    variance = centred.square().mean(places, keepdim=True)
    # Relative to the mean, so that the rounding noise of a constant channel is not blown up to 1.
    return centred * torch.rsqrt(variance + 1e-6 * mean.square() + 1e-12)


def check_options(
    *,
    form: str,
    distance: str,
    normalize: str,
    bandwidth: float | Tensor,
    alpha: float | Tensor = 0.0,
    lambd: float | Tensor = -1.0,
    asymmetric: bool = False,
) -> None:
    """Raise unless `adapting_kernel` knows these options.

    Raises:
        ShapeError: an option is unknown or out of range.
    """
    # Compared and not asked for `isfinite`, which a compiler with symbolic floats cannot trace.
    for name, value, known in (
        ("form", form, FORMS),
        ("distance", distance, DISTANCES),
        ("normalize", normalize, NORMALIZATIONS),
    ):
        if value not in known:
            raise ShapeError(f"{name}={value!r} is unknown. {nearest_hint(str(value), known)}")
    if not isinstance(bandwidth, Tensor) and not 0 < bandwidth < math.inf:
        raise ShapeError(f"bandwidth must be positive and finite, got {bandwidth!r}.")
    for name, number in (("alpha", alpha), ("lambd", lambd)):
        if not isinstance(number, Tensor) and not -math.inf < number < math.inf:
            raise ShapeError(f"{name} must be finite, got {number!r}.")
    if asymmetric and form != "inverse":
        raise ShapeError(f"asymmetric belongs to form='inverse', got form={form!r}.")


def _axes(guidance: Tensor, kernel_size: Size2 | AnyWindow) -> int:
    """How many axes a window of that size has: a map without a batch is no sequence."""
    is_line = isinstance(kernel_size, tuple | list) and len(kernel_size) == 1
    return {3: 1 if is_line else 2, 5: 3}.get(guidance.dim(), 2)


def _task(
    features: Tensor, window: Window | VolumeWindow, measure: Measure, channel_wise: bool
) -> Task:
    plane = window if isinstance(window, Window) else None
    return Task((features,), plane, measure=measure, channel_wise=channel_wise)


def _as_image(
    features: Tensor, window: AnyWindow, mask: Tensor | None, smoothing: Tensor | None
) -> tuple[Tensor, Window | VolumeWindow, Tensor | None, Tensor | None]:
    """A sequence and what belongs to it as an image of height 1 has them; others as they are."""
    if not isinstance(window, SequenceWindow):
        return features, window, mask, smoothing
    mask = None if mask is None else mask.unsqueeze(-2)
    smoothing = None if smoothing is None else smoothing.unsqueeze(-2)
    return features.unsqueeze(-2), window.row, mask, smoothing


def _check_tensors(
    guidance: Tensor,
    window: AnyWindow,
    smoothing: Tensor | None,
    alpha: float | Tensor,
    lambd: float | Tensor,
    channel_wise: bool,
) -> None:
    axes = axes_of(window)
    if guidance.dim() != 2 + len(axes):
        raise ShapeError(f"guidance must be [B, D, {', '.join(axes)}], got {list(guidance.shape)}.")
    check_floating(guidance=guidance)
    D = guidance.shape[1]
    if smoothing is not None:
        sides = {1: "[k]", 2: "[kh, kw]"}.get(len(axes))
        if sides is None:
            raise ShapeError("smoothing of a volume's centre is not known. Leave smoothing out.")
        if smoothing.dim() != len(axes) or any(k % 2 == 0 for k in smoothing.shape):
            raise ShapeError(
                f"smoothing must be {sides} of odd sides, got {list(smoothing.shape)}."
            )
    for name, value in (("alpha", alpha), ("lambd", lambd)):
        shape = list(value.shape) if isinstance(value, Tensor) else []
        if shape and not (channel_wise and shape == [D]):
            raise ShapeError(
                f"{name} must be a number, or [D] = [{D}] with channel_wise=True, got {shape}."
            )


def _check_scalars(**numbers: float | Tensor) -> None:
    for name, value in numbers.items():
        # A vector would broadcast along the width of the image.
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ShapeError(f"{name} must be a number or a scalar, got {list(value.shape)}.")


def _check_mask(mask: Tensor | None, guidance: Tensor, window: AnyWindow) -> None:
    """Raise unless the mask is one of the guidance's pixels or of the window's taps."""
    if mask is None:
        return
    if isinstance(window, VolumeWindow):
        raise ShapeError("a mask of a volume is not known. Leave mask out.")
    B, _, *size = guidance.shape
    pixels = (1, *size)
    taps = (1, window.taps, *window.output_size(*size))
    known = mask.dim() in (len(pixels) + 1, len(taps) + 1)
    if known and mask.shape[0] in (1, B) and mask.shape[1:] in (pixels, taps):
        return
    places, outputs, each = {
        1: ("L", "L_out", "K"),
        2: ("H, W", "H_out, W_out", "KH*KW"),
    }[len(size)]
    raise ShapeError(
        f"mask must be [B, 1, {places}] = {[B, *pixels]} or [B, 1, {each}, {outputs}] = "
        f"{[B, *taps]}, got {list(mask.shape)}."
    )
