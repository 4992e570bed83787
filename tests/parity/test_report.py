"""What a failed report advises: a tolerance only where one would let it pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from pumer_compile.parity.report import OutputReport, ParityReport, ReducerReport

pytestmark = pytest.mark.fast


def report(error: float = 1.0, **changes: Any) -> ParityReport:
    """Of one reducer and one output, which is off by `error`."""
    output = OutputReport("logits", "forced", True, 1e-4, 1e-4)
    eager = np.ones((2, 5))
    output.add(eager + error, eager)
    found = ParityReport("m.onnx", "float32", "CPUExecutionProvider", samples=2, end_to_end=2, end_to_end_required=True)
    found.outputs, found.reducers = [output], [ReducerReport("reducer.a", samples=2)]
    return dataclasses.replace(found, **changes)


def test_an_error_that_is_too_large() -> None:
    assert report().only_too_far and not report().passed
    assert not report(error=1e-6).only_too_far and report(error=1e-6).passed


ADRIFT = {
    "a decision": {"reducers": [ReducerReport("reducer.a", samples=2, differ=1, worst_margin=0.1)]},
    "a decision that cannot be": {"reducers": [ReducerReport("reducer.a", fault="has another shape")]},
    "a shape": {"faults": ["output logits is [2, 4], eager PyTorch's [2, 5]"]},
    "no sample end to end": {"end_to_end": 0},
    "not a number": {"outputs": [OutputReport("logits", "forced", True, 1e-4, 1e-4, samples=2, finite=False)]},
    "the captured graph": {
        "outputs": [OutputReport("logits", "model", True, 1e-4, 1e-4, samples=2, max_abs=1.0, required_atol=1.0)]
    },
}


@pytest.mark.parametrize("changes", ADRIFT.values(), ids=ADRIFT)
def test_what_no_tolerance_mends(changes: dict[str, Any]) -> None:
    failed = report(**changes)
    assert not failed.passed and not failed.only_too_far
