"""How far each tap's features are from the centre's: half of the taps where the others mirror them.

d(p, q) = d(q, p): in a window that is symmetric about its centre and moves pixel by pixel, what a
tap differs from the centre is found again where the roles are exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.loops import machine_planes as machine
from pacswap.ops.loops.planes import Layout
from pacswap.ops.loops.threads import described, parts, shared
from pacswap.ops.window import Window

# Numbers of the features that stay in a CPU's second cache while tap after tap reads them.
_NUMBERS = 1 << 17


def distances(
    padded: Tensor, centre: Tensor | None, window: Window, size: tuple[int, int], *, square: bool
) -> Tensor:
    """Σ_c φ(f_q − f_p).

    Args:
        padded: f with its border, [B, D, H', W'], float32 or float64.
        centre: f_p, [B, D, H_out, W_out], or None where it is the centre tap's.
        window: the geometry; its border is in the features already.
        size: (H_out, W_out).
        square: φ is the square, else the absolute value.

    Returns:
        [B, 1, KH*KW, H_out, W_out].
    """
    lie = _layout(padded, window, size)
    planes, centres, to = _ends(lie, padded, centre)
    B, D = padded.shape[:2]
    halves = centre is None and _mirrors(window)
    output = padded.new_empty(B, window.taps, *size)
    offsets = lie.offsets
    reach = to - offsets[0] if halves else 0
    # What is computed beyond the block is lost: let it be a small part.
    least = -(-4 * reach // lie.row)
    rows = min(max(1, least, _NUMBERS // (D * lie.row)), size[0])
    blocks = B * -(-size[0] // rows)
    threads = parts(blocks, output.numel() * D // (2 if halves else 1))
    room = padded.new_empty(threads, rows * lie.row + reach)
    given = [n for array in (planes, centres, output, room) for n in described(array)]
    given += [to, window.centre if centre is None else -1, lie.row, square, halves, *offsets]
    shared(machine.distances, padded, blocks, threads, given)
    return output.unsqueeze(1)


def gradients(
    padded: Tensor,
    centre: Tensor | None,
    grad: Tensor,
    window: Window,
    *,
    square: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the features with their border and for the centre, if that was given.

    Args:
        padded: as in `distances`, like `centre` and `window`.
        centre: f_p or None.
        grad: of the distances, [B, 1, KH*KW, H_out, W_out], in the features' dtype.
        window: the window.
        square: as in `distances`.
    """
    lie = _layout(padded, window, (grad.shape[-2], grad.shape[-1]))
    planes, centres, to = _ends(lie, padded, centre)
    channels = planes.shape[0] * planes.shape[1]
    threads = parts(channels, grad.numel() * padded.shape[1])
    found = torch.zeros_like(planes)
    if centre is None and _mirrors(window):
        pulls = _pulls(lie, grad[:, 0], window)
        offsets = [offset - to for offset in lie.offsets]
        given = [n for array in (planes, pulls, found) for n in described(array)]
        loop = machine.distance_gradients
        shared(loop, padded, channels, threads, [*given, square, *offsets])
        return lie.image(found), None
    back = found if centre is None else torch.zeros_like(centres)
    arrays = (planes, centres, lie.outputs(grad[:, 0]), found, back)
    given = [n for array in arrays for n in described(array)]
    loop = machine.distance_gradients_apart
    shared(loop, padded, channels, threads, [*given, to, square, *lie.offsets])
    return lie.image(found), None if centre is None else lie.sized(back)


def _layout(padded: Tensor, window: Window, size: tuple[int, int]) -> Layout:
    return Layout(window, (padded.shape[-2], padded.shape[-1]), size)


def _ends(lie: Layout, padded: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """f, f_p as planes, and where f_p begins in its plane."""
    planes = lie.planes(padded)
    if centre is None:
        return planes, planes, lie.offsets[lie.window.centre]
    return planes, lie.outputs(centre), 0


def _mirrors(window: Window) -> bool:
    """Whether each tap has an opposite one, and each pixel is a centre."""
    return window.stride == (1, 1) and all(side % 2 == 1 for side in window.kernel_size)


def _pulls(lie: Layout, grad: Tensor, window: Window) -> Tensor:
    """For each pixel of a plane and each tap, the gradients of the two differences that they share.

    Of its own difference from that tap, and of the opposite tap's centre's from it. [B, taps,
    plane].
    """
    taps, places = window.taps, list(window.slices(lie.size))
    pulls = grad.new_zeros(grad.shape[0], taps, *lie.padded)
    for t in range(taps):
        if t == window.centre:
            continue
        rows, columns = places[window.centre]
        pulls[:, t, rows, columns] += grad[:, t]
        rows, columns = places[taps - 1 - t]
        pulls[:, t, rows, columns] += grad[:, taps - 1 - t]
    return pulls.flatten(2)
