"""Which result is taken: within the limits the cheapest, or, where no drop was given, the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..errors import UsageError
from ..reduce import Analysed
from .limits import Limits
from .measuring import Measured, measure
from .objective import Result, front


def best_of(results: Sequence[Result], limits: Limits) -> Result | None:
    """The best result by what the plan and the samples say; limits of a runtime are not known here."""
    fitting = [r for r in results if r.state == "done" and r.multiply_adds < 1 and _within(r, limits)]
    return min(fitting, key=lambda r: _order(r, limits), default=None)


def _within(result: Result, limits: Limits) -> bool:
    cheap = limits.multiply_adds is None or result.multiply_adds <= limits.multiply_adds
    return cheap and (limits.max_drop is None or result.drop <= limits.max_drop)


def _order(result: Result, limits: Limits) -> tuple[float, float, int]:
    """With a drop that is allowed, cheap comes first; else what is lost does."""
    lost = (result.drop, 0.0 if math.isnan(result.divergence) else result.divergence)
    if limits.max_drop is not None:
        return (result.multiply_adds, lost[0], result.number)
    return (lost[0] + lost[1] * 1e-9, result.multiply_adds, result.number)


def choose(
    results: Sequence[Result],
    limits: Limits,
    analysed: Analysed,
    *,
    finalists: int,
    measured: bool,
    suffix: str,
    stage: Callable[[str], None],
) -> tuple[Result, list[Measured]]:
    """The result that is taken, and what a runtime said of those that came close.

    Args:
        results: of all trials.
        limits: to meet.
        analysed: the captured model.
        finalists: how many are measured.
        measured: whether any are where no limit asks for it.
        suffix: of their artifacts.
        stage: told what is going on.

    Raises:
        UsageError: none meets the limits; the nearest is named.
    """
    fitting = [r for r in front(list(results)) if _within(r, limits) and r.multiply_adds < 1]
    if not fitting:
        raise UsageError(_unreachable(results, limits))
    fitting.sort(key=lambda r: _order(r, limits))
    if not (limits.measured or measured):
        return fitting[0], []
    if limits.measured and limits.max_drop is None:
        # What loses least is dear: the limit lies somewhere along the front.
        fitting.sort(key=lambda r: r.multiply_adds)
        step = max(1, (len(fitting) - 1) // max(1, finalists - 1))
        fitting = fitting[::step]
    rows = measure(analysed, fitting[:finalists], suffix, stage)
    by_number = {row.number: row for row in rows}
    meeting = [r for r in fitting[:finalists] if _meets(by_number[r.number], limits)]
    if not meeting:
        raise UsageError(_too_slow(rows, limits))
    return min(meeting, key=lambda r: _order(r, limits)), rows


def _meets(row: Measured, limits: Limits) -> bool:
    fast = limits.latency is None or row.milliseconds <= limits.latency
    small = limits.memory is None or (row.memory is not None and row.memory <= limits.memory)
    return not row.note and fast and small


def _unreachable(results: Sequence[Result], limits: Limits) -> str:
    judged = [r for r in results if r.state == "done" and r.multiply_adds < 1]
    seen = [r for r in results if r.state in ("done", "dear", "hopeless") and r.multiply_adds < 1]
    begin = f"No schedule of {len(results)} tried meets the limits ({limits.described})."
    if limits.max_drop is not None and (cheap := [r for r in judged if r.drop <= limits.max_drop]):
        near = min(cheap, key=lambda r: r.multiply_adds)
        return f"{begin} The nearest that loses no more has {near.multiply_adds:.3f} of the multiply-adds."
    fitting = [r for r in judged if limits.multiply_adds is None or r.multiply_adds <= limits.multiply_adds]
    if fitting:
        near = min(fitting, key=lambda r: (r.drop, r.multiply_adds))
        return (
            f"{begin} The nearest has a drop of {near.drop:.4g} at {near.multiply_adds:.3f} of the multiply-adds: "
            "raise --max-drop, or search longer (--trials)."
        )
    if seen:
        cheapest = min(seen, key=lambda r: r.multiply_adds)
        lost = "" if math.isnan(cheapest.drop) else f", with a drop of {cheapest.drop:.4g}"
        return f"{begin} The cheapest has {cheapest.multiply_adds:.3f} of the multiply-adds{lost}."
    return f"{begin} None could be judged: {next((r.note for r in results if r.note), 'nothing was reduced')}."


def _too_slow(rows: Sequence[Measured], limits: Limits) -> str:
    reduced = [row for row in rows if row.number is not None and not row.note]
    if not reduced:
        return f"No finalist could be exported: {next((row.note for row in rows if row.note), '')}"
    unreduced = next(row for row in rows if row.number is None)
    fastest = min(reduced, key=lambda row: row.milliseconds)
    parts = [f"the fastest takes {fastest.milliseconds:.3g} ms (unreduced {unreduced.milliseconds:.3g} ms)"]
    sizes = [row.memory for row in reduced if row.memory is not None]
    if limits.memory is not None:
        parts.append(
            f"the smallest needs {min(sizes) / 2**20:.0f} MiB" if sizes else "the system does not tell their memory"
        )
    return (
        f"No finalist meets the limits ({limits.described}): {' and '.join(parts)}. Allow more, or a larger drop "
        "(--max-drop), or take more finalists (--finalists)."
    )
