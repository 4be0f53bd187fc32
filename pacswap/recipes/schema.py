"""What a recipe may say. The defaults come from the dataclasses of `pacswap.surgery.spec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, Strict, Tag
from pydantic_core import CoreSchema, core_schema

from pacswap.errors import RecipeError
from pacswap.recipes.finetune import FinetuneSection
from pacswap.recipes.marks import RULES
from pacswap.recipes.sections import (
    LIST,
    MAPPING,
    NUMBER,
    TEXT,
    Above0,
    Breach,
    Pattern,
    Patterns,
    Positive,
    Section,
    Size,
    Text,
    Texts,
    Triple,
    exactly,
    forms,
    got,
    wrong,
)
from pacswap.surgery.spec import (
    Distance,
    Form,
    Group,
    GuidanceSpec,
    KernelSpec,
    LayerQuery,
    Layers,
    Normalize,
    Resize,
)

VERSION = 1
WEIGHT_FILES = (".safetensors", ".pth", ".pt")
_OTHER_FILES = (".bin", ".ckpt", ".pkl", ".npz", ".h5", ".onnx")


def _check_version(value: Any) -> Any:
    if type(value) is not int:  # True == 1.0 == 1, and a Literal compares
        raise wrong(f"expected {VERSION}, got {got(value)}.")
    return value


def _check_bandwidth(value: Any) -> Any:
    if value != "auto":
        raise wrong(f"expected a number above 0 or 'auto', got {got(value)}.")
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
    input_size: (
        Annotated[
            tuple[Positive, Positive, Positive],
            Strict(False),
            exactly(3, "three whole numbers (channels, height, width)"),
        ]
        | None
    ) = Field(
        default=None,
        description="Channels, height and width of an example input; null is the library's own.",
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
    std: (
        Annotated[tuple[Above0, Above0, Above0], Strict(False), exactly(3, "three numbers above 0")]
        | None
    ) = Field(
        default=None, description="What to divide each channel by then; null is the model's own."
    )


class LayerQuerySection(Section):
    """Convolutions by their properties; a property left out matches everything."""

    type: Text | None = Field(
        default=LayerQuery.type, description="The class's name, such as Conv2d."
    )
    kernel_size: Size | None = Field(
        default=LayerQuery.kernel_size, description="The kernel's size, one number or two."
    )
    stride: Size | None = Field(
        default=LayerQuery.stride, description="The stride, one number or two."
    )
    dilation: Size | None = Field(
        default=LayerQuery.dilation, description="The dilation, one number or two."
    )
    depthwise: bool | None = Field(
        default=LayerQuery.depthwise, description="Only depthwise convolutions, or none of them."
    )
    name: Patterns | None = Field(
        default=LayerQuery.name, description="Names, globs or re: patterns; one has to match."
    )
    last_of_stage: bool = Field(
        default=LayerQuery.last_of_stage, description="Of each stage only the last that matches."
    )
    exclude: Patterns | None = Field(
        default=LayerQuery.exclude, description="Names, globs or re: patterns to leave alone."
    )

    def to_spec(self) -> LayerQuery:
        """The query as surgery takes it."""
        return LayerQuery(**_fields(self))


class GuidanceSection(Section):
    """Where the adapting features come from."""

    source: Patterns = Field(
        alias="from",
        description="A module's name, a glob, a re: pattern, a traced node, several of them "
        "(concatenated), input, input+position or external.",
    )
    channels: Positive | None = Field(
        default=GuidanceSpec.channels,
        description="Project to so many channels by a learned 1x1 convolution; null keeps them.",
    )
    resize: Resize = Field(
        default=GuidanceSpec.resize, description="How the features get to a layer's resolution."
    )
    detach: bool = Field(
        default=GuidanceSpec.detach,
        description="Stop the gradient into the layers that compute the guidance.",
    )

    def to_spec(self) -> GuidanceSpec:
        """The guidance as surgery takes it."""
        return GuidanceSpec(**_fields(self))


class KernelSection(Section):
    """How the adapting kernels are made."""

    form: Form = Field(default=KernelSpec.form, description="The function of the distance.")
    normalize: Normalize = Field(
        default=KernelSpec.normalize,
        description="none, sum (the paper's) or mean (keeps the scale of the pretrained weights).",
    )
    blend: float = Field(
        default=KernelSpec.blend,
        description="Where the learnable blend starts: 0 is the plain convolution, 1 the paper's.",
    )
    bandwidth: Annotated[
        Annotated[Above0, Tag(NUMBER)]
        | Annotated[Literal["auto"], BeforeValidator(_check_bandwidth), Tag(TEXT)],
        forms("a number above 0 or 'auto'"),
    ] = Field(
        default=KernelSpec.bandwidth,
        description="The kernel's width; auto makes the median kernel of the calibration one half.",
    )
    standardize: bool = Field(
        default=KernelSpec.standardize,
        description="Bring each guidance channel of each image to mean 0 and variance 1.",
    )
    distance: Distance = Field(
        default=KernelSpec.distance,
        description="Whether squared differences are averaged or summed over the channels.",
    )

    def to_spec(self) -> KernelSpec:
        """The kernel as surgery takes it."""
        return KernelSpec(**_fields(self))


class _ShortGuidance:
    """Lets a guidance of which only `from` is said be that text or list alone."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        short = core_schema.no_info_after_validator_function(
            lambda value: GuidanceSection.model_validate({"from": value}),
            handler.generate_schema(Patterns),
        )
        section = handler(source)
        by_form = forms("text, a list of texts or a mapping")
        return core_schema.tagged_union_schema(
            {TEXT: short, LIST: short, MAPPING: section},
            discriminator=by_form.discriminator,
            custom_error_type=by_form.custom_error_type,
            custom_error_message=by_form.custom_error_message,
        )


