"""How good a reduced model is: by labels, by a metric of the user's, or by agreement with the unreduced model."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.exporters.utils import get_leaf_tensors

from ..errors import UsageError
from .samples import Array, Samples

Run = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
"""From a batch to outputs by name."""
Metric = Callable[[dict[str, Array], Array | None], float]
"""From outputs of all samples by name, and labels, to a number of which more is better."""
CONFIDENT = 2.0
"""Standard errors within which a result may still turn out well."""


class Hopeless(Exception):
    """The samples so far say that the rest cannot save it."""

    def __init__(self, drop: float, samples: int) -> None:
        super().__init__(f"a drop of about {drop:.3f} after {samples} samples")
        self.drop, self.samples = drop, samples


@dataclass(frozen=True)
class Quality:
    """Of one schedule.

    Attributes:
        value: of the measure; more is better.
        drop: how much less than the unreduced model's.
        divergence: mean Kullback-Leibler divergence of the unreduced model's answers from these, in nats; NaN where
            a metric judges.
        scores: of each sample, where the measure is their mean; else empty.
    """

    value: float
    drop: float
    divergence: float
    scores: Array = field(repr=False)


def outputs_of(module: Callable[..., Any]) -> Run:
    """Calls a module; its outputs by name."""

    def run(batch: dict[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            return dict(get_leaf_tensors(module(**batch)))

    return run


class Judge:
    """Compares schedules with the unreduced model on the same samples.

    Args:
        samples: with labels or without.
        unreduced: the model.
        output: what holds the scores of answers, `[samples, answers]`, or `[samples, tokens, words]`, of which the last
            token counts; None: `logits`, or the only such output.
        metric: judges in place of labels.

    Raises:
        UsageError: no such output; labels of more answers than it has; a metric that fails.
    """

    def __init__(
        self, samples: Samples, unreduced: Run, *, output: str | None = None, metric: Metric | None = None
    ) -> None:
        self.samples, self.metric, self._output = samples, metric, output
        self._reference: Array = np.zeros((0, 0))
        self.measure = "metric" if metric else "accuracy" if samples.labels is not None else "agreement"
        if metric is not None:
            self.baseline = Quality(self._measured(self._all(unreduced)), 0.0, math.nan, np.zeros(0))
            return
        answers = [self._answers(outputs, count) for outputs, count in self._each(unreduced)]
        self._reference = np.concatenate(answers)
        scores = self._scores(self._reference, 0)
        self.baseline = Quality(float(scores.mean()), 0.0, 0.0, scores)

    def judge(self, run: Run, hopeless: Callable[[float], bool] | None = None) -> Quality:
        """Judge a reduced model.

        Args:
            run: calls it.
            hopeless: whether a drop, the smallest that the samples so far make likely, rules it out.

        Raises:
            Hopeless: it was ruled out before all samples were seen.
            UsageError: see `Judge`.
        """
        if self.metric is not None:
            value = self._measured(self._all(run))
            return Quality(value, self.baseline.value - value, math.nan, np.zeros(0))
        scores, divergences, start = [], [], 0
        for outputs, count in self._each(run):
            answers = self._answers(outputs, count)
            scores.append(self._scores(answers, start))
            divergences.append(divergence(self._reference[start : start + count], answers))
            start += count
            lost = self.baseline.scores[:start] - np.concatenate(scores)
            least = float(lost.mean()) - CONFIDENT * float(lost.std()) / math.sqrt(start)
            if hopeless is not None and self.samples.count // 5 <= start < self.samples.count and hopeless(least):
                raise Hopeless(float(lost.mean()), start)
        found = np.concatenate(scores)
        value = float(found.mean())
        return Quality(value, self.baseline.value - value, float(np.concatenate(divergences).mean()), found)

    def _each(self, run: Run) -> Any:
        for batch, count in self.samples.batches():
            yield run(batch), count

    def _answers(self, outputs: Mapping[str, Tensor], count: int) -> Array:
        return answers_of(outputs, self._output)[:count]

    def _scores(self, answers: Array, start: int) -> Array:
        """What each answer is worth: right or wrong, by labels, or whether it is the unreduced model's."""
        labels, given = self.samples.labels, answers.argmax(-1)
        if labels is None:
            return np.asarray(given == self._reference[start : start + len(given)].argmax(-1), dtype=np.float64)
        rows = labels[start : start + len(given)]
        wanted = int(rows.max()) + 1 if rows.ndim == 1 else rows.shape[1]
        if wanted > answers.shape[1]:
            raise UsageError(
                f"The labels know {wanted} answers, and the model's output has {answers.shape[1]}: they belong to "
                "another model, or --answers names another of its outputs."
            )
        return np.asarray(given == rows if rows.ndim == 1 else rows[np.arange(len(given)), given], dtype=np.float64)

    def _all(self, run: Run) -> dict[str, Array]:
        """Outputs of all samples."""
        parts: dict[str, list[Array]] = {}
        for outputs, count in self._each(run):
            for name, tensor in outputs.items():
                parts.setdefault(name, []).append(tensor.float().numpy()[:count] if tensor.ndim else tensor.numpy())
        return {name: np.concatenate(several) for name, several in parts.items() if several[0].ndim}

    def _measured(self, outputs: dict[str, Array]) -> float:
        assert self.metric is not None
        try:
            value = float(self.metric(outputs, self.samples.labels))
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise UsageError(
                f"The metric failed with {type(error).__name__}: {line}. It is called with the outputs by name "
                f"({', '.join(f'{n} {list(a.shape)}' for n, a in list(outputs.items())[:4])}) and the labels or None, "
                "and gives a number."
            ) from error
        if not math.isfinite(value):
            raise UsageError(f"The metric gave {value}; it must give a finite number, of which more is better.")
        return value


def answers_of(outputs: Mapping[str, Tensor], name: str | None = None) -> Array:
    """Scores of answers, float64 `[samples, answers]`, from a model's outputs.

    Args:
        outputs: by name.
        name: of the one to take; None: see `Judge`.

    Raises:
        UsageError: there is no such output, or several that could be meant.
    """
    fitting = {n: t for n, t in outputs.items() if t.is_floating_point() and t.ndim in (2, 3)}
    if name is None:
        name = "logits" if "logits" in fitting or len(fitting) != 1 else next(iter(fitting))
    if name not in outputs:
        raise UsageError(
            f"The model has no output {name}; it gives {', '.join(outputs)}. Say which one holds the scores of answers "
            "with --answers, or judge by a --metric of your own."
        )
    scores = outputs[name].detach().double()
    scores = scores[:, -1] if scores.ndim == 3 else scores.reshape(len(scores), -1)
    if scores.shape[1] == 1:  # yes or no
        scores = torch.cat([torch.zeros_like(scores), scores], 1)
    return np.asarray(scores.numpy())


def divergence(reference: Array, answers: Array) -> Array:
    """Kullback-Leibler divergence of each row of answers from the reference's, in nats."""
    p, q = (np.asarray(torch.log_softmax(torch.from_numpy(x), -1).numpy()) for x in (reference, answers))
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def load_metric(text: str) -> Metric:
    """A function from `pkg.module:function`; the current folder is looked in as well.

    Raises:
        UsageError: there is none.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise UsageError(f"--metric {text!r} is not of the form pkg.module:function.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise UsageError(f"--metric {text!r} cannot be loaded: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise UsageError(f"--metric {text!r} is {type(found).__name__}, not a function.")
    metric: Metric = found
    return metric
