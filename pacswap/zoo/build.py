"""From a library's name and arguments to a model."""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from pacswap import scenes
from pacswap.errors import ModelError, PacswapError, WeightsError, nearest_hint, quoted
from pacswap.shipped import shipped_folder
from pacswap.zoo.heads import renew_heads
from pacswap.zoo.weights import load_weights_file

SOURCE = "_pacswap_source"
ORIGIN = "_pacswap_origin"  # with weights
LIBRARIES = ("timm", "torchvision", "python", "pacswap")
FILE_SUFFIXES = (".safetensors", ".pth", ".pt")
# No network, no such file on the server, or a download that was cut short.
_FETCH_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    HTTPException,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Source:
    """What it takes to build a model again.

    Attributes:
        library: `timm`, `torchvision`, `python` (a dotted factory) or `pacswap` (its own
            few).
        name: the model's name in its library, or `package.module:factory`.
        weights: a tag of the library (`DEFAULT` is its own choice), a file, or None for random
            ones.
        args: keyword arguments of the model's factory.
        num_classes: give it a new head of so many classes once the weights are loaded; None keeps
            its own.
    """

    library: str
    name: str
    weights: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None


def build(
    source: Source,
    *,
    folder: Path | None = None,
    meta: bool = False,
    trust_python: bool = False,
) -> nn.Module:
    """Build a model.

    Args:
        source: what to build.
        folder: where relative weights files start; the working directory by default.
        meta: build on the meta device and leave the weights out: structure and shapes only.
        trust_python: allow `library: python`, which runs the code that it names.

    Raises:
        ModelError: the library, the name or the arguments are wrong, or the code is not trusted.
        WeightsError: the weights are unknown, cannot be had, or don't fit.
    """
    factory = _factory(source, trust_python)
    weights = source.weights
    if meta:
        model = _on_meta(factory, bare(source))
    elif weights is not None and weights.endswith(FILE_SUFFIXES):
        model = _made(factory, source, None)
        load_weights_file(model, (folder or Path()) / weights)
    else:
        model = _made(factory, source, weights)
    if source.num_classes is not None:
        renew_heads(model, source.num_classes)
    # What was built says by what, so that it can be saved without asking.
    vars(model)[SOURCE] = bare(source)
    if weights is not None and not meta:
        vars(model)[ORIGIN] = lasting(source, folder)
    return model


def lasting(source: Source, folder: Path | None) -> Source:
    """The source with its weights file, if it has one, named so that it is found from anywhere."""
    if source.weights is None or not source.weights.endswith(FILE_SUFFIXES):
        return source
    return replace(source, weights=str(((folder or Path()) / source.weights).resolve()))


_WITH_AUXILIARY: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": True, "init_weights": False},
}


def bare(source: Source) -> Source:
    """The source without anything to download; it builds a network of the same structure."""
    name, args, tag = source.name, dict(source.args), _tag(source)
    if source.library == "torchvision":
        args.pop("weights_backbone", None)
        if tag is not None and source.name in _WITH_AUXILIARY:
            # What torchvision itself changes where it loads weights.
            args = {"transform_input": True, **_WITH_AUXILIARY[source.name], **args}
    if source.library == "timm" and tag not in (None, "DEFAULT"):
        name = f"{name.partition('.')[0]}.{tag}"  # the tag also says how images are normalised
    return replace(source, name=name, weights=None, args=args)


def model_names(library: str | None = None) -> dict[str, list[str]]:
    """The names that `build` knows, by library."""
    listers: dict[str, Callable[[], list[str]]] = {
        "pacswap": lambda: sorted(_own_models()),
        "timm": lambda: importlib.import_module("timm").list_models(),
        "torchvision": lambda: importlib.import_module("torchvision.models").list_models(),
    }
    return {name: lister() for name, lister in listers.items() if library in (None, name)}


def input_size(source: Source, model: nn.Module) -> tuple[int, int, int] | None:
    """(C, H, W) of the images a library's model was made for, or None if it does not say."""
    if source.library == "pacswap":
        return (3, 96, 128) if source.name == "scene_net" else (3, 224, 224)
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    return None if size is None else (size[0], size[1], size[2])


