"""The commands that look inside: which layers the data asks for, what trained ones see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer

from pacswap.cli.base import (
    AsJson,
    Overrides,
    RecipeName,
    RunFolder,
    TrustPython,
    app,
    dumped,
    said_if_interrupted,
    say,
)
from pacswap.cli.training import count_shown

if TYPE_CHECKING:
    from pacswap.surgery.spec import Operation


@app.command()
def probe(
    recipe: RecipeName,
    overrides: Overrides = None,
    operation: Annotated[
        str, typer.Option("--operation", help="swap (convolutions), pool, upsample or append.")
    ] = "swap",
    layers: Annotated[str, typer.Option("--layers", help="Among these, by a pattern.")] = "*",
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            "--guidance",
            help="A candidate; may be repeated. The image and one layer per resolution by default.",
        ),
    ] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="How many are looked at.")] = 4,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Rank layers and guidances by how strongly the loss on the recipe's data pulls at them."""
    from pacswap.train.choose import probe_recipe

    with count_shown("probing") as shown:
        found = probe_recipe(
            recipe,
            overrides or (),
            operation=cast("Operation", operation),
            layers=layers,
            guidance=guidance,
            most=batches,
            trust_python=trust_python,
            progress=lambda done, of, what: shown(done, of),
        )
    say(dumped(found.as_dict()) if as_json else str(found))


@app.command()
def show(
    folder: RunFolder,
    image: Annotated[Path, typer.Argument(help="A picture.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write to.")] = Path(
        "looks"
    ),
    at: Annotated[
        list[str] | None,
        typer.Option("--at", help="A pixel, ROW,COLUMN; may be repeated. Four telling ones."),
    ] = None,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Draw what each pixel-adaptive layer sees in a picture: guidance, kernels, where it adapts."""
    from pacswap.checkpoint import load
    from pacswap.train.data.pictures import read_picture
    from pacswap.train.setting import MODEL
    from pacswap.viz import show as run

    where = folder / MODEL if (folder / MODEL).is_dir() else folder
    model = load(where, trust_python=trust_python)
    picture = torch.from_numpy(read_picture(image).copy()).permute(2, 0, 1)
    pixels = None if at is None else [_pixel(text) for text in at]
    mean, std = _scales(where, model)
    with said_if_interrupted(f"interrupted; what was drawn until then lies in {output}."):
        written = run(model, picture, output, pixels, mean=mean, std=std)
    if as_json:
        say(dumped({"written": [str(path) for path in written]}))
    else:
        say("\n".join(f"written: {path}" for path in written))


def _pixel(text: str) -> tuple[int, int]:
    from pacswap.errors import ShapeError

    row, _, column = text.partition(",")
    if not (row.strip().isdecimal() and column.strip().isdecimal()):
        raise ShapeError(f"--at: expected ROW,COLUMN, such as 120,80, got '{text}'.")
    return int(row), int(column)


def _scales(folder: Path, model: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How the model's pictures are normalised: as it was trained, or as it was built."""
    from pacswap.checkpoint import RECIPE
    from pacswap.recipes import load_recipe
    from pacswap.train.setting import scales_of
    from pacswap.zoo import normalization

    finetune = load_recipe(folder / RECIPE).recipe.finetune
    mean, std = normalization(model) if finetune is None else scales_of(finetune.data, model)
    return tuple(mean), tuple(std)
