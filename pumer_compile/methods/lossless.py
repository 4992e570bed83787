"""`method: lossless`: no reducer, the exact passes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from .about import About
from .base import Method


class Lossless(Method):
    """Leaves out what no output needs; the outputs are the model's."""

    about = About(
        does="no token goes; what no output needs is not computed",
        reads="nothing",
        use="where outputs must be the model's own",
        held="the model itself",
    )

    exact = True
    wants = "nothing: no token goes"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lossless": {}}

    method: Literal["lossless"] = "lossless"
    semantics: Literal["reference"] = "reference"
    outputs: Literal["refused"] = "refused"
