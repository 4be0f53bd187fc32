"""What a model takes: an example input to look at it with, and drawn images to calibrate it on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from pacswap import scenes
from pacswap.errors import PlanError
from pacswap.surgery.skeleton import ExampleInput, observe, skeleton

_LEAST = 16  # pixels that a drawn scene needs


def default_input(model: nn.Module) -> ExampleInput:
    """What a model takes, on the meta device: one image as a rule.

    Its size is the one that the model names, or 224×224, or 299×299 for networks that say nothing
    and do not train at 224×224 (Inception's auxiliary head). A network whose first convolution is
    three-dimensional gets a clip of 16 frames; torchvision's detectors get a list of one image, its
    optical flow networks two images.
    """
    origin = type(model).__module__
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype

    def image(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    if origin.startswith("torchvision.models.detection."):
        return ([image(3, 320, 320)],)
    if origin.startswith("torchvision.models.optical_flow."):
        return (image(1, 3, 128, 128), image(1, 3, 128, 128))
    shapes = list(_shapes(model))
    if len(shapes) > 1:
        bones = skeleton(model).train()
        for shape in shapes:
            with suppress(PlanError):
                observe(bones, image(1, *shape).expand(2, *shape))  # BatchNorm refuses a single one
                return image(1, *shape)
    return image(1, *shapes[0])


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """What one input of a network may be like, the likeliest first; a single one is sure."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    size = config.get("input_size") if isinstance(config, Mapping) else None
    first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    channels = 3 if first is None else first.in_channels
    if size is not None:
        # in_chans=1 changes the first convolution and not what timm's configuration says; a stem
        # that folds space into channels has more than the image.
        yield (min(channels, size[0]) if first is not None else size[0], *size[1:])
        if channels > size[0]:
            yield (channels, *size[1:])
    elif isinstance(first, nn.Conv3d):
        yield from ((channels, 16, side, side) for side in (112, 224))
    elif isinstance(first, nn.Conv1d):
        yield (channels, 1024)
    else:
        yield from ((channels, side, side) for side in (224, 299))


def of_size(example: ExampleInput, size: tuple[int, ...]) -> ExampleInput:
    """An example whose images have another size.

    Args:
        example: a tensor or a tuple of arguments.
        size: (C, H, W), or (C, T, H, W) of a clip.
    """

    def sized(image: Tensor) -> Tensor:
        if not is_image(image):
            return image
        whole = size if image.dim() < 5 or len(size) == 4 else (size[0], image.shape[2], *size[1:])
        return image.new_empty(*image.shape[: image.dim() - len(whole)], *whole)

    return pytree.tree_map_only(Tensor, sized, example)


def is_image(value: Any) -> bool:
    """Whether an argument may be an image, [C, H, W] or [B, C, H, W], or a clip [B, C, T, H, W]."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() in (3, 4, 5)


def calibration_batch(example_input: ExampleInput) -> ExampleInput:
    """Drawn scenes, normalised like photographs, in the place of an example's images.

    A batch of images becomes two scenes; a clip moves over a scene by a pixel a frame.

    Raises:
        PlanError: the example has no images, or ones too small to draw in.
    """
    images = [leaf for leaf in pytree.tree_leaves(example_input) if is_image(leaf)]
    small = [image for image in images if min(image.shape[-2:]) < _LEAST]
    if small:
        height, width = small[0].shape[-2:]
        raise PlanError(
            f"bandwidth 'auto' is set on images of at least {_LEAST}×{_LEAST}, and the example "
            f"input is {height}×{width}. Use a larger one (model.input_size in a recipe), or give "
            "the bandwidth as a number."
        )
    if not images:
        raise PlanError(
            "bandwidth 'auto' needs images to calibrate on, and this model's input has none. Pass "
            "calibration=… (what the model takes), or a number as the bandwidth."
        )
    single = isinstance(example_input, Tensor)
    if single or (isinstance(example_input, tuple) and len(example_input) == 1):
        image = images[0]
        if len(images) == 1 and image.dim() == 4:
            return _drawn(image.expand(2, *image.shape[1:]) if len(image) == 1 else image[:2])
    return pytree.tree_map_only(Tensor, _filled, example_input)


def _filled(value: Tensor) -> Tensor:
    if is_image(value):
        return _drawn(value)
    return torch.zeros_like(value, device="cpu") if value.is_meta else value


def _drawn(image: Tensor) -> Tensor:
    """Scenes of an image's shape, [.., C, H, W] or [.., C, T, H, W], on the CPU."""
    batch = 1 if image.dim() == 3 else image.shape[0]
    height, width = image.shape[-2:]
    made, _ = scenes.draw_batch(list(range(batch)), (height, width))
    made = scenes.normalize(made)
    channels = image.shape[-3 if image.dim() < 5 else 1]
    if channels != 3:
        made = made.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if image.dim() == 5:
        made = torch.stack([made.roll(t, -1) for t in range(image.shape[2])], 2)
    return made[0] if image.dim() == 3 else made
