"""Joint upsampling: a low-resolution map brought to the resolution of an image that guides it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError, nearest_hint

WIDTHS = ("full", "lite")
_SIDE = 5  # of all filters


class _Plan(NamedTuple):
    """Output channels of each convolution, but those that `JointUpsample` is asked for."""

    target: tuple[int, ...]
    guidance: tuple[int, ...]  # before the last
    features: int  # of the guidance, for each stage
    stages: tuple[int, ...]
    head: int


_LITE = {
    4: _Plan((12, 16, 22), (12, 22), 12, (12, 16), 22),
    8: _Plan((12, 16, 16), (12, 16), 12, (12, 16, 16), 20),
    16: _Plan((8, 16, 16), (8, 16), 10, (8, 16, 16, 16), 16),
}


class JointUpsample(nn.Module):
    """The joint upsampling network of Su et al. (CVPR 2019, section 4.1).

    Three convolutions see the target, three the guidance; then log2(factor) transposed
    pixel-adaptive convolutions double the resolution, each under a K of its own share of the
    guidance's features (K = exp(−½‖f_p − f_q‖²), not normalised); two convolutions end it. All
    filters are 5×5. The layers are the paper's, with no blend and no bandwidth to learn, so the
    parameters are too: 183,489, 221,937 and 260,385 at 4, 8 and 16×, and 55,509, 56,273 and 55,777
    of the lite network.

    Args:
        factor: how much larger the output is; 2, 4, 8, 16, …, of the lite network 4, 8 or 16.
        channels: C of the target. A network of one channel takes any number of them and treats
            each by itself, as the paper does with the two of an optical flow.
        guidance_channels: C_g, 3 for a colour image.
        width: `"full"` (32 channels) or `"lite"`.

    Raises:
        ShapeError: the network does not exist with that factor or width.

    Example:
        >>> network = JointUpsample(4, width="lite")
        >>> network(torch.rand(1, 1, 16, 16), torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """

    def __init__(
        self,
        factor: int,
        channels: int = 1,
        guidance_channels: int = 3,
        width: Literal["full", "lite"] = "full",
    ) -> None:
        super().__init__()
        for name, count in (("channels", channels), ("guidance_channels", guidance_channels)):
            if count < 1:
                raise ShapeError(f"{name} must be at least 1, got {count}.")
        plan = _plan(factor, width)
        self.factor, self.channels, self.guidance_channels = factor, channels, guidance_channels
        self.width, self.features = width, plan.features
        shared = plan.features * len(plan.stages)
        ends = (plan.target[-1], *plan.stages)
        self.target = _convolutions((channels, *plan.target))
        self.guidance = _convolutions((guidance_channels, *plan.guidance, shared))
        self.stages = nn.ModuleList(
            _Doubling(c_in, c_out, _SIDE, 2, _SIDE // 2, 1) for c_in, c_out in pairwise(ends)
        )
        self.head = _convolutions((ends[-1], plan.head, channels))

    def forward(self, target: Tensor, guidance: Tensor) -> Tensor:
        """Upsample `target` to the resolution of `guidance`.

        Args:
            target: [B, C, H, W], in any unit; the published weights expect it to be 0..1.
            guidance: [B, C_g, factor·H, factor·W]; the published weights expect 0..1 RGB.

        Returns:
            [B, C, factor·H, factor·W], in the target's unit.

        Raises:
            ShapeError: the tensors disagree with the network or with each other.
        """
        _check(target, guidance, self.factor, self.channels, self.guidance_channels)
        B, C, H, W = target.shape
        apart = C // self.channels  # how many maps share one guidance
        output = self.target(target.reshape(B * apart, self.channels, H, W))
        shares = self.guidance(guidance).split(self.features, 1)
        for step, (stage, share) in enumerate(zip(self.stages, shares, strict=True), start=1):
            size = (H << step, W << step)
            if size != tuple(share.shape[-2:]):
                share = F.interpolate(share, size=size, mode="bilinear", align_corners=False)
            output = F.relu(stage(output, share))
        return self.head(output).reshape(B, C, H * self.factor, W * self.factor)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"factor={self.factor}, channels={self.channels}, "
            f"guidance_channels={self.guidance_channels}, width={self.width!r}"
        )


class JointBilateralUpsample(nn.Module):
    """Joint bilateral upsampling (Kopf et al., SIGGRAPH 2007) as a transposed PAC.

    y_p = Σ_q K(p, q)·v_q with K(p, q) ∝ exp(−½‖p − q‖²/σ_space² − ½‖f_p − f_q‖²/σ_color²), which
    sums to 1 over the input's pixels q inside the window. An input pixel stands for a block of
    factor × factor output pixels: it lies at its centre (as `F.interpolate` has it with
    `align_corners=False`), and its colour is read at the block's pixel (factor − 1)//2.

    Args:
        factor: how much larger the output is.
        kernel_size: side of the window, in pixels of the output; odd, `factor` or more.
        sigma_space: width in space, in pixels of the input.
        sigma_color: width in colour, in units of the guidance.
        learnable: whether the two widths (their logarithms) are parameters.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> upsample = JointBilateralUpsample(4, kernel_size=9, sigma_space=1, sigma_color=0.1)
        >>> upsample(torch.rand(1, 2, 16, 16), torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 2, 64, 64])
    """

    log_sigma_space: Tensor
    log_sigma_color: Tensor

    def __init__(
        self,
        factor: int,
        *,
        kernel_size: int,
        sigma_space: float,
        sigma_color: float,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if factor < 1:
            raise ShapeError(f"factor must be at least 1, got {factor}.")
        if kernel_size % 2 == 0 or kernel_size < factor:
            raise ShapeError(
                f"kernel_size must be odd and at least {factor + 1 - factor % 2}, so that every "
                f"window of factor={factor} holds a pixel of the input, got {kernel_size}."
            )
        self.factor, self.kernel_size = factor, kernel_size
        offset = (factor - 1) // 2
        self.padding, self.output_padding = kernel_size // 2 - offset, factor - 1 - 2 * offset
        for name, sigma in (("space", sigma_space), ("color", sigma_color)):
            if not (sigma > 0 and math.isfinite(sigma)):
                raise ShapeError(f"sigma_{name} must be positive and finite, got {sigma!r}.")
            value = torch.tensor(math.log(sigma))
            if learnable:
                self.register_parameter(f"log_sigma_{name}", nn.Parameter(value))
            else:
                self.register_buffer(f"log_sigma_{name}", value)

    def forward(self, target: Tensor, guidance: Tensor) -> Tensor:
        """Upsample `target` to the resolution of `guidance`.

        Args:
            target: v, [B, C, H, W].
            guidance: f, [B, D, factor·H, factor·W].

        Returns:
            [B, C, factor·H, factor·W]; each value lies between those of its window.

        Raises:
            ShapeError: the tensors disagree.
        """
        _check(target, guidance, self.factor, None, None)
        channels = target.shape[1]
        kernel = self._kernel(guidance, (target.shape[-2], target.shape[-1]))
        ones = target.new_ones(channels, 1, self.kernel_size, self.kernel_size)
        return ops.pac_conv_transpose2d(
            target,
            kernel.to(target.dtype),
            ones,
            stride=self.factor,
            padding=self.padding,
            output_padding=self.output_padding,
            groups=channels,
        )

    def _kernel(self, guidance: Tensor, size: tuple[int, int]) -> Tensor:
        """K, [B, 1, KH*KW, H_out, W_out], 0 where no pixel of the input is."""
        window = ops.guidance_window(self.kernel_size)
        transposed, steps = ops.transposed_window(
            self.kernel_size,
            stride=self.factor,
            padding=self.padding,
            output_padding=self.output_padding,
        )
        features = guidance.to(ops.compute_dtype(guidance.dtype))
        color = ops.tap_distance(features, window) / (2 * self.log_sigma_color).exp()
        space = self._squares(features) / (2 * self.log_sigma_space).exp()
        inserted = ops.inserted_mask(size, transposed, steps, guidance.device)
        seen = ops.valid_taps(inserted, window)  # [1, 1, KH*KW, H_out, W_out]
        # The normalisation is a softmax over the taps: far colours never make it 0/0.
        logits = -0.5 * (color + space[:, None, None])
        return logits.masked_fill(~seen, -math.inf).softmax(2)

    def _squares(self, like: Tensor) -> Tensor:
        """The squared distance of each tap from the window's centre, in input pixels, [KH*KW]."""
        reach = self.kernel_size // 2
        # The centre of a block of even side lies half a pixel beyond the pixel that stands for it.
        beyond = 0.5 * (1 - self.factor % 2)
        steps = torch.arange(-reach, reach + 1, device=like.device, dtype=like.dtype) + beyond
        squares = (steps / self.factor).square()
        return (squares[:, None] + squares).flatten()


