"""Checkpoints: whole or not there at all, checked before they are believed.

`checkpoints/step-0000120/` holds `position.json` (where the training stood, of which recipe and
network, and the other files' sizes and hashes), `state.pt` (weights, their average, the optimizer)
and `scores.safetensors` where the network was measured there. It is written under a hidden name,
brought to the disk, and renamed. No random state is kept: what is drawn in a step follows from the
seed and the step's number.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pacswap.errors import TrainingError
from pacswap.train.writing import write_file

VERSION = 1
POSITION, STATE, BEST = "position.json", "state.pt", "best.json"


@dataclass
class Position:
    """Where a training stands.

    Attributes:
        step: how many steps are done.
        measured: how many were done when the network was last measured.
        best_step: after which the mIoU was highest; None before the first measure.
        best_score: that mIoU.
        seconds: spent in steps so far, over all resumes.
        history: what was measured, as `Scores.as_dict` gives it, with `step`.
    """

    step: int = 0
    measured: int = 0
    best_step: int | None = None
    best_score: float | None = None
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """One that was read.

    Attributes:
        path: its folder.
        position: where the training stood.
        tensors: what `Checkpoints.write` was given.
    """

    path: Path
    position: Position
    tensors: dict[str, Any]


class _Damaged(Exception):
    """A checkpoint that cannot be used, and why."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        keep: how many of the last ones stay, beside the best.
        identity: what the run is of: plain data that a checkpoint must agree with.
    """

    def __init__(self, folder: Path, keep: int, identity: Mapping[str, Any]) -> None:
        self.folder, self.keep = folder / "checkpoints", keep
        self.identity = json.loads(json.dumps(identity))  # tuples become lists, as in the file

    def steps(self) -> list[int]:
        """After which steps there is one, in order."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        numbers = (path.name.removeprefix("step-") for path in found)
        return sorted(int(number) for number in numbers if number.isdigit())

    def path(self, step: int) -> Path:
        """Where the one after `step` steps is."""
        return self.folder / f"step-{step:07d}"

    def sweep(self) -> None:
        """Remove what a killed process left half-written or half-removed."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob(".old-*"):  # killed before the new one had its name
            target = self.folder / path.name.removeprefix(".old-").partition(".")[0]
            if not target.exists():
                path.rename(target)
        for path in self.folder.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)

    def write(self, position: Position, tensors: Mapping[str, Any], scores: Any = None) -> Path:
        """Write one, and remove those that need not stay.

        Args:
            position: where the training stands.
            tensors: state dicts by name; weights only.
            scores: of the network as it is here, if it was measured.

        Returns:
            Its folder.

        Raises:
            TrainingError: it cannot be written; the older ones are as before.
        """
        target = self.path(position.step)
        with _disk(f"the checkpoint '{target}'", self.last_words):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f".{target.name}.{secrets.token_hex(4)}"
            try:
                draft.mkdir()
                self._fill(draft, position, tensors, scores)
                old = self._set_aside(target, "old")
                draft.rename(target)
                _sync_folder(self.folder)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        best = {"step": position.best_step, "miou": position.best_score}
        write_file(self.folder / BEST, json.dumps(best) + "\n")
        stay = {*self.steps()[-self.keep :], position.best_step}
        for step in self.steps():
            if step not in stay:
                self._remove(self.path(step))
        return target

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The last one that is whole; None where there is none at all.

        Args:
            say: told in a sentence of each one that is passed over.

        Raises:
            TrainingError: it is of another recipe or network, or there are some and all damaged.
        """
        steps = self.steps()
        damages = []
        for step in reversed(steps):
            try:
                found = self.read(step)
            except _Damaged as damage:
                damages.append(str(damage))
                say(f"{damage} It is passed over for the one before.")
                continue
            return found
        if damages:
            raise TrainingError(
                f"'{self.folder}' has no checkpoint that can be read: {' '.join(damages)} Name "
                "another run folder, or remove this one to begin again."
            )
        return None

    def of_all(self, step: int) -> Checkpoint:
        """The checkpoint that another process has found whole.

        Raises:
            TrainingError: this process cannot read it.
        """
        try:
            return self.read(step)
        except _Damaged as damage:
            raise TrainingError(
                f"{damage} Another process could read it: name a run folder that all machines "
                "share."
            ) from damage

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are damaged and will be made again."""
        for later in self.steps():
            if later > step:
                self._remove(self.path(later))

    def read(self, step: int) -> Checkpoint:
        """The checkpoint after `step` steps.

        Raises:
            TrainingError: it is of another recipe, network or version of pacswap.
        """
        path = self.path(step)
        try:
            record = json.loads((path / POSITION).read_text(encoding="utf-8"))
            files, identity = record["files"], record["identity"]
            version, position = record["version"], record["position"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Damaged(f"The checkpoint '{path}' is damaged ({POSITION}: {error}).") from error
        if version != VERSION:
            raise TrainingError(
                f"the checkpoint '{path}' has format {version}, this pacswap reads {VERSION}. Use "
                "the version that wrote it, or name another run folder."
            )
        differing = differences(identity, self.identity)
        if differing:
            raise TrainingError(
                f"the checkpoint '{path}' is of another training: {'; '.join(differing[:3])}"
                f"{f'; and {len(differing) - 3} more' if len(differing) > 3 else ''}. Go on "
                "with the recipe as it was, or name another run folder."
            )
        contents = {name: _checked(path / name, facts) for name, facts in files.items()}
        try:
            tensors = torch.load(io.BytesIO(contents[STATE]), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, KeyError, EOFError, OSError) as error:
            raise _Damaged(f"The checkpoint '{path}' is damaged ({STATE}: {error}).") from error
        known = {one.name for one in fields(Position)}
        return Checkpoint(
            path, Position(**{k: v for k, v in position.items() if k in known}), tensors
        )

    def scores_file(self, step: int) -> Path:
        """Where the scores after `step` steps are, if the network was measured there."""
        return self.path(step) / "scores.safetensors"

    def _fill(
        self, draft: Path, position: Position, tensors: Mapping[str, Any], scores: Any
    ) -> None:
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        (draft / STATE).write_bytes(buffer.getbuffer())
        files = {STATE: _facts(buffer.getbuffer())}
        if scores is not None:
            path = scores.write(draft / self.scores_file(0).name)
            files[path.name] = _facts(path.read_bytes())
        record = {
            "version": VERSION,
            "position": asdict(position),
            "identity": self.identity,
            "files": files,
        }
        (draft / POSITION).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(draft)

    def _remove(self, path: Path) -> None:
        """Out of sight first: a checkpoint is never seen half-removed."""
        shutil.rmtree(self._set_aside(path, "gone"), ignore_errors=True)

    def _set_aside(self, path: Path, why: str) -> Path:
        aside = path.with_name(f".{why}-{path.name}.{secrets.token_hex(4)}")
        if path.exists():
            path.rename(aside)
        return aside

    def last_words(self) -> str:
        """Where to go on from, for the end of a message."""
        steps = self.steps()
        if not steps:
            return "There is no earlier checkpoint."
        return f"The last checkpoint is '{self.path(steps[-1])}'; resume goes on from it."


@contextmanager
def _disk(what: str, last_words: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (OSError, TrainingError) as error:
        # The scores' own words name a hidden file.
        cause = error.__cause__ if isinstance(error, TrainingError) else error
        words = cause.strerror if isinstance(cause, OSError) and cause.strerror else error
        raise TrainingError(
            f"cannot write {what}: {words}. Free some space. {last_words()}"
        ) from error


def _facts(content: bytes | memoryview) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _checked(path: Path, facts: Mapping[str, Any]) -> bytes:
    """A file's content, if it is what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _Damaged(
            f"The checkpoint '{path.parent}' is damaged ({path.name}: {error.strerror})."
        ) from error
    if _facts(content) != facts:
        raise _Damaged(
            f"The checkpoint '{path.parent}' is damaged ({path.name} has {len(content)} bytes that "
            f"are not the {facts['bytes']} that were written)."
        )
    return content


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def differences(there: Any, here: Any, place: str = "") -> list[str]:
    """Where two pieces of plain data differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            words
            for key in dict.fromkeys([*there, *here])
            for words in differences(
                there.get(key), here.get(key), f"{place}.{key}" if place else str(key)
            )
        ]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [w for i, (a, b) in pairs for w in differences(a, b, f"{place}[{i}]")]
    return [] if there == here else [f"{place} is {_short(there)} there and {_short(here)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
