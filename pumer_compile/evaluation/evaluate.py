"""Accuracy of an artifact, of the unreduced model, and of controls at the same cost, with confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifacts.engine import Engine
from ..capture.capture import Program
from ..errors import UsageError
from ..files import atomic_path
from ..inspection.outline import look
from ..reduce import Analysed
from ..search.quality import Judge, Metric, Quality, outputs_of
from ..search.samples import Samples
from .controls import controls_of
from .intervals import bootstrap, wilson

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One model on all samples.

    Attributes:
        name: `reduced`, `unreduced`, or a control's.
        multiply_adds: share of the unreduced model's; 1 where it is not reduced.
        value: accuracy, agreement or metric.
        low, high: of its 95% interval; None where a metric judges.
        difference: from the unreduced model.
        difference_low, difference_high: of its 95% interval, paired; None where a metric judges.
        schedule: keys; None of the unreduced model.
        note: why it was not judged.
    """

    name: str
    multiply_adds: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    schedule: dict[str, Any] | None = None
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        artifact: its path.
        measure: `accuracy`, `agreement` or `metric`.
        samples: how many.
        interval: how that of each value was made: `Wilson`, `bootstrap`, or '' where there is none.
        rows: the artifact, the unreduced model, controls.
    """

    artifact: str
    measure: str
    samples: int
    interval: str
    rows: tuple[Row, ...]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def evaluate(
    artifact: Path,
    program: Program,
    samples: Samples,
    *,
    output: str | None = None,
    metric: Metric | None = None,
    provider: str | None = None,
    controls: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Judge an artifact under its runtime, and the rest in eager PyTorch, on the same samples.

    Args:
        artifact: made by pumer-compile from the model.
        program: the model, captured with `samples.first`.
        samples: in batches that the artifact takes.
        output, metric: see `Judge`.
        provider: for ONNX.
        controls: whether controls are judged too.
        progress: told what is going on.

    Raises:
        UsageError: an artifact that is not reduced or takes other inputs; see `Judge`.
    """
    engine = Engine(artifact, provider=provider)
    plan = engine.manifest.get("plan")
    if not plan:
        raise UsageError(f"{artifact} is not reduced, so there is nothing to evaluate beside the unreduced model.")
    progress("running the unreduced model")
    judge = Judge(samples, outputs_of(program.module), output=output, metric=metric)
    whole = plan["multiply_adds"]["before"]
    progress("running the artifact")
    quality = judge.judge(_running(engine))
    share = plan["multiply_adds"]["after"] / whole
    rows = [_row("reduced", share, quality, judge, engine.manifest["schedule"])]
    rows.append(_row("unreduced", 1.0, judge.baseline, judge, None))
    if controls:
        analysed = Analysed(program)
        progress("looking for controls of the same cost")
        at = plan["sites"][0]["site"].partition("@")[0] if plan["sites"] else None
        for run in controls_of(analysed, look(analysed).outline, plan["multiply_adds"]["after"], at):
            progress(f"running {run.name}")
            if run.reduced is None:
                rows.append(Row(run.name, float("nan"), note=run.note))
                continue
            cost = run.reduced.plan.multiply_adds_after / whole
            keys = run.reduced.schedule.model_dump(mode="json", exclude_none=True)
            rows.append(_row(run.name, cost, judge.judge(outputs_of(run.reduced.module)), judge, keys))
    rows = [row if row.multiply_adds == row.multiply_adds else replace(row, multiply_adds=0.0) for row in rows]
    return Evaluation(str(artifact), judge.measure, samples.count, _interval(judge), tuple(rows))


def _running(engine: Engine) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    def run(batch: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(array)) for name, array in engine.run(batch).items()}

    return run


def _interval(judge: Judge) -> str:
    scores = judge.baseline.scores
    if not len(scores):
        return ""
    return "Wilson" if judge.samples.labels is None or judge.samples.labels.ndim == 1 else "bootstrap"


def _row(name: str, share: float, quality: Quality, judge: Judge, schedule: dict[str, Any] | None) -> Row:
    found = Row(name, share, quality.value, difference=-quality.drop, schedule=schedule)
    scores = quality.scores
    if not len(scores):
        return found
    low, high = wilson(int(scores.sum()), len(scores)) if _interval(judge) == "Wilson" else bootstrap(scores)
    lower, upper = bootstrap(scores - judge.baseline.scores)
    return replace(found, low=low, high=high, difference_low=lower, difference_high=upper)
