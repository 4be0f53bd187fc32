"""PAC as the paper writes it: every tap gathered, then summed. Slow, any dtype, autograd only.

The other files are claims about this one; tests hold them to it in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pacswap.ops.measure import PHI, Measure
from pacswap.ops.window import Window


def gather(x: Tensor, window: Window) -> Tensor:
    """The value that each tap sees at each output pixel.

    Args:
        x: [B, C, H, W].
        window: the geometry.

    Returns:
        [B, C, KH*KW, H_out, W_out].
    """
    size = window.output_size(x.shape[-2], x.shape[-1])
    padded = window.padded(x)
    return torch.stack(
        [padded[:, :, rows, columns] for rows, columns in window.slices(size)], dim=2
    )


def tap_distance(
    guidance: Tensor, centre: Tensor | None, window: Window, measure: Measure, channel_wise: bool
) -> Tensor:
    """How far each tap's features are from the centre's: Σ φ(f_q − f_p) over the channels.

    Args:
        guidance: f, [B, D, H, W].
        centre: f_p, [B, D, H_out, W_out]; None takes it from the guidance at the centre tap.
        window: the geometry.
        measure: φ, `square`, `absolute`, or `asymmetric` (the square of what is above 0).
        channel_wise: leave the channels apart.

    Returns:
        [B, 1 or D, KH*KW, H_out, W_out].
    """
    taps = gather(guidance, window)  # [B, D, KH*KW, H_out, W_out]
    at = taps[:, :, window.centre] if centre is None else centre
    values = PHI[measure](taps - at.unsqueeze(2))
    return values if channel_wise else values.sum(1, keepdim=True)


def pac_conv2d(
    input: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """y_p = b + Σ_q K(f_p, f_q) · W[p−q] · v_q (Su et al., CVPR 2019, eq. 3).

    Args:
        input: v, [B, C_in, H, W].
        kernel: K, [B, 1, KH*KW, H_out, W_out].
        weight: W, [C_out, C_in/groups, KH, KW].
        bias: b, [C_out] or None.
        window: the geometry.
        groups: as in `torch.nn.Conv2d`.

    Returns:
        [B, C_out, H_out, W_out].
    """
    seen = gather(input, window) * kernel  # [B, C_in, KH*KW, H_out, W_out]
    B, _, T, H_out, W_out = seen.shape
    grouped = seen.reshape(B, groups, weight.shape[1], T, H_out, W_out)
    filters = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], T)
    output = torch.einsum("bgcthw,goct->bgohw", grouped, filters)
    output = output.reshape(B, weight.shape[0], H_out, W_out)
    return output if bias is None else output + bias[:, None, None]
