"""YAML read as plain data, with the place of every key and value.

Only scalars, lists and mappings with text keys are read, by YAML 1.2's core rules (`1e-3` is a
number, `on` and `yes` are text). Tags, merge keys and several documents are refused, and a hostile
file meets a limit before it costs memory or time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml
from yaml.reader import Reader

from pacswap.errors import RecipeError

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_NODES = 20_000
MAX_DIGITS = 40

KeyPath: TypeAlias = "tuple[str | int, ...]"

_TAG = "tag:yaml.org,2002:"
RULES: list[tuple[str, re.Pattern[str]]] = [
    (_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)\Z")),
    (_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")),
    (_TAG + "int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
    (
        _TAG + "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
    ),
]
_HINTS = {
    "found character '\\t' that cannot start any token": (
        "a tab where YAML takes only spaces. Indent with spaces"
    ),
    "mapping values are not allowed here": (
        "a ':' where no key can stand. Indent the keys of one mapping alike, and quote a text that "
        "holds ': '"
    ),
}


@dataclass(frozen=True)
class Place:
    """Where a key or a value was written: 1-based, or in an override.

    For an override `line` is its number on the command line.
    """

    line: int
    column: int
    override: str | None = None

    def spell(self, file: str) -> str:
        """The place as messages show it.

        >>> Place(14, 5).spell("recipe.yaml")
        'recipe.yaml:14:5'
        >>> Place(1, 1, "model.weights=null").spell("recipe.yaml")
        "override 'model.weights=null'"
        """
        if self.override is not None:
            return f"override '{self.override}'"
        return f"{file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, and where."""

    place: Place
    path: KeyPath
    text: str

    def spell(self, file: str) -> str:
        """The fault as one line of an error message."""
        path = f"{spell(self.path)}: " if self.path else ""
        return f"{self.place.spell(file)}: {path}{self.text}"


class SyntaxFault(RecipeError):
    """A text that cannot be read as YAML at all; whoever knows its name adds it."""

    def __init__(self, place: Place, text: str) -> None:
        super().__init__(text)
        self.place = place
        self.text = text


@dataclass
class Document:
    """What a YAML text says, and where it says so.

    Attributes:
        data: plain Python data: None, bool, int, float, str, list and dict.
        keys: where each key of each mapping is written.
        values: where each value is written; the empty path is the whole document.
        faults: what is wrong although it could be read on: doubled keys, tags and the like.
        spoiled: values that stand for nothing because of such a fault.
    """

    data: Any = None
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    spoiled: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath, *, key: bool = False) -> Place:
        """The place of a value or of its key, or of the nearest thing around it that is written."""
        for length in range(len(path), -1, -1):
            near = path[:length]
            if key and near in self.keys:
                return self.keys[near]
            if near in self.values:
                return self.values[near]
        return Place(1, 1)

    def is_spoiled(self, path: KeyPath) -> bool:
        """Whether the value, or one around it, stands for nothing."""
        return any(path[:length] in self.spoiled for length in range(len(path) + 1))


def spell(path: KeyPath) -> str:
    """A path as overrides and messages write it.

    >>> spell(("swap", 0, "guidance", "channels"))
    'swap[0].guidance.channels'
    """
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w-]{1,60}", step):
            text += f".{step}"
        else:
            text += f"[{shorten(step)}]"
    return text.removeprefix(".")


def shorten(text: str, most: int = 60) -> str:
    """A quoted text for a message: on one line, without control characters, and not too long."""
    return repr(text) if len(text) <= most else repr(text[:most]) + "..."


