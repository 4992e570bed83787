"""Intervals, held against published figures and against what resampling gives by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pumer_compile.evaluation.intervals import bootstrap, wilson

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I: the score method without continuity correction.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(right: int, of: int, low: float, high: float) -> None:
    assert wilson(right, of) == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_own_equation() -> None:
    """Its ends are the shares from which the observed one is 1.96 standard errors away."""
    for right, of in ((7, 10), (480, 500), (3, 1000)):
        for end in wilson(right, of):
            error = (end * (1 - end) / of) ** 0.5
            assert abs(right / of - end) == pytest.approx(1.959964 * error, rel=1e-5)


def test_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(values) == (low, high)  # the same on every run


def test_bootstrap_of_a_difference_is_paired() -> None:
    """Hard samples are hard for both: only where they differ counts."""
    hard = np.random.default_rng(4).random(200) < 0.5
    other = hard.copy()
    other[:2] = ~other[:2]
    low, high = bootstrap(other.astype(float) - hard.astype(float))
    assert high - low < 0.04
    assert bootstrap(np.zeros(50)) == (0.0, 0.0)
