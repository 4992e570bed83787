"""The tiny ViLT of the published vectors, in eager PyTorch."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ViltForQuestionAnswering

from pumer_compile import Schedule

FOLDER = Path(__file__).parents[1] / "oracle" / "vilt-tiny"


CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())


EXPECTED = dict(np.load(FOLDER / "expected.npz"))


TEXT = 40


IMAGE = 145


@functools.cache
def model() -> ViltForQuestionAnswering:
    return ViltForQuestionAnswering.from_pretrained(FOLDER, attn_implementation="eager").eval()


def inputs(padded: bool = True, text: int = TEXT, batch: int = 4) -> dict[str, Tensor]:
    arrays = np.load(FOLDER / "inputs.npz")
    found = {name: torch.from_numpy(arrays[name])[:batch] for name in arrays}
    found["pixel_values"] = found["pixel_values"].float()
    for name in ("input_ids", "attention_mask"):
        found[name] = found[name][:, :text]
    if not padded:
        found["attention_mask"] = torch.ones_like(found["attention_mask"])
    return found


def schedule(name: str, semantics: str = "reference") -> Schedule:
    case = CASES[name]
    merge = {"image": case["merge_image"], "text": case["merge_text"]}
    return Schedule(semantics=semantics, layers=case["layers"], prune=case["prune"], merge=merge)
