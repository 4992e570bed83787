"""The tiny LLaVA of the published vectors."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.capture.loading import load_model

FOLDER = Path(__file__).parents[1] / "oracle" / "llava-tiny"


CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))


EXPECTED = dict(np.load(FOLDER / "expected.npz"))


@functools.cache
def model() -> Any:
    return load_model(FOLDER).source.eval()


def tensors(rows: slice = slice(None)) -> dict[str, Tensor]:
    arrays = np.load(FOLDER / "inputs.npz")
    made = {name: torch.from_numpy(arrays[name])[rows] for name in arrays}
    return {name: t.float() if t.is_floating_point() else t for name, t in made.items()}


@functools.cache
def program() -> Program:
    return pumer.capture(model(), tensors(), outputs=["logits"])


def schedule(case: str, **more: Any) -> Schedule:
    spec = CASES[case]
    return Schedule(method="vispruner", budget=spec["budget"], important=spec["important_ratio"], **more)
