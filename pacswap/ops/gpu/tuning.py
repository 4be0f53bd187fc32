"""How a Triton kernel is decorated: a few configurations, the fastest of which is remembered."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeAlias

import torch
import triton

from pacswap.ops.gpu.refusal import INTERPRETS

# Sides of a block (pixels, output and input channels; the last is summed over), warps, stages, and
# registers of a thread where that lets two programs share a processor. Measured on an H100. The
# first fits every GPU.
PRODUCT = (
    ({"BP": 64, "BO": 32, "BC": 32}, 4, 2, None),
    ({"BP": 64, "BO": 64, "BC": 64}, 4, 4, None),
    ({"BP": 64, "BO": 128, "BC": 64}, 4, 3, None),
    ({"BP": 128, "BO": 128, "BC": 64}, 8, 3, None),
)
# The input channels of a block are the caller's: its buffer depends on them.
PULL = (
    ({"BP": 64, "BO": 32}, 4, 2, None),
    ({"BP": 64, "BO": 64}, 4, 4, None),
    ({"BP": 128, "BO": 64}, 8, 3, None),
)
WEIGHT = (
    ({"BO": 32, "BC": 32, "BP": 32}, 4, 2, None),
    ({"BO": 64, "BC": 64, "BP": 64}, 4, 3, None),
    ({"BO": 128, "BC": 128, "BP": 64}, 8, 3, 128),
    ({"BO": 128, "BC": 256, "BP": 64}, 8, 3, None),
)
# Without a matrix product: pixels and channels of a block.
POINTWISE = (
    ({"BP": 64, "BC": 16}, 4, 1, None),
    ({"BP": 256, "BC": 4}, 4, 1, None),
    ({"BP": 16, "BC": 64}, 4, 1, None),
)
PIXELWISE = (({"BP": 32}, 4, 1, None), ({"BP": 64}, 4, 1, None), ({"BP": 128}, 8, 1, None))
# Small, so that tests see partial blocks, and large, for each costs the interpreter milliseconds.
_INTERPRETED = {"BP": 128, "BO": 16, "BC": 16}

_KEY = (
    "size", "C", "CO", "KH", "KW", "SH", "SW", "G", "BC", "EACH", "PRECISION", "WANT_INPUT",
    "WANT_KERNEL",
)  # fmt: skip


# Divided by 16 or not: nothing is faster for it, and each would be compiled anew.
_COUNTS = ["M", "CHUNK", "B", "PARTS", "H", "W", "HO", "WO", "TOP", "LEFT", "size"]


Grid: TypeAlias = Callable[[Mapping[str, int]], tuple[int, ...]]


def tuned(
    choices: Iterable[tuple[Mapping[str, int], int, int, int | None]],
) -> Callable[[Any], Program]:
    """Make a function a Triton kernel: measured once per `_KEY`, on disk where Triton can.

    Args:
        choices: as above.
    """
    configs = [
        triton.Config(dict(sides), num_warps=warps, num_stages=stages, maxnreg=registers)
        for sides, warps, stages, registers in choices
    ]
    if INTERPRETS:
        sides = {name: _INTERPRETED[name] for name in configs[0].kwargs}
        configs = [triton.Config(sides)]
    return lambda function: Program(triton.jit(function, do_not_specialize=_COUNTS), configs)


class Program:
    """A Triton kernel with its configurations.

    Attributes:
        configs: to choose from.
        function: the compiled function.
    """

    def __init__(self, function: Any, configs: list[Any]) -> None:
        self.function, self.configs = function, configs
        self._names = list(inspect.signature(function.fn).parameters)
        chosen = configs[0].kwargs  # not given by a call
        self._keys = [name for name in _KEY if name in self._names and name not in chosen]
        self._fastest: dict[tuple[Any, ...], dict[str, Any]] = {}
        # Triton keeps the arguments of the call that it measures in the tuner.
        self._measuring = threading.Lock()

    def __call__(self, grid: Grid, given: Mapping[str, Any], on: torch.Tensor) -> None:
        """Run it with those of the arguments that it has, on the device of a tensor.

        The choice is remembered here: Triton takes as long to look it up as small layers run.
        """
        arguments = {name: given[name] for name in self._names if name in given}
        if len(self.configs) == 1:
            self.function[grid](**arguments, **self.configs[0].all_kwargs())
            return
        key = (on.dtype, on.device, *(arguments[name] for name in self._keys))
        if key not in self._fastest:
            with self._measuring:
                self._tuner[grid](**arguments)
                self._fastest[key] = self._tuner.best_config.all_kwargs()
        else:
            self.function[grid](**arguments, **self._fastest[key])

    @cached_property
    def _tuner(self) -> Any:
        # Made when it is needed: Triton before 3.4 makes none where there is no GPU.
        options: dict[str, Any] = {"prune_configs_by": {"early_config_prune": _fitting}}
        if "cache_results" in inspect.signature(triton.autotune).parameters:
            options["cache_results"] = True
        return triton.autotune(configs=self.configs, key=self._keys, **options)(self.function)


def _fitting(configs: list[Any], named: Mapping[str, Any], **kwargs: Any) -> list[Any]:
    """The configurations whose blocks are not mostly empty and fit; the first in any case."""
    given = {**named, **kwargs}
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    groups = given.get("G", 1)
    channels = {"BO": given.get("CO", 1) // groups, "BC": given.get("C", 1) // groups}
    return [
        config
        for i, config in enumerate(configs)
        if i == 0
        or (
            all(config.kwargs.get(n, 1) < 2 * max(c, 16) for n, c in channels.items())
            and fits(config, given, tensors[0])
        )
    ]


def fits(config: Any, given: Mapping[str, Any], on: torch.Tensor) -> bool:
    """Whether the two factors of a matrix product do, in as many copies as there are stages."""
    sides = {name: given[name] for name in ("BC",) if name in given} | config.kwargs
    summed = next(reversed(config.kwargs.values()))
    numbers = config.num_stages * summed * (sum(sides.values()) - summed)
    return bool(on.element_size() * numbers <= _most_shared(on))


def _most_shared(tensor: torch.Tensor) -> int:
    """Bytes of shared memory that a program may have; those of an A100 where torch cannot tell."""
    if not tensor.is_cuda:
        return 163 << 10
    properties = torch.cuda.get_device_properties(tensor.device)
    return int(getattr(properties, "shared_memory_per_block_optin", 163 << 10))


def size_class(pixels: int) -> int:
    """What the measurements are keyed on instead of the exact number of pixels.

    >>> size_class(64 * 64), size_class(64 * 65)
    (13, 13)
    """
    return pixels.bit_length()


def precision() -> str:
    """How float32 products are made: `tf32` if torch's matrix products may, else `tf32x3`.

    The latter is as exact as float32: three products of TF32 numbers, at half the time of one that
    does without tensor cores.

    torch allows TF32 in cuDNN's convolutions from the start, in matrix products only when asked.
    The other backends compute PAC by matrix products, so their switch is ours.
    """
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on the old name raises where a program has used the new one.
    asked = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if asked is None else asked == "tf32"
    return "tf32" if allowed else "tf32x3"


def channel_block(channels: int, most: int) -> int:
    """How many input channels a program takes at once where the caller must know it."""
    return 16 if INTERPRETS else min(most, max(16, triton.next_power_of_2(channels)))
