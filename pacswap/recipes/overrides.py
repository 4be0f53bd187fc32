"""`key.sub[0].x=value` from the command line, laid over a recipe that has been read."""

from __future__ import annotations

import re
from typing import Any

from pacswap.recipes.marks import (
    Document,
    Fault,
    KeyPath,
    Place,
    SyntaxFault,
    parse,
    spell,
)
from pacswap.recipes.sections import got

_KEY = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[[0-9]{1,9}\])*")
_STEP = re.compile(r"[^.\[\]]+|\[[0-9]+\]")


class _Refused(Exception):
    """Why an override has no place to go to."""


def override_(document: Document, text: str, number: int) -> None:
    """Set one value of a recipe; what is wrong with it joins the document's faults.

    Args:
        document: changed in place; mappings on the way to the key are made where they lack.
        text: `key.sub[0].x=value` or `key.sub.0.x=value`; the value is YAML and may hold a `=`.
        number: which override it is, for the order of the faults.
    """
    place = Place(number, 1, text)
    key, equals, value_text = text.partition("=")
    key = key.strip()
    try:
        if not equals or _KEY.fullmatch(key) is None:
            raise _Refused("expected key.sub[0].x=value, such as model.weights=null.")
        if not value_text.strip():
            raise _Refused(f"no value. Write {key}=null for none, or {key}='' for an empty text.")
        value = parse(value_text)
        _set_(document, _STEP.findall(key), value, place)
    except SyntaxFault as fault:
        document.faults.append(Fault(place, (), fault.text))
    except _Refused as refused:
        document.faults.append(Fault(place, (), str(refused)))


def _set_(document: Document, steps: list[str], value: Document, place: Place) -> None:
    container: Any = document.data
    path: KeyPath = ()
    for step in steps[:-1]:
        index = _index(container, step, path)
        path = (*path, index)
        child = container.get(index) if isinstance(container, dict) else container[index]
        if child is None:
            child = container[index] = {}
            document.keys[path] = document.values[path] = place
        container = child
    index = _index(container, steps[-1], path)
    path = (*path, index)
    container[index] = value.data
    _forget_(document, path)
    document.keys[path] = document.values[path] = place
    for fault in value.faults:
        document.faults.append(Fault(place, (*path, *fault.path), fault.text))
    document.spoiled.update((*path, *spoiled) for spoiled in value.spoiled)


def _index(container: Any, step: str, path: KeyPath) -> str | int:
    """The key or index that `step` means in `container`."""
    here = spell(path)
    if isinstance(container, dict):
        if step.startswith("["):
            raise _Refused(f"{here} is a mapping and has no entry {step}. Name one of its keys.")
        return step
    if not isinstance(container, list):
        raise _Refused(
            f"{here} is {got(container)} and has no keys. Override it whole: {here}={{...}}."
        )
    digits = step.strip("[]")
    if not re.fullmatch(r"[0-9]+", digits):
        raise _Refused(f"{here} is a list. Say which entry: {here}[0].{step}.")
    if int(digits) >= len(container):
        raise _Refused(f"{here} has no entry [{digits}]: it has {len(container)}, counted from 0.")
    return int(digits)


def _forget_(document: Document, path: KeyPath) -> None:
    """Drop the places of what the override has replaced."""
    for places in (document.keys, document.values):
        for old in [old for old in places if old[: len(path)] == path]:
            del places[old]
    document.spoiled -= {old for old in document.spoiled if old[: len(path)] == path}
