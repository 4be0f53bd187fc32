"""`PacConv3d`: a convolution of volumes whose taps are weighted at each frame and pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pacswap.nn.adaptive_conv import AdaptiveConv
from pacswap.nn.kernel import KernelOptions
from pacswap.ops.window import Padding, Size2

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PacConv3d(AdaptiveConv, nn.Conv3d):
    """Pixel-adaptive convolution of a volume: `PacConv2d` with time.

    y_p = b + Σ_q K_a(f_p, f_q)·W[p−q]·v_q with K_a = 1 + blend·(K − 1): the plain convolution,
    exactly, at `blend` = 0. It takes an input [B, C_in, T, H, W] and a guidance [B, D, T, H, W], or
    `kernel=K`, [B, 1 or C_in, KT*KH*KW, T_out, H_out, W_out].

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: KT, KH, KW.
        stride: as in `torch.nn.Conv3d`, like all up to `dtype`.
        padding: frames and pixels, `"same"` or `"valid"`.
        dilation: frames and pixels between taps.
        groups: C_in and C_out are divided into so many groups.
        bias: whether there is one.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`; for the guidance too.
        device: of the parameters.
        dtype: of the parameters.
        blend: where the learnable blend starts.
        **kernel_options: how K is made, as for `PacConv2d`;
            no smoothing.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> layer = PacConv3d(8, 16, 3, padding=1)
        >>> layer(torch.rand(1, 8, 4, 16, 16), torch.rand(1, 3, 4, 16, 16)).shape
        torch.Size([1, 16, 4, 16, 16])
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
        blend: float = 1.0,
        **kernel_options: Unpack[KernelOptions],
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._start(blend, kernel_options)
