"""What rewritten graphs call: whether all is as the trace took it, and kernels that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pacswap.errors import GuidanceError
from pacswap.nn import resize_guidance, size_of
from pacswap.nn.guidance import Like, same_size
from pacswap.surgery.spec import Resize


def only_default(value: Any, default: Any, name: str) -> None:
    """Refuse another value than the default that the graph was traced with.

    Raises:
        GuidanceError: `value` is not `default`.
    """
    if value is not default and (isinstance(value, Tensor) or value != default):
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise GuidanceError(
            f"the upgraded network runs with {name}={default!r} only, got {name}={shown}: its "
            "graph was traced with that default. Leave the argument out, or pacswap.revert the "
            "model first."
        )


def required_guidance(guidance: Any, enabled: bool) -> Any:
    """Refuse a call without the external guidance, unless `pacswap.disabled` has no use for one.

    Raises:
        GuidanceError: it is None, or no tensor of floating-point numbers.
    """
    if guidance is None and enabled:
        raise GuidanceError(
            "this network was upgraded with an external guidance and was called without one. "
            "Call it as model(input, guidance=features)."
        )
    if enabled and not (isinstance(guidance, Tensor) and guidance.is_floating_point()):
        is_tensor = isinstance(guidance, Tensor)
        what = f"a tensor of {guidance.dtype}" if is_tensor else f"a {type(guidance).__name__}"
        raise GuidanceError(
            "the external guidance must be a tensor of floating-point numbers [B, D, H, W], got "
            f"{what}."
        )
    return guidance


def not_checkpointed(flags: tuple[bool, ...]) -> None:
    """Refuse gradient checkpointing, which a graph would drop in silence.

    Raises:
        GuidanceError: a flag is set.
    """
    if any(flags):
        raise GuidanceError(
            "gradient checkpointing was turned on after the swap, and the rewritten graph does not "
            "recompute. Call set_grad_checkpointing(False)."
        )


def same_mode(training: bool, modes: dict[str, bool]) -> None:
    """Refuse a part of the network in another mode than the whole, for which there is no graph.

    Raises:
        GuidanceError: the mode of a part differs.
    """
    for name, mode in modes.items():
        if mode != training:
            raise GuidanceError(
                f"'{name}' is in {_mode(mode)} mode inside a network in {_mode(training)} mode. "
                "This network runs other operations in train mode than in eval mode, and has one "
                "graph for each. Set both to the same mode; normalisation layers may keep theirs."
            )


def target_size(
    input: Tensor, output_size: Callable[[int, int], tuple[int, int]]
) -> tuple[int, int]:
    """(H_out, W_out) of a transposed convolution: the resolution of its guidance.

    Args:
        input: [B, C, H, W].
        output_size: the layer's method.
    """
    return output_size(input.shape[-2], input.shape[-1])


def blurred_size(like: Like, blur: int) -> tuple[int, int]:
    """(⌈H/blur⌉, ⌈W/blur⌉): the resolution of a filter that works on a smaller image.

    Args:
        like: [B, C, H, W] or (H, W).
        blur: at least 1.
    """
    height, width = size_of(like)
    return (height + blur - 1) // blur, (width + blur - 1) // blur


def fitting_features(
    resized: Tensor | None, features: Tensor | None, like: Like, resize: Resize
) -> Tensor | None:
    """The features as they were resized for another layer, or anew for one of another resolution.

    Layers share features and kernels because their resolutions agree at the example input; at other
    image sizes two ways of rounding may part them.

    Args:
        resized: [B, D, H, W], or None where guidance is disabled or what it was made for rests.
        features: the guidance before it was resized; None where nothing needs it.
        like: what has the layer's resolution, [B, C, H', W'] or (H', W').
        resize: how features are resized.
    """
    if features is None:
        return None
    if resized is not None and same_size(size_of(resized), size_of(like)):
        return resized
    return resize_guidance(features, like, resize)


def needed(features: Any, layers: tuple[nn.Module, ...]) -> Any:
    """The features, or None if all layers rest that they are for: nothing is made of None.

    Args:
        features: [B, D, H, W], or None.
        layers: those layers; what a user has wrapped one in counts as one that does not rest.
    """
    rests = [getattr(layer, "is_resting", False) for layer in layers]
    return None if all(rests) else features


def fitting_kernel(
    kernel: Tensor | None,
    resized: Tensor | None,
    features: Tensor,
    like: Like,
    resize: Resize,
    make: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """The kernel as it was made for another layer, or anew for one of another resolution.

    Args:
        kernel: K, [B, 1, KH*KW, H_out, W_out], or None where guidance is disabled.
        resized: the features that it was made from; as in `fitting_features`, like the next three.
        features: the guidance.
        like: what has the layer's resolution.
        resize: how features are resized.
        make: from resized features to a kernel.
    """
    if resized is None or same_size(size_of(resized), size_of(like)):
        return kernel
    return make(resize_guidance(features, like, resize))


def _mode(training: bool) -> str:
    return "train" if training else "eval"
