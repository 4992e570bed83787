"""Parity: prove an artifact against eager PyTorch, decisions first, then outputs.

A reducer's choice flips when two scores are nearly equal, and a flipped choice changes the outputs far more than
rounding does. So the choices are compared first (a differing one is allowed only where the eager scores are nearly
tied), then the outputs with the eager model made to follow the artifact's choices, then end to end on the samples
whose choices agree.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from transformers.exporters.utils import get_leaf_tensors

from .capture import batch_inputs, capture
from .errors import UsageError
from .exporters.base import Profile, Session
from .exporters.manifest import read_manifest
from .exporters.onnx import in_precision
from .exporters.session import comparable_decisions, open_session, twin_of
from .loading import LoadedModel, load_model
from .outputs import output_nodes
from .parity_report import TOLERANCES, OutputReport, ParityReport, ReducerReport, Tolerance
from .passes.insert import reducers_of
from .plan import PromptPlace, check_prompts, without_constants
from .reduce import reduce
from .reducers import StreamReducer, forced_decisions, noted_decisions
from .reducers.reducer import Comparison, Decisions
from .replay import Recorder, check_recording
from .samples import random_batches
from .schedule import Schedule

Arrays = dict[str, np.ndarray[Any, Any]]


def parity(
    artifact: str | os.PathLike[str],
    model: nn.Module | ExportedProgram | LoadedModel | str | os.PathLike[str],
    samples: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
    *,
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
    provider: str | None = None,
    save_inputs: Path | None = None,
    save_outputs: Path | None = None,
) -> ParityReport:
    """Compare an artifact, under the runtime of its format, with the reduced model in eager PyTorch.

    Args:
        artifact: made by pumer-compile; its manifest says which schedule it was reduced by.
        model: the model it was compiled from, or its file.
        samples: inputs by name, one batch or several; None makes random batches with padding.
        atol, rtol: tolerances, for all outputs or by output name; defaults follow the artifact's dtype.
        provider: onnxruntime's execution provider (`cpu`, `cuda`, `tensorrt`), for ONNX.
        save_inputs, save_outputs: write what the artifact was given and gave in Polygraphy's format, failed or not.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        UsageError: not an artifact of pumer-compile, inputs that do not fit it, or this machine cannot run it.
    """
    path = Path(artifact)
    manifest = read_manifest(path)
    loaded = load_model(Path(model)) if isinstance(model, str | os.PathLike) else model
    check_recording(manifest, save_inputs, save_outputs)
    session = open_session(path, manifest, provider=provider)
    batches = _batches(samples, loaded, manifest)
    for batch in batches:
        check_prompts(manifest, batch)
    batches = [without_constants(manifest, batch) for batch in batches]
    program = capture(
        loaded,
        batches[0],
        dynamic_batch=bool(manifest["dynamic_batch"]),
        streams=manifest["streams"],
        outputs=manifest.get("kept_outputs"),
        padding=not manifest.get("unpadded_inputs"),
    )
    exact = in_precision(program, "float32") if program.model is not None else program
    schedule = Schedule.from_manifest(manifest["schedule"]) if manifest["schedule"] else None
    # What is exact is judged against the model itself.
    reducing = schedule is not None and schedule.method != "lossless"
    eager = reduce(exact, schedule).module if schedule is not None and reducing else exact.module
    recorder = Recorder(session, manifest) if save_inputs or save_outputs else None
    judged, decisions = recorder or session, comparable_decisions(session, manifest)
    report = check(
        judged,
        eager,
        exact.module,
        batches,
        manifest.get("quantize") or manifest["dtype"],
        decisions,
        decide=twin_of(session, decisions),
        atol=atol,
        rtol=rtol,
    )
    if recorder is not None:
        recorder.save(save_inputs, save_outputs)
    if manifest["decisions"] and not decisions:
        report.notes.append(
            f"decisions of {path.suffix} can be compared where it was compiled --with-decisions; here a near-tie that "
            "went the other way counts as an error of the outputs"
        )
    if manifest["checkpoint_sha256"] and program.checkpoint_sha256 not in (
        None,
        manifest["checkpoint_sha256"],
    ):
        report.notes.append("the artifact was compiled from another checkpoint (its hash differs)")
    return report


def _batches(
    samples: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None,
    model: Any,
    manifest: Mapping[str, Any],
) -> list[dict[str, Tensor]]:
    if isinstance(samples, Mapping):
        return [dict(samples)]
    if samples is not None:
        return [dict(sample) for sample in samples]
    dtypes = {name: spec["dtype"] for name, spec in _specs(manifest).items()}
    prompts = [PromptPlace(**place) for place in (manifest.get("plan") or {}).get("prompts", ())]
    fixed = {name: torch.tensor(values) for name, values in (manifest.get("fixed_inputs") or {}).items()}
    shapes = _sample_shapes(manifest)
    fixed |= {name: torch.ones(shapes[name], dtype=torch.int64) for name in manifest.get("unpadded_inputs") or ()}
    return random_batches(model, shapes, dtypes, prompts=prompts, fixed=fixed)


def _specs(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of the model: those of the artifact, and those that only outputs need which it leaves out."""
    return {**manifest["inputs"], **manifest.get("unread_inputs", {})}


