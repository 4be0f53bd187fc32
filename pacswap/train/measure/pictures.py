"""Pictures of predictions: masks in their colours, overlays, before and after side by side."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pacswap.errors import DataError
from pacswap.train.writing import write_file

Colour = tuple[int, int, int]
_Row = tuple[Colour | None, str, str]  # of a legend: what is drawn, what it means, a remark

# Okabe and Ito's bluish green and vermilion, which colour-blind readers tell apart too.
BETTER: Colour = (0, 158, 115)
WORSE: Colour = (213, 94, 0)
WRONG: Colour = (70, 74, 88)  # before and after
IGNORED: Colour = (236, 236, 236)

_INK, _QUIET, _PAPER = (28, 30, 34), (112, 116, 124), (255, 255, 255)
_PANEL = 520  # the longer side of a panel, in pixels
_GAP, _CAPTION, _LINE = 16, 30, 23
_TEXT, _SMALL = 18, 15
_LEAST = (330, 12 * _LINE)  # width and height of a legend


def palette_image(
    mask: Tensor, palette: Sequence[Colour], ignore_index: int | None = None
) -> Image.Image:
    """A mask as a picture of mode P: its values are the classes, its palette their colours.

    Args:
        mask: [H, W], values 0 to 255.
        palette: the colour of each class; black beyond its end.
        ignore_index: drawn light grey where the palette has no colour for it.

    Raises:
        DataError: a value does not fit into a byte.

    Example:
        >>> palette_image(torch.tensor([[0, 1]]), [(0, 0, 0), (128, 0, 0)]).getpixel((1, 0))
        1
    """
    lowest, highest = (int(edge) for edge in mask.aminmax())
    if lowest < 0 or highest > 255:
        raise DataError(
            f"label {lowest if lowest < 0 else highest} in a mask: expected 0 to 255, all that a "
            "palette picture holds."
        )
    image = Image.fromarray(mask.to(torch.uint8).cpu().numpy())
    image.putpalette(_table(palette, ignore_index).flatten().tolist())
    return image


def overlay(
    image: Tensor,
    mask: Tensor,
    palette: Sequence[Colour],
    *,
    ignore_index: int | None = None,
    opacity: float = 0.6,
) -> Image.Image:
    """A mask's colours over its picture, which shines through in grey.

    Args:
        image: [3, H, W], uint8 RGB.
        mask: [H, W].
        palette: the colour of each class.
        ignore_index: its pixels show the picture alone.
        opacity: of the colours, 0 to 1.
    """
    colours = _coloured(mask, palette, ignore_index).float()
    mixed = opacity * colours + (1 - opacity) * _grey(image)
    if ignore_index is not None:
        mixed = mixed.where((mask != ignore_index)[..., None], image.permute(1, 2, 0).float())
    return _picture(mixed)


def difference(
    image: Tensor, truth: Tensor, before: Tensor, after: Tensor, *, ignore_index: int = 255
) -> Image.Image:
    """Where two predictions differ in being right: `BETTER`, `WORSE` and `WRONG` over the picture.

    Args:
        image: [3, H, W], uint8 RGB.
        truth: [H, W]; pixels of `ignore_index` are drawn as `IGNORED`.
        before: [H, W], a prediction.
        after: [H, W], another.
        ignore_index: the label of pixels that do not count.
    """
    drawn = 150 + 0.4 * _grey(image).expand(-1, -1, 3)
    for colour, where in _regions(truth, before, after, ignore_index).items():
        drawn = drawn.where(~where[..., None], torch.tensor(colour, dtype=drawn.dtype))
    return _picture(drawn)


def side_by_side(
    image: Tensor,
    truth: Tensor,
    before: Tensor,
    after: Tensor,
    *,
    classes: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int = 255,
    names: tuple[str, str] = ("before", "after"),
    title: str = "",
) -> Image.Image:
    """Image, truth, difference; before, after and a legend of the classes that occur.

    Args:
        image: [3, H, W], uint8 RGB.
        truth: [H, W].
        before: [H, W], a prediction.
        after: [H, W], another.
        classes: their names.
        palette: the colour of each class.
        ignore_index: the label of pixels that do not count.
        names: what the two predictions are called.
        title: written above the image, the picture's name for example.

    Raises:
        DataError: the sizes differ.
    """
    sizes = {tuple(tensor.shape[-2:]) for tensor in (image, truth, before, after)}
    if len(sizes) > 1:
        raise DataError(f"image, truth and predictions have sizes {sorted(sizes)}: expected one.")
    image, truth, before, after = (tensor.cpu() for tensor in (image, truth, before, after))
    valid = truth != ignore_index
    right = [_percent((mask == truth)[valid]) for mask in (before, after)]
    drawn = _coloured(truth, palette, ignore_index)
    panels = [
        (title or "image", "", _picture(image.permute(1, 2, 0))),
        ("truth", "", _picture(drawn)),
        ("difference", "", difference(image, truth, before, after, ignore_index=ignore_index)),
        (names[0], f"{right[0]} right", _picture(_coloured(before, palette, ignore_index))),
        (names[1], f"{right[1]} right", _picture(_coloured(after, palette, ignore_index))),
    ]
    size = _panel_size(*image.shape[-2:])
    room = max(size[0], _LEAST[0]), max(size[1] + _CAPTION, _LEAST[1])
    corner = 3 * _GAP + 2 * size[0], _GAP // 2 + size[1] + _CAPTION + _GAP
    sheet = Image.new("RGB", (corner[0] + room[0] + _GAP, corner[1] + room[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (caption, remark, panel) in enumerate(panels):
        x = _GAP + index % 3 * (size[0] + _GAP)
        y = _GAP // 2 + index // 3 * (size[1] + _CAPTION + _GAP)
        _write_caption(draw, (x, y), size[0], caption, remark)
        # Masks keep their own pixels when they grow; everything is smoothed when it shrinks.
        grows = size[0] > panel.width and index > 0
        way = Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS
        sheet.paste(panel.resize(size, way), (x, y + _CAPTION))
    rows = [
        *_region_rows(truth, before, after, names, ignore_index),
        (None, "", ""),
        (None, "class", f"IoU here, {names[0]} / {names[1]}"),
        *_class_rows(truth, before, after, classes, palette, ignore_index),
    ]
    _write_legend(draw, corner, room, rows)
    return sheet


def write_picture(path: Path, picture: Image.Image) -> Path:
    """Write a PNG, whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    data = BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return write_file(path, data.getvalue())


