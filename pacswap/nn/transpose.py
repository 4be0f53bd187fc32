"""`PacConvTranspose2d`: a transposed convolution adapted to a guidance at output resolution."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError
from pacswap.nn.adaptive import MASKED, Adaptive
from pacswap.nn.guidance import Like
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
        self._adapt(blend, kernel, self.weight, kernel_options)

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
        return self._reached((height, width), self.output_padding)

    def _reached(self, size: Sequence[int], output_padding: tuple[int, ...]) -> tuple[int, int]:
        window, steps = self._geometry(output_padding)
        return window.output_size((size[0] - 1) * steps[0] + 1, (size[1] - 1) * steps[1] + 1)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        guidance: Tensor | Sequence[int] | None = None,
        *,
        kernel: Tensor | None = None,
        output_size: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Any:
        """Upsample `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C_in, H, W] (or unbatched, like its companions).
            guidance: f, [B, D, H_out, W_out], at the resolution of the output. Numbers in this
                place are the `output_size`, as in `torch.nn.ConvTranspose2d`.
            kernel: K, [B, 1 or C_in, KH*KW, H_out, W_out], instead of `guidance`.
            output_size: as in `torch.nn.ConvTranspose2d`.
            mask: [B, 1, H, W], above 0 where the input is valid; with `guidance` only. An output
                that sees nothing valid is 0.

        Returns:
            [B, C_out, H_out, W_out]; with a mask, that and the output's mask [B, 1, H_out, W_out].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if guidance is not None and not isinstance(guidance, Tensor):
            guidance, output_size = None, guidance if output_size is None else output_size
        asked = None if output_size is None else list(output_size)
        if input.dim() == 3:
            given = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel, mask))
            guidance, kernel, mask = given
            made = self.forward(
                input.unsqueeze(0), guidance, kernel=kernel, output_size=asked, mask=mask
            )
            return made.squeeze(0) if mask is None else tuple(t.squeeze(0) for t in made)
        options = self._options(input, asked)
        if mask is not None:
            return self._masked(input, guidance, kernel, mask, options)
        if self.is_resting:
            return F.conv_transpose2d(input, self.weight, self.bias, **options)
        like = self._reached(input.shape[-2:], options["output_padding"])
        kernel = self._kernel(guidance, kernel, like=like)
        return self._again(functools.partial(self._adapted, options), input, kernel)

    def _adapted(self, options: dict[str, Any], input: Tensor, kernel: Tensor) -> Tensor:
        """PAC; at blend 0 the plain layer to the last bit, with the kernel's gradient."""
        if not self._is_plain():
            blended = self._blended(kernel, input.dtype)
            return ops.pac_conv_transpose2d(input, blended, self.weight, self.bias, **options)
        output = F.conv_transpose2d(input, self.weight, self.bias, **options)
        if not self._learns(kernel):
            return output
        blended = self._blended(kernel, input.dtype)
        window, steps = self._geometry(options["output_padding"])
        return ops.attach_kernel_gradient(
            output,
            ops.insert_zeros(input, steps),
            blended,
            ops.turned(self.weight, self.groups),
            window=window,
            groups=self.groups,
        )

    def _guided_like(self, input: Tensor, kwargs: Mapping[str, Any]) -> Like:
        extra = self._options(input, kwargs.get("output_size"))["output_padding"]
        return self._reached(input.shape[-2:], extra)

    def _options(self, input: Tensor, output_size: list[int] | None) -> dict[str, Any]:
        """What `F.conv_transpose2d` is told beside the tensors."""
        extra = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return {
            "stride": self.stride,
            "padding": self.padding,
            "output_padding": tuple(extra),
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def _masked(
        self,
        input: Tensor,
        guidance: Tensor | None,
        kernel: Tensor | None,
        mask: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        if kernel is not None or guidance is None:
            raise GuidanceError(MASKED)
        if not isinstance(self.adapting_kernel, TransposedKernel):
            self._kernel(guidance, None)  # raises: it has none
            raise AssertionError
        valid = self.adapting_kernel.seen(guidance, mask).to(input.dtype)
        pixels = self.adapting_kernel.seen(guidance).to(input.dtype).sum(2, keepdim=True)
        # Without adaptation the valid taps stand in for the others.
        blended = valid * (pixels / valid.sum(2, keepdim=True).clamp(min=1))
        blended = blended.expand(input.shape[0], -1, -1, -1, -1)
        if self.enabled:
            made = self._kernel(guidance, None, mask).to(input.dtype)
            blended = self._toward(blended.expand_as(made), made)
        seen = valid.amax(2)
        # What is not valid may be anything, NaN too.
        filled = input.masked_fill(mask <= 0, 0)
        output = ops.pac_conv_transpose2d(filled, blended, self.weight, self.bias, **options)
        return output * seen, seen

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
        layer._adapt(blend, kernel if own_kernel else None, weight, kernel_options)
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