class _Doubling(nn.ConvTranspose2d):
    """A transposed PAC as the paper has it: the parameters are the plain layer's."""

    def forward(self, input: Tensor, guidance: Tensor) -> Tensor:  # type: ignore[override]
        """[B·n, C_in, H, W] under a guidance [B, D, 2H, 2W] makes [B·n, C_out, 2H, 2W]."""
        kernel = ops.adapting_kernel(guidance, ops.guidance_window(self.kernel_size))
        apart = len(input) // len(kernel)
        if apart > 1:
            kernel = kernel.repeat_interleave(apart, 0)
        return ops.pac_conv_transpose2d(
            input,
            kernel.to(input.dtype),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,  # type: ignore[arg-type]
            output_padding=self.output_padding,
        )


def _convolutions(channels: Sequence[int]) -> nn.Sequential:
    """conv1, relu1, conv2, …: no ReLU after the last."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (c_in, c_out) in enumerate(pairwise(channels), start=1):
        if layers:
            layers[f"relu{number - 1}"] = nn.ReLU()
        layers[f"conv{number}"] = nn.Conv2d(c_in, c_out, _SIDE, padding=_SIDE // 2)
    return nn.Sequential(layers)


def _plan(factor: int, width: str) -> _Plan:
    if width not in WIDTHS:
        raise ShapeError(f"width={width!r} is unknown. {nearest_hint(str(width), WIDTHS)}")
    if width == "lite":
        if factor not in _LITE:
            raise ShapeError(
                f"the lite network exists for factor 4, 8 and 16, got {factor}. Use width='full'."
            )
        return _LITE[factor]
    if factor < 2 or factor & (factor - 1):
        raise ShapeError(
            f"factor must be a power of two from 2 on, got {factor}. JointBilateralUpsample takes "
            "any."
        )
    return _Plan((32, 32, 32), (32, 32), 16, (32,) * (factor.bit_length() - 1), 32)


def _check(
    target: Tensor, guidance: Tensor, factor: int, channels: int | None, features: int | None
) -> None:
    """Raise unless the guidance has `factor` times the size of the target.

    Raises:
        ShapeError: with both shapes.
    """
    if target.dim() != 4 or guidance.dim() != 4:
        raise ShapeError(
            "target must be [B, C, H, W] and guidance [B, C_g, H_out, W_out], got target "
            f"{list(target.shape)}, guidance {list(guidance.shape)}."
        )
    B, C, H, W = target.shape
    if channels is not None and channels not in (1, C):
        raise ShapeError(
            f"target must have the {channels} channels of the network, got {list(target.shape)}."
        )
    wanted = [B, guidance.shape[1] if features is None else features, H * factor, W * factor]
    if list(guidance.shape) != wanted:
        raise ShapeError(
            f"guidance must be {wanted} for a target {list(target.shape)} at factor={factor}, got "
            f"{list(guidance.shape)}. Resize or crop one of them."
        )
