"""Where the recipes and the quickstart weights lie, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path


def shipped_folder() -> Path:
    """`pacswap/recipes/library` of an installed package, or `recipes/` at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes" / "library"
    return installed if installed.is_dir() else package.parent / "recipes"
