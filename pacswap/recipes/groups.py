"""What a recipe may say of the layers that change. The defaults are those of `surgery.spec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, Strict, Tag
from pydantic_core import CoreSchema, core_schema

from pacswap.recipes.layers import LayersField, layers_spec
from pacswap.recipes.sections import (
    LIST,
    MAPPING,
    NUMBER,
    TEXT,
    Above0,
    Breach,
    Patterns,
    Positive,
    Section,
    forms,
    got,
    wrong,
)
from pacswap.surgery.spec import (
    Compatibility,
    CRFSpec,
    Distance,
    FilterSpec,
    FilterWeights,
    Form,
    Group,
    GuidanceSpec,
    KernelSpec,
    Normalize,
    Operation,
    PairwiseSpec,
    Resize,
    Smoothing,
)


def _check_odd(value: int) -> int:
    if value % 2 == 0:
        raise wrong(f"expected an odd number, got {value}.")
    return value


Odd = Annotated[Positive, AfterValidator(_check_odd)]
Side = Annotated[int, Field(ge=3), AfterValidator(_check_odd)]


def _check_bandwidth(value: Any) -> Any:
    if value != "auto":
        raise wrong(f"expected a number above 0 or 'auto', got {got(value)}.")
    return value


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


_WITHOUT_ALPHA = ("gaussian", "laplacian")


class KernelSection(Section):
    """How the adapting kernels are made."""

    form: Form = Field(
        default=KernelSpec.form,
        description="The function of the distance; constant is a control that adapts to nothing.",
    )
    normalize: Normalize | None = Field(
        default=KernelSpec.normalize,
        description="none, sum (the paper's) or mean (keeps the scale of the pretrained weights); "
        "null is none for convolutions and CRFs, sum for pooling and behind an interpolation, mean "
        "for transposed convolutions.",
    )
    blend: float = Field(
        default=KernelSpec.blend,
        description="Where the learnable blend starts: 0 is what was there, 1 the paper's.",
    )
    bandwidth: Annotated[
        Annotated[Above0, Tag(NUMBER)]
        | Annotated[Literal["auto"], BeforeValidator(_check_bandwidth), Tag(TEXT)],
        forms("a number above 0 or 'auto'"),
    ] = Field(
        default=KernelSpec.bandwidth,
        description="The kernel's width; auto makes the median kernel of the calibration one half "
        "(in the inverse form it is the median distance).",
    )
    standardize: bool = Field(
        default=KernelSpec.standardize,
        description="Bring each guidance channel of each image to mean 0 and variance 1.",
    )
    distance: Distance = Field(
        default=KernelSpec.distance,
        description="Whether differences are averaged or summed over the channels.",
    )
    alpha: float = Field(
        default=KernelSpec.alpha, description="Where alpha of the inverse form starts."
    )
    lambd: float = Field(
        default=KernelSpec.lambd, description="Where lambda of the inverse form starts."
    )
    asymmetric: bool = Field(
        default=KernelSpec.asymmetric,
        description="In the inverse form, only what exceeds the centre counts.",
    )
    smoothing: Smoothing = Field(
        default=KernelSpec.smoothing, description="How the centre's features are smoothed."
    )
    smoothing_size: Odd = Field(
        default=KernelSpec.smoothing_size, description="Side of the box or of the learned filter."
    )
    channel_wise: bool = Field(
        default=KernelSpec.channel_wise,
        description="A kernel for each channel; the guidance has as many as the layer.",
    )
    learnable: bool = Field(
        default=KernelSpec.learnable,
        description="Whether bandwidth, alpha and lambda learn.",
    )
    recompute: bool = Field(
        default=KernelSpec.recompute,
        description="Compute distances and products again in the backward pass instead of keeping "
        "them: less memory, more time.",
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Options that belong to others."""
        if raw.get("asymmetric") is True and raw.get("form", KernelSpec.form) != "inverse":
            form = raw.get("form", KernelSpec.form)
            yield Breach(("asymmetric",), f"belongs to form 'inverse', got {got(form)}.")
        form = raw.get("form", KernelSpec.form)
        for key in ("alpha", "lambd"):
            default = getattr(KernelSpec, key)
            if raw.get(key, default) != default and form in _WITHOUT_ALPHA:
                yield Breach((key,), f"belongs to form 'inverse', got {got(form)}.")
        if raw.get("smoothing", "none") == "none" and raw.get("smoothing_size", 3) != 3:
            text = "there is no smoothing. Set smoothing, or leave it out."
            yield Breach(("smoothing_size",), text)
        if raw.get("smoothing") == "gaussian" and raw.get("smoothing_size", 3) != 3:
            size = raw["smoothing_size"]
            yield Breach(("smoothing_size",), f"the gaussian has size 3, got {got(size)}.")

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


