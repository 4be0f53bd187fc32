"""The safetensors files of model directories: what they say beside their tensors, and putting in.

The metadata has one key of ours, `pacswap`: JSON with the format's version, the digests of the base
(`pacswap.fingerprint`) and which names share one tensor. It is one key because safetensors writes
several in a random order, and the same model should give the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pacswap.errors import CheckpointError, quoted
from pacswap.fingerprint import VERSION, same_memory
from pacswap.zoo.weights import with_versions

KEY = "pacswap"
_OTHERS = (KEY, "format")


@dataclass(frozen=True)
class Notes:
    """What is written beside the tensors.

    Attributes:
        base: the digests of the network that was upgraded; None if they are not known. In a file of
            added tensors only of those that the file does not hold.
        aliases: a name of the `state_dict` to the one under which its tensor is stored.
    """

    base: dict[str, str] | None = None
    aliases: dict[str, str] = field(default_factory=dict)

    def as_metadata(self) -> dict[str, str]:
        """As safetensors keeps it."""
        data: dict[str, Any] = {"version": VERSION, "base": self.base}
        if self.aliases:
            data["aliases"] = self.aliases
        return {KEY: json.dumps(data, sort_keys=True)}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Notes]:
    """A file's tensors under all their names, and its notes.

    Raises:
        CheckpointError: it is no safetensors file, or its notes are damaged or of a later version.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path}' is not a readable safetensors file: {error}. It may be truncated; write the "
            "model directory again."
        ) from error
    notes = _notes(path, metadata)
    aliases = {name: kept for name, kept in metadata.items() if name not in _OTHERS}
    aliases |= notes.aliases
    state.update({name: state[kept] for name, kept in aliases.items() if kept in state})
    return state, notes


def _notes(path: Path, metadata: Mapping[str, str]) -> Notes:
    if KEY not in metadata:
        return Notes()
    try:
        data = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        data = None
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            f"'{path}' has format {version}, this pacswap reads {VERSION}. Upgrade: pip install "
            "--upgrade pacswap"
        )
    if not isinstance(data, dict) or type(version) is not int or version != VERSION:
        raise _damaged(path)
    base, aliases = data.get("base"), data.get("aliases", {})
    if not ((base is None or _is_texts(base)) and _is_texts(aliases)):
        raise _damaged(path)
    return Notes(base, aliases)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' is damaged: its metadata is not what pacswap writes. Write the model directory "
        "again."
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's `state_dict`.

    Raises:
        CheckpointError: it holds something else than tensors.
    """
    state = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"the state_dict of this {type(model).__name__} holds more than tensors "
            f"({quoted(strange[:3])}), which a model directory has no place for."
        )
    return state


def write_tensors(state: Mapping[str, Tensor], base: Mapping[str, str], path: Path) -> None:
    """Write tensors, each once however many names it has, and the digests of a base.

    Raises:
        CheckpointError: they cannot be written.
    """
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(state.items()):
        kept = first.setdefault(same_memory(tensor), name)
        if kept != name:
            aliases[name] = kept
        else:  # a copy, because what shares only a part of its memory is refused
            stored[name] = tensor.detach().cpu().contiguous().clone()
    metadata = Notes(dict(base), aliases).as_metadata()
    with saying_why():
        save_file(stored, str(path), metadata=metadata)


@contextmanager
def saying_why() -> Iterator[None]:
    """Turn what safetensors raises while it writes into a CheckpointError.

    Raises:
        CheckpointError: the tensors cannot be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"cannot write the model: {error}. Is the disk full?") from error
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the model's tensors cannot be stored as safetensors: {error}"
        ) from error


def put_in(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a model the tensors of a file that fits it, in the dtypes that were saved.

    Raises:
        CheckpointError: a tensor is of another kind of numbers; nothing was put in then.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor for name, tensor in tensors.items() if name in state}
    faults = [
        f"'{name}' is {_word(state[name])} (expected {_word(tensor)})"
        for name, tensor in tensors.items()
        if _kind(state[name]) != _kind(tensor)
    ]
    if faults:
        raise CheckpointError(
            f"'{path}' holds other kinds of numbers than the network: {', '.join(faults[:3])}. It "
            "may be damaged; write the model directory again."
        )
    for name, tensor in tensors.items():
        if state[name].dtype != tensor.dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(with_versions(model, state))


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _word(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
