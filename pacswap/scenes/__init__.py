"""Street scenes drawn from a seed: real enough to segment, with nothing to download.

A scene is a small world in metres before a pinhole camera: a road, houses, trees, vehicles and
poles, lit and hazed, drawn from far to near on a finer grid and averaged down. The colours of the
classes overlap, the outlines are exact, and many structures are one or two pixels wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.scenes.street import Street, draw_ground, draw_sky
from pacswap.scenes.things import settle

__all__ = ["CLASSES", "MEAN", "STD", "draw_batch", "draw_scene", "normalize"]

CLASSES: tuple[str, ...] = ("sky", "ground", "building", "tree", "vehicle", "pole")
MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)
STD: tuple[float, float, float] = (0.229, 0.224, 0.225)

_FINE = 3  # samples per pixel and direction
_SMALLEST = 16


def draw_scene(seed: int, size: tuple[int, int] = (96, 128)) -> tuple[Tensor, Tensor]:
    """Draw one street scene and its classes.

    The same seed gives the same scene whatever was drawn before; the global random state is neither
    read nor moved. Another size of the same aspect ratio shows the same scene, finer or coarser.

    Args:
        seed: any whole number that `torch.Generator.manual_seed` takes.
        size: height and width in pixels, each at least 16.

    Returns:
        The image [3, H, W], float32 RGB in 0..1, and the mask [H, W], int64 indices into `CLASSES`;
        a pixel's class is the one that covers most of it.

    Raises:
        ShapeError: `size` is not two whole numbers of at least 16.

    Example:
        >>> image, mask = draw_scene(0, (48, 64))
        >>> image.shape, mask.shape
        (torch.Size([3, 48, 64]), torch.Size([48, 64]))
    """
    _check_size(size)
    street = Street(seed, size[0] * _FINE, size[1] * _FINE)
    things = settle(street)
    draw_sky(street)
    draw_ground(street, things)
    for thing in things:
        thing.draw(street)
    return _develop(street)


def draw_batch(seeds: Sequence[int], size: tuple[int, int] = (96, 128)) -> tuple[Tensor, Tensor]:
    """Draw several scenes, each the one that `draw_scene` draws from its seed.

    Args:
        seeds: one whole number per scene; at least one.
        size: height and width in pixels, each at least 16.

    Returns:
        Images [B, 3, H, W], float32 RGB in 0..1, and masks [B, H, W], int64 indices into `CLASSES`.

    Raises:
        ShapeError: `size` is not two whole numbers of at least 16, or `seeds` is empty.
    """
    _check_size(size)
    if len(seeds) == 0:
        raise ShapeError("seeds is empty: a batch needs at least one scene. Try seeds=range(4).")
    images, masks = zip(*(draw_scene(seed, size) for seed in seeds), strict=True)
    return torch.stack(images), torch.stack(masks)


def normalize(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its deviation, as torchvision's weights expect.

    Args:
        images: [B, 3, H, W] or [3, H, W], RGB in 0..1.

    Returns:
        The shape, dtype and device of `images`; dimensionless, about -2..3.
    """
    mean = torch.tensor(MEAN, dtype=images.dtype, device=images.device)[:, None, None]
    std = torch.tensor(STD, dtype=images.dtype, device=images.device)[:, None, None]
    return (images - mean) / std


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or not all(isinstance(side, int) and side >= _SMALLEST for side in size):
        raise ShapeError(
            f"size={size!r}: a scene needs (height, width), two whole numbers of pixels, each at "
            f"least {_SMALLEST}. Try size=(96, 128)."
        )


def _develop(street: Street) -> tuple[Tensor, Tensor]:
    """Average the fine grid down, as a lens and a sensor would: falling off, noisy, clipped."""
    image = F.avg_pool2d(street.colours.clamp(0, 1)[None], _FINE)[0]
    votes = torch.stack([street.labels == index for index in range(len(CLASSES))]).float()
    mask = F.avg_pool2d(votes[None], _FINE)[0].argmax(0)
    y, x = street.y[_FINE // 2 :: _FINE] - 0.5, street.x[:, _FINE // 2 :: _FINE] - street.width / 2
    corner = 0.25 + street.width**2 / 4
    image = image * (1 - street.between(0, 0.25) * (x**2 + y**2) / corner)
    image = image ** street.between(0.85, 1.2)
    strength = street.between(0.005, 0.025)
    grain = torch.empty_like(image).normal_(generator=street.generator)
    return (image + strength * grain).clamp(0, 1), mask
