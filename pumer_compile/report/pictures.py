"""Pictures as they were before a processor took them apart, and the boxes of tokens on them.

Two layouts are known: `[..., channels, height, width]`, of which every leading index is a picture; and Qwen's, in which
each row of a matrix is a patch and a grid says how many there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UsageError
from .data import Box, Picture, Place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Colours:
    """How pixels were normalised.

    Attributes:
        mean, std: of the three channels; empty where nobody tells.
        source: who tells.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = ""

    def __str__(self) -> str:
        if self.mean:
            return f"Colours: un-normalised with the mean and deviation of {self.source}."
        return (
            "Colours: stretched from the smallest to the largest value of each picture, since no "
            "preprocessor_config.json tells the mean and deviation."
        )

    def shown(self, values: Array) -> Array:
        """Numbers `[..., channels]` as colours, uint8 `[..., 3]`."""
        if self.mean and len(self.mean) == values.shape[-1]:
            values = values * np.array(self.std) + np.array(self.mean)
        else:
            low, high = float(values.min()), float(values.max())
            values = (values - low) / max(high - low, 1e-12)
        values = np.repeat(values, 3, -1) if values.shape[-1] == 1 else values[..., :3]
        return np.asarray(np.rint(values.clip(0, 1) * 255), dtype=np.uint8)


def colours_of(processor: object) -> Colours:
    """How a processor normalises.

    Args:
        processor: one of transformers', or the folder of a model that may have the file of one, or None.
    """
    if processor is None:
        return Colours()
    if isinstance(processor, str | Path):
        return _from_folder(Path(processor))
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    return _colours(mean, std, type(images).__name__)


def _from_folder(folder: Path) -> Colours:
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            said = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        said = said.get("image_processor", said) if isinstance(said, dict) else {}
        if isinstance(said, dict) and said.get("do_normalize", True):
            found = _colours(said.get("image_mean"), said.get("image_std"), f"the model's {name}")
            if found.mean:
                return found
    return Colours()


def _colours(mean: Any, std: Any, source: str) -> Colours:
    if mean is None or std is None:
        return Colours()
    mean, std = np.atleast_1d(np.array(mean, float)), np.atleast_1d(np.array(std, float))
    return Colours(tuple(mean.tolist()), tuple(std.tolist()), source)


@dataclass(frozen=True)
class Canvas:
    """A picture, and which element of its input each of its pixels came from, `[height, width]`."""

    picture: Picture
    source: Array

    def boxes(self, owners: Array) -> dict[int, Box]:
        """The box of every token that has pixels here, by its number in `owners` (of the input's elements)."""
        seen = owners.reshape(-1)[self.source]
        rows, columns = np.nonzero(seen >= 0)
        if not len(rows):
            return {}
        tokens, inverse = np.unique(seen[rows, columns], return_inverse=True)
        low = np.full((2, len(tokens)), np.iinfo(np.int64).max)
        high = np.zeros((2, len(tokens)), dtype=np.int64)
        for axis, places in enumerate((columns, rows)):
            np.minimum.at(low[axis], inverse, places)
            np.maximum.at(high[axis], inverse, places + 1)
        return {
            int(token): (int(low[0, i]), int(low[1, i]), int(high[0, i] - low[0, i]), int(high[1, i] - low[1, i]))
            for i, token in enumerate(tokens)
        }


def check_pictures(inputs: Mapping[str, Tensor]) -> None:
    """Refuse inputs without a picture.

    Raises:
        UsageError: naming what there is.
    """
    if not any(tensor.is_floating_point() and tensor.ndim >= 2 for tensor in inputs.values()):
        raise UsageError(
            f"There is no picture among the inputs ({', '.join(inputs) or 'none'}): a report shows where the tokens of "
            "pictures go. Give what the model's processor makes of a picture too, such as pixel_values."
        )


def canvases_of(inputs: Mapping[str, Tensor], colours: Colours, merge: int) -> dict[str, list[Canvas]]:
    """The pictures of a batch, by input.

    Args:
        inputs: a batch.
        colours: how they were normalised.
        merge: patches on a side of what Qwen's layout keeps together.
    """
    found: dict[str, list[Canvas]] = {}
    for name, tensor in inputs.items():
        if not tensor.is_floating_point():
            continue
        values = tensor.detach().float().numpy()
        if values.ndim >= 4 and values.shape[-3] in (1, 3):
            made = list(_planes(values))
        else:
            grid = _grid_for(name, inputs)
            made = [] if grid is None or values.ndim != 2 else list(_patches(values, grid, merge))
        found[name] = [
            Canvas(Picture(f"{name} {i}", colours.shown(values.reshape(-1)[places])), places[..., 0])
            for i, places in enumerate(made)
        ]
    return {name: made for name, made in found.items() if made}


def _planes(values: Array) -> Iterator[Array]:
    """Of each picture, the element of each pixel and channel, `[height, width, channels]`."""
    places = np.arange(values.size).reshape(-1, *values.shape[-3:])
    yield from places.transpose(0, 2, 3, 1)


def _grid_for(name: str, inputs: Mapping[str, Tensor]) -> Array | None:
    """Frames, height and width in patches of each picture of a matrix of patches."""
    kind = "video" if "video" in name else "image"
    grid = inputs.get(f"{kind}_grid_thw")
    return None if grid is None else grid.numpy()


def _patches(values: Array, grid: Array, merge: int) -> Iterator[Array]:
    """The same of patches, in groups of `merge * merge`, each `channels, frames, size, size`."""
    width, start = values.shape[1], 0
    depth = next((d for d in (2, 1) if math.isqrt(width // (3 * d)) ** 2 * 3 * d == width), None)
    if depth is None or int(grid.prod(1).sum()) != len(values):
        return
    size = math.isqrt(width // (3 * depth))
    places = np.arange(values.size).reshape(values.shape)
    for frames, high, wide in grid.tolist():
        count = frames * high * wide
        own = places[start : start + count]
        start += count
        if high % merge or wide % merge:
            return
        own = own.reshape(frames, high // merge, wide // merge, merge, merge, 3, depth, size, size)
        own = own[:, :, :, :, :, :, 0].transpose(0, 1, 3, 6, 2, 4, 7, 5)
        yield from own.reshape(frames, high * size, wide * size, 3)


def placed(
    canvases: Mapping[str, Sequence[Canvas]],
    owners: Mapping[str, Array],
    pictures: Sequence[list[Picture]],
    tokens: int,
) -> list[list[Place | None]]:
    """Where the tokens of each sample stand.

    Args:
        canvases: of the batch, by input.
        owners: see `pixels.Owners`.
        pictures: of each sample; those that a token stands on are added.
        tokens: how many a sample has.
    """
    places: list[list[Place | None]] = [[None] * tokens for _ in pictures]
    for name, numbers in owners.items():
        for canvas in canvases.get(name, ()):
            for token, box in canvas.boxes(numbers).items():
                sample, place = divmod(token, tokens)
                own = pictures[sample]
                known = next((i for i, picture in enumerate(own) if picture is canvas.picture), len(own))
                if known == len(own):
                    own.append(canvas.picture)
                places[sample][place] = Place(known, box)
    return places
