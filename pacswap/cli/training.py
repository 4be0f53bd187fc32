"""The commands that train, measure and use segmentation networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pacswap.cli.base import (
    AsJson,
    Interrupted,
    Overrides,
    RecipeName,
    RunFolder,
    TrustPython,
    app,
    dumped,
    print_table,
    said_if_interrupted,
    say,
)

if TYPE_CHECKING:
    from pacswap.train.measure.metrics import Scores


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder; runs/ and the recipe's name."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the untouched network alike.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that lies there.")
    ] = False,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Train an upgraded network on labelled pictures, and say what the swap brought."""
    from pacswap.train.run import finetune as run

    try:
        with _run_shown() as shown:
            done = run(
                recipe,
                overrides or (),
                output=output,
                control=control,
                resume=resume,
                overwrite=overwrite,
                trust_python=trust_python,
                progress=shown,
            )
    except KeyboardInterrupt as interrupt:
        words = str(interrupt) or "interrupted outside a training; what was trained is kept."
        raise Interrupted(f"{words} Go on by the same command with --resume.") from None
    if not done.main:  # one process speaks for all
        return
    summary = done.summary
    if as_json:
        say(dumped(summary.as_dict()))
        return
    for arm in summary.arms:
        say(f"{arm.name}, seed {arm.seed}: {arm.scores}")
    for warning in summary.all_warnings:
        say(f"warning: {warning}")
    say(f"\n{summary.verdict}")
    say(f"\nwritten to {done.folder}: report.md, and {done.folder / 'model'} for pacswap.load")


@app.command()
def evaluate(
    folder: RunFolder,
    overrides: Overrides = None,
    split: Annotated[
        str, typer.Option("--split", help="val, the pictures to measure on, or train.")
    ] = "val",
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained network on the data of its recipe, or on other data by overrides."""
    from pacswap.errors import DataError
    from pacswap.train.trained import evaluate as run
    from pacswap.train.trained import open_trained

    if split not in ("train", "val"):
        raise DataError(f"--split: expected 'train' or 'val', got '{split}'.")
    trained = open_trained(folder, overrides or (), trust_python=trust_python)
    with count_shown("measuring") as shown:
        scores = run(trained, split, progress=shown)
    if as_json:
        say(dumped(scores.as_dict()))
    else:
        _print_scores(scores)


@app.command()
def predict(
    folder: RunFolder,
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")] = Path(
        "predictions"
    ),
    overlays: Annotated[
        bool, typer.Option("--overlay", help="Also lay the classes over each picture.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there.")
    ] = False,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Segment pictures: a palette PNG for each, whose numbers are the classes."""
    from pacswap.train.trained import open_trained
    from pacswap.train.trained import predict as run

    trained = open_trained(folder, trust_python=trust_python)
    words = f"interrupted; what was done until then lies in {output}."
    with said_if_interrupted(words), count_shown("segmenting") as shown:
        written = run(
            trained, images, output, overlays=overlays, overwrite=overwrite, progress=shown
        )
    if as_json:
        say(dumped({"written": [str(path) for path in written]}))
    else:
        say(f"written to {output}: {len(written)} files")


def _print_scores(scores: Scores) -> None:
    found = scores.as_dict()
    rows = [
        [c["name"], *(_points(c[key]) for key in ("iou", "boundary_iou", "band_iou"))]
        for c in found["classes"]
    ]
    print_table(["class", "IoU", "boundary IoU", "IoU near edges"], rows)
    say(f"\n{scores} over {found['pictures']} pictures")


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _bar(*columns: Any) -> Progress:
    """A bar on stderr with the time left; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def count_shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over pictures."""
    with _bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


class _RunShown:
    """A bar over the steps of all trainings of a run, and a line for each measure."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.task = bar, bar.add_task("", total=None, state="")
        self.arm, self.number, self.of = "", 1, 1

    def __call__(self, event: Any) -> None:
        """Show an event."""
        from pacswap.train.engine import events
        from pacswap.train.setting import ArmBegun, Phase

        if isinstance(event, Phase):
            self.bar.update(self.task, description=event.text)
        elif isinstance(event, ArmBegun):
            self.arm, self.number, self.of = (
                f"{event.name}, seed {event.seed}",
                event.number,
                event.of,
            )
            self.bar.update(self.task, description=f"{self.arm} ({self.number}/{self.of})")
        elif isinstance(event, events.StepDone):
            done = (self.number - 1) * event.total + event.step
            words = f"loss {event.loss:.3f}, lr {event.lr:.2g}"
            self.bar.update(self.task, completed=done, total=self.of * event.total, state=words)
        elif isinstance(event, events.Evaluated):
            best = ", the best so far" if event.best else ""
            self._line(f"{self.arm}, step {event.step}: {event.scores}{best}")
        elif isinstance(event, events.StageBegun):
            self._line(f"{self.arm}: stage {event.name}, {event.learning:,} numbers learn")
        elif isinstance(event, events.Note):
            self._line(f"note: {event.text}")

    def _line(self, text: str) -> None:
        if self.bar.disable:
            typer.echo(text, err=True)
        else:
            self.bar.console.print(text, markup=False, highlight=False)


@contextmanager
def _run_shown() -> Iterator[_RunShown]:
    with _bar(TextColumn("{task.fields[state]}")) as bar:
        yield _RunShown(bar)
