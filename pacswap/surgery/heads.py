"""Convolutions inside attention, which see each image once for every head.

MViT pools its queries, keys and values by convolutions over [B·heads, C, H, W]: the maps of one
image lie together, and all have its resolution, so that each image's kernel serves all its heads.
Windows of an image multiply the batch as well, but their module is given that many already.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pacswap.surgery.skeleton import Call, Observation


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
        has them, if it is given as many maps as there are images; None where neither explains
        what the layer filters.
    """
    by_order = {call.order: call for call in seen.calls}
    found = {_heads_of(call, modules, by_order, batch) for call in seen.of(layer)}
    return found.pop() if len(found) == 1 else None


def _heads_of(
    call: Call, modules: Mapping[str, nn.Module], by_order: Mapping[int, Call], batch: int
) -> int | None:
    if call.input_shape is None or batch == 0 or call.input_shape[0] % batch:
        return None
    heads = call.input_shape[0] // batch
    if heads == 1:
        return 1
    for order, (name, _) in reversed(call.stack[:-1]):
        around, own = by_order.get(order), getattr(modules.get(name), "num_heads", None)
        if around is None or own is None:
            continue
        # The nearest alone: around windows there may be another that has as many heads.
        is_given_images = around.input_shape is not None and around.input_shape[0] == batch
        return heads if own == heads and is_given_images else None
    return None
