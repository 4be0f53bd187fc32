"""Small folders of labelled pictures, drawn by pacswap.scenes, for whatever learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from pacswap.errors import DataError
from pacswap.recipes import DataSection
from pacswap.scenes import CLASSES, draw_scene
from pacswap.train.data.split import Split, open_data

HELD_OUT = 1_000_000  # the first seed of the pictures to measure on


def picture_of(image: Tensor) -> Image.Image:
    """A drawn image [3, H, W] in 0..1 as an 8-bit picture."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy())


def mask_of(mask: Tensor) -> Image.Image:
    """Labels [H, W] as an 8-bit index mask."""
    return Image.fromarray(mask.byte().numpy())


def write_folder(
    tmp_path: Path, train: int = 8, val: int = 4, size: tuple[int, int] = (48, 64)
) -> Path:
    """A folder that {format: folder, root: ..., classes: classes.txt} reads.

    Args:
        tmp_path: an empty folder.
        train: how many pictures train.txt lists: t000, t001 ...
        val: how many val.txt lists: v000, v001 ...
        size: height and width of all, at least 16.

    Returns:
        `tmp_path`, with images/ (every other one a PNG, a JPEG), masks/ (index PNGs of the six
        classes of the scenes), train.txt, val.txt and classes.txt.
    """
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for split, count, first in (("train", train, 0), ("val", val, HELD_OUT)):
        names = [f"{split[0]}{index:03}" for index in range(count)]
        for index, name in enumerate(names):
            image, mask = draw_scene(first + index, size)
            suffix = "jpg" if index % 2 else "png"
            picture_of(image).save(tmp_path / "images" / f"{name}.{suffix}", quality=95)
            mask_of(mask).save(tmp_path / "masks" / f"{name}.png")
        text = "".join(f"{name}\n" for name in names)
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    text = "".join(f"{name}\n" for name in CLASSES)
    (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
    return tmp_path


def opened(root: Path | None, **keys: Any) -> tuple[Split, Split]:
    """The data in a folder, of format folder with classes.txt where nothing else is said."""
    given = {"format": "folder", "root": None if root is None else str(root), **keys}
    if given["format"] == "folder":
        given = {"classes": "classes.txt", **given}
    return open_data(DataSection(**given), root or Path())


def refused(root: Path, **keys: Any) -> str:
    """What is said of the data, without its beginning."""
    with pytest.raises(DataError) as raised:
        opened(root, **keys)
    return str(raised.value).removeprefix(f"finetune.data of {root}")
