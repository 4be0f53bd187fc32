"""Why the Triton backend cannot run a call. Imports no Triton."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from pacswap.ops.window import Window

INSTALLED = find_spec("triton") is not None
# Triton reads it when its programs are first seen, which is after this.
INTERPRETS = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_TAPS = 63  # on each axis: a bit of 64 each
# Its compiler ends the process over the loop of `dense.pull`.
HAS_OLD_TRITON = torch.__version__ < "2.6"  # a `TorchVersion` compares numbers
# Pixels are counted in int32 by the programs; room for what the last blocks and parts hang over.
MOST_PIXELS = 2**31 - 2**20


def why_not_triton(
    input: Tensor, weight: Tensor | None, window: Window | None, groups: int
) -> str | None:
    """Why the Triton backend cannot run this call, or None if it can.

    Args:
        input: v of `pac_conv2d` or the guidance of `tap_distance`, [B, C, H, W]; of a sequence or
            a volume with its own axes.
        weight: W of `pac_conv2d`, [C_out, C_in/groups, KH, KW], of a sequence or a volume with its
            own sides; None for a distance.
        window: the geometry, None if it is not made yet or not of an image.
        groups: as in `torch.nn.Conv2d`; every number of groups is supported.

    Example:
        >>> why_not_triton(torch.zeros(1, 4, 8, 8, dtype=torch.float64), None, None, 1)
        'it computes in float32, float16 and bfloat16, not in float64'
    """
    if input.dtype not in DTYPES:
        name = str(input.dtype).removeprefix("torch.")
        return f"it computes in float32, float16 and bfloat16, not in {name}"
    refusal = why_not_here()
    if refusal is not None:
        return refusal
    if not input.is_cuda and not INTERPRETS:
        return f"the tensors are on {input.device.type}, not on a CUDA GPU"
    if input.is_cuda and torch.cuda.get_device_properties(input.device).major < 8:
        return "Triton's matrix products need a GPU of compute capability 8.0 or above"
    B, _, *size = input.shape
    seen = size if window is None else window.output_size(*size)
    if B * max(math.prod(size), math.prod(seen)) > MOST_PIXELS:
        return "it counts the pixels of a batch in 32 bits, and there are more"
    if weight is None or 1 < groups == input.shape[1]:
        return None
    sides = weight.shape[2:][-2:]  # not of the window, which is not here if of a sequence
    if max(sides) > MOST_TAPS:
        return f"its matrix products know windows of up to {MOST_TAPS} taps a side"
    if max(weight.numel(), math.prod(sides) * math.prod(seen[-2:])) > MOST_PIXELS:
        return "its matrix products count factors and weights in 32 bits, and there are more"
    return None


def why_not_here() -> str | None:
    """Why the Triton backend can run no call at all here and now, or None if it may run some."""
    if not INSTALLED:
        return "triton is not installed (pip install triton; Linux only)"
    if HAS_OLD_TRITON:
        return f"it needs torch 2.6 or above, and this is {torch.__version__}"
    if torch.version.hip is not None:
        return "it is written for NVIDIA GPUs, and nobody has tried it on this build's AMD ones"
    if _exports():
        return "an exported graph must run where Triton is not installed"
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return "its programs are opaque to torch.jit.trace"
    if not INTERPRETS and not torch.cuda.is_available():
        return "Triton needs a CUDA GPU, and torch sees none"
    return None


def _exports() -> bool:
    """Whether torch.export is tracing; torch before 2.7 cannot tell."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return exporting is not None and exporting()