def _regions(
    truth: Tensor, before: Tensor, after: Tensor, ignore_index: int
) -> dict[Colour, Tensor]:
    """Which pixels get which colour in the picture of differences. [H, W] each."""
    valid, was, now = truth != ignore_index, before == truth, after == truth
    return {
        BETTER: valid & now & ~was,
        WORSE: valid & was & ~now,
        WRONG: valid & ~was & ~now,
        IGNORED: ~valid,
    }


def _table(palette: Sequence[Colour], ignore_index: int | None) -> Tensor:
    """Colours of all 256 labels. [256, 3], uint8."""
    table = torch.zeros(256, 3, dtype=torch.uint8)
    if palette:
        known = list(palette)[:256]
        table[: len(known)] = torch.tensor(known, dtype=torch.uint8)
    if ignore_index is not None and len(palette) <= ignore_index <= 255:
        table[ignore_index] = torch.tensor(IGNORED, dtype=torch.uint8)
    return table


def _coloured(mask: Tensor, palette: Sequence[Colour], ignore_index: int | None) -> Tensor:
    """A mask in its classes' colours. [H, W, 3], uint8."""
    drawn = _table(palette, ignore_index)[mask.cpu().clamp(0, 255)]
    if ignore_index is not None:
        ignored = torch.tensor(IGNORED, dtype=torch.uint8)
        drawn = drawn.where((mask.cpu() != ignore_index)[..., None], ignored)
    return drawn


