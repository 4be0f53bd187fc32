"""Volumes by the operations on images: a sum over the temporal taps, frames folded into the batch.

For each temporal tap the frames that it sees are a batch of T_out·B images. They lie in memory
frame by frame, so that they are a view; nothing is larger than the volume or the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from pacswap.ops.dimensions import VolumeWindow
from pacswap.ops.measure import Measure
from pacswap.ops.precision import compute_dtype
from pacswap.ops.transforms import is_transformed


def tap_distance(
    module: ModuleType, guidance: Tensor, window: VolumeWindow, measure: Measure, channel_wise: bool
) -> Tensor:
    """How far each tap's features are from the centre's.

    Args:
        module: the backend.
        guidance: f, [B, D, T, H, W].
        window: the geometry.
        measure: φ, as in `reference.tap_distance`.
        channel_wise: leave the channels apart.

    Returns:
        [B, 1 or D, KT*KH*KW, T_out, H_out, W_out].
    """
    T, H, W = window.output_size(*guidance.shape[2:])
    plane = window.plane.unpadded
    seen = list(_seen(guidance, window, T))
    rows, columns = list(plane.slices((H, W)))[plane.centre]
    centre = seen[window.time.centre][:, :, rows, columns]  # [T_out*B, D, H_out, W_out]
    distances = [
        # In the centre's own frame, what is 0 needs no computing.
        module.tap_distance(
            frames, None if t == window.time.centre else centre, plane, measure, channel_wise
        )
        for t, frames in enumerate(seen)
    ]
    joined = torch.cat(distances, dim=2)  # [T_out*B, 1 or D, KT*KH*KW, H_out, W_out]
    return joined.unflatten(0, (T, guidance.shape[0])).permute(1, 2, 3, 0, 4, 5)


def pac_conv3d(
    module: ModuleType,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: VolumeWindow,
    groups: int,
) -> Tensor:
    """The pixel-adaptive convolution of a volume.

    Args:
        module: the backend.
        input: v, [B, C_in, T, H, W].
        kernel: K, [B, 1 or C_in, KT*KH*KW, T_out, H_out, W_out].
        weight: W, [C_out, C_in/groups, KT, KH, KW].
        bias: b, [C_out] or None.
        window: the geometry.
        groups: as in `torch.nn.Conv3d`.

    Returns:
        [B, C_out, T_out, H_out, W_out], in the memory format that `F.conv3d` would give it.
    """
    # Sums over frames in half precision would lose a digit that a plain convolution keeps.
    wide = compute_dtype(input.dtype)
    T = window.output_size(*input.shape[2:])[0]
    plane, filters = window.plane.unpadded, weight.to(wide).unbind(2)
    parts = zip(
        _seen(input.to(wide), window, T), _factors(kernel.to(wide), window), filters, strict=True
    )
    output: Tensor | None = None
    for frames, factors, filter in parts:
        part = module.pac_conv2d(frames, factors, filter, None, plane, groups)
        output = part if output is None else output + part
    assert output is not None
    if bias is not None:
        output = output + bias[:, None, None]
    return _volume(output.to(input.dtype), T, like=input)


def attach_kernel_gradient(
    module: ModuleType,
    output: Tensor,
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    window: VolumeWindow,
    groups: int,
) -> Tensor:
    """As `handwritten.attach_kernel_gradient`, of volumes."""
    T, plane = output.shape[2], window.plane.unpadded
    # Added to x, a negative zero leaves every bit of it, and the output's own gradient as it is.
    B, C, _, H, W = output.shape
    frames = output.new_full((T * B, C, H, W), -0.0, requires_grad=False)
    parts = zip(_seen(input, window, T), _factors(kernel, window), weight.unbind(2), strict=True)
    for seen, factors, filter in parts:
        frames = module.attach_kernel_gradient(frames, seen, factors, filter, plane, groups)
    return output + _volume(frames, T, like=output)


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] to [T, B, C, H, W]."""
    return x.permute(2, 0, 1, 3, 4)


def _seen(x: Tensor, window: VolumeWindow, T_out: int) -> Iterator[Tensor]:
    """For each temporal tap, what it sees of the padded volume: [T_out*B, C, H', W']."""
    folded = _frames(window.padded(x)).contiguous()
    return (folded[frames].flatten(0, 1) for frames in window.times(T_out))


def _factors(kernel: Tensor, window: VolumeWindow) -> Iterator[Tensor]:
    """For each temporal tap, its factors: [T_out*B, 1 or C, KH*KW, H_out, W_out]."""
    folded = kernel.permute(3, 0, 1, 2, 4, 5)
    return (part.flatten(0, 1) for part in folded.split(window.plane.taps, dim=3))


def _volume(frames: Tensor, T_out: int, *, like: Tensor) -> Tensor:
    """[T_out*B, C, H, W] to [B, C, T_out, H, W], in the memory format of `like` [B, …]."""
    volume = frames.unflatten(0, (T_out, like.shape[0])).permute(1, 2, 0, 3, 4)
    last = (
        not is_transformed()  # vmap knows no other format
        and like.is_contiguous(memory_format=torch.channels_last_3d)
        and not like.is_contiguous()
    )
    # Models that call `.view` on a convolution's output rely on this.
    return volume.contiguous(
        memory_format=torch.channels_last_3d if last else torch.contiguous_format
    )
