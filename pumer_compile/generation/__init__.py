"""Generate with a reduced prompt: the prefill as one artifact, one step of decoding as another, and a small loop; or
`torch.compile` and transformers' own `generate`."""

from __future__ import annotations

from .captured import reduced_forward
from .decode import export_decode
from .forward import whole_forward
from .loop import Generator

__all__ = ["Generator", "export_decode", "reduced_forward", "whole_forward"]
