"""Loops compiled by numba, run by the threads that torch computes with.

numba's own parallel loops would bring a second OpenMP beside torch's; its threads and torch's would
wait for the same cores. The threads of torch's OpenMP can be lent: its entry for compilers,
GOMP_parallel, calls any function of C, and numba makes such functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic
from torch import Tensor

# Numbers below which waking a thread takes longer than what it would do.
_WORTH_A_THREAD = 1 << 15
# OpenMP as GNU, Intel and LLVM name it; all three have the entry.
_OPENMP = ("libgomp.so.1", "libiomp5.so", "libomp.so", "libomp.dylib")


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code, compiled for the types of a call when it is first called.

    Additions may be reordered, which vectorised sums need; NaN and infinity stay what they are.
    """
    return _compiled(function)


def inner(function: Callable[..., Any]) -> Any:
    """As `compiled`, for what only compiled functions call, without a way in from Python."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _compiled(function: Callable[..., Any], **options: bool) -> Any:
    fast = {"contract", "reassoc", "nsz"}
    made = numba.njit(nogil=True, error_model="numpy", fastmath=fast, **options)(function)
    # Without it where neither beside that file nor in the user's home one can be written.
    with suppress(RuntimeError):
        made._cache = _Cache(function)
    return made


class _Cache(FunctionCache):
    """numba's, on the disk, of code that is of use while no file of this package has changed.

    numba looks at the file of the function alone, and what that calls would be the old one's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = self._cache_file._source_stamp, _SOURCES


def _fingerprint(folder: Path) -> str:
    """Of all files of Python in a folder."""
    made = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        made.update(file.read_bytes())
    return made.hexdigest()


# Now, when the code is read: a file that is edited later is not what is compiled then.
_SOURCES = _fingerprint(Path(__file__).parent)


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """What lies at an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), code


@intrinsic
def _ticket(typingctx: Any, address: Any) -> Any:
    """The number at an address, which becomes one more; no two threads get the same."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(64)
        place = builder.inttoptr(args[0], number.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(number, 1), "seq_cst")

    return types.int64(types.int64), code


def parts(count: int, numbers: int) -> int:
    """Among how many threads to share so much work.

    Args:
        count: of what can be divided.
        numbers: that are computed in all; few are left to one thread.
    """
    if _parallel() is None:
        return 1
    return max(1, min(torch.get_num_threads(), count, numbers // _WORTH_A_THREAD))


def shared(
    loop: Any, like: Tensor, count: int, threads: int, given: Sequence[int], axes: int = 1
) -> None:
    """Call `loop(first, last, thread, given, like)` so that all of `range(count)` is done.

    Args:
        loop: compiled; takes the numbers of `given` as an array, and an empty array of the dtype.
        like: its dtype is that of all tensors, float32 or float64.
        count: of what can be divided.
        threads: what `parts` gave.
        given: addresses, sizes and other numbers.
        axes: of the array of the dtype; `registers` says what they mean.
    """
    if threads == 1:
        loop(0, count, 0, np.array(given, dtype=np.int64), _EMPTY[like.dtype, axes])
        return
    entry, (region, address) = _parallel(), _entered(loop, like.dtype, axes)
    assert entry is not None  # `parts` asked
    head = (0, threads, count, len(given), 0, 0, address)
    packed = (ctypes.c_int64 * (_HEAD + len(given)))(*head, *given)
    packed[4] = place = ctypes.addressof(packed)
    entry(region.address, place, threads, 0)
    if packed[5] != threads:
        raise RuntimeError(f"{packed[5]} of {threads} parts of a compiled loop came to their end.")


# Next part, parts, count, how many numbers, its own address, parts that are done, the address of
# the loop.
_HEAD = 7


def described(tensor: Tensor) -> tuple[int, ...]:
    """(address, *sizes) of a contiguous tensor, as loops read it."""
    return tensor.data_ptr(), *tensor.shape


_EMPTY: dict[tuple[torch.dtype, int], Any] = {
    (dtype, axes): np.empty((0,) * axes, kind)
    for dtype, kind in ((torch.float32, np.float32), (torch.float64, np.float64))
    for axes in (1, 2, 3)
}


@lru_cache(maxsize=64)
def _entered(loop: Any, dtype: torch.dtype, axes: int) -> tuple[Any, int]:
    """What threads enter, and the address of a loop's machine code, compiled or from the disk."""
    none = _EMPTY[dtype, axes]
    kinds = (types.int64, types.int64, types.int64, _GIVEN, numba.typeof(none))
    loop.compile(kinds)
    made = loop.get_compile_result(types.void(*kinds))
    name = made.fndesc.llvm_cfunc_wrapper_name
    return _region(none.dtype, axes), made.library.get_pointer_to_function(name)


_GIVEN = types.Array(types.int64, 1, "C")


@intrinsic
def _call(
    typingctx: Any, address: Any, first: Any, last: Any, thread: Any, given: Any, like: Any
) -> Any:
    """Call the loop at an address: code that has its own copy of a loop would be made anew."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = [context.get_value_type(kind) for kind in signature.args[1:]]
        loop = ir.FunctionType(context.get_value_type(types.none), kinds)
        builder.call(builder.inttoptr(args[0], loop.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, first, last, thread, given, like), code


@lru_cache(maxsize=8)
def _region(kind: Any, axes: int) -> Any:
    """The function that each thread of a parallel region calls."""
    none = (0,) * axes

    def region(data: Any) -> None:
        head = numba.carray(data, (_HEAD,), np.int64)
        given = numba.carray(data, (_HEAD + head[3],), np.int64)[_HEAD:]
        threads, count = head[1], head[2]
        # One part after another: OpenMP may give fewer threads than it was asked for.
        part = _ticket(head[4])
        while part < threads:
            first, last = count * part // threads, count * (part + 1) // threads
            _call(head[6], first, last, part, given, np.empty(none, kind))
            _ticket(head[4] + 5 * 8)
            part = _ticket(head[4])

    return numba.cfunc("void(voidptr)", error_model="numpy")(region)


@lru_cache(maxsize=1)
def _parallel() -> Any:
    """GOMP_parallel of the OpenMP that torch has loaded; None where that has no such entry."""
    for name in (*_loaded(), *_OPENMP):
        try:
            library = ctypes.CDLL(name, mode=getattr(os, "RTLD_NOLOAD", 0))
            entry = library.GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        entry.restype = None
        return entry
    return None


def _loaded() -> list[str]:
    """The files of OpenMP that are loaded, torch's own first: wheels may rename them."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    words = (line.split() for line in maps.read_text(encoding="utf-8").splitlines())
    files = {w[-1] for w in words if re.search(r"/lib(gomp|iomp|omp)[^/]*$", w[-1])}
    home = str(Path(torch.__file__).parents[1])
    return sorted(files, key=lambda file: (not file.startswith(home), file))
