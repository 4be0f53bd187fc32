"""The command `pacswap`."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pacswap.errors import PacswapError

if TYPE_CHECKING:
    from pacswap.surgery.spec import Operation

app = typer.Typer(
    name="pacswap",
    help="Swap convolutions of pretrained networks for pixel-adaptive ones, without breaking them.",
    pretty_exceptions_enable=False,
    add_completion=False,
)
ls = typer.Typer(help="List recipes, models, or a model's layers.", invoke_without_command=True)
app.add_typer(ls, name="ls")

# typer shows it in a box that breaks long names; it has no public name in all versions.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A file or a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as model.weights=null."),
]
TrustPython = Annotated[
    bool, typer.Option("--trust-python", help="Allow library: python, which runs code.")
]


def main(args: list[str] | None = None) -> None:
    """Run the command; errors go to stderr in plain words, with exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale without ─ and × is no reason to fail
        sys.stdout.reconfigure(errors="replace")
    try:
        given = sys.argv[1:] if args is None else args
        code = app(args=given or ["--help"], prog_name="pacswap", standalone_mode=False)
        if code == 130:  # typer's word for Ctrl-C
            raise KeyboardInterrupt
    except PacswapError as error:
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; nothing was written.", 130)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = "pacswap" if context is None else context.command_path
        _fail(f"{error.format_message()}\nHow to call it: {command} --help", 2)
    except Exception as error:  # the last door: a user sees words, a developer asks for more
        if os.environ.get("PACSWAP_DEBUG"):
            raise
        if isinstance(error, OSError):
            _fail(f"the system refuses: {error}", 2)
        _fail(
            f"internal error: {type(error).__name__}: {error}\nThis is a fault of pacswap. Run it "
            "again with PACSWAP_DEBUG=1 for the traceback, and please report it.",
            1,
        )


@app.command()
def apply(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The model directory to write.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model directory.")
    ] = False,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Upgrade a network as a recipe says, and prove that nothing broke."""
    from pacswap.upgrade import STEPS
    from pacswap.upgrade import apply as run

    with _progress(len(STEPS) - (output is None)) as step:
        applied = run(
            recipe,
            overrides or (),
            output=output,
            overwrite=overwrite,
            trust_python=trust_python,
            progress=step,
        )
    report = applied.report
    if as_json:
        _print(_dumped(report.as_dict()))
        return
    latency = report.latency
    _print(f"{applied.plan}\n\n{report.verification}")
    _print(
        f"latency ratio {latency.ratio:.2f} ({latency.lowest:.2f} … {latency.highest:.2f}), "
        f"{1e3 * latency.before:.1f} → {1e3 * latency.after:.1f} ms on {latency.device}, "
        f"{latency.pairs} pairs in turns, every blend at 0.5"
    )
    if output is not None:
        _print(f"\nwritten to {output}: load it with pacswap.load({str(output)!r})")


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe would do: layers, guidance, cost. Needs no weights and no data."""
    from pacswap.report import plan_as_dict
    from pacswap.upgrade import plan_recipe

    _, planned = plan_recipe(recipe, overrides or (), trust_python=trust_python)
    _print(_dumped(plan_as_dict(planned)) if as_json else str(planned))


