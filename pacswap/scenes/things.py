"""What stands in a scene: houses, trees, poles and vehicles, drawn over what lies behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pacswap.scenes.street import BUILDING, POLE, TREE, VEHICLE, Street, Thing, within

_WALLS = "9e5742 ccbd99 949494 e0ded6 738ca8 bd8c5c 5c5961 8fa380"
_PANES = "1a1f26 596e87 99b3cc bfa666"
_LEAVES = "386624 5c802e 244729 b87524 993d24"
_BARKS = "4d3829 6b665c"
_PAINTS = "d9d9d9 26262b 8c9199 a61f1f 264785 336640 d9b326 739ecc"
_METALS = "4d4f54 8c8f94 ccccc7 614733 293329"
_SIGNS = "cc1f1f 1f40b3 e6e6e6 ebc71f 1a7340"

_Wall = Callable[[Tensor, Tensor], Tensor]  # metres along and up -> colours


def _wall(street: Street, height: float) -> _Wall:
    """What the walls of one house look like, with its windows."""
    wall, glass, trim = street.colour(_WALLS), street.colour(_PANES), street.between(0.6, 1.3)
    pitch, storey = street.between(1.4, 4), street.between(2.7, 3.8)
    wide, high = street.between(0.25, 0.85), street.between(0.35, 0.75)

    def colours(along: Tensor, up: Tensor) -> Tensor:
        column, floor = torch.floor(along / pitch), torch.floor(up / storey)
        u, v = along / pitch - column, up / storey - floor
        pane = ((u - 0.5).abs() < wide / 2) & ((v - 0.55).abs() < high / 2)
        pane &= within(up, 0.8, height - 0.5)
        blind = (7 * column + 13 * floor + 5 * column * floor) % 11 / 11
        colour = wall * (0.8 + 0.2 * (up / height).clamp(0, 1))
        colour = torch.where((v < 0.07) | (up > height - 0.4), trim * wall, colour)
        return torch.where(pane, glass * (0.6 + 0.6 * blind) * (1.1 - 0.3 * v), colour)

    return colours


def _draw_block(near: float, far: float, inner: float, height: float, street: Street) -> None:
    """A house beside the road: the wall along the road, then the one that faces the camera."""
    wall, sunny = _wall(street, height), inner * street.sun < 0
    patch, away, up = street.receding(inner, height, near, far)
    dirt = (1.1 if sunny else 0.75) + 0.08 * street.noise(patch.label.shape, (6, 6))
    colour = street.lit(wall(away, up), away, dirt)
    patch.paint(within(away, near, far) & within(up, 0, height), colour, BUILDING)
    outer = inner + math.copysign(14, inner)
    ends = min(inner, outer), max(inner, outer)
    _draw_front(near, ends, height, 0.0, 0.85 if sunny else 1.0, wall, street)


def _draw_front(
    away: float, ends: tuple[float, float], height: float, gable: float, bright: float,
    wall: _Wall, street: Street,
) -> None:  # fmt: skip
    patch, right, up = street.upright(*ends, height + gable, away)
    slope = 1 - (right - sum(ends) / 2).abs() / (ends[1] - ends[0]) * 2
    dirt = bright + 0.08 * street.noise(patch.label.shape, (6, 6))
    roof = street.lit(0.7 * street.colour(_WALLS), away, dirt)
    patch.paint((slope > 0) & (up > 0) & (up < height + gable * slope), roof, BUILDING)
    colour = street.lit(wall(right, up), away, dirt)
    patch.paint((slope > 0) & within(up, 0, height), colour, BUILDING)


def _draw_woods(away: float, height: float, street: Street) -> None:
    """A distant edge of trees, with gaps."""
    patch, _, up = street.upright(-1e6, 1e6, 2 * height, away)
    edge = street.noise((1, street.cols), (1, 4), 6)
    grain, leaf = street.noise(patch.label.shape, (3, 24)), street.colour(_LEAVES)
    inside = (up > 0) & (up < height * (0.4 + edge + 0.15 * grain))
    patch.paint(inside, street.lit(leaf, away, 1 + 0.3 * grain), TREE)


def _draw_tree(right: float, away: float, height: float, kind: str, street: Street) -> None:
    leaf, bark = street.colour(_LEAVES), street.colour(_BARKS)
    scale = street.focal / away
    foot, fork = street.at(right, -0.05, away), street.at(right, 0.5 * height, away)
    girth = street.between(0.03, 0.05) * height * scale
    patch, inside, across = street.stroke(foot, fork, (girth, 0.7 * girth))
    patch.paint(inside, street.lit(bark, away, 0.9 + 0.25 * street.sun * across), TREE)
    if kind == "bare":
        bark = street.lit(bark, away)
        _draw_twigs(fork, -math.pi / 2, 0.27 * height * scale, 0.6 * girth, 4, bark, street)
        return
    patch, x, up = street.upright(right - 0.5 * height, right + 0.5 * height, 1.1 * height, away)
    x, up = (x - right) / height, up / height
    rough = street.noise(patch.label.shape, (7, 7))
    holes = street.noise(patch.label.shape, (16, 16), 2) > street.between(0.7, 1.3)
    if kind == "conifer":
        body = 0.26 * (1 - up) * (1.2 - 0.5 * (up * 7 % 1)) - x.abs() + 0.03 * rough
    else:
        body = torch.full_like(rough, -1.0)
        for _ in range(6):
            left, top = street.between(-0.2, 0.2), street.between(0.55, 0.85)
            radius = street.between(0.12, 0.24)
            body = torch.maximum(body, 1 - torch.hypot(x - left, up - top) / radius)
        body = body + 0.4 * rough - 0.1
    bright = (0.5 + 0.35 * rough + 0.5 * street.sun * x + 0.5 * up).clamp(0.25, 1.6)
    patch.paint((body > 0) & (up > 0.15) & ~holes, street.lit(leaf, away, bright), TREE)


def _draw_twigs(
    start: tuple[float, float], angle: float, length: float, thick: float, depth: int,
    colour: Tensor, street: Street,
) -> None:  # fmt: skip
    for lean in (-1, 1):
        turned, reach = angle + lean * street.between(0.15, 0.6), length * street.between(0.7, 1.1)
        end = start[0] + reach * math.cos(turned), start[1] + reach * math.sin(turned)
        patch, inside, _ = street.stroke(start, end, (thick, 0.7 * thick))
        patch.paint(inside, colour, TREE)
        if depth > 1:
            _draw_twigs(end, turned, 0.72 * length, 0.65 * thick, depth - 1, colour, street)


def _draw_pole(right: float, away: float, kind: str, street: Street) -> None:
    metal, sign = street.colour(_METALS), street.colour(_SIGNS)
    height = street.between(5, 8) if kind in ("lamp", "wire") else street.between(2.4, 3.4)
    thick, inward = street.between(0.14, 0.3), -math.copysign(street.between(0.8, 2.2), right)
    bars = [(right, 0.0, right, height, thick)]
    if kind == "lamp":
        bars += [(right, height, right + inward, height + 0.3, 0.6 * thick)]
        bars += [(right + 0.7 * inward, height + 0.2, right + 1.2 * inward, height + 0.3, 0.25)]
    if kind == "wire":
        bars += [
            (right - 1.1, height - y, right + 1.1, height - y, 0.8 * thick) for y in (0.4, 1.1)
        ]
    for x0, y0, x1, y1, metres in bars:
        ends = street.at(x0, y0, away), street.at(x1, y1, away)
        patch, inside, across = street.stroke(*ends, (metres * street.focal / away,) * 2)
        patch.paint(inside, street.lit(metal, away, 0.95 + 0.3 * street.sun * across), POLE)
    patch, x, up = street.upright(right - 0.5, right + 0.5, height + 0.5, away)
    x, up = (x - right) / 0.45, (up - height) / 0.45
    if kind == "sign":
        disc = torch.hypot(x, up)
        plate = torch.where(disc < 0.6, 1 - 0.5 * sign, sign)
        patch.paint(disc < 1, street.lit(plate, away), POLE)
    if kind == "signal":
        lamps = torch.where((x.abs() < 0.3) & (up % 0.8 < 0.55), 1.4 * sign, 0.4 * metal)
        patch.paint((x.abs() < 0.6) & within(up, -1.6, 0.9), street.lit(lamps, away), POLE)


class _Vehicle:
    def __init__(self, street: Street) -> None:
        tall = street.between(0, 1) < 0.3
        self.height = street.between(2.1, 3.1) if tall else street.between(1.4, 1.7)
        self.length = street.between(5, 9) if tall else street.between(3.8, 4.6)
        self.width, self.waist = (2.3, 1.0) if tall else (1.8, 0.58)
        self.paint, self.glass = street.colour(_PAINTS), street.colour(_PANES)
        self.lamp = street.colour("cc1a14 f2f2cc")

    def flank(self, along: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Which points lie on the vehicle seen from its side, and their colours; in metres."""
        t, v = along / self.length, up / self.height
        rise = (v - self.waist).clamp(min=0)
        body = within(t, 0, 1) & (v > 0.14) & (v < self.waist - 0.25 * (t - 0.5) ** 2)
        if self.waist < 1:
            body |= (t > 0.12 + 0.3 * rise) & (t < 0.85 - 0.5 * rise) & within(v, 0.3, 1)
            pane = (t > 0.17 + 0.3 * rise) & (t < 0.79 - 0.5 * rise) & within(v, 0.6, 0.92)
            pane &= (t - 0.47).abs() > 0.02
        else:
            pane = within(v, 0.5, 0.82) & within(t, 0.04, 0.96) & (6 * t % 1 > 0.12)
        hub = torch.minimum((t - 0.2).abs(), (t - 0.8).abs()) * self.length
        wheel = torch.hypot(hub, up - 0.34) < 0.34
        colour = torch.where(pane, self.glass * (0.7 + 0.5 * v), self.paint * (0.75 + 0.3 * v))
        return body | wheel, torch.where(wheel, 0.07, colour)

    def tail(self, along: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The same seen from its end; `along` is metres from its middle."""
        a, v = along.abs() / (self.width / 2), up / self.height
        edge = 1 - 0.7 * (v - self.waist).clamp(min=0)
        body = within(v, 0.15, 0.98) & (a < edge) | (within(v, 0, 0.3) & within(a, 0.68, 0.95))
        pane = within(v, 0.62 if self.waist < 1 else 0.42, 0.9) & (a < edge - 0.14)
        colour = torch.where(pane, self.glass * (0.6 + 0.6 * v), self.paint * (0.7 + 0.35 * v))
        colour = torch.where(within(v, 0.4, 0.54) & within(a, 0.66, 0.92), self.lamp, colour)
        return body, torch.where(v < 0.22, 0.25 * colour, colour)

    def draw(self, right: float, away: float, crossing: bool, street: Street) -> None:
        if crossing:
            patch, x, up = street.upright(right, right + self.length, self.height, away)
            inside, colour = self.flank(x - right, up)
            patch.paint(inside, street.lit(colour, away), VEHICLE)
            return
        inner = right - math.copysign(self.width / 2, right)
        if inner * right > 0:
            patch, z, up = street.receding(inner, self.height, away, away + self.length)
            inside, colour = self.flank(z - away, up)
            sunny = right * street.sun < 0
            patch.paint(inside, street.lit(colour, z, 1.05 if sunny else 0.7), VEHICLE)
        half = self.width / 2
        patch, x, up = street.upright(right - half, right + half, self.height, away)
        inside, colour = self.tail(x - right, up)
        patch.paint(inside, street.lit(colour, away), VEHICLE)


def settle(street: Street) -> list[Thing]:
    """Decide what stands where, from far to near."""
    between, count, sun = street.between, street.count, street.sun
    things = [Thing(90, partial(_draw_woods, 90.0, between(4, 14)))]
    for _ in range(count(0, 4)):
        away, left, height, gable = between(30, 85), between(-30, 18), between(3, 18), between(0, 5)
        ends, wall = (left, left + between(8, 16)), _wall(street, height)
        things.append(Thing(away, partial(_draw_front, away, ends, height, gable, 0.95, wall)))
    for side in (-1, 1):
        away, dense, inner = between(1.5, 12), between(0, 1), side * between(6, 11)
        for _ in range(5):
            far, height = away + between(6, 16), between(3.5, 16)
            if between(0, 1) < dense:
                shift = inner + side * between(0, 2)
                things.append(Thing(away, partial(_draw_block, away, far, shift, height)))
            away = far + between(0, 6)
    for _ in range(count(1, 9)):
        away, right, height = between(7, 40), street.side() * between(4.5, 11), between(3, 10)
        kind = ("leafy", "leafy", "conifer", "bare")[count(0, 3)]
        shadow = (right - sun * height / 3, height / 2, 0.8)
        things.append(Thing(away, partial(_draw_tree, right, away, height, kind), shadow))
    for _ in range(count(1, 7)):
        away, right = between(5, 18), street.side() * between(3, 6)
        kind = ("lamp", "sign", "signal", "wire")[count(0, 3)]
        draw = partial(_draw_pole, right, away, kind)
        things.append(Thing(away, draw, (right - sun * 2, 2, 0.12)))
    for _ in range(count(0, 6)):
        away, right, crossing = between(6, 32), street.side() * between(1.3, 4.5), count(0, 3) == 0
        car = _Vehicle(street)
        half = car.length / 2 if crossing else car.width / 2
        shadow = (right + half * crossing, half + 0.3, 0.8)
        things.append(Thing(away, partial(car.draw, right, away, crossing), shadow))
    return sorted(things, key=lambda thing: -thing.away)
