"""How a Triton kernel is decorated: a few configurations, the fastest of which is remembered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import triton

from pacswap.ops.gpu.refusal import INTERPRETS

# Pixels, output channels, input channels of a block; warps; stages. The first fits every GPU.
PRODUCT = (
    ({"BP": 64, "BO": 32, "BC": 32}, 4, 2),
    ({"BP": 64, "BO": 64, "BC": 32}, 4, 3),
    ({"BP": 128, "BO": 64, "BC": 32}, 4, 3),
    ({"BP": 128, "BO": 128, "BC": 32}, 8, 3),
)
# The input channels of a block are the caller's: its buffer depends on them.
PULL = (
    ({"BP": 64, "BO": 32}, 4, 2),
    ({"BP": 64, "BO": 64}, 4, 3),
    ({"BP": 128, "BO": 32}, 8, 3),
)
WEIGHT = (
    ({"BP": 32, "BO": 32, "BC": 32}, 4, 2),
    ({"BP": 64, "BO": 64, "BC": 64}, 4, 2),
    ({"BP": 32, "BO": 128, "BC": 64}, 8, 3),
)
# Without a matrix product: pixels and channels of a block.
POINTWISE = (
    ({"BP": 64, "BC": 16}, 4, 1),
    ({"BP": 256, "BC": 4}, 4, 1),
    ({"BP": 16, "BC": 64}, 4, 1),
)
PIXELWISE = (({"BP": 64}, 4, 1), ({"BP": 128}, 4, 1), ({"BP": 256}, 8, 1))
# Small, so that tests see partial blocks, and large, for each costs the interpreter milliseconds.
_INTERPRETED = {"BP": 128, "BO": 16, "BC": 16}

_KEY = (
    *("size", "C", "CO", "KH", "KW", "SH", "SW", "G"),
    *("EACH", "PRECISION"),
)


def tuned(
    choices: Iterable[tuple[Mapping[str, int], int, int]],
) -> Callable[[Any], Any]:
    """Decorate a `triton.jit` function: measured once per `_KEY`, on disk where Triton can.

    Args:
        choices: (block sides, warps, stages), the first of which fits every GPU.
    """
    configs = [
        triton.Config(dict(sides), num_warps=warps, num_stages=stages)
        for sides, warps, stages in choices
    ]
    if INTERPRETS:
        sides = {name: _INTERPRETED[name] for name in configs[0].kwargs}
        configs = [triton.Config(sides)]
    options: dict[str, Any] = {"prune_configs_by": {"early_config_prune": _fitting}}
    if "cache_results" in inspect.signature(triton.autotune).parameters:
        options["cache_results"] = True

    def decorate(function: Any) -> Any:
        known = [name for name in _KEY if name in function.arg_names]
        return triton.autotune(configs=configs, key=known, **options)(function)

    return decorate


def _fitting(configs: list[Any], named: Mapping[str, Any], **kwargs: Any) -> list[Any]:
    """The configurations whose blocks are not mostly empty; the first in any case."""
    given = {**named, **kwargs}
    groups = given.get("G", 1)
    channels = {"BO": given.get("CO", 1) // groups, "BC": given.get("C", 1) // groups}
    return [
        config
        for i, config in enumerate(configs)
        if i == 0 or all(config.kwargs.get(n, 1) < 2 * max(c, 16) for n, c in channels.items())
    ]


def size_class(pixels: int) -> int:
    """What the measurements are keyed on instead of the exact number of pixels.

    >>> size_class(64 * 64), size_class(64 * 65)
    (13, 13)
    """
    return pixels.bit_length()


def precision() -> str:
    """How float32 products are made: `tf32` if torch's matrix products may, else `ieee`.

    torch allows TF32 in cuDNN's convolutions from the start, in matrix products only when asked.
    The other backends compute PAC by matrix products, so their switch is ours.
    """
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on the old name raises where a program has used the new one.
    asked = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if asked is None else asked == "tf32"
    return "tf32" if allowed else "ieee"


def channel_block(channels: int) -> int:
    """How many input channels a program takes at once where the caller must know it."""
    return 16 if INTERPRETS else min(128, max(16, triton.next_power_of_2(channels)))
