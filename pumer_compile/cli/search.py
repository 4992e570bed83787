"""`pumer-compile search MODEL`: the cheapest schedule that loses no more than is allowed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import options as opt
from .shell import app, epilog, readable_errors, stage
from .tables import console, make_table, say, status

if TYPE_CHECKING:
    from ..search.study import Found, Progress

SEARCH_EXAMPLES = """
Examples. Without labels, by agreement with the unreduced model; with labels; for a time; with a metric of your own:

    pumer-compile search MODEL --inputs samples.npz --max-drop 1% -o schedule.yaml

    pumer-compile search MODEL --inputs x.npz --labels y.npz --max-drop 0.5% -o schedule.yaml

    pumer-compile search MODEL --inputs x.npz --labels y.npz --latency 50ms -o schedule.yaml

    pumer-compile search MODEL --inputs x.npz --metric my.scores:vqa --multiply-adds 0.5 -o schedule.yaml

Several machines, or several sittings, on one study (each with its own --seed):

    pumer-compile search MODEL --inputs x.npz -o schedule.yaml --storage search.journal

    pumer-compile search MODEL --inputs x.npz -o schedule.yaml --storage search.journal --resume

Beside schedule.yaml: schedule.trials.json, every trial; schedule.png, cost against drop. Ctrl-C keeps what is done.
"""
LIMITS, SEARCH = "Limits", "Search"


def _limit(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False, rich_help_panel=LIMITS)


@app.command("search", epilog=epilog(SEARCH_EXAMPLES))
@readable_errors
def search_(
    model: opt.Model,
    inputs: Annotated[
        Path,
        typer.Option("--inputs", metavar="FILE.npz", help="Samples, arrays by input name.", rich_help_panel=SEARCH),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.yaml", help="Schedule to write.", rich_help_panel=SEARCH)
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE.npz",
            help="One array: the number of the right answer of each sample, or what each answer is worth.",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="PKG.MODULE:FUNCTION",
            help="Called with outputs by name (arrays) and labels or None; gives a number, more is better.",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None,
    multiply_adds: Annotated[
        str | None, _limit("--multiply-adds", "SHARE", "At most this share of the unreduced model's.")
    ] = None,
    latency: Annotated[str | None, _limit("--latency", "50ms", "Median of a call, under the runtime.")] = None,
    memory: Annotated[str | None, _limit("--memory", "2GiB", "That an artifact adds to a process.")] = None,
    max_drop: Annotated[
        str | None, _limit("--max-drop", "1%", "Of accuracy, agreement or metric (default 1% without any limit).")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Search this one; may be repeated.", show_default=False, rich_help_panel=SEARCH),
    ] = None,
    output_name: Annotated[
        str | None,
        typer.Option(
            "--answers",
            metavar="NAME",
            help="Output with the scores of answers (default logits).",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Schedules at most.", rich_help_panel=SEARCH)] = 100,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.01, help="At most.", show_default=False, rich_help_panel=SEARCH),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples of a call.", rich_help_panel=SEARCH)] = 32,
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="SUFFIX",
            help="Artifacts that are measured: onnx, xml or engine.",
            rich_help_panel=LIMITS,
        ),
    ] = "onnx",
    finalists: Annotated[
        int, typer.Option("--finalists", min=1, help="That are measured, at most.", rich_help_panel=LIMITS)
    ] = 5,
    measured: Annotated[
        bool, typer.Option("--measure", help="Measure finalists without such a limit.", rich_help_panel=LIMITS)
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            metavar="FILE or URL",
            help="Keep the study: a journal file, or a database.",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study that is stored.", rich_help_panel=SEARCH)
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.", rich_help_panel=SEARCH)] = 0,
    sampler: Annotated[
        str, typer.Option("--sampler", help="tpe; or random, to compare with.", rich_help_panel=SEARCH)
    ] = "tpe",
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    stream: opt.Streams = None,
    no_padding: opt.NoPadding = False,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Search for a schedule: the cheapest that loses no more than is allowed."""
    from ..files import check_writable
    from ..search.storage import check_installed

    files = (output, output.with_suffix(".trials.json"), output.with_suffix(".png"))
    for file in files:
        check_writable(file)
    limits = _limits(multiply_adds, latency, memory, max_drop)
    if sampler not in ("tpe", "random"):
        raise UsageError(f"--sampler {sampler!r} is neither tpe nor random.")
    check_installed()
    program, samples = _loaded(model, inputs, labels, batch, config, allow_pickle, stream, padding=not no_padding)

    from ..search.quality import load_metric
    from ..search.study import Settings, search

    settings = Settings(
        trials=trials,
        timeout=None if minutes is None else 60 * minutes,
        seed=seed,
        storage=storage,
        resume=resume,
        sampler="random" if sampler == "random" else "tpe",
        methods=tuple(method or ()),
        output=output_name,
        metric=None if metric is None else load_metric(metric),
        suffix=f".{runtime.removeprefix('.')}",
        finalists=finalists,
        measured=measured,
    )
    with _progress(trials) as (told, going_on):
        found = search(program, samples, limits, settings, told, going_on)
    _write(files, found, model)


