"""The commands: `pumer-compile MODEL ...` compiles; `parity` proves an artifact; `plan` writes nothing."""

from __future__ import annotations

import functools
import json
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from .errors import ParityError, PumerError, UsageError

EXAMPLES = """
Examples. Compile a fine-tuned model to a reduced ONNX model, proved against eager PyTorch before it is written:

    pumer-compile MODEL --schedule vilt-vqa -o model.onnx

Look at the token counts and the arithmetic first:

    pumer-compile plan MODEL --schedule schedule.yaml

Prove an artifact again, on your own inputs:

    pumer-compile parity model.onnx --model MODEL --inputs samples.npz

MODEL is a save_pretrained folder, a torch.export archive, or a checkpoint. SCHEDULE is a YAML file, a preset
(vilt-vqa, vilt-nlvr2, vilt-ve, vilt-irtr) or `none`.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 parity failed.
"""
PARITY_EXAMPLES = """
Examples. On random samples with padding, on your own inputs, with a tolerance for one output:

    pumer-compile parity model.onnx --model MODEL

    pumer-compile parity model.onnx --model MODEL --inputs samples.npz

    pumer-compile parity model.onnx --model MODEL --atol logits=1e-3
"""
PLAN_EXAMPLES = """
Examples. A table for a preset, then JSON for a schedule of your own and shorter texts:

    pumer-compile plan MODEL --schedule vilt-vqa

    pumer-compile plan MODEL --schedule schedule.yaml --text-length 20 --json
"""


def _epilog(examples: str) -> str:
    """Paragraphs as typer keeps them apart."""
    return examples.replace("\n\n", "\n\n\n")


app = typer.Typer(
    name="pumer-compile",
    help="Make vision-language transformers cheap to serve: reduce tokens at compile time.",
    epilog=_epilog(EXAMPLES),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()
status = Console(stderr=True)
log = logging.getLogger("pumer_compile")

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="save_pretrained folder, torch.export archive, or checkpoint.")
]
ScheduleName = Annotated[
    str, typer.Option("--schedule", "-s", metavar="SCHEDULE", help="YAML file, preset name, or `none`.")
]
Config = Annotated[
    Path | None, typer.Option("--config", help="config.json (or its folder) of a bare state dict.", show_default=False)
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load a pickled module: it runs code from the file. Trusted files only.")
]
Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", metavar="FILE.npz", help="Sample inputs, arrays by input name.", show_default=False),
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Batch size of random inputs.", show_default=False)]
TextLength = Annotated[
    int | None, typer.Option("--text-length", min=1, help="Text tokens of random inputs.", show_default=False)
]
ImageSize = Annotated[
    str | None,
    typer.Option("--image-size", metavar="N or HxW", help="Pixels of random inputs.", show_default=False),
]
Streams = Annotated[
    list[str] | None,
    typer.Option("--stream", metavar="INPUT=NAME", help="Name the token stream of an input.", show_default=False),
]
Outputs = Annotated[
    str | None,
    typer.Option("--outputs", metavar="NAME,...", help="Keep only these outputs of the model.", show_default=False),
]
DumpGraph = Annotated[
    Path | None,
    typer.Option("--dump-graph", metavar="DIR", help="Write the graph after each pass.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what each pass did; tracebacks on errors.")]
Atol = Annotated[
    list[str] | None,
    typer.Option("--atol", metavar="[OUTPUT=]X", help="Absolute tolerance, of one output or all.", show_default=False),
]
Rtol = Annotated[
    list[str] | None,
    typer.Option("--rtol", metavar="[OUTPUT=]X", help="Relative tolerance, of one output or all.", show_default=False),
]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.json", help="Write the parity report.", show_default=False)
]


def _readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors become one paragraph and the documented exit code; `-v` adds the traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        _set_up_logging(verbose)
        try:
            command(*args, **kwargs)
        except PumerError as error:
            _fail(error, str(error), error.exit_code, verbose)
        except MemoryError as error:
            _fail(error, "The machine ran out of memory. Try a smaller --batch.", 1, verbose)
        except OSError as error:
            _fail(error, f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1, verbose)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # A defect of ours: say so, without burying the user in a traceback that -v gives.
            text = " ".join(str(error).split())[:400]
            _fail(error, f"Unexpected {type(error).__name__}: {text} (run with -v for a traceback).", 1, verbose)

    return run


def _fail(error: BaseException, message: str, code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    status.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _set_up_logging(verbose: bool) -> None:
    log.handlers = [RichHandler(console=status, show_path=False, show_time=False)]
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.propagate = False


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """Say what is going on: a spinner on a terminal, a line elsewhere."""
    if status.is_terminal:
        with status.status(f"{text} ..."):
            yield
    else:
        status.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)
        yield


