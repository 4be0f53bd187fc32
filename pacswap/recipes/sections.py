"""What all sections of a recipe share: strictness, and faults said in one plain sentence each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from pacswap.errors import nearest, nearest_hint, quoted
from pacswap.recipes.marks import KeyPath, shorten

# A fault's kind says where it is shown: at the key, at the value or at what lacks a key.
UNKNOWN_KEY = "unknown_key"
MISSING_KEY = "missing_key"
WRONG_VALUE = "wrong_value"
_WRONG_FORM = "wrong_form"

# pydantic puts the tag of a union's branch into the path. The NUL keeps it apart from any key.
TEXT, NUMBER, LIST, MAPPING = (f"\0{form}" for form in ("text", "number", "list", "mapping"))


class Breach(NamedTuple):
    """A rule between several keys that doesn't hold."""

    path: KeyPath
    text: str
    kind: str = WRONG_VALUE


class Section(BaseModel):
    """A mapping of a recipe: unknown keys, look-alike types and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Rules between keys, checked on the raw data so that no other fault hides them."""
        yield from ()

    @classmethod
    def keys(cls) -> dict[str, str]:
        """The keys as they are written, with their descriptions."""
        return {
            field.alias or name: field.description or "" for name, field in cls.model_fields.items()
        }

    @classmethod
    def _meant(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The data with misspelt keys put right: a misspelling is not also a missing key."""
        known = cls.keys()
        meant = {key: value for key, value in raw.items() if key in known}
        for key in raw:
            close = nearest(str(key), known, most=1)
            if key not in known and close:
                meant.setdefault(close[0], raw[key])
        return meant

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        meant = cls._meant(value) if isinstance(value, Mapping) else {}
        breaches = cls.breaches(meant) if isinstance(value, Mapping) else ()
        faults = [_details(breach.kind, breach.path, breach.text, value) for breach in breaches]
        try:
            section = handler(value)
        except ValidationError as error:
            details = [details for details in error.errors() if not _is_echo(details, meant)]
            faults = [_plain(detail, cls.keys()) for detail in details] + faults
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return section


def wrong(text: str) -> PydanticCustomError:
    """The error of a value that a check of ours refuses."""
    return PydanticCustomError(WRONG_VALUE, "{text}", {"text": text})


def got(value: Any) -> str:
    """A value as the recipe writes it, short enough for a message.

    >>> got(None), got(True), got("on"), got([1, 2])
    ('null', 'true', "'on'", 'a list')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return "a list"
    return "a mapping" if isinstance(value, Mapping | BaseModel) else type(value).__name__


def forms(expected: str) -> Discriminator:
    """Tell a union's branches apart by the form of the value: one fault is then one sentence."""
    return Discriminator(
        _form, custom_error_type=_WRONG_FORM, custom_error_message=f"expected {expected}"
    )


def _form(value: Any) -> str | None:
    if isinstance(value, str):
        return TEXT
    if isinstance(value, int | float) and not isinstance(value, bool):
        return NUMBER
    if isinstance(value, list | tuple):
        return LIST
    return MAPPING if isinstance(value, Mapping | BaseModel) else None


def _details(kind: str, path: KeyPath, text: str, value: Any) -> InitErrorDetails:
    error = PydanticCustomError(kind, "{text}", {"text": text})
    return InitErrorDetails(type=error, loc=path, input=value)


def _is_echo(error: ErrorDetails, meant: Mapping[str, Any]) -> bool:
    """Whether the error only follows from another that says more."""
    if error["type"] == "missing":
        return error["loc"][-1] in meant
    # pydantic counts only the entries that are right
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _plain(error: ErrorDetails, keys: Mapping[str, str]) -> InitErrorDetails:
    """An error of pydantic's in our words; one that has been through here stays as it is."""
    kind, path, value = error["type"], error["loc"], error["input"]
    if kind in (UNKNOWN_KEY, MISSING_KEY, WRONG_VALUE):
        return _details(kind, path, error["msg"], value)
    if kind == "extra_forbidden":
        hint = nearest_hint(str(path[-1]), keys)
        return _details(UNKNOWN_KEY, path, f"unknown key. {hint}".rstrip(), value)
    if kind == "missing":
        text = keys[str(path[-1])]
        return _details(
            MISSING_KEY, path, f"missing key. Expected: {text[0].lower()}{text[1:]}", value
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        shape = "a mapping" if kind == "dict_type" else f"a mapping of {quoted(list(keys))}"
        return _details(WRONG_VALUE, path, f"expected {shape}, got {got(value)}.", value)
    return _details(WRONG_VALUE, path, _sentence(error), value)


def _sentence(error: ErrorDetails) -> str:
    kind, value, limits = error["type"], error["input"], error.get("ctx", {})
    limits = {key: int(limit) if limit in (0.0, 1.0) else limit for key, limit in limits.items()}
    if kind == _WRONG_FORM:
        return f"{error['msg']}, got {got(value)}."
    if kind == "literal_error":
        return _not_one_of(limits["expected"], value)
    if kind in ("too_short", "too_long", "string_too_short"):
        least = limits.get("min_length")
        if kind == "string_too_short":
            return "expected some text, got an empty one."
        if least is not None:
            return f"expected at least {least} in the list, got {limits['actual_length']}."
        return (
            f"expected at most {limits['max_length']} in the list, got {limits['actual_length']}."
        )
    expected = {
        "string_type": "text",
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "list_type": "a list",
        "greater_than": "more than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than_equal": "at most {le}",
    }.get(kind)
    if expected is None:
        return f"{error['msg']}, got {got(value)}."
    return f"expected {expected.format(**limits)}, got {got(value)}."


def _not_one_of(expected: str, value: Any) -> str:
    """Of choices, which pydantic spells "'a', 'b' or 'c'"."""
    choices = re.findall(r"'([^']*)'", expected)
    text = f"expected {expected}, got {got(value)}."
    close = nearest(value, choices) if isinstance(value, str) else []
    return f"{text} Nearest: {quoted(close[:1])}." if close and len(choices) > 1 else text


def check_pattern(text: str) -> str:
    """Refuse a `re:` pattern that is no regular expression."""
    if text.startswith("re:"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # Python warns of what is all but surely a slip
                re.compile(text.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError, Warning) as error:
            why = "too many groups in one another" if isinstance(error, RecursionError) else error
            raise wrong(
                f"expected a regular expression after 're:', got {shorten(text)}: {why}."
            ) from None
    return text


def exactly(count: int | tuple[int, ...], what: str) -> BeforeValidator:
    """Refuse a list of another length in one sentence instead of one per entry."""
    counts = (count,) if isinstance(count, int) else count

    def check(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) not in counts:
            have = f"{len(value)} of them" if isinstance(value, list | tuple) else got(value)
            raise wrong(f"expected a list of {what}, got {have}.")
        return value

    return BeforeValidator(check)


Text = Annotated[str, Field(min_length=1)]
Pattern = Annotated[Text, AfterValidator(check_pattern)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AtLeast0 = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Pair = Annotated[tuple[Positive, Positive], Strict(False), exactly(2, "two whole numbers")]
Triple = Annotated[tuple[float, float, float], Strict(False), exactly(3, "three numbers")]
TripleAbove0 = Annotated[
    tuple[Above0, Above0, Above0], Strict(False), exactly(3, "three numbers above 0")
]
Patterns = Annotated[
    Annotated[Pattern, Tag(TEXT)]
    | Annotated[tuple[Pattern, ...], Strict(False), Field(min_length=1), Tag(LIST)],
    forms("text or a list of texts"),
]
Size = Annotated[
    Annotated[Positive, Tag(NUMBER)] | Annotated[Pair, Tag(LIST)],
    forms("a whole number or a list of two"),
]
Texts = Annotated[
    Annotated[Text, Tag(TEXT)]
    | Annotated[tuple[Text, ...], Strict(False), Field(min_length=1), Tag(LIST)],
    forms("text or a list of texts"),
]
