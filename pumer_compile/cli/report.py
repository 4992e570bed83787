"""`pumer-compile report`: one page that shows which tokens went where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from . import options as opt
from .shell import app, epilog, readable_errors, stage
from .tables import say, size

EXAMPLES = """
Examples. Of a model and a schedule; of an artifact, whose own decisions are shown, with its proof; with its latency:

    pumer-compile report MODEL --schedule schedule.yaml --inputs samples.npz -o report.html

    pumer-compile report model.onnx --model MODEL --inputs samples.npz -o report.html

    pumer-compile report model.onnx --model MODEL --inputs samples.npz --bench bench.json -o report.html

The page is one file that loads nothing else. Pictures get their colours, and words their letters, from
preprocessor_config.json and the tokenizer in the model's folder.
"""


@app.command("report", epilog=epilog(EXAMPLES))
@readable_errors
def report_(
    target: Annotated[Path, typer.Argument(metavar="ARTIFACT|MODEL", help="Made by pumer-compile, or a model.")],
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", metavar="FILE.npz", help="The samples, arrays by input name.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.html", help="Page to write.")] = Path(
        "report.html"
    ),
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", metavar="MODEL", help="What an artifact was compiled from.", show_default=False),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule", "-s", metavar="SCHEDULE", help="Of a model: a YAML file or a preset.", show_default=False
        ),
    ] = None,
    semantics: opt.SemanticsName = None,
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to show, at most.")] = 8,
    processor: Annotated[
        Path | None,
        typer.Option(
            "--processor",
            metavar="FOLDER",
            help="preprocessor_config.json and tokenizer (default: the model's folder).",
            show_default=False,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option("--bench", metavar="FILE.json", help="What bench --json wrote.", show_default=False),
    ] = None,
    provider: opt.Provider = None,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a page that shows, on your samples, which tokens are kept, merged and pruned."""
    from ..files import check_writable

    check_writable(output)
    if inputs is None:
        raise UsageError("A report is of samples: give them as --inputs samples.npz, arrays by input name.")
    chosen = None if schedule is None else opt.load_schedule(schedule, semantics)
    if schedule is not None and chosen is None:
        raise UsageError("`--schedule none` reduces nothing, so there is nothing to show. Name a schedule or a preset.")
    with stage("reporting") as progress:
        from ..artifacts.formats import find_format
        from ..capture.loading import load_model
        from ..report.build import report

        artifact = find_format(target) is not None
        source = model if artifact else target
        loaded: Any = source
        if source is not None and (artifact or chosen is not None):
            progress("loading")
            loaded = load_model(source, config=config, allow_pickle=allow_pickle)
        made = report(
            target if artifact else loaded,
            inputs,
            model=loaded if artifact else model,
            schedule=chosen,
            samples=samples,
            processor=processor,
            bench=bench,
            provider=provider,
            progress=progress,
        )
        made.save(output)
    answers = [answer for sample in made.data.samples for answer in sample.answers if answer.ranked]
    same = sum(answer.agrees for answer in answers)
    agreed = f"; {same} of {len(answers)} answers are the same" if answers else ""
    shown = len(made.data.samples)
    say(f"Wrote {output} ({size(output.stat().st_size)}): {shown} sample{'' if shown == 1 else 's'}{agreed}.")
    say(made.data.subject)
