"""Weights from files. A file is data: safetensors, or a pickle that holds tensors only."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pacswap.errors import WeightsError, quoted

# Where training scripts put the weights inside a checkpoint.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
_DDP = "module."


def load_weights_file(model: nn.Module, path: Path) -> None:
    """Load a file into a model, strictly: every key, every shape.

    Args:
        model: changed in place, but only if everything fits.
        path: `.safetensors`, or a `.pth`/`.pt` that `torch.load(weights_only=True)` accepts.

    Raises:
        WeightsError: no such file, not readable as weights, or keys that don't fit.
    """
    state = read_state_dict(path)
    faults = why_not_fit(model, state)
    if faults:
        raise WeightsError(
            f"'{path}' does not fit {type(model).__name__}: {'; '.join(faults)}. Use the file of "
            "this very network, or mend model.name and model.args (num_classes?)."
        )
    model.load_state_dict(with_versions(model, state))


def with_versions(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict from a file that names no versions of modules, taken to be of today's.

    Some modules (torchvision's MNASNet) refuse to load without one.
    """
    made = OrderedDict(state)
    made._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return made


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name.

    Raises:
        WeightsError: no such file, or it holds something else.
    """
    if not path.is_file():
        raise WeightsError(
            f"no weights file '{path}'. Paths in a recipe start at the recipe's folder; set "
            "model.weights to an existing file, a tag, or null for random weights."
        )
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def why_not_fit(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from loading strictly: missing, unknown and misshapen tensors."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    shapes = [
        f"'{key}' {list(state[key].shape)} (expected {list(wanted[key].shape)})"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(wanted)} tensors missing ({_some(missing)})")
    if unknown:
        faults.append(f"{len(unknown)} unknown ({_some(unknown)})")
    if shapes:
        faults.append(f"{len(shapes)} of another shape ({', '.join(shapes[:3])})")
    return faults


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"'{path}' is not a readable safetensors file: {error}. It may be truncated; copy or "
            "download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders about the pickle's protocol
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file: anything can come of it
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise WeightsError(
                f"'{path}' holds more than tensors ({code[1]}), and reading that would run code "
                "from the file. Refused. Save the weights alone: "
                "safetensors.torch.save_file(model.state_dict(), …)."
            ) from error
        raise WeightsError(
            f"'{path}' is not a readable PyTorch file: {_first_sentence(error)} It may be "
            "truncated; copy or download it again."
        ) from error
    return _unwrapped(loaded, path)


def _unwrapped(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside the containers that training scripts write."""
    for name in _CONTAINERS * 2:  # one may lie in another
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        found = sorted(map(str, loaded))[:5] if isinstance(loaded, Mapping) else []
        what = f"a mapping with {quoted(found)}" if found else f"a {type(loaded).__name__}"
        raise WeightsError(
            f"'{path}' holds {what}, expected a state_dict (names to tensors), bare or under "
            f"{quoted(_CONTAINERS)}."
        )
    if loaded and all(str(key).startswith(_DDP) for key in loaded):
        return {str(key).removeprefix(_DDP): value for key, value in loaded.items()}
    return {str(key): value for key, value in loaded.items()}


def _some(names: list[str]) -> str:
    return quoted(names[:3]) + (", …" if len(names) > 3 else "")


def _first_sentence(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's words advise to read it unsafely
        return "its pickle is not one of tensors."
    text = (str(error).strip().splitlines() or [""])[0].removesuffix(".")
    return f"{type(error).__name__}: {text}." if text else f"{type(error).__name__}."
