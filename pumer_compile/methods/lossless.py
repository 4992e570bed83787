"""`method: lossless`: no reducer, the exact passes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from .base import Method


class Lossless(Method):
    """Leaves out what no output needs; the outputs are the model's."""

    exact = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lossless": {}}

    method: Literal["lossless"] = "lossless"
    semantics: Literal["reference"] = "reference"
    outputs: Literal["refused"] = "refused"
