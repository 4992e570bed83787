"""Models that were tried: what ships of docs/architectures.md, written by `benchmarks/architectures.py`."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def architectures() -> list[dict[str, Any]]:
    """Of each model: `name`, `class` and `size`; `reduced` (where, or '') and `ratio` (how many times fewer
    multiply-adds, or 0), or `refused` (why)."""
    text = files(__package__).joinpath("architectures.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found