def _grey(image: Tensor) -> Tensor:
    """A picture's brightness. [H, W, 1], float, 0 to 255."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    return (image.float() * weights).sum(0)[..., None]


def _picture(values: Tensor) -> Image.Image:
    """Of [H, W, 3], 0 to 255."""
    return Image.fromarray(values.round().clamp(0, 255).to(torch.uint8).contiguous().numpy())


def _panel_size(height: int, width: int) -> tuple[int, int]:
    """Width and height of a panel, whose longer side is always the same."""
    scale = _PANEL / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _percent(where: Tensor) -> str:
    return f"{100 * where.float().mean().item():.1f} %" if where.numel() else "–"


def _region_rows(
    truth: Tensor, before: Tensor, after: Tensor, names: tuple[str, str], ignore_index: int
) -> list[_Row]:
    """What the colours of the difference mean, and their shares of the pixels that count."""
    words = {
        BETTER: f"only {names[1]} right",
        WORSE: f"only {names[0]} right",
        WRONG: "both wrong",
        IGNORED: "not counted",
    }
    valid = truth != ignore_index
    regions = _regions(truth, before, after, ignore_index)
    return [
        (None, "difference", "share of pixels"),
        *(
            (colour, words[colour], _percent(where if colour == IGNORED else where[valid]))
            for colour, where in regions.items()
        ),
    ]


def _class_rows(
    truth: Tensor,
    before: Tensor,
    after: Tensor,
    classes: Sequence[str],
    palette: Sequence[Colour],
    ignore_index: int,
) -> list[_Row]:
    """The classes that occur, largest first: colour, name, IoU before and after."""
    valid = truth != ignore_index
    labels = [mask[valid] for mask in (truth, before, after)]
    sizes = torch.stack([torch.bincount(one, minlength=len(classes)) for one in labels])
    order = sizes.sum(0).argsort(descending=True, stable=True).tolist()
    table = _table(palette, None)

    def iou(label: int, prediction: Tensor) -> str:
        is_true, is_seen = labels[0] == label, prediction == label
        either = (is_true | is_seen).sum().item()
        return f"{100 * (is_true & is_seen).sum().item() / either:.0f}" if either else "–"

    def colour(label: int) -> Colour:
        red, green, blue = table[min(label, 255)].tolist()
        return red, green, blue

    return [
        (colour(c), classes[c], f"{iou(c, labels[1])} / {iou(c, labels[2])}")
        for c in order
        if sizes[:, c].any()
    ]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitted(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> str:
    """The text, cut with an ellipsis where it is too long."""
    if draw.textlength(text, _font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", _font(size)) > width:
        text = text[:-1]
    return text + "…"


def _write_caption(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, caption: str, remark: str
) -> None:
    beside = draw.textlength(remark, _font(_SMALL)) + 12 if remark else 0
    caption = _fitted(draw, caption, _TEXT, width - beside)
    x, line = at[0], at[1] + _CAPTION - 9
    draw.text((x, line), caption, _INK, _font(_TEXT), anchor="ls")
    if remark:
        draw.text((x + width, line), remark, _QUIET, _font(_SMALL), anchor="rs")


def _write_legend(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], size: tuple[int, int], rows: list[_Row]
) -> None:
    """What the colours mean, in one or two columns; rows that find no place are counted."""
    per_column = max(1, size[1] // _LINE)
    columns = 1 if len(rows) <= per_column else 2
    if len(rows) > columns * per_column:
        left = len(rows) - columns * per_column + 1
        rows = [*rows[:-left], (None, f"and {left} more classes", "")]
    width = (size[0] - (columns - 1) * 2 * _GAP) // columns
    for index, (colour, text, remark) in enumerate(rows):
        x = at[0] + index // per_column * (width + 2 * _GAP)
        line = at[1] + index % per_column * _LINE + 17
        indent = 0
        if colour is not None:
            draw.rounded_rectangle((x, line - 13, x + 20, line + 1), 3, colour, (190, 192, 198))
            indent = 29
        ink = _QUIET if colour is None else _INK
        beside = draw.textlength(remark, _font(_SMALL)) + 10 if remark else 0
        text = _fitted(draw, text, _SMALL, width - indent - beside)
        draw.text((x + indent, line), text, ink, _font(_SMALL), anchor="ls")
        draw.text((x + width, line), remark, _QUIET, _font(_SMALL), anchor="rs")
