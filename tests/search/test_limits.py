"""Limits as a user writes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pumer_compile.errors import UsageError
from pumer_compile.search.limits import Limits, bytes_of, milliseconds, share

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (share, "0.5", 0.5),
        (share, "50%", 0.5),
        (share, "1%", 0.01),
        (share, "0", 0.0),
        (milliseconds, "50ms", 50.0),
        (milliseconds, "0.05s", 50.0),
        (milliseconds, "50", 50.0),
        (milliseconds, "800us", 0.8),
        (bytes_of, "2GiB", 2 * 2**30),
        (bytes_of, "500MB", 500_000_000),
        (bytes_of, "1.5 kib", 1536),
    ],
)
def test_what_is_read(read: Callable[[str, str], float], text: str, value: float) -> None:
    assert read(text, "--limit") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (share, "1.5"),
        (share, "-0.1"),
        (share, "150%"),
        (share, "half"),
        (milliseconds, "0ms"),
        (milliseconds, "5 minutes"),
        (milliseconds, "1.2.3ms"),
        (bytes_of, "2"),
        (bytes_of, "2 GiBs"),
    ],
)
def test_what_is_refused(read: Callable[[str, str], float], text: str) -> None:
    with pytest.raises(UsageError, match="--limit") as refused:
        read(text, "--limit")
    assert text in str(refused.value)


def test_limits_in_words() -> None:
    assert Limits().described == "none"
    assert not Limits(multiply_adds=0.5, max_drop=0.01).measured
    both = Limits(latency=50.0, memory=2**31)
    assert both.measured and "50 ms" in both.described and "2048 MiB" in both.described
