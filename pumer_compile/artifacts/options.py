"""Options of the formats: names, defaults, what each does. The one place that says a default; the command line reads it
here, so nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import UsageError
from .profile import Profile

if TYPE_CHECKING:
    from ..schedule import Schedule

Precision = Literal["float32", "float16", "bfloat16"]
Target = Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"]
QuantizeMode = Literal["weights", "dynamic", "static"]
PassName = Literal["projections", "rows", "strides", "attention"]
"""Optimizations of a finished ONNX graph (`exporters/onnx_passes`), in the order in which they run."""
DEFAULT_PASSES: Mapping[str | None, tuple[PassName, ...]] = {
    None: ("strides",),
    "onnxruntime-cpu": ("strides",),
    "onnxruntime-cuda": (),
    "tensorrt": ("attention",),
}
"""What runs for a target where nothing else is asked for. Portable models are made for the processor they are proved
on."""
MIN_OPSET, DEFAULT_OPSET = 18, 20
DEFAULT_MODE: QuantizeMode = "dynamic"
"""What `quantize` means where no mode is given."""


def _help(text: str, **more: str) -> dict[str, str]:
    """Metadata of a field: its help on the command line; `flag`, where that has another name than the field."""
    return {"help": text, **more}


def one_of(kind: Any, default: str | None = None) -> str:
    """`a, b (default) or c`, of a Literal."""
    *names, last = (f"{name} (default)" if name == default else name for name in get_args(kind))
    return f"{', '.join(names)} or {last}"


@dataclass(frozen=True)
class Options:
    """What every exporter takes.

    Attributes:
        dtype: of weights and activations; reducers decide in float32 in any case.
        profiles: batch sizes that an artifact with an open batch is built for and proved at.

    A field is a flag of the command line, whose name is the field's unless its metadata says another (`flag`).
    """

    dtype: Precision = field(default="float32", metadata=_help(f"{one_of(Precision, 'float32')}."))
    profiles: tuple[Profile, ...] = field(
        default=(),
        metadata=_help("Leave the batch open between MIN and MAX and tune for OPT; may be repeated.", flag="--profile"),
    )

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Precision):
            raise UsageError(f"No dtype {self.dtype!r}: choose {', '.join(get_args(Precision))}.")

    @property
    def tolerance(self) -> str:
        """Which of parity's tolerances the artifact is judged by."""
        return self.dtype


@dataclass(frozen=True)
class OnnxOptions(Options):
    """How to write ONNX.

    Attributes:
        opset: of the default domain, 18 or newer.
        target: a runtime whose operators and forms to use; None is portable ONNX.
        onnx_passes: over the finished graph, of `PassName`; None takes what pays for the target, and nothing where
            the model is converted as it is (no schedule, no target) or quantized.
        quantize: `int8` quantizes the linear layers; reducers stay float32 (see `quantize.py`).
        quantize_mode: `weights`, `dynamic` (taken where None is given) or `static`.
        calibration: samples for `static`, an `.npz` file of arrays by input name.
    """

    opset: int = field(
        default=DEFAULT_OPSET, metadata=_help(f"ONNX opset, {MIN_OPSET} or newer (default {DEFAULT_OPSET}).")
    )
    target: Target | None = field(
        default=None,
        metadata=_help("onnxruntime-cpu or onnxruntime-cuda, for its fused operators; tensorrt, for its forms."),
    )
    onnx_passes: tuple[str, ...] | None = field(
        default=None,
        metadata=_help(
            f"Passes over the finished graph, of {', '.join(get_args(PassName))}, or none; default: what pays for the "
            "target."
        ),
    )
    quantize: str | None = field(default=None, metadata=_help("int8, of linear layers; reducers stay float32."))
    quantize_mode: QuantizeMode | None = field(default=None, metadata=_help(f"{one_of(QuantizeMode, DEFAULT_MODE)}."))
    calibration: Path | None = field(default=None, metadata=_help("Samples for static."))
    lean: InitVar[tuple[str, ...] | None] = None
    """What `onnx_passes` was called before."""

    def __post_init__(self, lean: tuple[str, ...] | None) -> None:
        super().__post_init__()
        if lean is not None:
            object.__setattr__(self, "onnx_passes", lean)
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not MIN_OPSET <= self.opset <= newest:
            raise UsageError(f"Opset {self.opset} is not supported: choose {MIN_OPSET} to {newest}.")
        if self.target is not None and self.target not in get_args(Target):
            raise UsageError(f"No target {self.target!r}: choose {', '.join(get_args(Target))}.")
        unknown = [name for name in self.onnx_passes or () if name not in get_args(PassName)]
        if unknown:
            raise UsageError(f"No ONNX pass {unknown[0]!r}: choose from {', '.join(get_args(PassName))}, or none.")
        if self.onnx_passes and self.quantize is not None:
            raise UsageError("--quantize int8 makes other products of what --onnx-passes changes. Leave one out.")
        mode = check_quantization(
            self.quantize, self.quantize_mode, self.calibration, dtype=self.dtype, target=self.target
        )
        object.__setattr__(self, "quantize_mode", mode)  # the manifest names the mode, taken or given

    @property
    def tolerance(self) -> str:
        """Quantized artifacts have tolerances of their own."""
        return self.quantize or self.dtype

    def passes(self, schedule: Schedule | None) -> tuple[str, ...]:
        """The ONNX passes that run on a model reduced by a schedule (None: not at all)."""
        if self.onnx_passes is not None:
            return self.onnx_passes
        as_it_is = schedule is None and self.target is None
        return () if as_it_is or self.quantize is not None else DEFAULT_PASSES[self.target]


