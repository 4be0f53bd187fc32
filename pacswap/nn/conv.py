"""`PacConv2d`: a convolution whose taps are weighted at each pixel by an adapting kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError
from pacswap.nn.adaptive import MASKED
from pacswap.nn.adaptive_conv import AdaptiveConv
from pacswap.nn.kernel import KernelOptions
from pacswap.ops.window import Padding, Size2, Window, make_window

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PacConv2d(AdaptiveConv, nn.Conv2d):
    """Pixel-adaptive convolution (Su et al., CVPR 2019): y_p = b + Σ_q K_a(f_p, f_q)·W[p−q]·v_q.

    K_a = 1 + blend·(K − 1): with `blend` = 1, the default here, the layer is the paper's; with 0,
    where surgery starts, it is the plain convolution, exactly, and `blend` has a gradient there.
    `weight` and `bias` are those of `torch.nn.Conv2d`, under the same `state_dict` keys; what is
    added is `blend` and `adapting_kernel.…`.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: KH, KW.
        stride: as in `torch.nn.Conv2d`, like all up to `dtype`.
        padding: pixels, `"same"` or `"valid"`.
        dilation: pixels between taps.
        groups: C_in and C_out are divided into so many groups.
        bias: whether there is one.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`; for the guidance too.
        device: of the parameters.
        dtype: of the parameters.
        shared_filters: one spatial filter, [1, 1, KH, KW], for all channels, which are not mixed;
            C_out = C_in, groups 1 and no bias.
        blend: where the learnable blend starts.
        **kernel_options: how K is made: `form`, `alpha`, `lambd`, `asymmetric`, `smoothing`,
            `smoothing_size`, `channel_wise`, `distance`, `bandwidth`, `standardize`, `normalize`
            and `learnable`, as for `AdaptingKernel`; `form="external"` makes none, and the layer
            is called with `kernel=`. With `channel_wise` the guidance has C_in channels.
            `recompute=True` is for the whole layer: it keeps its input and K for the backward pass
            and computes the rest again there, for less memory and more time.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> layer = PacConv2d(8, 16, 3, padding=1)
        >>> layer(torch.rand(1, 8, 32, 32), torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Padding = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shared_filters: bool = False,
        blend: float = 1.0,
        **kernel_options: Unpack[KernelOptions],
    ) -> None:
        if shared_filters and (in_channels != out_channels or groups != 1 or bias):
            raise ShapeError(
                "shared_filters mixes no channels: it needs out_channels = in_channels, groups=1 "
                f"and bias=False, got {in_channels} → {out_channels}, groups={groups}, bias={bias}."
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            in_channels if shared_filters else groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.shared_filters = shared_filters
        if shared_filters:
            self.weight = nn.Parameter(self.weight.detach()[:1].clone())
        self._start(blend, kernel_options)

    @property
    def window(self) -> Window:
        """The geometry of this layer."""
        made = make_window(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )
        return replace(made.unpadded, same=True) if self._variant.same(self) else made

    def _filters(self) -> Tensor:
        # A method: torch.compile cannot look into a property that is reached through `super()`.
        if self.shared_filters:
            return self.weight.expand(self.in_channels, -1, -1, -1)
        return super()._filters()

    def _convolved(self, input: Tensor) -> Tensor:
        if self.shared_filters:
            return self._conv_forward(input, self.filters, self.bias)
        return super()._convolved(input)

    @overload
    def forward(
        self, input: Tensor, guidance: Tensor | None = None, *, kernel: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def forward(
        self, input: Tensor, guidance: Tensor | None = None, *, mask: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        input: Tensor,
        guidance: Tensor | None = None,
        *,
        kernel: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Convolve `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C_in, H, W] (or unbatched, like its companions).
            guidance: f, [B, D, H, W], at the resolution of `input`.
            kernel: K, [B, 1 or C_in, KH*KW, H_out, W_out], instead of `guidance`.
            mask: [B, 1, H, W], above 0 where the input is valid; with `guidance` only. An output
                that sees nothing valid is 0.

        Returns:
            [B, C_out, H_out, W_out]; with a mask, that and the output's mask [B, 1, H_out, W_out].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if input.dim() == 3:
            given = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel, mask))
            guidance, kernel, mask = given
            made = self.forward(input.unsqueeze(0), guidance, kernel=kernel, mask=mask)  # type: ignore[call-overload]
            return made.squeeze(0) if mask is None else tuple(t.squeeze(0) for t in made)
        if mask is not None:
            return self._masked(input, guidance, kernel, mask)
        return super().forward(input, guidance, kernel=kernel)

    def _masked(
        self, input: Tensor, guidance: Tensor | None, kernel: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        valid = ops.valid_taps(mask, self.window)
        H, W = mask.shape[-2:]
        ones = input.new_ones(input.shape[0], 1, 1, 1, 1)
        blended = ops.masked(ones, valid, "none", self.window, (H, W))
        if self.enabled:
            if kernel is not None or guidance is None:
                raise GuidanceError(MASKED)
            made = self._kernel(guidance, None, mask)
            # Between the masked convolution and the masked PAC, so that taps stay masked.
            blended = self._toward(blended.expand_as(made), made)
        seen = valid.any(2)
        # What is not valid may be anything, NaN too.
        filled = input.masked_fill(mask <= 0, 0)
        output = ops.convolve(
            filled, blended, self.filters, self.bias, self.window, self.groups, "auto"
        )
        return output * seen, seen.to(input.dtype)

    @classmethod
    def from_conv(
        cls,
        conv: _ConvNd,
        *,
        blend: float = 0.0,
        own_kernel: bool = True,
        **kernel_options: Unpack[KernelOptions],
    ) -> Self:
        """As `AdaptiveConv.from_conv`."""
        layer = super().from_conv(conv, blend=blend, own_kernel=own_kernel, **kernel_options)
        layer.shared_filters = False
        return layer

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution with this layer's weights as they are now.

        The parameters are the layer's own objects, but for a shared filter, which is repeated.
        """
        conv = super().to_conv()
        if self.shared_filters:
            conv.weight = nn.Parameter(self.filters.detach().clone(), self.weight.requires_grad)
        return conv
