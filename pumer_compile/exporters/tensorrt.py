"""TensorRT engines, from the ONNX model that the ONNX exporter makes.

Networks are strongly typed: what is float32 in the graph (the reducers' scores and matching) stays float32 in the
engine, whatever `dtype` the rest has. The reducers select by counting and merge by a matrix product, so no budget meets
TensorRT's limit on TopK, and no scatter reaches the parser.

One interface, two builders (`tensorrt_library`): TensorRT tunes for the device it runs on, TensorRT-RTX needs none.
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir

from ..artifacts.options import EngineOptions, OnnxOptions, Options
from ..artifacts.profile import Profile
from ..artifacts.session import Session, decision_session_of
from ..capture.capture import Program
from ..errors import ExportError, UsageError
from ..files import atomic_path, check_writable
from ..reduce import Reduced
from ..runtimes.ort import OnnxSession, check_provider
from ..runtimes.tensorrt_library import Library, cuda_device, load_library, make_logger
from .base import Evidence, Writer
from .onnx import OnnxBuild, build_onnx, save_onnx

log = logging.getLogger("pumer_compile")

# ITopKLayer takes no larger K; a model's own TopK or sort can ask for one.
LARGEST_TOPK = 3840


@dataclass
class EngineBuild:
    """An engine on the way: the ONNX model it is built from, and later what was built.

    Attributes:
        onnx: with the decisions as extra outputs.
        library: that builds.
        parsed: the ONNX file that the engine was built from.
        facts: what the manifest says of the build.
    """

    onnx: OnnxBuild
    library: Library
    parsed: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return self.onnx.inputs

    @property
    def outputs(self) -> list[str]:
        """The model's own outputs."""
        return self.onnx.outputs

    @property
    def decisions(self) -> list[str]:
        """The reducers' decisions; outputs of the engine only where they were asked for."""
        return self.onnx.decisions


