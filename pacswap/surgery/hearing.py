"""Whether layers answer to their guidance: how far their kernels are from a constant one's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pacswap.nn import AdaptingKernel, Adaptive, PacCRF, reduced


class Ears:
    """Listens to the kernels that layers receive or make, from now on.

    Attributes:
        heard: the largest difference to the kernel of a constant guidance, by layer.
    """

    def __init__(self, layers: dict[str, Adaptive]) -> None:
        self.heard = dict.fromkeys(layers, 0.0)
        self.made: list[tuple[Tensor, float]] = []
        for name, layer in layers.items():
            assert isinstance(layer, nn.Module)
            hook = self._infer if isinstance(layer, PacCRF) else self._receive
            layer.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True)
            if layer.adapting_kernel is not None:
                layer.adapting_kernel.register_forward_hook(self._make)

    def _make(self, kernel: AdaptingKernel, args: tuple[Any, ...], made: Any) -> None:
        if made is not None:
            self.made.append((made, _difference(kernel, args[0], made)))

    def _receive(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert isinstance(layer, Adaptive)
        received = layer.received(args, kwargs)
        for kernel, difference in self.made:
            if kernel is received:
                self.heard[name] = max(self.heard[name], difference)

    def _infer(self, name: str, crf: PacCRF, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A CRF makes its kernels itself, and none while its blend is 0 and nothing learns."""
        for term in crf.terms:
            if term.adapting_kernel is not None and len(args) > 1:
                features = reduced(args[1], term.options.blur)
                made = term.adapting_kernel.forward(features)
                assert made is not None
                difference = _difference(term.adapting_kernel, features, made)
                self.heard[name] = max(self.heard[name], difference)


def _difference(kernel: AdaptingKernel, features: Tensor, made: Tensor) -> float:
    constant = kernel.forward(torch.zeros_like(features))
    assert constant is not None
    return (made - constant).abs().max().item()
