"""What a recipe may say of which layers change: names, patterns, properties, or what a probe finds.

Only a recipe knows `auto`; what surgery is asked for has names or properties.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import BeforeValidator, Field, Strict, Tag, WithJsonSchema

from pacswap.errors import RecipeError
from pacswap.recipes.sections import (
    LIST,
    MAPPING,
    NUMBER,
    TEXT,
    Above0,
    Pattern,
    Patterns,
    Positive,
    Section,
    Size,
    Text,
    forms,
    got,
    wrong,
)
from pacswap.surgery.spec import LayerQuery, Layers

if TYPE_CHECKING:
    from pacswap.recipes.loader import LoadedRecipe

UNRESOLVED = (
    "which layers is decided on data, and none is looked at here. `pacswap finetune` decides it on "
    "the recipe's data, and `pacswap probe` shows its ranking. To pin the choice, write the names "
    "in its place: layers: [layer3.1.conv2, …]."
)
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) ?%")


def _share(value: str) -> float:
    """A percentage as a share.

    >>> _share("5%"), _share("0.5 %")
    (0.05, 0.005)
    """
    found = _PERCENT.fullmatch(value)
    share = float(found[1]) / 100 if found else 0.0
    if not 0 < share <= 1:
        raise wrong(f"expected more than 0% and at most 100%, such as '5%', got {got(value)}.")
    return share


Share = Annotated[
    Annotated[Above0, Field(le=1), Tag(NUMBER)]
    | Annotated[
        float,
        BeforeValidator(_share),
        WithJsonSchema({"type": "string", "pattern": f"^{_PERCENT.pattern}$"}),
        Tag(TEXT),
    ],
    forms("a percentage such as '5%' or a number above 0"),
]


class LayerQuerySection(Section):
    """Layers by their properties; a property left out matches everything."""

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
        return LayerQuery(**{name: getattr(self, name) for name in LayerQuerySection.model_fields})


class AutoSection(Section):
    """The layers whose loss answers most to their blend, as a probe of the data finds them."""

    top: Positive = Field(default=3, description="How many layers, at most.")
    max_cost: Share | None = Field(
        default=None,
        description="The most that they may add together to the network's multiply-accumulates, "
        "such as 5% or 0.05; a layer that would exceed it is passed over. null sets no limit.",
    )


class ChoosingQuerySection(LayerQuerySection):
    """Layers by their properties, of which a probe may choose."""

    auto: AutoSection | None = Field(
        default=None,
        description="Of the layers that match, take those that a probe of the data ranks first; "
        "null takes all of them.",
    )


_Layer: TypeAlias = Annotated[
    Annotated[Pattern, Tag(TEXT)] | Annotated[LayerQuerySection, Tag(MAPPING)],
    forms("text or a mapping"),
]
LayersField: TypeAlias = Annotated[
    Annotated[Pattern, Tag(TEXT)]
    | Annotated[ChoosingQuerySection, Tag(MAPPING)]
    | Annotated[tuple[_Layer, ...], Strict(False), Field(min_length=1), Tag(LIST)],
    forms("text, a mapping or a list of them"),
]


def auto_of(layers: object) -> AutoSection | None:
    """What a group's `layers` leave to a probe, or None."""
    return layers.auto if isinstance(layers, ChoosingQuerySection) else None


def refuse_auto(loaded: LoadedRecipe) -> None:
    """Refuse a recipe in which a probe has yet to choose layers, where there is no data for one.

    Raises:
        RecipeError: with the place of every such group.
    """
    faults = []
    for operation, index, section in loaded.recipe.sections():
        if auto_of(section.layers) is not None:
            where = loaded.where((operation, index, "layers", "auto"))
            faults.append(f"{where}: {operation}[{index}].layers.auto: {UNRESOLVED}")
    if faults:
        head = f"{loaded.path} has {len(faults)} faults:\n" if len(faults) > 1 else ""
        raise RecipeError(head + "\n".join(faults))


def layers_spec(layers: str | LayerQuerySection | tuple[str | LayerQuerySection, ...]) -> Layers:
    """The layers as surgery takes them.

    Raises:
        RecipeError: a probe has yet to choose them.
    """
    if auto_of(layers) is not None:
        raise RecipeError(f"layers.auto: {UNRESOLVED}")
    if isinstance(layers, tuple):
        return tuple(_layer(layer) for layer in layers)
    return _layer(layers)


def _layer(layer: str | LayerQuerySection) -> str | LayerQuery:
    return layer if isinstance(layer, str) else layer.to_spec()
