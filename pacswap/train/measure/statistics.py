"""How far a difference can be trusted: Student's t over seeds, the bootstrap over pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """From `low` to `high`, both included."""

    low: float
    high: float


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's interval for the mean of what the values were drawn from.

    Args:
        values: at least two; fewer have no spread, and the answer is None.
        confidence: the share of such intervals that hold the mean, if the values are normal.

    Example:
        >>> low, high = t_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(values) < 2:
        return None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    reach = t_quantile(0.5 + confidence / 2, len(values) - 1) * spread
    mean = statistics.fmean(values)
    return Interval(mean - reach, mean + reach)


def t_quantile(probability: float, freedom: int) -> float:
    """The number below which Student's t falls with the given probability, ½ to 1.

    >>> round(t_quantile(0.975, 2), 4)
    4.3027
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):  # halved until no double lies between
        middle = (low + high) / 2
        if _t_within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _t_within(angle: float, freedom: int) -> float:
    """P(|t| ≤ √freedom · tan angle): a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def resampled(
    tallies: Tensor, measure: Callable[[Tensor], Tensor], *, resamples: int, seed: int
) -> Tensor:
    """A measure of sums over pictures that are drawn anew, with replacement, again and again.

    Args:
        tallies: [N, ...], one entry per picture.
        measure: takes sums [R, ...], float64, and gives [R, M].
        resamples: how often N pictures are drawn, R.
        seed: the same draws for the same N, whatever is measured: pairs stay pairs.

    Returns:
        [R, M].
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(tallies), (resamples, len(tallies)), generator=generator)
    weights = torch.zeros(resamples, len(tallies), dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))  # how often each picture was drawn
    flat = tallies.flatten(1).double()
    # In parts: with many classes and seeds the sums would take gigabytes.
    parts = [measure((w @ flat).unflatten(1, tallies.shape[1:])) for w in weights.split(250)]
    return torch.cat(parts)


def percentile_interval(values: Tensor, confidence: float = 0.95) -> list[Interval | None]:
    """Where the middle share of resampled values lies, column by column.

    Args:
        values: [R, M]; NaN is left out.
        confidence: the share.

    Returns:
        One per column; None where all are NaN.
    """
    edges = torch.tensor([0.5 - confidence / 2, 0.5 + confidence / 2], dtype=values.dtype)
    lows, highs = values.nanquantile(edges, dim=0).tolist()
    return [
        None if low != low else Interval(low, high) for low, high in zip(lows, highs, strict=True)
    ]
