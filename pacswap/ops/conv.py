"""The pixel-adaptive convolution of images, sequences and volumes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.ops import eager, taps, volume
from pacswap.ops.backends import Backend, Task, choose, why_not
from pacswap.ops.dimensions import (
    AnyWindow,
    SequenceWindow,
    VolumeWindow,
    any_window,
    axes_of,
)
from pacswap.ops.precision import autocast_to, check_floating
from pacswap.ops.transforms import is_transformed
from pacswap.ops.window import Padding, Size2, Window

SIDES = {1: ("K",), 2: ("KH", "KW"), 3: ("KT", "KH", "KW")}
BORDERS = ("left", "right", "top", "bottom", "front", "back")


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
        backend: `"auto"` or a name that `explain` knows; a named one runs or raises.

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
    window = any_window(
        _sides(weight, 2),
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
    )
    return convolve(input, kernel, weight, bias, window, groups, backend)


def pac_conv1d(
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
    """`pac_conv2d` of a sequence, which is an image of height 1.

    Args:
        input: v, [B, C_in, L], float.
        kernel: K, [B, 1, K, L_out], or [B, C_in, …] with a kernel for each input channel.
        weight: W, [C_out, C_in/groups, K], as in `torch.nn.Conv1d`, like the options below.
        bias: b, [C_out] or None.
        stride: as in `pac_conv2d`, like all that follow; an int or a tuple of one.
        padding: places, `"same"` or `"valid"`.
        dilation: places between taps.
        groups: C_in and C_out are divided into so many groups.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        backend: `"auto"` or a name that `explain` knows; a named one runs or raises.

    Returns:
        [B, C_out, L_out], the dtype of `input`. `kernel` ≡ 1 gives `F.conv1d` up to rounding.

    Raises:
        ShapeError: the tensors disagree; the message lists every shape.
        BackendError: the named backend cannot run this call.

    Example:
        >>> import torch
        >>> input, kernel = torch.ones(1, 3, 8), torch.ones(1, 1, 5, 8)
        >>> pac_conv1d(input, kernel, torch.ones(16, 3, 5), padding=2).shape
        torch.Size([1, 16, 8])
    """
    window = any_window(
        _sides(weight, 1),
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
    )
    return convolve(input, kernel, weight, bias, window, groups, backend)


def pac_conv3d(
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
    """`pac_conv2d` of a volume, such as a video: the window reaches over frames too.

    Args:
        input: v, [B, C_in, T, H, W], float.
        kernel: K, [B, 1, KT*KH*KW, T_out, H_out, W_out], or [B, C_in, …] with a kernel for each
            input channel; the taps by time, then by row, then by column.
        weight: W, [C_out, C_in/groups, KT, KH, KW], as in `torch.nn.Conv3d`, like the options
            below.
        bias: b, [C_out] or None.
        stride: as in `pac_conv2d`, like all that follow; an int or (temporal, vertical,
            horizontal).
        padding: frames and pixels, `"same"` or `"valid"`.
        dilation: frames and pixels between taps.
        groups: C_in and C_out are divided into so many groups.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        backend: `"auto"` or a name that `explain` knows; a named one runs or raises.

    Returns:
        [B, C_out, T_out, H_out, W_out], the dtype of `input`. `kernel` ≡ 1 gives `F.conv3d` up to
        rounding.

    Raises:
        ShapeError: the tensors disagree; the message lists every shape.
        BackendError: the named backend cannot run this call.

    Example:
        >>> import torch
        >>> input, kernel = torch.ones(1, 3, 4, 8, 8), torch.ones(1, 1, 27, 4, 8, 8)
        >>> pac_conv3d(input, kernel, torch.ones(16, 3, 3, 3, 3), padding=1).shape
        torch.Size([1, 16, 4, 8, 8])
    """
    window = any_window(
        _sides(weight, 3),
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
    window: AnyWindow,
    groups: int,
    backend: Backend,
) -> Tensor:
    """The convolution of a window that is made already: the one way into the backends."""
    input, kernel, weight, bias = _checked(input, kernel, weight, bias, window, groups)
    module = choose(backend, _task(input, kernel, weight, window, groups))
    if isinstance(window, VolumeWindow):
        return volume.pac_conv3d(module, input, kernel, weight, bias, window, groups)
    if isinstance(window, SequenceWindow):
        rows = (t.unsqueeze(-2) for t in (input, kernel, weight))
        return module.pac_conv2d(*rows, bias, window.row, groups).squeeze(-2)
    return module.pac_conv2d(input, kernel, weight, bias, window, groups)


def attach_kernel_gradient(
    output: Tensor,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    *,
    window: AnyWindow,
    groups: int,
) -> Tensor:
    """A plain convolution's `output`, bit for bit, with the gradient of a kernel that is 1.

    Args:
        output: what `F.conv2d` gave for `input` and `weight`, [B, C_out, H_out, W_out]; or
            `F.conv1d` or `F.conv3d`, and all that follow with as many axes.
        input: [B, C_in, H, W].
        kernel: [B, 1, KH*KW, H_out, W_out], 1 everywhere.
        weight: [C_out, C_in/groups, KH, KW].
        window: the convolution's geometry.
        groups: the convolution's groups.
    """
    input, kernel, weight, _ = _checked(input, kernel, weight, None, window, groups)
    module = _of_gradients(_task(input, kernel, weight, window, groups))
    if isinstance(window, VolumeWindow):
        return volume.attach_kernel_gradient(module, output, input, kernel, weight, window, groups)
    if isinstance(window, SequenceWindow):
        # A copy: what is changed in place must be no view.
        output = output.unsqueeze(-2).clone()
        input, kernel, weight = (t.unsqueeze(-2) for t in (input, kernel, weight))
        made = module.attach_kernel_gradient(output, input, kernel, weight, window.row, groups)
        return made.squeeze(-2)
    return module.attach_kernel_gradient(output, input, kernel, weight, window, groups)


def _of_gradients(task: Task) -> ModuleType:
    """The backend of a gradient that is attached: one with a hand-written backward pass."""
    if not torch.compiler.is_compiling():
        for name in ("triton", "loops"):
            if why_not(name, task) is None:
                return choose(name, task)
        if is_transformed():
            return taps
    return eager


def _task(input: Tensor, kernel: Tensor, weight: Tensor, window: AnyWindow, groups: int) -> Task:
    plane = window if isinstance(window, Window) else None
    channel_wise = kernel.shape[1] > 1
    return Task((input, kernel, weight), plane, groups, channel_wise=channel_wise)


def _sides(weight: Tensor, axes: int) -> tuple[int, ...]:
    """The window's size, from a weight of so many axes."""
    if weight.dim() != 2 + axes:
        sides = ", ".join(SIDES[axes])
        raise ShapeError(f"weight must be [C_out, C_in/groups, {sides}], got {list(weight.shape)}.")
    return tuple(weight.shape[2:])


