"""Labelled pictures: which there are, what their classes are, and the pixels of any one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from pacswap.recipes import DataSection
from pacswap.train.data.faults import few, many, refuse
from pacswap.train.data.formats import read_format
from pacswap.train.data.labels import Colour
from pacswap.train.data.pictures import Reader, Sample

__all__ = ["Sample", "Split", "open_data", "shared_pictures"]


@dataclass(frozen=True, eq=False)
class Split:
    """The pictures to learn from, or those to measure on.

    Attributes:
        name: `train` or `val`.
        samples: in the order of the split's list, or by name.
        classes: their names; a mask's numbers are indices into it, or `ignore_index`.
        ignore_index: the label of pixels that do not count.
        palette: 256 colours, red, green and blue in 0..255, to draw masks with: the data's own
            where it has some.
        reader: what opens a sample.
        resize: height and width that pictures and masks are brought to; None leaves them.
        root: the data's folder; None for drawn scenes.
    """

    name: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    ignore_index: int
    palette: tuple[Colour, ...]
    reader: Reader
    resize: tuple[int, int] | None = None
    root: Path | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """One picture and its labels.

        Args:
            index: 0 to `len(split) - 1`.

        Returns:
            The picture [3, H, W], uint8 RGB, and the mask [H, W], int64: class indices or
            `ignore_index`.

        Raises:
            DataError: a file of the sample is damaged or mislabelled, or the two differ in size.
        """
        picture, mask = self.load(index)
        return picture, mask.long()

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """As `read`, the mask in as few bytes as its numbers need."""
        pixels, labels = self.reader.read(self.samples[index])
        # Copied, because what Pillow and the memory of drawn scenes give must not be written to,
        # and by numpy, which turns bytes around forty times as fast as torch.
        picture = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
        mask = torch.from_numpy(labels.copy())
        return picture_and_mask_at(picture, mask, self.resize)


def picture_and_mask_at(
    picture: Tensor, mask: Tensor, size: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Bring a picture [3, H, W] and its mask [H, W] to one size, so that they stay aligned.

    The picture is averaged (bilinear, antialiased). The mask takes the label at the centre of each
    new pixel: torch's plain "nearest" takes it from half a pixel up and left, and edges would move.
    """
    if size is None or tuple(picture.shape[-2:]) == tuple(size):
        return picture, mask
    picture = transform.resize_image(picture, list(size), antialias=True)
    nearest = InterpolationMode.NEAREST_EXACT
    mask = transform.resize_image(mask[None], list(size), interpolation=nearest)[0]
    return picture, mask


def open_data(section: DataSection, folder: Path) -> tuple[Split, Split]:
    """Find the labelled pictures that a recipe names. Files are listed, not opened: see `scan`.

    Args:
        section: the recipe's `finetune.data`.
        folder: where a relative `root` starts: the recipe's folder.

    Returns:
        The pictures to learn from, and those to measure on.

    Raises:
        DataError: something is missing, doubled or contradictory; the message lists all of it.

    Example:
        >>> section = DataSection(format="scenes", count=(4, 2), resize=(48, 64))
        >>> train, val = open_data(section, Path())
        >>> len(train), len(val), train.classes[:2]
        (4, 2, ('sky', 'ground'))
    """
    root = None if section.root is None else folder / Path(section.root).expanduser()
    faults: list[str] = []
    found = read_format(section, root, folder, faults)
    if faults or found is None:
        refuse(f"finetune.data of {root or 'scenes'}", faults)
    train, val = (
        Split(
            name,
            samples,
            found.classes,
            section.ignore_index,
            found.palette,
            found.reader,
            section.resize,
            root,
        )
        for name, samples in (("train", found.train), ("val", found.val))
    )
    return train, val


def shared_pictures(train: Split, val: Split) -> str | None:
    """A sentence to warn by where pictures that are learnt from are also measured on, else None.

    A link is the picture that it leads to.

    Example:
        >>> train, val = open_data(DataSection(format="scenes", count=(4, 2)), Path())
        >>> shared_pictures(train, val) is None
        True
        >>> shared_pictures(val, val)[:47]
        '2 pictures are both learnt from and measured on'
    """
    seen = {_identity(sample) for sample in train.samples}
    shared = [sample.name for sample in val.samples if _identity(sample) in seen]
    if not shared:
        return None
    return (
        f"{many(len(shared), 'picture is', 'pictures are')} both learnt from and measured on: "
        f"{few(shared)}. The measure then says little about new pictures."
    )


def _identity(sample: Sample) -> str | int:
    """The same for the same picture: its file, or the seed that it is drawn by."""
    # Not by `Path.resolve`, which fails at a link in a circle: that is for `scan` to say.
    return sample.number if sample.image is None else os.path.realpath(sample.image)