def _sample_shapes(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The captured shapes, in the nearest batch that a profile of the artifact contains."""
    shapes = {name: tuple(spec["shape"]) for name, spec in _specs(manifest).items()}
    profiles = [Profile.parse(text) for text in manifest.get("profiles") or ()]
    batched = batch_inputs({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    if not profiles or not batched:
        return shapes
    captured = shapes[batched[0]][0]
    sizes = [min(max(captured, profile.minimum), profile.maximum) for profile in profiles]
    nearest = min(sizes, key=lambda size: abs(size - captured))
    return {name: (nearest, *shape[1:]) if name in batched else shape for name, shape in shapes.items()}


def check(
    session: Session,
    eager: fx.GraphModule,
    unreduced: fx.GraphModule,
    batches: Sequence[Mapping[str, Tensor]],
    dtype: str,
    decisions: Sequence[str],
    *,
    decide: Callable[[], Session] | None = None,
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
) -> ParityReport:
    """Compare an open session with a module in eager PyTorch.

    Args:
        session: whose outputs are judged; closed where there is a twin, so that one of them is in memory at a time.
        eager: the reduced module, in float32.
        unreduced: the captured module; the same object as `eager` where nothing is reduced.
        batches: inputs by name, `[batch, ...]`.
        dtype: of the artifact, or what it is quantized to; picks the tolerances.
        decisions: names of decision outputs.
        decide: opens the twin of `session` that gives the decisions; None where `session` gives them itself.
        atol, rtol: as in `parity`.
    """
    default = TOLERANCES[dtype]
    report = ParityReport(str(session.path), dtype, session.provider, decisions_compared=bool(decisions))
    if reducers_of(eager) and not decisions:
        report.notes.append("the artifact does not give its decisions: judged end to end alone")
    own = [name for name in session.outputs if name not in decisions]
    check_tolerances(own, atol, rtol)
    comparison = _Comparison(report, eager, unreduced, default, atol, rtol)
    with torch.no_grad():
        for batch, outputs, chosen in _answers(session, decide if decisions else None, batches, decisions):
            comparison.add(batch, {name: outputs[name] for name in own}, chosen, decisions)
    return report


def check_tolerances(
    outputs: Sequence[str], atol: float | Mapping[str, float] | None, rtol: float | Mapping[str, float] | None
) -> None:
    """Refuse a tolerance for an output that an artifact with these outputs does not have.

    Raises:
        UsageError: naming the option, the output and those there are.
    """
    for option, tolerance in (("atol", atol), ("rtol", rtol)):
        unknown = [name for name in tolerance if name not in outputs] if isinstance(tolerance, Mapping) else []
        if unknown:
            raise UsageError(f"--{option} names the output {unknown[0]!r}; there are {', '.join(outputs)}.")


def _answers(
    session: Session,
    decide: Callable[[], Session] | None,
    batches: Sequence[Mapping[str, Tensor]],
    decisions: Sequence[str],
) -> Iterator[tuple[Mapping[str, Tensor], Arrays, Arrays]]:
    """Each batch, the artifact's outputs for it, and its decisions."""
    if decide is None:
        for batch in batches:
            given = session.run(batch)
            yield batch, given, given
        return
    outputs = [session.run(batch) for batch in batches]
    session.close()
    chosen: list[Arrays] = [{} for _ in batches]
    if any(_finite(given) for given in outputs):  # a twin can take minutes to make
        twin = decide()
        chosen = [{name: value for name, value in twin.run(batch).items() if name in decisions} for batch in batches]
        twin.close()
    yield from zip(batches, outputs, chosen, strict=True)


def _finite(arrays: Arrays) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


@dataclass
class _Comparison:
    report: ParityReport
    eager: fx.GraphModule
    unreduced: fx.GraphModule
    default: Tolerance
    atol: float | Mapping[str, float] | None
    rtol: float | Mapping[str, float] | None

    def add(self, batch: Mapping[str, Tensor], artifact: Arrays, chosen: Arrays, decisions: Sequence[str]) -> None:
        """Take in one batch, what the artifact gives for it, and its decisions."""
        size = next(v.shape[0] for name, v in batch.items() if name in batch_inputs(batch))
        agree = np.ones(size, dtype=bool)
        with noted_decisions(self.eager) as own:
            free = _eager_outputs(self.eager, batch, list(artifact))
        # Choices among NaN scores mean nothing; the outputs fail in any case.
        if decisions and _finite(artifact) and _finite(free):
            wanted = self._wanted({name: chosen[name] for name in decisions}, size)
            if not any(row.fault for row in self.report.reducers):
                if all(map(_same, own.values(), (wanted[name] for name in own))):
                    # Left alone it chooses the same; made to, it would compute the same once more.
                    forced, compared = free, {name: _no_difference(choice, size) for name, choice in own.items()}
                else:
                    forced, compared = self._forced(batch, list(artifact), wanted)
                agree = self._decisions(compared, size)
                self._outputs("forced", True, artifact, forced)
        self._outputs("end_to_end", True, artifact, free, agree)
        if self.unreduced is not self.eager:
            before = _eager_outputs(self.unreduced, batch, list(output_nodes(self.unreduced)))
            alike = {n: v for n, v in artifact.items() if n in before and before[n].shape == v.shape}
            self._outputs("unreduced", False, alike, before)
        self.report.samples += size

    def _forced(
        self, batch: Mapping[str, Tensor], names: list[str], wanted: dict[str, Decisions]
    ) -> tuple[Arrays, dict[str, Comparison]]:
        """Eager outputs with these decisions, and its own beside them."""
        with forced_decisions(self.eager, wanted) as forcings:
            outputs = _eager_outputs(self.eager, batch, names)
        return outputs, {name: f.comparison for name, f in forcings.items() if f.comparison is not None}

    def _wanted(self, chosen: Arrays, size: int) -> dict[str, Decisions]:
        """The artifact's decisions by reducer; a row's `fault` says where they cannot be."""
        wanted = {}
        for name, reducer in reducers_of(self.eager).items():
            wanted[name] = _decisions_of(name, reducer, chosen, size)
            row = self._row(name)
            row.fault = row.fault or _fault(reducer, wanted[name])
        return wanted

    def _row(self, name: str) -> ReducerReport:
        known = next((row for row in self.report.reducers if row.name == name), None)
        if known is None:
            judged = self.default.decisions and reducers_of(self.eager)[name].judged
            known = ReducerReport(name, judged=judged)
            self.report.reducers.append(known)
        return known

    def _decisions(self, compared: dict[str, Comparison], size: int) -> np.ndarray[Any, Any]:
        agree = np.ones(size, dtype=bool)
        for name, result in compared.items():
            row = self._row(name)
            differs, margin = result.differs.numpy(), result.margin.numpy()
            row.samples += size
            row.differ += int(differs.sum())
            row.near_ties += int((differs & (margin <= self.default.tie)).sum())
            row.worst_margin = max(row.worst_margin, float(margin.max(initial=0.0)))
            for own, forced in zip(result.own, result.forced, strict=True):
                row.chosen += own.numel()
                row.flipped += int((own != forced).sum())
            agree &= ~differs
        return agree

    def _outputs(
        self,
        against: str,
        judged: bool,
        artifact: Arrays,
        eager: Arrays,
        rows: np.ndarray[Any, Any] | None = None,
    ) -> None:
        for name, value in artifact.items():
            known = [o for o in self.report.outputs if (o.name, o.against) == (name, against)]
            if not known:
                atol, rtol = (
                    _of(t, name, d) for t, d in ((self.atol, self.default.atol), (self.rtol, self.default.rtol))
                )
                # Tolerances of the user's own are the whole of the judgement.
                norm = self.default.norm if self.atol is None and self.rtol is None else math.inf
                known = [OutputReport(name, against, judged, atol, rtol, norm=norm)]
                self.report.outputs.append(known[0])
            # An output without the batch in front (a learned scale, say) is one sample.
            per_sample = value.ndim > 0 and rows is not None and value.shape[0] == len(rows)
            if per_sample:
                known[0].add(value[rows], eager[name][rows])
            else:
                known[0].add(np.atleast_1d(value), np.atleast_1d(eager[name]))


def _of(tolerance: float | Mapping[str, float] | None, name: str, default: float) -> float:
    if isinstance(tolerance, Mapping):
        return tolerance.get(name, default)
    return default if tolerance is None else tolerance


def _eager_outputs(module: fx.GraphModule, batch: Mapping[str, Tensor], names: list[str]) -> Arrays:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    leaves = list(get_leaf_tensors(module(**inputs)).values())
    return {name: leaf.float().numpy() for name, leaf in zip(names, leaves, strict=True)}


def _decisions_of(name: str, reducer: StreamReducer, chosen: Arrays, rows: int) -> Decisions:
    def index(decision: str, default: Tensor) -> Tensor:
        found = chosen.get(f"{name}.{decision}")
        return default if found is None else torch.from_numpy(found).long()

    everything = torch.arange(reducer.tokens).expand(rows, -1)
    nothing = everything[:, :0]
    return Decisions(index("kept", everything), index("source", nothing), index("target", nothing))


def _same(one: Decisions, other: Decisions) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def _no_difference(decisions: Decisions, rows: int) -> Comparison:
    return Comparison(decisions, decisions, torch.zeros(rows, dtype=torch.bool), torch.zeros(rows))


def _fault(reducer: StreamReducer, decisions: Decisions) -> str:
    """Why these cannot be decisions of this reducer: another number of tokens, or one that is not there."""
    keep = reducer.pruner.keep if reducer.pruner else reducer.tokens
    merge = reducer.merger.merge
    for what, indices, count, tokens in (
        ("keeps", decisions.kept, keep, reducer.tokens),
        ("merges", decisions.source, merge, keep),
        ("merges into", decisions.target, merge, keep),
    ):
        if indices.shape[1] != count:
            return f"{what} {indices.shape[1]} tokens, but the schedule asks for {count}"
        if count and not (0 <= int(indices.min()) and int(indices.max()) < tokens):
            return f"{what} tokens {int(indices.min())} to {int(indices.max())}, but there are only {tokens}"
        if what != "merges into" and (indices.sort(1).values.diff() == 0).any():
            return f"{what} the same token twice"
    return ""