def _checked(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: AnyWindow,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's dtype, or a ShapeError with every shape."""
    cast = autocast_to(input, input, kernel, weight, bias)
    input, kernel, weight, bias = cast  # type: ignore[assignment]
    check_floating(input=input, kernel=kernel, weight=weight, bias=bias)
    faults = []
    axes = axes_of(window)
    if input.dim() != 2 + len(axes):
        faults.append(f"input must be [B, C_in, {', '.join(axes)}]")
    elif groups < 1 or weight.shape[0] % groups or input.shape[1] != weight.shape[1] * groups:
        faults.append("C_in must be groups · weight.shape[1], and C_out divisible by groups")
    else:
        size = window.output_size(*input.shape[2:])
        wanted = (input.shape[0], 1, window.taps, *size)
        channel_wise = (input.shape[0], input.shape[1], window.taps, *size)
        if tuple(kernel.shape) not in (wanted, channel_wise):
            taps, outputs = "*".join(SIDES[len(axes)]), ", ".join(f"{axis}_out" for axis in axes)
            faults.append(f"kernel must be [B, 1, {taps}, {outputs}] = {list(wanted)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        faults.append(f"bias must be [C_out] = [{weight.shape[0]}]")
    if faults:
        shapes = {"input": input, "kernel": kernel, "weight": weight, "bias": bias}
        listed = ", ".join(f"{n} {list(t.shape)}" for n, t in shapes.items() if t is not None)
        raise ShapeError(
            f"{'; '.join(faults)}. Got {listed}, groups={groups}, stride={window.stride}, "
            f"dilation={window.dilation}, padding={window.pad} "
            f"({', '.join(BORDERS[: len(window.pad)])})."
        )
    return input, kernel, weight, bias
