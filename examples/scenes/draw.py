"""A scene as a picture: objects with a texture on a cluttered background, with Pillow alone."""

from __future__ import annotations

import math
from random import Random

from PIL import Image, ImageDraw

from .scene import SIDE, Scene, Thing

CELL = 8
"""Pixels of a cell's side; `owners` says which object each cell shows."""
NOBODY = 255
"""The owner of a cell of background."""

COLOURS = {
    "red": (214, 48, 44),
    "green": (60, 165, 62),
    "blue": (48, 84, 216),
    "yellow": (236, 208, 56),
    "purple": (154, 60, 178),
    "cyan": (68, 202, 212),
}

_FINE = 3
"""Drawn this many times larger, and shrunk: smooth edges."""
_OWNED = 0.25
"""The share of a cell that an object covers at least, to own it."""


def draw(scene: Scene, rng: Random) -> tuple[Image.Image, bytes]:
    """The picture of a scene, RGB and `SIDE` pixels square, and the owner of each cell, raster order, one byte each.

    Args:
        scene: what to draw.
        rng: for the background, the shades and the phases of textures.
    """
    picture = _background(rng)
    owners = Image.new("L", picture.size, NOBODY)
    for number, thing in enumerate(scene.things):
        left, top = (round(_FINE * (place - thing.radius)) for place in (thing.x, thing.y))
        silhouette, painted = _silhouette(thing), _painted(thing, rng)
        picture.paste(painted, (left, top), silhouette)
        owners.paste(number, (left, top), silhouette)
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    grain = Image.frombytes("RGB", small.size, rng.randbytes(3 * SIDE * SIDE))
    return Image.blend(small, grain, 0.06), _cell_owners(owners, len(scene.things))


def _corners(thing: Thing) -> list[tuple[float, float]]:
    """The polygon of a shape other than a circle, around (0, 0), corners at distance 1 or nearer."""
    if thing.shape == "cross":
        w = 0.32
        arm = math.sqrt(1 - w * w)
        corners = [(w, -arm), (w, -w), (arm, -w), (arm, w), (w, w), (w, arm)]
        corners += [(-x, -y) for x, y in corners]
    elif thing.shape == "star":
        corners = [_polar(1 if i % 2 == 0 else 0.42, i * math.pi / 5 - math.pi / 2) for i in range(10)]
    else:
        sides, first = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2)}[thing.shape]
        corners = [_polar(1, first + 2 * math.pi * i / sides) for i in range(sides)]
    cos, sin = math.cos(thing.turn), math.sin(thing.turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def _silhouette(thing: Thing) -> Image.Image:
    """255 where the object is, on its square of `2 radius` times `_FINE` pixels."""
    half = thing.radius * _FINE
    mask = Image.new("L", (round(2 * half),) * 2)
    pen = ImageDraw.Draw(mask)
    if thing.shape == "circle":
        reach = 0.92 * half
        pen.ellipse([half - reach, half - reach, half + reach, half + reach], fill=255)
    else:
        pen.polygon([(half + half * x, half + half * y) for x, y in _corners(thing)], fill=255)
    return mask


def _painted(thing: Thing, rng: Random) -> Image.Image:
    """The object's colour, in a shade of its own, with its texture in a dark shade of it."""
    shade = rng.uniform(0.88, 1.08)
    fill = tuple(min(255, round(shade * channel)) for channel in COLOURS[thing.colour])
    dark = tuple(round(0.42 * channel) for channel in fill)
    side, phase = round(2 * thing.radius * _FINE), rng.uniform(0, 1)
    tile = Image.new("RGB", (side, side), fill)
    pen = ImageDraw.Draw(tile)
    step = 5 * _FINE
    places = [round(step * (phase + i)) for i in range(-side // step - 2, 2 * side // step + 2)]
    if thing.texture == "striped":
        for place in places:
            pen.line([(place, -1), (place - side, side)], fill=dark, width=round(0.38 * step))
    elif thing.texture == "dotted":
        reach = 0.3 * step
        for x in places:
            for y in places:
                pen.ellipse([x - reach, y - reach, x + reach, y + reach], fill=dark)
    return tile


def _background(rng: Random) -> Image.Image:
    """Muted shapes, strokes and arcs on a muted ground, `_FINE` times larger than the picture."""
    side = SIDE * _FINE
    ground = rng.randint(80, 190)
    picture = Image.new("RGB", (side, side), _muted(rng, ground))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(10, 18)):
        x, y = (rng.uniform(-0.1, 1) * side for _ in range(2))
        width, height = (rng.uniform(0.05, 0.4) * side for _ in range(2))
        box, colour = [x, y, x + width, y + height], _muted(rng, ground)
        kind = rng.randrange(4)
        if kind == 0:
            pen.rectangle(box, fill=colour)
        elif kind == 1:
            pen.ellipse(box, fill=colour)
        elif kind == 2:
            pen.arc(box, rng.uniform(0, 360), rng.uniform(0, 360), fill=colour, width=2 * _FINE)
        else:
            pen.line(box, fill=colour, width=rng.randint(1, 3) * _FINE)
    return picture


def _muted(rng: Random, ground: int) -> tuple[int, int, int]:
    """A greyish colour near a brightness."""
    base = ground + rng.randint(-45, 45)
    red, green, blue = (max(0, min(255, base + rng.randint(-14, 14))) for _ in range(3))
    return red, green, blue


def _cell_owners(owners: Image.Image, things: int) -> bytes:
    """Who covers most of each cell, where that is at least `_OWNED` of it."""
    cells = SIDE // CELL
    shares = [
        owners.point([255 if i == number else 0 for i in range(256)]).resize((cells, cells), Image.Resampling.BOX)
        for number in range(things)
    ]
    columns = zip(*(share.tobytes() for share in shares), strict=True)
    return bytes(
        max(range(things), key=column.__getitem__) if max(column) >= 255 * _OWNED else NOBODY for column in columns
    )
