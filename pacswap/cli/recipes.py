"""The commands that look at recipes and models, and upgrade."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pacswap.cli.base import (
    AsJson,
    Overrides,
    RecipeName,
    TrustPython,
    app,
    dumped,
    print_table,
    say,
    steps_shown,
)

if TYPE_CHECKING:
    from pacswap.surgery.spec import Operation

ls = typer.Typer(help="List recipes, models, or a model's layers.", invoke_without_command=True)
app.add_typer(ls, name="ls")


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

    with steps_shown(len(STEPS) - (output is None)) as step:
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
        say(dumped(report.as_dict()))
        return
    latency = report.latency
    say(f"{applied.plan}\n\n{report.verification}")
    say(
        f"latency ratio {latency.ratio:.2f} ({latency.lowest:.2f} … {latency.highest:.2f}), "
        f"{1e3 * latency.before:.1f} → {1e3 * latency.after:.1f} ms on {latency.device}, "
        f"{latency.pairs} pairs in turns, every blend at 0.5"
    )
    if output is not None:
        say(f"\nwritten to {output}: load it with pacswap.load({str(output)!r})")


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
    say(dumped(plan_as_dict(planned)) if as_json else str(planned))


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
        say(dumped({"valid": True, "recipe": str(loaded.path), "layers": len(planned.layers)}))
    else:
        say(f"{loaded.path} is valid: {len(planned.layers)} layers of {planned.model}")


@app.command()
def cp(
    recipe: RecipeName,
    file: Annotated[str, typer.Argument(help="The new file, or a folder.")],
    as_json: AsJson = False,
) -> None:
    """Copy a shipped recipe, to change it."""
    from pacswap.recipes import copy_recipe

    target = copy_recipe(recipe, file)
    say(dumped({"written": str(target)}) if as_json else f"written: {target}")


@app.command()
def schema(as_json: AsJson = True) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from pacswap.recipes import recipe_schema

    say(dumped(recipe_schema()))


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
        say(dumped([{"name": name, "summary": text} for name, text in found.items()]))
        return
    print_table(["recipe", "what it does"], [[name, text] for name, text in found.items()])


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
        say(dumped([{"library": library, "name": name} for library, name in rows]))
        return
    print_table(["library", "model"], rows)


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
    from pacswap.surgery.example import of_size
    from pacswap.zoo import build, input_size

    source = _source(model)
    network = build(source, meta=True, trust_python=trust_python)
    example = default_input(network)
    size = input_size(source, network)
    example = example if size is None else of_size(example, size)
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
        say(dumped(rows))
        return
    table = []
    for info in infos:
        shape = "–" if info.output_shape is None else "×".join(map(str, info.output_shape[2:]))
        table.append([info.name, info.what, shape, info.refusal or "yes"])
    swaps = operation == "swap"
    what, verdict = ("convolution", "can be swapped") if swaps else ("what it is", "can be changed")
    print_table(["layer", what, "output", verdict], table)


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