@app.command("compile", epilog=_epilog(EXAMPLES))
@_readable_errors
def compile_(
    model: Model,
    schedule: ScheduleName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Artifact to write.")],
    config: Config = None,
    allow_pickle: AllowPickle = False,
    inputs: Inputs = None,
    batch: Batch = None,
    text_length: TextLength = None,
    image_size: ImageSize = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")] = False,
    stream: Streams = None,
    outputs: Outputs = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option("--opset", help="ONNX opset, 18 or newer.")] = 20,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="onnxruntime-cpu or onnxruntime-cuda: use its fused operators.", show_default=False
        ),
    ] = None,
    with_decisions: Annotated[
        bool, typer.Option("--with-decisions", help="Give every reducer's decisions as extra outputs.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Publish without the parity check (the manifest says so).")
    ] = False,
    atol: Atol = None,
    rtol: Rtol = None,
    report: Report = None,
    dump_graph: DumpGraph = None,
    verbose: Verbose = False,
) -> None:
    """Compile MODEL to a reduced artifact (the default command)."""
    from .exporters import export, exporter_options
    from .files import check_writable
    from .parity import save_report

    check_writable(output)
    options = exporter_options(output, dtype=dtype, opset=opset, target=target)
    absolute, relative = _tolerance(atol), _tolerance(rtol)
    if report is not None:
        check_writable(report)
    program, chosen = _captured(
        model, schedule, config, allow_pickle, inputs, (batch, text_length, image_size), dynamic_batch, stream, outputs
    )
    reduced = _reduced(program, chosen, dump_graph)
    with _stage("exporting" if no_verify else "exporting and proving"):
        try:
            done = export(
                reduced,
                output,
                options=options,
                with_decisions=with_decisions,
                verify=not no_verify,
                atol=absolute,
                rtol=relative,
            )
        except ParityError as error:
            if error.report is not None:
                if report is not None:
                    save_report(error.report, report)
                _print_report(error.report)
            raise
    if done.report is not None:
        _print_report(done.report)
        if report is not None:
            save_report(done.report, report)
    if chosen is not None:
        _print_plan(reduced.plan)
    proved = "proved against eager PyTorch" if done.report else "not verified"
    console.print(f"Wrote {done.path} ({proved}) and {done.manifest_path}.", markup=False, highlight=False)


@app.command("parity", epilog=_epilog(PARITY_EXAMPLES))
@_readable_errors
def parity_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Made by pumer-compile.")],
    model: Annotated[Path, typer.Option("--model", "-m", metavar="MODEL", help="What it was compiled from.")],
    config: Config = None,
    allow_pickle: AllowPickle = False,
    inputs: Inputs = None,
    atol: Atol = None,
    rtol: Rtol = None,
    report: Report = None,
    verbose: Verbose = False,
) -> None:
    """Prove an artifact against the reduced model in eager PyTorch; exit code 3 when it fails."""
    from .exporters.manifest import read_manifest
    from .files import check_writable
    from .inputs import load_inputs
    from .loading import load_model
    from .parity import parity, save_report

    absolute, relative = _tolerance(atol), _tolerance(rtol)
    read_manifest(artifact)
    if report is not None:
        check_writable(report)
    with _stage(f"loading {model}"):
        loaded = load_model(model, config=config, allow_pickle=allow_pickle)
        samples = None if inputs is None else load_inputs(inputs, loaded.source)
    with _stage("comparing"):
        result = parity(artifact, loaded, samples, atol=absolute, rtol=relative)
    if report is not None:
        save_report(result, report)
    _print_report(result)
    if not result.passed:
        raise ParityError(f"Parity failed: {result.failures()}.")


@app.command("plan", epilog=_epilog(PLAN_EXAMPLES))
@_readable_errors
def plan_(
    model: Model,
    schedule: ScheduleName,
    config: Config = None,
    allow_pickle: AllowPickle = False,
    inputs: Inputs = None,
    batch: Batch = None,
    text_length: TextLength = None,
    image_size: ImageSize = None,
    stream: Streams = None,
    outputs: Outputs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dump_graph: DumpGraph = None,
    verbose: Verbose = False,
) -> None:
    """Show token counts and multiply-adds of one sample, before and after; write nothing."""
    if schedule == "none":
        raise UsageError("`--schedule none` reduces nothing, so there is no plan. Name a schedule file or a preset.")
    program, chosen = _captured(
        model, schedule, config, allow_pickle, inputs, (batch, text_length, image_size), False, stream, outputs
    )
    reduced = _reduced(program, chosen, dump_graph)
    if as_json:
        print(json.dumps(reduced.plan.to_dict(), indent=2))
    else:
        _print_plan(reduced.plan)


