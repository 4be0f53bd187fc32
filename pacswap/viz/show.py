"""One sheet for each pixel-adaptive layer: its guidance, where it adapts, its K at some pixels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from pacswap.errors import PlanError, ShapeError
from pacswap.surgery.rewrite import PLAN
from pacswap.viz import canvas
from pacswap.viz.colours import guidance_image, heat_image
from pacswap.viz.look import Looked, adaptation_map, as_unit, look_into

_TILE = 380
_WINDOW = 137
_GAP = 18
_CHOSEN = 3  # pixels that are picked where none are given

Pixels = Sequence[tuple[int, int]]


def show(
    model: nn.Module,
    image: Tensor,
    folder: str | Path,
    pixels: Pixels | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    guidance: Tensor | None = None,
) -> list[Path]:
    """Draw what each pixel-adaptive layer sees in an image; one PNG per layer, with its name.

    A sheet has the image, the layer's guidance in colours, the map of 1 − mean K, and K of the
    window at each chosen pixel beside what the window sees. K is drawn before its normalisation
    and without the blend, which the sheet names. The model is left as it was.

    Args:
        model: an upgraded model.
        image: [3, H, W], RGB, uint8 or float in 0 … 1.
        folder: where the files go; made if it is not there, files of the same names are replaced.
        pixels: (row, column) in the image; by default three where K differs most between the
            neighbours, and one where the layers adapt least.
        mean: as for `look_into`, like the rest.
        std: by which each channel is divided.
        guidance: the external guidance, if the model was upgraded with one.

    Returns:
        The files, in the order in which the layers run.

    Raises:
        ShapeError: the image is none, or a pixel lies outside it.
        PlanError: the model has no pixel-adaptive layers, or none of them has a kernel to show.
    """
    seen = _look(model, image, mean, std, guidance)
    unit = as_unit(image)
    chosen = _checked(pixels, unit) if pixels is not None else _picked(list(seen.values()), unit)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = _guided_by(model)
    paths = []
    for name, looked in seen.items():
        path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"
        _sheet(looked, unit, chosen, words.get(name, "")).save(path)
        paths.append(path)
    return paths


def kernel_images(
    model: nn.Module,
    image: Tensor,
    pixels: Pixels,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    guidance: Tensor | None = None,
) -> dict[str, list[Image.Image]]:
    """K of every pixel-adaptive layer at some pixels, each beside what its window sees.

    Args:
        model: as for `show`, like the rest.
        image: [3, H, W].
        pixels: (row, column) in the image.
        mean: subtracted from each channel.
        std: by which each is divided.
        guidance: the external guidance.

    Returns:
        By the layer's name, a picture for each pixel.

    Raises:
        ShapeError: the image is none, or a pixel lies outside it.
        PlanError: the model has no pixel-adaptive layers, or none of them has a kernel to show.
    """
    seen = _look(model, image, mean, std, guidance)
    unit = as_unit(image)
    chosen = _checked(pixels, unit)
    return {
        name: [_window(looked, unit, pixel, number) for number, pixel in enumerate(chosen)]
        for name, looked in seen.items()
    }


def _look(
    model: nn.Module,
    image: Tensor,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    guidance: Tensor | None,
) -> dict[str, Looked]:
    seen = look_into(model, image, mean=mean, std=std, guidance=guidance)
    if not seen:
        raise PlanError(
            f"no adapting kernel of this {type(model).__name__} was made: its layers rest in eval "
            "mode, or are disabled. There is nothing to show."
        )
    return seen


def _guided_by(model: nn.Module) -> dict[str, str]:
    """What feeds each layer, in words."""
    plan = vars(model).get(PLAN)
    if plan is None:  # a network whose user calls the layers himself
        return {}
    words = {}
    for layer in plan.layers:
        found = plan.guidance_of(layer)
        text = f"{layer.what}, guided by {', '.join(found.sources)}"
        text += f" ({found.projection} channels)" if found.projection else ""
        for place in (layer.place, *(f"{layer.place}.kernels.{i}" for i in range(9))):
            words[place] = text
    return words


def _checked(pixels: Pixels, image: Tensor) -> list[tuple[int, int]]:
    H, W = image.shape[1:]
    for row, column in pixels:
        if not (0 <= row < H and 0 <= column < W):
            raise ShapeError(f"pixel ({row}, {column}) lies outside the image, {H}×{W}.")
    if not pixels:
        raise ShapeError("pixels is empty. Name at least one (row, column), or leave it out.")
    return [(int(row), int(column)) for row, column in pixels]


def _picked(seen: Sequence[Looked], image: Tensor) -> list[tuple[int, int]]:
    """A few pixels where neighbours differ most in K, apart from each other, and a plain one."""
    H, W = int(image.shape[1]), int(image.shape[2])
    mixed, plain = torch.zeros(H, W), torch.zeros(H, W)
    for looked in seen:
        # Where some neighbours count and others do not, there is most to see.
        maps = torch.stack([looked.factors.std(0), -adaptation_map(looked)]).float()
        maps = F.interpolate(maps[None], size=(H, W), mode="bilinear", align_corners=False)[0]
        mixed, plain = mixed + maps[0], plain + maps[1]
    # Windows at the border are half empty.
    rows, columns = torch.arange(H)[:, None], torch.arange(W)[None, :]
    edge = max(1, min(H, W) // 10)
    inner = (rows >= edge) & (rows < H - edge) & (columns >= edge) & (columns < W - edge)
    inner = inner if inner.any() else torch.ones_like(inner)
    free = inner.clone()
    chosen = []
    for values in [mixed] * _CHOSEN + [plain]:
        if not free.any():
            break
        at = int(torch.where(free, values, -torch.inf).argmax())
        row, column = divmod(at, W)
        chosen.append((row, column))
        free &= (rows - row) ** 2 + (columns - column) ** 2 > (min(H, W) / 4) ** 2
    return chosen


def _sheet(looked: Looked, image: Tensor, pixels: Pixels, words: str) -> Image.Image:
    whole = canvas.fitted(canvas.picture(_bytes(image)), _TILE)
    marked = whole.copy()
    heat = heat_image(adaptation_map(looked))
    tiles = [marked, canvas.picture(guidance_image(looked.features)), canvas.picture(heat)]
    tiles = [tile.resize(whole.size, Image.Resampling.NEAREST) for tile in tiles]
    scale = whole.width / image.shape[2]
    for tile in (tiles[0], tiles[2]):
        draw = ImageDraw.Draw(tile)
        for number, (row, column) in enumerate(pixels):
            canvas.mark(draw, ((column + 0.5) * scale, (row + 0.5) * scale), number)
    D, H, W = looked.features.shape
    mean = adaptation_map(looked).mean().item()
    top = canvas.beside(
        [
            canvas.labelled(tiles[0], "image", note="the chosen pixels"),
            canvas.labelled(
                tiles[1],
                f"guidance, {D} channel{'s' if D > 1 else ''} at {H}×{W}",
                note="like colours are like features (principal components)",
            ),
            canvas.labelled(
                canvas.below([tiles[2], canvas.bar(_TILE)], 4),
                "where it adapts: 1 - mean K of the neighbours",
                note=f"dark 0: all neighbours count      light 1: none does      mean {mean:.2f}",
            ),
        ],
        _GAP,
    )
    windows = [_window(looked, image, pixel, number) for number, pixel in enumerate(pixels)]
    across = max(1, (top.width + _GAP) // (windows[0].width + _GAP))
    rows = [canvas.beside(windows[i : i + across], _GAP) for i in range(0, len(windows), across)]
    return canvas.below([_head(looked, words, top.width), top, *rows], _GAP, margin=_GAP)


def _head(looked: Looked, words: str, width: int) -> Image.Image:
    made = Image.new("RGB", (width, 54), canvas.PAPER)
    draw = ImageDraw.Draw(made)
    canvas.written(draw, (0, 0), looked.name, 24, canvas.INK)
    parts = [words] if words else []
    parts += [f"{looked.form} K", f"blend {looked.blend:.3g}"]
    if looked.bandwidth is not None:
        parts.append(f"bandwidth {looked.bandwidth:.3g}")
    canvas.written(draw, (0, 33), ",  ".join(parts), 15, canvas.FAINT)
    return made


def _window(looked: Looked, image: Tensor, pixel: tuple[int, int], number: int) -> Image.Image:
    """What a layer's window sees around a pixel, and K there."""
    H, W = image.shape[1:]
    row, column = looked.pixel_at((pixel[0] + 0.5) / H, (pixel[1] + 0.5) / W)
    KH, KW = looked.window.kernel_size
    factors = looked.factors[:, row, column].view(KH, KW)
    inside = looked.neighbours[:, row, column].clone()
    inside[looked.window.centre] = True
    cells = canvas.grid(factors, inside.view(KH, KW), _WINDOW)
    patch = _patch(looked, image, (row, column), cells.size)
    colour = canvas.MARKS[number % len(canvas.MARKS)]
    ImageDraw.Draw(patch).rectangle(
        (0, 0, patch.width - 1, patch.height - 1), outline=colour, width=3
    )
    pair = canvas.beside([patch, cells], 6)
    return canvas.labelled(pair, f"{number + 1}   what its window sees, and K")


