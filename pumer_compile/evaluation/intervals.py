"""Confidence intervals of shares, means and differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Z = 1.959963984540054
"""Of 95%, two-sided."""
RESAMPLES = 10_000


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95% interval of a share by Wilson's score (1927), which is right near 0 and 1 too.

    Args:
        right: successes.
        of: trials, at least one.
    """
    share, square = right / of, Z * Z
    middle = (share + square / (2 * of)) / (1 + square / of)
    half = Z / (1 + square / of) * math.sqrt(share * (1 - share) / of + square / (4 * of * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Array, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of a mean, over resampled samples.

    Args:
        values: `[samples]`; of a difference, those of each sample, so that it is paired.
        seed: of the resampling.
    """
    generator, count = np.random.default_rng(seed), len(values)
    means = np.concatenate([values[generator.integers(0, count, (rows, count))].mean(1) for rows in _blocks(count)])
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _blocks(count: int) -> list[int]:
    """Resamples at a time, so that no block needs more than some 100 MB."""
    rows = max(1, min(RESAMPLES, 10_000_000 // count))
    return [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
