"""What there is to probe in a network: the layers that are named, and features to guide them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pacswap.surgery import Group
from pacswap.surgery.analyse import list_in_python
from pacswap.surgery.select import select
from pacswap.surgery.skeleton import Call, Observation, look
from pacswap.surgery.targets import Target, targets


def named(model: nn.Module, group: Group, example: Tensor) -> tuple[list[Target], list[str]]:
    """(targets, faults): what a group names, whether it can be changed or not.

    Args:
        model: any network.
        group: its `layers` and its operation count.
        example: images as the model takes them; only the shape matters.
    """
    _, seen = look(model, example)
    found = targets(group.operation, model, seen)
    names, faults = select(group, model, found, seen, list_in_python(group.operation))
    return [found[name] for name in names], faults


def stage_ends(seen: Observation, size: tuple[int, int]) -> list[str]:
    """The last module at each resolution before a network goes coarser, earliest first.

    Of the coarsest resolution it is the module that reaches it, so that in a dilated network the
    layers behind have that one too. Modules that run twice are left out: their name says not which.

    Args:
        seen: a forward pass.
        size: (H, W) of the image.

    Returns:
        Dotted names.
    """
    units = _units(seen, size)
    strides = [_stride(call, size) for call in units]
    coarsest = max((stride for stride in strides if stride is not None), default=1)
    names: dict[int, str] = {}
    reached = 1
    for call, stride in zip(units, strides, strict=True):
        if stride is None or stride < reached:
            continue  # a decoder's, or a branch's; the way down is what counts
        if stride == reached == coarsest and stride in names:
            break
        reached = stride
        if len(seen.of(call.name)) == 1:
            names[stride] = call.name
    return list(names.values())


def _units(seen: Observation, size: tuple[int, int]) -> list[Call]:
    """The calls that a network is a sequence of: its stages, whose insides keep one resolution."""
    inside: dict[int, list[Call]] = {}
    for call in seen.calls:
        if len(call.stack) > 1:
            inside.setdefault(call.stack[-2][0], []).append(call)

    def strides_in(call: Call) -> set[int]:
        found = {_stride(call, size)}
        for part in inside.get(call.order, ()):
            found |= strides_in(part)
        return {stride for stride in found if stride is not None}

    def opened(call: Call) -> list[Call]:
        parts = inside.get(call.order, [])
        arrives = _stride_of(call.input_shape, size)
        is_unit = _stride(call, size) is not None and len(strides_in(call) - {arrives}) < 2
        if not parts or (is_unit and call.name):
            return [call]
        return [unit for part in parts for unit in opened(part)]

    roots = [call for call in seen.calls if len(call.stack) == 1]
    return [unit for root in roots for unit in opened(root) if unit.name]


def _stride(call: Call, size: tuple[int, int]) -> int | None:
    return _stride_of(call.output_shape, size)


def _stride_of(shape: Sequence[int] | None, size: tuple[int, int]) -> int | None:
    """By how much smaller than the image a feature map is; None for what is no map of it."""
    if shape is None or len(shape) != 4 or max(shape[2:]) < 2:
        return None
    stride = round(max(size) / max(shape[2:]))
    # Channels in the last place make a shape that fits the image on one side only.
    fits = all(abs(s / max(stride, 1) - n) < 1.5 for s, n in zip(size, shape[2:], strict=True))
    return stride if stride >= 1 and fits else None
