"""The recipes that ship with pacswap: finding, describing and copying them."""

from __future__ import annotations

import os
import secrets
from os import PathLike
from pathlib import Path

from pacswap.errors import RecipeError, nearest_hint
from pacswap.shipped import shipped_folder


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name (without `.yaml`), in alphabetical order."""
    folder = shipped_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }


def find_recipe(name_or_path: str | PathLike[str]) -> Path:
    """The file of a recipe: an existing path, or else a shipped name with or without `.yaml`.

    Raises:
        RecipeError: it is neither; the message names what comes nearest.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    name = os.fspath(name_or_path).removesuffix(".yaml")
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    hint = nearest_hint(path.name.removesuffix(".yaml"), shipped)
    sentences = [
        f"no recipe '{path}': neither a file nor a shipped recipe.",
        hint,
        "List them: pacswap ls recipes",
    ]
    raise RecipeError(" ".join(filter(None, sentences)))


def summary(path: str | PathLike[str]) -> str:
    """What a recipe says of itself: its first line of comment, or nothing.

    A line that tells an editor where the schema lies is passed over.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            text = line.strip().lstrip("#").strip()
            if line.strip() and not line.startswith("#"):
                break
            if text and not text.startswith("yaml-language-server:"):
                return text
    return ""


def copy_recipe(name: str | PathLike[str], destination: str | PathLike[str]) -> Path:
    """Copy a recipe to a new file, whole or not at all, never over an existing one.

    Args:
        name: what `find_recipe` takes.
        destination: the new file, or a folder that gets a file of the recipe's name.

    Returns:
        The new file.

    Raises:
        RecipeError: there is no such recipe, or the destination exists or cannot be written.
    """
    source, target = find_recipe(name), Path(destination)
    if target.is_dir():
        target = target / source.name
    elif os.fspath(destination).endswith("/"):
        raise RecipeError(f"{destination}: no such folder. Make it, or name the new file.")
    try:
        _write_new(target, source.read_bytes())
    except FileExistsError:
        raise RecipeError(f"{target} exists and is not overwritten. Name another file.") from None
    except OSError as error:
        raise RecipeError(
            f"{target}: cannot be written ({error.strerror}). Name another file."
        ) from error
    return target


def _write_new(target: Path, data: bytes) -> None:
    """Write beside the target, then link: a reader sees the whole file or none."""
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
        _link_new(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _link_new(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with target.open("xb") as file:
            file.write(source.read_bytes())
