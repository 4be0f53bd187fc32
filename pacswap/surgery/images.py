"""Which image is a layer's own, in a network that takes several and runs one part on each."""

from __future__ import annotations

from collections.abc import Iterable

from pacswap.errors import quoted
from pacswap.surgery.skeleton import Call, Entry, Observation


def on_several_images(calls: Iterable[Call]) -> str | None:
    """A layer that runs on a network's first image, and also on another without the first.

    Args:
        calls: of all layers of a group.
    """
    images: dict[str, set[bool]] = {}
    for call in calls:
        if call.images:
            images.setdefault(call.name, set()).add(0 in call.images)
    return next((name for name, known in images.items() if len(known) > 1), None)


def own_image_entries(seen: Observation) -> list[Entry]:
    """The methods of parts that are given one of the network's images, as it is, at each call."""
    others = {call.entry for call in seen.calls if call.image is None}
    entries = dict.fromkeys(call.entry for call in seen.calls if call.name)
    return [entry for entry in entries if entry not in others]


def why_not_image(layer: str, calls: Iterable[Call], seen: Observation) -> str:
    """The words for a layer on several images, none of which is known to be the one of a call.

    Args:
        layer: its name.
        calls: of all layers of its group.
        seen: a forward pass.
    """
    own = [call for call in calls if call.name == layer]
    before = [c for c in seen.calls if c.order < own[0].order and c.name]
    inside = {entry for _, entry in own[0].stack[:-1] if entry[0]}
    beside = [c.name for c in before if inside & {entry for _, entry in c.stack[:-1]}]
    shown = [name for name in dict.fromkeys(beside) if len(seen.of(name)) == len(own)][-2:]
    hint = f", such as {quoted(shown)}" if shown else ""
    return (
        f"'input' is the first image, and '{layer}' runs on others too. Which image belongs to "
        "which of its calls is known only where a part of the network that contains the layer is "
        "given the images themselves, one at each call, as its first argument. Name a layer that "
        f"runs before it on the same image{hint}."
    )


def why_not_parted(own: str, outer: str) -> str:
    """The words for a part with images of its own that lies in what another group has rewired."""
    where = f"'{outer}'" if outer else "the whole network"
    return (
        f"'input' is the image that each call of '{own}' is given, and another group has {where} "
        f"rewired, which knows the first image alone. Name a layer of '{own}' instead of 'input', "
        "or leave the other group out."
    )
