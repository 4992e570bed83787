"""TensorRT as a backend of transformers' exporters: `ExportedModel` saves, loads and calls engines as it does ONNX.

```python
exporter = AutoHfExporter.from_config(TensorRtConfig(schedule="vilt-vqa"))
exported = exporter.export(model, inputs, TensorRtConfig(schedule="vilt-vqa"))
exported.save_pretrained("served")
logits = ExportedModel.from_pretrained("served")(**inputs).logits   # on a GPU
```

Importing this module registers the backend; the package does so where transformers has runners (not in 5.17).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_unflatten
from transformers import PreTrainedModel
from transformers.exporters.auto import register_backend
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import patch_model_config
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.metadata import ExportMetadata, build_export_metadata, record_output_structure
from transformers.exporters.runners.base import ModelRunner
from transformers.exporters.utils import onnx_inputs

from ..artifacts.manifest import read_manifest, sidecar
from ..artifacts.options import DEFAULT_OPSET, EngineOptions
from ..artifacts.profile import Profile
from ..capture.capture import Program, capture
from ..errors import UsageError
from ..files import sha256_file
from ..reduce import Reduced, reduce, schedule_for
from ..runtimes.tensorrt import TensorRtSession
from .chain import program_of, schedule_of
from .manifest import make_manifest
from .tensorrt import EngineWriter

FORMAT = "tensorrt"


@dataclass
class TensorRtConfig(OnnxConfig):
    """How to export an engine; `EngineOptions` in the form that transformers keeps configurations in (plain JSON).

    Attributes:
        schedule: preset, file, or the keys of a schedule; None reduces nothing.
        streams: the token stream that an input starts, by input name.
        outputs: those of the model to keep; none keeps all.
        builder, compute_capabilities, optimization_level, workspace: see `EngineOptions`.
        profiles: such as `["batch=1:8:32"]`; any leaves the batch open.
    """

    export_format: str = FORMAT  # type: ignore[assignment]  # transformers' own formats are an enumeration
    opset_version: int | None = DEFAULT_OPSET
    schedule: str | dict[str, Any] | None = None
    streams: dict[str, str] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    builder: str | None = None
    compute_capabilities: list[str] = field(default_factory=list)
    profiles: list[str] = field(default_factory=list)
    optimization_level: int | None = None
    workspace: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.ort_fusions is not None or self.quantizer is not None:
            raise UsageError("Engines take neither ort_fusions nor a quantizer; leave them out.")

    def options(self, dtype: str) -> EngineOptions:
        """The same, as the engine writer takes it."""
        return EngineOptions(
            dtype=dtype,  # type: ignore[arg-type]  # checked there
            profiles=tuple(Profile.parse(text) for text in self.profiles),
            builder=self.builder,
            compute_capabilities=tuple(self.compute_capabilities),
            optimization_level=self.optimization_level,
            workspace=self.workspace,
        )


@dataclass(frozen=True)
class EngineProgram:
    """An engine with its manifest, at `path`; the folder is temporary until it is saved.

    Attributes:
        path: of the engine; `<engine>.manifest.json` lies beside it.
        keep: keeps a temporary folder alive.
    """

    path: Path
    keep: Any = None


class TensorRtExporter(OnnxExporter):
    """An exporter of transformers that captures, reduces and writes an engine; it needs what ONNX needs."""

    export_format = FORMAT  # type: ignore[assignment]  # as above
    config_class = TensorRtConfig
    program_suffix = ".engine"

    def export_program(  # type: ignore[override]  # every exporter has programs and a configuration of its own
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: TensorRtConfig
    ) -> tuple[EngineProgram, ExportMetadata]:
        """See transformers' `HfExporter.export_program`."""
        writer = EngineWriter(config.options(str(model.dtype).removeprefix("torch.")))
        writer.check(dynamic_batch=bool(config.profiles), verify=False)
        schedule = None if config.schedule is None else schedule_for(model, config.schedule)
        flags = {name: value for name, value in sample_inputs.items() if not isinstance(value, torch.Tensor)}
        with patch_model_config(model, flags):
            program = capture(
                model,
                {name: value for name, value in sample_inputs.items() if name not in flags},
                dynamic_batch=bool(config.profiles),
                streams=config.streams,
                outputs=config.outputs,
            )
        return self._built(writer, program if schedule is None else reduce(program, schedule)), _metadata(program)

    def _built(self, writer: EngineWriter, reduced: Reduced | Program) -> EngineProgram:
        folder = tempfile.TemporaryDirectory(prefix="pumer-engine-")
        path = Path(folder.name) / "model.engine"
        engine = writer.build(reduced)
        writer.save(engine, path, with_decisions=False)
        manifest = make_manifest(
            program_of(reduced),
            schedule_of(reduced),
            reduced.plan if isinstance(reduced, Reduced) else None,
            inputs=engine.inputs,
            outputs=engine.outputs,
            decisions=engine.decisions,
            options=writer.describe(engine),
            parity={"verified": False},
        )
        described = {"artifact": path.name, "sha256": sha256_file(path), **manifest}
        sidecar(path).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        return EngineProgram(path, folder)

    @classmethod
    def save_program(cls, program: EngineProgram, path: str | Path) -> None:  # type: ignore[override]
        """The engine, and its manifest beside it under the name of the new file."""
        path = Path(path)
        path.write_bytes(program.path.read_bytes())
        manifest = {**read_manifest(program.path), "artifact": path.name}
        sidecar(path).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def program_files(cls, filename: str) -> list[str]:
        """The engine and its manifest."""
        return [filename, sidecar(Path(filename)).name]

    @classmethod
    def load_program(cls, path: str | Path) -> EngineProgram:  # type: ignore[override]
        """Refuses an engine that is not the one its manifest describes."""
        read_manifest(Path(path))
        return EngineProgram(Path(path))


def _metadata(program: Program) -> ExportMetadata:
    """What transformers keeps of an export, for a captured program."""
    info = vars(program.module.graph._codegen)["pytree_info"]
    metadata = build_export_metadata(
        program.model, program.inputs, SimpleNamespace(call_spec=info), TensorRtExporter.required_packages
    )
    given = tree_leaves(program.module.graph.output_node().args[0])
    outputs = [leaf.meta["val"] if isinstance(leaf, torch.fx.Node) else leaf for leaf in given]
    record_output_structure(metadata, tree_unflatten(outputs, info.out_spec))
    return metadata


class TensorRtRunner(ModelRunner):
    """Runs an engine on a CUDA device."""

    def __init__(self, metadata: Any, session: TensorRtSession, outputs: list[str]) -> None:
        super().__init__(metadata)
        self.session, self.outputs = session, outputs

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.session.device

    @classmethod
    def from_program(
        cls, program: EngineProgram, metadata: Any, device: Any = None, cuda_graph: bool = False
    ) -> TensorRtRunner:
        """See `Engine` for what is refused."""
        manifest = read_manifest(program.path)
        session = TensorRtSession(program.path, manifest, device=device, cuda_graph=cuda_graph)
        return cls(metadata, session, manifest["outputs"])

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> Any:
        """What the model returns, from its inputs by keyword; memory is never shared with the engine's own."""
        found = self.session.call(onnx_inputs(self.session.inputs, kwargs))
        return self.unflatten([found[name] for name in self.outputs])


register_backend(TensorRtExporter, TensorRtRunner)
