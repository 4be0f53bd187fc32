"""The transposed pixel-adaptive convolution: zeros between the pixels, then a PAC at stride 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.ops.backends import Backend
from pacswap.ops.conv import convolve
from pacswap.ops.window import Size2, Window, make_window


def pac_conv_transpose2d(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    backend: Backend = "auto",
) -> Tensor:
    """Transposed convolution, each tap scaled at each output pixel by the adapting kernel.

    Zeros are inserted between the pixels of `input`, and the result is convolved at stride 1 with
    `weight` turned by 180°, under a kernel whose guidance has the output's resolution (Su et al.,
    CVPR 2019, section 3.2). Tap t of the kernel belongs to weight[…, KH·KW − 1 − t].

    Args:
        input: v, [B, C_in, H, W], float.
        kernel: K, [B, 1 or C_in, KH*KW, H_out, W_out]: `adapting_kernel` over the
            `guidance_window` of a guidance at output resolution.
        weight: W, [C_in, C_out/groups, KH, KW], as in `torch.nn.ConvTranspose2d`, like the rest.
        bias: b, [C_out] or None.
        stride: how much larger the output is.
        padding: what is cut from each side of the output.
        output_padding: pixels added at its right and bottom.
        dilation: pixels between taps.
        groups: C_in and C_out are divided into so many groups.
        backend: as in `pac_conv2d`.

    Returns:
        [B, C_out, H_out, W_out]. `kernel` ≡ 1 gives `F.conv_transpose2d` up to rounding.

    Raises:
        ShapeError: the tensors disagree; the message lists every shape.
        BackendError: the named backend cannot run this call.

    Example:
        >>> pac_conv_transpose2d(
        ...     torch.ones(1, 8, 4, 4), torch.ones(1, 1, 25, 8, 8), torch.ones(8, 3, 5, 5),
        ...     stride=2, padding=2, output_padding=1,
        ... ).shape
        torch.Size([1, 3, 8, 8])
    """
    if input.dim() != 4 or weight.dim() != 4 or input.shape[1] != weight.shape[0]:
        raise ShapeError(
            "input must be [B, C_in, H, W] and weight [C_in, C_out/groups, KH, KW], got "
            f"input {list(input.shape)}, weight {list(weight.shape)}."
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ShapeError(f"C_in={weight.shape[0]} must be divisible by groups={groups}.")
    window, steps = transposed_window(
        (weight.shape[2], weight.shape[3]),
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
    )
    _check(input, kernel, weight, bias, window, steps, groups)
    spread = insert_zeros(input, steps)
    return convolve(spread, kernel, turned(weight, groups), bias, window, groups, backend)


def _check(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    steps: tuple[int, int],
    groups: int,
) -> None:
    """Raise unless the tensors fit, in the caller's shapes: `convolve` sees others."""
    B, C_in, H, W = input.shape
    size = window.output_size((H - 1) * steps[0] + 1, (W - 1) * steps[1] + 1)
    faults = []
    if tuple(kernel.shape) not in [(B, c, window.taps, *size) for c in (1, C_in)]:
        faults.append(f"kernel must be [B, 1, KH*KW, H_out, W_out] = {[B, 1, window.taps, *size]}")
    if bias is not None and tuple(bias.shape) != (weight.shape[1] * groups,):
        faults.append(f"bias must be [C_out] = [{weight.shape[1] * groups}]")
    if faults:
        shapes = {"input": input, "kernel": kernel, "weight": weight, "bias": bias}
        listed = ", ".join(f"{n} {list(t.shape)}" for n, t in shapes.items() if t is not None)
        raise ShapeError(f"{'; '.join(faults)}. Got {listed}, groups={groups}, stride={steps}.")


def transposed_window(
    kernel_size: Size2,
    *,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    dilation: Size2 = 1,
) -> tuple[Window, tuple[int, int]]:
    """The stride-1 window over the input with zeros inserted, and how far apart its pixels are.

    Raises:
        ShapeError: an option is out of range.
    """
    steps = make_window(1, stride=stride).stride
    cut = make_window(1, padding=padding).pad
    extra = make_window(1, padding=output_padding).pad
    bare = make_window(kernel_size, dilation=dilation)
    reach = [d * (k - 1) for d, k in zip(bare.dilation, bare.kernel_size, strict=True)]
    if extra[2] >= max(steps[0], bare.dilation[0]) or extra[0] >= max(steps[1], bare.dilation[1]):
        raise ShapeError(
            f"output_padding={output_padding} must be smaller than stride={stride} or "
            f"dilation={dilation}."
        )
    left, top = reach[1] - cut[0], reach[0] - cut[2]
    pad = (left, left + extra[0], top, top + extra[2])
    return Window(bare.kernel_size, (1, 1), bare.dilation, pad, "zeros"), steps


def insert_zeros(x: Tensor, steps: tuple[int, int]) -> Tensor:
    """[B, C, H, W] with `steps` − 1 zeros between neighbours."""
    if steps == (1, 1):
        return x
    B, C, H, W = x.shape
    spread = x.new_zeros(B, C, H, steps[0], W, steps[1])
    spread[:, :, :, 0, :, 0] = x
    spread = spread.reshape(B, C, H * steps[0], W * steps[1])
    return spread[:, :, : (H - 1) * steps[0] + 1, : (W - 1) * steps[1] + 1]


def guidance_window(kernel_size: Size2, dilation: Size2 = 1) -> Window:
    """The window over a guidance at output resolution, centred on the output pixel."""
    bare = make_window(kernel_size, dilation=dilation)
    (KH, KW), (down, across) = bare.kernel_size, bare.dilation
    top, left = (KH - 1) // 2 * down, (KW - 1) // 2 * across
    pad = (left, (KW - 1) * across - left, top, (KH - 1) * down - top)
    return Window(bare.kernel_size, (1, 1), bare.dilation, pad, "zeros")


def inserted_mask(
    size: tuple[int, int], window: Window, steps: tuple[int, int], device: torch.device
) -> Tensor:
    """Where the pixels of the input lie in the output's plane, for `adapting_kernel`'s `mask`.

    The normalisation then counts the input's pixels only, not the zeros between them.

    Args:
        size: (H, W) of the input.
        window: what `transposed_window` gave, with `steps`.
        steps: how far apart the pixels are.
        device: of the mask.

    Returns:
        [1, 1, H_out, W_out], 1 at a pixel of the input, 0 elsewhere.
    """
    spread = insert_zeros(torch.ones(1, 1, *size, device=device), steps)
    rows, columns = window.output_size(spread.shape[-2], spread.shape[-1])
    centred = guidance_window(window.kernel_size, window.dilation).pad
    left, _, top, _ = (ours - theirs for ours, theirs in zip(window.pad, centred, strict=True))
    right = columns - spread.shape[-1] - left
    bottom = rows - spread.shape[-2] - top
    return F.pad(spread, (left, right, top, bottom))


def turned(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight as that of a plain one, [C_out, C_in/G, KH, KW]."""
    C_in, o, KH, KW = weight.shape
    grouped = weight.flip(2, 3).reshape(groups, C_in // groups, o, KH, KW)
    return grouped.transpose(1, 2).reshape(groups * o, C_in // groups, KH, KW)
