"""What each operation can change in a model, what it is in words, and why not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules import pooling
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pacswap.surgery.checks import why_not_conv, why_not_plain
from pacswap.surgery.skeleton import Call, Observation
from pacswap.surgery.spec import Operation

POOLS = (
    pooling._MaxPoolNd,
    pooling._AvgPoolNd,
    pooling._AdaptiveMaxPoolNd,
    pooling._AdaptiveAvgPoolNd,
    pooling._LPPoolNd,
    nn.FractionalMaxPool2d,
)


@dataclass(frozen=True)
class Kind:
    """The words for what an operation changes.

    Attributes:
        noun: one of them.
        nouns: several.
        verb: what is done to them.
    """

    noun: str
    nouns: str
    verb: str


KINDS: dict[Operation, Kind] = {
    "swap": Kind("convolution", "convolutions", "swap"),
    "pool": Kind("pooling layer", "pooling layers", "swap"),
    "upsample": Kind("upsampling step", "upsampling steps", "guide"),
    "append": Kind("layer", "layers", "append to"),
}


@dataclass(frozen=True)
class Target:
    """A module, or a call of a function, that an operation can be asked to change.

    Attributes:
        name: dotted name of the module or label of the call.
        module: None for a call of a function.
        call: its first call, if it ran.
    """

    name: str
    module: nn.Module | None
    call: Call | None = None

    @property
    def type_name(self) -> str:
        """The class's or the function's name."""
        if self.module is not None:
            return type(self.module).__name__
        return re.sub(r"_\d+$", "", self.name.rpartition(".")[2])

    @property
    def is_spatial(self) -> bool:
        """Whether it looks at more than one pixel; only convolutions may not."""
        return not isinstance(self.module, _ConvNd) or max(self.module.kernel_size) > 1

    @property
    def axes(self) -> int:
        """How many axes its window has: 1 for sequences, 2 for images, 3 for clips."""
        return len(self.module.kernel_size) if isinstance(self.module, _ConvNd) else 2

    def sizes(self, attribute: str) -> tuple[int, ...] | None:
        """`kernel_size`, `stride` or `dilation`, one number for each axis; None if it has none."""
        value = getattr(self.module, attribute, None)
        if isinstance(value, tuple | list):
            return tuple(value)
        if not isinstance(value, int):
            return None
        return (value,) * (1 if type(self.module).__name__.endswith("1d") else 2)


def targets(operation: Operation, model: nn.Module, seen: Observation | None) -> dict[str, Target]:
    """All that an operation could be asked to change, by name, each under its first one."""
    calls: dict[str, Call] = {}
    for call in seen.calls if seen is not None else ():
        if call.entry[1] == "forward":
            calls.setdefault(call.name, call)
    modules = {name: m for name, m in model.named_modules() if name}
    kept: dict[str, nn.Module]
    if operation == "swap":
        kept = {n: m for n, m in modules.items() if isinstance(m, _ConvNd)}
    elif operation == "pool":
        kept = {n: m for n, m in modules.items() if isinstance(m, POOLS)}
    elif operation == "upsample":
        kept = {n: m for n, m in modules.items() if isinstance(m, _ConvTransposeNd | nn.Upsample)}
    else:
        kept = {n: m for n, m in modules.items() if n in calls}
    found = {name: Target(name, module, calls.get(name)) for name, module in kept.items()}
    if operation in ("upsample", "append") and seen is not None:
        for label, call in seen.functions.items():
            owner = modules.get(label.rpartition(".")[0])
            if not isinstance(owner, nn.Upsample):
                found[label] = Target(label, None, call)
    return found


def is_inserted(operation: Operation, target: Target) -> bool:
    """Whether an operation puts something behind a target instead of in its place."""
    if operation == "upsample":
        return not isinstance(target.module, _ConvTransposeNd)
    return operation == "append"


def why_not(operation: Operation, target: Target) -> str | None:
    """Why an operation cannot change this, or None."""
    if operation == "swap":
        assert isinstance(target.module, _ConvNd)
        return why_not_conv(target.module)
    if operation == "pool":
        return _why_not_pool(target.module)
    if operation == "upsample":
        return _why_not_upsampled(target)
    return _why_not_logits(target)


def _why_not_pool(pool: nn.Module | None) -> str | None:
    kind = type(pool).__name__
    if isinstance(pool, pooling._AdaptiveMaxPoolNd | pooling._AdaptiveAvgPoolNd):
        return f"the window of {kind} depends on the size of the image"
    if type(pool) not in (nn.AvgPool2d, nn.MaxPool2d):
        return f"it is {with_article(kind)}; only AvgPool2d and MaxPool2d can become pixel-adaptive"
    assert isinstance(pool, nn.AvgPool2d | nn.MaxPool2d)
    if getattr(pool, "return_indices", False):
        return "it returns indices, which an average has not"
    size = pool.kernel_size
    if max(size if isinstance(size, tuple) else (size,)) == 1:
        return "its window is 1×1: a single tap has no neighbours to weigh"
    return why_not_plain(pool)


def _why_not_upsampled(target: Target) -> str | None:
    module, call = target.module, target.call
    if isinstance(module, _ConvTransposeNd):
        if type(module) is not nn.ConvTranspose2d:
            return f"it is a {type(module).__name__}; only ConvTranspose2d can be guided"
        if max(module.kernel_size) == 1:
            return "it is 1×1: a single tap has no neighbours to weigh"
        return why_not_plain(module, parameters=("weight", "bias"))
    if call is None or call.input_shape is None or call.output_shape is None:
        return None  # it never runs, which is said elsewhere
    before, after = call.input_shape, call.output_shape
    if len(after) != 4:
        return f"it returns {list(after)}; a guided upsampling needs [B, C, H, W]"
    if max(before[2:]) == 1:
        return "its input is a single pixel, which has no edges to guide"
    if after[2] < before[2] or after[3] < before[3] or after[2:] == before[2:]:
        return f"it makes {_by(before[2:])} to {_by(after[2:])}, which is no upsampling"
    return None


def _why_not_logits(target: Target) -> str | None:
    shape = None if target.call is None else target.call.output_shape
    if shape is None:
        return "it does not return one tensor" if target.call is not None else None
    if len(shape) != 4 or shape[1] < 2:
        return f"it returns {list(shape)}; a CRF needs logits [B, C, H, W] of at least two classes"
    return None


def in_words(operation: Operation, target: Target) -> str:
    """A target in a few words.

    >>> in_words("swap", Target("a", nn.Conv2d(128, 256, 3, stride=2)))
    'Conv2d 128→256 3×3 s2'
    >>> in_words("pool", Target("a", nn.MaxPool2d(3, 2, ceil_mode=True)))
    'MaxPool2d 3×3 s2 ceil'
    """
    module, call = target.module, target.call
    if isinstance(module, _ConvNd) and operation != "append":
        return conv_in_words(module)
    if isinstance(module, nn.AvgPool2d | nn.MaxPool2d) and operation != "append":
        return _pool_in_words(target)
    if operation == "pool":
        return target.type_name
    if operation == "append":
        classes = "" if call is None or call.output_shape is None else str(call.output_shape[1])
        return f"{target.type_name}, {classes} channels" if classes else target.type_name
    mode = call.words if module is None and call is not None else getattr(module, "mode", "")
    return " ".join([target.type_name, str(mode), *_factor(call)]).strip()


def with_article(noun: str) -> str:
    """A noun with its article.

    >>> with_article("upsampling step"), with_article("Conv2d")
    ('an upsampling step', 'a Conv2d')
    """
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def conv_in_words(conv: _ConvNd) -> str:
    """A convolution in a few words.

    >>> conv_in_words(nn.Conv2d(96, 96, 7, groups=96, dilation=2))
    'Conv2d 96→96 7×7 d2 depthwise'
    """
    words = [f"{type(conv).__name__} {conv.in_channels}→{conv.out_channels}"]
    words.append(_by(conv.kernel_size))
    for letter, value in (("s", conv.stride), ("d", conv.dilation)):
        if max(value) > 1:
            words.append(letter + _by(tuple(dict.fromkeys(value))))
    if conv.groups > 1:
        words.append("depthwise" if conv.groups == conv.in_channels else f"g{conv.groups}")
    return " ".join(words)


def _pool_in_words(target: Target) -> str:
    words = [target.type_name, _by(target.sizes("kernel_size") or ())]
    for letter, attribute in (("s", "stride"), ("d", "dilation")):
        value = target.sizes(attribute) or (1,)
        if max(value) > 1:
            words.append(letter + _by(tuple(dict.fromkeys(value))))
    return " ".join(words + (["ceil"] if getattr(target.module, "ceil_mode", False) else []))


def _factor(call: Call | None) -> list[str]:
    """By how much a call enlarges, if it ran."""
    if call is None or call.input_shape is None or call.output_shape is None:
        return []
    before, after = call.input_shape[2:], call.output_shape[2:]
    channels = f"{call.output_shape[1]} channels"
    factors = {b / a for a, b in zip(before, after, strict=True)}
    if len(factors) == 1 and (factor := factors.pop()).is_integer():
        return [f"×{factor:.0f},", channels]
    return [f"{_by(before)} → {_by(after)},", channels]


def _by(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))
