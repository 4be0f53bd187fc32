"""The Python door to surgery: `plan`, `swap`, `layers`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pacswap.errors import PlanError, nearest_hint
from pacswap.surgery.analyse import plan_groups
from pacswap.surgery.calibrate import calibrate
from pacswap.surgery.checks import why_not_model, why_not_network
from pacswap.surgery.example import calibration_batch, default_input
from pacswap.surgery.plan import Plan
from pacswap.surgery.request import as_groups
from pacswap.surgery.rewrite import rewrite
from pacswap.surgery.skeleton import ExampleInput, look
from pacswap.surgery.spec import (
    CRFSpec,
    FilterSpec,
    Group,
    GuidanceSpec,
    KernelSpec,
    Layers,
    Operation,
)
from pacswap.surgery.targets import KINDS, in_words, targets, why_not


def plan(
    model: nn.Module,
    layers: Layers | list[Any] | Mapping[str, Any] | None = None,
    guidance: str | list[str] | Mapping[str, Any] | GuidanceSpec | None = None,
    *,
    kernel: Mapping[str, Any] | KernelSpec | None = None,
    operation: Operation | None = None,
    filter: Mapping[str, Any] | FilterSpec | None = None,
    crf: Mapping[str, Any] | CRFSpec | None = None,
    groups: Iterable[Group | Mapping[str, Any]] | None = None,
    example_input: ExampleInput | None = None,
) -> Plan:
    """What a swap would do. Pure: the model is not touched, `print(plan)` is a table.

    Args:
        model: a network of timm, torchvision or your own, not wrapped for several devices or
            compiled.
        layers: what to change: a dotted name, a glob (`"layer4.*.conv2"`), a regex (`"re:…"`),
            a `LayerQuery` or its mapping (`{"kernel_size": 3, "last_of_stage": True}`), a callable
            `(name, module) -> bool`, or a list of these. A pattern that matches nothing is an
            error.
        guidance: what feeds the adapting kernels: a layer's name, a traced node's name, `"input"`,
            `"input+position"`, `"external"` (the model gains a keyword argument `guidance`), a list
            (concatenated), or a mapping such as `{"from": "layer1", "channels": 16}`.
        kernel: how the kernels are made, a `KernelSpec` or its mapping.
        operation: `"swap"` (convolutions; the default), `"pool"` (pooling layers), `"upsample"`
            (interpolations, by their labels, and transposed convolutions) or `"append"` (a CRF
            behind what gives logits). `pacswap.layers(model, operation=…)` lists their names.
        filter: of `"upsample"`: the filter behind an interpolation, a `FilterSpec` or its mapping.
        crf: of `"append"`: a `CRFSpec` or its mapping.
        groups: several groups of layers at once, `Group`s or mappings of these arguments' names.
        example_input: what the model takes, a tensor or a tuple of arguments; only its shape
            matters. By default an image of the size that the model names, or 224×224.

    Returns:
        A `Plan`.

    Raises:
        PlanError: with every fault of the request.

    Example:
        >>> import torchvision
        >>> net = torchvision.models.resnet18()
        >>> print(plan(net, layers="layer4.*.conv2", guidance="layer1").layers[0].what)
        Conv2d 512→512 3×3
    """
    made = as_groups(
        layers, guidance, groups, kernel=kernel, operation=operation, filter=filter, crf=crf
    )
    _refuse(model, why_not_model(model))
    return plan_groups(
        model, made, default_input(model) if example_input is None else example_input
    )


def swap(
    model: nn.Module,
    layers: Layers | list[Any] | Mapping[str, Any] | None = None,
    guidance: str | list[str] | Mapping[str, Any] | GuidanceSpec | None = None,
    *,
    kernel: Mapping[str, Any] | KernelSpec | None = None,
    operation: Operation | None = None,
    filter: Mapping[str, Any] | FilterSpec | None = None,
    crf: Mapping[str, Any] | CRFSpec | None = None,
    groups: Iterable[Group | Mapping[str, Any]] | None = None,
    example_input: ExampleInput | None = None,
    calibration: ExampleInput | None = None,
) -> nn.Module:
    """Upgrade a network: the named layers become pixel-adaptive, nothing else changes.

    The new model keeps its class, attributes, methods and `state_dict` keys. With the default
    `blend` of 0 its output is the old one's, and every added parameter can learn.

    Args:
        model: as in `plan`, like all up to `example_input`.
        layers: what to change.
        guidance: what feeds the adapting kernels.
        kernel: how the kernels are made.
        operation: what is done.
        filter: behind an interpolation.
        crf: behind logits.
        groups: several groups at once.
        example_input: what the model takes.
        calibration: images (as the model takes them) on which `bandwidth: auto` is set: the median
            off-centre factor becomes ½. By default two drawn scenes. An external guidance is not
            known at the swap; its bandwidth starts at 1.

    Returns:
        A new model; the given one is untouched.

    Raises:
        PlanError: with every fault of the request; nothing has been changed then.

    Example:
        >>> import torchvision
        >>> net = torchvision.models.resnet18()
        >>> upgraded = swap(net, layers="layer4.*.conv2", guidance="layer1")
        >>> isinstance(upgraded, torchvision.models.ResNet)
        True
    """
    _refuse(model, why_not_model(model))
    example = default_input(model) if example_input is None else example_input
    made = as_groups(
        layers, guidance, groups, kernel=kernel, operation=operation, filter=filter, crf=crf
    )
    planned = plan_groups(model, made, example)
    return carry_out(model, planned, example, calibration)


def carry_out(
    model: nn.Module, planned: Plan, example: ExampleInput, calibration: ExampleInput | None = None
) -> nn.Module:
    """Rewrite a copy of the model and calibrate what is planned as `auto`."""
    automatic = [
        kernel
        for kernel in planned.kernels
        if kernel.is_calibrated and not planned.guidances[kernel.guidance].is_external
    ]
    if not automatic or all(p.is_meta for p in model.parameters()):
        return rewrite(model, planned)
    batch = calibration_batch(example) if calibration is None else calibration
    upgraded = rewrite(model, planned)
    calibrate(upgraded, planned, batch)
    return upgraded


def _refuse(model: object, reason: str | None) -> None:
    if reason is not None:
        raise PlanError(f"cannot upgrade {type(model).__name__}: {reason}.")


@dataclass(frozen=True)
class LayerInfo:
    """Something in a model that an operation could change.

    Attributes:
        name: dotted name of a module, or the label of a call.
        what: what it is, in words.
        output_shape: (B, C, H, W) at the example input; None if it does not run in eval mode.
        refusal: why it cannot be changed, or None.
    """

    name: str
    what: str
    output_shape: tuple[int, ...] | None
    refusal: str | None


def layers(
    model: nn.Module,
    example_input: ExampleInput | None = None,
    *,
    operation: Operation = "swap",
) -> list[LayerInfo]:
    """What an operation could change in a model, in the order in which it runs.

    Args:
        model: any network.
        example_input: as in `plan`.
        operation: `"swap"` lists spatial convolutions, `"pool"` pooling layers, `"upsample"`
            interpolations and transposed convolutions, `"append"` what a CRF could come behind.

    Returns:
        One entry for each; those that cannot be changed have the reason.

    Raises:
        PlanError: the model does not run on the example input.
    """
    _refuse(model, why_not_network(model))
    if operation not in KINDS:
        hint = nearest_hint(str(operation), KINDS)
        raise PlanError(f"operation={operation!r} is unknown. {hint}")
    _, seen = look(model, default_input(model) if example_input is None else example_input)
    found = []
    for name, target in targets(operation, model, seen).items():
        shape = None if target.call is None else target.call.output_shape
        refusal = why_not(operation, target)
        # Logits come from a 1×1 convolution as a rule, and most layers give none.
        shown = refusal is None if operation == "append" else target.is_spatial
        if shown:
            found.append(LayerInfo(name, in_words(operation, target), shape, refusal))
    order = {call.name: call.order for call in reversed(seen.calls)}
    order |= {label: call.order for label, call in seen.functions.items()}
    return sorted(found, key=lambda info: order.get(info.name, len(seen.calls)))