@app.command()
def validate(
    recipe: RecipeName,
    overrides: Overrides = None,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Check a recipe against its network, without weights and data; every fault at once."""
    from pacswap.upgrade import plan_recipe

    loaded, planned = plan_recipe(recipe, overrides or (), trust_python=trust_python)
    if as_json:
        _print(_dumped({"valid": True, "recipe": str(loaded.path), "layers": len(planned.layers)}))
    else:
        _print(f"{loaded.path} is valid: {len(planned.layers)} layers of {planned.model}")


@app.command()
def cp(
    recipe: RecipeName,
    file: Annotated[str, typer.Argument(help="The new file, or a folder.")],
    as_json: AsJson = False,
) -> None:
    """Copy a shipped recipe, to change it."""
    from pacswap.recipes import copy_recipe

    target = copy_recipe(recipe, file)
    _print(_dumped({"written": str(target)}) if as_json else f"written: {target}")


@app.command()
def schema(as_json: AsJson = True) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from pacswap.recipes import recipe_schema

    _print(_dumped(recipe_schema()))


@ls.callback()
def ls_default(context: typer.Context, as_json: AsJson = False) -> None:
    """List recipes (the default), models, or a model's layers."""
    if context.invoked_subcommand is None:
        ls_recipes(as_json)
    elif as_json:  # `ls --json models` is `ls models --json`
        context.default_map = {context.invoked_subcommand: {"as_json": True}}


@ls.command("recipes")
def ls_recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from pacswap.recipes import shipped_recipes, summary

    found = {name: summary(path) for name, path in shipped_recipes().items()}
    if as_json:
        _print(_dumped([{"name": name, "summary": text} for name, text in found.items()]))
        return
    _table(["recipe", "what it does"], [[name, text] for name, text in found.items()])


@ls.command("models")
def ls_models(
    pattern: Annotated[
        str, typer.Argument(help="A library, a name or a glob, such as 'resnet*'.")
    ] = "*",
    as_json: AsJson = False,
) -> None:
    """List the models that can be built by name."""
    from pacswap.errors import ModelError
    from pacswap.surgery.select import matching
    from pacswap.zoo import model_names
    from pacswap.zoo.build import LIBRARIES

    library = pattern if pattern in LIBRARIES else None
    names = model_names(library)
    wanted = "*" if library else pattern
    try:
        rows = [[lib, name] for lib, known in names.items() for name in matching(wanted, known)]
    except ValueError as error:
        raise ModelError(f"{error}.") from error
    if not rows:
        raise ModelError(
            f"no model matches '{pattern}'. Try a glob: pacswap ls models '*{pattern}*'"
        )
    if as_json:
        _print(_dumped([{"library": library, "name": name} for library, name in rows]))
        return
    _table(["library", "model"], rows)


@ls.command("layers")
def ls_layers(
    model: Annotated[str, typer.Argument(help="A model's name, or library/name.")],
    operation: Annotated[
        str,
        typer.Option(
            "--operation", help="swap (convolutions), pool, upsample or append (what gives logits)."
        ),
    ] = "swap",
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """List what an operation can change in a model, in the order in which it runs."""
    from pacswap.surgery import default_input, layers
    from pacswap.zoo import build, input_size

    source = _source(model)
    network = build(source, meta=True, trust_python=trust_python)
    example = default_input(network)
    size = input_size(source, network)
    example = example if size is None else example.new_empty(1, *size)
    infos = layers(network, example, operation=cast("Operation", operation))
    if as_json:
        rows = [
            {
                "name": info.name,
                "what": info.what,
                "output_shape": info.output_shape and list(info.output_shape),
                "refusal": info.refusal,
            }
            for info in infos
        ]
        _print(_dumped(rows))
        return
    table = []
    for info in infos:
        shape = "–" if info.output_shape is None else "×".join(map(str, info.output_shape[2:]))
        table.append([info.name, info.what, shape, info.refusal or "yes"])
    swaps = operation == "swap"
    what, verdict = ("convolution", "can be swapped") if swaps else ("what it is", "can be changed")
    _table(["layer", what, "output", verdict], table)


def _source(model: str) -> Any:
    """A source from `torchvision/resnet50` or `resnet50` (the first library that has it)."""
    from pacswap.zoo import Source, model_names
    from pacswap.zoo.build import LIBRARIES

    library, _, name = model.partition("/")
    if name and library in LIBRARIES:
        return Source(library, name)
    for library, known in model_names().items():
        if model.partition(".")[0] in known:
            return Source(library, model)
    return Source("timm", model)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
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


def _table(head: list[str], rows: list[list[str]]) -> None:
    from pacswap.surgery.table import columns

    _print("\n".join(columns(head, rows)))


def _dumped(data: Any) -> str:
    return json.dumps(data, indent=2)


def _print(text: str) -> None:
    typer.echo(text)  # flushes, so that a closed pipe or a full disk is noticed here


def _fail(message: str, code: int) -> NoReturn:
    # A file's or a key's name may hold what would steer the terminal.
    safe = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    typer.echo(f"pacswap: {''.join(safe)}", err=True)
    raise SystemExit(code)
