"""Random resize, crop, flip and colours of a picture, and of its mask alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform

from pacswap.recipes import TransformSection
from pacswap.train.data.pictures import one_thread
from pacswap.train.data.split import picture_and_mask_at


class Vary:
    """What a recipe's `transforms` do to a picture, the same for the same dice.

    Scale, crop, flip, colours, and what the crop lacks: in this order, so that colours are varied
    on few pixels and the border stays the mean colour, which normalisation makes 0.

    Args:
        section: the recipe's `finetune.data.transforms`.
        mean: of each channel, 0..1: the colour around pictures smaller than the crop.
        ignore_index: the label there.
    """

    def __init__(self, section: TransformSection, mean: Sequence[float], ignore_index: int) -> None:
        self.section, self.ignore_index = section, ignore_index
        self.border = [round(255 * level) for level in mean]
        strength = section.color
        self.color = v2.ColorJitter(strength, strength, strength) if strength else None

    def __call__(self, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """One variation.

        Args:
            image: [3, H, W], uint8.
            mask: [H, W], whole numbers.
            seed: the dice; the global random state is neither read nor moved.

        Returns:
            Both in `section.crop`, or in the scaled size where there is none.
        """
        section = self.section
        # One thread: the last bits of a mean over a picture depend on their number, and on tensors
        # this small they only wait for each other.
        with _dice(seed), one_thread():
            low, high = section.scale
            factor = low + (high - low) * torch.rand(()).item()
            size = [max(1, round(side * factor)) for side in image.shape[-2:]]
            image, mask = picture_and_mask_at(image, mask, (size[0], size[1]))
            pair = (tv_tensors.Image(image), tv_tensors.Mask(mask))
            if section.crop is not None:
                window = [min(a, b) for a, b in zip(section.crop, size, strict=True)]
                pair = v2.RandomCrop(window)(*pair)
            if section.flip:
                pair = v2.RandomHorizontalFlip(section.flip)(*pair)
            if self.color is not None:
                pair = (self.color(pair[0]), pair[1])
            if section.crop is not None:
                pair = self._filled(*pair, section.crop)
        return pair[0].as_subclass(Tensor), pair[1].as_subclass(Tensor)

    def _filled(self, image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Put what is smaller than `size` at a random place of it."""
        lacking = [side - there for side, there in zip(size, image.shape[-2:], strict=True)]
        if not any(lacking):
            return image, mask
        top, left = (int(torch.randint(side + 1, ())) for side in lacking)
        around = [left, top, lacking[1] - left, lacking[0] - top]
        image = transform.pad(image, around, fill=self.border)
        return image, transform.pad(mask, around, fill=self.ignore_index)


@contextmanager
def _dice(seed: int) -> Iterator[None]:
    """Let torch's global dice start at `seed`, and go on afterwards as if nothing had been."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
