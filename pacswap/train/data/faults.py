"""How faults of a data set are said: counted, a few of them named, all in one error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from pacswap.errors import DataError


def few(names: Sequence[str], *, most: int = 3) -> str:
    """The first names, and how many more there are.

    >>> few(["a", "b"]), few(list("abcdef"))
    ("'a', 'b'", "'a', 'b', 'c' and 3 more")
    """
    return few_of([f"'{name}'" for name in names], most=most)


def few_of(texts: Sequence[str], *, most: int = 3) -> str:
    """The first texts as they are, and how many more there are.

    >>> few_of(["'a' (200)", "'b' (7)"], most=1)
    "'a' (200) and 1 more"
    """
    left = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {left} more" if left > 0 else "")


def many(count: int, one: str, several: str) -> str:
    """A number and what it counts.

    >>> many(1, "picture has", "pictures have"), many(2, "picture has", "pictures have")
    ('1 picture has', '2 pictures have')
    """
    return f"{count} {one if count == 1 else several}"


def refuse(where: str, faults: Sequence[str]) -> NoReturn:
    """Raise all faults as one error.

    Raises:
        DataError: always; `faults`, each once, in their order.

    >>> refuse("data", ["no masks.", "no classes."])
    Traceback (most recent call last):
    pacswap.errors.DataError: data has 2 faults:
    no masks.
    no classes.
    """
    once = list(dict.fromkeys(faults))
    if len(once) == 1:
        raise DataError(f"{where}: {once[0]}")
    raise DataError("\n".join([f"{where} has {len(once)} faults:", *once]))
