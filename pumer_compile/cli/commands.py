"""The commands: `pumer-compile MODEL ...` compiles; `parity` proves an artifact; `plan` writes nothing."""

from __future__ import annotations

import difflib
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BAD_USAGE, ParityError, UsageError
from . import options as opt
from .capturing import captured, reduced_with, suggested
from .config_file import ConfigFile
from .shell import EXAMPLES, app, epilog, readable_errors, say_error, stage
from .tables import console, gained, print_bench, print_plan, print_report, say, shapes, size, summary

PARITY_EXAMPLES = """
Examples. On random samples with padding, on your own inputs, with a tolerance for one output:

    pumer-compile parity model.onnx --model MODEL

    pumer-compile parity model.onnx --model MODEL --inputs samples.npz

    pumer-compile parity model.onnx --model MODEL --atol logits=1e-3

Keep what the artifact was given and gave, and replay it with Polygraphy:

    pumer-compile parity model.onnx --model MODEL --save-inputs in.json --save-outputs out.json

    polygraphy run model.onnx --onnxrt --load-inputs in.json --load-outputs out.json
"""
PLAN_EXAMPLES = """
Examples. A table for a preset, then JSON for a schedule of your own and shorter texts:

    pumer-compile plan MODEL --schedule vilt-vqa

    pumer-compile plan MODEL --schedule schedule.yaml --text-length 20 --json
"""

BENCH_EXAMPLES = """
Examples. One artifact; the reduced one beside the unreduced one, at two batch sizes; on a GPU, with every sample:

    pumer-compile bench model.onnx

    pumer-compile bench model.onnx --vs unreduced.onnx --batch 1 --batch 8

    pumer-compile bench model.engine --cuda-graph --json bench.json

Inputs and outputs lie on the device; copies to it are not counted. The artifacts take turns in one process; the
memory of each is what it adds to a process of its own.
"""
TRITON_EXAMPLES = """
Examples. Serve a compiled artifact; or let the compilation do it:

    pumer-compile triton model.onnx models --name vqa --max-batch-size 16

    pumer-compile MODEL -s vilt-vqa -o vqa.onnx --triton-repository models

    tritonserver --model-repository models
"""
LIST_EXAMPLES = """
Examples. The methods of schedules, and when to use which; models that were tried:

    pumer-compile list methods

    pumer-compile list models
"""


