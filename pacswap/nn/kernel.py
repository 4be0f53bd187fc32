"""The adapting kernel as a module: `ops.adapting_kernel` with its learnable numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError, nearest_hint
from pacswap.nn.recompute import recomputed
from pacswap.ops.dimensions import AnyWindow, SequenceWindow, VolumeWindow, any_window
from pacswap.ops.kernel import check_options
from pacswap.ops.window import Padding, Size2

SMOOTHINGS = ("none", "gaussian", "box", "learned")


class KernelOptions(TypedDict, total=False):
    """What an adapting kernel can be, beside its geometry; the arguments of `AdaptingKernel`.

    A layer takes one form more, `"external"`: it makes no kernel and is called with `kernel=`.
    """

    form: Literal["gaussian", "laplacian", "inverse", "constant", "external"]
    alpha: float
    lambd: float
    asymmetric: bool
    smoothing: Literal["none", "gaussian", "box", "learned"]
    smoothing_size: int
    channel_wise: bool
    distance: Literal["sum", "mean"]
    bandwidth: float
    standardize: bool
    normalize: Literal["none", "sum", "mean"]
    learnable: bool
    recompute: bool


class AdaptingKernel(nn.Module):
    """K of a guidance (Su et al., CVPR 2019, section 3), for one geometry.

    One module serves all layers that share guidance, geometry and resolution. What it learns:
    `log_bandwidth` (positive by its logarithm), `alpha` and `lambd` of the inverse form, and
    `smoothing_filter` where the smoothing is learned. The constant form has nothing to learn.

    Args:
        kernel_size: KH, KW; (K,) of a sequence or (KT, KH, KW) of a volume; or a window, which
            has the next four options too.
        stride: as in `torch.nn.Conv2d`, like the next three.
        padding: pixels, `"same"` or `"valid"`.
        dilation: pixels between taps.
        padding_mode: how the guidance is padded.
        form: `"gaussian"`, `"laplacian"`, `"inverse"` or `"constant"` (K ≡ 1).
        alpha: where α of the inverse form starts.
        lambd: where λ of the inverse form starts.
        asymmetric: in the inverse form, only what exceeds the centre counts.
        smoothing: of the centre's features: `"none"`, `"gaussian"` (¼ ½ ¼), `"box"`, or `"learned"`
            (starts as a box). Not of a volume.
        smoothing_size: side of the box or of the learned filter; odd.
        channel_wise: a kernel for each channel of the guidance instead of one for all.
        channels: D; with `channel_wise` and the inverse form, α and λ are then [D].
        distance: `"sum"` (the paper's) or `"mean"` of the differences over channels.
        bandwidth: where the bandwidth starts; positive, in units of the guidance.
        standardize: bring each channel of each image to mean 0 and variance 1 first.
        normalize: `"none"`, `"sum"` (the paper's) or `"mean"` (weight-preserving).
        learnable: False keeps bandwidth, α and λ as buffers.
        recompute: keep the guidance alone for the backward pass and compute distances again there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> AdaptingKernel(3, padding=1)(torch.rand(1, 4, 8, 8)).shape
        torch.Size([1, 1, 9, 8, 8])
    """

    recompute: bool = False  # on the class too, for what an earlier version pickled
    window: Any  # one of ops.AnyWindow; which one, its owner knows
    log_bandwidth: Tensor
    alpha: Tensor
    lambd: Tensor
    smoothing_filter: Tensor | None

    def __init__(
        self,
        kernel_size: Size2 | AnyWindow,
        *,
        stride: Size2 = 1,
        padding: Padding = 0,
        dilation: Size2 = 1,
        padding_mode: str = "zeros",
        form: Literal["gaussian", "laplacian", "inverse", "constant"] = "gaussian",
        alpha: float = 0.0,
        lambd: float = -1.0,
        asymmetric: bool = False,
        smoothing: Literal["none", "gaussian", "box", "learned"] = "none",
        smoothing_size: int = 3,
        channel_wise: bool = False,
        channels: int | None = None,
        distance: Literal["sum", "mean"] = "sum",
        bandwidth: float = 1.0,
        standardize: bool = False,
        normalize: Literal["none", "sum", "mean"] = "none",
        learnable: bool = True,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(
            form=form,
            distance=distance,
            normalize=normalize,
            bandwidth=bandwidth,
            alpha=alpha,
            lambd=lambd,
            asymmetric=asymmetric,
        )
        self.window = any_window(
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
        )
        self.form, self.distance, self.asymmetric = form, distance, asymmetric
        self.standardize, self.normalize, self.channel_wise = standardize, normalize, channel_wise
        self.recompute = recompute
        # False inside `pacswap.disabled`: nothing is computed.
        self.enabled = True
        wide = () if channels is None or not channel_wise else (channels,)
        numbers: dict[str, tuple[tuple[int, ...], float]] = {}
        if form != "constant":
            numbers["log_bandwidth"] = ((), math.log(bandwidth))
        if form == "inverse":
            numbers |= {"alpha": (wide, alpha), "lambd": (wide, lambd)}
        for name, (shape, value) in numbers.items():
            self._hold(name, torch.full(shape, value, device=device, dtype=dtype), learnable)
        self._smooth(smoothing, smoothing_size, device, dtype)

    def _smooth(
        self,
        smoothing: str,
        size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Add the filter of the centre's features: a parameter where it is learned."""
        if smoothing not in SMOOTHINGS:
            raise ShapeError(
                f"smoothing={smoothing!r} is unknown. {nearest_hint(smoothing, SMOOTHINGS)}"
            )
        if smoothing != "none" and isinstance(self.window, VolumeWindow):
            raise ShapeError(f"smoothing of a volume's centre is not known, got {smoothing!r}.")
        self.smoothing = smoothing
        filter = None
        if smoothing != "none" and self.form != "constant":
            kind: Literal["gaussian", "box"] = "gaussian" if smoothing == "gaussian" else "box"
            filter = ops.smoothing_filter(kind, size)
            if isinstance(self.window, SequenceWindow):
                filter = filter.sum(0)
            filter = filter.to(device=device, dtype=dtype or torch.get_default_dtype())
        if smoothing == "learned" and filter is not None:
            self.smoothing_filter = nn.Parameter(filter)
        else:
            self.register_buffer("smoothing_filter", filter, persistent=False)

    def _hold(self, name: str, value: Tensor, learnable: bool) -> None:
        if learnable:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def bandwidth(self) -> Tensor:
        """The width of the kernel, a positive scalar tensor, in units of the guidance."""
        return self.log_bandwidth.exp()

    def forward(self, guidance: Tensor | None, *, mask: Tensor | None = None) -> Tensor | None:
        """The adapting kernel of a guidance.

        Args:
            guidance: f, [B, D, H, W]; [B, D, L] or [B, D, T, H, W] where the window is of a
                sequence or a volume.
            mask: as in `ops.adapting_kernel`, above 0 where the input is valid.

        Returns:
            K, [B, 1 or D, KH*KW, H_out, W_out]; None inside `pacswap.disabled`, and where all
            layers rest that it is for.
        """
        if not self.enabled or guidance is None:
            return None
        if self.recompute:
            return recomputed(self._made, guidance, mask)
        return self._made(guidance, mask)

    def _made(self, guidance: Tensor, mask: Tensor | None) -> Tensor:
        numbers: dict[str, Any] = {}
        if self.form != "constant":
            # In the kernel's precision: a bandwidth in half precision would be rounded twice.
            wide = ops.compute_dtype(guidance.dtype)
            numbers["bandwidth"] = self.log_bandwidth.to(wide).exp()
        if self.form == "inverse":
            numbers |= {"alpha": self.alpha, "lambd": self.lambd, "asymmetric": self.asymmetric}
        smoothing = self.smoothing_filter
        if smoothing is not None and self.smoothing == "box":
            # Of sum 1 again, where a half precision has rounded it.
            smoothing = smoothing.to(ops.compute_dtype(guidance.dtype))
            smoothing = smoothing / smoothing.sum()
        return ops.adapting_kernel(
            guidance,
            self.window,
            form=self.form,
            smoothing=smoothing,
            channel_wise=self.channel_wise,
            mask=mask,
            distance=self.distance,
            standardize=self.standardize,
            normalize=self.normalize,
            **numbers,
        )

    def distances(self, guidance: Tensor) -> Tensor:
        """How far each tap's features are from the centre's: what the bandwidth divides.

        Taps outside the guidance are left out where it is large enough for that.

        Args:
            guidance: f, as in `forward`.

        Returns:
            d² (d₁ in the laplacian form), [B, 1 or D, KH*KW, H_out, W_out], in float32 or better;
            standardised and averaged as the kernel is.
        """
        features = guidance.to(ops.compute_dtype(guidance.dtype))
        if self.standardize:
            features = ops.standardized(features)
        window = self.window
        reach = [d * (k - 1) for d, k in zip(window.dilation, window.kernel_size, strict=True)]
        fits = all(side > r for side, r in zip(features.shape[2:], reach, strict=True))
        distances = ops.tap_distance(
            features,
            window.unpadded if fits else window,
            measure="absolute" if self.form == "laplacian" else "square",
            channel_wise=self.channel_wise,
            smoothing=self.smoothing_filter,
        )
        averaged = self.distance == "mean" and not self.channel_wise
        return distances / features.shape[1] if averaged else distances

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        geometry = ("kernel_size", "stride", "pad", "dilation", "padding_mode")
        words = [f"{name}={getattr(self.window, name)!r}" for name in geometry]
        names = ["form", "distance", "standardize", "normalize", "smoothing", "channel_wise"]
        names += ["recompute"] if self.recompute else []
        return ", ".join(words + [f"{name}={getattr(self, name)!r}" for name in names])


def is_external(options: KernelOptions, layer: str) -> bool:
    """Whether a layer with these options makes no kernel of its own.

    Raises:
        TypeError: an option is unknown.
    """
    known = KernelOptions.__annotations__
    for name in options:
        if name not in known:
            hint = nearest_hint(name, known)
            raise TypeError(f"{layer} got an unexpected option {name!r}. {hint}".rstrip())
    return options.get("form") == "external"


def kernel_for(
    layer: str, window: AnyWindow, options: KernelOptions, **made: Any
) -> AdaptingKernel | None:
    """The adapting kernel of a layer with these options; None in the external form.

    Args:
        layer: its class, for messages.
        window: its geometry.
        options: of the kernel.
        **made: channels, device and dtype.

    Raises:
        TypeError: an option is unknown.
        ShapeError: an option is out of range.
    """
    if is_external(options, layer):
        return None
    given: dict[str, Any] = {**options}
    return AdaptingKernel(window, **made, **given)


class TransposedKernel(AdaptingKernel):
    """K of a guidance at output resolution, for a transposed convolution.

    A normalisation counts the pixels of the input only, not the zeros between them; `"mean"` then
    leaves a constant guidance at 1.

    Args:
        kernel_size: KH, KW.
        stride: as in `torch.nn.ConvTranspose2d`, like the next three.
        padding: what is cut from each side of the output.
        output_padding: pixels added at its right and bottom.
        dilation: pixels between taps.
        **options: as for `AdaptingKernel`.

    Example:
        >>> TransposedKernel(4, stride=2, padding=1)(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 1, 16, 16, 16])
    """

    def __init__(
        self,
        kernel_size: Size2,
        *,
        stride: Size2 = 1,
        padding: Size2 = 0,
        output_padding: Size2 = 0,
        dilation: Size2 = 1,
        **options: Any,
    ) -> None:
        super().__init__(ops.guidance_window(kernel_size, dilation), **options)
        self.transposed, self.steps = ops.transposed_window(
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            dilation=dilation,
        )

    def forward(self, guidance: Tensor | None, *, mask: Tensor | None = None) -> Tensor | None:
        """The adapting kernel of a guidance.

        Args:
            guidance: f, [B, D, H_out, W_out].
            mask: [B, 1, H, W] of the input, above 0 where it is valid.

        Returns:
            K, [B, 1 or D, KH*KW, H_out, W_out]; None inside `pacswap.disabled`.

        Raises:
            ShapeError: the mask is not as large as the input.
        """
        if not self.enabled or guidance is None or (self.normalize == "none" and mask is None):
            return super().forward(guidance)
        kernel = super().forward(guidance, mask=self.seen(guidance, mask))
        if mask is None or kernel is None or self.normalize != "none":
            return kernel
        # What was made up for is the plane of the output; the zeros in it were never missing.
        inside = self.window.inside(guidance.shape[-2], guidance.shape[-1], guidance.device)
        plane = self.window.taps if inside is None else inside.sum(1, keepdim=True)[:, None]
        pixels = self.seen(guidance).sum(2, keepdim=True).to(kernel.dtype)
        return kernel * (pixels / plane)

    def seen(self, guidance: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which taps lie on a valid pixel of the input: bool [B or 1, 1, KH*KW, H_out, W_out].

        Args:
            guidance: [B, D, H_out, W_out]; its size counts.
            mask: [B, 1, H, W] of the input; None for one that is valid everywhere.

        Raises:
            ShapeError: the mask is not as large as the input.
        """
        left, right, top, bottom = self.transposed.pad
        rows, below = self._input_side(0, guidance.shape[-2], top, bottom)
        columns, beside = self._input_side(1, guidance.shape[-1], left, right)
        image = torch.ones(1, 1, rows, columns, device=guidance.device)
        if mask is not None:
            if mask.dim() != 4 or mask.shape[1:] != image.shape[1:]:
                size = f"[B, 1, {rows}, {columns}]"
                raise ShapeError(f"mask must be [B, 1, H, W] = {size}, got {list(mask.shape)}.")
            image = mask
        window = replace(self.transposed, pad=(left, left + beside, top, top + below))
        return ops.valid_taps(ops.insert_zeros(image, self.steps), window)

    def _input_side(self, axis: int, side: int, before: int, after: int) -> tuple[int, int]:
        """The side of the input for that of an output, and the output's padding.

        The output's padding of this call, which `output_size` may have set, is less than the
        stride; the layer's own can be more where the dilation is.
        """
        step = self.steps[axis]
        reach = self.transposed.dilation[axis] * (self.transposed.kernel_size[axis] - 1)
        own = after - before
        least = own if own >= step else 0
        bare = side - 1 - 2 * before + reach  # (side of the input − 1) · step + output padding
        count = (bare - least) // step + 1
        return count, bare - (count - 1) * step
