"""Numbers near 0 and 1, which onnxscript's optimizer takes for 0 and 1.

It leaves `x + c` and `x - c` out where `c` is within 1e-8 of 0, and `x * c` and `x / c` where it is within 1e-5 of 1. A
sum of small numbers may well be below 1e-8, and then such an addend decides: in the published masked softmax (eps /
keys, below 1e-8 from 100 keys on), or before a division by a norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from onnxscript.rewriter import _matcher

from ..errors import ExportError


@contextmanager
def small_numbers_kept() -> Iterator[None]:
    """Within the block onnxscript's patterns match 0 and 1 where a constant is exactly that.

    Raises:
        ExportError: a version of onnxscript whose matcher is another one.
    """
    matcher = getattr(_matcher, "SimplePatternMatcher", None)
    original = getattr(matcher, "_match_constant", None)
    if matcher is None or original is None:
        raise ExportError(
            "This version of onnxscript matches constants in another way, and would leave small numbers out of the "
            "graph. Install one that is tested: pip install -c constraints.txt onnxscript."
        )

    def exactly(self: Any, pattern: Any, value: Any) -> Any:
        wanted, constant = pattern._value, value.const_value
        if isinstance(wanted, int | float) and wanted in (0, 1) and constant is not None and constant.size == 1:
            found = constant.numpy().item()
            if found != wanted:
                return self.fail(f"Constant value mismatch: expected exactly {wanted}, got {found}.")
        return original(self, pattern, value)

    with mock.patch.object(matcher, "_match_constant", exactly):
        yield
