"""`PacConvTranspose2d`: a transposed convolution adapted to a guidance at output resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.nn.adaptive import Adaptive
from pacswap.nn.kernel import KernelOptions, TransposedKernel, is_external
from pacswap.ops.window import Size2

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PacConvTranspose2d(Adaptive, nn.ConvTranspose2d):
    """Pixel-adaptive transposed convolution (Su et al., CVPR 2019, section 3.2).

    Zeros are inserted between the pixels of the input; the result is convolved at stride 1 under a
    kernel K_a = 1 + blend·(K − 1), whose guidance has the output's resolution. At `blend` = 0 the
    layer is `torch.nn.ConvTranspose2d`, whose parameters it keeps.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: KH, KW.
        stride: as in `torch.nn.ConvTranspose2d`, like all up to `dtype`.
        padding: what is cut from each side of the output.
        output_padding: pixels added at its right and bottom.
        groups: C_in and C_out are divided into so many groups.
        bias: whether there is one.
        dilation: pixels between taps.
        device: of the parameters.
        dtype: of the parameters.
        blend: where the learnable blend starts.
        **kernel_options: how K is made, as for `AdaptingKernel`.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> layer = PacConvTranspose2d(8, 4, 4, stride=2, padding=1)
        >>> layer(torch.rand(1, 8, 16, 16), torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 4, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 = 0,
        output_padding: Size2 = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size2 = 1,
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
            output_padding,  # type: ignore[arg-type]
            groups,
            bias,
            dilation,  # type: ignore[arg-type]
            "zeros",
            device,
            dtype,
        )
        kernel = None
        if not is_external(kernel_options, type(self).__name__):
            kernel = self._make_kernel(device, dtype, kernel_options)
        self._adapt(blend, kernel, self.weight)

    def _make_kernel(
        self,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        options: KernelOptions,
    ) -> TransposedKernel:
        return TransposedKernel(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,  # type: ignore[arg-type]
            output_padding=self.output_padding,
            dilation=self.dilation,
            channels=self.in_channels,
            device=device,
            dtype=dtype,
            **options,
        )

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H_out, W_out) for an input of that size: what its guidance has to have."""
        window, steps = self._geometry(self.output_padding)
        return window.output_size((height - 1) * steps[0] + 1, (width - 1) * steps[1] + 1)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        guidance: Tensor | Sequence[int] | None = None,
        *,
        kernel: Tensor | None = None,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        """Upsample `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C_in, H, W] (or unbatched, like its companions).
            guidance: f, [B, D, H_out, W_out], at the resolution of the output. Numbers in this
                place are the `output_size`, as in `torch.nn.ConvTranspose2d`.
            kernel: K, [B, 1 or C_in, KH*KW, H_out, W_out], instead of `guidance`.
            output_size: as in `torch.nn.ConvTranspose2d`.

        Returns:
            [B, C_out, H_out, W_out].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if guidance is not None and not isinstance(guidance, Tensor):
            guidance, output_size = None, guidance if output_size is None else output_size
        asked = None if output_size is None else list(output_size)
        if not self.enabled:
            return super().forward(input, asked)
        if input.dim() == 3:
            given = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel))
            guidance, kernel = given
            made = self.forward(input.unsqueeze(0), guidance, kernel=kernel, output_size=asked)
            return made.squeeze(0)
        extra = self._output_padding(
            input,
            asked,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        kernel = self._kernel(guidance, kernel)
        blended = ops.blended(kernel, self.blend).to(input.dtype)
        options = {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": tuple(extra),
            "dilation": self.dilation,
            "groups": self.groups,
        }
        if not self._is_plain():
            return ops.pac_conv_transpose2d(input, blended, self.weight, self.bias, **options)  # type: ignore[arg-type]
        output = F.conv_transpose2d(input, self.weight, self.bias, **options)  # type: ignore[arg-type]
        if not (torch.is_grad_enabled() and blended.requires_grad):
            return output
        window, steps = self._geometry(tuple(extra))
        return ops.attach_kernel_gradient(
            output,
            ops.insert_zeros(input, steps),
            blended,
            ops.turned(self.weight, self.groups),
            window=window,
            groups=self.groups,
        )

    def _geometry(self, output_padding: tuple[int, ...]) -> tuple[ops.Window, tuple[int, int]]:
        return ops.transposed_window(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,  # type: ignore[arg-type]
            output_padding=output_padding,
            dilation=self.dilation,
        )

    @classmethod
    def from_conv(
        cls,
        conv: nn.ConvTranspose2d,
        *,
        blend: float = 0.0,
        own_kernel: bool = True,
        **kernel_options: Unpack[KernelOptions],
    ) -> PacConvTranspose2d:
        """The pixel-adaptive layer with a transposed convolution's weights.

        The parameters are the convolution's own objects, not copies; mode, device and dtype are
        kept.

        Args:
            conv: a `torch.nn.ConvTranspose2d`.
            blend: where the learnable blend starts.
            own_kernel: False for a layer that is always called with `kernel=`.
            **kernel_options: as for the class.
        """
        layer = cls(*_options(conv), device="meta")  # type: ignore[misc]
        layer.weight, layer.bias = conv.weight, conv.bias
        weight = conv.weight
        kernel = layer._make_kernel(weight.device, weight.dtype, kernel_options)
        layer._adapt(blend, kernel if own_kernel else None, weight)
        return layer.train(conv.training)

    def to_conv(self) -> nn.ConvTranspose2d:
        """The plain layer with this one's weights as they are now (its own objects)."""
        conv = nn.ConvTranspose2d(*_options(self), device="meta")  # type: ignore[misc]
        conv.weight, conv.bias = self.weight, self.bias
        return conv.train(self.training)


def _options(conv: nn.ConvTranspose2d) -> tuple[Any, ...]:
    """The positional arguments that make a layer of the same geometry."""
    if conv.padding_mode != "zeros":
        raise ShapeError(f"padding_mode must be 'zeros', got {conv.padding_mode!r}.")
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.output_padding,
        conv.groups,
        conv.bias is not None,
        conv.dilation,
    )
