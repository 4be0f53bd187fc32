"""Which backend is taken and why, and every message of an operation that is called wrongly."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pacswap import ops
from pacswap.errors import BackendError, ShapeError


@pytest.mark.parametrize(
    ("backend", "compiling", "expected"),
    [
        ("auto", False, ("loops", "compiled loops, near the price of the convolution on a CPU; triton is out: Triton needs a CUDA GPU, and torch sees none")),
        ("auto", True, ("taps", "ordinary operations, which compilers see through; triton is out: Triton needs a CUDA GPU, and torch sees none; loops is out: its loops are opaque to torch.compile and torch.export; eager is out: its hand-written backward is opaque to torch.compile and torch.export")),
        ("taps", False, ("taps", "asked for by name")),
        ("reference", True, ("reference", "asked for by name")),
    ],
)  # fmt: skip
def test_explain_says_which_backend_and_why(backend, compiling, expected, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ops.explain(backend) == expected


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("egaer", "backend='egaer' is unknown. Nearest: 'eager'."),
        ("cuda", "backend='cuda' is unknown. Known: 'auto', 'reference', 'taps', 'eager', 'loops', 'triton'."),
        ("eager", "backend='eager' cannot run this call: its hand-written backward is opaque to torch.compile and torch.export. Can: 'reference', 'taps'."),
    ],
)  # fmt: skip
def test_backend_errors(backend, message, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(BackendError) as raised:
        ops.explain(backend)
    assert str(raised.value) == message


def conv(**changed: Any) -> Tensor:
    """A call that is right but for what is changed."""
    call: dict[str, Any] = {
        "input": torch.zeros(2, 4, 5, 6),
        "kernel": torch.ones(2, 1, 9, 5, 6),
        "weight": torch.zeros(6, 4, 3, 3),
        "bias": torch.zeros(6),
        "padding": 1,
    }
    return ops.pac_conv2d(**{**call, **changed})


def kernel(guidance: Tensor | None = None, kernel_size: Any = 3, **changed: Any) -> Tensor:
    return ops.adapting_kernel(
        torch.zeros(1, 3, 4, 5) if guidance is None else guidance, kernel_size, **changed
    )


CALL = "groups=1, stride=(1, 1), dilation=(1, 1), padding=(1, 1, 1, 1) (left, right, top, bottom)."
GOT = "Got input [2, 4, 5, 6], kernel [2, 1, 9, 5, 6], weight [6, 4, 3, 3], bias [6], " + CALL
GROUPED = "C_in must be groups · weight.shape[1], and C_out divisible by groups. "
FLOATING = "expected floating-point tensors of one dtype on one device, got "
SHAPE_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "too_small": (lambda: kernel(kernel_size=(5, 3), dilation=(1, 2), padding=(0, 1)), "the window is larger than the padded image: kernel_size=(5, 3), dilation=(1, 2), padding=(1, 1, 0, 0) (left, right, top, bottom), image 4×5. Use a larger image or more padding."),
    "padding_mode": (lambda: kernel(padding_mode="mirror"), "padding_mode='mirror' is unknown. Known: 'zeros', 'reflect', 'replicate', 'circular'."),
    "padding_word": (lambda: kernel(padding="full"), "padding='full' is unknown. Use an int, a pair of ints, 'same' or 'valid'."),
    "same_strided": (lambda: kernel(padding="same", stride=2), "padding='same' needs stride 1, got stride=(2, 2). Give the padding as numbers."),
    "size_triple": (lambda: kernel(kernel_size=(3, 3, 3)), "kernel_size must be an int or a pair of ints, got (3, 3, 3)."),
    "stride_float": (lambda: kernel(stride=1.5), "stride must be an int or a pair of ints, got 1.5."),
    "stride_bool": (lambda: kernel(stride=True), "stride must be an int or a pair of ints, got True."),
    "stride_0": (lambda: kernel(stride=(1, 0)), "stride must be at least 1, got (1, 0)."),
    "padding_-1": (lambda: kernel(padding=-1), "padding must be at least 0, got -1."),
    "dilation_0": (lambda: kernel(dilation=0), "dilation must be at least 1, got 0."),
    "guidance_3d": (lambda: kernel(torch.zeros(3, 4, 5)), "guidance must be [B, D, H, W], got [3, 4, 5]."),
    "guidance_int": (lambda: kernel(torch.zeros(1, 3, 4, 5, dtype=torch.int64)), FLOATING + "guidance torch.int64 on cpu."),
    "form": (lambda: kernel(form="gausian"), "form='gausian' is unknown. Nearest: 'gaussian', 'laplacian'."),
    "distance": (lambda: kernel(distance="l1"), "distance='l1' is unknown. Known: 'sum', 'mean'."),
    "normalize": (lambda: kernel(normalize=None), "normalize=None is unknown. Nearest: 'none'."),
    "bandwidth_0": (lambda: kernel(bandwidth=0), "bandwidth must be positive and finite, got 0."),
    "bandwidth_nan": (lambda: kernel(bandwidth=float("nan")), "bandwidth must be positive and finite, got nan."),
    "bandwidth_inf": (lambda: kernel(bandwidth=float("inf")), "bandwidth must be positive and finite, got inf."),
    "weight_3d": (lambda: conv(weight=torch.zeros(6, 4, 3)), "weight must be [C_out, C_in/groups, KH, KW], got [6, 4, 3]."),
    "input_3d": (lambda: conv(input=torch.zeros(4, 5, 6)), "input must be [B, C_in, H, W]. " + GOT.replace("[2, 4, 5, 6]", "[4, 5, 6]")),
    "channels": (lambda: conv(input=torch.zeros(2, 3, 5, 6)), GROUPED + GOT.replace("[2, 4, 5, 6]", "[2, 3, 5, 6]")),
    "groups_0": (lambda: conv(groups=0), GROUPED + GOT.replace("groups=1", "groups=0")),
    "groups_4": (lambda: conv(weight=torch.zeros(6, 1, 3, 3), groups=4), GROUPED + GOT.replace("[6, 4, 3, 3]", "[6, 1, 3, 3]").replace("groups=1", "groups=4")),
    "kernel": (lambda: conv(kernel=torch.ones(2, 1, 9, 3, 4)), "kernel must be [B, 1, KH*KW, H_out, W_out] = [2, 1, 9, 5, 6]. " + GOT.replace("9, 5, 6", "9, 3, 4")),
    "no_bias": (lambda: conv(kernel=torch.ones(1, 1, 9, 5, 6), bias=None), "kernel must be [B, 1, KH*KW, H_out, W_out] = [2, 1, 9, 5, 6]. " + GOT.replace("[2, 1, 9", "[1, 1, 9").replace(", bias [6]", "")),
    "two_faults": (lambda: conv(kernel=torch.ones(2, 9, 5, 6), bias=torch.zeros(4)), "kernel must be [B, 1, KH*KW, H_out, W_out] = [2, 1, 9, 5, 6]; bias must be [C_out] = [6]. " + GOT.replace("[2, 1, 9, 5, 6]", "[2, 9, 5, 6]").replace("bias [6]", "bias [4]")),
    "dtypes": (lambda: conv(kernel=torch.ones(2, 1, 9, 5, 6).half(), bias=None), FLOATING + "input torch.float32 on cpu, kernel torch.float16 on cpu, weight torch.float32 on cpu."),
    "devices": (lambda: conv(weight=torch.zeros(6, 4, 3, 3, device="meta"), bias=None), FLOATING + "input torch.float32 on cpu, kernel torch.float32 on cpu, weight torch.float32 on meta."),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), SHAPE_ERRORS.values(), ids=SHAPE_ERRORS)
def test_shape_errors(call, message):
    with pytest.raises(ShapeError) as raised:
        call()
    assert str(raised.value) == message


def test_the_calls_of_these_errors_are_right_unchanged():
    assert conv().shape == (2, 6, 5, 6)
    assert kernel().shape == (1, 1, 9, 2, 3)
