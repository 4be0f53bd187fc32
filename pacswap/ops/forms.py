"""The adapting kernel of distances, form by form.

That of the exponential forms is K = e^(d / divisor), without subnormal numbers: with those a CPU
takes a hundred times as long, in exp itself and wherever K goes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pacswap.ops.normalize import Counted

# K is not below so many times the least number that is not subnormal: exp is slow there already.
LEAST = 2.0


def exponential(d: Tensor, divisor: float | Tensor) -> Tensor:
    """e^(d / divisor) of distances d, a new tensor.

    Args:
        d: not negative.
        divisor: negative, a number or a scalar.
    """
    # One division: a pass over d takes as long as computing a small one.
    exponent = d / divisor
    least = math.log(LEAST * torch.finfo(d.dtype).tiny)
    return exponent.clamp(min=least).exp_()  # in place: fresh memory takes as long


def pulls(grad: Tensor, kernel: Tensor, divisor: float | Tensor) -> Tensor:
    """The gradient of d from that of K = `exponential(d, divisor)`.

    Args:
        grad: of K.
        kernel: K.
        divisor: as there.
    """
    at_least = kernel < (LEAST + 0.5) * torch.finfo(kernel.dtype).tiny
    # In this order: a gradient without memory cannot be changed in place.
    return (kernel / divisor).mul_(grad).masked_fill_(at_least, 0.0)


def kernel_of(
    d: Tensor,
    count: int,
    form: str,
    bandwidth: float | Tensor,
    alpha: float | Tensor,
    lambd: float | Tensor,
    counted: Counted,
) -> Tensor:
    """K from the distances d, [B, 1 or D, KH*KW, H_out, W_out], of which the mean is d / count.

    Of the exponential forms K of each window times a factor that makes its largest 1: a window far
    from all that it sees would divide by a sum that is 0 in floating point.
    """
    if form == "inverse":
        alpha, lambd, width = (_in_dtype_of(d, value) for value in (alpha, lambd, bandwidth))
        alpha, lambd = _of_channels(alpha, d), _of_channels(lambd, d)
        kernel = alpha + (d / (count * width**2) + 1e-4) ** (0.5 * lambd)
        return kernel if counted.as_one is None else torch.where(counted.as_one, 1.0, kernel)
    exponent = d / divisor_of(form, count, bandwidth, d)
    if counted.as_one is not None:
        exponent = torch.where(counted.as_one, 0.0, exponent)
    if counted.seen is not None:
        exponent = torch.where(counted.seen, exponent, -math.inf)
    largest = exponent.detach().amax(2, keepdim=True)
    return torch.exp(exponent - torch.where(largest > -math.inf, largest, 0.0))


def divisor_of(form: str, count: int, bandwidth: float | Tensor, like: Tensor) -> float | Tensor:
    """What d is divided by for the exponent of K, negative."""
    width = _in_dtype_of(like, bandwidth)
    return -count * width if form == "laplacian" else -2 * count * width**2


def _in_dtype_of(like: Tensor, value: float | Tensor) -> float | Tensor:
    """A scalar in half precision would leave its range when squared (float16 at 256)."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _of_channels(value: float | Tensor, d: Tensor) -> float | Tensor:
    """A number for each channel, ready to meet d, [B, D, KH*KW, H_out, W_out]."""
    if not isinstance(value, Tensor) or value.dim() != 1:
        return value
    return value.view(-1, *[1] * (d.dim() - 2))
