"""Which implementation runs a call, and why."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, TypeAlias

import torch

from pacswap.errors import BackendError, nearest_hint, quoted
from pacswap.ops import eager, reference, taps
from pacswap.ops.gpu.refusal import why_not_here

Backend: TypeAlias = Literal["auto", "reference", "taps", "eager", "triton"]

# None: imported when it is first chosen.
_BACKENDS: dict[str, ModuleType | None] = {
    "reference": reference,
    "taps": taps,
    "eager": eager,
    "triton": None,
}


def why_not(backend: str) -> str | None:
    """Why that backend cannot run a call now, or None if it can."""
    if backend == "eager" and torch.compiler.is_compiling():
        return "its hand-written backward is opaque to torch.compile and torch.export"
    if backend == "triton":
        return why_not_here()
    return None


def explain(backend: Backend = "auto") -> tuple[str, str]:
    """The backend that a call made now would take, and the reason.

    Returns:
        (name, reason).

    Raises:
        BackendError: the named backend is unknown or cannot run the call.

    Example:
        >>> explain()
        ('eager', 'tap by tap, keeps only input, kernel and weight for the backward pass')
    """
    if backend == "auto":
        refusal = why_not("eager")
        if refusal is None:
            return "eager", "tap by tap, keeps only input, kernel and weight for the backward pass"
        return "taps", f"eager is out: {refusal}"
    if backend not in _BACKENDS:
        names = ["auto", *_BACKENDS]
        raise BackendError(f"backend={backend!r} is unknown. {nearest_hint(backend, names)}")
    refusal = why_not(backend)
    if refusal is not None:
        others = quoted([name for name in _BACKENDS if why_not(name) is None])
        raise BackendError(f"backend={backend!r} cannot run this call: {refusal}. Can: {others}.")
    return backend, "asked for by name"


def choose(backend: Backend) -> ModuleType:
    """The module that implements the backend that `explain` names."""
    module = _BACKENDS[explain(backend)[0]]
    if module is None:
        # A statement, which torch.compile follows as it does not `import_module`.
        from pacswap.ops.gpu import backend as triton

        return triton
    return module
