"""One stage at work: who learns, and one step of learning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pacswap.errors import TrainingError, quoted
from pacswap.recipes import FinetuneSection
from pacswap.train.engine.device import is_batch_norm
from pacswap.train.engine.groups import ParameterGroup
from pacswap.train.engine.losses import Loss
from pacswap.train.engine.optimizers import make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pacswap.train.data.batches import Batch


class NotFinite(Exception):
    """A loss or a gradient that is no number; no weight was touched."""


class Learner:
    """A stage's network, optimizer and processes.

    Args:
        model: the network, on its device; who learns is set in it.
        section: of the recipe.
        loss: what becomes small.
        accelerator: device, processes and number format.
        groups: what the stage trains.
        batch: this process's pictures of some step, on which it is seen what the loss depends on.
        norms_rest: whether batch norms gather no statistics, whatever the recipe says.

    Attributes:
        idle: names that the stage trains and the loss does not depend on; they stay as they are.
        groups: the others.

    Raises:
        TrainingError: the loss depends on nothing that learns, or is none for this network.
    """

    def __init__(
        self,
        model: nn.Module,
        section: FinetuneSection,
        loss: Loss,
        accelerator: Accelerator,
        groups: Sequence[ParameterGroup],
        batch: Batch,
        *,
        norms_rest: bool = False,
    ) -> None:
        self.norms_rest = norms_rest or section.batch_norm == "frozen"
        self.model, self.section, self.loss, self.accelerator = model, section, loss, accelerator
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._set_modes()
        _let_learn(model, groups)
        self.idle = self._without_gradient(batch)
        left = [
            replace(group, names=tuple(n for n in group.names if n not in self.idle))
            for group in groups
        ]
        self.groups = [group for group in left if group.names]
        if not self.groups:
            raise TrainingError(
                f"the loss depends on none of {quoted(self.idle[:3])}, which are all that this "
                "stage trains. Let it train something on the path to the logits; what guides a "
                "layer learns nothing while the layer's blend stays at 0."
            )
        _let_learn(model, self.groups)
        self.learning = [p for p in model.parameters() if p.requires_grad]
        accelerator.free_memory()  # forget the last stage's optimizer
        made = make_optimizer(model, section.optimizer, self.groups)
        self.optimizer = accelerator.prepare_optimizer(made)
        self.network = self._on_all_processes()

    def step(self, batch: Batch, multiplier: float, interrupted: bool) -> tuple[float, bool]:
        """Learn from one batch.

        Args:
            batch: this process's pictures.
            multiplier: of the learning rates.
            interrupted: whether this process was asked to end.

        Returns:
            The loss over all processes' pictures, before the step, and whether any process was
            asked to end.

        Raises:
            NotFinite: the loss or its gradient is not; the message names the pictures.
        """
        for entry in self.optimizer.param_groups:
            entry["lr"] = entry["base_lr"] * multiplier
        self._set_modes()
        images, masks = self._placed(batch)
        counts = self.accelerator.reduce(self.loss.counts(masks), "sum")
        world, parts = self.accelerator.num_processes, self.section.accumulate
        total = torch.zeros(2, device=masks.device, dtype=counts.dtype)
        for index, (x, y) in enumerate(_split(images, masks, parts)):
            last = index == parts - 1
            # Only the last part's backward pass adds up the gradients of all processes.
            with nullcontext() if last else self.accelerator.no_sync(self.network):
                with self.accelerator.autocast():
                    output = self.network(x)
                value = self.loss.mean(self.loss.sums(output, y), counts)
                self.accelerator.backward(value * world)  # gradients are averaged over processes
            total[0] += value.detach()
        total[1] = float(interrupted)
        value, asked = self.accelerator.reduce(total, "sum").tolist()
        if not math.isfinite(value):
            raise self._broken(f"the loss is {value}", batch)
        norm = self.accelerator.clip_grad_norm_(self.learning, self.section.clip_grad or math.inf)
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            raise self._broken(f"the gradient is {norm.item()} (the loss is {value:g})", batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value, asked > 0

    def rates(self) -> dict[str, float]:
        """The highest learning rate that each key of the recipe set, in the last step."""
        found: dict[str, float] = {}
        for entry in self.optimizer.param_groups:
            found[entry["key"]] = max(found.get(entry["key"], 0.0), entry["lr"])
        return found

    def _set_modes(self) -> None:
        self.model.train()
        if self.norms_rest:
            for module in self.model.modules():
                if is_batch_norm(module):
                    module.eval()

    def _placed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        images = batch.images.to(device, self.dtype, non_blocking=True)
        return images, batch.masks.to(device, non_blocking=True)

    def _without_gradient(self, batch: Batch) -> list[str]:
        """What the stage trains and the loss does not depend on.

        torch.distributed would wait for its gradients for ever.
        """
        learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        parts = list(_split(*self._placed(batch), self.section.accumulate))
        images, masks = (tensor[:2] for tensor in parts[-1])
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        try:
            with self.accelerator.autocast():
                output = self.model(images)
            value = self.loss.mean(self.loss.sums(output, masks), self.loss.counts(masks))
            if not value.requires_grad:
                return list(learning)
            grads = torch.autograd.grad(value, list(learning.values()), allow_unused=True)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                "a batch norm of the network needs more than 1 picture at a time, and each of "
                f"{self.accelerator.num_processes} processes takes 1 in each of "
                f"{self.section.accumulate} parts of a step. Raise finetune.batch_size, lower "
                "accumulate, or set batch_norm: frozen, for a new run in a new folder."
            ) from error
        finally:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        return [name for name, grad in zip(learning, grads, strict=True) if grad is None]

    def _on_all_processes(self) -> nn.Module:
        if self.accelerator.num_processes == 1:
            return self.model
        device = self.accelerator.device
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=ids)

    def _broken(self, what: str, batch: Batch) -> NotFinite:
        from accelerate.utils import gather_object

        names = gather_object(list(batch.names))
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        rate = max(self.rates().values())
        return NotFinite(f"{what} at learning rate {rate:g}, pictures {quoted(names[:8])}{more}")


def _let_learn(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    learning = {name for group in groups for name in group.names}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in learning)


def _split(images: Tensor, masks: Tensor, parts: int) -> Iterator[Any]:
    yield from zip(images.tensor_split(parts), masks.tensor_split(parts), strict=True)
