"""`PacConv2d`: a convolution whose taps are weighted at each pixel by an adapting kernel."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import GuidanceError
from pacswap.nn.kernel import AdaptingKernel
from pacswap.ops.window import Padding, Size2, Window, make_window


class PacConv2d(nn.Conv2d):
    """Pixel-adaptive convolution (Su et al., CVPR 2019): y_p = b + Σ_q K_a(f_p, f_q)·W[p−q]·v_q.

    K_a = 1 + blend·(K − 1): with `blend` = 1, the default here, the layer is the paper's; with 0,
    where surgery starts, it is the plain convolution, exactly, and `blend` has a gradient there.
    `weight` and `bias` are those of `torch.nn.Conv2d`, under the same `state_dict` keys; what is
    added is `blend` and `adapting_kernel.log_bandwidth`.

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
        form: `"gaussian"`.
        distance: `"sum"` (the paper's) or `"mean"` of the squared differences over channels.
        bandwidth: where the learnable bandwidth starts; positive, in units of the guidance.
        standardize: bring each guidance channel of each image to mean 0 and variance 1 first.
        normalize: `"none"`, `"sum"` (the paper's) or `"mean"` (weight-preserving).
        blend: where the learnable blend starts.

    Example:
        >>> layer = PacConv2d(8, 16, 3, padding=1)
        >>> layer(torch.rand(1, 8, 32, 32), torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """

    adapting_kernel: AdaptingKernel | None

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
        form: Literal["gaussian"] = "gaussian",
        distance: Literal["sum", "mean"] = "sum",
        bandwidth: float = 1.0,
        standardize: bool = False,
        normalize: Literal["none", "sum", "mean"] = "none",
        blend: float = 1.0,
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
        self.blend = nn.Parameter(torch.full((), float(blend), device=device, dtype=dtype))
        self.adapting_kernel = AdaptingKernel(
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            form=form,
            distance=distance,
            bandwidth=bandwidth,
            standardize=standardize,
            normalize=normalize,
            device=device,
            dtype=dtype,
        )
        # False inside `pacswap.disabled`: the layer is then the plain convolution.
        self.enabled = True
        # Set by surgery, for the message of a call that forgets the guidance.
        self.guided_by: str | None = None

    @property
    def window(self) -> Window:
        """The geometry of this layer."""
        return make_window(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )

    def forward(
        self, input: Tensor, guidance: Tensor | None = None, *, kernel: Tensor | None = None
    ) -> Tensor:
        """Convolve `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C_in, H, W] (or unbatched, like its companions).
            guidance: f, [B, D, H, W], at the resolution of `input`.
            kernel: K, [B, 1, KH*KW, H_out, W_out], instead of `guidance`.

        Returns:
            [B, C_out, H_out, W_out].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if not self.enabled:
            return self._conv_forward(input, self.weight, self.bias)
        if input.dim() == 3:
            batched = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel))
            guidance, kernel = batched
            return self.forward(input.unsqueeze(0), guidance, kernel=kernel).squeeze(0)
        kernel = self._kernel(guidance, kernel)
        blended = ops.blended(kernel, self.blend).to(kernel.dtype)
        if self._is_plain():
            output = self._conv_forward(input, self.weight, self.bias)
            if not (torch.is_grad_enabled() and blended.requires_grad):
                return output
            return ops.attach_kernel_gradient(
                output,
                input,
                blended.to(input.dtype),
                self.weight,
                window=self.window,
                groups=self.groups,
            )
        return ops.pac_conv2d(
            input,
            blended.to(input.dtype),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

    def _kernel(self, guidance: Tensor | None, kernel: Tensor | None) -> Tensor:
        if guidance is not None and kernel is not None:
            raise GuidanceError("PacConv2d takes a guidance or a kernel, got both. Leave one out.")
        if kernel is not None:
            return kernel
        if guidance is None:
            raise GuidanceError(self._missing_guidance())
        if self.adapting_kernel is None:
            raise GuidanceError(
                "this PacConv2d shares the adapting kernel of another layer and has none of its "
                "own. Call it with kernel=…"
            )
        return self.adapting_kernel(guidance)

    def _missing_guidance(self) -> str:
        if self.guided_by is None:
            return "PacConv2d was called without a guidance. Call it as layer(input, guidance)."
        return (
            f"{self.guided_by} was called on a path through the model that does not compute its "
            "guidance. Call the model itself, or use `with pacswap.disabled(model):` to run that "
            "path with plain convolutions."
        )

    def _is_plain(self) -> bool:
        """Whether `blend` is exactly 0: the plain convolution is the answer to the last bit.

        Asked on the CPU only: elsewhere looking at a value would stall the device, and under a
        compiler there is no value to look at.
        """
        if self.blend.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return type(self.blend) in (nn.Parameter, Tensor) and self.blend.detach().item() == 0

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        form: Literal["gaussian"] = "gaussian",
        distance: Literal["sum", "mean"] = "sum",
        bandwidth: float = 1.0,
        standardize: bool = False,
        normalize: Literal["none", "sum", "mean"] = "none",
        blend: float = 0.0,
        own_kernel: bool = True,
    ) -> PacConv2d:
        """The pixel-adaptive layer with a convolution's weights; `blend` starts at 0.

        The parameters are the convolution's own objects, not copies; mode, device and dtype are
        kept.

        Args:
            conv: a `torch.nn.Conv2d`.
            form: as for the class, like the next four.
            distance: over channels.
            bandwidth: of the kernel.
            standardize: the guidance.
            normalize: the kernel.
            blend: where the learnable blend starts.
            own_kernel: False for a layer that is always called with `kernel=`.
        """
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            # On meta: nothing is initialised and no random number consumed.
            device="meta",
            form=form,
            distance=distance,
            bandwidth=bandwidth,
            standardize=standardize,
            normalize=normalize,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.blend = nn.Parameter(conv.weight.new_full((), blend))
        if own_kernel:
            assert layer.adapting_kernel is not None
            layer.adapting_kernel.log_bandwidth = nn.Parameter(
                conv.weight.new_full((), math.log(bandwidth))
            )
        else:
            layer.adapting_kernel = None
        return layer.train(conv.training)

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution with this layer's weights as they are now (its own objects)."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
        )
        conv.weight, conv.bias = self.weight, self.bias
        return conv.train(self.training)