def _limits(multiply_adds: str | None, latency: str | None, memory: str | None, max_drop: str | None) -> Any:
    from ..search.limits import Limits, bytes_of, milliseconds, share

    return Limits(
        None if multiply_adds is None else share(multiply_adds, "--multiply-adds"),
        None if latency is None else milliseconds(latency, "--latency"),
        None if memory is None else bytes_of(memory, "--memory"),
        None if max_drop is None else share(max_drop, "--max-drop"),
    )


def _loaded(
    model: Path,
    inputs: Path,
    labels: Path | None,
    batch: int,
    config: Path | None,
    allow_pickle: bool,
    stream: list[str] | None,
    *,
    padding: bool,
) -> tuple[Any, Any]:
    """The program, captured with the first batch, and the samples."""
    streams = dict(opt.name_and_value(item, "--stream", "INPUT=NAME") for item in stream or [])
    with stage(f"loading {model}"):
        from ..capture.capture import capture
        from ..capture.loading import load_model
        from ..search.samples import load_samples

        loaded = load_model(model, config=config, allow_pickle=allow_pickle)
        samples = load_samples(inputs, loaded.source, labels, batch)
    with stage("capturing"):
        return capture(loaded, samples.first, streams=streams, padding=padding), samples


@contextmanager
def _progress(trials: int) -> Iterator[tuple[Progress, Any]]:
    """A bar with the best so far on a terminal, a line now and then elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if console.quiet:
        yield lambda result, best, judged: None, lambda text: None
        return
    if not status.is_terminal:

        def line(result: Any, best: Any, judged: int) -> None:
            if (result.number + 1) % 10 == 0:
                status.print(f"{result.number + 1} trials, {_best(best)}", markup=False, highlight=False)

        yield line, lambda text: status.print(f"{text} ...", markup=False, highlight=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=status, transient=True) as bar:
        task = bar.add_task("searching", total=trials)
        yield (
            lambda result, best, judged: bar.update(task, advance=1, description=_best(best)),
            lambda text: bar.update(task, description=text),
        )


def _best(best: Any) -> str:
    if best is None:
        return "none within the limits yet"
    return f"best {best.multiply_adds:.3f} of the multiply-adds, drop {best.drop:.4f}"


def _write(files: tuple[Path, Path, Path], found: Found, model: Path) -> None:
    from ..search.output import write_plot, write_schedule, write_trials

    output, trials, plot = files
    write_trials(trials, found)
    if any(result.state in ("done", "hopeless") for result in found.results):
        write_plot(plot, found)
    if found.best is None or found.schedule is None:
        raise UsageError(f"{found.why_not} Every trial is in {trials}.")
    command = shlex.join(["pumer-compile", *sys.argv[1:]])
    write_schedule(output, found, command)
    best = found.best
    if found.interrupted:
        say(f"Interrupted after {len(found.results)} trials; what was found by then:")
    console.print(found.schedule.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    say(
        f"{best.multiply_adds:.3f} of the multiply-adds ({1 / best.multiply_adds:.2f}x fewer); {found.measure} "
        f"{best.value:.4f} on {found.samples} samples, unreduced {found.baseline:.4f}. Trial {best.number} of "
        f"{len(found.results)} ({found.judged} judged) in {found.seconds:.0f} s."
    )
    if found.measured:
        _print_measured(found)
    say(f"Wrote {output}, {trials} and {plot}.")
    say(f"Next: pumer-compile {model} --schedule {output} -o model.onnx")


def _print_measured(found: Found) -> None:
    table = make_table("Finalists under the runtime (medians)", ["trial"], ["multiply-adds", "ms", "MiB", "drop"])
    by_number = {result.number: result for result in found.results}
    for row in found.measured:
        memory = "" if row.memory is None else f"{row.memory / 2**20:.0f}"
        if row.number is None:
            table.add_row("unreduced", "1", f"{row.milliseconds:.3g}", memory, "0")
        else:
            result = by_number[row.number]
            time = row.note[:30] or f"{row.milliseconds:.3g}"
            table.add_row(str(row.number), f"{result.multiply_adds:.3f}", time, memory, f"{result.drop:.4f}")
    console.print(table)
