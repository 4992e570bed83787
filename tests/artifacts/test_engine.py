"""`Engine`: one interface to artifacts of every format (engines of TensorRT: `runtimes/test_tensorrt.py`)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.artifacts.runtime import TensorSpec
from pumer_compile.errors import ExportError, UsageError
from tests.support.commands import artifact, feed, folder, inner_manifest, onnx_outputs, with_manifest

OPEN = ("--dynamic-batch",)


def tensors(**options: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feed(**options).items()}


def test_called_by_keyword() -> None:
    engine = pumer.Engine(artifact())
    outputs = engine(**tensors())
    assert list(outputs) == engine.outputs == ["logits"]
    assert isinstance(outputs["logits"], torch.Tensor) and outputs["logits"].device == engine.device
    assert np.array_equal(outputs["logits"], onnx_outputs(artifact(), feed())["logits"])


def test_what_it_says_of_itself() -> None:
    engine = pumer.Engine(str(artifact(*OPEN)))
    assert engine.path == artifact(*OPEN) and engine.manifest == inner_manifest(artifact(*OPEN))
    assert engine.provider == "CPUExecutionProvider" and engine.device == torch.device("cpu")
    assert engine.inputs == list(engine.input_specs) == ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]
    sizes = {name: spec.shape for name, spec in engine.input_specs.items()}
    (batch,) = {shape[0] for shape in sizes.values()}
    assert isinstance(batch, str) and sizes["pixel_values"] == (batch, 3, 96, 96)
    assert engine.output_specs == {"logits": TensorSpec((batch, 5), torch.float32)}
    assert pumer.Engine(artifact()).input_specs["input_ids"] == TensorSpec((2, 12), torch.int64)
    assert "CPUExecutionProvider" in repr(engine)


def test_an_open_batch() -> None:
    engine = pumer.Engine(artifact(*OPEN))
    for size in (1, 3):
        expected = onnx_outputs(artifact(*OPEN), feed(batch=size))["logits"]
        assert np.array_equal(engine(**tensors(batch=size))["logits"], expected)


def test_inner_values() -> None:
    (name, *_) = inner_manifest(artifact())["decisions"]
    engine = pumer.Engine(artifact(), expose=[name])
    assert engine.outputs == ["logits", name] and engine(**tensors())[name].dtype == torch.int64


@pytest.mark.parametrize("wrong", [60, -1])
def test_ids_that_no_table_has(wrong: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Said by name and range, before the runtime fails in words of its own."""
    engine, inputs = pumer.Engine(artifact()), tensors()
    inputs["input_ids"][1, 3] = wrong
    with pytest.raises(UsageError, match=rf"input_ids holds {wrong}; .* from 0 to 59"):
        engine(**inputs)
    with pytest.raises(UsageError, match="input_ids"):
        engine.run(inputs)
    assert capfd.readouterr().err == ""
    inputs["input_ids"][1, 3] = 59
    assert torch.isfinite(engine(**inputs)["logits"]).all()


def test_a_keyword_that_it_does_not_take() -> None:
    engine, given = pumer.Engine(artifact()), tensors()
    with pytest.raises(UsageError, match="takes no input image_embeds; it takes input_ids, attention_mask"):
        engine(**given, image_embeds=given["input_ids"])
    # `run` is what parity uses: what it drops, nothing has compared.
    with pytest.raises(UsageError, match="takes no input image_embeds"):
        engine.run({**given, "image_embeds": given["input_ids"]})


def test_what_a_processor_makes_besides() -> None:
    """ViLT's gives token types, which are zeros for one text; they are compared with, and nothing else is dropped."""
    engine, given = pumer.Engine(artifact()), tensors()
    assert engine.manifest["constant_inputs"] == {"token_type_ids": 0}
    zeros = torch.zeros_like(given["input_ids"])
    expected = engine(**given)["logits"]
    assert torch.equal(engine(**given, token_type_ids=zeros)["logits"], expected)
    other = zeros.clone()
    other[1, -1] = 1
    for call in (lambda: engine(**given, token_type_ids=other), lambda: engine.run({**given, "token_type_ids": other})):
        with pytest.raises(UsageError, match="compiled without token_type_ids, which is as good as 0 in every place"):
            call()