@app.command("compile", epilog=epilog(EXAMPLES))
@readable_errors
def compile_(
    model: opt.Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT.onnx", help="Artifact to write.", rich_help_panel=opt.SERVING)
    ],
    schedule: opt.OptionalSchedule = None,
    semantics: opt.SemanticsName = None,
    text_tower: opt.TextTower = None,
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    inputs: opt.Inputs = None,
    batch: opt.Batch = None,
    text_length: opt.TextLength = None,
    image_size: opt.ImageSize = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch size open.", rich_help_panel=opt.FORMAT)
    ] = False,
    no_padding: opt.NoPadding = False,
    stream: opt.Streams = None,
    outputs: opt.Outputs = None,
    component: opt.Component = None,
    dtype: opt.Dtype = None,
    quantize: opt.Quantize = None,
    quantize_mode: opt.QuantizeMode = None,
    calibration: opt.Calibration = None,
    profile: opt.Profiles = None,
    opset: opt.Opset = None,
    target: opt.Target = None,
    onnx_passes: opt.OnnxPasses = None,
    builder: opt.Builder = None,
    compute_capability: opt.ComputeCapability = None,
    timing_cache: opt.TimingCache = None,
    optimization_level: opt.OptimizationLevel = None,
    workspace: opt.Workspace = None,
    layer_info: opt.LayerInfo = None,
    version_compatible: opt.VersionCompatible = False,
    with_decisions: Annotated[
        bool,
        typer.Option(
            "--with-decisions", help="Give every reducer's decisions as extra outputs.", rich_help_panel=opt.SERVING
        ),
    ] = False,
    triton_repository: opt.TritonRepository = None,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify", help="Publish without the parity check (the manifest says so).", rich_help_panel=opt.PROOF
        ),
    ] = False,
    atol: opt.Atol = None,
    rtol: opt.Rtol = None,
    report: opt.Report = None,
    dump_graph: opt.DumpGraph = None,
    config_file: ConfigFile = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: what was written, plan, proof.", rich_help_panel=opt.SCREEN),
    ] = False,
    log_level: opt.LogLevel = None,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Compile MODEL to a reduced artifact (the default command)."""
    from ..files import check_writable

    check_writable(output)
    chosen = opt.load_schedule(schedule, semantics, text_tower)
    opt.check_component(component, outputs, chosen)

    from ..exporters import check_exporter, exporter_options  # loads torch: nobody waits for that with a typo

    options = exporter_options(
        output,
        dtype=dtype,
        quantize=quantize,
        quantize_mode=quantize_mode,
        calibration=calibration,
        profiles=opt.profiles(profile),
        opset=opset,
        target=target,
        onnx_passes=opt.onnx_passes(onnx_passes),
        builder=builder,
        compute_capabilities=opt.compute_capabilities(compute_capability),
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        workspace=workspace,
        layer_info=layer_info,
        version_compatible=version_compatible or None,
    )
    if triton_repository is not None:
        from ..exporters.triton import check_compilation

        check_compilation(triton_repository, output, options)
    open_batch = dynamic_batch or bool(profile)
    check_exporter(output, options, dynamic_batch=open_batch, verify=not no_verify)
    tolerances = {"atol": opt.tolerance(atol), "rtol": opt.tolerance(rtol)}
    if report is not None:
        check_writable(report)
    sizes = (batch, text_length, image_size)
    how: dict[str, Any] = {"padding": not no_padding, "schedule": chosen}
    program = captured(model, config, allow_pickle, inputs, sizes, open_batch, stream, outputs, component, **how)
    reduced = (
        suggested(program, dump_graph, component) if schedule is None else reduced_with(program, chosen, dump_graph)
    )
    unreduced = schedule is not None and chosen is None
    asked = {"with_decisions": with_decisions or component is not None, "verify": not no_verify, **tolerances}
    done = _exported(reduced, output, report, verbose, options=options, **asked)
    if not unreduced and (verbose or report is not None):
        print_plan(reduced.plan, reduced.schedule)
    _say_what_was_written(done, None if unreduced else reduced)
    if triton_repository is not None:
        _write_triton(triton_repository, output.stem, output)
    if as_json:
        print(json.dumps(done.to_dict(), indent=2))


def _exported(reduced: Any, output: Path, report: Path | None, verbose: bool, **asked: Any) -> Any:
    """Export and prove. The report of the proof is printed, and saved where that was asked, also where it failed."""
    from ..exporters import export
    from ..parity.report import save_report

    with stage("exporting and proving" if asked["verify"] else "exporting") as progress:
        try:
            done = export(reduced, output, progress=progress, **asked)
        except ParityError as error:
            if error.report is not None:
                if report is not None:
                    save_report(error.report, report)
                print_report(error.report)
            raise
    if done.report is not None:
        print_report(done.report, whole=verbose or report is not None)
        if report is not None:
            save_report(done.report, report)
    return done


def _say_what_was_written(done: Any, reduced: Any) -> None:
    """Size, proof, meaning, shapes, gain, and what comes next."""
    from ..artifacts.manifest import artifact_bytes

    said = done.manifest
    if done.report is None:
        proved = "not verified"
    elif done.report.stand_in:
        proved = f"not executed; {done.report.stand_in} was proved against eager PyTorch: {summary(done.report)}"
    else:
        proved = f"proved against eager PyTorch: {summary(done.report)}"
    say(f"Wrote {done.path} ({size(artifact_bytes(done.path))}) and {done.manifest_path}; {proved}.")
    how = "not reduced" if reduced is None else f"{reduced.schedule.described}; multiply-adds: {gained(reduced.plan)}"
    say(f"{how[0].upper()}{how[1:]}.")
    fixed = {name: spec["shape"] for name, spec in said["inputs"].items()}
    say(f"Fixed shapes: {shapes(fixed, open_batch=bool(said['dynamic_batch']))}.")
    say(f"Next: pumer-compile bench {done.path}")


@app.command("parity", epilog=epilog(PARITY_EXAMPLES))
@readable_errors
def parity_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Made by pumer-compile.")],
    model: Annotated[Path, typer.Option("--model", "-m", metavar="MODEL", help="What it was compiled from.")],
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    inputs: opt.Inputs = None,
    atol: opt.Atol = None,
    rtol: opt.Rtol = None,
    provider: opt.Provider = None,
    save_inputs: opt.SaveInputs = None,
    save_outputs: opt.SaveOutputs = None,
    first_difference: Annotated[
        bool,
        typer.Option(
            "--first-difference",
            help="Look inside too, and name the first value that differs (ONNX).",
            rich_help_panel=opt.PROOF,
        ),
    ] = False,
    report: opt.Report = None,
    log_level: opt.LogLevel = None,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Prove an artifact against the reduced model in eager PyTorch; exit code 3 when it fails."""
    from ..artifacts.manifest import read_manifest, reduced_by
    from ..artifacts.session import check_runtime
    from ..capture.loading import load_model
    from ..capture.make_inputs import load_inputs
    from ..files import check_writable
    from ..parity.artifact import added_by, parity
    from ..parity.replay import check_recording
    from ..parity.report import save_report

    absolute, relative = opt.tolerance(atol), opt.tolerance(rtol)
    manifest = read_manifest(artifact)
    check_recording(manifest, save_inputs, save_outputs)
    check_runtime(artifact, manifest, provider=provider)
    if report is not None:
        check_writable(report)
    with stage(f"loading {model}"):
        loaded = load_model(model, config=config, allow_pickle=allow_pickle)
        samples = None if inputs is None else load_inputs(inputs, loaded.source, added_by(manifest))
    with stage("comparing"):
        result = parity(
            artifact,
            loaded,
            samples,
            atol=absolute,
            rtol=relative,
            provider=provider,
            save_inputs=save_inputs,
            save_outputs=save_outputs,
            first_difference=first_difference,
        )
    if report is not None:
        save_report(result, report)
    print_report(result, whole=verbose or report is not None or not result.passed)
    if result.first_difference:
        say(f"Inside: {result.first_difference}.")
    if not result.passed:
        raise ParityError(f"Parity failed: {result.failures()}.")
    how = reduced_by(manifest)
    say(f"{artifact} agrees with eager PyTorch ({how}; {result.dtype}, {result.provider}): {summary(result)}.")


