"""The adapting kernels that a model makes on images, and the features that it makes them from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import PlanError
from pacswap.nn import AdaptingKernel, Adaptive, PacCRF, PacFilter2d, reduced
from pacswap.surgery.modes import awake, kept_modes, kept_random
from pacswap.surgery.rewrite import pac_layers


@dataclass(frozen=True)
class Seen:
    """An adapting kernel as a layer received it in a forward pass.

    Attributes:
        layer: dotted name of the pixel-adaptive layer that it weighs.
        term: which of a CRF's terms, from 0; None for other layers, which have one kernel.
        kernel: the module that made it; layers that share one name the same module.
        features: what it was made from, [B, D, H, W], projected and resized.
    """

    layer: str
    term: int | None
    kernel: AdaptingKernel
    features: Tensor

    @property
    def name(self) -> str:
        """The layer's name, with the term's where there is one."""
        return self.layer if self.term is None else f"{self.layer}.kernels.{self.term}"

    def factors(self) -> Tensor:
        """K in 0 … 1 without its normalisation, whose values depend on the number of taps.

        The inverse form, which has no bound, is divided by the largest factor of each window.

        Returns:
            [B, 1 or D, KH*KW, H_out, W_out], float32 or better.
        """
        twin = copy.copy(self.kernel)
        twin.normalize, twin.enabled = "none", True
        # Not called as a module: that would run the hooks that it shares with the original.
        with torch.no_grad():
            made = AdaptingKernel.forward(twin, self.features)
        assert made is not None
        made = made.to(ops.compute_dtype(made.dtype))
        if self.kernel.form == "inverse":
            made = made / made.amax(2, keepdim=True).clamp(min=torch.finfo(made.dtype).tiny)
        return made.clamp(0, 1)

    def neighbours(self) -> Tensor:
        """Which taps are neighbours inside the image: bool [1, KH*KW, H_out, W_out]."""
        window, sides = self.kernel.window, self.features.shape[2:]
        inside = window.inside(*sides, self.features.device)
        if inside is None:
            size = (1, window.taps, *window.output_size(*sides))
            inside = torch.ones(size, dtype=torch.bool, device=self.features.device)
        else:
            inside = inside.clone()
        inside[:, window.centre] = False
        return inside


def watch(
    model: nn.Module, images: Tensor, see: Callable[[Seen], None], *, guidance: Tensor | None = None
) -> Any:
    """Run a model in eval mode, without gradients, and look at every adapting kernel on the way.

    The model's modes, hooks, buffers and the random state are afterwards as they were.

    Args:
        model: with pixel-adaptive layers.
        images: as the model takes them, [B, C, H, W].
        see: called with each kernel as its layer receives it; a layer that runs twice is seen
            twice.
        guidance: the external guidance, if the model was upgraded with one.

    Returns:
        The model's output.

    Raises:
        PlanError: the model has no pixel-adaptive layers.
    """
    layers = pac_layers(model)
    if not layers:
        raise PlanError(
            f"this {type(model).__name__} has no pixel-adaptive layers to look at. Upgrade it "
            "first: pacswap.swap(model, layers=…, guidance=…)."
        )
    made: list[tuple[Tensor, AdaptingKernel, Tensor]] = []
    handles = []
    for name, layer in layers.items():
        assert isinstance(layer, nn.Module)
        if isinstance(layer, PacCRF):
            hook = functools.partial(_of_terms, see, name)
        else:
            hook = functools.partial(_of_layer, see, name, made)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if layer.adapting_kernel is not None:
            keep = functools.partial(_keep, made)
            handles.append(layer.adapting_kernel.register_forward_hook(keep))
    parameter = next(model.parameters())
    given = {} if guidance is None else {"guidance": guidance.to(parameter)}
    try:
        with torch.no_grad(), kept_modes(model), kept_random(), awake(model):
            model.eval()
            return model(images.to(parameter), **given)
    finally:
        for handle in handles:
            handle.remove()


def _keep(
    made: list[tuple[Tensor, AdaptingKernel, Tensor]],
    kernel: AdaptingKernel,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    if output is not None:
        made.append((output, kernel, args[0]))


def _of_layer(
    see: Callable[[Seen], None],
    name: str,
    made: list[tuple[Tensor, AdaptingKernel, Tensor]],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """A layer that surgery rewired receives K; one in a network of the user's own, the features."""
    assert isinstance(layer, Adaptive)
    given = layer.received(args, kwargs)
    for output, kernel, features in made:
        if output is given:
            see(Seen(name, None, kernel, features))
    guidance = kwargs.get("guidance", args[1] if len(args) > 1 else None)
    if isinstance(guidance, Tensor) and layer.enabled and layer.adapting_kernel is not None:
        batched = guidance[None] if guidance.dim() == 3 else guidance
        if isinstance(layer, PacFilter2d):
            batched = reduced(batched, layer.blur)
        see(Seen(name, None, layer.adapting_kernel, batched))


def _of_terms(
    see: Callable[[Seen], None],
    name: str,
    crf: PacCRF,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """A CRF makes its kernels itself, and none while its blend is 0 and nothing learns."""
    given = kwargs.get("guidance", args[1] if len(args) > 1 else None)
    if given is None or not crf.enabled:
        return
    terms = crf.terms
    each = [given] * len(terms) if isinstance(given, Tensor) else list(given)
    for number, (term, features) in enumerate(zip(terms, each, strict=True)):
        if term.adapting_kernel is not None:
            smaller = reduced(features, term.options.blur)
            see(Seen(name, number, term.adapting_kernel, smaller))
