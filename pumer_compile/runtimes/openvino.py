"""OpenVINO models on its CPU plugin, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.runtime import Runtime, Size, TensorSpec, open_sizes
from ..errors import ExportError, UsageError

# Left alone, the plugin computes in bfloat16 where the processor can, and decisions flip.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}


def load_openvino() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError(
            "OpenVINO is not installed, and artifacts with the suffix .xml need it. Install the extra: "
            "pip install 'pumer-compile[openvino]', or write ONNX (-o model.onnx), which OpenVINO reads too."
        ) from error
    return openvino


class OpenVinoSession(Runtime):
    """A model compiled for the CPU plugin with float32 inference, whatever dtype its weights are stored in.

    Args:
        path: the `.xml` file; its weights are in the `.bin` file of the same stem.

    Raises:
        UsageError: OpenVINO is not installed.
        ExportError: OpenVINO refuses the model.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.provider, self.device = Path(path), "OpenVINO CPU", torch.device("cpu")
        core = load_openvino().Core()
        try:
            self._compiled = core.compile_model(str(path), "CPU", _EXACT)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot open {path}: {' '.join(str(error).split())[:400]}") from error
        self.input_specs = {str(port.get_any_name()): _spec(port) for port in self._compiled.inputs}
        self.output_specs = {str(port.get_any_name()): _spec(port) for port in self._compiled.outputs}

    @classmethod
    def open(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> OpenVinoSession:
        """See `Runtime`."""
        return cls(path, **options)

    @classmethod
    def check(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> None:
        """See `load_openvino`."""
        load_openvino()

    def _release(self) -> None:
        del self._compiled

    def _execute(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_batch(open_sizes(feed, self.input_specs))
        try:
            given = self._compiled({name: tensor.numpy() for name, tensor in feed.items()})
        except RuntimeError as error:
            raise ExportError(f"OpenVINO failed on {self.path}: {' '.join(str(error).split())[:400]}") from error
        # Copies: the next request writes into the same memory.
        values = [torch.from_numpy(given[port].copy()) for port in self._compiled.outputs]
        return dict(zip(self.outputs, values, strict=True))

    def _check_batch(self, sizes: Mapping[str, int]) -> None:
        opened = [size for port in self._compiled.inputs for size in port.get_partial_shape() if size.is_dynamic]
        for low, high in {(size.get_min_length(), size.get_max_length()) for size in opened}:
            if sizes["batch"] < low or 0 <= high < sizes["batch"]:  # a limit of -1 is none
                raise UsageError(
                    f"A batch of {sizes['batch']} is not within {low} to {high}, which {self.path} was compiled for "
                    "(--profile). Split the batch, or compile again."
                )


def _spec(port: Any) -> TensorSpec:
    sizes: list[Size] = ["batch" if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
    kind = port.get_element_type().to_dtype().name
    return TensorSpec(tuple(sizes), getattr(torch, kind))