class EngineWriter(Writer[EngineOptions, EngineBuild]):
    """Writes TensorRT engines; the manifest goes beside them, so that the file is the plain plan other tools load."""

    options_class: ClassVar[type[Options]] = EngineOptions

    def check(self, *, dynamic_batch: bool, verify: bool) -> None:
        """Refuse a missing library or device, a target that cannot be built for, and options that do nothing."""
        super().check(dynamic_batch=dynamic_batch, verify=verify)
        options = self.options
        library = self.library()
        if dynamic_batch and not options.profiles:
            raise UsageError(
                "An engine with an open batch needs to know its sizes: give --profile batch=MIN:OPT:MAX "
                "(EngineOptions(profiles=...)), such as batch=1:8:32."
            )
        if library.name == "tensorrt-rtx":
            _check_rtx(library, options)
        elif options.compute_capabilities:
            raise UsageError(
                "--compute-capability is for tensorrt-rtx: TensorRT builds for the GPU of this machine. Leave it out, "
                "or choose --builder tensorrt-rtx."
            )
        for path in (options.timing_cache, options.layer_info):
            if path is not None:
                check_writable(path)
        if options.layer_info is not None and cuda_device() is None:
            raise UsageError(
                "--layer-info reads the built engine back, which needs a CUDA device; there is none here. Leave it out."
            )
        if verify and cuda_device() is None:
            check_provider()  # the ONNX model is what can be proved here
        if verify and options.dtype == "bfloat16" and cuda_device() is None:
            raise UsageError(
                "A bfloat16 engine cannot be proved here: there is no CUDA device, and onnxruntime's CPU provider does "
                "not run bfloat16. Choose float16 or float32, or publish it without a proof (--no-verify)."
            )

    def library(self) -> Library:
        """The builder's."""
        return load_library(self.options.builder)

    def build(self, reduced: Reduced | Program) -> EngineBuild:
        """Convert to ONNX; the engine itself is built where it is written."""
        options = OnnxOptions(dtype=self.options.dtype, target="tensorrt")
        return EngineBuild(build_onnx(reduced, options), self.library())

    def save(self, build: EngineBuild, path: Path, *, with_decisions: bool) -> list[Path]:
        """Build the engine and write it; the ONNX model it came from stays in a folder beside it, for the proof."""
        _check_topk(build.onnx.model)
        folder = path.parent / "onnx"
        folder.mkdir()
        model = build.onnx.model if with_decisions else build.onnx.without_decisions()
        build.parsed = save_onnx(model, folder / "model.onnx")[-1]
        start = time.monotonic()
        path.write_bytes(build_engine(build.library, build.parsed, self.options, self.progress))
        build.facts = {
            "builder": build.library.name,
            "builder_version": build.library.version,
            "device_capability": _device_capability(),
            "build_seconds": round(time.monotonic() - start, 1),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        log.info(
            "built the engine with %s %s in %.1f s, %.1f MiB; peak memory of the process %d MiB",
            build.library.name,
            build.library.version,
            build.facts["build_seconds"],
            path.stat().st_size / 2**20,
            build.facts["peak_memory_mib"],
        )
        return [path]

    def evidence(self, build: EngineBuild, files: Sequence[Path]) -> Evidence:
        """The engine itself where a device runs it, else the ONNX model that it was built from."""
        from ..runtimes.tensorrt import TensorRtSession

        try:
            engine = TensorRtSession(files[-1], self.describe(build))
        except UsageError as error:
            reason = str(error)
        else:
            hidden = [name for name in build.decisions if name not in engine.outputs]
            reopen = partial(TensorRtSession, files[-1], self.describe(build))
            return Evidence(engine, reopen, partial(self._with_decisions, build, files[-1]) if hidden else None)
        assert build.parsed is not None
        session = OnnxSession(build.parsed)
        others = decision_session_of(session, build.decisions)
        stand_in = "the ONNX model that the engine was built from"
        return Evidence(session, partial(OnnxSession, build.parsed), others, stand_in=stand_in, reason=reason)

    def _with_decisions(self, build: EngineBuild, engine: Path) -> Session:
        """The decision session: a second engine that gives the decisions too; an engine shows no inner values."""
        from ..runtimes.tensorrt import TensorRtSession

        self.progress("building a second engine that shows its decisions")
        model = save_onnx(build.onnx.model, engine.parent / "onnx" / "deciding.onnx")[-1]
        second = engine.parent / "onnx" / engine.name
        options = replace(self.options, layer_info=None, timing_cache=None)
        second.write_bytes(build_engine(build.library, model, options, self.progress))
        return TensorRtSession(second, self.describe(build))

    def describe(self, build: EngineBuild) -> dict[str, Any]:
        """Builder, version, device, time and memory."""
        return {**super().describe(build), **build.facts}


def _device_capability() -> str | None:
    found = cuda_device()
    return None if found is None else f"{found[0]}.{found[1]}"


# --- What a builder cannot do -----------------------------------------------------------------------------------------


def targets(library: Library) -> dict[str, Any]:
    """Compute capabilities that TensorRT-RTX builds for: `8.9` to its constant."""
    names = [name for name in dir(library.trt.ComputeCapability) if name.startswith("SM") and name[2:].isdigit()]
    ordered = sorted(names, key=lambda name: int(name[2:]))
    return {f"{name[2:-1]}.{name[-1]}": getattr(library.trt.ComputeCapability, name) for name in ordered}


def _check_rtx(library: Library, options: EngineOptions) -> None:
    known = targets(library)
    for capability in options.compute_capabilities:
        if capability not in known:
            raise UsageError(
                f"TensorRT-RTX {library.version} does not build for compute capability {capability}; it builds for "
                f"{', '.join(known)}. For another GPU use --builder tensorrt on a machine that has it, or the ONNX "
                "model under onnxruntime."
            )
        if capability == "7.5" and options.dtype != "float16":
            raise UsageError(
                f"TensorRT-RTX has no {options.dtype} matrix product for compute capability 7.5 (Turing). Choose "
                "--dtype float16, or newer GPUs."
            )
    if options.timing_cache is not None:
        raise UsageError(
            "TensorRT-RTX keeps no timing cache: it tunes where an engine is loaded. Leave --timing-cache out, or "
            "choose --builder tensorrt."
        )
    if options.version_compatible:
        raise UsageError(
            "TensorRT-RTX's package has no lean runtime, which --version-compatible puts into an engine. Leave it out, "
            "or choose --builder tensorrt."
        )


def _check_topk(model: onnx_ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.op_type != "TopK":
            continue
        k = onnx_ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if k is not None and int(k.numpy().max()) > LARGEST_TOPK:
            raise ExportError(
                f"The model's own TopK (or sort) {node.name} gives {int(k.numpy().max())} entries, and TensorRT's "
                f"limit is {LARGEST_TOPK}. Use fewer tokens, or ONNX under onnxruntime."
            )


# --- Building ---------------------------------------------------------------------------------------------------------


def build_engine(library: Library, model: Path, options: EngineOptions, progress: Callable[[str], None]) -> bytes:
    """Parse an ONNX file and build a serialized, strongly typed engine.

    Args:
        library: that builds.
        model: the ONNX file; weights beside it are found.
        options: see `EngineOptions`.
        progress: told what the builder does.

    Raises:
        ExportError: the parser refuses an operator, or the builder fails; with its own words.
    """
    trt, logger = library.trt, make_logger(library)
    builder = trt.Builder(logger)
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    progress("parsing")
    refused = unsupported(library, model, network, logger)
    if refused:
        raise ExportError(f"{library.name} {library.version} cannot take the ONNX model: {'; '.join(refused[:3])}.")
    config = _configured(library, builder, network, options)
    config.progress_monitor = _monitor(library, progress)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"{library.name} {library.version} could not build the engine: {logger.errors or 'it gave no reason'}"
        )
    _after(library, config, plan, options, logger)
    return bytes(memoryview(plan))


def unsupported(library: Library, model: Path, network: Any = None, logger: Any = None) -> list[str]:
    """What the parser refuses in an ONNX file, an operator an entry; nothing where an engine can be built of it.

    Args:
        library: whose parser is asked.
        model: the ONNX file.
        network: to parse into; None makes one and throws it away.
        logger: of that network.
    """
    trt = library.trt
    logger = logger or make_logger(library)
    if network is None:
        network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(model)):
        return []
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return [f"{e.node_operator()} (node {e.node_name()}): {e.desc()}" for e in errors] or ["it gave no reason"]


