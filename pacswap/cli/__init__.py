"""The command `pacswap`."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn, cast

import typer

from pacswap.cli import exporting as _exporting  # noqa: F401
from pacswap.cli import inside as _inside  # noqa: F401
from pacswap.cli import recipes as _recipes  # noqa: F401  these register their commands
from pacswap.cli import training as _training  # noqa: F401
from pacswap.cli.base import Interrupted, app
from pacswap.errors import PacswapError

# typer shows it in a box that breaks long names; it has no public name in all versions.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__mro__[2])


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
    except Interrupted as interrupt:
        _fail(str(interrupt), 130)
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


def _fail(message: str, code: int) -> NoReturn:
    # A file's or a key's name may hold what would steer the terminal.
    safe = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    typer.echo(f"pacswap: {''.join(safe)}", err=True)
    raise SystemExit(code)
