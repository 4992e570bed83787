"""The options that the commands share, with their help; what they say is parsed here too."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..artifacts.options import EngineOptions, OnnxOptions, help_of
from ..errors import ScheduleError, UsageError

if TYPE_CHECKING:
    from ..artifacts.profile import Profile
    from ..schedule import Schedule

# The groups of `--help`.
WHAT, MODEL, SHAPES = "What is reduced", "Model", "Inputs and shapes"
FORMAT, ONNX, QUANTIZE, ENGINES = "Precision and batch", "ONNX", "ONNX: int8", "Engines"
PROOF, SERVING, SCREEN = "Proof", "Output", "Screen"

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="save_pretrained folder, torch.export archive, checkpoint, or Hub id.")
]
ScheduleName = Annotated[
    str,
    typer.Option(
        "--schedule",
        "-s",
        metavar="SCHEDULE",
        help="YAML file, `none`, or a preset: vilt-vqa, vilt-nlvr2, vilt-ve, vilt-irtr, meter-vqa, meter-ve, "
        "meter-nlvr2, meter-irtr, meter-vqa-tower, meter-ve-tower, lossless.",
        rich_help_panel=WHAT,
    ),
]
SemanticsName = Annotated[
    str | None,
    typer.Option(
        "--semantics",
        metavar="NAME",
        help="In place of the schedule's: safe (the default), reference (for models fine-tuned with the published "
        "code), paper; of tome reference or safe; of the others reference or stable.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
OptionalSchedule = Annotated[
    str | None,
    typer.Option(
        "--schedule",
        "-s",
        metavar="SCHEDULE",
        help="YAML file, `none`, or a preset (pumer-compile list presets); without it the one that `inspect` suggests.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
TextTower = Annotated[
    Path | None,
    typer.Option(
        "--text-tower",
        metavar="FOLDER",
        help="CLIP checkpoint whose text tower becomes part of the graph (cdpruner): the key `text_tower`.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="config.json (or its folder) of a bare state dict.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load a pickled module: it runs code from the file. Trusted files only.",
        rich_help_panel=MODEL,
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="FILE.npz",
        help="Sample inputs, arrays by input name.",
        show_default=False,
        rich_help_panel=SHAPES,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        help="Batch size of random inputs.",
        show_default=False,
        rich_help_panel=SHAPES,
    ),
]
TextLength = Annotated[
    int | None,
    typer.Option(
        "--text-length",
        min=1,
        help="Text tokens of random inputs.",
        show_default=False,
        rich_help_panel=SHAPES,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="N or HxW",
        help="Pixels of images; position embeddings are interpolated.",
        show_default=False,
        rich_help_panel=SHAPES,
    ),
]
Streams = Annotated[
    list[str] | None,
    typer.Option(
        "--stream",
        metavar="INPUT=NAME",
        help="Name the token stream of an input.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
Outputs = Annotated[
    str | None,
    typer.Option(
        "--outputs",
        metavar="NAME,...",
        help="Keep only these outputs of the model.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
NoPadding = Annotated[
    bool,
    typer.Option(
        "--no-padding",
        help="No text or image is ever padded: masks are written into the artifact as ones, which then takes none.",
        rich_help_panel=SHAPES,
    ),
]
Component = Annotated[
    str | None,
    typer.Option(
        "--component",
        metavar="vision",
        help="Keep only what makes an image's tokens: pixels in; features, ready for a prompt, and their places out.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
DumpGraph = Annotated[
    Path | None,
    typer.Option(
        "--dump-graph",
        metavar="DIR",
        help="Write the graph after each pass.",
        show_default=False,
        rich_help_panel=SCREEN,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Print tables, and what each pass did; tracebacks on errors.",
        rich_help_panel=SCREEN,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print errors only.",
        rich_help_panel=SCREEN,
    ),
]
LogLevel = Annotated[
    str | None,
    typer.Option(
        "--log-level",
        metavar="LEVEL",
        help="debug, info, warning (default) or error; of log lines alone.",
        show_default=False,
        rich_help_panel=SCREEN,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help=help_of(OnnxOptions, "dtype"),
        show_default=False,
        rich_help_panel=FORMAT,
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help=help_of(OnnxOptions, "quantize"),
        show_default=False,
        rich_help_panel=QUANTIZE,
    ),
]
QuantizeMode = Annotated[
    str | None,
    typer.Option(
        "--quantize-mode",
        help=help_of(OnnxOptions, "quantize_mode"),
        show_default=False,
        rich_help_panel=QUANTIZE,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE.npz",
        help=help_of(OnnxOptions, "calibration"),
        show_default=False,
        rich_help_panel=QUANTIZE,
    ),
]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="batch=MIN:OPT:MAX",
        help=help_of(OnnxOptions, "profiles"),
        show_default=False,
        rich_help_panel=FORMAT,
    ),
]
Opset = Annotated[
    int | None,
    typer.Option("--opset", help=help_of(OnnxOptions, "opset"), show_default=False, rich_help_panel=ONNX),
]
Target = Annotated[
    str | None,
    typer.Option("--target", help=help_of(OnnxOptions, "target"), show_default=False, rich_help_panel=ONNX),
]
OnnxPasses = Annotated[
    str | None,
    typer.Option(
        "--onnx-passes",
        "--lean",
        metavar="NAME,...",
        help=help_of(OnnxOptions, "onnx_passes"),
        show_default=False,
        rich_help_panel=ONNX,
    ),
]
Builder = Annotated[
    str | None,
    typer.Option(
        "--builder",
        help=help_of(EngineOptions, "builder"),
        show_default=False,
        rich_help_panel=ENGINES,
    ),
]
ComputeCapability = Annotated[
    str | None,
    typer.Option(
        "--compute-capability",
        metavar="X.Y,...",
        help=help_of(EngineOptions, "compute_capabilities"),
        show_default=False,
        rich_help_panel=ENGINES,
    ),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(
        "--timing-cache",
        metavar="FILE",
        help=help_of(EngineOptions, "timing_cache"),
        show_default=False,
        rich_help_panel=ENGINES,
    ),
]
OptimizationLevel = Annotated[
    int | None,
    typer.Option(
        "--optimization-level",
        help=help_of(EngineOptions, "optimization_level"),
        show_default=False,
        rich_help_panel=ENGINES,
    ),
]
Workspace = Annotated[
    int | None,
    typer.Option(
        "--workspace",
        metavar="MIB",
        min=1,
        help=help_of(EngineOptions, "workspace"),
        show_default=False,
        rich_help_panel=ENGINES,
    ),
]
LayerInfo = Annotated[
    Path | None,
    typer.Option(
        "--layer-info",
        metavar="OUT.json",
        help=help_of(EngineOptions, "layer_info"),
        show_default=False,
        rich_help_panel=ENGINES,
    ),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help=help_of(EngineOptions, "version_compatible"),
        rich_help_panel=ENGINES,
    ),
]
Atol = Annotated[
    list[str] | None,
    typer.Option(
        "--atol",
        metavar="[OUTPUT=]X",
        help="Absolute tolerance, of one output or all.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
Rtol = Annotated[
    list[str] | None,
    typer.Option(
        "--rtol",
        metavar="[OUTPUT=]X",
        help="Relative tolerance, of one output or all.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.json",
        help="Write the parity report, and print its tables.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]

Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        help="ONNX: run under onnxruntime's cpu (default), cuda or tensorrt.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
SaveInputs = Annotated[
    Path | None,
    typer.Option(
        "--save-inputs",
        metavar="FILE.json",
        help="Write the inputs for Polygraphy.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]
SaveOutputs = Annotated[
    Path | None,
    typer.Option(
        "--save-outputs",
        metavar="FILE.json",
        help="Write the outputs for Polygraphy.",
        show_default=False,
        rich_help_panel=PROOF,
    ),
]

TritonRepository = Annotated[
    Path | None,
    typer.Option(
        "--triton-repository",
        metavar="DIR",
        help="Put the artifact into a model repository of Triton Inference Server, too.",
        show_default=False,
        rich_help_panel=SERVING,
    ),
]


def load_schedule(name: str | None, semantics: str | None, text_tower: Path | None = None) -> Schedule | None:
    """The schedule of a file or a preset; None for `none`, and where there is no name."""
    if name is None:
        if semantics or text_tower:
            raise UsageError("--semantics and --text-tower go with --schedule, and none was given.")
        return None
    from ..methods.reading import read_yaml
    from ..schedule import PRESETS, Schedule

    if text_tower is not None:
        if not Path(name).is_file():
            raise UsageError(f"--text-tower adds a key to a schedule file, and {name!r} is none.")
        keys = {**read_yaml(Path(name).read_text(encoding="utf-8"), name), "text_tower": str(text_tower)}
        return Schedule.load(keys, semantics=semantics)
    if name == "none":
        if semantics is None:
            return None
        raise UsageError("--semantics says how tokens are reduced, and `--schedule none` reduces none: leave it out.")
    names = ["none", *PRESETS]
    if name not in names and not Path(name).is_file():
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ScheduleError(
            f"No schedule {name!r}: it is neither a file nor a preset{meant} Presets: {', '.join(names)}."
        )
    return Schedule.load(name, semantics=semantics)


def image_pixels(text: str | None) -> int | tuple[int, int] | None:
    """Pixels from `384` or `384x640` (height x width)."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--image-size {text!r} is not a size: give pixels as 384 or 384x640.")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def name_and_value(text: str, option: str, form: str) -> tuple[str, str]:
    """Both sides of `name=value`."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UsageError(f"{option} {text!r} is not of the form {form}.")
    return name, value


def tolerance(items: list[str] | None) -> float | Mapping[str, float] | None:
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


def profiles(items: list[str] | None) -> tuple[Profile, ...] | None:
    """Batch sizes from `batch=1:8:32`."""
    from ..artifacts.profile import Profile

    return tuple(Profile.parse(item) for item in items) if items else None


def onnx_passes(text: str | None) -> tuple[str, ...] | None:
    """Passes from `strides,rows`; `none` is none of them."""
    if text is None:
        return None
    return () if text.strip() == "none" else tuple(name.strip() for name in text.split(","))


def compute_capabilities(text: str | None) -> tuple[str, ...] | None:
    """`("8.6", "12.0")` from `8.6,12.0`."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(","))
    if not all(re.fullmatch(r"[0-9]{1,2}\.[0-9]", part) for part in parts):
        raise UsageError(f"--compute-capability {text!r} is not a list of the form 8.6,8.9.")
    return parts


def check_component(component: str | None, outputs: str | None, schedule: Schedule | None) -> None:
    """Refuse a component that there is not, or that nothing reduces."""
    if component is None:
        return
    if component != "vision":
        raise UsageError(f"No component {component!r}: choose vision, or leave --component out for the whole model.")
    if outputs is not None:
        raise UsageError("--component chooses the outputs: leave out --outputs.")
    if schedule is not None and not schedule.before_prompt:
        from ..methods import METHODS

        there = " and ".join(f"`method: {name}`" for name, found in METHODS.items() if found.before_prompt)
        raise UsageError(
            f"`method: {schedule.method}` does nothing before the prompt, so it does not go with --component vision. "
            f"What does: {there}."
        )