def decode(raw: bytes) -> str:
    """The text of a file.

    Raises:
        SyntaxFault: it is too long, or it is not UTF-8.
    """
    if len(raw) > MAX_BYTES:
        raise SyntaxFault(
            Place(1, 1),
            f"more than {MAX_BYTES // 2**20} MiB. A recipe is a page of YAML: name the right file.",
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        column = len(raw[start : error.start].decode("utf-8", "replace")) + 1
        line = raw.count(b"\n", 0, error.start) + 1
        raise SyntaxFault(
            Place(line, column),
            f"not UTF-8 text (byte 0x{raw[error.start]:02x}). Save the file as UTF-8.",
        ) from None


def parse(text: str) -> Document:
    """Read one YAML document as plain data with places.

    Raises:
        SyntaxFault: it is not YAML, holds nothing or several documents, or exceeds a limit.
    """
    unprintable = Reader.NON_PRINTABLE.search(text)
    if unprintable is not None:
        before = text[: unprintable.start()]
        raise SyntaxFault(
            Place(before.count("\n") + 1, len(before) - before.rfind("\n")),
            f"the character U+{ord(unprintable.group()):04X}, which is not text. Name a YAML file.",
        )
    loader = _Loader(text)
    node = loader.compose_only()
    document = Document()
    document.data = _Builder(document, loader.tags).build(node, ())
    return document


def _place(mark: Any) -> Place:
    return Place(mark.line + 1, mark.column + 1)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and composer with YAML 1.2's scalars and with limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tags: dict[yaml.Node, str] = {}
        self._depth = 0
        self._nodes = 0

    def compose_only(self) -> yaml.Node:
        """The root of the one document."""
        try:
            if not self.check_node():
                raise SyntaxFault(Place(1, 1), "holds nothing but blank lines and comments.")
            root = self.get_node()
            if self.check_node():
                raise SyntaxFault(
                    _place(self.peek_event().start_mark),
                    "a second document begins here. A recipe is one document: keep one of them.",
                )
        except SyntaxFault:
            raise
        except yaml.MarkedYAMLError as error:
            raise SyntaxFault(_place(error.problem_mark), _in_plain_words(error)) from None
        except (ValueError, OverflowError):  # PyYAML's chr() and int() of an escape or a directive
            raise SyntaxFault(
                _place(self.get_mark()),
                "not YAML: a number in an escape (\\U...) or a % line is too large.",
            ) from None
        assert root is not None
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES:
            raise SyntaxFault(_place(event.start_mark), _too_many())
        if self._depth > MAX_DEPTH:
            raise SyntaxFault(_place(event.start_mark), _too_deep())
        node = super().compose_node(parent, index)
        self._depth -= 1
        tag = getattr(event, "tag", None)
        if tag is not None and node is not None:
            self.tags[node] = tag.replace(_TAG, "!!", 1)
        return node


_Loader.yaml_implicit_resolvers = {None: RULES}


class _Builder:
    """Turns composed nodes into data; aliases are written out, so each use is data of its own."""

    def __init__(self, document: Document, tags: dict[yaml.Node, str]) -> None:
        self._document = document
        self._tags = tags
        self._open: set[yaml.Node] = set()
        self._count = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count += 1
        place = _place(node.start_mark)
        if self._count > MAX_NODES:
            raise SyntaxFault(place, _too_many())
        if len(path) >= MAX_DEPTH:
            raise SyntaxFault(place, _too_deep())
        if node in self._open:
            raise SyntaxFault(
                place, "an anchor (&) that holds an alias (*) of itself. Write it out."
            )
        self._document.values[path] = place
        if node in self._tags:
            return self._spoil(path, place, _tagged(self._tags[node]))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path, place)
        self._open.add(node)
        data: Any
        if isinstance(node, yaml.SequenceNode):
            data = [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        else:
            data = {
                key: self.build(value, (*path, key)) for key, value in self._entries(node, path)
            }
        self._open.discard(node)
        return data

    def _entries(self, node: yaml.Node, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        """The entries of a mapping whose keys are text and new."""
        seen: dict[str, Place] = {}
        for key_node, value in node.value:
            place = _place(key_node.start_mark)
            key = key_node.value
            if key_node in self._tags:
                self._fault(path, place, _tagged(self._tags[key_node]))
            elif not isinstance(key_node, yaml.ScalarNode):
                self._fault(path, place, "a key that is a list or a mapping. A key is a word.")
            elif key == "<<" and key_node.style is None:
                self._fault(path, place, "merge keys (<<) are not read. Write the keys out.")
            elif key_node.tag != _TAG + "str":
                kind = key_node.tag.removeprefix(_TAG)
                self._fault(
                    path,
                    place,
                    f"the key {shorten(key)} is read as {kind}, not as text. Quote or rename it.",
                )
            elif _why_not_text(key) is not None:
                self._fault(path, place, f"a key with {_why_not_text(key)}.")
            elif key in seen:
                first = f"{seen[key].line}:{seen[key].column}"
                self._fault(
                    (*path, key), place, f"the key is here twice, first at {first}. Keep one."
                )
            else:
                seen[key] = place
                self._document.keys[(*path, key)] = place
                yield key, value

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath, place: Place) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            return self._spoil(
                path, place, f"a number of {len(text)} digits; {MAX_DIGITS} are read."
            )
        if kind == "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return float(re.sub(r"\.(?=[iInN])", "", text))
        why_not = _why_not_text(text)
        if why_not is not None:
            return self._spoil(path, place, f"a text with {why_not}.")
        return text

    def _fault(self, path: KeyPath, place: Place, text: str) -> None:
        self._document.faults.append(Fault(place, path, text))

    def _spoil(self, path: KeyPath, place: Place, text: str) -> None:
        self._fault(path, place, text)
        self._document.spoiled.add(path)


def _why_not_text(text: str) -> str | None:
    """Escapes in double quotes can write what the file itself may not hold."""
    if "\0" in text:
        return "a NUL character (\\0)"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "half a character (a surrogate, \\ud800 to \\udfff)"
    return None


def _tagged(tag: str) -> str:
    return f"the tag {shorten(tag)} is not read: a recipe is plain data. Remove the tag."


def _too_many() -> str:
    return f"more than {MAX_NODES} values, aliases (*) written out. Make the recipe smaller."


def _too_deep() -> str:
    return f"more than {MAX_DEPTH} lists and mappings in one another. Make the recipe flatter."


def _in_plain_words(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem)
    if problem in _HINTS:
        return f"not YAML: {_HINTS[problem]}."
    if error.context is None or error.context_mark is None:
        return f"not YAML: {problem}."
    began = _place(error.context_mark)
    if problem.startswith("expected <block end>"):
        kind = "mapping" if "mapping" in error.context else "list"
        return (
            f"not YAML: this is neither in the {kind} from {began.line}:{began.column} nor after "
            "it. Check the indentation."
        )
    return f"not YAML: {error.context} from {began.line}:{began.column}, {problem}."
