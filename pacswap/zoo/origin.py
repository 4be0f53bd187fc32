"""Where a network's weights may have come from. A guess: who uses it has to compare."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pacswap.zoo.build import ORIGIN, Source, bare, lasting

_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def origins(model: nn.Module, source: Source) -> Iterator[Source]:
    """Sources with weights that the model may have been built from.

    What `build` made says so itself. Of timm's own models the configuration names weights, whether
    they were loaded or not; it counts only if they lie in the cache, so that nothing is downloaded
    to find out.

    Args:
        model: a plain network.
        source: what builds one of its structure, with random weights.
    """
    origin = vars(model).get(ORIGIN)
    if isinstance(origin, Source):
        if bare(origin) == source:
            yield origin
        elif (origin.library, _plain(origin)) == (source.library, _plain(source)):
            yield replace(source, weights=origin.weights)  # another head since
        return
    config = getattr(model, "pretrained_cfg", None)
    if source.library == "timm" and isinstance(config, Mapping) and _is_cached(config):
        yield replace(source, weights=config.get("tag") or "DEFAULT")


def _plain(source: Source) -> str:
    return source.name.partition(".")[0] if source.library == "timm" else source.name


def _is_cached(config: Mapping[str, Any]) -> bool:
    name = config.get("hf_hub_id")
    if not isinstance(name, str) or not name:
        return False
    hub = importlib.import_module("huggingface_hub")
    file = config.get("hf_hub_filename")
    names = [file] if isinstance(file, str) else _FILES
    return any(isinstance(hub.try_to_load_from_cache(name, each), str) for each in names)


def remember_origin(model: nn.Module, source: Source, folder: Path) -> None:
    """Note where the weights of a model's base came from, for `origins`."""
    if source.weights is not None:
        vars(model)[ORIGIN] = lasting(source, folder)
