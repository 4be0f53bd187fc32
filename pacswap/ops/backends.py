"""Which implementation runs a call, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from pacswap.errors import BackendError, nearest_hint, quoted
from pacswap.ops import eager, reference, taps
from pacswap.ops.gpu.refusal import INTERPRETS, why_not_here, why_not_triton
from pacswap.ops.measure import Measure
from pacswap.ops.tiles import forward_cost
from pacswap.ops.transforms import is_forward, is_transformed
from pacswap.ops.window import Window

Backend: TypeAlias = Literal["auto", "reference", "taps", "eager", "loops", "triton"]

BACKENDS = ("reference", "taps", "eager", "loops", "triton")
_PREFERRED = ("triton", "loops", "eager", "taps")  # in the order in which `auto` asks them
_GOOD_AT = {
    "triton": "GPU programs, near the price of the convolution",
    "loops": "compiled loops, near the price of the convolution on a CPU",
    "eager": "tap by tap, keeps only input, kernel and weight for the backward pass",
    "taps": "ordinary operations, which compilers see through",
}


@dataclass(frozen=True)
class Task:
    """What a backend is asked to do.

    Attributes:
        tensors: input, kernel and weight of a convolution; the guidance of a kernel.
        window: the geometry; of an image only.
        groups: of a convolution.
        measure: φ, where distances are asked for.
        channel_wise: whether there is a kernel for each channel.
    """

    tensors: tuple[Tensor, ...]
    window: Window | None = None
    groups: int = 1
    measure: Measure | None = None
    channel_wise: bool = False


def why_not(backend: str, task: Task | None = None) -> str | None:
    """Why that backend cannot run a task now, or None if it can.

    Without a task: why it can run none.
    """
    asked = _REFUSALS.get(backend)
    return asked(task) if asked else None


def _why_not_eager(task: Task | None) -> str | None:
    if torch.compiler.is_compiling():
        return "its hand-written backward is opaque to torch.compile and torch.export"
    return _why_transformed("its hand-written backward is")


def _why_not_loops(task: Task | None) -> str | None:
    if torch.compiler.is_compiling():
        return "its loops are opaque to torch.compile and torch.export"
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return "its loops are opaque to what traces or watches torch's operations now"
    refusal = _why_transformed("its loops are")
    if refusal is not None:
        return refusal
    for tensor in () if task is None else task.tensors:
        if not tensor.is_cpu:
            return f"its loops run on a CPU, and the tensors are on {tensor.device}"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"its loops read plain tensors, and one is a {type(tensor).__name__}"
        if not tensor.is_floating_point():
            return f"its loops compute floating-point numbers, and the tensors are {tensor.dtype}"
    if task is not None and task.channel_wise:
        return "its loops know one kernel for all channels, not one for each"
    if task is not None and task.measure == "asymmetric":
        return "its loops know no asymmetric difference"
    return _why_no_numba()


@lru_cache(maxsize=1)
def _why_no_numba() -> str | None:
    try:
        import numba  # noqa: F401
    except Exception as fault:  # it refuses versions of NumPy and Python that it does not know
        missing = isinstance(fault, ModuleNotFoundError) and fault.name == "numba"
        reason = "is not installed (pip install numba)" if missing else f"is broken: {fault}"
        return f"numba {reason}"
    return None


def _why_transformed(what: str) -> str | None:
    if not is_transformed():
        return None
    return f"{what} opaque to " + ("forward-mode differentiation" if is_forward() else "torch.func")


def _why_not_triton(task: Task | None) -> str | None:
    if task is None:
        refusal = why_not_here()
    else:
        input, *others = task.tensors
        weight = others[-1] if others else None
        refusal = why_not_triton(input, weight, task.window, task.groups)
    return refusal or _why_transformed("its programs are")


_REFUSALS: dict[str, Callable[[Task | None], str | None]] = {
    "eager": _why_not_eager,
    "loops": _why_not_loops,
    "triton": _why_not_triton,
}


def explain(backend: Backend = "auto", task: Task | None = None) -> tuple[str, str]:
    """The backend that a call made now would take, and the reason.

    Args:
        backend: as in `pac_conv2d`.
        task: what is asked of it; None for any.

    Returns:
        (name, reason).

    Raises:
        BackendError: the named backend is unknown or cannot run the call.

    Example:
        >>> explain("eager")
        ('eager', 'asked for by name')
        >>> from pacswap.ops import make_window
        >>> tensors = torch.ones(1, 64, 8, 8), torch.ones(1, 1, 9, 8, 8), torch.ones(64, 64, 3, 3)
        >>> name, reason = explain("auto", Task(tensors, make_window(3, padding=1)))
        >>> print(reason.split("; ")[0])  # doctest: +SKIP
        compiled loops, near the price of the convolution on a CPU (about 1.09 times it, forward, …)
    """
    name, refusals = _chosen(backend, task)
    if backend != "auto":
        return name, "asked for by name"
    return name, "; ".join([_GOOD_AT[name] + _estimate(name, task), *refusals])


def _chosen(backend: Backend, task: Task | None) -> tuple[str, list[str]]:
    """The backend, and for `auto` why not those before it."""
    if backend == "auto":
        refusals: list[str] = []
        for name in _PREFERRED:
            refusal = why_not(name, task)
            if refusal is None:
                return name, refusals
            refusals.append(f"{name} is out: {refusal}")
    if backend not in BACKENDS:
        names = ["auto", *BACKENDS]
        raise BackendError(f"backend={backend!r} is unknown. {nearest_hint(backend, names)}")
    refusal = why_not(backend, task)
    if refusal is not None:
        others = quoted([name for name in BACKENDS if why_not(name, task) is None])
        raise BackendError(f"backend={backend!r} cannot run this call: {refusal}. Can: {others}.")
    return backend, []


def _first(task: Task | None) -> str:
    """What `auto` takes, without the reasons, which take as long as a small layer."""
    on_cpu = task is not None and task.tensors[0].is_cpu and not INTERPRETS
    known = _PREFERRED[1 if on_cpu else 0 :]  # without the GPU programs
    for name in known[:-1]:
        if why_not(name, task) is None:
            return name
    return known[-1]


def _estimate(name: str, task: Task | None) -> str:
    """What a convolution by the loops is estimated to take."""
    if name != "loops" or task is None or task.window is None or len(task.tensors) < 3:
        return ""
    cost = forward_cost(tuple(task.tensors[2].shape))
    return f" (about {cost:.2f} times it, forward, by the model of docs/performance.md)"


def choose(backend: Backend, task: Task | None = None) -> ModuleType:
    """The module that implements the backend that `explain` names."""
    name = _first(task) if backend == "auto" else _chosen(backend, task)[0]
    if name == "loops":
        # Only here: numba need not be there, and takes long to import.
        from pacswap.ops import loops

        return loops
    if name == "triton":
        # A statement, which torch.compile follows as it does not `import_module`.
        from pacswap.ops.gpu import backend as triton

        return triton
    return {"eager": eager, "taps": taps, "reference": reference}[name]
