"""What a recipe may say about labelled pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Strict, Tag

from pacswap.recipes.sections import (
    LIST,
    MISSING_KEY,
    NUMBER,
    TEXT,
    Above0,
    Breach,
    Fraction,
    Pair,
    Positive,
    Section,
    Text,
    Triple,
    TripleAbove0,
    exactly,
    forms,
    got,
    wrong,
)

_Channel = Annotated[int, Field(ge=0, le=255)]
_Colour = Annotated[
    tuple[_Channel, _Channel, _Channel], Strict(False), exactly(3, "three numbers 0 to 255")
]


# The formats that look at these keys; the others know where their files lie and what they mean.
_ONLY_WITH = {"images": ("folder", "coco"), "masks": ("folder",), "palette": ("folder",)}


def _check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[0] > scale[1]:
        raise wrong(f"expected the smaller one first, got {scale[0]} and {scale[1]}.")
    return scale


class TransformSection(Section):
    """How training pictures are varied; images and masks alike."""

    scale: Annotated[
        tuple[Above0, Above0],
        Strict(False),
        exactly(2, "two numbers above 0"),
        AfterValidator(_check_scale),
    ] = Field(default=(1.0, 1.0), description="Least and greatest factor of a random resize.")
    crop: Pair | None = Field(
        default=None, description="Height and width of a random crop; null keeps the whole picture."
    )
    flip: Fraction = Field(default=0.0, description="The probability of a mirror image, 0 to 1.")
    color: Fraction = Field(
        default=0.0, description="How far brightness, contrast and saturation vary, 0 to 1."
    )


class DataSection(Section):
    """Labelled pictures."""

    format: Literal["folder", "voc", "sbd", "cityscapes", "oxford_pet", "coco", "scenes"] = Field(
        description="How the data lies on the disk; scenes are drawn and need no disk."
    )
    root: Text | None = Field(
        default=None, description="The data's folder, relative to the recipe."
    )
    train: Text | None = Field(
        default=None,
        description="The split to learn from: its name or a file that lists it, in root or beside "
        "the recipe; null is the format's own, of a folder train.txt or the subfolder train.",
    )
    val: Text | None = Field(
        default=None,
        description="The split to measure on: its name or a file that lists it, in root or beside "
        "the recipe; null is the format's own, of a folder val.txt or the subfolder val.",
    )
    images: Text | None = Field(
        default=None,
        description="The subfolder of the pictures; null is images. {split} in it stands for the "
        "split's name: that of its list without the ending, and where there is no such folder, "
        "without what follows a '_' (train_half.txt: train_half, then train).",
    )
    masks: Text | None = Field(
        default=None,
        description="The subfolder of the label masks, which may hold {split}; null is masks.",
    )
    classes: (
        Annotated[
            Annotated[tuple[Text, ...], Strict(False), Field(min_length=1), Tag(LIST)]
            | Annotated[Text, Tag(TEXT)]
            | Annotated[Positive, Tag(NUMBER)],
            forms("a list of names, a file that lists them or their number"),
        ]
        | None
    ) = Field(
        default=None,
        description="The classes' names, a file (one per line, or JSON with classes and perhaps "
        "palette) or how many; null is the format's own.",
    )
    ignore_index: int = Field(default=255, description="The label of pixels that do not count.")
    palette: Annotated[tuple[_Colour, ...], Strict(False), Field(min_length=1)] | None = Field(
        default=None,
        description="Where masks are colours or greys: red, green and blue of each class; any "
        "other colour does not count.",
    )
    resize: Pair | None = Field(
        default=None,
        description="Height and width that every picture and mask is brought to first; of scenes, "
        "those they are drawn at. null leaves them as they are.",
    )
    count: Pair | None = Field(
        default=None,
        description="Of scenes: how many are drawn to learn from and to measure on; null is 320 "
        "and 60.",
    )
    mean: Triple | None = Field(
        default=None,
        description="What to subtract from each channel of a picture in [0, 1]; null is the "
        "model's own.",
    )
    std: TripleAbove0 | None = Field(
        default=None, description="What to divide each channel by then; null is the model's own."
    )
    transforms: TransformSection = Field(
        default_factory=TransformSection, description="How training pictures are varied."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Data has a folder unless it is drawn."""
        style, root, count = raw.get("format"), raw.get("root"), raw.get("count")
        if isinstance(style, str) and style != "scenes" and count is not None:
            text = f"expected only with format: scenes, got {got(count)}. Remove the key."
            yield Breach(("count",), text)
        if style == "scenes" and root is not None:
            yield Breach(
                ("root",),
                f"expected none for scenes, which are drawn, got {got(root)}. Remove the key.",
            )
        for key, formats in _ONLY_WITH.items():
            if raw.get(key) is not None and isinstance(style, str) and style not in formats:
                text = f"expected only with format: {' or '.join(formats)}, got {got(raw[key])}."
                yield Breach((key,), f"{text} Remove the key.")
        for key in ("train", "val"):
            if style == "scenes" and raw.get(key) is not None:
                text = f"expected none for scenes, which are drawn, got {got(raw[key])}."
                yield Breach((key,), f"{text} Remove the key.")
        if isinstance(style, str) and style != "scenes" and root is None:
            text = f"missing key. Expected: the folder of the {got(style)} data."
            yield Breach(("root",), text, MISSING_KEY)
