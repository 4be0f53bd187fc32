"""Convolutions inside attention, which see each image once for every head.

MViT pools its queries, keys and values by convolutions over [B·heads, C, H, W]: the maps of one
image lie together, and all show the whole of it, so that each image's kernel serves all its heads.
Windows of an image multiply the batch as well, and heads may lie before images: neither is told by
shapes, so the attention is run with a mark in one place of one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pacswap.surgery.modes import kept_random
from pacswap.surgery.skeleton import Call, Observation, filled, skeleton


def heads_of(
    layer: str, modules: Mapping[str, nn.Module], seen: Observation, batch: int
) -> int | None:
    """How many maps of each image a layer filters, one after another.

    Args:
        layer: its dotted name.
        modules: of the network, by name.
        seen: the calls of a forward pass.
        batch: images that guide.

    Returns:
        1 for as many maps as images; the `num_heads` of the nearest module around the layer that
        has them, if it is given as many maps as there are images and turns each into so many of
        the whole image; None where neither explains what the layer filters.
    """
    by_order = {call.order: call for call in seen.calls}
    found = {_around(call, modules, by_order, batch) for call in seen.of(layer)}
    if len(found) != 1:
        return None
    heads, around = found.pop()
    if heads is None or around is None or _lie_by_image(layer, around, modules, seen, heads):
        return heads
    return None


def _around(
    call: Call, modules: Mapping[str, nn.Module], by_order: Mapping[int, Call], batch: int
) -> tuple[int, str | None] | tuple[None, None]:
    """How many heads there may be, and the module that has them; 1 and None for no heads."""
    if call.input_shape is None or batch == 0 or call.input_shape[0] % batch:
        return None, None
    heads = call.input_shape[0] // batch
    if heads == 1:
        return 1, None
    for order, (name, _) in reversed(call.stack[:-1]):
        around, own = by_order.get(order), getattr(modules.get(name), "num_heads", None)
        if around is None or own is None:
            continue
        # The nearest alone: around windows there may be another that has as many heads.
        is_given_images = around.input_shape is not None and around.input_shape[0] == batch
        return (heads, name) if own == heads and is_given_images else (None, None)
    return None, None


class _Reached(Exception):
    """The layer was called: nothing behind it has to run."""


def _lie_by_image(
    layer: str, around: str, modules: Mapping[str, nn.Module], seen: Observation, heads: int
) -> bool:
    """Whether each image's maps lie together and each of them shows all of it.

    Of two images the last number of the second is marked. A mark reaches what is computed from it:
    with heads all maps of the second image, with windows only the one that it lies in.
    """
    given = seen.arguments.get((around, "forward"))
    if given is None or not layer.startswith(f"{around}."):
        return False  # another method runs, or what is registered elsewhere
    attention = skeleton(modules[around], meta=False).eval()
    attention = filled(attention).to("cpu", torch.float64)
    reached: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        reached.append(args[0].detach().clone())
        raise _Reached

    attention.get_submodule(layer.removeprefix(f"{around}.")).register_forward_pre_hook(note)
    batch = given[0][0].shape[0]
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _two(t, batch), given)
    args[0][1].view(-1)[-1] = math.nan
    try:
        with torch.no_grad(), kept_random():
            attention(*args, **kwargs)
    except Exception:  # ours, or the model's own code: it may want other arguments
        pass
    marked = [bool(t.isnan().any()) for t in reached[0]] if reached else []
    return marked == [False] * heads + [True] * heads


def _two(given: Tensor, batch: int) -> Tensor:
    """Zeros like an argument, for two images."""
    shape = (2, *given.shape[1:]) if given.shape[:1] == (batch,) else given.shape
    dtype = torch.float64 if given.is_floating_point() else given.dtype
    return torch.zeros(shape, dtype=dtype, device="cpu")
