"""Which library call made a model: so that it can be rebuilt without its user's code."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pacswap.errors import PacswapError
from pacswap.zoo.build import SOURCE, Source, build


def identify(model: nn.Module) -> Source | None:
    """The library, name and arguments that build a network of exactly this structure, or None.

    A guess is made from what the model says of itself (by what it was built, timm's configuration,
    torchvision's class) and kept only if the network built from it has the same modules with the
    same options.

    Args:
        model: a plain network, not an upgraded one.
    """
    built_by = vars(model).get(SOURCE)
    for source in (*filter(None, [built_by]), *_candidates(model)):
        try:
            # Built again, because the model may have changed since; it was trusted then.
            twin = build(source, meta=True, trust_python=source is built_by)
        except PacswapError:
            continue
        if why_not_twin(twin, model) is None:
            return source
    return None


def _candidates(model: nn.Module) -> Iterator[Source]:
    origin = type(model).__module__.split(".")[0]
    if origin == "timm":
        yield from _timm_candidates(model)
    elif origin == "torchvision":
        yield from _torchvision_candidates(model)
    elif type(model).__module__ == "pacswap.zoo.scene_net":
        classes = getattr(model, "num_classes", None)
        yield Source(
            "pacswap", "scene_net", None, {} if classes is None else {"num_classes": classes}
        )


def _timm_candidates(model: nn.Module) -> Iterator[Source]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        return
    name = config["architecture"]
    if config.get("tag"):
        name = f"{name}.{config['tag']}"  # it says how images are normalised
    classes = getattr(model, "num_classes", None)
    guesses: list[dict[str, Any]] = [{}]
    if classes is not None:
        guesses.append({"num_classes": classes})
    info = getattr(model, "feature_info", None)
    if info is not None and not hasattr(model, "get_classifier"):
        indices = list(getattr(info, "out_indices", ()))
        guesses += [{"features_only": True}, {"features_only": True, "out_indices": indices}]
        strides = {f.get("reduction") for f in getattr(info, "info", [])}
        for stride in sorted(s for s in strides if s in (8, 16)):
            guesses.append({"features_only": True, "out_indices": indices, "output_stride": stride})
    else:
        guesses += [{**guess, "output_stride": s} for guess in list(guesses) for s in (8, 16)]
    rate = getattr(model, "drop_rate", 0.0)
    if rate:
        guesses = [{**guess, "drop_rate": rate} for guess in guesses]
    yield from (Source("timm", name, None, guess) for guess in guesses)


def _torchvision_candidates(model: nn.Module) -> Iterator[Source]:
    models = importlib.import_module("torchvision.models")
    home = importlib.import_module(type(model).__module__)
    classes = _classes(model)
    for name in models.list_models():
        builder = models.get_model_builder(name)
        if importlib.import_module(builder.__module__) is not home:
            continue
        yield Source("torchvision", name)
        extra = [{"num_classes": classes}] if classes is not None else []
        if hasattr(model, "aux_classifier"):
            extra = [{**args, "aux_loss": flag} for args in [*extra, {}] for flag in (True, False)]
        yield from (Source("torchvision", name, None, args) for args in extra)


def _classes(model: nn.Module) -> int | None:
    """Outputs of the last layer of the main head."""
    head = getattr(model, "classifier", None) or getattr(model, "fc", None) or model
    for module in reversed(list(head.modules())):
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.Conv2d):
            return module.out_channels
    return None


def why_not_twin(twin: nn.Module, model: nn.Module) -> str | None:
    """The first difference in structure or options of two networks, or None."""
    ours, theirs = _structure(model), _structure(twin)
    for name in list(dict.fromkeys([*theirs, *ours])):
        if ours.get(name) != theirs.get(name):
            where = f"'{name}'" if name else "the network"
            return f"{where} is {theirs.get(name)} there and {ours.get(name)} here"
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (twin, model)]
    return None if shapes[0] == shapes[1] else "its tensors have other names or shapes"


def _structure(model: nn.Module) -> dict[str, str]:
    """Each module by name, with its own options and its plain public attributes."""
    found = {}
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        found[name] = f"{module._get_name()}({module.extra_repr()}) {plain}"
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
