"""Pixel-adaptive pooling: the convolution without weights and without a sum over channels."""

from __future__ import annotations

from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.ops.backends import Backend
from pacswap.ops.conv import convolve
from pacswap.ops.window import Padding, Size2, Window, make_window


def pac_pool2d(
    input: Tensor,
    kernel: Tensor,
    kernel_size: Size2 | Window,
    *,
    stride: Size2 | None = None,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
    ceil_mode: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """y[b,c,p] = Σ_{q∈Ω(p)} kernel[b,c,q−p,p] · input[b,c,q] (Su et al., CVPR 2019, section 3.3).

    Args:
        input: v, [B, C, H, W], float.
        kernel: K, [B, 1 or C, KH*KW, H_out, W_out]. Normalised by the sum (`normalize="sum"`) and
            constant it makes this the average over the window.
        kernel_size: KH, KW, or a `Window`, which has the next five options too.
        stride: pixels between outputs; the window's size by default, as in `F.avg_pool2d`.
        padding: pixels, `"same"` or `"valid"`.
        dilation: pixels between taps.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        ceil_mode: let a last window hang over the right and the bottom, as in `F.avg_pool2d`.
        backend: as in `pac_conv2d`.

    Returns:
        [B, C, H_out, W_out], the dtype of `input`.

    Raises:
        ShapeError: the tensors disagree; the message lists every shape.
        BackendError: the named backend cannot run this call.

    Example:
        >>> import torch
        >>> pac_pool2d(torch.ones(1, 3, 8, 8), torch.ones(1, 1, 4, 4, 4), 2).shape
        torch.Size([1, 3, 4, 4])
    """
    if isinstance(kernel_size, Window):
        if (stride, padding, dilation, padding_mode, ceil_mode) != (None, 0, 1, "zeros", False):
            raise ShapeError("a Window has stride, padding and dilation itself. Leave them out.")
        window = kernel_size
    else:
        window = make_window(
            kernel_size,
            stride=kernel_size if stride is None else stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            ceil=ceil_mode,
        )
    if input.dim() != 4:
        raise ShapeError(f"input must be [B, C, H, W], got {list(input.shape)}.")
    channels = input.shape[1]
    ones = input.new_ones(()).expand(channels, 1, *window.kernel_size)
    return convolve(input, kernel, ones, None, window, channels, backend)
