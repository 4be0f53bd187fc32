"""Drawing: tiles, labels, grids. Sizes are in pixels of the picture that is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pacswap.viz.colours import heat_image

PAPER, INK, FAINT, OUTSIDE = (255, 255, 255), (28, 28, 36), (112, 112, 124), (226, 226, 230)
# Of the chosen pixels, apart from each other and from the ramp.
MARKS = (
    (0, 190, 255),
    (120, 220, 60),
    (255, 90, 200),
    (255, 215, 0),
    (90, 120, 255),
    (0, 225, 180),
)
_LETTERS = str.maketrans({"×": "x", "→": " to ", "−": "-", "…": "..."})
_LEAST_FOR_NUMBERS = 34

Ink: TypeAlias = "tuple[int, int, int]"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def written(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, ink: Ink
) -> None:
    """A line of text, in letters that Pillow's font has."""
    draw.text(at, text.translate(_LETTERS), fill=ink, font=font(size))


def picture(colours: Tensor) -> Image.Image:
    """uint8 [H, W, 3] as a picture."""
    return Image.fromarray(colours.contiguous().numpy())


def fitted(image: Image.Image, width: int) -> Image.Image:
    """As wide as that; enlarged pixels stay squares."""
    height = max(1, round(image.height * width / image.width))
    enlarges = width > image.width
    how = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
    return image.resize((width, height), how)


def mark(draw: ImageDraw.ImageDraw, at: tuple[float, float], number: int) -> None:
    """A numbered ring at (x, y)."""
    x, y = at
    colour = MARKS[number % len(MARKS)]
    draw.ellipse((x - 6, y - 6, x + 6, y + 6), outline=(0, 0, 0), width=4)
    draw.ellipse((x - 5, y - 5, x + 5, y + 5), outline=colour, width=2)
    draw.text(
        (x + 9, y - 11), str(number + 1), fill=colour, font=font(15), stroke_width=2,
        stroke_fill=(0, 0, 0),
    )  # fmt: skip


def grid(factors: Tensor, inside: Tensor, side: int) -> Image.Image:
    """A window of K as cells, lighter where a tap counts more; taps outside the image are empty.

    Args:
        factors: [KH, KW] in 0 … 1.
        inside: [KH, KW], which taps see the image.
        side: of the longer side of the picture, about.
    """
    KH, KW = factors.shape
    cell = max(side // max(KH, KW), 3)
    gap = 1 if cell < 12 else 2
    made = Image.new("RGB", (KW * cell + gap, KH * cell + gap), PAPER)
    draw = ImageDraw.Draw(made)
    colours = heat_image(factors).tolist()
    size = max(11, min(cell // 3, 18))
    for i in range(KH):
        for j in range(KW):
            box = (j * cell + gap, i * cell + gap, (j + 1) * cell - 1, (i + 1) * cell - 1)
            if not inside[i, j]:
                draw.rectangle(box, fill=OUTSIDE)
                draw.line((box[0], box[3], box[2], box[1]), fill=(200, 200, 206))
                continue
            draw.rectangle(box, fill=tuple(colours[i][j]))
            if cell >= _LEAST_FOR_NUMBERS:
                value = float(factors[i, j])
                centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                ink = (20, 10, 30) if value > 0.55 else (255, 250, 240)
                draw.text(centre, f"{value:.2f}", fill=ink, font=font(size), anchor="mm")
    return made


def bar(width: int, height: int = 10) -> Image.Image:
    """The ramp from 0 to 1."""
    return picture(heat_image(torch.linspace(0, 1, width).expand(height, -1)))


def labelled(image: Image.Image, title: str, *, note: str = "", size: int = 15) -> Image.Image:
    """A picture under its title, and a line in smaller letters beneath."""
    head, foot = size + 9, (size + 5 if note else 0)
    made = Image.new("RGB", (image.width, image.height + head + foot), PAPER)
    draw = ImageDraw.Draw(made)
    written(draw, (0, 0), title, size, INK)
    made.paste(image, (0, head))
    if note:
        written(draw, (0, head + image.height + 3), note, size - 2, FAINT)
    return made


def beside(images: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in a row, their tops aligned."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    made = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    x = 0
    for image in images:
        made.paste(image, (x, 0))
        x += image.width + gap
    return made


def below(images: Sequence[Image.Image], gap: int, *, margin: int = 0) -> Image.Image:
    """Pictures under each other, their left sides aligned, on a sheet with a margin."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    width = max(image.width for image in images)
    made = Image.new("RGB", (width + 2 * margin, height + 2 * margin), PAPER)
    y = margin
    for image in images:
        made.paste(image, (margin, y))
        y += image.height + gap
    return made
