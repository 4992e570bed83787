"""What measurements prove, on times that are made up."""

from __future__ import annotations

import numpy as np
import pytest

from pumer_compile.bench.bench import BenchReport, Measurement
from pumer_compile.bench.spread import factor_interval, spread

pytestmark = pytest.mark.fast


def test_spread_is_of_the_inner_tenths() -> None:
    assert spread([10.0] * 20) == 0
    times = list(range(1, 102))  # the 10th percentile is 11, the median 51, the 90th 91
    assert spread(times) == pytest.approx(80 / 51)


def test_an_interval_holds_the_factor_and_is_narrow_where_times_are() -> None:
    generator = np.random.default_rng(1)
    slow, fast = 2 + 0.01 * generator.random(60), 1 + 0.01 * generator.random(60)
    low, high = factor_interval(slow, fast)
    assert low < 2.0 < high + 0.02 and high - low < 0.02
    wide = factor_interval(2 + 3 * generator.random(60), 1 + 3 * generator.random(60))
    assert wide[1] - wide[0] > 0.2


def test_rounds_that_were_slow_for_both_say_nothing() -> None:
    """A burst hits the calls of one round alike: resampled as pairs, the factor stays."""
    burst = np.where(np.arange(40) % 2, 10.0, 1.0)
    low, high = factor_interval(1.5 * burst, burst)
    assert (low, high) == pytest.approx((1.5, 1.5))


def test_what_is_not_proved_is_said() -> None:
    same, noisy = [1.0, 1.1, 1.0, 1.1] * 5, [0.9, 3.0, 1.0, 1.3] * 5
    report = BenchReport({}, {}, {}, [Measurement("a", 1, same, None), Measurement("b", 1, noisy, None)])
    (one,) = report.comparisons()
    assert not one.proved and one.low <= 1 < one.high
    told = " ".join(report.warnings())
    assert "do not tell which of a and b" in told and "times of b" in told and "times of a " not in told
    twice = BenchReport({}, {}, {}, [Measurement("a", 1, same, None), Measurement("b", 1, [2.2] * 20, None)])
    assert twice.comparisons()[0].proved and twice.warnings() == []
