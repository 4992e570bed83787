"""`report`: one page about a reduced program or an artifact, on samples."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ..artifacts.engine import Engine
from ..artifacts.formats import find_format
from ..artifacts.manifest import read_manifest
from ..artifacts.session import comparable_decisions, decision_session_of
from ..capture.added import capture_with
from ..capture.image_size import fit_images
from ..capture.loading import LoadedModel, load_model
from ..capture.make_inputs import load_inputs
from ..errors import UsageError
from ..exporters.chain import cast
from ..files import atomic_path
from ..guards import check_prompts, without_constants
from ..parity.artifact import added_by, parity, recaptured
from ..parity.check import decisions_by_reducer
from ..reduce import Reduced, reduce
from ..schedule import Schedule
from .data import ReportData
from .gather import Gather, Outputs, run
from .layers import layers_of, tokens_of
from .pictures import check_pictures
from .render import render

Model = nn.Module | ExportedProgram | LoadedModel | str | os.PathLike[str]
SAMPLES = 8
"""Samples that a report shows, unless it is told otherwise."""


@dataclass(frozen=True, repr=False)
class Report:
    """A report.

    Attributes:
        data: what it shows.
    """

    data: ReportData

    def html(self) -> str:
        """The page: one file that loads nothing else."""
        return render(self.data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page."""
        with atomic_path(Path(path)) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"Report of {len(self.data.samples)} samples: {self.data.subject} .save(path) writes it."

    def _repr_html_(self) -> str:
        """For a notebook: the page in a frame, so that neither's styles reach the other."""
        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" style="width:100%;height:56rem;border:0" title="pumer-compile report"></iframe>'
        )


