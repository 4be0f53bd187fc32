"""The adapting kernel as a module: `ops.adapting_kernel` with a learnable bandwidth."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.ops.kernel import check_options
from pacswap.ops.window import Padding, Size2, Window, make_window


class AdaptingKernel(nn.Module):
    """K = exp(−½·d²/bandwidth²) of a guidance (Su et al., CVPR 2019, eq. 3), for one geometry.

    One module serves all layers that share guidance, geometry and resolution. The bandwidth is a
    parameter, `log_bandwidth`, kept positive by its logarithm.

    Args:
        kernel_size: KH, KW.
        stride: as in `torch.nn.Conv2d`, like the next three.
        padding: pixels, `"same"` or `"valid"`.
        dilation: pixels between taps.
        padding_mode: how the guidance is padded.
        form: `"gaussian"`.
        distance: `"sum"` (the paper's) or `"mean"` of the squared differences over channels.
        bandwidth: where the learnable bandwidth starts; positive, in units of the guidance.
        standardize: bring each channel of each image to mean 0 and variance 1 first.
        normalize: `"none"`, `"sum"` (the paper's) or `"mean"` (weight-preserving).
        device: of the parameter.
        dtype: of the parameter.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> AdaptingKernel(3, padding=1)(torch.rand(1, 4, 8, 8)).shape
        torch.Size([1, 1, 9, 8, 8])
    """

    def __init__(
        self,
        kernel_size: Size2,
        *,
        stride: Size2 = 1,
        padding: Padding = 0,
        dilation: Size2 = 1,
        padding_mode: str = "zeros",
        form: Literal["gaussian"] = "gaussian",
        distance: Literal["sum", "mean"] = "sum",
        bandwidth: float = 1.0,
        standardize: bool = False,
        normalize: Literal["none", "sum", "mean"] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(form=form, distance=distance, normalize=normalize, bandwidth=bandwidth)
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        self.form, self.distance = form, distance
        self.standardize, self.normalize = standardize, normalize
        _ = self.window  # like the options, the geometry is checked now, not at the first call
        # False inside `pacswap.disabled`: nothing is computed.
        self.enabled = True
        self.log_bandwidth = nn.Parameter(
            torch.full((), math.log(bandwidth), device=device, dtype=dtype)
        )

    @property
    def window(self) -> Window:
        """The geometry."""
        return make_window(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )

    @property
    def bandwidth(self) -> Tensor:
        """The width of the kernel, a positive scalar tensor, in units of the guidance."""
        return self.log_bandwidth.exp()

    def forward(self, guidance: Tensor | None) -> Tensor | None:
        """The adapting kernel, [B, 1, KH*KW, H_out, W_out], of a guidance [B, D, H, W].

        None inside `pacswap.disabled`.
        """
        if not self.enabled or guidance is None:
            return None
        return ops.adapting_kernel(
            guidance,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            form=self.form,
            distance=self.distance,
            # In the kernel's own precision: a bandwidth in half precision would be rounded twice.
            bandwidth=self.log_bandwidth.to(ops.compute_dtype(guidance.dtype)).exp(),
            standardize=self.standardize,
            normalize=self.normalize,
        )

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        names = ["kernel_size", "stride", "padding", "dilation", "padding_mode", "form"]
        names += ["distance", "standardize", "normalize"]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
