"""Vectors of methods that were published: models, cases and what the published code computes (`tests/oracle`)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Reduced, Schedule
from pumer_compile.capture.loading import load_model
from pumer_compile.reducers import noted_decisions

ORACLE = Path(__file__).parents[1] / "oracle"


@dataclass(frozen=True)
class Vectors:
    """The cases of one method on one model.

    Attributes:
        folder: of the model, below `tests/oracle`.
        method: whose cases.
    """

    folder: str
    method: str

    @property
    def path(self) -> Path:
        """Of the model."""
        return ORACLE / self.folder

    @functools.cached_property
    def cases(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return dict(json.loads((self.path / f"cases_{self.method}.json").read_text(encoding="utf-8")))

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """`<case>.<name>`."""
        return dict(np.load(self.path / f"expected_{self.method}.npz"))

    @property
    def model(self) -> Any:
        """With its weights, at rest."""
        return _model(self.folder)

    def inputs(self, case: str, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Of a case: a batch of two prompts, or some of them."""
        arrays, spec = np.load(self.path / "inputs.npz"), self.cases[case]
        ids = torch.from_numpy(arrays[f"input_ids_{spec['prompt']}"])[rows]
        pixels = torch.from_numpy(arrays["pixel_values"][spec["images"]]).float()[rows]
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        if "image_sizes" in arrays:  # of pictures in crops
            found["image_sizes"] = torch.from_numpy(arrays["image_sizes"]).repeat(len(ids), 1)
        return found

    def reduced(self, case: str, schedule: Schedule) -> Reduced:
        """The model of a case, reduced; it is captured once for each prompt."""
        return pumer.reduce(_captured(self, self.cases[case]["prompt"]), schedule)

    def wanted(self, case: str, name: str) -> np.ndarray:
        """What the published code computes."""
        return self.expected[f"{case}.{name}"]


def kept_and_logits(reduced: Reduced, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The image tokens that are left after each reducer, numbered before the first one, and the logits."""
    with noted_decisions(reduced.module) as noted, torch.no_grad():
        logits: Tensor = reduced.module(**inputs)["logits"]
    kept: list[Tensor] = []
    for decisions in noted.values():
        kept.append(kept[-1].gather(1, decisions.kept) if kept else decisions.kept)
    return kept, logits


def assert_last(logits: Tensor | np.ndarray, wanted: np.ndarray) -> None:
    """The logits of the last position, to 1e-4."""
    assert np.abs(np.asarray(logits)[:, -1] - wanted).max() <= 1e-4


@functools.cache
def _model(folder: str) -> Any:
    return load_model(ORACLE / folder).source.eval()


_programs: dict[tuple[str, str], Program] = {}


def _captured(vectors: Vectors, prompt: str) -> Program:
    if (vectors.folder, prompt) not in _programs:
        case = next(name for name, spec in vectors.cases.items() if spec["prompt"] == prompt)
        program = pumer.capture(vectors.model, vectors.inputs(case), outputs=["logits"])
        _programs[vectors.folder, prompt] = program
    return _programs[vectors.folder, prompt]
