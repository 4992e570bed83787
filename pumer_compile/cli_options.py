"""The options that the commands share, with their help; what they say is parsed here too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import UsageError

if TYPE_CHECKING:
    from .exporters.base import Profile
    from .schedule import Schedule

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="save_pretrained folder, torch.export archive, checkpoint, or Hub id.")
]
ScheduleName = Annotated[
    str, typer.Option("--schedule", "-s", metavar="SCHEDULE", help="YAML file, preset name, or `none`.")
]
SemanticsName = Annotated[
    str | None,
    typer.Option(
        "--semantics",
        metavar="NAME",
        help="In place of the schedule's: safe (the default), reference (for models fine-tuned with the published "
        "code), paper; of vispruner reference or stable.",
        show_default=False,
    ),
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
NoPadding = Annotated[
    bool,
    typer.Option(
        "--no-padding",
        help="No text or image is ever padded: masks are written into the artifact as ones, which then takes none.",
    ),
]
Component = Annotated[
    str | None,
    typer.Option(
        "--component",
        metavar="vision",
        help="Keep only what makes an image's tokens: pixels in; features, ready for a prompt, and their places out.",
        show_default=False,
    ),
]
DumpGraph = Annotated[
    Path | None,
    typer.Option("--dump-graph", metavar="DIR", help="Write the graph after each pass.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what each pass did; tracebacks on errors.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32 (default), float16 or bfloat16.", show_default=False)
]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", help="ONNX: int8, of linear layers; reducers stay float32.", show_default=False),
]
QuantizeMode = Annotated[
    str | None,
    typer.Option("--quantize-mode", help="ONNX: weights, dynamic (default) or static.", show_default=False),
]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE.npz", help="ONNX: samples for static.", show_default=False),
]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="batch=MIN:OPT:MAX",
        help="Leave the batch open between MIN and MAX and tune for OPT; may be repeated.",
        show_default=False,
    ),
]
Lean = Annotated[
    str | None,
    typer.Option(
        "--lean",
        metavar="NAME,...",
        help="ONNX: passes over the finished graph, of strides, rows, projections, attention, or none; default: what "
        "pays for the target.",
        show_default=False,
    ),
]
Builder = Annotated[
    str | None,
    typer.Option("--builder", help="Engines: tensorrt or tensorrt-rtx; default: what is there.", show_default=False),
]
ComputeCapability = Annotated[
    str | None,
    typer.Option(
        "--compute-capability",
        metavar="X.Y,...",
        help="Engines of tensorrt-rtx: GPUs to build for, such as 8.6,8.9,12.0; default: portable.",
        show_default=False,
    ),
]
TimingCache = Annotated[
    Path | None,
    typer.Option("--timing-cache", metavar="FILE", help="Engines: read and write kernel timings.", show_default=False),
]
OptimizationLevel = Annotated[
    int | None,
    typer.Option("--optimization-level", help="Engines: 0 (builds fast) to 5 (runs fast).", show_default=False),
]
Workspace = Annotated[
    int | None,
    typer.Option("--workspace", metavar="MIB", min=1, help="Engines: most scratch memory.", show_default=False),
]
LayerInfo = Annotated[
    Path | None,
    typer.Option("--layer-info", metavar="OUT.json", help="Engines: write what was built.", show_default=False),
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Engines: loadable by later minor versions of the library.")
]
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

Provider = Annotated[
    str | None,
    typer.Option(
        "--provider", help="ONNX: run under onnxruntime's cpu (default), cuda or tensorrt.", show_default=False
    ),
]
SaveInputs = Annotated[
    Path | None,
    typer.Option("--save-inputs", metavar="FILE.json", help="Write the inputs for Polygraphy.", show_default=False),
]
SaveOutputs = Annotated[
    Path | None,
    typer.Option("--save-outputs", metavar="FILE.json", help="Write the outputs for Polygraphy.", show_default=False),
]

TritonRepository = Annotated[
    Path | None,
    typer.Option(
        "--triton-repository",
        metavar="DIR",
        help="Put the artifact into a model repository of Triton Inference Server, too.",
        show_default=False,
    ),
]


def load_schedule(name: str, semantics: str | None) -> Schedule | None:
    """The schedule of a file or a preset; None for `none`."""
    from .schedule import Schedule

    if name != "none":
        return Schedule.load(name, semantics=semantics)
    if semantics is not None:
        raise UsageError("--semantics says how tokens are reduced, and `--schedule none` reduces none: leave it out.")
    return None


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
    from .exporters.base import Profile

    return tuple(Profile.parse(item) for item in items) if items else None


def lean(text: str | None) -> tuple[str, ...] | None:
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
    if schedule is not None and schedule.method != "vispruner":
        raise UsageError(
            f"`method: {schedule.method}` does nothing before the prompt, so it does not go with --component vision. "
            "`method: vispruner` selects there."
        )
