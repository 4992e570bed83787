"""The report of a parity check: how much may differ, what was found, and the verdict."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..shown.tables import Shown, Table


@dataclass(frozen=True)
class Tolerance:
    """How much an artifact may differ.

    Attributes:
        atol, rtol: of every entry of an output: `|artifact - eager| <= atol + rtol * max(|eager|, rms)`, where `rms` is
            the root mean square of the sample's output. An entry near zero, among large ones, is rounded as they are.
        norm: of an output as a whole, in each sample: `|artifact - eager|_2 <= norm * |eager|_2`.
        tie: gap of two scores, relative to them, below which they count as tied.
        share: of the chosen tokens and pairs of one reducer, how many may differ at most, near-ties or not: more than a
            sound artifact was seen to have.
        decisions: whether a differing choice must be such a tie; else they are reported, and the outputs judge.
        end_to_end: whether a sample must be judged end to end. Below float32 a sound artifact may have none: of a large
            model some near-tie goes the other way in every sample.
        output_dtype: of floating-point outputs, besides float32.
    """

    atol: float
    rtol: float
    norm: float
    tie: float
    share: float
    decisions: bool = True
    end_to_end: bool = False
    output_dtype: str = "float32"


# Shares that differ, measured on sound artifacts of random weights, most with VisPruner in its published order, whose
# steps carry a near-tie on: float32 1.2% (9 of 768, all in one image), float16 up to 19% and bfloat16 up to 21% of a
# kept set (benchmarks/results/vispruner_flips.json).
TOLERANCES = {
    "float32": Tolerance(atol=1e-4, rtol=1e-4, norm=math.inf, tie=1e-5, share=0.05, end_to_end=True),
    "float16": Tolerance(atol=2e-2, rtol=2e-2, norm=5e-3, tie=3e-2, share=0.3, output_dtype="float16"),
    # Eight times coarser than float16, by its three bits less of precision.
    "bfloat16": Tolerance(atol=1.6e-1, rtol=1.6e-1, norm=4e-2, tie=2.4e-1, share=0.3),
    # Reducers choose by what quantized layers give them, so other choices are to be expected and are only reported.
    # The norm is about twice the largest error measured with the artifact's choices forced: 5.4e-2 on small models of
    # random weights, 2.5e-2 on the demo's.
    "int8": Tolerance(atol=math.inf, rtol=0, norm=1e-1, tie=1e-2, share=0.6, decisions=False),
}
"""Defaults by the artifact's dtype, or by what it is quantized to; the eager side is float32."""


# An artifact may be off by so many times the error that its precision makes in eager PyTorch,
NOISE = 2.0
# as long as that is no more than so many times the tolerance: a precision that ruins a model proves nothing.
MOST_NOISE = 10.0


def allowed(tolerance: float, noise: float | None) -> float:
    """How large an error may be: the tolerance, or twice the measured noise where that is more."""
    return tolerance if noise is None else max(tolerance, min(NOISE * noise, MOST_NOISE * tolerance))


@dataclass
class ReducerReport:
    """Decisions of one reducer over all samples.

    Attributes:
        name: its path, such as `reducer.cross_modal_2.image`.
        samples: how many were compared.
        differ: on how many any index differs from the eager model's choice on the same inputs.
        near_ties: how many of these are allowed, because the eager scores are nearly tied.
        worst_margin: largest relative score gap that was measured where a choice differs.
        chosen, flipped: tokens kept and pairs merged in all samples, as sets, and how many of them eager PyTorch does
            not choose; those of samples whose scores are equal but for rounding do not count.
        judged: whether a differing choice must be a near-tie.
        share: of the chosen ones that may differ.
        fault: why the artifact's decisions cannot be those of this reducer at all; empty where they can.
    """

    name: str
    samples: int = 0
    differ: int = 0
    near_ties: int = 0
    worst_margin: float = 0.0
    chosen: int = 0
    flipped: int = 0
    judged: bool = True
    share: float = 1.0
    fault: str = ""

    @property
    def passed(self) -> bool:
        """Whether every differing choice is a near-tie, where it must be, and there are not too many of them."""
        return not self.failure

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.passed:
            return "FAIL"
        return "not compared" if self.samples == 0 else "pass" if self.judged else "reported"

    @property
    def flip_rate(self) -> float:
        """Share of what is chosen that differs."""
        return self.flipped / self.chosen if self.chosen else 0.0

    @property
    def failure(self) -> str:
        """What is wrong, in words; empty where nothing is."""
        if self.fault:
            return self.fault
        if self.judged and self.differ != self.near_ties:
            return (
                f"decides differently on {self.differ - self.near_ties} of {self.samples} samples where the eager "
                f"scores are no near-tie (relative gap up to {self.worst_margin:.1e})"
            )
        # One near-tie is always allowed: of few choices it is a large share.
        if self.flipped > max(1.0, self.share * self.chosen):
            return (
                f"chooses {self.flipped} of {self.chosen} otherwise ({self.flip_rate:.1%}); a sound artifact differs "
                f"in at most {self.share:.0%}"
            )
        return ""