class FilterSection(Section):
    """The filter behind an interpolation that makes it a guided upsampling."""

    kernel_size: Side = Field(
        default=FilterSpec.kernel_size, description="Side of the window, odd, at least 3."
    )
    dilation: Positive = Field(default=FilterSpec.dilation, description="Pixels between taps.")
    weights: FilterWeights = Field(
        default=FilterSpec.weights,
        description="filter, one spatial filter for all channels, or full, a matrix of classes at "
        "every tap.",
    )
    steps: Positive = Field(
        default=FilterSpec.steps,
        description="How often it is applied, each time with weights of its own.",
    )
    blur: Positive = Field(
        default=FilterSpec.blur,
        description="The change is computed at a resolution so many times lower.",
    )

    def to_spec(self) -> FilterSpec:
        """The filter as surgery takes it."""
        return FilterSpec(**_fields(self))


class PairwiseSection(Section):
    """A pairwise term of a CRF."""

    kernel_size: Side = Field(
        default=PairwiseSpec.kernel_size, description="Side of the window, odd, at least 3."
    )
    dilation: Positive = Field(default=PairwiseSpec.dilation, description="Pixels between taps.")
    blur: Positive = Field(
        default=PairwiseSpec.blur,
        description="The message passes at a resolution so many times lower.",
    )
    compatibility: Compatibility = Field(
        default=PairwiseSpec.compatibility,
        description="4d (a matrix of classes at every tap), 2d (a spatial filter and one matrix) "
        "or potts (equal labels attract).",
    )
    spatial_filter: bool = Field(
        default=PairwiseSpec.spatial_filter, description="Whether a spatial filter is learned."
    )
    weight: float = Field(default=PairwiseSpec.weight, description="How strong the message starts.")
    guided: bool = Field(
        default=PairwiseSpec.guided,
        description="Whether the guidance decides; false leaves smoothness alone.",
    )
    position: Above0 | None = Field(
        default=PairwiseSpec.position,
        description="Where the scale of the distance between pixels starts, in pixels; null for "
        "none.",
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """A matrix at every tap is a spatial filter."""
        if raw.get("compatibility") == "4d" and raw.get("spatial_filter") is False:
            text = "'4d' has a matrix at every tap, which is its filter. Leave it at true."
            yield Breach(("spatial_filter",), text)

    def to_spec(self) -> PairwiseSpec:
        """The term as surgery takes it."""
        return PairwiseSpec(**_fields(self))


class CRFSection(Section):
    """A PAC-CRF behind a node that gives logits."""

    kernels: Annotated[tuple[PairwiseSection, ...], Strict(False), Field(min_length=1)] = Field(
        default=(PairwiseSection(),), description="Its pairwise terms."
    )
    steps: Positive = Field(
        default=CRFSpec.steps, description="How many mean-field steps there are."
    )
    shared_steps: bool = Field(
        default=CRFSpec.shared_steps, description="Whether all steps have the same weights."
    )
    unary_weight: float = Field(
        default=CRFSpec.unary_weight, description="Where the weight of the logits starts."
    )

    @classmethod
    def breaches(cls, raw: Mapping[str, Any]) -> Iterator[Breach]:
        """Some term has to look at the guidance."""
        kernels = raw.get("kernels")
        if not isinstance(kernels, list | tuple) or not kernels:
            return
        if all(isinstance(k, Mapping) and k.get("guided") is False for k in kernels):
            text = "no kernel looks at the guidance. Set guided: true on one of them."
            yield Breach(("kernels",), text)

    def to_spec(self) -> CRFSpec:
        """The CRF as surgery takes it."""
        kernels = tuple(kernel.to_spec() for kernel in self.kernels)
        return CRFSpec(kernels, self.steps, self.shared_steps, self.unary_weight)


class GroupSection(Section):
    """Layers that get the same treatment; what all four operations have in common."""

    layers: LayersField = Field(
        description="Which layers: names, globs, re: patterns or their properties, or auto, by "
        "which a probe of the data chooses them."
    )
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

    def to_group(self, operation: Operation) -> Group:
        """The group as surgery takes it."""
        layers, guidance = layers_spec(self.layers), self.guidance.to_spec()
        kernel = self.kernel.to_spec()
        return Group(layers, guidance, kernel, self.override, operation, **self.to_options())

    def to_options(self) -> dict[str, Any]:
        """What only this operation has."""
        return {}


class SwapSection(GroupSection):
    """Convolutions that become pixel-adaptive."""


class PoolSection(GroupSection):
    """Pooling layers that become pixel-adaptive."""


class UpsampleSection(GroupSection):
    """Interpolations, by their labels, and transposed convolutions that become guided."""

    filter: FilterSection | None = Field(
        default=None, description="The filter behind an interpolation; null has all defaults."
    )

    def to_options(self) -> dict[str, Any]:
        """The filter."""
        return {"filter": None if self.filter is None else self.filter.to_spec()}


class AppendSection(GroupSection):
    """A CRF behind layers that give logits."""

    crf: CRFSection = Field(default_factory=CRFSection, description="The CRF to append.")

    def to_options(self) -> dict[str, Any]:
        """The CRF."""
        return {"crf": self.crf.to_spec()}


def _fields(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in type(section).model_fields}