_Layer = Annotated[
    Annotated[Pattern, Tag(TEXT)] | Annotated[LayerQuerySection, Tag(MAPPING)],
    forms("text or a mapping"),
]


class SwapSection(Section):
    """A group of convolutions that get the same treatment."""

    layers: Annotated[
        Annotated[Pattern, Tag(TEXT)]
        | Annotated[LayerQuerySection, Tag(MAPPING)]
        | Annotated[tuple[_Layer, ...], Strict(False), Field(min_length=1), Tag(LIST)],
        forms("text, a mapping or a list of them"),
    ] = Field(description="Which convolutions: names, globs, re: patterns or their properties.")
    guidance: Annotated[GuidanceSection, _ShortGuidance()] = Field(
        description="What feeds the adapting kernels: its name, names, or a mapping with from."
    )
    kernel: KernelSection = Field(
        default_factory=KernelSection, description="How the adapting kernels are made."
    )
    override: bool = Field(
        default=Group.override,
        description="Take layers away from earlier groups; without it a double claim is an error.",
    )

    def to_spec(self) -> Group:
        """The group as surgery takes it."""
        layers: Layers
        if isinstance(self.layers, tuple):
            layers = tuple(_layer(layer) for layer in self.layers)
        else:
            layers = _layer(self.layers)
        return Group(layers, self.guidance.to_spec(), self.kernel.to_spec(), self.override)


class Recipe(Section):
    """Which network, which of its layers change and how, and how to fine-tune the result."""

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = Field(
        description="The version of the recipe's format: 1."
    )
    model: ModelSection = Field(description="The network to start from.")
    calibration: CalibrationSection | None = Field(
        default=None, description="The pictures that set the bandwidths; null draws scenes."
    )
    swap: Annotated[tuple[SwapSection, ...], Strict(False), Field(min_length=1)] = Field(
        description="The groups of convolutions to swap."
    )
    finetune: FinetuneSection | None = Field(
        default=None, description="How to train the upgraded network."
    )


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
    data = recipe.model_dump(by_alias=True)
    try:
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    except yaml.representer.RepresenterError as error:
        raise RecipeError(
            f"model.args: expected plain YAML data, got {type(error.args[1]).__name__}."
        ) from None


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema by which editors complete and check recipes."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "pacswap recipe",
    }


def _fields(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in type(section).model_fields}


def _layer(layer: str | LayerQuerySection) -> str | LayerQuery:
    return layer if isinstance(layer, str) else layer.to_spec()
