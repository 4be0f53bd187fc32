"""What a recipe may say about training the upgraded network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import AfterValidator, Field, Strict, Tag

from pacswap.errors import nearest, quoted
from pacswap.recipes.data import DataSection
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


class OptimizerSection(Section):
    """What turns gradients into steps; built by timm's factory."""

    name: Text = Field(
        default="adamw", description="One of timm's optimizers: adamw, sgd, lion ..."
    )
    weight_decay: AtLeast0 = Field(default=0.01, description="How strongly weights are shrunk.")
    momentum: Fraction | None = Field(
        default=None, description="Of optimizers like sgd, 0 to 1; null is 0.9 there."
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Further keyword arguments of the optimizer."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Adam has betas, no momentum."""
        momentum = raw.get("momentum")
        if momentum is not None and raw.get("name", "adamw") in ("adam", "adamw"):
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
    class_weights: (
        Annotated[
            Annotated[tuple[AtLeast0, ...], Strict(False), Field(min_length=1), Tag(LIST)]
            | Annotated[Literal["balanced"], Tag(TEXT)],
            forms("a list of numbers or 'balanced'"),
        ]
        | None
    ) = Field(
        default=None,
        description="A weight per class; balanced counts the training masks and gives rare classes "
        "more; null weighs all alike.",
    )
    ohem: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Learn from this share of the pixels only, those of greatest loss; null takes "
        "all.",
    )
    auxiliary: AtLeast0 = Field(
        default=0.4, description="The weight of an auxiliary head's loss, where there is one."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Dice has no use for what belongs to cross entropy."""
        for key in ("label_smoothing", "ohem"):
            if raw.get("name") == "dice" and raw.get(key) not in (None, 0, 0.0):
                text = f"expected only with cross entropy, got {got(raw[key])}. Remove the key."
                yield Breach((key,), text)


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
    power: Above0 | None = Field(
        default=None, description="Of schedule poly: its exponent; null is 0.9."
    )
    decay_every: Above0 | None = Field(
        default=None,
        description="Of schedule step: after how long the learning rate falls, in the unit of the "
        "stage's length; null is a third of the stage.",
    )
    decay_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Of schedule step: the factor by which it falls; null is 0.1."
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
        yield from _keys_of_schedule(raw)
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

    seeds: Annotated[tuple[_Seed, ...], Strict(False), Field(min_length=1)] | None = Field(
        default=None,
        description="Train once per seed, the control and the upgraded network; null is "
        "finetune.seed.",
    )
    capacity: bool = Field(
        default=False,
        description="Also train the upgraded network with every adapting kernel held constant: the "
        "same filters and blends, and nothing adapts.",
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """No seed twice."""
        seeds = raw.get("seeds")
        listed = list(seeds) if isinstance(seeds, list | tuple) else []
        for index, seed in enumerate(listed):
            if seed in listed[:index]:
                yield Breach(("seeds", index), f"expected each seed once, got {got(seed)} again.")


class EvaluateSection(Section):
    """How the network is measured on whole pictures."""

    every: Positive = Field(
        default=1, description="After how many passes over the data; always at a stage's end."
    )
    window: Pair | None = Field(
        default=None,
        description="Height and width of a window that slides over larger pictures; null takes "
        "each picture whole.",
    )
    overlap: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="How much neighbouring windows overlap."
    )
    scales: Annotated[tuple[Above0, ...], Strict(False), Field(min_length=1)] = Field(
        default=(1.0,), description="Sizes at which each picture is seen; the answers are averaged."
    )
    flip: bool = Field(default=False, description="Whether mirror images are averaged in.")
    band: Positive = Field(
        default=2, description="How near an edge, in pixels, a pixel counts as an edge pixel."
    )
    boundary: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.02,
        description="How near a contour boundary IoU looks, as a share of the picture's diagonal.",
    )
    pictures: Annotated[int, Field(ge=0)] = Field(
        default=4, description="How many pictures of before and after are drawn."
    )


class CheckpointSection(Section):
    """What is kept while training."""

    every: Positive | None = Field(
        default=None, description="After how many steps one is written; null is once per pass."
    )
    keep: Positive = Field(
        default=2, description="How many of the last ones stay, beside the best."
    )


class FinetuneSection(Section):
    """How to train the upgraded network."""

    seed: _Seed = Field(default=0, description="Where all randomness of the training starts.")
    batch_size: Positive = Field(default=8, description="Pictures per step, over all devices.")
    accumulate: Positive = Field(
        default=1,
        description="In how many parts a step's pictures are taken, to need less memory.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        default=2, description="Processes that read pictures; 0 reads in the main one."
    )
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="The number format of the forward and backward pass."
    )
    data: DataSection = Field(description="Labelled pictures.")
    optimizer: OptimizerSection = Field(
        default_factory=OptimizerSection, description="What turns gradients into steps."
    )
    loss: LossSection = Field(default_factory=LossSection, description="What training makes small.")
    batch_norm: Literal["train", "frozen"] = Field(
        default="train",
        description="Whether batch norms go on gathering statistics; they rest in a stage in which "
        "only what was added learns.",
    )
    clip_grad: Above0 | None = Field(
        default=None, description="The greatest norm of the whole gradient; null leaves it alone."
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="The learning rate's factor per layer, from the head down; null has none.",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="The decay of a moving average of the weights, which is what is then measured "
        "and kept; null has none.",
    )
    evaluate: EvaluateSection = Field(
        default_factory=EvaluateSection, description="How the network is measured."
    )
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="What is kept while training."
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


# Which keys belong to which schedule.
_OF_SCHEDULE = {"power": "poly", "decay_every": "step", "decay_rate": "step"}


def _keys_of_schedule(raw: Mapping[str, Any]) -> Iterator[Breach]:
    """A key that the stage's schedule would not look at."""
    for key, schedule in _OF_SCHEDULE.items():
        if raw.get(key) is not None and raw.get("schedule", "constant") != schedule:
            text = f"expected only with schedule: {schedule}, got {got(raw[key])}. Remove the key."
            yield Breach((key,), text)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