@app.command("plan", epilog=epilog(PLAN_EXAMPLES))
@readable_errors
def plan_(
    model: opt.Model,
    schedule: opt.ScheduleName,
    semantics: opt.SemanticsName = None,
    text_tower: opt.TextTower = None,
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    inputs: opt.Inputs = None,
    batch: opt.Batch = None,
    text_length: opt.TextLength = None,
    image_size: opt.ImageSize = None,
    stream: opt.Streams = None,
    no_padding: opt.NoPadding = False,
    outputs: opt.Outputs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dump_graph: opt.DumpGraph = None,
    log_level: opt.LogLevel = None,
    verbose: opt.Verbose = False,
) -> None:
    """Show token counts and multiply-adds of one sample, before and after; write nothing."""
    if schedule == "none":
        raise UsageError("`--schedule none` reduces nothing, so there is no plan. Name a schedule file or a preset.")
    sizes = (batch, text_length, image_size)
    chosen = opt.load_schedule(schedule, semantics, text_tower)
    how: dict[str, Any] = {"padding": not no_padding, "schedule": chosen}
    program = captured(model, config, allow_pickle, inputs, sizes, False, stream, outputs, **how)
    reduced = reduced_with(program, chosen, dump_graph)
    if as_json:
        said = reduced.schedule.model_dump(mode="json", exclude_none=True)
        print(json.dumps({"schedule": said, **reduced.plan.to_dict()}, indent=2))
    else:
        print_plan(reduced.plan, reduced.schedule)
        say(f"Fixed shapes: {shapes({name: tensor.shape for name, tensor in program.inputs.items()})}.")
        asked = f" --semantics {semantics}" if semantics else ""
        asked += f" --inputs {inputs}" if inputs else ""
        say(f"Next: pumer-compile {model} --schedule {schedule}{asked} -o model.onnx")


