"""OpenVINO: a captured graph through transformers' own exporter, as in `onnx.py`.

An artifact is a graph (`.xml`) and its weights (`.bin`). OpenVINO finds the weights by the stem of the graph's name
alone, so their name cannot hold a hash of their content; the manifest holds the SHA-256 of both files instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch.export import ExportedProgram
from transformers import PreTrainedModel

from ..artifacts.options import OpenVinoOptions, Options
from ..artifacts.profile import Profile
from ..capture.capture import Program, batch_inputs
from ..capture.loading import quiet
from ..errors import ExportError, UsageError
from ..files import check_writable
from ..reduce import Reduced
from ..runtimes.openvino import OpenVinoSession, load_openvino
from .base import Evidence, Writer
from .chain import GraphStep, Prepared, cast, prepare, program_of
from .while_loops import carry_everything


@dataclass(frozen=True)
class OpenVinoBuild:
    """An OpenVINO model in memory.

    Attributes:
        model: an `openvino.Model` with the decisions as extra outputs.
        outputs: the model's own outputs.
        decisions: the extra outputs.
    """

    model: Any
    outputs: list[str]
    decisions: list[str]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [str(port.get_any_name()) for port in self.model.inputs]

    def without_decisions(self) -> Any:
        """A copy that gives the model's own outputs only, which OpenVINO saves without what none of them needs."""
        model = self.model.clone()
        for result in model.get_results()[len(self.outputs) :]:
            model.remove_result(result)
        return model


def build_openvino(reduced: Reduced | Program, options: OpenVinoOptions) -> OpenVinoBuild:
    """Convert the graph of a reduced program, or of a captured one as it is, to an OpenVINO model in memory.

    Args:
        reduced: from `reduce` or `capture`; captured and reduced anew only where it is not of float32.
        options: see `OpenVinoOptions`.

    Raises:
        ExportError: conversion failed.
    """
    reduced = cast(reduced, "float32")
    program, prepared = program_of(reduced), prepare(reduced)
    with _readable(), quiet(), contextlib.redirect_stdout(None):
        through = _through_transformers if isinstance(program.model, PreTrainedModel) else _through_openvino
        model = through(prepared)
        for port, name in zip(model.outputs, [*prepared.outputs, *prepared.decisions], strict=True):
            port.get_tensor().set_names({name})
        model.reshape(_shapes(program, model, options.profiles))
    for option in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"):
        model.set_rt_info("f32", ["runtime_options", option])
    return OpenVinoBuild(model, prepared.outputs, prepared.decisions)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """OpenVINO's errors as ours. It raises RuntimeError itself, or types that share no public base class."""
    try:
        yield
    except Exception as error:
        if type(error) is not RuntimeError and not type(error).__module__.startswith("openvino"):
            raise
        # Its first lines name places in its own sources.
        text = " ".join(str(error).rpartition("Summary:")[2].split())[:400]
        raise ExportError(f"OpenVINO could not convert the graph: {text}") from error


def _through_transformers(prepared: Prepared) -> Any:
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    class GraphOpenVinoExporter(OpenVINOExporter, GraphStep):  # type: ignore[misc]  # one converts what the other exports
        """transformers' OpenVINO exporter for a graph that was captured before."""

        def export(self, model: Any, sample_inputs: Any, config: Any) -> ExportedProgram:  # type: ignore[override]
            """With loops as OpenVINO takes them."""
            return carry_everything(super().export(model, sample_inputs, config))

    exporter = GraphOpenVinoExporter()  # type: ignore[no-untyped-call]
    config = OpenVINOConfig(dynamic_shapes=prepared.dynamic_shapes, stateful=False)
    return exporter.convert(prepared, config)


def _through_openvino(prepared: Prepared) -> Any:
    return load_openvino().convert_model(carry_everything(prepared.export()))


def _shapes(program: Program, model: Any, profiles: Sequence[Profile]) -> dict[Any, Any]:
    """Shapes of the inputs, by port: those of the program; an open batch between the sizes of the profiles."""
    openvino = load_openvino()
    batched = batch_inputs(program.inputs) if program.dynamic_batch else ()
    low, high = (min(p.minimum for p in profiles), max(p.maximum for p in profiles)) if profiles else (1, -1)
    shapes = {}
    for port in model.inputs:
        name = port.get_any_name()
        sizes: list[Any] = list(program.inputs[name].shape)
        if name in batched:
            sizes[0] = openvino.Dimension(low, high)
        shapes[port] = openvino.PartialShape(sizes)
    return shapes


class OpenVinoWriter(Writer[OpenVinoOptions, OpenVinoBuild]):
    """Writes OpenVINO models, proved on its CPU plugin in float32."""

    options_class: ClassVar[type[Options]] = OpenVinoOptions

    def check_path(self, path: Path) -> None:
        """The weights go to a file of their own, beside the graph."""
        super().check_path(path)
        check_writable(path.with_suffix(".bin"))

    def check(self, *, dynamic_batch: bool, verify: bool) -> None:
        """Refuse where OpenVINO or transformers' exporter for it is missing."""
        super().check(dynamic_batch=dynamic_batch, verify=verify)
        load_openvino()
        try:
            from transformers.exporters.configs import OpenVINOConfig  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "This version of transformers has no exporter for OpenVINO. Install a newer one (tested with 5.23), or "
                "write ONNX (-o model.onnx), which OpenVINO reads too."
            ) from error

    def build(self, reduced: Reduced | Program) -> OpenVinoBuild:
        """See `build_openvino`."""
        return build_openvino(reduced, self.options)

    def save(self, build: OpenVinoBuild, path: Path, *, with_decisions: bool) -> list[Path]:
        """The weights, then the graph."""
        self._write(build.model if with_decisions else build.without_decisions(), path)
        return [path.with_suffix(".bin"), path]

    def _write(self, model: Any, path: Path) -> None:
        load_openvino().save_model(model, str(path), compress_to_fp16=self.options.dtype == "float16")

    def companion(self, file: Path, path: Path) -> Path:
        """`model.bin` of `model.xml`, `model.bin.failed` of `model.xml.failed`."""
        stem, _, rest = path.name.rpartition(".xml")
        return path.with_name(f"{stem}.bin{rest}")

    def evidence(self, build: OpenVinoBuild, files: Sequence[Path]) -> Evidence:
        """The artifact on the CPU plugin, with a decision session where it does not give its decisions."""
        session = OpenVinoSession(files[-1])
        reopen = partial(OpenVinoSession, files[-1])
        if all(name in session.outputs for name in build.decisions):
            return Evidence(session, reopen)
        return Evidence(session, reopen, partial(self._with_decisions, build, files[-1]))

    def _with_decisions(self, build: OpenVinoBuild, path: Path) -> OpenVinoSession:
        """The decision session: a second model that gives the decisions, which the artifact does not even compute."""
        second = path.parent / "deciding" / path.name
        second.parent.mkdir(exist_ok=True)
        self._write(build.model, second)
        return OpenVinoSession(second)

    def describe(self, build: OpenVinoBuild) -> dict[str, Any]:
        """Inputs are float32, whatever the weights are."""
        return {**super().describe(build), "input_dtype": "float32"}
