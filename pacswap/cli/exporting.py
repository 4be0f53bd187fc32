"""The command that writes an upgraded network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pacswap.cli.base import AsJson, RunFolder, TrustPython, app, dumped, say

if TYPE_CHECKING:
    from pacswap.export import Format


@app.command()
def export(
    folder: RunFolder,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .onnx or .pt2.")
    ],
    format: Annotated[
        str | None, typer.Option("--format", help="onnx or pt2; by the file's suffix.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="One image of the planned size, instead of any.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    trust_python: TrustPython = False,
    as_json: AsJson = False,
) -> None:
    """Write an upgraded network as ONNX or .pt2, and check the file against the network."""
    from pacswap.checkpoint import load
    from pacswap.export import export as run
    from pacswap.train.setting import MODEL

    where = folder / MODEL if (folder / MODEL).is_dir() else folder
    model = load(where, trust_python=trust_python)
    done = run(
        model, output, format=cast("Format | None", format), static=static, overwrite=overwrite
    )
    say(dumped(done.as_dict()) if as_json else str(done))
