"""Computing again in the backward pass instead of keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pacswap.errors import GuidanceError
from pacswap.ops.transforms import is_transformed

T = TypeVar("T")

# torch before 2.7 cannot tell a strict export from a compilation.
_exporting: Callable[[], bool] | None = getattr(torch.compiler, "is_exporting", None)


def recomputed(function: Callable[..., T], *args: Tensor | None) -> T:
    """`function(*args)`, of which the arguments are kept for the backward pass and no more.

    The rest is computed again there, under the same autocast. Where no gradient is asked for, in an
    export, which has no backward pass, and under torch.func, which keeps what it wants, the
    function is just called.

    Args:
        function: of tensors and whatever it holds itself; nothing in it is random.
        *args: its arguments.

    Raises:
        GuidanceError: in the backward pass, if an argument was overwritten in place since.
    """
    if not torch.is_grad_enabled() or _is_exported() or is_transformed():
        return function(*args)
    call = function if torch.compiler.is_compiling() else _guarded(function, args)
    return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False)


def _guarded(function: Callable[..., T], args: tuple[Tensor | None, ...]) -> Callable[..., T]:
    """The function, which refuses arguments that have changed: nothing else would notice."""
    versions = [_version(value) for value in args]

    def run(*given: Tensor | None) -> T:
        if [_version(value) for value in given] != versions:
            raise GuidanceError(
                "a layer with recompute=True computes again in the backward pass, and what it "
                "computed from was overwritten in place since. Swap it without recompute, or "
                "leave out the in-place operation that follows it."
            )
        return function(*given)

    return run


def _version(value: Tensor | None) -> int:
    # Tensors of inference mode count nothing.
    return 0 if value is None or value.is_inference() else value._version


def _is_exported() -> bool:
    if not torch.compiler.is_compiling():
        return False
    if not torch.compiler.is_dynamo_compiling():
        return True
    return _exporting is not None and _exporting()