def _captured(
    model: Path,
    schedule: str,
    config: Path | None,
    allow_pickle: bool,
    inputs: Path | None,
    sizes: tuple[int | None, int | None, str | None],
    dynamic_batch: bool,
    stream: list[str] | None,
    outputs: str | None,
) -> tuple[Any, Any]:
    """Load and capture, the schedule first: a typo should not wait for a model to load."""
    from .schedule import Schedule

    chosen = None if schedule == "none" else Schedule.load(schedule)
    batch, text_length, image_size = sizes
    if inputs is not None and any(size is not None for size in sizes):
        raise UsageError("--inputs fixes every shape; leave out --batch, --text-length and --image-size.")
    pixels = _image_size(image_size)
    streams = dict(_pair(item, "--stream", "INPUT=NAME") for item in stream or [])

    with _stage(f"loading {model}"):
        from .capture import capture
        from .inputs import load_inputs, make_inputs
        from .loading import load_model

        loaded = load_model(model, config=config, allow_pickle=allow_pickle)
        if inputs is not None:
            sample = load_inputs(inputs, loaded.source)
        else:
            sample = make_inputs(loaded.source, batch=batch, text_length=text_length, image_size=pixels)
    with _stage("capturing"):
        kept = [name.strip() for name in (outputs or "").split(",") if name.strip()]
        return capture(loaded, sample, dynamic_batch=dynamic_batch, streams=streams, outputs=kept), chosen


def _reduced(program: Any, schedule: Any, dump_graph: Path | None) -> Any:
    if schedule is None:
        return program
    from .reduce import reduce

    with _stage("reducing"):
        reduced = reduce(program, schedule, dump_graph=dump_graph)
    if log.isEnabledFor(logging.INFO):
        status.print(str(reduced.history), markup=False, highlight=False)
    return reduced


def _image_size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--image-size {text!r} is not a size: give pixels as 384 or 384x640.")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{option} {text!r} is not of the form {form}.")
    return name, value


def _tolerance(items: list[str] | None) -> float | Mapping[str, float] | None:
    """`1e-4` for all outputs, or `logits=1e-4` for some."""
    if not items:
        return None
    by_name = {}
    for item in items:
        name, value = item.rpartition("=")[::2]
        try:
            by_name[name] = float(value)
        except ValueError:
            raise UsageError(f"Tolerance {item!r} is not a number or OUTPUT=number.") from None
        if not by_name[name] >= 0:
            raise UsageError(f"Tolerance {item!r} is not at least 0.")
    if "" in by_name and len(by_name) > 1:
        raise UsageError("Give one tolerance for all outputs or one for each by name, not both.")
    return by_name.get("", by_name)


def _table(title: str, folding: list[str], *columns: str) -> Table:
    """A table whose numbers are never cut, also on 80 columns; the `folding` first columns wrap instead."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in folding:
        table.add_column(column, overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _print_plan(plan: Any) -> None:
    table = _table(
        "Plan (one sample; multiply-adds from each site to the next)",
        ["site", "module"],
        *("tokens\nbefore", "tokens\nafter", "G mult-adds\nbefore", "G mult-adds\nafter"),
    )
    for site in plan.sites:
        before, after = ("\n".join(f"{s} {n}" for s, n in c.items()) for c in (site.before, site.after))
        table.add_row(site.name, site.module, before, after, *(f"{n / 1e9:.3g}" for n in site.multiply_adds))
    console.print(table)
    console.print(
        f"multiply-adds: {plan.multiply_adds_before / 1e9:.4g} G before, {plan.multiply_adds_after / 1e9:.4g} G after, "
        f"{plan.ratio:.2f}x fewer",
        markup=False,
        highlight=False,
    )


def _print_report(report: Any) -> None:
    if report.reducers:
        columns = ("differ", "near-ties", "largest margin", "verdict")
        table = _table(f"Decisions ({report.samples} samples)", ["reducer"], *columns)
        for row in report.reducers:
            verdict = "pass" if row.passed else "FAIL"
            table.add_row(row.name, str(row.differ), str(row.near_ties), f"{row.worst_margin:.1e}", verdict)
        console.print(table)
    table = _table(
        f"Outputs against eager PyTorch ({report.dtype}, {report.provider})",
        ["output"],
        *("against", "samples", "absolute\nmax, mean", "relative\nmax, mean", "cosine", "top-1", "verdict"),
    )
    for row in report.outputs:
        verdict = ("pass" if row.passed else "FAIL") if row.judged or not row.finite else "reported"
        errors = (f"{row.max_abs:.2e}\n{row.mean_abs:.2e}", f"{row.max_rel:.2e}\n{row.mean_rel:.2e}")
        against = row.against.replace("_", " ")
        table.add_row(row.name, against, str(row.samples), *errors, f"{row.cosine:.6f}", f"{row.top1:.1%}", verdict)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _version(show: bool) -> None:
    if show:
        from . import __version__

        console.print(f"pumer-compile {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Without a command's name, `compile` is meant."""
    # A polite kill unwinds, so that temporary files go with it; no kill can touch the artifact itself.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {command.name for command in app.registered_commands}
    if given and given[0] not in commands | {"--help", "--version"}:
        given.insert(0, "compile")
    app(args=given, prog_name="pumer-compile")


if __name__ == "__main__":
    main()
