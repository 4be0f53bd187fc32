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


def renew_heads(model: nn.Module, num_classes: int) -> list[str]:
    """Replace the last convolutions of a segmentation network by random ones, in place.

    All convolutions of a head that give the classes are replaced (torchvision's LR-ASPP has two of
    them), whatever comes before keeps its weights. A head that has so many classes already is
    replaced too: its classes are others.

    Args:
        model: a segmentation network with its head under one of `HEADS`.
        num_classes: channels of the new logits.

    Returns:
        The names of the replaced convolutions.

    Raises:
        ModelError: the network has no such head.
    """
    found = {
        f"{head}.{name}" if name else head: conv
        for head in HEADS
        for name, conv in _last_convolutions(getattr(model, head, None))
    }
    if not found:
        raise ModelError(
            f"cannot give {type(model).__name__} a head of {num_classes} classes: it has no "
            f"convolution under {quoted(HEADS)}. Take model.num_classes out, and let "
            "model.args or a factory of yours make the head."
        )
    for name, conv in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _with_outputs(conv, num_classes))
    if "num_classes" in vars(model):
        vars(model)["num_classes"] = num_classes
    return list(found)


def _last_convolutions(head: nn.Module | None) -> list[tuple[str, nn.Conv2d]]:
    """The last convolution of a head, and those before that give as many channels."""
    modules = [] if head is None else list(head.named_modules())
    convs = [(name, module) for name, module in modules if isinstance(module, nn.Conv2d)]
    classes = convs[-1][1].out_channels if convs else 0
    return [(name, conv) for name, conv in convs if conv.out_channels == classes]


def _with_outputs(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution like it, with other outputs and random weights."""
    return nn.Conv2d(
        conv.in_channels,
        channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
