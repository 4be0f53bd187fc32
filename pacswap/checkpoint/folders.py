"""Folders that appear whole or not at all, and the names of the files in a model directory."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pacswap.errors import CheckpointError, quoted

WEIGHTS = "model.safetensors"  # of the whole model
ADDED = "added.safetensors"  # of what the swap and the training changed
RECIPE = "recipe.yaml"
CLASSES = "classes.json"
REPORTS = ("report.json", "report.md", CLASSES)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `target` on leaving, whole, or vanishes on an error.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or cannot be made.
    """
    refuse_existing(target, overwrite=overwrite)
    place = target.resolve()  # behind a link, which stays
    draft = _beside(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        _sync(draft)
        refuse_existing(target, overwrite=overwrite)  # another process may have made it meanwhile
        if overwrite and place.exists():
            _replace(place, draft)
        else:
            draft.rename(place)
    except OSError as error:
        raise CheckpointError(f"cannot write '{target}': {error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise unless `target` may be made.

    Raises:
        CheckpointError: something is there already.
    """
    if not target.exists():
        return
    if target.resolve() == Path.cwd():
        raise CheckpointError(
            f"'{target}' is the working directory, which cannot be replaced. Name another one."
        )
    inside = {path.name for path in target.iterdir()} if target.is_dir() else set()
    is_model = RECIPE in inside and bool(inside & {WEIGHTS, ADDED})
    if not target.is_dir() or (inside and not is_model):
        raise CheckpointError(
            f"'{target}' exists and is not a model directory; it is not replaced. Name another one."
        )
    strange = sorted(inside - {RECIPE, WEIGHTS, ADDED, *REPORTS})
    if overwrite and strange:
        raise CheckpointError(
            f"'{target}' also holds {quoted(strange[:3])}, which pacswap did not write; it is not "
            "replaced. Name another directory."
        )
    if inside and not overwrite:
        raise CheckpointError(
            f"'{target}' exists. Name another directory, or replace it: --overwrite on the command "
            "line, overwrite=True in Python."
        )


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _replace(target: Path, draft: Path) -> None:
    """Put a finished folder in the place of an old one, which is kept until then."""
    old = _beside(target)
    target.rename(old)
    try:
        draft.rename(target)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            old.rename(target)
        if target.exists():  # if not, the old one stays where it is, under its hidden name
            shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make sure that the files' contents are on the disk before their folder gets its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
