"""Which convolutions of a network can be swapped, and why the others cannot."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from zoo_models import Model, convolutions, own_example

import pacswap
from pacswap.errors import PlanError
from pacswap.zoo import build

SPREAD = 3  # layers
LONGEST = 400  # characters of a reason
NOT_LISTED = "pacswap.layers does not list it"


@dataclass
class Reach:
    """What `pacswap.layers` and `pacswap.plan` say of the convolutions of a network.

    Attributes:
        convolutions: their classes, by name.
        guidance: what feeds each that can be swapped, in the order in which they run.
        refused: the reason of each other, by name.
        seconds: of the CPU, for building, listing and planning.
        parameters: how many the network has.
        device: where the network lay: `meta`, or `cpu` where that cannot run it.
    """

    convolutions: dict[str, str]
    guidance: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    device: str = "meta"

    def row(self) -> dict[str, Any]:
        """The part of a model's row that tells this."""
        return {
            "parameters": self.parameters,
            "convolutions": len(self.convolutions),
            "classes": dict(Counter(self.convolutions.values())),
            "reachable": len(self.guidance),
            "by_image": sum(source == "input" for source in self.guidance.values()),
            "refused": grouped(self.refused),
            "plan_seconds": self.seconds,
            "device": self.device,
        }

    def spread(self, among: Container[str] | None = None) -> dict[str, str]:
        """The first, middle and last (of some) that another convolution guides, or else any."""
        own = set(self.guidance.values())
        found = [name for name in self.guidance if among is None or name in among]
        found = found or list(self.guidance)
        names = [name for name in found if name not in own] or found
        return {name: self.guidance[name] for name in spread(names)}


def spread(names: list[str]) -> list[str]:
    """The first, the middle and the last, or as many as there are."""
    places = {round(k * (len(names) - 1) / (SPREAD - 1)) for k in range(SPREAD)} if names else set()
    return [names[place] for place in sorted(places)]


def reach(model: Model, *, timed: bool = True) -> Reach:
    """Ask pacswap about every convolution of a model.

    Args:
        model: what to build.
        timed: also time a plan of three layers.

    Raises:
        PlanError: pacswap cannot run the network.
    """
    began = time.process_time()
    network = build(model.source, meta=True)
    seconds = {"build": time.process_time() - began}
    if not convolutions(network):
        return Reach({})
    try:
        found = reached(model, network, seconds)
    except PlanError:
        # Values decide what it does (how many boxes, say), so it has to have some.
        network = build(model.source)
        found = reached(model, network, seconds)
    chosen = found.spread()
    if timed and chosen:
        began = time.process_time()
        pacswap.plan(network, groups=groups(chosen), example_input=_example(model, network))
        found.seconds["three"] = time.process_time() - began
    found.seconds = {what: round(took, 2) for what, took in found.seconds.items()}
    return found


def reached(model: Model, network: nn.Module, seconds: Mapping[str, float] | None = None) -> Reach:
    """The same for a network that is built.

    A convolution can be reached if it can be planned, beside all others, guided by the convolution
    of as many dimensions that runs first, or, where that is refused, by the image.

    Raises:
        PlanError: pacswap cannot run the network.
    """
    convs = convolutions(network)
    example = _example(model, network)
    began = time.process_time()
    listed = {info.name: info for info in pacswap.layers(network, example)}
    found = Reach({name: type(conv).__name__ for name, conv in convs.items()})
    found.seconds = {**(seconds or {}), "layers": time.process_time() - began}
    found.parameters = sum(parameter.numel() for parameter in network.parameters())
    found.device = "meta" if all(p.is_meta for p in network.parameters()) else "cpu"
    guides: dict[int, str] = {}
    for name, info in listed.items():
        if name in convs and info.output_shape is not None:
            guides.setdefault(len(convs[name].kernel_size), name)
    wanted: dict[str, str] = {}
    for name in [*(n for n in listed if n in convs), *(n for n in convs if n not in listed)]:
        refusal = listed[name].refusal if name in listed else NOT_LISTED
        guide = guides.get(len(convs[name].kernel_size), "input")
        if refusal is not None:
            found.refused[name] = refusal
        else:
            wanted[name] = "input" if guide == name else guide
    began = time.process_time()
    refused = _refusals(network, example, wanted)
    by_image = {name: "input" for name in refused if wanted[name] != "input"}
    still = _refusals(network, example, by_image)
    found.seconds["all"] = time.process_time() - began
    guided = wanted | {name: "input" for name in by_image if name not in still}
    failed = {name: why for name, why in refused.items() if name in still or name not in by_image}
    found.guidance = {name: source for name, source in guided.items() if name not in failed}
    names = {name for name, _ in network.named_modules(remove_duplicate=False)}
    refusals = {**found.refused, **failed}
    found.refused = {name: general(why, names) for name, why in refusals.items()}
    return found


def groups(guidance: Mapping[str, str]) -> list[dict[str, Any]]:
    """The groups of a plan in which each layer has its guidance."""
    sources = dict.fromkeys(guidance.values())
    return [
        {"layers": [name for name, own in guidance.items() if own == source], "guidance": source}
        for source in sources
    ]


def _example(model: Model, network: nn.Module) -> Any:
    return own_example(model, network).shown


def _refusals(network: nn.Module, example: Any, wanted: Mapping[str, str]) -> dict[str, str]:
    """Why those cannot be planned that cannot; the others can, together."""
    refused: dict[str, str] = {}
    left = dict(wanted)
    while left:
        try:
            pacswap.plan(network, groups=groups(left), example_input=example)
            break
        except PlanError as error:
            named = _blamed(error, left)
            refused |= named
            left = {name: guide for name, guide in left.items() if name not in named}
    return refused


def _blamed(error: PlanError, guidance: Mapping[str, str]) -> dict[str, str]:
    """The layers that the faults of an error name, or their groups, or else all; with its words.

    A layer that guides others is named with them, and is not to blame for that.
    """
    guides = set(guidance.values())
    named = {
        name: fault.message
        for name in guidance
        for fault in error.faults
        if fault.message.startswith(f"cannot swap '{name}'")
        or (name not in guides and f"'{name}'" in fault.message)
    }
    asked = groups(guidance)
    in_groups = {
        name: fault.message
        for fault in error.faults
        if fault.group is not None
        for name in asked[fault.group]["layers"]
    }
    return named or in_groups or dict.fromkeys(guidance, str(error))


_QUOTED = re.compile(r"'([^'\n]+)'")
_FIGURES = re.compile(r"[\[(]\d+(, \d+)*,?[\])]")


def general(reason: str, names: set[str]) -> str:
    """A reason without the names and sizes of its network, so that equal ones are equal.

    >>> general("'a.b' runs later ([1, 2]). Earlier: 'a', 'c'.", {"a", "a.b", "c"})
    "'LAYER' runs later (SIZE). Earlier: 'LAYER', …."
    """
    text = " ".join(reason.split())
    text = _QUOTED.sub(lambda m: "'LAYER'" if m[1] in names else m[0], text)
    text = re.sub(r"'LAYER'(, 'LAYER')+", "'LAYER', …", text)
    text = re.sub(r"^cannot upgrade \w+", "cannot upgrade the network", text)
    text = _FIGURES.sub("SIZE", text)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def grouped(refused: Mapping[str, str]) -> list[dict[str, Any]]:
    """Reasons with how often they were given and one layer each, the frequent ones first."""
    counts = Counter(refused.values())
    first = {reason: name for name, reason in reversed(refused.items())}
    return [
        {"reason": reason, "count": count, "example": first[reason]}
        for reason, count in counts.most_common()
    ]