@dataclass(frozen=True)
class EngineOptions(Options):
    """How to build an engine.

    Attributes:
        builder: `tensorrt` or `tensorrt-rtx`; None takes what is there.
        compute_capabilities: GPUs to build for, such as `("8.6", "12.0")`; none is portable. TensorRT-RTX only.
        timing_cache: file of kernel timings to read and to write. TensorRT only.
        optimization_level: 0 (builds fast) to 5 (runs fast); None is the builder's default.
        workspace: most scratch memory, MiB; None is the builder's default.
        layer_info: JSON file for the layers of the built engine; needs a device that loads it.
        version_compatible: loadable by later minor versions of the library. TensorRT only.
    """

    builder: str | None = field(default=None, metadata=_help("tensorrt or tensorrt-rtx; default: what is there."))
    compute_capabilities: tuple[str, ...] = field(
        default=(),
        metadata=_help(
            "GPUs that tensorrt-rtx builds for, such as 8.6,8.9,12.0; default: portable.", flag="--compute-capability"
        ),
    )
    timing_cache: Path | None = field(default=None, metadata=_help("Read and write kernel timings."))
    optimization_level: int | None = field(default=None, metadata=_help("0 (builds fast) to 5 (runs fast)."))
    workspace: int | None = field(default=None, metadata=_help("Most scratch memory."))
    layer_info: Path | None = field(default=None, metadata=_help("Write what was built."))
    version_compatible: bool = field(default=False, metadata=_help("Loadable by later minor versions of the library."))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"Optimization level {self.optimization_level} is not between 0 and 5.")
        if self.workspace is not None and self.workspace < 1:
            raise UsageError(f"A workspace of {self.workspace} MiB is no workspace; give at least 1.")


@dataclass(frozen=True)
class OpenVinoOptions(Options):
    """How to write OpenVINO models.

    Attributes:
        dtype: of the *weights* in the file. Inputs, activations and outputs are float32 in any case, and the model
            asks devices to compute in float32, so that reducers decide in it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "bfloat16":
            raise UsageError(
                "OpenVINO artifacts are float32 or float16 (weights stored in half precision), not bfloat16: their "
                "graph computes in float32 in any case. Choose one of the two."
            )


def check_quantization(
    quantize: str | None, mode: str | None, calibration: Path | None, *, dtype: str, target: str | None
) -> QuantizeMode | None:
    """The mode that these options come to; None without quantization.

    Raises:
        UsageError: an unknown value, an option that is missing or superfluous, or options that exclude each other.
    """
    if quantize is None:
        if mode is not None or calibration is not None:
            option = "--quantize-mode" if mode is not None else "--calibration"
            raise UsageError(f"{option} is for quantized artifacts: give --quantize int8 too, or leave it out.")
        return None
    if quantize != "int8":
        raise UsageError(f"No quantization to {quantize!r}: choose int8.")
    chosen = DEFAULT_MODE if mode is None else mode
    if chosen not in get_args(QuantizeMode):
        raise UsageError(f"No --quantize-mode {chosen!r}: choose {', '.join(get_args(QuantizeMode))}.")
    if chosen == "static" and calibration is None:
        raise UsageError(
            "--quantize-mode static fixes the range of every activation from samples: give them with "
            "--calibration FILE.npz (arrays by input name, a few hundred real samples on the batch axis), or choose "
            "dynamic."
        )
    if chosen != "static" and calibration is not None:
        raise UsageError(f"--calibration is for --quantize-mode static; {chosen} needs no samples. Leave it out.")
    if dtype != "float32":
        raise UsageError(
            f"--quantize int8 starts from float32; --dtype {dtype} does not go with it. Leave one of the two out."
        )
    if target is not None:
        raise UsageError(
            f"--quantize int8 starts from portable ONNX; --target {target} fuses what it would quantize. Leave one of "
            "the two out."
        )
    return chosen  # type: ignore[return-value]  # one of the literals, as checked


def help_of(kind: type[Options], name: str) -> str:
    """What the command line says of an option of a format."""
    return str(kind.__dataclass_fields__[name].metadata["help"])
