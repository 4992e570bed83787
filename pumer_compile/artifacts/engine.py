"""One interface to artifacts of every format: tensors or arrays in by keyword, torch tensors out by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..guards import check_prompts, without_constants
from .manifest import read_manifest
from .runtime import Runtime, TensorSpec, as_tensors, to_numpy
from .session import Session, open_session


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
        session: below, which neither checks prompts nor takes what is fixed.

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
        self.session = open_session(
            self.path, self.manifest, provider=provider, device=device, cuda_graph=cuda_graph, expose=expose
        )

    @classmethod
    def over(cls, session: Session, manifest: Mapping[str, Any]) -> Engine:
        """An engine on a session that is open already: an artifact that is proved before it is published.

        Args:
            session: of the artifact.
            manifest: that it will have.
        """
        engine = cls.__new__(cls)
        engine.path, engine.manifest, engine.session = session.path, dict(manifest), session
        return engine

    @property
    def provider(self) -> str:
        """What executes it, such as `CPUExecutionProvider` or `tensorrt-rtx`."""
        return self.session.provider

    @property
    def device(self) -> torch.device:
        """Where outputs are."""
        return self.session.device if isinstance(self.session, Runtime) else torch.device("cpu")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return self.session.inputs

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return self.session.outputs

    @property
    def input_specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the inputs; an open batch is a name in place of a number."""
        if isinstance(self.session, Runtime):
            return self.session.input_specs
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
        return self.session.output_specs if isinstance(self.session, Runtime) else {}

    def close(self) -> None:
        """Give the memory of weights back; nothing runs afterwards."""
        self.session.close()

    def __call__(self, **inputs: Tensor | np.ndarray[Any, Any]) -> dict[str, Tensor]:
        """Outputs by name, on `device`.

        Args:
            **inputs: tensors on any device, or NumPy arrays, by input name; cast to the dtypes of the artifact.

        Raises:
            UsageError: an input is missing, is not one of the artifact's, has another shape, or holds ids that the
                model has no row for (which is looked at where they lie on the CPU).
        """
        tensors = as_tensors(inputs)
        check_prompts(self.manifest, tensors)
        _check_ids(self.manifest, tensors)
        fixed = self._fixed()
        tensors = {name: t for name, t in without_constants(self.manifest, tensors).items() if name not in fixed}
        unknown = [name for name in tensors if name not in self.inputs]
        if unknown:
            raise UsageError(
                f"{self.path} takes no input {unknown[0]}; it takes {', '.join(self.inputs)}. What it was not compiled "
                "with cannot be given to it."
            )
        if isinstance(self.session, Runtime):
            return self.session.call(tensors)
        return {name: torch.from_numpy(array) for name, array in self.session.run(tensors).items()}

    def run(self, batch: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name as arrays, as a call gives them, from a batch that may hold inputs of the model that the
        artifact does not read."""
        unread = {*(self.manifest.get("unread_inputs") or {})} - self._fixed()
        given = {name: tensor for name, tensor in batch.items() if name not in unread}
        return {name: to_numpy(tensor) for name, tensor in self(**given).items()}

    def _fixed(self) -> set[str]:
        """Inputs with one value, which may be given."""
        return {*(self.manifest.get("fixed_inputs") or {}), *(self.manifest.get("unpadded_inputs") or ())}

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, provider={self.provider!r}, device={str(self.device)!r})"


def _check_ids(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Refuse ids beyond the table they index, of which runtimes say little or nothing. Reading them from a GPU would
    hold every call up."""
    for name, kind in (manifest.get("samples") or {}).items():
        rows, ids = kind.get("rows"), inputs.get(name)
        if rows is None or ids is None or ids.is_floating_point() or ids.device.type != "cpu":
            continue
        outside = ids[(ids < 0) | (ids >= rows)]
        if outside.numel():
            raise UsageError(
                f"Input {name} holds {int(outside[0])}; the artifact takes numbers from 0 to {rows - 1} there, the "
                "rows of the model's table. Give ids of the tokenizer that belongs to the model."
            )
