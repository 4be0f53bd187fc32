"""From a recipe's file to a checked `Recipe`, with every fault said at once and in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pacswap.errors import RecipeError
from pacswap.recipes.marks import (
    MAX_BYTES,
    Document,
    Fault,
    KeyPath,
    SyntaxFault,
    decode,
    parse,
)
from pacswap.recipes.overrides import override_
from pacswap.recipes.schema import VERSION, Recipe
from pacswap.recipes.sections import LIST, MAPPING, MISSING_KEY, NUMBER, TEXT, UNKNOWN_KEY, got

_MOST_LINES = 100  # a file with more is not a recipe, and its message floods the terminal
_BRANCHES = (TEXT, NUMBER, LIST, MAPPING)


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe that knows where each of its values is written.

    Attributes:
        recipe: what it says, overrides included.
        path: its file; relative paths in the recipe start at `path.parent`.
    """

    recipe: Recipe
    path: Path
    _document: Document = field(repr=False, compare=False)

    def where(self, path: KeyPath = ()) -> str:
        """The place of a value for a message: `recipe.yaml:14:5`, or the override that set it.

        Args:
            path: keys and indices, such as `("swap", 0, "layers")`. What is not written, such as a
                default, is shown at the nearest thing around it that is.
        """
        return self._document.place(path).spell(str(self.path))


def load_recipe(path: str | PathLike[str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe; nothing in it is run, and no file it names is opened.

    Args:
        path: a YAML file.
        overrides: `key.sub[0].x=value`, each laid over the file in turn; the value is YAML.

    Raises:
        RecipeError: the file cannot be read, or it has faults; the message lists all of them.
    """
    path = Path(path)
    document = _read(path)
    if isinstance(document.data, dict):
        for number, text in enumerate(overrides):
            override_(document, text, number)
    recipe = _check_(document)
    if recipe is None or document.faults:
        raise RecipeError(_message(path, document.faults))
    return LoadedRecipe(recipe, path, document)


def _read(path: Path) -> Document:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such file. List the shipped recipes: pacswap ls recipes"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{path}: cannot be read ({reason}). Name a YAML file.") from error
    try:
        return parse(decode(raw))
    except SyntaxFault as fault:
        raise RecipeError(f"{fault.place.spell(str(path))}: {fault.text}") from None


def _check_(document: Document) -> Recipe | None:
    """Validate the data; the faults found join the document's."""
    data = document.data
    version = data.get("version") if isinstance(data, dict) else None
    if type(version) is int and version > VERSION:
        text = (
            f"expected {VERSION}, the version this pacswap reads, got the newer {got(version)}. "
            "Upgrade: pip install --upgrade pacswap"
        )
        document.faults.append(Fault(document.place(("version",)), ("version",), text))
        return None
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        for details in error.errors():
            path = tuple(step for step in details["loc"] if step not in _BRANCHES)
            if not document.is_spoiled(path):
                document.faults.append(_fault(document, path, details["type"], details["msg"]))
        return None


def _fault(document: Document, path: KeyPath, kind: str, text: str) -> Fault:
    at: dict[str, Any] = {
        UNKNOWN_KEY: {"path": path, "key": True},
        MISSING_KEY: {"path": path[:-1], "key": True},
    }.get(kind, {"path": path})
    return Fault(document.place(**at), path, text)


def _message(path: Path, faults: Sequence[Fault]) -> str:
    """One line per fault in the order of the file, the overrides' last."""
    ordered = sorted(
        faults,
        key=lambda fault: (fault.place.override is not None, fault.place.line, fault.place.column),
    )
    lines = [fault.spell(str(path)) for fault in ordered[:_MOST_LINES]]
    if len(ordered) > 1:
        lines.insert(0, f"{path} has {len(ordered)} faults:")
    if len(ordered) > _MOST_LINES:
        lines.append(f"... and {len(ordered) - _MOST_LINES} more.")
    return "\n".join(lines)