def _patch(
    looked: Looked, image: Tensor, at: tuple[int, int], size: tuple[int, int]
) -> Image.Image:
    """The part of the image under a window, with each tap's cell outlined."""
    H, W = image.shape[1:]
    window = looked.window
    scale = (H / looked.features.shape[1], W / looked.features.shape[2])
    centre = looked.centre_of(*at)
    middle = [(centre[axis] + 0.5) * scale[axis] for axis in (0, 1)]
    # The window's reach, and as much again of half a cell.
    sides = [
        ((window.kernel_size[axis] - 1) * window.dilation[axis] + 2) * scale[axis]
        for axis in (0, 1)
    ]
    zoom = min(size[0] / sides[1], size[1] / sides[0])
    half = (size[1] / zoom / 2, size[0] / zoom / 2)
    whole = canvas.picture(_bytes(image))
    box = (middle[1] - half[1], middle[0] - half[0], middle[1] + half[1], middle[0] + half[0])
    made = whole.transform(
        size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor=canvas.OUTSIDE
    )
    draw = ImageDraw.Draw(made, "RGBA")
    taps = [(side - 1) // 2 for side in window.kernel_size]
    dy, dx = scale[0] * zoom / 2, scale[1] * zoom / 2
    for i in range(window.kernel_size[0]):
        for j in range(window.kernel_size[1]):
            y = size[1] / 2 + (i - taps[0]) * window.dilation[0] * 2 * dy
            x = size[0] / 2 + (j - taps[1]) * window.dilation[1] * 2 * dx
            is_centre = (i, j) == (taps[0], taps[1])
            # Dark beside light is seen on any ground.
            for inset, ink in ((0, (255, 255, 255)), (1, (0, 0, 0))):
                if dx > 3 + inset and dy > 3 + inset:
                    box = (x - dx + inset, y - dy + inset, x + dx - inset, y + dy - inset)
                    draw.rectangle(box, outline=(*ink, 255 if is_centre else 110))
            if dx <= 3 or dy <= 3:
                draw.point((x, y), fill=(255, 255, 255, 255 if is_centre else 150))
            if is_centre:
                draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill=(255, 255, 255, 255))
    return made


def _bytes(image: Tensor) -> Tensor:
    """[3, H, W] in 0 … 1 as uint8 [H, W, 3]."""
    return (255 * image).round().to(torch.uint8).permute(1, 2, 0)
