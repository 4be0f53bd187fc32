"""Keeping a model's state while something is tried on it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Restore every module's own training flag on leaving, frozen BatchNorms included."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing off for the moment: a trace would hold what it wraps."""
    flagged = [m for m in model.modules() if getattr(m, "grad_checkpointing", False)]
    try:
        for module in flagged:
            module.grad_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in flagged:
            module.grad_checkpointing = True  # type: ignore[assignment]


@contextmanager
def kept_random() -> Iterator[None]:
    """Restore the random states that a forward pass on the CPU or on meta moves."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)
