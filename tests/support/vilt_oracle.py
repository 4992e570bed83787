"""What the published implementation computes on a tiny ViLT, as a command takes and gives it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ORACLE = Path(__file__).parents[1] / "oracle" / "vilt-tiny"


CASES = json.loads((ORACLE / "cases.json").read_text(encoding="utf-8"))


EXPECTED = dict(np.load(ORACLE / "expected.npz"))


def write_schedule(case: str, path: Path) -> Path:
    spec = CASES[case]
    merge = f"{{image: {spec['merge_image']}, text: {spec['merge_text']}}}"
    path.write_text(
        f"semantics: reference\nlayers: {spec['layers']}\nprune: {spec['prune']}\nmerge: {merge}\n", encoding="utf-8"
    )
    return path


def given(padding: str) -> dict[str, np.ndarray]:
    arrays = dict(np.load(ORACLE / "inputs.npz"))
    arrays["pixel_values"] = arrays["pixel_values"].astype(np.float32)
    if padding == "unpadded":
        arrays["attention_mask"] = np.ones_like(arrays["attention_mask"])
    return arrays
