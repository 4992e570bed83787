"""Drawing by hand: pictures as PNG, tokens over them as SVG paths."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .data import Box, Place, Step

# A picture is drawn no larger than this; the page shows it smaller still.
MOST_PIXELS = 448
LEVELS = 8
"""Shades of a heat map."""


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """A picture as PNG.

    Args:
        pixels: `[height, width, 3]`, uint8.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    # Each row as its difference from the one above (filter 2), which compresses better.
    rows[:, 0] = 2
    flat = pixels.reshape(height, -1)
    rows[0, 1:] = flat[0]
    rows[1:, 1:] = flat[1:] - flat[:-1]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def data_uri(pixels: np.ndarray[Any, Any]) -> str:
    """A picture for a page, averaged down where it is larger than `MOST_PIXELS`."""
    step = math.ceil(max(pixels.shape[:2]) / MOST_PIXELS)
    if step > 1:
        height, width = (size // step * step for size in pixels.shape[:2])
        cut = pixels[:height, :width].astype(np.float32)
        cut = cut.reshape(height // step, step, width // step, step, 3).mean((1, 3))
        pixels = np.rint(cut).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def boxes_path(boxes: Iterable[Box], inset: float = 0) -> str:
    """One path around all boxes."""
    parts = []
    for left, top, width, height in boxes:
        x, y, w, h = left + inset, top + inset, width - 2 * inset, height - 2 * inset
        parts.append(f"M{x:g} {y:g}h{w:g}v{h:g}h{-w:g}z")
    return "".join(parts)


def lines_path(pairs: Iterable[tuple[Box, Box]]) -> str:
    """One path with a line between the middles of each pair."""
    parts = []
    for one, other in pairs:
        (x, y), (u, v) = ((left + width / 2, top + height / 2) for left, top, width, height in (one, other))
        parts.append(f"M{x:g} {y:g}L{u:g} {v:g}")
    return "".join(parts)


def on(places: Sequence[Place | None], picture: int, tokens: Iterable[int]) -> list[Box]:
    """The boxes of some tokens on a picture."""
    return [place.box for token in tokens if (place := places[token]) is not None and place.picture == picture]


def hue(number: int) -> int:
    """A colour for a group: neighbours in number are far apart on the wheel."""
    return number * 137 % 360


def overlay(step: Step, picture: int, unit: float) -> list[tuple[str, str, str]]:
    """What is drawn over a picture: class, path and style, the lowest first.

    Args:
        step: of one stream.
        picture: its number.
        unit: the width of a thin line, in pixels of the picture.
    """
    of = {fate: [t for t, own in enumerate(step.fates) if own == fate] for fate in ("gone", "pruned", "kept")}
    drawn = [(fate, boxes_path(on(step.places, picture, of[fate])), "") for fate in ("gone", "pruned")]
    drawn.append(("kept", boxes_path(on(step.places, picture, of["kept"]), unit / 2), f"stroke-width:{unit:g}"))
    for number, tokens in step.groups.items():
        boxes = on(step.places, picture, tokens)
        colour = f"--h:{hue(number)};stroke-width:{2 * unit:g}"
        drawn.append(("merged", boxes_path(boxes, unit), colour))
        drawn.append(("joined", lines_path((boxes[0], other) for other in boxes[1:]), colour))
    return [(name, path, style) for name, path, style in drawn if path]


def heat(step: Step, picture: int) -> list[tuple[str, str]]:
    """A heat map of the scores: opacity and path, by shade; the highest score is the darkest."""
    if step.scores is None:
        return []
    known = sorted({score for score in step.scores if math.isfinite(score)})
    if not known:
        return []
    # By rank: one token often draws more attention than all the others.
    rank = {score: i / max(1, len(known) - 1) for i, score in enumerate(known)}
    shades: dict[int, list[int]] = {}
    for token, score in enumerate(step.scores):
        if math.isfinite(score):
            shades.setdefault(min(LEVELS - 1, int(rank[score] * LEVELS)), []).append(token)
    found = [
        (f"{0.9 * shade / (LEVELS - 1):.2f}", boxes_path(on(step.places, picture, t))) for shade, t in shades.items()
    ]
    return [(opacity, path) for opacity, path in found if path]
