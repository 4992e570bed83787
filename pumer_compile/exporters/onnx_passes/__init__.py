"""ONNX optimizations that runtimes miss. Exact; for any model.

Each is an `onnx_ir` pass in a file of its own, with what it gains where it was measured
(`benchmarks/graph_optimizations.py`). `DEFAULT_PASSES` says which of them run for a target; `--onnx-passes`
(`OnnxOptions.onnx_passes`) chooses others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import onnx_ir

from .attention import ScaleQueries
from .projections import JoinProjections
from .rows import TokensAsRows
from .strides import PadStrides

log = logging.getLogger("pumer_compile")

ONNX_PASSES: Mapping[str, type[onnx_ir.passes.InPlacePass]] = {
    "projections": JoinProjections,
    "rows": TokensAsRows,
    "strides": PadStrides,
    "attention": ScaleQueries,
}
"""Every pass by name, in the order in which they run."""
DEFAULT_PASSES: Mapping[str | None, tuple[str, ...]] = {
    None: ("strides",),
    "onnxruntime-cpu": ("strides",),
    "onnxruntime-cuda": (),
    "tensorrt": ("attention",),
}
"""What runs for a target where nothing else is asked for. Portable models are made for the processor they are proved
on."""


def run_onnx_passes(model: onnx_ir.Model, names: Iterable[str]) -> None:
    """Run passes on a model, in place.

    Args:
        model: valid, with known shapes, its nodes named after their modules.
        names: of `ONNX_PASSES`.
    """
    chosen = set(names)
    for name, kind in ONNX_PASSES.items():
        if name in chosen:
            before = model.graph.num_nodes()
            modified = kind()(model).modified
            log.info("ONNX pass %s: %d nodes, %d now", name, before, model.graph.num_nodes() if modified else before)