def report(
    target: Reduced | Model,
    inputs: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    model: Model | None = None,
    schedule: Schedule | str | os.PathLike[str] | None = None,
    samples: int = SAMPLES,
    processor: object = None,
    bench: str | os.PathLike[str] | None = None,
    provider: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Show which tokens of samples are kept, merged and pruned, by what, and what is answered.

    Args:
        target: what `reduce` gave; the path of an artifact; or a model (its path too), which is reduced by `schedule`.
        inputs: a batch by input name, or an `.npz` file of it.
        model: that an artifact was compiled from.
        schedule: for a model.
        samples: how many are shown at most.
        processor: of the model, for colours and words: an object of transformers, or a folder with its files; None
            takes the model's folder where it came from one.
        bench: what `pumer-compile bench --json` wrote, to be shown as well.
        provider: onnxruntime's, for an artifact.
        progress: told what is going on.

    Returns:
        The report: it shows itself in a notebook, and `save` writes it.

    Raises:
        UsageError: inputs without a picture, or that do not fit; an artifact without its model, or a model without a
            schedule.
    """
    measured = None if bench is None else _measured(Path(bench))
    artifact = isinstance(target, str | os.PathLike) and find_format(Path(target)) is not None
    if model is not None and not artifact:
        raise UsageError("--model is what an artifact was compiled from, and this is none. Leave it out.")
    if schedule is not None and (artifact or isinstance(target, Reduced)):
        raise UsageError("It was reduced by a schedule of its own, which its report shows. Leave --schedule out.")
    if isinstance(target, Reduced):
        made = _of_reduced(target, inputs, samples, processor, progress)
    elif isinstance(target, str | os.PathLike) and artifact:
        if model is None:
            raise UsageError(
                f"{target} is an artifact, and which tokens of which picture it decided on is seen in the model that "
                "it was compiled from: give that too (--model MODEL)."
            )
        made = _of_artifact(Path(target), model, inputs, samples, processor, provider, progress)
    else:
        if schedule is None:
            raise UsageError("A report of a model shows how a schedule reduces it: name one (--schedule SCHEDULE).")
        made = _of_model(target, schedule, inputs, samples, processor, progress)
    return Report(replace(made, bench=measured))


# --- A model, a reduced program ---------------------------------------------------------------------------------------


def _of_model(
    target: Model,
    schedule: Schedule | str | os.PathLike[str],
    inputs: Mapping[str, Tensor] | str | os.PathLike[str],
    samples: int,
    processor: object,
    progress: Callable[[str], None],
) -> ReportData:
    loaded = _loaded(target, progress)
    chosen = Schedule.load(schedule)
    batch = _batch(inputs, loaded, chosen.adds)
    fit_images(loaded.source if isinstance(loaded, LoadedModel) else loaded, batch)
    progress("capturing and reducing")
    reduced = reduce(capture_with(loaded, batch, chosen.adds), chosen)
    return _of_reduced(reduced, batch, samples, _processor(processor, loaded), progress)


def _loaded(model: Model, progress: Callable[[str], None]) -> nn.Module | ExportedProgram | LoadedModel:
    """A model, read where it is a path."""
    if not isinstance(model, str | os.PathLike):
        return model
    progress("loading")
    return load_model(Path(model))


def _batch(inputs: Mapping[str, Tensor] | str | os.PathLike[str], model: Any, added: Any) -> dict[str, Tensor]:
    source = model.source if isinstance(model, LoadedModel) else model
    batch = dict(inputs) if isinstance(inputs, Mapping) else load_inputs(Path(inputs), source, added)
    check_pictures(batch)
    return batch


def _processor(processor: object, model: Any) -> object:
    """The folder of a model that came from one, where no processor was given."""
    if processor is not None:
        return processor
    return model.path if isinstance(model, LoadedModel) and model.kind == "folder" else None


def _of_reduced(
    reduced: Reduced,
    inputs: Mapping[str, Tensor] | str | os.PathLike[str],
    samples: int,
    processor: object,
    progress: Callable[[str], None],
) -> ReportData:
    exact = _exact(reduced)
    batch = dict(inputs) if isinstance(inputs, Mapping) else _from_file(Path(inputs), exact)
    check_pictures(batch)
    _check_fit(exact, batch)
    progress("running")
    gather = Gather(exact, processor)
    shown = gather.samples(run(exact, batch), samples)
    reason = "this is the report of a model in eager PyTorch, not of an artifact; parity compares the two"
    return _data(reduced, gather, shown, batch, no_parity=reason)


def _exact(reduced: Reduced) -> Reduced:
    """In float32."""
    found = cast(reduced, "float32") if reduced.program.model is not None else reduced
    assert isinstance(found, Reduced)
    return found


def _from_file(path: Path, reduced: Reduced) -> dict[str, Tensor]:
    program = reduced.program
    if program.model is None:
        raise UsageError("A torch.export archive takes its inputs as tensors by name here; load the file yourself.")
    return load_inputs(path, program.model, program.added)


def _check_fit(reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
    """Inputs must be those of the capture, in its shapes.

    Raises:
        UsageError: naming the first that is not.
    """
    program = reduced.program
    for name, sample in program.inputs.items():
        if name not in batch:
            raise UsageError(f"The program was captured with {', '.join(program.inputs)}; {name} is missing here.")
        sizes, found = list(sample.shape), list(batch[name].shape)
        if found != sizes and not (program.dynamic_batch and found[1:] == sizes[1:]):
            raise UsageError(
                f"The program was captured with {name} {sizes}, which fixes its shapes, and is given {found}. Capture "
                "it with inputs of this form."
            )
    unknown = [name for name in batch if name not in program.inputs]
    if unknown:
        raise UsageError(
            f"The program takes no input {unknown[0]}: it was captured with {', '.join(program.inputs)}. Leave it out."
        )


# --- An artifact ------------------------------------------------------------------------------------------------------


def _of_artifact(
    path: Path,
    model: Model,
    inputs: Mapping[str, Tensor] | str | os.PathLike[str],
    samples: int,
    processor: object,
    provider: str | None,
    progress: Callable[[str], None],
) -> ReportData:
    manifest = read_manifest(path)
    if not manifest["schedule"]:
        raise UsageError(
            f"{path} was compiled without a schedule: nothing in it is pruned or merged, so there is no report."
        )
    loaded = _loaded(model, progress)
    whole = _batch(inputs, loaded, added_by(manifest))
    check_prompts(manifest, whole)
    batch = without_constants(manifest, whole)
    progress("comparing with eager PyTorch")
    proof = parity(path, loaded, whole, provider=provider)
    progress("running")
    reduced = reduce(recaptured(loaded, batch, manifest), Schedule.from_manifest(manifest["schedule"]))
    exact = _exact(reduced)
    outputs, chosen = _asked(path, manifest, batch, provider)
    given = run(exact, batch, decisions_by_reducer(exact.module, chosen) if chosen else None)
    gather = Gather(exact, _processor(processor, loaded))
    shown = gather.samples(given, samples, {"artifact": outputs})
    data = _data(reduced, gather, shown, batch)
    decided = "its own decisions" if chosen else "eager PyTorch's decisions, since it shows none of its own"
    facts = {"artifact": f"{path.name} ({proof.dtype}, {proof.provider}), shown with {decided}", **data.facts}
    return replace(data, title=f"{path.name}: what was reduced", facts=facts, parity=proof)


def _asked(
    path: Path, manifest: Mapping[str, Any], batch: Mapping[str, Tensor], provider: str | None
) -> tuple[Outputs, dict[str, Any]]:
    """What an artifact gives for a batch, and its decisions as arrays by name, where it shows them."""
    import torch

    engine = Engine(path, provider=provider)
    names = comparable_decisions(engine.session, manifest)
    given = engine.run(batch)
    opened = decision_session_of(engine.session, names)
    chosen = given
    if opened is not None and names:
        engine.close()
        session = opened()
        chosen = session.run(batch)
        session.close()
    else:
        engine.close()
    outputs = {n: torch.from_numpy(value) for n, value in given.items() if n not in names}
    outputs = {n: t.float() if t.is_floating_point() else t for n, t in outputs.items()}
    return outputs, {name: chosen[name] for name in names}


# --- Both -------------------------------------------------------------------------------------------------------------


def _data(
    reduced: Reduced, gather: Gather, shown: Any, batch: Mapping[str, Tensor], *, no_parity: str = ""
) -> ReportData:
    plan, model = reduced.plan, reduced.program.model
    name = type(model).__name__ if model is not None else "a torch.export archive"
    subject = f"{name}, reduced by {reduced.schedule.described}: {plan.ratio:.2f}x fewer multiply-adds."
    keys = reduced.schedule.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    facts = {
        "schedule": ", ".join(f"{key}: {value}" for key, value in keys.items()) or reduced.schedule.described,
        "inputs": ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items()),
        "nodes": f"{len(reduced.program.module.graph.nodes)} captured, {len(reduced.module.graph.nodes)} reduced",
    }
    total = gather.batch(batch)
    notes = [*gather.notes]
    if total > len(shown):
        notes.append(f"The first {len(shown)} of {total} samples are shown (--samples).")
    return ReportData(
        title=f"{name}: what was reduced",
        subject=subject,
        facts=facts,
        plan=plan,
        samples=shown,
        tokens=tokens_of(plan),
        layers=layers_of(reduced),
        passes=reduced.history.records,
        no_parity=no_parity,
        notes=notes,
    )


def _measured(path: Path) -> dict[str, Any]:
    """What `bench` wrote.

    Raises:
        UsageError: it did not.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        rows = said["measurements"]
        assert all({"artifact", "batch", "p50_ms"} <= set(row) for row in rows)
    except FileNotFoundError as error:
        raise UsageError(f"There is no file {path}. Write it with pumer-compile bench ... --json {path}.") from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(
            f"{path} is not what pumer-compile bench --json writes. Measure again with pumer-compile bench ... --json."
        ) from error
    return dict(said)
