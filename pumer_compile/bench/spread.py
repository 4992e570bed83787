"""Whether measurements say anything: how much calls differ among themselves, and what that leaves of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
WIDE = 0.5
"""Of the median: a spread above which the machine was busy with something else."""


def spread(milliseconds: Sequence[float]) -> float:
    """The range from the 10th to the 90th percentile, as a share of the median."""
    low, middle, high = np.percentile(milliseconds, (10, 50, 90))
    return float((high - low) / middle)


def factor_interval(slower: Sequence[float], faster: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the factor between two medians; rounds are resampled, in which both were called.

    Args:
        slower, faster: milliseconds by round.
        seed: of the resampling.
    """
    count = min(len(slower), len(faster))
    rounds = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    medians = [np.median(np.asarray(times)[rounds], axis=1) for times in (slower, faster)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return float(low), float(high)
