"""What a search leaves: the schedule with how it was found, every trial as JSON, and the front as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import atomic_path
from ..methods.base import Method
from .objective import front
from .study import Found

FORMAT = 1


def write_schedule(path: Path, found: Found, command: str) -> None:
    """The best schedule as YAML; a comment says how it was found.

    Args:
        path: of the file.
        found: with a best result.
        command: with which.
    """
    assert found.best is not None and found.schedule is not None
    lines = [*_told(found), f"Command: {command}"]
    text = "".join(f"# {line}\n" for line in lines) + found.schedule.to_yaml() + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    Method.load(path)  # what is written can be read


def _told(found: Found) -> list[str]:
    best = found.best
    assert best is not None
    names = {"accuracy": "accuracy", "metric": "metric", "agreement": "agreement with the unreduced model"}
    lines = [
        f"Found by pumer-compile search: trial {best.number} of {len(found.results)} ({found.judged} judged), "
        f"stage {best.stage}.",
        f"Multiply-adds: {best.multiply_adds:.4f} of the unreduced model's ({1 / best.multiply_adds:.2f}x fewer).",
        f"{names[found.measure].capitalize()} on {found.samples} samples: {best.value:.4f}, unreduced "
        f"{found.baseline:.4f}. It was chosen on these samples: check it on others.",
        f"Limits: {found.limits.described}.",
    ]
    rows = {row.number: row for row in found.measured}
    if best.number in rows and None in rows:
        row, whole = rows[best.number], rows[None]
        lines.append(
            f"{row.provider}: {row.milliseconds:.3g} ms a call (median), unreduced {whole.milliseconds:.3g} ms."
        )
    if found.interrupted:
        lines.append("The search was interrupted.")
    return lines


def write_trials(path: Path, found: Found) -> None:
    """Every trial, sensitivities and measurements as JSON."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "limits": {key: value for key, value in vars(found.limits).items() if value is not None},
        "measure": found.measure,
        "baseline": found.baseline,
        "samples": found.samples,
        "seconds": round(found.seconds, 1),
        "interrupted": found.interrupted,
        "best": None if found.best is None else found.best.number,
        "why_not": found.why_not,
        "sensitivities": [
            {"name": s.number.name, "value": s.value, "saved": s.saved, "lost": s.lost} for s in found.sensitivities
        ],
        "measured": [{k: v for k, v in vars(row).items() if v == v} for row in found.measured],
        "front": [result.number for result in front(found.results)],
        "trials": [result.to_dict() for result in found.results],
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_plot(path: Path, found: Found) -> None:
    """The trials by cost and drop, the front among them, and what was taken.

    Raises:
        UsageError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("A plot needs matplotlib: pip install 'pumer-compile[search]'.") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    looks = {
        "hopeless": ("given up", "x", "#b0b0b0"),
        "done": ("judged", "o", "#7aa6d6"),
    }
    for state, (label, marker, colour) in looks.items():
        rows = [r for r in found.results if r.state == state]
        costs, drops = [r.multiply_adds for r in rows], [r.drop for r in rows]
        axes.scatter(costs, drops, s=18, c=colour, marker=marker, label=label)
    best = front(found.results)
    axes.step(
        [r.multiply_adds for r in best], [r.drop for r in best], "-", where="post", color="#1f5fa8", label="front"
    )
    if found.best is not None:
        axes.scatter(
            [found.best.multiply_adds], [found.best.drop], s=110, c="#d62728", marker="*", label="taken", zorder=3
        )
    if found.limits.max_drop is not None:
        axes.axhline(found.limits.max_drop, color="#d62728", linewidth=0.8, linestyle="--", label="drop allowed")
    if found.limits.multiply_adds is not None:
        axes.axvline(found.limits.multiply_adds, color="#d62728", linewidth=0.8, linestyle=":", label="cost allowed")
    axes.set_xlabel("multiply-adds, share of the unreduced model's")
    axes.set_ylabel(f"drop of {found.measure}")
    axes.set_title(f"{found.judged} schedules on {found.samples} samples")
    axes.legend(fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
