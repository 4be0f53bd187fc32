"""What a recipe may say about training the upgraded network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import AfterValidator, Field, Strict, Tag

from pacswap.errors import nearest, quoted
from pacswap.recipes.sections import (
    LIST,
    MAPPING,
    MISSING_KEY,
    NUMBER,
    TEXT,
    UNKNOWN_KEY,
    Above0,
    AtLeast0,
    Breach,
    Fraction,
    Pair,
    Positive,
    Section,
    Text,
    check_pattern,
    exactly,
    forms,
    got,
    wrong,
)

GROUPS = ("added", "swapped", "guidance", "head", "norm", "all")

_Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _why_not_group(name: str) -> str | None:
    if name in GROUPS or name.startswith("re:") or "." in name or "*" in name:
        return None
    close = nearest(name, GROUPS, most=1)
    hint = f" Nearest: {quoted(close)}." if close else ""
    return (
        f"expected a group ({', '.join(GROUPS)}) or a pattern (with '.' or '*', or 're:...'), "
        f"got {got(name)}.{hint}"
    )


def _check_group(name: str) -> str:
    why_not = _why_not_group(name)
    if why_not is not None:
        raise wrong(why_not)
    return check_pattern(name)


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
        description="The split to learn from: its name or a file that lists it; null is the "
        "format's own.",
    )
    val: Text | None = Field(
        default=None,
        description="The split to measure on: its name or a file that lists it; null is the "
        "format's own.",
    )
    images: Text | None = Field(default=None, description="The subfolder of the pictures.")
    masks: Text | None = Field(default=None, description="The subfolder of the label masks.")
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
        description="The classes' names, a file with one per line, or how many; null is the "
        "format's own.",
    )
    ignore_index: int = Field(default=255, description="The label of pixels that do not count.")
    transforms: TransformSection = Field(
        default_factory=TransformSection, description="How training pictures are varied."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Data has a folder unless it is drawn."""
        style, root = raw.get("format"), raw.get("root")
        if style == "scenes" and root is not None:
            yield Breach(
                ("root",),
                f"expected none for scenes, which are drawn, got {got(root)}. Remove the key.",
            )
        if isinstance(style, str) and style != "scenes" and root is None:
            text = f"missing key. Expected: the folder of the {got(style)} data."
            yield Breach(("root",), text, MISSING_KEY)


class OptimizerSection(Section):
    """What turns gradients into steps."""

    name: Literal["adamw", "adam", "sgd"] = Field(default="adamw", description="The rule.")
    weight_decay: AtLeast0 = Field(default=0.01, description="How strongly weights are shrunk.")
    momentum: Fraction | None = Field(
        default=None, description="Of sgd only, 0 to 1; null is 0.9 there."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Only sgd has a momentum of its own."""
        momentum = raw.get("momentum")
        if momentum is not None and raw.get("name") != "sgd":
            yield Breach(
                ("momentum",), f"expected only with name: sgd, got {got(momentum)}. Remove the key."
            )


class LossSection(Section):
    """What training makes small."""

    name: Literal["cross_entropy", "dice", "cross_entropy+dice"] = Field(
        default="cross_entropy", description="The loss, or the sum of two."
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="How much of each label is spread over all classes, 0 to 1."
    )
    class_weights: Annotated[tuple[AtLeast0, ...], Strict(False), Field(min_length=1)] | None = (
        Field(default=None, description="A weight per class; null weighs all alike.")
    )


class StageSection(Section):
    """A stretch of training in which the same parameters learn."""

    name: Text = Field(description="The stage's name in logs; no two are alike.")
    train: Annotated[
        tuple[Annotated[Text, AfterValidator(_check_group)], ...],
        Strict(False),
        Field(min_length=1),
    ] = Field(
        description="What learns: added, swapped, guidance, head, norm, all, or patterns of "
        "parameter names."
    )
    epochs: Positive | None = Field(
        default=None, description="The stage's length in passes over the data; or give steps."
    )
    steps: Positive | None = Field(
        default=None, description="The stage's length in optimizer steps; or give epochs."
    )
    lr: Annotated[
        Annotated[Above0, Tag(NUMBER)] | Annotated[dict[str, Above0], Tag(MAPPING)],
        forms("a number above 0 or a mapping with default"),
    ] = Field(description="The learning rate, or one per group or pattern beside default.")
    schedule: Literal["constant", "poly", "cosine", "step"] = Field(
        default="constant", description="How the learning rate falls over the stage."
    )
    warmup: AtLeast0 = Field(
        default=0.0,
        description="How long the learning rate rises first, in the unit of the stage's length.",
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """One length, a warm-up that fits into it, and learning rates of groups that exist."""
        epochs, steps, warmup = raw.get("epochs"), raw.get("steps"), raw.get("warmup")
        if epochs is None and steps is None:
            yield Breach((), "expected one of 'epochs' and 'steps', got neither.")
        elif epochs is not None and steps is not None:
            yield Breach(("steps",), "expected one of 'epochs' and 'steps', got both. Keep one.")
        else:
            length = steps if epochs is None else epochs
            if _is_number(warmup) and _is_number(length) and 0 < length < warmup:
                yield Breach(("warmup",), f"expected at most the stage's {length}, got {warmup}.")
        lr = raw.get("lr")
        if isinstance(lr, Mapping):
            if "default" not in lr:
                text = "missing key. Expected: the learning rate of what no other key names."
                yield Breach(("lr", "default"), text, MISSING_KEY)
            for name in filter(lambda key: isinstance(key, str), lr):
                why_not = _why_not_group(name)
                if name != "default" and why_not is not None:
                    yield Breach(("lr", name), why_not, UNKNOWN_KEY)


class ControlSection(Section):
    """What the result is compared with: the network that nobody swapped, trained alike."""

    seeds: Annotated[tuple[_Seed, ...], Strict(False), Field(min_length=1)] = Field(
        default=(0,), description="Train once per seed, the control and the upgraded network."
    )
    capacity: bool = Field(
        default=False,
        description="Also train a plain network with as many parameters as were added.",
    )


class FinetuneSection(Section):
    """How to train the upgraded network."""

    seed: _Seed = Field(default=0, description="Where all randomness of the training starts.")
    batch_size: Positive = Field(default=8, description="Pictures per step, over all devices.")
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="The number format of the forward and backward pass."
    )
    data: DataSection = Field(description="Labelled pictures.")
    optimizer: OptimizerSection = Field(
        default_factory=OptimizerSection, description="What turns gradients into steps."
    )
    loss: LossSection = Field(default_factory=LossSection, description="What training makes small.")
    batch_norm: Literal["train", "frozen"] = Field(
        default="train", description="Whether batch norms go on gathering statistics."
    )
    clip_grad: Above0 | None = Field(
        default=None, description="The greatest norm of the whole gradient; null leaves it alone."
    )
    stages: Annotated[tuple[StageSection, ...], Strict(False), Field(min_length=1)] = Field(
        description="What learns when, one stage after the other."
    )
    control: ControlSection | None = Field(
        default=None, description="What to compare the result with; null compares with nothing."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """No two stages have one name."""
        stages = raw.get("stages")
        seen: dict[str, int] = {}
        for index, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
            name = stage.get("name") if isinstance(stage, Mapping) else getattr(stage, "name", None)
            if isinstance(name, str) and name in seen:
                text = f"expected a name of its own, got {got(name)}, as stages[{seen[name]}] has."
                yield Breach(("stages", index, "name"), text)
            elif isinstance(name, str):
                seen[name] = index


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
