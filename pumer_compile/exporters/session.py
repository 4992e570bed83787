"""Run an ONNX artifact under onnxruntime, with the provider asserted and the inputs checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from ..errors import ExportError, ParityError, UsageError

_DTYPES = {
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(bool)": torch.bool,
}


class OnnxSession:
    """An open onnxruntime session.

    Args:
        path: the model.
        provider: execution provider; it must be the one in use, since onnxruntime falls back without a word.
        expose: inner values to give as extra outputs, by name.

    Raises:
        UsageError: onnxruntime is not installed, or does not have the provider.
        ExportError: onnxruntime refuses the model.
    """

    def __init__(self, path: Path, provider: str = "CPUExecutionProvider", *, expose: Sequence[str] = ()) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UsageError(
                "onnxruntime is not installed, and running an ONNX artifact needs it. Install the extra: "
                "pip install 'pumer-compile[cpu]' (or [gpu], never both)."
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only; warnings are about optimisations that do not concern the user
        model: str | bytes = str(path)
        if expose:
            model = _exposing(path, expose)
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.resolve().parent)
            )
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=[provider])
        except Exception as error:
            # onnxruntime raises its own exception types, which share no base class of their own.
            raise ExportError(f"onnxruntime cannot open {path}: {' '.join(str(error).split())}") from error
        self.path = path
        self.provider = str(self._session.get_providers()[0])
        if self.provider != provider:
            raise UsageError(f"onnxruntime fell back to {self.provider}; {provider} is not to be had in this build.")

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [str(spec.name) for spec in self._session.get_inputs()]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [str(spec.name) for spec in self._session.get_outputs()]

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name, from tensors by input name (cast to the artifact's dtypes).

        Raises:
            UsageError: an input is missing or has another shape than the artifact takes.
        """
        feed = {}
        for spec in self._session.get_inputs():
            if spec.name not in batch:
                raise UsageError(f"The artifact takes an input {spec.name}; given were {', '.join(batch)}.")
            tensor = batch[spec.name]
            fits = len(spec.shape) == tensor.dim() and all(
                not isinstance(want, int) or want == have for want, have in zip(spec.shape, tensor.shape, strict=True)
            )
            if not fits:
                raise UsageError(
                    f"Input {spec.name} has shape {list(tensor.shape)}; the artifact was compiled for {spec.shape}. "
                    "Compile again with inputs of this shape, or pad."
                )
            feed[spec.name] = tensor.to(_DTYPES[spec.type]).contiguous().numpy()
        return dict(zip(self.outputs, self._session.run(None, feed), strict=True))


def _exposing(path: Path, names: Sequence[str]) -> bytes:
    """The model with inner values as extra outputs; weights beside it stay there."""
    model = onnx.load(str(path), load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return bytes(model.SerializeToString())


def deciding(session: OnnxSession, decisions: Sequence[str]) -> OnnxSession:
    """The session if it gives these decisions, else a second one on the same artifact that does.

    Raises:
        ParityError: the artifact has no such decisions.
    """
    hidden = [name for name in decisions if name not in session.outputs]
    try:
        return OnnxSession(session.path, session.provider, expose=hidden) if hidden else session
    except ExportError as error:
        raise ParityError(f"{session.path} does not have the decisions that its manifest names: {error}") from error
