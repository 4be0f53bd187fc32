"""How far each tap's features are from the centre's: half of the taps where the others mirror them.

d(p, q) = d(q, p): in a window that is symmetric about its centre and moves pixel by pixel, what a
tap differs from the centre is found again where the roles are exchanged. What the loops read by raw
addresses is held by names here until they have come to their end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.loops import machine_distance as machine
from pacswap.ops.loops.planes import Layout, layout, whole
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.loops.vectors import lanes
from pacswap.ops.window import Window


def distances(guidance: Tensor, centre: Tensor | None, window: Window, *, square: bool) -> Tensor:
    """Σ_c φ(f_q − f_p).

    Args:
        guidance: f, [B, D, H, W], contiguous, float32 or float64.
        centre: f_p, [B, D, H_out, W_out], or None where it is the centre tap's.
        window: the geometry, with a border of zeros.
        square: φ is the square, else the absolute value.

    Returns:
        [B, 1, KH*KW, H_out, W_out].
    """
    B, D, H, W = guidance.shape
    if D == 0:
        return guidance.new_zeros(B, 1, window.taps, *window.output_size(H, W))
    halves = centre is None and _mirrors(window)
    reach = window.dilation[0] * (window.kernel_size[0] // 2)
    # What is computed beyond a block to mirror it is lost: let it be a small part.
    numbers = guidance.numel() * window.taps // (2 if halves else 1)
    each = -(-parts(numbers, numbers) // max(1, B))
    least = 4 * reach if halves else 1
    lie = layout(window, (H, W), numbers=D, least=least, blocks=each)
    output = guidance.new_empty(B, window.taps, *lie.size)
    blocks = B * -(-lie.size[0] // lie.rows)
    threads = parts(blocks, numbers)
    beyond = lie.offsets[window.centre] - lie.offsets[0] if halves else 0
    wide = lanes(guidance.dtype)
    stretch = lie.rows * lie.row + beyond + 2 * wide
    room = guidance.new_zeros(threads, D * lie.stride + 2 * wide + 4 * stretch)
    apart = None if centre is None else lie.outputs(centre, 2 * wide)
    given = (
        *described(guidance), 0 if apart is None else apart.data_ptr(), *described(output),
        *described(room), stretch, wide, lie.stride, lie.rows,
        window.centre if centre is None else -1, square, halves, lie.address, *lie.numbers,
    )  # fmt: skip
    shared(machine.distances, guidance, blocks, threads, given)
    return output.unsqueeze(1)


def gradients(
    guidance: Tensor, centre: Tensor | None, grad: Tensor, window: Window, *, square: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the features and for the centre, if that was given.

    Args:
        guidance: as in `distances`, like `centre` and `window`.
        centre: f_p or None.
        grad: of the distances, [B, 1, KH*KW, H_out, W_out], contiguous, in the features' dtype.
        window: the window.
        square: as in `distances`.
    """
    B, D, H, W = guidance.shape
    lie = whole(window, (H, W))
    if centre is None and _mirrors(window):
        return _mirrored_gradients(guidance, grad[:, 0], lie, square), None
    size = (B, D, lie.size[0] * lie.row)
    pulls = lie.outputs(grad[:, 0], 0)
    found = torch.zeros_like(guidance)
    apart = found_apart = guidance.new_empty(0)
    if centre is not None:
        apart = lie.outputs(centre, 0)
        found_apart = torch.zeros_like(apart)
    channels = B * D
    threads = parts(channels, grad.numel() * D)
    room = guidance.new_zeros(threads, 2 * lie.plane)
    given = (
        *described(guidance), apart.data_ptr(), *size, pulls.data_ptr(), B, window.taps, size[2],
        *described(found), found_apart.data_ptr(), *described(room),
        window.centre if centre is None else -1, square, lie.address, *lie.numbers,
    )  # fmt: skip
    shared(machine.distance_gradients, guidance, channels, threads, given)
    return found, None if centre is None else lie.sized(found_apart, centre.shape)


def _mirrored_gradients(guidance: Tensor, grad: Tensor, lie: Layout, square: bool) -> Tensor:
    """For the features, where each tap has an opposite one; grad is [B, taps, H_out, W_out]."""
    B, D = guidance.shape[:2]
    found, taps, wide = torch.zeros_like(guidance), lie.window.taps, lanes(guidance.dtype)
    if taps == 1:
        return found
    pulls = guidance.new_zeros(B * (taps - 1) * lie.plane + 2 * wide)
    given: tuple[int, ...] = (
        *described(grad), pulls.data_ptr(), B * (taps - 1), lie.plane, lie.window.centre, lie.row,
        lie.address,
    )  # fmt: skip
    places = B * (taps - 1)
    shared(machine.both_ends, guidance, places, parts(places, pulls.numel()), given)
    blocks = B * -(-D // 4)
    threads = parts(blocks, grad.numel() * D)
    moves = lie.from_centre
    margin = int(moves.max())
    plane = lie.stride + margin
    room = guidance.new_zeros(threads, margin + 4 * plane + 2 * wide + 4 * (lie.plane + 2 * wide))
    given = (
        *described(guidance), pulls.data_ptr(), taps - 1, *described(found), *described(room),
        wide, margin, plane, lie.plane, square, moves.ctypes.data, *lie.numbers,
    )  # fmt: skip
    shared(machine.mirrored_gradients, guidance, blocks, threads, given)
    return found


def _mirrors(window: Window) -> bool:
    """Whether each tap has an opposite one, and each pixel is a centre."""
    return window.stride == (1, 1) and all(side % 2 == 1 for side in window.kernel_size)
