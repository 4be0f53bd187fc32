"""What happened in each step: `log.csv`, `val.csv` and TensorBoard.

The tables hold nothing that depends on the clock or the machine, so two runs that did the same have
the same files. On a resume what was logged after the checkpoint is cut off and written again.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pacswap.errors import TrainingError
from pacswap.train.writing import write_file

LOG, VAL, BOARD = "log.csv", "val.csv", "tensorboard"


class Table:
    """A CSV file that grows by a row at a time and can be cut back.

    Args:
        path: the file.
        columns: the first is the step.
        step: rows of later steps are dropped from a file that exists; at 0 it begins anew.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int) -> None:
        self.path, self.columns = path, list(columns)
        head = _line(self.columns)
        kept = []
        if step > 0 and path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            rows = text.splitlines(keepends=True)[1:]
            kept = [row for row in rows if row.endswith("\n") and _step(row) <= step]
        write_file(path, head + "".join(kept))
        self._file: IO[str] = path.open("a", encoding="utf-8", newline="")

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; columns that it lacks stay empty.

        Raises:
            TrainingError: it cannot be written.
        """
        cells = [row.get(column) for column in self.columns]
        self._write(_line(["" if cell is None else cell for cell in cells]))

    def sync(self) -> None:
        """Bring all rows to the disk.

        Raises:
            TrainingError: they cannot be written.
        """
        self._write("")
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _full(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a full disk, which `add` has reported
            self._file.close()

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise _full(self.path, error) from error


class Logs:
    """The logs of one run; nothing at all in processes other than the main one.

    Args:
        folder: of the run.
        rates: what sets learning rates, a column each: `default`, groups and patterns.
        classes: the classes' names.
        step: how many steps are done.
        measured: how many were done when the network was last measured.
        main: whether this process writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rates: Sequence[str],
        classes: Sequence[str],
        step: int,
        measured: int,
        main: bool = True,
    ) -> None:
        self._tables: dict[str, Table] = {}
        self._board: Any = None
        if not main:
            return
        from pacswap.train.measure.metrics import MEASURES

        self._folder = folder
        learning = ["step", "stage", "epoch", "loss", *(f"lr/{rate}" for rate in rates)]
        measures = ["step", "stage", "epoch", *MEASURES, *(f"iou/{name}" for name in classes)]
        self._tables = {
            LOG: Table(folder / LOG, learning, step),
            VAL: Table(folder / VAL, measures, measured),
        }
        self._board = _board(folder / BOARD, step)

    @property
    def lacks_board(self) -> bool:
        """Whether this process writes and TensorBoard is not installed."""
        return bool(self._tables) and self._board is None

    def step(
        self, step: int, stage: str, epoch: int, loss: float, rates: Mapping[str, float]
    ) -> None:
        """One step was taken.

        Args:
            step: how many are done.
            stage: the stage's name.
            epoch: the pass over the pictures, from 1.
            loss: of the step.
            rates: the highest learning rate that each of `rates` set.

        Raises:
            TrainingError: the disk is full.
        """
        if not self._tables:
            return
        row = {"step": step, "stage": stage, "epoch": epoch, "loss": repr(loss)}
        self._tables[LOG].add(row | {f"lr/{key}": repr(rate) for key, rate in rates.items()})
        self._plot(step, {"loss/train": loss} | {f"lr/{k}": rate for k, rate in rates.items()})

    def measured(self, step: int, stage: str, epoch: int, scores: Mapping[str, Any]) -> None:
        """The network was measured.

        Args:
            step: how many steps are done.
            stage: the stage's name.
            epoch: the pass over the pictures, from 1.
            scores: as `Scores.as_dict` gives them.

        Raises:
            TrainingError: the disk is full.
        """
        if not self._tables:
            return
        flat = {name: value for name, value in scores.items() if isinstance(value, float)}
        flat |= {f"iou/{one['name']}": one["iou"] for one in scores["classes"]}
        row = {"step": step, "stage": stage, "epoch": epoch}
        known = {name: value for name, value in flat.items() if value is not None}
        self._tables[VAL].add(row | {name: repr(value) for name, value in known.items()})
        self._plot(step, {f"val/{name}": value for name, value in known.items()})

    def sync(self) -> None:
        """Bring all rows to the disk, so that no checkpoint is ahead of its log.

        Raises:
            TrainingError: the disk is full.
        """
        for table in self._tables.values():
            table.sync()

    def __enter__(self) -> Logs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for table in self._tables.values():
            table.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is None:
            return
        try:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise _full(self._folder / BOARD, error) from error


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _full(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"cannot write '{path}': {error.strerror or error}. Free some space; resume goes on from "
        "the last checkpoint."
    )


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _step(row: str) -> float:
    """The step of a row; a row without one is later than any."""
    first = row.partition(",")[0]
    return int(first) if first.isdigit() else float("inf")