def _configured(library: Library, builder: Any, network: Any, options: EngineOptions) -> Any:
    trt, config = library.trt, builder.create_builder_config()
    # On by default, also in strongly typed networks: float32 products, those of the reducers too, would keep 10 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.layer_info is not None:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.compute_capabilities:
        known = targets(library)
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            config.set_compute_capability(known[capability], index)
    if options.timing_cache is not None:
        blob = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(blob), False):
            raise UsageError(
                f"The timing cache {options.timing_cache} is of another TensorRT or another GPU. Remove it, or name "
                "another file."
            )
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for profile in options.profiles:
        config.add_optimization_profile(_optimization_profile(builder, inputs, profile))
    return config


def _optimization_profile(builder: Any, inputs: Sequence[Any], profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for tensor in inputs:
        shape = tuple(tensor.shape)
        if -1 in shape:
            sizes = (profile.minimum, profile.optimum, profile.maximum)
            made.set_shape(tensor.name, *(tuple(size if d == -1 else d for d in shape) for size in sizes))
    return made


def _after(library: Library, config: Any, plan: Any, options: EngineOptions, logger: Any) -> None:
    """Write what was asked for beside the engine."""
    if options.timing_cache is not None:
        with atomic_path(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
    if options.layer_info is None:
        return
    trt = library.trt
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = options.version_compatible
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"The engine cannot be read back here, so there is no --layer-info: {logger.errors}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    with atomic_path(options.layer_info) as temporary:
        temporary.write_text(json.dumps(json.loads(text), indent=2) + "\n", encoding="utf-8")


# --- What a builder says ----------------------------------------------------------------------------------------------


def _monitor(library: Library, progress: Callable[[str], None]) -> Any:
    trt = library.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]  # the bindings have no types
        """Phases nest; the user sees the one that moves."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase.lower())

        def step_complete(self, phase: str, step: int) -> bool:
            progress(f"{phase.lower()} {step}/{self.steps.get(phase, step)}")
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
