"""ONNX optimizations that runtimes miss. Exact; for any model.

Each is an `onnx_ir` pass in a file of its own, with what it gains where it was measured
(`benchmarks/graph_optimizations.py`). `artifacts/options.py` says which of them run for a target; `--onnx-passes`
(`OnnxOptions.onnx_passes`) chooses others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import onnx_ir

from ...artifacts.options import DEFAULT_PASSES as DEFAULT_PASSES
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
