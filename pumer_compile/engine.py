"""One interface to artifacts of every format: torch tensors in by keyword, torch tensors out by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UsageError
from .exporters.manifest import read_manifest
from .exporters.session import open_session
from .plan import check_prompts, without_constants
from .runtimes.base import Runtime, TensorSpec


class Engine:
    """An artifact, ready to run.

    ```python
    engine = Engine("model.onnx")               # or model.engine, on a GPU
    logits = engine(**inputs)["logits"]         # torch tensors, on the engine's device
    ```

    It is a `Session` as well, so `parity` and `bench` use it. Not for several threads at a time: open one for each.

    Args:
        path: of the artifact; its manifest is checked first.
        provider: for ONNX: onnxruntime's execution provider (`cpu`, `cuda`, `tensorrt`); it must be the one in use.
        device: such as `cuda:1`; None is the CPU for ONNX (unless the provider needs a GPU), the current GPU for an
            engine.
        cuda_graph: replay a captured CUDA graph, one for each batch size; TensorRT engines only.
        expose: inner values to give as extra outputs, by name; ONNX only.

    Attributes:
        path: of the artifact.
        manifest: what the artifact says of itself.

    Raises:
        UsageError: not made by pumer-compile, changed since, or something that this machine lacks.
        ExportError: the runtime refuses the artifact, or it is not what its manifest says.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str | None = None,
        device: str | torch.device | None = None,
        cuda_graph: bool = False,
        expose: Sequence[str] = (),
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._session = open_session(
            self.path, self.manifest, provider=provider, device=device, cuda_graph=cuda_graph, expose=expose
        )

    @property
    def provider(self) -> str:
        """What executes it, such as `CPUExecutionProvider` or `tensorrt-rtx`."""
        return self._session.provider

    @property
    def device(self) -> torch.device:
        """Where outputs are."""
        return self._session.device if isinstance(self._session, Runtime) else torch.device("cpu")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return self._session.inputs

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return self._session.outputs

    @property
    def input_specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the inputs; an open batch is a name in place of a number."""
        if isinstance(self._session, Runtime):
            return self._session.input_specs
        open_batch = bool(self.manifest.get("dynamic_batch"))
        return {
            name: TensorSpec(
                tuple("batch" if open_batch and axis == 0 else size for axis, size in enumerate(said["shape"])),
                getattr(torch, said["dtype"]),
            )
            for name, said in self.manifest["inputs"].items()
        }

    @property
    def output_specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the outputs; empty where the runtime does not tell them."""
        return self._session.output_specs if isinstance(self._session, Runtime) else {}

    def close(self) -> None:
        """Give the memory of weights back; nothing runs afterwards."""
        self._session.close()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name, on `device`.

        Args:
            **inputs: tensors by input name, on any device; cast to the dtypes of the artifact.

        Raises:
            UsageError: an input is missing, is not one of the artifact's, or has another shape.
        """
        check_prompts(self.manifest, inputs)
        fixed = {*(self.manifest.get("fixed_inputs") or {}), *(self.manifest.get("unpadded_inputs") or ())}
        inputs = {name: t for name, t in without_constants(self.manifest, inputs).items() if name not in fixed}
        unknown = [name for name in inputs if name not in self.inputs]
        if unknown:
            raise UsageError(
                f"{self.path} takes no input {unknown[0]}; it takes {', '.join(self.inputs)}. What it was not compiled "
                "with cannot be given to it."
            )
        if isinstance(self._session, Runtime):
            return self._session.call(inputs)
        return {name: torch.from_numpy(array) for name, array in self._session.run(inputs).items()}

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name as arrays, from a batch that may hold more than the artifact's inputs."""
        check_prompts(self.manifest, batch)
        return self._session.run(batch)

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, provider={self.provider!r}, device={str(self.device)!r})"
