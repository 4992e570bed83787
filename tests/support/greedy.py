"""DivPrune and CDPruner with lists in double precision, one image at a time, and the oracle models' features."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumer_compile.capture.loading import load_model

ORACLE = Path(__file__).parents[1] / "oracle"

Rows = list[list[float]]


def cases(folder: str, method: str) -> dict[str, dict[str, Any]]:
    """Of an oracle's folder: what was asked."""
    found: dict[str, dict[str, Any]] = json.loads((ORACLE / folder / f"cases_{method}.json").read_text("utf-8"))
    return found


@functools.cache
def expected(folder: str, method: str) -> dict[str, np.ndarray]:
    """And what the published code gave."""
    return dict(np.load(ORACLE / folder / f"expected_{method}.npz"))


@functools.cache
def arrays(folder: str) -> dict[str, Tensor]:
    """The inputs of an oracle's folder; pixels as float32."""
    found = {name: torch.from_numpy(array) for name, array in np.load(ORACLE / folder / "inputs.npz").items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in found.items()}


@functools.cache
def model(folder: str) -> Any:
    """The model of an oracle's folder."""
    return load_model(ORACLE / folder).source.eval()


@functools.cache
def features(folder: str) -> Tensor:
    """What LLaVA's projector gives for each picture, `[pictures, tokens, width]`."""
    with torch.no_grad():
        found = model(folder).get_image_features(arrays(folder)["pixel_values"]).pooler_output
    return torch.stack(list(found))


def kept(mask: Tensor) -> list[list[int]]:
    """The numbers of the tokens that stay."""
    return [row.nonzero().flatten().tolist() for row in mask]


def cosine(a: list[float], b: list[float], epsilon: float = 0.0) -> float:
    """Of two rows; `epsilon` is added to the squares of their norms."""
    dot, squares = sum(x * y for x, y in zip(a, b, strict=True)), [sum(x * x for x in v) + epsilon for v in (a, b)]
    return dot / math.sqrt(squares[0] * squares[1])


def farthest(image: Rows, budget: int) -> list[int]:
    """The tokens that DivPrune keeps, in the order of picking."""
    far = [[1 - cosine(a, b) for b in image] for a in image]
    lonely = [sorted(column)[1] for column in zip(*far, strict=True)]
    picked = [lonely.index(max(lonely))]
    while len(picked) < budget:
        rest = [i for i in range(len(image)) if i not in picked]
        picked.append(max(rest, key=lambda i: (min(far[k][i] for k in picked), -i)))
    return picked


def determinantal(kernel: Rows, budget: int) -> list[int]:
    """The tokens with the largest determinant, one added after the other, by the determinants themselves."""
    picked: list[int] = []
    whole = torch.tensor(kernel, dtype=torch.float64)
    for _ in range(budget):
        rest = [i for i in range(len(kernel)) if i not in picked]
        grown = [float(torch.det(whole[[*picked, i]][:, [*picked, i]])) for i in rest]
        picked.append(rest[grown.index(max(grown))])
    return picked
