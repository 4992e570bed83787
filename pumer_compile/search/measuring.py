"""Finalists under a runtime: latency, taking turns with the unreduced model, and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..bench.bench import bench
from ..errors import PumerError
from ..exporters import export
from ..methods.base import Method
from ..reduce import Analysed
from .objective import Result

ITERATIONS, WARMUP = 25, 5
UNREDUCED = "unreduced"


@dataclass(frozen=True)
class Measured:
    """An artifact.

    Attributes:
        number: of the trial; None of the unreduced model.
        milliseconds: median of a call.
        memory: bytes; None where the system does not tell.
        provider: what executed it.
        note: why it was not measured.
    """

    number: int | None
    milliseconds: float
    memory: int | None
    provider: str
    note: str = ""


def measure(analysed: Analysed, results: Sequence[Result], suffix: str, stage: Callable[[str], None]) -> list[Measured]:
    """Export the unreduced model and some schedules, unproved, into a folder that is removed again, and let them take
    turns on made-up inputs.

    Args:
        analysed: captured.
        results: of the schedules.
        suffix: of the artifacts.
        stage: told what is going on.

    Returns:
        The unreduced model first; a schedule that does not export has a note.
    """
    with tempfile.TemporaryDirectory(prefix="pumer-search-") as folder:
        paths: dict[str, int | None] = {}
        found: list[Measured] = []
        first = Path(folder) / f"{UNREDUCED}{suffix}"
        stage("exporting the unreduced model")
        export(analysed.program, first, verify=False)
        paths[str(first)] = None
        for result in results:
            stage(f"exporting finalist {result.number}")
            path = Path(folder) / f"trial{result.number}{suffix}"
            try:
                export(analysed.reduce(Method(**result.schedule)), path, verify=False)
                paths[str(path)] = result.number
            except PumerError as error:
                found.append(Measured(result.number, float("nan"), None, "", str(error)[:300]))
        stage("measuring finalists")
        report = bench(list(paths), iterations=ITERATIONS, warmup=WARMUP, progress=lambda text: None)
    rows = [
        Measured(paths[row.artifact], row.percentile(50), row.peak_memory, report.artifacts[row.artifact]["provider"])
        for row in report.measurements
    ]
    return rows + found
