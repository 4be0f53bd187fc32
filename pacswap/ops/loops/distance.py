"""How far each tap's features are from the centre's: half of the taps where the others mirror them.

d(p, q) = d(q, p): in a window that is symmetric about its centre and moves pixel by pixel, what a
tap differs from the centre is found again where the roles are exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.loops import machine_planes as machine
from pacswap.ops.loops.planes import Layout, layout
from pacswap.ops.loops.threads import described, parts, shared
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
    B, D, *image = guidance.shape
    if D == 0:
        return guidance.new_zeros(B, 1, window.taps, *window.output_size(image[0], image[1]))
    halves = centre is None and _mirrors(window)
    reach = window.dilation[0] * (window.kernel_size[0] // 2)
    # What is computed beyond a block to mirror it is lost: let it be a small part.
    numbers = guidance.numel() * window.taps // (2 if halves else 1)
    each = -(-parts(numbers, numbers) // max(1, B))
    least = 4 * reach if halves else 1
    lie = layout(window, (image[0], image[1]), numbers=D, least=least, blocks=each)
    offsets = lie.offsets
    output = guidance.new_empty(B, window.taps, *lie.size)
    blocks = B * -(-lie.size[0] // lie.rows)
    threads = parts(blocks, numbers)
    beyond = offsets[window.centre] - offsets[0] if halves else 0
    room = guidance.new_empty(threads, D * lie.plane + lie.rows * lie.row + beyond)
    arrays = (guidance, _apart(lie, guidance, centre), output, room)
    given = [number for array in arrays for number in described(array)]
    given += [*lie.numbers, lie.rows, window.centre if centre is None else -1]
    shared(machine.distances, guidance, blocks, threads, [*given, square, halves, *offsets])
    return output.unsqueeze(1)


def gradients(
    guidance: Tensor, centre: Tensor | None, grad: Tensor, window: Window, *, square: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients for the features and for the centre, if that was given.

    Args:
        guidance: as in `distances`, like `centre` and `window`.
        centre: f_p or None.
        grad: of the distances, [B, 1, KH*KW, H_out, W_out], in the features' dtype.
        window: the window.
        square: as in `distances`.
    """
    size = (grad.shape[-2], grad.shape[-1])
    lie = Layout(window, (guidance.shape[2], guidance.shape[3]), size, size[0])
    channels = guidance.shape[0] * guidance.shape[1]
    threads = parts(channels, grad.numel() * guidance.shape[1])
    halves = centre is None and _mirrors(window)
    pulls = _pulls(lie, grad[:, 0], window) if halves else lie.outputs(grad[:, 0])
    apart = _apart(lie, guidance, centre)
    found, found_apart = torch.zeros_like(guidance), torch.zeros_like(apart)
    room = guidance.new_empty(threads, 2 * lie.plane)
    arrays = (guidance, apart, pulls, found, found_apart, room)
    given = [number for array in arrays for number in described(array)]
    given += [*lie.numbers, window.centre if centre is None else -1, square, halves, *lie.offsets]
    shared(machine.distance_gradients, guidance, channels, threads, given)
    return found, None if centre is None else lie.sized(found_apart)


def _apart(lie: Layout, guidance: Tensor, centre: Tensor | None) -> Tensor:
    """f_p, [B, D, H_out·row]; nothing where it is a tap."""
    return guidance.new_empty(0, 0, 0) if centre is None else lie.outputs(centre)


def _mirrors(window: Window) -> bool:
    """Whether each tap has an opposite one, and each pixel is a centre."""
    return window.stride == (1, 1) and all(side % 2 == 1 for side in window.kernel_size)


def _pulls(lie: Layout, grad: Tensor, window: Window) -> Tensor:
    """For each pixel of a plane and each tap, the gradients of the two differences that they share.

    Of its own difference from that tap, and of the opposite tap's centre's from it. [B, taps,
    plane].
    """
    taps, places = window.taps, list(window.slices(lie.size))
    pulls = grad.new_zeros(grad.shape[0], taps, *lie.phase)
    for t in range(taps):
        if t == window.centre:
            continue
        rows, columns = places[window.centre]
        pulls[:, t, rows, columns] += grad[:, t]
        rows, columns = places[taps - 1 - t]
        pulls[:, t, rows, columns] += grad[:, taps - 1 - t]
    return pulls.flatten(2)
