"""The pixel-adaptive convolution."""

from __future__ import annotations

from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.ops import eager
from pacswap.ops.backends import Backend, choose
from pacswap.ops.precision import autocast_to, check_floating
from pacswap.ops.window import Padding, Size2, Window, make_window


def pac_conv2d(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    backend: Backend = "auto",
) -> Tensor:
    """Convolve `input` with `weight`, each tap scaled at each pixel by the adapting kernel.

    y[b,o,p] = bias[o] + Σ_{q∈Ω(p)} Σ_c kernel[b,c,q−p,p] · weight[o,c,q−p] · input[b,c,q]
    (Su et al., CVPR 2019, eq. 3; docs/math.md for boundaries and stride)

    Args:
        input: v, [B, C_in, H, W], float.
        kernel: K, [B, 1, KH*KW, H_out, W_out], or [B, C_in, …] with a kernel for each input
            channel; the dtype and device of `input`; dimensionless, 1 leaves a tap as it is.
        weight: W, [C_out, C_in/groups, KH, KW], as in `torch.nn.Conv2d`, like the options below.
        bias: b, [C_out] or None.
        stride: pixels between outputs.
        padding: pixels, `"same"` or `"valid"`.
        dilation: pixels between taps.
        groups: C_in and C_out are divided into so many groups.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        backend: `"auto"`, `"reference"`, `"taps"` or `"eager"`; a named one runs or raises.

    Returns:
        [B, C_out, H_out, W_out], the dtype of `input`. `kernel` ≡ 1 gives `F.conv2d` up to
        rounding.

    Raises:
        ShapeError: the tensors disagree; the message lists every shape.
        BackendError: the named backend cannot run this call.

    Example:
        >>> import torch
        >>> input, kernel = torch.ones(1, 3, 8, 8), torch.ones(1, 1, 9, 8, 8)
        >>> pac_conv2d(input, kernel, torch.ones(16, 3, 3, 3), padding=1).shape
        torch.Size([1, 16, 8, 8])
    """
    window = make_window(
        _spatial(weight),
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
    )
    return convolve(input, kernel, weight, bias, window, groups, backend)


def convolve(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    backend: Backend,
) -> Tensor:
    """`pac_conv2d` of a window that is made already: the one way into the backends."""
    input, kernel, weight, bias = _checked(input, kernel, weight, bias, window, groups)
    return choose(backend).pac_conv2d(input, kernel, weight, bias, window, groups)


def attach_kernel_gradient(
    output: Tensor, input: Tensor, kernel: Tensor, weight: Tensor, *, window: Window, groups: int
) -> Tensor:
    """A plain convolution's `output`, bit for bit, with the gradient of a kernel that is 1.

    Args:
        output: what `F.conv2d` gave for `input` and `weight`, [B, C_out, H_out, W_out].
        input: [B, C_in, H, W].
        kernel: [B, 1, KH*KW, H_out, W_out], 1 everywhere.
        weight: [C_out, C_in/groups, KH, KW].
        window: the convolution's geometry.
        groups: the convolution's groups.
    """
    input, kernel, weight, _ = _checked(input, kernel, weight, None, window, groups)
    return eager.attach_kernel_gradient(output, input, kernel, weight, window, groups)


def _spatial(weight: Tensor) -> tuple[int, int]:
    if weight.dim() != 4:
        raise ShapeError(f"weight must be [C_out, C_in/groups, KH, KW], got {list(weight.shape)}.")
    return weight.shape[2], weight.shape[3]


def _checked(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype, or a ShapeError with every shape."""
    cast = autocast_to(input, input, kernel, weight, bias)
    input, kernel, weight, bias = cast  # type: ignore[assignment]
    check_floating(input=input, kernel=kernel, weight=weight, bias=bias)
    faults = []
    if input.dim() != 4:
        faults.append("input must be [B, C_in, H, W]")
    elif groups < 1 or weight.shape[0] % groups or input.shape[1] != weight.shape[1] * groups:
        faults.append("C_in must be groups · weight.shape[1], and C_out divisible by groups")
    else:
        size = window.output_size(input.shape[-2], input.shape[-1])
        wanted = (input.shape[0], 1, window.taps, *size)
        channel_wise = (input.shape[0], input.shape[1], window.taps, *size)
        if tuple(kernel.shape) not in (wanted, channel_wise):
            faults.append(f"kernel must be [B, 1, KH*KW, H_out, W_out] = {list(wanted)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        faults.append(f"bias must be [C_out] = [{weight.shape[0]}]")
    if faults:
        shapes = {"input": input, "kernel": kernel, "weight": weight, "bias": bias}
        listed = ", ".join(f"{n} {list(t.shape)}" for n, t in shapes.items() if t is not None)
        raise ShapeError(
            f"{'; '.join(faults)}. Got {listed}, groups={groups}, stride={window.stride}, "
            f"dilation={window.dilation}, padding={window.pad} (left, right, top, bottom)."
        )
    return input, kernel, weight, bias
