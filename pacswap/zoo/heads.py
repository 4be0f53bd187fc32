"""A new head for a pretrained segmentation network, for as many classes as the user has."""

from __future__ import annotations

from torch import nn

from pacswap.errors import ModelError, quoted

# Where torchvision, timm, transformers, smp and we keep what gives the logits.
HEADS = (
    "classifier",
    "aux_classifier",
    "auxiliary_head",
    "decode_head",
    "segmentation_head",
    "head",
)

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


def renew_heads(model: nn.Module, num_classes: int) -> list[str]:
    """Replace the last convolutions of a segmentation network by random ones, in place.

    Of each head the convolution that gives the classes is replaced (torchvision's LR-ASPP has two
    of them), whatever comes before keeps its weights. A head that has so many classes already is
    replaced too: its classes are others.

    Args:
        model: a segmentation network with its head under one of `HEADS`.
        num_classes: channels of the new logits.

    Returns:
        The names of the replaced convolutions.

    Raises:
        ModelError: the network has no such head, or one that cannot give so many channels; it is
            then as it was.
    """
    found = {
        f"{head}.{name}" if name else head: conv
        for head in HEADS
        for name, conv in _last_convolutions(getattr(model, head, None), "")
    }
    if not found:
        raise ModelError(
            f"cannot give {type(model).__name__} a head of {num_classes} classes: it has no "
            f"convolution under {quoted(HEADS)}. Take model.num_classes out, and let "
            "model.args or a factory of yours make the head."
        )
    renewed = {name: _with_outputs(name, conv, num_classes) for name, conv in found.items()}
    for name, conv in renewed.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, conv)
    if "num_classes" in vars(model):
        vars(model)["num_classes"] = num_classes
    return list(found)


def _last_convolutions(module: nn.Module | None, name: str) -> list[tuple[str, nn.Module]]:
    """The convolution that gives the logits, with its name; the branches of LR-ASPP have one each.

    Children stand in the order in which they run, except that transformers' UPerNet makes its
    `classifier` first: children called so go before the last one.
    """
    if isinstance(module, _CONVOLUTIONS):
        return [(name, module)]
    children = [] if module is None else list(module.named_children())
    with_convs = [
        (child_name, child)
        for child_name, child in children
        if any(isinstance(inner, _CONVOLUTIONS) for inner in child.modules())
    ]
    named = [pair for pair in with_convs if pair[0].endswith("classifier")]
    return [
        found
        for child_name, child in named or with_convs[-1:]
        for found in _last_convolutions(child, f"{name}.{child_name}" if name else child_name)
    ]


def _with_outputs(name: str, conv: nn.Module, channels: int) -> nn.Conv2d:
    """A convolution like it, with other outputs and random weights."""
    refusal = (
        f"cannot give the network a head of {channels} classes: {name}, which gives its logits,"
    )
    way_out = "Take model.num_classes out, and let model.args or a factory of yours make the head."
    if not isinstance(conv, nn.Conv2d):
        raise ModelError(f"{refusal} is a {type(conv).__name__}, not a Conv2d. {way_out}")
    if channels % conv.groups:
        raise ModelError(
            f"{refusal} has {conv.groups} groups, which do not divide {channels}. {way_out}"
        )
    return nn.Conv2d(
        conv.in_channels,
        channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
