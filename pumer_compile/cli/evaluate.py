"""`pumer-compile evaluate ARTIFACT`: accuracy, reduced and unreduced, beside controls of the same cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt
from .shell import app, epilog, readable_errors, stage
from .tables import console, make_table, say

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation, Row

EVALUATE_EXAMPLES = """
Examples. With labels; by a metric of your own; without labels, by agreement with the unreduced model:

    pumer-compile evaluate model.onnx --model MODEL --data x.npz --labels y.npz

    pumer-compile evaluate model.onnx --model MODEL --data x.npz --metric my.scores:vqa

    pumer-compile evaluate model.onnx --model MODEL --data x.npz --json evaluation.json

The artifact runs under its runtime; the unreduced model and the controls in eager PyTorch. A control keeps as many
tokens as it may for no more multiply-adds than the artifact: a method that does no better has found nothing.
"""


@app.command("evaluate", epilog=epilog(EVALUATE_EXAMPLES))
@readable_errors
def evaluate_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Made by pumer-compile, reduced.")],
    model: Annotated[Path, typer.Option("--model", "-m", metavar="MODEL", help="What it was compiled from.")],
    data: Annotated[Path, typer.Option("--data", metavar="FILE.npz", help="Samples, arrays by input name.")],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE.npz",
            help="One array: the number of the right answer of each sample, or what each answer is worth.",
            show_default=False,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", metavar="PKG.MODULE:FUNCTION", help="In place of accuracy.", show_default=False),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            "--answers", metavar="NAME", help="Output with the scores of answers (default logits).", show_default=False
        ),
    ] = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Judge controls, too.")] = True,
    provider: opt.Provider = None,
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="OUT.json", help="Write every row.", show_default=False)
    ] = None,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Judge an artifact on labelled samples, beside the unreduced model and controls of the same cost."""
    from ..artifacts.manifest import read_manifest
    from ..artifacts.session import check_runtime
    from ..files import check_writable

    manifest = read_manifest(artifact)
    check_runtime(artifact, manifest, provider=provider)
    if json_ is not None:
        check_writable(json_)
    with stage(f"loading {model}"):
        from ..capture.loading import load_model
        from ..capture.samples import captured_batch, kinds_of
        from ..evaluation.evaluate import evaluate
        from ..parity.artifact import recaptured
        from ..search.quality import load_metric
        from ..search.samples import load_samples

        loaded = load_model(model, config=config, allow_pickle=allow_pickle)
        batch = 32 if manifest["dynamic_batch"] else captured_batch(kinds_of(manifest))
        samples = load_samples(data, loaded.source, labels, batch, exact=not manifest["dynamic_batch"])
        how: dict[str, Any] = {"metric": None if metric is None else load_metric(metric), "output": answers}
    with stage("evaluating") as progress:
        progress("capturing")
        program = recaptured(loaded, samples.first, manifest)
        found = evaluate(artifact, program, samples, provider=provider, controls=controls, progress=progress, **how)
    if json_ is not None:
        found.save(json_)
    print_evaluation(found)


def print_evaluation(found: Evaluation) -> None:
    """A row for each model, and what the artifact lost in a sentence."""
    judged = [row for row in found.rows if row.value is not None]
    table = make_table(
        f"{found.measure.capitalize()} of {found.samples} samples",
        ["model"],
        [
            "multiply-adds",
            found.measure,
            "95% interval",
            "beside unreduced",
        ],
    )
    for row in judged:
        table.add_row(row.name, f"{row.multiply_adds:.3f}", f"{row.value:.4f}", *_intervals(row))
    console.print(table)
    for row in found.rows:
        if row.value is None:
            say(f"{row.name}: not judged; {row.note}")
    if found.interval:
        say(f"Intervals of values: {found.interval}; of differences: paired bootstrap.")
    say(_sentence(found))


def _intervals(row: Row) -> tuple[str, str]:
    if row.low is None or row.high is None or row.difference is None:
        return "", "" if row.difference is None else f"{row.difference:+.4f}"
    between = f"{row.low:.4f} to {row.high:.4f}"
    if row.name == "unreduced":
        return between, ""
    return between, f"{row.difference:+.4f} ({row.difference_low:+.4f} to {row.difference_high:+.4f})"


def _sentence(found: Evaluation) -> str:
    """What follows from the intervals."""
    reduced = found.rows[0]
    controls = [row for row in found.rows[2:] if row.value is not None]
    parts = []
    if reduced.difference_low is not None and reduced.difference_high is not None:
        if reduced.difference_high < 0:
            parts.append(f"The artifact loses {-(reduced.difference or 0):.4f}, more than chance explains")
        elif reduced.difference_low > 0:
            parts.append("The artifact gains, more than chance explains")
        else:
            parts.append("On these samples the artifact's loss is within chance")
    better = [row.name for row in controls if row.value is not None and row.value >= (reduced.value or 0)]
    if controls:
        parts.append(
            f"it does no better than {' and '.join(better)}" if better else "it does better than every control"
        )
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "."