@app.command("bench", epilog=epilog(BENCH_EXAMPLES))
@readable_errors
def bench_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Made by pumer-compile.")],
    vs: Annotated[
        list[Path] | None,
        typer.Option(
            "--vs",
            metavar="OTHER",
            help="Alternate with another artifact, or an ONNX model of others; may be repeated.",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Batch size, of an open batch; may be repeated.", show_default=False),
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", "-n", min=1, help="Calls that are counted.")] = 50,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Calls before them.")] = 10,
    inputs: opt.Inputs = None,
    provider: opt.Provider = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Engines: replay a captured CUDA graph.")] = False,
    decode: Annotated[
        Path | None,
        typer.Option("--decode", metavar="STEP.onnx", help="Generate, too, by this step.", show_default=False),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="That are generated.")] = 32,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="OUT.json", help="Write every sample and the machine.", show_default=False),
    ] = None,
    log_level: opt.LogLevel = None,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure an artifact: latency, throughput, peak memory; beside others, in turn."""
    from ..bench.bench import bench
    from ..files import check_writable

    if json_ is not None:
        check_writable(json_)
    with stage("measuring") as progress:
        result = bench(
            [artifact, *(vs or [])],
            batches=batch or [],
            iterations=iterations,
            warmup=warmup,
            inputs=inputs,
            provider=provider,
            cuda_graph=cuda_graph,
            decode=decode,
            tokens=tokens,
            progress=progress,
        )
    if json_ is not None:
        result.save(json_)
    print_bench(result)


@app.command("triton", epilog=epilog(TRITON_EXAMPLES))
@readable_errors
def triton_(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Made by pumer-compile: ONNX or TensorRT.")],
    repository: Annotated[Path, typer.Argument(metavar="DIR", help="Model repository.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model (default: the artifact's).", show_default=False)
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option("--max-batch-size", min=1, help="Of an open batch (default: its profile's, or 32)."),
    ] = None,
    verbose: opt.Verbose = False,
    quiet: opt.Quiet = False,
) -> None:
    """Put an artifact into a model repository of Triton Inference Server."""
    _write_triton(repository, artifact.stem if name is None else name, artifact, max_batch_size)


def _write_triton(repository: Path, name: str, artifact: Path, max_batch_size: int | None = None) -> None:
    from ..exporters.triton import write_triton_repository

    written = write_triton_repository(repository, name, artifact, max_batch_size=max_batch_size)
    say(f"Wrote {written} for Triton.")


@app.command("list", epilog=epilog(LIST_EXAMPLES))
@readable_errors
def list_(
    what: Annotated[str, typer.Argument(help="methods, models, formats or presets.", show_default=False)],
    verbose: opt.Verbose = False,
) -> None:
    """Show the methods, models, formats or presets that there are."""
    from .listing import print_list

    print_list(what)


def _version(show: bool) -> None:
    if show:
        from .. import __version__

        console.print(f"pumer-compile {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


# Commands in files of their own; importing one adds it.
from . import evaluate, inspect, search  # noqa: E402, F401
from . import report as _report  # noqa: E402, F401


def _mistyped(given: list[str], commands: set[str]) -> str | None:
    """What to say of a first word that is neither a command nor a model; None where it may be a model."""
    word = given[0]
    if word.startswith("-") or not word.isidentifier() or Path(word).exists():
        return None
    near = difflib.get_close_matches(word.lower(), sorted(commands), n=1, cutoff=0.7)
    if near:
        return f"There is no command {word!r} (and no model of that name); did you mean {near[0]}?"
    # `compile` takes one argument, and never without options.
    if len(given) == 1 or not given[1].startswith("-"):
        return (
            f"There is no command {word!r} (and no model of that name). Commands: {', '.join(sorted(commands))}; "
            "`pumer-compile --help` shows them."
        )
    return None


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Without a command's name, `compile` is meant."""
    # A polite kill unwinds, so that temporary files go with it; no kill can touch the artifact itself.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {str(command.name) for command in app.registered_commands}
    of_all = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
    if given and given[0] not in commands | of_all:
        mistyped = _mistyped(given, commands)
        if mistyped is not None:
            say_error(mistyped)
            raise SystemExit(BAD_USAGE)
        given.insert(0, "compile")
    app(args=given, prog_name="pumer-compile")


if __name__ == "__main__":
    main()
