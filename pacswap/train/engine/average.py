"""A moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of all parameters and buffers.

    It starts at the weights as they are. Whole numbers (how many batches a norm has seen) are taken
    as they come.

    Args:
        model: the network.
        decay: how much of the average stays at each update, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in self._current().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are now."""
        for name, tensor in self._current().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - self.decay)
            else:
                self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the network the averaged weights."""
        for name, tensor in self._current().items():
            tensor.copy_(self.tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the averaged weights inside."""
        kept = {name: tensor.detach().clone() for name, tensor in self._current().items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in self._current().items():
                    tensor.copy_(kept[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up an average that was kept in a checkpoint."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def _current(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
