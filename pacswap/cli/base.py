"""What all commands share: the application, its options, printing, progress."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Interrupted(Exception):
    """Ctrl-C, with words: typer would swallow those of a KeyboardInterrupt."""


app = typer.Typer(
    name="pacswap",
    pretty_exceptions_enable=False,
    add_completion=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A file or a shipped recipe.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="What `pacswap finetune` wrote.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as model.weights=null."),
]
TrustPython = Annotated[
    bool, typer.Option("--trust-python", help="Allow library: python, which runs code.")
]


def _print_versions(asked: bool) -> None:
    if asked:
        say(", ".join(f"{name} {version(name)}" for name in ("pacswap", "torch", "timm")))
        raise typer.Exit


@app.callback()
def _pacswap(
    versions: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the versions.", callback=_print_versions, is_eager=True
        ),
    ] = False,
) -> None:
    """Swap convolutions of pretrained networks for pixel-adaptive ones, without breaking them."""


@contextmanager
def steps_shown(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr with the time left; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=steps)
        begun = [False]

        def step(name: str) -> None:
            bar.update(task, description=name, advance=1 if begun[0] else 0)
            begun[0] = True

        yield step


@contextmanager
def said_if_interrupted(words: str) -> Iterator[None]:
    """Say these words if Ctrl-C comes."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(words) from None


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns with their heads."""
    from pacswap.surgery.table import columns

    say("\n".join(columns(head, rows)))


def dumped(data: Any) -> str:
    """Data as JSON text."""
    return json.dumps(data, indent=2)


def say(text: str) -> None:
    """Print to stdout, at once: a closed pipe or a full disk is noticed here."""
    typer.echo(text)
