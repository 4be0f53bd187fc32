"""Every error that pacswap raises.

Each derives from `PacswapError` and from the builtin a caller would expect. A message says where
and what, what was expected and what came instead, and what to do next; errors of one input are
collected and raised together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class PacswapError(Exception):
    """Base of all errors that pacswap raises on purpose."""


class ShapeError(PacswapError, ValueError):
    """Tensors or options of an operation disagree; the message lists every shape."""


class BackendError(PacswapError, RuntimeError):
    """A backend was asked for by name and cannot run this call."""


class GuidanceError(PacswapError, RuntimeError):
    """A pixel-adaptive layer was called on a path that cannot feed its guidance."""


@dataclass(frozen=True)
class Fault:
    """Something in a request that cannot be done.

    Attributes:
        message: a sentence or two: what, why, and the way out.
        group: the index of the group that asked for it, if one did.
        field: the part of the group at fault: `layers`, `guidance`, `kernel`, `filter` or `crf`.
    """

    message: str
    group: int | None = None
    field: str | None = None


class PlanError(PacswapError, ValueError):
    """A model cannot be changed as asked; the message lists every fault, the model is untouched.

    Attributes:
        faults: kept apart, so that a recipe can point at its own lines; empty where the request as
            a whole is wrong.
    """

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults)


class ModelError(PacswapError, ValueError):
    """A model cannot be built: its library or name is unknown, or its arguments don't fit."""


class WeightsError(PacswapError, RuntimeError):
    """Weights cannot be had: no network, an unknown tag, a bad file, or keys that don't fit."""


class RecipeError(PacswapError, ValueError):
    """A recipe is wrong; the message lists every fault with its file, line and column."""


class CheckpointError(PacswapError, RuntimeError):
    """A model directory cannot be written or read."""


class ExportError(PacswapError, RuntimeError):
    """An upgraded network cannot be written for other programs, or the file is not the network."""


class VerificationError(PacswapError, RuntimeError):
    """An upgraded model breaks one of the promises; the message has the measured figures."""


class DataError(PacswapError, ValueError):
    """Labelled pictures are missing, damaged or mislabelled; the message counts and names them."""


class TrainingError(PacswapError, RuntimeError):
    """A training cannot begin or go on; the message names the last usable checkpoint."""


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The known names that look most like `name`, best first.

    >>> nearest("chanels", ["channels", "resize", "detach"])
    ['channels']
    """
    return difflib.get_close_matches(name, list(dict.fromkeys(known)), n=most, cutoff=0.5)


def nearest_hint(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """A sentence that names what was probably meant, or all there is if that is short.

    >>> nearest_hint("chanels", ["channels", "resize", "detach"])
    "Nearest: 'channels'."
    >>> nearest_hint("zzz", ["channels", "resize"])
    "Known: 'channels', 'resize'."
    """
    names = list(known)
    close = nearest(name, names, most=most)
    if close:
        return "Nearest: " + quoted(close) + "."
    if 0 < len(names) <= 12:
        return "Known: " + quoted(names) + "."
    return ""


def quoted(names: Sequence[str]) -> str:
    """Join names for a message.

    >>> quoted(["layer1", "layer2"])
    "'layer1', 'layer2'"
    """
    return ", ".join(f"'{name}'" for name in names)
