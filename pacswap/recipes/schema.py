"""What a recipe may say. The defaults come from the dataclasses of `pacswap.surgery.spec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, Strict

from pacswap.errors import RecipeError, quoted
from pacswap.recipes.finetune import FinetuneSection
from pacswap.recipes.groups import (
    AppendSection,
    GroupSection,
    PoolSection,
    SwapSection,
    UpsampleSection,
)
from pacswap.recipes.marks import RULES
from pacswap.recipes.sections import (
    Breach,
    Positive,
    Section,
    Text,
    Texts,
    Triple,
    TripleAbove0,
    exactly,
    got,
    wrong,
)
from pacswap.surgery.spec import Operation

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
VERSION = 1
WEIGHT_FILES = (".safetensors", ".pth", ".pt")
_OTHER_FILES = (".bin", ".ckpt", ".pkl", ".npz", ".h5", ".onnx")


def _check_version(value: Any) -> Any:
    if type(value) is not int:  # True == 1.0 == 1, and a Literal compares
        raise wrong(f"expected {VERSION}, got {got(value)}.")
    return value


class ModelSection(Section):
    """The network to start from."""

    library: Literal["timm", "torchvision", "python", "pacswap"] = Field(
        description="Who builds the model; python is a dotted factory and needs --trust-python."
    )
    name: Text = Field(description="The model's name in its library.")
    weights: Text | None = Field(
        default="DEFAULT",
        description="A tag of the library, a .safetensors, .pth or .pt file relative to the "
        "recipe, or null for random weights.",
    )
    args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the model's factory."
    )
    num_classes: Positive | None = Field(
        default=None,
        description="Give a segmentation network a new head of so many classes once its weights "
        "are loaded; null keeps its own.",
    )
    input_size: (
        Annotated[
            tuple[Positive, ...],
            Field(min_length=3, max_length=4),
            Strict(False),
            exactly((3, 4), "three whole numbers (channels, height, width)"),
        ]
        | None
    ) = Field(
        default=None,
        description="Channels, height and width of an example input (of a clip, with the frames "
        "before the height); null is the library's own.",
    )

    @property
    def weights_file(self) -> str | None:
        """The weights if they are a file and not a tag."""
        return self.weights if self.weights and self.weights.endswith(WEIGHT_FILES) else None

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """A path must have a suffix whose reading runs no code."""
        weights = raw.get("weights")
        if not isinstance(weights, str) or weights.endswith(WEIGHT_FILES):
            return
        if "/" in weights or weights.endswith(_OTHER_FILES):
            yield Breach(
                ("weights",),
                "expected a tag of the library or a file that ends in .safetensors, .pth or .pt, "
                f"got {got(weights)}.",
            )


class CalibrationSection(Section):
    """The pictures that set the bandwidths; without this section they are drawn scenes."""

    images: Texts | None = Field(
        default=None,
        description="A folder or a list of files, relative to the recipe; null draws scenes.",
    )
    mean: Triple | None = Field(
        default=None,
        description="What to subtract from each channel of a picture in [0, 1]; null is the "
        "model's own.",
    )
    std: TripleAbove0 | None = Field(
        default=None, description="What to divide each channel by then; null is the model's own."
    )


class Recipe(Section):
    """Which network, which of its layers change and how, and how to fine-tune the result."""

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": [operation]} for operation in OPERATIONS]}
    )

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = Field(
        description="The version of the recipe's format: 1."
    )
    model: ModelSection = Field(description="The network to start from.")
    calibration: CalibrationSection | None = Field(
        default=None,
        description="The pictures that set the bandwidths; null draws scenes, or in a fine-tuning "
        "takes some that are learnt from.",
    )
    swap: Annotated[tuple[SwapSection, ...], Strict(False), Field(min_length=1)] = Field(
        default=(), description="The groups of convolutions to swap."
    )
    pool: Annotated[tuple[PoolSection, ...], Strict(False), Field(min_length=1)] = Field(
        default=(), description="The groups of pooling layers that become pixel-adaptive."
    )
    upsample: Annotated[tuple[UpsampleSection, ...], Strict(False), Field(min_length=1)] = Field(
        default=(),
        description="The groups of interpolations and transposed convolutions to be guided.",
    )
    append: Annotated[tuple[AppendSection, ...], Strict(False), Field(min_length=1)] = Field(
        default=(), description="The CRFs to put behind logits."
    )
    finetune: FinetuneSection | None = Field(
        default=None, description="How to train the upgraded network."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """A recipe changes something."""
        if not any(operation in raw for operation in OPERATIONS):
            yield Breach((), f"expected at least one group in one of {quoted(OPERATIONS)}.")

    def sections(self) -> Iterator[tuple[Operation, int, GroupSection]]:
        """(operation, index, section) of every group, in the order of the operations."""
        for operation in OPERATIONS:
            for index, section in enumerate(getattr(self, operation)):
                yield operation, index, section


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader or a YAML 1.1 reader would take for something else."""

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: Any = None
    ) -> yaml.SequenceNode:
        short = not any(isinstance(value, list | tuple | dict) for value in sequence)
        return super().represent_sequence(tag, sequence, flow_style=short)


for _kind, _rule in RULES:
    _Dumper.add_implicit_resolver(_kind, _rule, None)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; loading it gives an equal recipe.

    Raises:
        RecipeError: a recipe that was made in Python holds objects that YAML has no words for.
    """
    data = recipe_data(recipe)
    try:
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    except yaml.representer.RepresenterError as error:
        raise RecipeError(
            f"model.args: expected plain YAML data, got {type(error.args[1]).__name__}."
        ) from None


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, with every default but without operations that it has none of."""
    data = recipe.model_dump(by_alias=True)
    return {key: value for key, value in data.items() if key not in OPERATIONS or value}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema by which editors complete and check recipes."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "pacswap recipe",
    }
