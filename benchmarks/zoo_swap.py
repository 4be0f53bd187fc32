"""One model examined: what can be reached, and whether a swap of some of it keeps its promises."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from zoo_checks import SWAP, Check, Subject, checks, in_words
from zoo_models import Example, Model, built, fitting_example, seeing, settle
from zoo_reach import Reach, groups, reach

import pacswap

LIBRARIES = ("torch", "timm", "torchvision", "pacswap")


@dataclass(frozen=True)
class Options:
    """How models are examined.

    Attributes:
        most_parameters: of a model whose layers are really swapped, in millions.
        limit: seconds that one model may take.
        reach_only: swap nothing.
        timed: time a plan of three layers of each.
    """

    most_parameters: float = 30.0
    limit: float = 300.0
    reach_only: bool = False
    timed: bool = True


def swapped(model: Model, found: Reach) -> dict[str, Any]:
    """Swap layers of a model that is really built, and check everything.

    Args:
        model: what to build.
        found: what can be reached.
    """
    network = built(model)
    example = fitting_example(model, network)
    settle(network, example)
    network.eval()
    guidance = found.spread(seeing(network, example))
    return {"layers": guidance, "input": example.words} | {
        "checks": [list(check) for check in swap_checks(network, guidance, example)]
    }


def swap_checks(network: nn.Module, guidance: Mapping[str, str], example: Example) -> list[Check]:
    """Swap layers of a network, and check everything."""
    try:
        upgraded = pacswap.swap(
            network,
            groups=groups(guidance),
            example_input=example.shown,
            calibration=example.shown,
        )
    except Exception as error:  # a finding like any other
        return [Check(SWAP, False, in_words(error))]
    subject = Subject(network, upgraded, tuple(guidance), example)
    return [Check(SWAP, True, f"{len(guidance)} layers"), *checks(subject)]


def examine(model: Model, options: Options) -> Iterator[dict[str, Any]]:
    """The parts of a model's row, each as soon as it is known; an error is a part."""
    torch.set_num_threads(1)
    began = time.process_time()
    try:
        yield {"family": model.family, "options": asdict(options), "versions": versions()}
        found = reach(model, timed=options.timed)
        yield found.row()
        if found.convolutions:
            yield {"swap": _swap_part(model, found, options)}
    except Exception as error:  # it is told in the model's row
        yield {"failure": in_words(error)}
    yield {"seconds": round(time.process_time() - began, 1)}


def _swap_part(model: Model, found: Reach, options: Options) -> dict[str, Any]:
    if options.reach_only:
        return {"skipped": "only reach was asked for"}
    if found.parameters > 1e6 * options.most_parameters:
        return {"skipped": f"more than {options.most_parameters:g} million parameters"}
    if not found.guidance:
        return {"skipped": "no convolution can be reached"}
    return swapped(model, found)


def versions() -> dict[str, str]:
    """Of the libraries that the figures depend on."""
    return {name: version(name) for name in LIBRARIES}
