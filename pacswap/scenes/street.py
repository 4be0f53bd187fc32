"""The ground a scene stands on: its dice, its camera and light, its sky and road."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUND, BUILDING, TREE, VEHICLE, POLE = range(1, 6)  # 0 is the sky

_ZENITHS = "336bc7 5c94d9 9ea3ab 6b7380 4d528c 242b57"
_HORIZONS = "b3d1eb dbe6eb cccccc 9e9e9e f29e6b 8c6673"
_ROADS = "545459 7a7873 948066 3d4047"
_VERGES = "577533 8c8547 9e9485 ccd1db 6b5740"


def _rgb(palette: str, index: int) -> Tensor:
    """One colour of a palette, 0..1. [3, 1, 1]."""
    levels = list(bytes.fromhex(palette.split()[index]))
    return torch.tensor(levels, dtype=torch.float32, device="cpu")[:, None, None] / 255


def within(value: Tensor, low: float, high: float) -> Tensor:
    """Whether each element lies strictly between the two."""
    return (value > low) & (value < high)


class _Dice:
    """Random numbers from one seed; how many are drawn never depends on the size of the picture."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator(device="cpu").manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.tensor())

    def count(self, low: int, high: int) -> int:
        return low + int(self.between(0, high - low + 1))

    def side(self) -> float:
        return float(2 * self.count(0, 1) - 1)

    def colour(self, palette: str) -> Tensor:
        """One colour of the palette, a little off. [3, 1, 1]."""
        off = 0.07 * (2 * self.tensor(1, 1, 1) - 1) + 0.03 * (2 * self.tensor(3, 1, 1) - 1)
        return _rgb(palette, self.count(0, len(palette.split()) - 1)) + off

    def noise(self, shape: Sequence[int], cells: tuple[int, int], octaves: int = 3) -> Tensor:
        """Smooth noise within about ±1 of `shape` [h, w], coarsest on a grid of `cells`."""
        total = torch.zeros(1, 1, 2, 2, dtype=torch.float32, device="cpu")
        for octave in range(octaves):
            nodes = [(side << octave) + 1 for side in cells]
            total = F.interpolate(total, nodes, mode="bilinear", align_corners=True)
            total += 0.6**octave * (2 * self.tensor(1, 1, *nodes) - 1)
        if 0 in shape:
            return total.new_zeros(*shape)
        return F.interpolate(total, list(shape), mode="bicubic", align_corners=True)[0, 0]


@dataclass
class Patch:
    """A rectangle of the picture. Coordinates are in heights of the picture, from its top left."""

    colour: Tensor  # [3, h, w]
    label: Tensor  # [h, w]
    x: Tensor  # [1, w]
    y: Tensor  # [h, 1]

    def paint(self, inside: Tensor, colour: Tensor, label: int | None) -> None:
        """Cover what is there; a colour without a label leaves the class as it was."""
        self.colour.copy_(torch.where(inside, colour, self.colour))
        if label is not None:
            self.label.masked_fill_(inside, label)


class Street(_Dice):
    """The picture, and the camera and the light that turn metres right, up and away into pixels."""

    def __init__(self, seed: int, rows: int, cols: int) -> None:
        super().__init__(seed)
        self.rows, self.cols, self.width = rows, cols, cols / rows
        self.colours = torch.zeros(3, rows, cols, dtype=torch.float32, device="cpu")
        self.labels = torch.zeros(rows, cols, dtype=torch.int64, device="cpu")
        self.x = ((torch.arange(cols, device="cpu") + 0.5) / rows).float()[None]
        self.y = ((torch.arange(rows, device="cpu") + 0.5) / rows).float()[:, None]
        weather = self.count(0, 5)
        self.zenith, self.haze = _rgb(_ZENITHS, weather), _rgb(_HORIZONS, weather)
        self.light = self.between(0.65, 1.25) * (0.75 + 0.3 * self.haze)
        self.fog = self.between(0.003, 0.022)  # halvings per metre
        self.sun = self.side()  # -1: it shines from the left
        self.shade = self.between(0, 0.6)  # how dark shadows are
        self.horizon, self.centre = self.between(0.35, 0.58), self.width * self.between(0.3, 0.7)
        self.eye, self.focal = self.between(1.5, 3), self.between(0.75, 1.2)

    def at(self, right: float, up: float, away: float) -> tuple[float, float]:
        """Where a point in metres lies in the picture, in heights of the picture."""
        scale = self.focal / away
        return self.centre + right * scale, self.horizon + (self.eye - up) * scale

    def patch(self, one: tuple[float, float], other: tuple[float, float]) -> Patch:
        """The rectangle between two corners, cut to the picture; it may be empty."""
        (left, right), (top, bottom) = sorted((one[0], other[0])), sorted((one[1], other[1]))
        x0, x1 = (min(max(round(x * self.rows), 0), self.cols) for x in (left - 0.01, right + 0.01))
        y0, y1 = (min(max(round(y * self.rows), 0), self.rows) for y in (top - 0.01, bottom + 0.01))
        colour, label = self.colours[:, y0:y1, x0:x1], self.labels[y0:y1, x0:x1]
        return Patch(colour, label, self.x[:, x0:x1], self.y[y0:y1])

    def upright(
        self, left: float, right: float, height: float, away: float
    ) -> tuple[Patch, Tensor, Tensor]:
        """A patch facing the camera, and the metres right and up of its pixels."""
        patch = self.patch(self.at(left, 0, away), self.at(right, height, away))
        scale = self.focal / away
        return patch, (patch.x - self.centre) / scale, self.eye - (patch.y - self.horizon) / scale

    def receding(
        self, right: float, height: float, near: float, far: float
    ) -> tuple[Patch, Tensor, Tensor]:
        """A patch along the road, and the metres away and up of its pixels."""
        (x, top), (x_far, top_far) = self.at(right, height, near), self.at(right, height, far)
        patch = self.patch((x, min(top, top_far)), (x_far, self.at(right, 0, near)[1]))
        scale = ((patch.x - self.centre) / right).clamp(min=1e-4)
        return patch, self.focal / scale, self.eye - (patch.y - self.horizon) / scale

    def lit(self, colour: Tensor, away: float | Tensor, bright: float | Tensor = 1.0) -> Tensor:
        """The colour as it arrives from so many metres away, through the haze."""
        clear = 0.5 ** (self.fog * away)
        return clear * colour * self.light * bright + (1 - clear) * self.haze

    def stroke(
        self, start: tuple[float, float], end: tuple[float, float], thick: tuple[float, float]
    ) -> tuple[Patch, Tensor, Tensor]:
        """A tapering line: its patch, the pixels it covers, and how far across they lie, -1..1."""
        (x0, y0), (x1, y1), reach = start, end, max(thick)
        patch = self.patch(
            (min(x0, x1) - reach, min(y0, y1) - reach), (max(x0, x1) + reach, max(y0, y1) + reach)
        )
        length = max(math.hypot(x1 - x0, y1 - y0), 1e-6)
        u, v = (x1 - x0) / length, (y1 - y0) / length
        along = ((patch.x - x0) * u + (patch.y - y0) * v) / length
        across = ((patch.x - x0) * v - (patch.y - y0) * u) * 2
        across = across / (thick[0] + (thick[1] - thick[0]) * along.clamp(0, 1))
        return patch, within(along, 0, 1) & (across.abs() < 1), across


