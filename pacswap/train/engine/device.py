"""Where a training runs: devices, processes, number formats, signals and random numbers."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pacswap.errors import PacswapError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

_SAME_WISH = 1.0  # seconds
_T = TypeVar("_T")


def make_accelerator(precision: str) -> Accelerator:
    """This process as accelerate sees it: its device, its rank, its number format.

    Args:
        precision: fp32, fp16 or bf16.

    Raises:
        TrainingError: accelerate is missing, or the device cannot do what is asked.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DistributedType
    except ImportError as error:
        raise TrainingError(
            "accelerate is missing, which training runs on. Install it: "
            'pip install "pacswap[train]"'
        ) from error
    # These outlive a training; the next one may want another number format.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    form = "no" if precision == "fp32" else precision
    try:
        accelerator = Accelerator(mixed_precision=form)
        if accelerator.num_processes == 1 < int(os.environ.get("WORLD_SIZE", "1")):
            # Without a GPU accelerate takes torchrun's processes for strangers unless told.
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(mixed_precision=form, cpu=True)
    except ValueError as error:
        raise TrainingError(
            f"finetune.precision: {precision} cannot run here: {error} Take fp32."
        ) from error
    if precision == "fp16" and accelerator.device.type != "cuda":
        raise TrainingError(
            f"finetune.precision: fp16 needs a CUDA device, and this runs on "
            f"{accelerator.device.type}. Take fp32 or bf16."
        )
    engines = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in engines:
        raise TrainingError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which divides the "
            "network; pacswap trains whole copies. Launch with accelerate launch --multi_gpu or "
            "torchrun."
        )
    accelerator.gradient_accumulation_steps = 1  # pacswap's own, whatever a launcher says
    return accelerator


def on_main(accelerator: Accelerator, action: Callable[[], _T]) -> _T:
    """Let the main process do something; all wait for it and get what it got.

    Args:
        accelerator: the processes.
        action: what it does; a few plain values may come of it.

    Returns:
        What came of it, in every process.

    Raises:
        PacswapError: the action's own, in every process, so that none waits for another for ever.
    """
    from accelerate.utils import broadcast_object_list

    answer: list[Any] = [None, None]  # what came of it, what is wrong
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except PacswapError as error:
            broadcast_object_list([None, error])
            raise
    value, fault = broadcast_object_list(answer)
    if fault is not None:
        raise fault
    result: _T = value
    return result


def seed_step(seed: int, step: int, rank: int) -> None:
    """Start all random numbers of one step anew, so that none before it matters.

    Args:
        seed: of the training.
        step: how many steps are done.
        rank: of the process.
    """
    from accelerate.utils import set_seed

    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=4).digest()
    set_seed(int.from_bytes(digest, "little"))


class Interrupts:
    """Remembers Ctrl-C and SIGTERM, so that a step is finished first; the second one ends at once.

    A launcher passes on what the terminal has sent to all: what comes within a second is the same
    wish. Outside the main thread, where Python allows no handlers, it changes nothing.

    Attributes:
        received: the signal's name, None before one came.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() > self._since + _SAME_WISH:
            raise KeyboardInterrupt(
                f"{self.received} and then {signal.Signals(number).name}: ended at once. Resume "
                "goes on from the last checkpoint."
            )


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Restore every module's mode and every parameter's `requires_grad` on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def synchronised(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Batch norms gather their statistics over all processes inside, if `wanted`.

    The network's own norms come back on leaving, with what was gathered.
    """
    if not wanted:
        yield
        return
    from timm.layers import convert_sync_batchnorm

    own = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_batch_norm(child)
    ]
    convert_sync_batchnorm(model)
    try:
        yield
    finally:
        for parent, name, norm in own:
            changed = getattr(parent, name)
            for key, buffer in changed.named_buffers(recurse=False):
                norm.register_buffer(key, buffer)
            norm.train(changed.training)
            setattr(parent, name, norm)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module gathers statistics over batches."""
    return (
        isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and isinstance(module.running_mean, torch.Tensor)
    )
