"""What the convolutions of sequences and of volumes have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.nn.adaptive import Adaptive
from pacswap.nn.kernel import KernelOptions, kernel_for
from pacswap.ops.dimensions import AnyWindow, any_window

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AdaptiveConv(Adaptive):
    """Mixin of a subclass of `nn.Conv1d` or `nn.Conv3d`, as `PacConv2d` is one of `nn.Conv2d`.

    Attributes:
        plain_type: the plain convolution.
    """

    plain_type: ClassVar[type[nn.Conv1d | nn.Conv3d]]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    weight: Tensor
    bias: Tensor | None
    training: bool

    @property
    def window(self) -> AnyWindow:
        """The geometry of this layer."""
        return any_window(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )

    def _start(self, blend: float, options: KernelOptions, *, own_kernel: bool = True) -> None:
        """Add what is adaptive, on the device and in the dtype of the weight."""
        kernel = None
        if own_kernel:
            made = {"device": self.weight.device, "dtype": self.weight.dtype}
            name, channels = type(self).__name__, self.in_channels
            kernel = kernel_for(name, self.window, options, channels=channels, **made)
        self._adapt(blend, kernel, self.weight)

    def forward(
        self, input: Tensor, guidance: Tensor | None = None, *, kernel: Tensor | None = None
    ) -> Tensor:
        """Convolve `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C_in, *size] (or unbatched, like its companions), with the size (L,) or
                (T, H, W).
            guidance: f, [B, D, *size].
            kernel: K, [B, 1 or C_in, taps, *output size], instead of `guidance`.

        Returns:
            [B, C_out, *output size].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if input.dim() == 1 + len(self.kernel_size):
            guidance, kernel = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel))
            return self.forward(input.unsqueeze(0), guidance, kernel=kernel).squeeze(0)
        if not self.enabled:
            return self._plain(input)
        kernel = self._kernel(guidance, kernel)
        blended = ops.blended(kernel, self.blend).to(input.dtype)
        window, groups = self.window, self.groups
        if not self._is_plain():
            return ops.convolve(input, blended, self.weight, self.bias, window, groups, "auto")
        output = self._plain(input)
        if not (torch.is_grad_enabled() and blended.requires_grad):
            return output
        return ops.attach_kernel_gradient(
            output, input, blended, self.weight, window=window, groups=groups
        )

    def _plain(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight, self.bias)  # type: ignore[attr-defined]

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv1d | nn.Conv3d,
        *,
        blend: float = 0.0,
        own_kernel: bool = True,
        **kernel_options: Unpack[KernelOptions],
    ) -> Self:
        """The pixel-adaptive layer with a convolution's weights; `blend` starts at 0.

        The parameters are the convolution's own objects, not copies; mode, device and dtype are
        kept.

        Args:
            conv: a convolution of as many axes.
            blend: where the learnable blend starts.
            own_kernel: False for a layer that is always called with `kernel=`.
            **kernel_options: as for the class.
        """
        # On meta: nothing is initialised and no random number consumed.
        layer: Any = cls(*_geometry(conv), device="meta")  # type: ignore[call-arg]
        layer.weight, layer.bias = conv.weight, conv.bias
        layer._start(blend, kernel_options, own_kernel=own_kernel)
        return layer.train(conv.training)

    def to_conv(self) -> nn.Conv1d | nn.Conv3d:
        """The plain convolution with this layer's weights as they are now, the same objects."""
        conv: Any = self.plain_type(*_geometry(self), device="meta")  # type: ignore[misc]
        conv.weight, conv.bias = self.weight, self.bias
        return conv.train(self.training)


def _geometry(conv: Any) -> tuple[Any, ...]:
    """The arguments of a convolution, in the order of its constructor."""
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )
