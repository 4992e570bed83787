"""int8 for ONNX models, through onnxruntime's quantizers: linear layers alone, and none of a reducer's.

Three modes, from the most to the least careful with accuracy:

- `weights`: int8 weights in blocks (onnxruntime's `MatMulNBits`); activations and arithmetic stay float32.
- `dynamic`: int8 weights by column; activations are quantized as they come (`DynamicQuantizeLinear`, `MatMulInteger`).
- `static`: int8 weights by column; the range of every activation is fixed by calibration samples (QDQ form).

A linear layer is a product with a constant. Products of activations (attention), embeddings, convolutions and every
node of a reducer (selection, matching, the published softmax, alignment of masks) stay float32, so that a reducer
decides on the scores it is given, exactly. Those scores come from quantized layers, of course.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes import common as ir_passes
from torch import Tensor

from ..artifacts.options import QuantizeMode
from ..capture.capture import Program, batch_inputs
from ..capture.loading import quiet
from ..capture.make_inputs import read_arrays
from ..errors import ExportError, UsageError

BLOCK = 32
"""Consecutive weights of a column that share a scale in `weights` mode."""
CALIBRATION_BATCH = 16
"""Samples at a time through a model with an open batch."""
REDUCER_SCOPE = "reducer."


def check_environment(mode: QuantizeMode, calibration: Path | None) -> None:
    """Refuse, before any long work, a missing package or a calibration file that cannot be read.

    Raises:
        UsageError: either.
    """
    try:
        import onnxruntime.quantization  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--quantize uses onnxruntime's quantizers, and onnxruntime is not installed. Install the extra: "
            "pip install 'pumer-compile[cpu]' (or [gpu], never both)."
        ) from error
    try:
        from transformers.exporters import quantizers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--quantize uses transformers' quantizers, which this version lacks. Install a newer transformers (tested "
            "with 5.23)."
        ) from error
    if calibration is not None:
        read_arrays(calibration)


def calibration_batches(path: Path, program: Program) -> list[dict[str, Tensor]]:
    """Calibration samples in batches that the program takes.

    Args:
        path: an `.npz` file with one array for each input, samples on the batch axis.
        program: whose inputs they must be; a fixed batch is the size of a batch.

    Raises:
        UsageError: other names or shapes than the program's, or fewer samples than a batch.
    """
    arrays = read_arrays(path)
    for what, names in (("lacks", set(program.inputs) - set(arrays)), ("has", set(arrays) - set(program.inputs))):
        if names:
            raise UsageError(
                f"The calibration file {path} {what} {', '.join(sorted(names))}; the program takes "
                f"{', '.join(program.inputs)}. Give exactly these."
            )
    batched = batch_inputs(program.inputs)
    tensors = {name: torch.from_numpy(arrays[name]).to(given.dtype) for name, given in program.inputs.items()}
    for name, given in program.inputs.items():
        start = 1 if name in batched else 0
        if tensors[name].shape[start:] != given.shape[start:] or tensors[name].dim() != given.dim():
            raise UsageError(
                f"The calibration file {path} has {name} of shape {list(tensors[name].shape)}; the program takes "
                f"{list(given.shape)}{', any number of samples' if start else ''}."
            )
    counts = {tensors[name].shape[0] for name in batched}
    if len(counts) != 1:
        raise UsageError(f"The calibration file {path} has a different number of samples for each input: {counts}.")
    (count,) = counts
    size = min(count, CALIBRATION_BATCH) if program.dynamic_batch else program.inputs[batched[0]].shape[0]
    if count < max(size, 1):
        raise UsageError(
            f"The calibration file {path} has {count} samples, fewer than a batch of {size}, which the artifact is "
            "compiled for. Give more, a few hundred real ones."
        )
    starts = range(0, count - size + 1, size)
    return [{n: t[s : s + size] if n in batched else t for n, t in tensors.items()} for s in starts]


def quantize_onnx(
    model: onnx_ir.Model,
    mode: QuantizeMode,
    inputs: Mapping[str, Tensor],
    calibration: Sequence[Mapping[str, Tensor]] = (),
) -> onnx_ir.Model:
    """A model with its linear layers in int8.

    Args:
        model: float32, its nodes named after their modules; it is changed.
        mode: see above.
        inputs: a sample, by name.
        calibration: samples of `static`.

    Raises:
        UsageError: there is no linear layer.
        ExportError: onnxruntime refuses the model.
    """
    _gemm_as_matmul(model)
    chosen = linear_layers(model)
    if not chosen:
        raise UsageError(
            "--quantize int8 found no linear layer (a product with constant weights) to quantize. Leave it out."
        )
    with _quiet_onnxruntime(), quiet():
        try:
            if mode == "weights":
                return _weights(model, chosen)
            return _activations(model, chosen, mode, inputs, calibration)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"onnxruntime could not quantize the model: {' '.join(str(error).split())}") from error


def linear_layers(model: onnx_ir.Model) -> list[str]:
    """Names of the products with constant weights, those of reducers left out."""
    return [
        str(node.name)
        for node in model.graph
        if node.op_type == "MatMul" and not str(node.name).startswith(REDUCER_SCOPE) and _is_weight(node.inputs[1])
    ]


def _is_weight(value: onnx_ir.Value | None) -> bool:
    """Whether this is a constant matrix of floats. Not one of the graph's outputs, which must stay what they are."""
    constant = None if value is None else value.const_value
    return constant is not None and len(constant.shape) == 2 and constant.dtype == onnx_ir.DataType.FLOAT


def _gemm_as_matmul(model: onnx_ir.Model) -> None:
    """Linear layers of one vector a sample as product and sum, so that there is one form to quantize."""
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "Gemm" else None
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if weight is None or not plain or _flag(node, "transA") or not _is_weight(weight):
            continue
        if _flag(node, "transB"):
            assert weight.const_value is not None
            weight = model.graph.initializers.get(f"{weight.name}.T") or _initializer(
                model, f"{weight.name}.T", np.ascontiguousarray(weight.const_value.numpy().T)
            )
        output, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        name = str(node.name).replace("Gemm", "MatMul")
        product = onnx_ir.node("MatMul", [node.inputs[0], weight], name=name)
        product.outputs[0].name, product.outputs[0].type = f"{output.name}.product", output.type
        product.outputs[0].shape = output.shape
        last = product
        if bias is not None:
            last = onnx_ir.node("Add", [product.outputs[0], bias], name=name.replace("MatMul", "Add"))
        new = [product] if last is product else [product, last]
        onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [output], [last.outputs[0]])
    ir_passes.RemoveUnusedNodesPass()(model)


def _flag(node: onnx_ir.Node, name: str) -> bool:
    return name in node.attributes and node.attributes[name].as_int() != 0


def _initializer(model: onnx_ir.Model, name: str, array: np.ndarray[Any, Any]) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype))
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value


def _activations(
    model: onnx_ir.Model,
    chosen: list[str],
    mode: QuantizeMode,
    inputs: Mapping[str, Tensor],
    calibration: Sequence[Mapping[str, Tensor]],
) -> onnx_ir.Model:
    from transformers.exporters.configs import ExportFormat
    from transformers.exporters.quantizers.quantizer_onnxruntime import (
        OnnxRuntimeDynamicConfig,
        OnnxRuntimeQuantizer,
        OnnxRuntimeStaticConfig,
    )

    what: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "nodes_to_quantize": chosen, "per_channel": True}
    if mode == "dynamic":
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(**what))
    else:
        _separate(model, set(chosen))
        # What a layer gives is quantized where another layer reads it, and nowhere else.
        what["extra_options"] = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
        quantizer = OnnxRuntimeQuantizer(
            OnnxRuntimeStaticConfig(**what), calibration_dataset=[dict(batch) for batch in calibration]
        )
    quantized: onnx_ir.Model = quantizer.quantize(model, dict(inputs), ExportFormat.ONNX)
    ir_passes.IdentityEliminationPass()(quantized)
    return quantized


def _separate(model: onnx_ir.Model, chosen: set[str]) -> None:
    """Give the chosen nodes an input of their own: the quantizer rewires every reader of a tensor it quantizes, and
    residual sums and reducers read some of them too."""
    own: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in list(model.graph):
        value = node.inputs[0] if node.name in chosen else None
        if value is None:
            continue
        if value not in own:
            copy = onnx_ir.node("Identity", [value], name=f"{node.name}.input")
            copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = (
                f"{value.name}.linear",
                value.type,
                value.shape,
            )
            model.graph.insert_before(node, copy)
            own[value] = copy.outputs[0]
        node.replace_input_with(0, own[value])


def _weights(model: onnx_ir.Model, chosen: list[str]) -> onnx_ir.Model:
    """Blocks of a column in eight bits, activations in float32 (`accuracy_level` 1 keeps the kernel from less)."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    others = [str(node.name) for node in model.graph if node.op_type == "MatMul" and node.name not in chosen]
    with tempfile.TemporaryDirectory() as folder:
        # Through files, so that weights past protobuf's limit go beside the graph.
        path, written = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        onnx_ir.save(model, str(path), external_data="model.data")
        how = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=1, bits=8)
        quantizer = MatMulNBitsQuantizer(str(path), bits=8, nodes_to_exclude=others, algo_config=how)
        quantizer.process()
        quantizer.model.save_model_to_file(str(written), use_external_data_format=True)
        quantized = onnx_ir.load(str(written))
        onnx_ir.external_data.load_to_model(quantized)
    return quantized


@contextmanager
def _quiet_onnxruntime() -> Iterator[None]:
    """Its quantizers log to the root logger, and set it up when they are imported."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)