def test_proofs_of_what_a_processor_makes_besides() -> None:
    zeros = torch.zeros_like(tensors()["input_ids"])
    report = pumer.parity(artifact(), folder(), {**tensors(), "token_type_ids": zeros})
    assert report.passed and report.samples == 2
    with pytest.raises(UsageError, match="compiled without token_type_ids"):
        pumer.parity(artifact(), folder(), {**tensors(), "token_type_ids": zeros + 1})


def test_numpy_arrays_are_taken_as_they_are() -> None:
    """Also what torch does not take without a word: read-only memory, another byte order, strides that go backwards."""
    engine, expected = pumer.Engine(artifact()), onnx_outputs(artifact(), feed())["logits"]
    given = feed()
    given["attention_mask"].flags.writeable = False
    given["input_ids"] = given["input_ids"].astype(">i8")
    given["pixel_values"] = np.ascontiguousarray(given["pixel_values"][..., ::-1])[..., ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(engine(**given)["logits"], expected)
        mixed = {**given, "pixel_values": tensors()["pixel_values"]}
        assert np.array_equal(engine(**mixed)["logits"], expected)
        assert np.array_equal(engine.run(given)["logits"], expected)
        assert np.array_equal(pumer.OnnxSession(artifact()).run(given)["logits"], expected)


@pytest.mark.parametrize(
    ("value", "says"),
    [([[1, 2]], "is list; give a torch tensor or a NumPy array"), (np.array([["a"]]), "is an array of <U1")],
)
def test_what_is_neither_tensor_nor_array(value: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"Input input_ids {says}"):
        pumer.Engine(artifact())(**{**tensors(), "input_ids": value})


@pytest.mark.parametrize(
    ("said", "pads"),
    [
        ({}, True),
        ({"unpadded_inputs": ["attention_mask"]}, False),
        ({"plan": {"prompts": [{"input": "input_ids", "placeholder": 61, "start": 0, "stop": 0}]}}, False),
    ],
    ids=["a text", "--no-padding", "a prompt"],
)
def test_padding_is_advised_where_it_is_taken(said: dict[str, Any], pads: bool, tmp_path: Path) -> None:
    engine = pumer.Engine(changed(tmp_path, **said))
    given = {**tensors(), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    words = r"input_ids has shape \[2, 9\].*Compile again with inputs of this shape"
    with pytest.raises(UsageError, match=words) as error:
        engine.run({**given, "input_ids": given["input_ids"][:, :9]})
    assert ("or pad" in str(error.value)) == pads


def test_gradients_stay_out_of_it() -> None:
    given = tensors()
    given["pixel_values"].requires_grad_()
    assert not pumer.Engine(artifact())(**given)["logits"].requires_grad


def test_parity_takes_an_engine() -> None:
    report = pumer.parity(artifact(), folder(), provider="cpu")
    assert report.passed and report.provider == "CPUExecutionProvider" and report.decisions_compared
    with pytest.raises(UsageError, match="No provider 'gpu'"):
        pumer.parity(artifact(), folder(), provider="gpu")


# --- The manifest -----------------------------------------------------------------------------------------------------


def changed(tmp_path: Path, **said: Any) -> Path:
    """The artifact with another manifest in it."""
    model = onnx.load(str(artifact()))
    return with_manifest(model, {**inner_manifest(artifact()), **said}, tmp_path / "model.onnx")


def test_an_artifact_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No artifact at"):
        pumer.Engine(tmp_path / "model.onnx")
    model = onnx.load(str(artifact()))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(UsageError, match="not made by pumer-compile"):
        pumer.Engine(tmp_path / "model.onnx")


def test_a_manifest_that_speaks_of_something_else(tmp_path: Path) -> None:
    said = inner_manifest(artifact())["inputs"]
    for change, words in (
        ({"inputs": {"input_ids": said["input_ids"]}}, "names inputs input_ids, and the artifact has input_ids, att"),
        ({"outputs": ["scores"]}, "names an output scores, and the artifact has logits"),
        (
            {"inputs": said | {"input_ids": {"shape": [2, 13], "dtype": "int64"}}},
            r"names input_ids as int64 \[2, 13\], and the artifact has int64 \[2, 12\]",
        ),
        (
            {"inputs": said | {"input_ids": {"shape": [2, 12], "dtype": "int32"}}},
            r"names input_ids as int32 \[2, 12\], and the artifact has int64 \[2, 12\]",
        ),
    ):
        with pytest.raises(ExportError, match=words):
            pumer.Engine(changed(tmp_path, **change))
    assert pumer.Engine(changed(tmp_path)).outputs == ["logits"]