def has_trained_head(source: Source) -> bool:
    """Whether a model comes with weights for its head, and not for a backbone only."""
    if source.weights is None or source.num_classes is not None:
        return False
    return source.library != "pacswap" or source.name in _OWN_WEIGHTS or _tag(source) is None


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the images a model was trained on (ImageNet's by default)."""
    for network in (model, getattr(model, "backbone", None)):
        config = getattr(network, "pretrained_cfg", None)
        if isinstance(config, Mapping) and config.get("mean") and config.get("std"):
            return tuple(config["mean"]), tuple(config["std"])
    return scenes.MEAN, scenes.STD


Factory = Callable[[str | None, dict[str, Any]], nn.Module]


def _factory(source: Source, trust_python: bool) -> Factory:
    makers = {
        "timm": _timm_factory,
        "torchvision": _torchvision_factory,
        "pacswap": _own_factory,
    }
    if source.library == "python":
        return _python_factory(source, trust_python)
    if source.library not in makers:
        raise ModelError(
            f"library '{source.library}' is unknown. {nearest_hint(source.library, LIBRARIES)}"
        )
    return makers[source.library](source)


def _tag(source: Source) -> str | None:
    """The weights that a source asks of its library; None for random ones and for a file."""
    weights = source.weights
    return None if weights is None or weights.endswith(FILE_SUFFIXES) else weights


def _made(factory: Factory, source: Source, weights: str | None) -> nn.Module:
    """Call a factory; its own complaints become a ModelError."""
    try:
        model = factory(weights, dict(source.args))
    except PacswapError:
        raise
    except Exception as error:  # the library's or the user's own code: anything can come of it
        raise ModelError(
            f"cannot build {source.library} model '{source.name}' with args {dict(source.args)}: "
            f"{_in_words(error)}. Mend model.args."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"'{source.name}' returned {type(model).__name__}, expected a torch.nn.Module."
        )
    return model


def _on_meta(factory: Factory, source: Source) -> nn.Module:
    try:
        with torch.device("meta"):
            model = _made(factory, source, None)
    except ModelError:
        # Some constructors compute with tensors (torchvision's RegNets): those are built for real.
        return _made(factory, source, None)
    return _made(factory, source, None) if _holds_constants(model) else model


def _holds_constants(model: nn.Module) -> bool:
    """Whether a network keeps tensors in lists (a detector's anchors), whose values it needs."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    held = [v for value in attributes if isinstance(value, list | tuple) for v in value]
    return any(isinstance(value, torch.Tensor) for value in held)


def _timm_factory(source: Source) -> Factory:
    timm = importlib.import_module("timm")
    name, _, tag = source.name.partition(".")
    if not timm.is_model(name):
        raise ModelError(_unknown_model(source, timm.list_models()))
    _reject_args(
        source, ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
    )
    pretrained = [k.partition(".")[2] for k in timm.list_pretrained(f"{name}.*")]
    wanted = _tag(source)
    if wanted is not None and not pretrained:
        raise WeightsError(_no_weights(source))
    tag = tag if wanted in (None, "DEFAULT") else wanted
    known = pretrained
    if wanted is None:
        known = [k.partition(".")[2] for k in timm.list_models(f"{name}.*", include_tags=True)]
    if tag and tag not in known:
        raise WeightsError(_unknown_tag(source, tag, known))

    def make(weights: str | None, args: dict[str, Any]) -> nn.Module:
        full = f"{name}.{tag}" if tag else name
        try:
            return timm.create_model(full, pretrained=weights is not None, **args)
        except _FETCH_ERRORS as error:
            if weights is None:
                raise
            raise WeightsError(_cannot_fetch(source, weights, error)) from error

    return make


def _torchvision_factory(source: Source) -> Factory:
    models = importlib.import_module("torchvision.models")
    known = models.list_models()
    if source.name not in known:
        raise ModelError(_unknown_model(source, known))
    _reject_args(source, ("weights", "pretrained"))
    signature = inspect.signature(models.get_model_builder(source.name))
    tags = models.get_model_weights(source.name)
    wanted = _tag(source)
    if wanted is not None and len(tags) == 0:
        raise WeightsError(_no_weights(source))
    if wanted is not None and wanted not in tags.__members__:
        raise WeightsError(_unknown_tag(source, wanted, list(tags.__members__)))

    def make(weights: str | None, args: dict[str, Any]) -> nn.Module:
        if "weights_backbone" in signature.parameters:
            # torchvision would download a backbone although no weights were asked for.
            args.setdefault("weights_backbone", None)
        entry = None if weights is None else tags[weights]
        try:
            return models.get_model(source.name, weights=entry, **args)
        except _FETCH_ERRORS as error:
            asked = weights or args.get("weights_backbone")
            if asked is None:
                raise
            raise WeightsError(_cannot_fetch(source, str(asked), error)) from error

    return make


_OWN_WEIGHTS = {"scene_net": "quickstart.safetensors"}


def _own_models() -> dict[str, Callable[..., nn.Module]]:
    from pacswap.zoo.deeplab import DeepLabV3
    from pacswap.zoo.scene_net import SceneNet

    return {"deeplabv3": DeepLabV3, "scene_net": SceneNet}


def _own_factory(source: Source) -> Factory:
    known = _own_models()
    if source.name not in known:
        raise ModelError(_unknown_model(source, sorted(known)))
    wanted = _tag(source)
    if wanted not in (None, "DEFAULT"):
        raise WeightsError(_unknown_tag(source, str(wanted), ["DEFAULT"]))
    _reject_args(source, ("pretrained",))
    backbone = str(source.args.get("backbone", ""))
    if ":" in backbone:  # timm would fetch what a stranger's recipe names
        raise ModelError(
            f"model.args.backbone: expected the name of a timm model, got '{backbone}'. List them: "
            "pacswap ls models timm"
        )

    def make(weights: str | None, args: dict[str, Any]) -> nn.Module:
        file = _OWN_WEIGHTS.get(source.name)
        try:
            # Where no file of ours has them, the weights are those of a backbone that timm has.
            backbone = {"pretrained": True} if weights is not None and file is None else {}
            model = known[source.name](**args, **backbone)
        except _FETCH_ERRORS as error:
            if weights is None:
                raise
            raise WeightsError(_cannot_fetch(source, weights, error)) from error
        if weights is not None and file is not None:
            load_weights_file(model, shipped_folder() / file)
        return model

    return make


def _python_factory(source: Source, trust_python: bool) -> Factory:
    module_name, _, attribute = source.name.replace(":", ".").rpartition(".")
    if not trust_python:
        raise ModelError(
            f"library 'python' runs the code of '{source.name}'. If you trust it, say so: "
            "--trust-python on the command line, trust_python=True in Python."
        )
    wanted = _tag(source)
    if wanted not in (None, "DEFAULT"):
        raise WeightsError(
            f"a python factory has no weights by tag, got '{wanted}'. Set weights to a file, "
            "to DEFAULT (whatever the factory loads) or to null."
        )
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's own code: anything can come of it
        raise ModelError(
            f"cannot import '{source.name}': {_in_words(error)}. Name it package.module:factory."
        ) from error
    return lambda weights, args: factory(**args)


def _reject_args(source: Source, names: tuple[str, ...]) -> None:
    found = [name for name in names if name in source.args]
    if found:
        raise ModelError(
            f"model.args of '{source.name}' has {quoted(found)}: weights are chosen by "
            "model.weights. Take it out of args."
        )


def _unknown_model(source: Source, known: list[str]) -> str:
    sentences = [
        f"{source.library} has no model '{source.name}'.",
        nearest_hint(source.name.partition(".")[0], known),
        f"List them: pacswap ls models {source.library}",
    ]
    return " ".join(filter(None, sentences))


def _no_weights(source: Source) -> str:
    return (
        f"{source.library} has no weights for '{source.name}'. Set weights to a file, or to null "
        "for random ones."
    )


def _unknown_tag(source: Source, tag: str, known: list[str]) -> str:
    return (
        f"{source.library} model '{source.name}' has no weights '{tag}'. "
        f"Known: {quoted(list(dict.fromkeys(known)))}. Or set a file, or null for random ones."
    )


def _cannot_fetch(source: Source, weights: str, error: BaseException) -> str:
    return (
        f"cannot get weights '{weights}' of {source.library} model '{source.name}': "
        f"{_in_words(error)}. Check the network, or put the file on this machine and "
        "set model.weights to its path, or to null for random weights."
    )


def _in_words(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0].removesuffix(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