@dataclass
class OutputReport:
    """Differences of one output over samples.

    Attributes:
        name: of the output.
        against: what it is compared with: `forced` (eager with the artifact's decisions), `end_to_end`, `unreduced`, or
            `model` (the captured graph with the model's own forward).
        judged: whether it counts for the verdict.
        samples: how many were compared.
        max_abs, mean_abs, max_rel, mean_rel: errors; relative to the eager value.
        max_norm: largest error of a sample in the Euclidean norm, relative to the norm of the eager value.
        cosine: smallest cosine similarity of a sample.
        top1: share of samples with the same largest entry.
        atol, rtol, norm: the tolerance.
        required_atol: smallest `atol` that would pass with this `rtol`.
        finite: whether every value is finite.
        noise_atol, noise_norm: what eager PyTorch in the artifact's precision would need, on the same samples with the
            same decisions; None where it was not measured.
    """

    name: str
    against: str
    judged: bool
    atol: float
    rtol: float
    samples: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    max_rel: float = 0.0
    mean_rel: float = 0.0
    max_norm: float = 0.0
    norm: float = math.inf
    cosine: float = 1.0
    top1: float = 1.0
    required_atol: float = 0.0
    finite: bool = True
    noise_atol: float | None = None
    noise_norm: float | None = None

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.passed:
            return "FAIL"
        if self.samples == 0:
            return "not compared"
        return "pass" if self.judged else "reported"

    @property
    def figures(self) -> tuple[str, str]:
        """The largest error, and the largest relative to the norm; empty where nothing was compared."""
        return (f"{self.max_abs:.2e}", f"{self.max_norm:.2e}") if self.samples else ("", "")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; without numbers where nothing was compared."""
        figures = ("max_abs", "mean_abs", "max_rel", "mean_rel", "max_norm", "cosine", "top1", "required_atol")
        empty = dict.fromkeys(figures) if self.samples == 0 and self.finite else {}
        return {**asdict(self), **empty, "verdict": self.verdict}

    @property
    def passed(self) -> bool:
        """Within tolerance and finite; always true where it is not judged and finite."""
        return self.finite and (not self.judged or self.close)

    @property
    def close(self) -> bool:
        """Whether the errors are within the tolerance, or within twice what the precision itself makes."""
        atol, norm = allowed(self.atol, self.noise_atol), allowed(self.norm, self.noise_norm)
        return self.required_atol <= atol and self.max_norm <= norm

    @property
    def within_constants(self) -> bool:
        """Whether they are within the tolerance alone."""
        return self.required_atol <= self.atol and self.max_norm <= self.norm

    def add(self, artifact: np.ndarray[Any, Any], eager: np.ndarray[Any, Any]) -> None:
        """Take in one batch, `[samples, ...]` each."""
        count = artifact.shape[0]
        if count == 0:
            return
        if artifact.size == 0:  # nothing in any sample: of one shape is all that they can be
            self.samples += count
            return
        a, e = (x.reshape(count, -1).astype(np.float64) for x in (artifact, eager))
        # What both say is infinite (a score of padding) is alike.
        alike = np.isinf(e) & (a == e)
        a[alike] = e[alike] = 0
        self.finite = self.finite and bool(np.isfinite(a).all() and np.isfinite(e).all())
        if not self.finite:
            return
        error = np.abs(a - e)
        relative = error / np.maximum(np.abs(e), 1e-12)
        old, new = self.samples / (self.samples + count), count / (self.samples + count)
        self.max_abs, self.max_rel = max(self.max_abs, error.max()), max(self.max_rel, relative.max())
        self.mean_abs = old * self.mean_abs + new * error.mean()
        self.mean_rel = old * self.mean_rel + new * relative.mean()
        size = np.linalg.norm(e, axis=1)
        self.max_norm = max(self.max_norm, float((np.linalg.norm(a - e, axis=1) / np.maximum(size, 1e-12)).max()))
        norms = np.linalg.norm(a, axis=1) * size
        cosines = np.where(norms > 0, (a * e).sum(1) / np.maximum(norms, 1e-300), 1.0)
        self.cosine = min(self.cosine, float(cosines.min()))
        self.top1 = old * self.top1 + new * float((a.argmax(1) == e.argmax(1)).mean())
        scale = np.maximum(np.abs(e), np.sqrt((e**2).mean(axis=1, keepdims=True)))
        self.required_atol = max(self.required_atol, float((error - self.rtol * scale).max()))
        self.samples += count


_DECISIONS = ("reducer", "differ", "near-ties", "flipped", "verdict")


@dataclass(repr=False)
class ParityReport(Shown):
    """The verdict and what it rests on.

    Attributes:
        artifact: whose report it is.
        dtype: of the artifact.
        provider: that executed it.
        stand_in: what was executed in its place, where the artifact itself cannot run; empty otherwise.
        samples: how many were compared.
        end_to_end: how many of them were judged end to end: all choices agree with eager PyTorch's own.
        decisions_compared: whether the reducers' choices were.
        end_to_end_required: whether one must be.
        faults: what could not be compared at all: an output that is missing, or of another shape or dtype.
        reducers, outputs: the figures.
        notes: what a reader should know besides.
        first_difference: where inner values part, in words; empty where that was not asked.
    """

    artifact: str
    dtype: str
    provider: str
    stand_in: str = ""
    samples: int = 0
    end_to_end: int = 0
    decisions_compared: bool = False
    end_to_end_required: bool = False
    faults: list[str] = field(default_factory=list)
    reducers: list[ReducerReport] = field(default_factory=list)
    outputs: list[OutputReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first_difference: str = ""

    @property
    def passed(self) -> bool:
        """Whether the artifact may be trusted."""
        return self.sound and (self.end_to_end > 0 or not self.end_to_end_required)

    @property
    def sound(self) -> bool:
        """Whether there are samples, and nothing that was compared failed."""
        passed = all(r.passed for r in self.reducers) and all(o.passed for o in self.outputs)
        return self.samples > 0 and self.compared and not self.faults and passed

    @property
    def compared(self) -> bool:
        """Whether any output that counts was compared with eager PyTorch: where none was, nothing is passed."""
        return any(o.judged and o.samples and o.against != "model" for o in self.outputs)

    @property
    def only_too_far(self) -> bool:
        """Whether all that failed is the size of errors: another tolerance would let it pass, and mends nothing else
        (a decision, a shape, NaN, a graph that computes something else than its model)."""
        failed = [row for row in self.outputs if not row.passed]
        sizes = bool(failed) and all(row.finite and row.against != "model" for row in failed)
        judged = self.samples > 0 and (self.end_to_end > 0 or not self.end_to_end_required)
        return sizes and judged and not self.faults and all(row.passed for row in self.reducers)

    def tables(self) -> list[Table]:
        """See `Shown`: the verdict, then a row for each reducer and each output."""
        verdict = "passed" if self.passed else f"failed: {self.failures()}"
        heading = Table(f"Parity of {self.artifact} ({self.dtype}, {self.provider}), {self.samples} samples: {verdict}")
        decisions = [(r.name, str(r.differ), str(r.near_ties), f"{r.flip_rate:.2%}", r.verdict) for r in self.reducers]
        outputs = [(o.name, o.against.replace("_", " "), *o.figures, o.verdict) for o in self.outputs]
        tables = [
            Table(f"decisions ({self.end_to_end} samples end to end)", _DECISIONS, decisions),
            Table("outputs", ("output", "against", "absolute", "of norm", "verdict"), outputs),
        ]
        return [heading, *(table for table in tables if table.rows)]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it (NaN and infinities as strings)."""
        outputs = [row.to_dict() for row in self.outputs]
        return {"passed": self.passed, **_jsonable({**asdict(self), "outputs": outputs})}

    def failures(self) -> str:
        """What failed, in one sentence each."""
        parts = [*self.faults, *(f"{r.name} {r.failure}" for r in self.reducers if r.failure)]
        for o in self.outputs:
            if not o.passed:
                limit = f"{o.max_abs:.2e}, allowed atol {o.atol:g} + rtol {o.rtol:g}"
                if o.max_norm > o.norm:
                    limit = f"{o.max_norm:.2e} of its norm, allowed {o.norm:g}"
                if o.noise_norm is not None:
                    limit += f" ({self.dtype} in eager PyTorch makes {o.noise_norm:.2e} of its norm)"
                what = f"differs by up to {limit}" if o.finite else "has NaN or Inf"
                row = f"output {o.name} ({o.against.replace('_', ' ')}) {what}"
                parts.append(_OF_THE_MODEL.format(o.name, what) if o.against == "model" else row)
        if not parts and self.samples == 0:
            return "no sample was compared"
        if not parts and not self.compared:
            return "no output was compared with eager PyTorch"
        if not parts and self.end_to_end_required and not self.end_to_end:
            return (
                f"no sample was judged end to end: in each of {self.samples} a choice differs from eager PyTorch's. "
                "Give other samples (--inputs)"
            )
        return "; ".join(parts)


_OF_THE_MODEL = (
    "output {} of the captured graph {} from the model's own forward: the model computes something else while it is "
    "traced. "
    "Give all inputs that its processor makes, or load it with attn_implementation='eager', whose masks are explicit"
)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(value)
    return value


def save_report(report: ParityReport, path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