@dataclass(frozen=True)
class Thing:
    """Something that stands on the ground, metres away, and may throw a shadow."""

    away: float
    draw: Callable[[Street], None]
    shadow: tuple[float, float, float] | None = None  # right, half its width, half its depth


def draw_sky(street: Street) -> None:
    """Fill the picture with a gradient, clouds, and the glow of the sun."""
    patch = street.patch((0, 0), (street.width, 1))
    low = (patch.y / street.horizon).clamp(0, 1) ** street.between(0.8, 2)
    clouds = street.noise(patch.label.shape, (4, 3), 4)
    cover = ((clouds - street.between(-0.3, 0.9)) * street.between(0.8, 3)).clamp(0, 0.9)
    cloud = (0.55 + 0.45 * street.haze) * (street.between(0.7, 1) + 0.15 * clouds.flip(1))
    sun = street.width * (0.5 + 0.4 * street.sun)
    glow = 0.2 * torch.exp(-6 * ((patch.x - sun) ** 2 + (patch.y - 0.1) ** 2))
    patch.colour.copy_(torch.lerp(torch.lerp(street.zenith, street.haze, low), cloud, cover) + glow)


def draw_ground(street: Street, things: list[Thing]) -> None:
    """Lay the road, its pavement and what lies beside it below the horizon, with the shadows."""
    patch = street.patch((0, street.horizon + 0.01), (street.width, 1))
    scale = ((patch.y - street.horizon) / street.eye).clamp(min=1e-4)
    away = street.focal / scale
    right = (patch.x - street.centre) / scale
    off = (right + street.between(-0.002, 0.002) * away**2).abs()  # from the middle of a bend
    half, pavement, stripe = street.between(3, 5), street.between(1, 3.5), street.between(8, 60)
    verge = street.colour(_VERGES) * (1 + 0.2 * street.noise(patch.label.shape, (14, 9), 4))
    slabs = street.colour(_ROADS) * (1.15 - 0.2 * ((away % 1.5 < 0.15) & (away < 15)).float())
    road = street.colour(_ROADS) * (1 + 0.1 * street.noise(patch.label.shape, (20, 3), 4))
    marks = ((off < 0.09) & (away % 6 < 3)) | within(off, half - 0.45, half - 0.3)
    marks |= within(away, stripe, stripe + 3) & (right % 1.1 < 0.55)
    road = torch.where(marks, street.between(0.5, 0.95), road)
    slabs = torch.where(off < half + 0.25, slabs * 1.2, slabs)
    colour = torch.where(off < half, road, torch.where(off < half + pavement, slabs, verge))
    dark = torch.zeros_like(patch.label, dtype=torch.bool)
    for thing in things:
        if thing.shadow is None:
            continue
        middle, wide, deep = thing.shadow
        dark |= ((right - middle) / wide) ** 2 + ((away - thing.away - 0.3) / deep) ** 2 < 1
    colour = street.lit(colour, away, 1 - street.shade * dark.float())
    patch.paint((scale > 1e-4).expand_as(dark), colour, GROUND)
