"""A scene: four to nine objects with a shape, a colour, a size and a texture each, and where they stand."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

SIDE = 112
"""Pixels of a picture's side."""

VALUES: dict[str, tuple[str, ...]] = {
    "size": ("small", "large"),
    "colour": ("red", "green", "blue", "yellow", "purple", "cyan"),
    "texture": ("plain", "striped", "dotted"),
    "shape": ("circle", "square", "triangle", "star", "cross"),
}
"""Attributes in the order in which words name them, and their values."""

RADII = {"small": (8.0, 9.5), "large": (13.5, 16.0)}
"""Pixels from an object's centre to its corners, at least and at most."""

FEWEST, MOST = 4, 9
COPIED = 0.3
"""How often an attribute is that of an earlier object, so that phrases have to tell objects apart."""
NEAREST = 0.8
"""Centres are at least this share of the two radii apart: objects overlap, and none hides another."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `x`, `y` and `radius` are in pixels, `turn` in radians."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    turn: float

    def value(self, attribute: str) -> str:
        """The value of one of `VALUES`."""
        return str(getattr(self, attribute))


@dataclass(frozen=True)
class Scene:
    """Objects, those behind first."""

    things: tuple[Thing, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """What a shard's file holds of it."""
        return [asdict(thing) for thing in self.things]

    @classmethod
    def from_json(cls, things: list[dict[str, Any]]) -> Scene:
        """The scene that `as_json` gave."""
        return cls(tuple(Thing(**thing) for thing in things))


def random_scene(rng: Random) -> Scene:
    """A scene drawn with `rng`."""
    wanted = rng.randint(FEWEST, MOST)
    things: list[Thing] = []
    while len(things) < wanted:
        thing = _random_thing(rng, things)
        if all(_apart(thing, other) for other in things):
            things.append(thing)
    return Scene(tuple(things))


def _random_thing(rng: Random, others: list[Thing]) -> Thing:
    values = {
        name: rng.choice(others).value(name) if others and rng.random() < COPIED else rng.choice(choices)
        for name, choices in VALUES.items()
    }
    radius = round(rng.uniform(*RADII[values["size"]]), 2)
    x, y = (round(rng.uniform(radius, SIDE - radius), 2) for _ in range(2))
    return Thing(**values, x=x, y=y, radius=radius, turn=round(rng.uniform(-0.3, 0.3), 3))


def _apart(one: Thing, other: Thing) -> bool:
    return math.dist((one.x, one.y), (other.x, other.y)) >= NEAREST * (one.radius + other.radius)
