"""ONNX models that others made, beside an artifact."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from pumer_compile.bench.foreign import is_foreign, manifest_of, opened
from pumer_compile.errors import UsageError
from tests.support.commands import artifact, done, feed, refused


def foreign(path: Path, *names: str) -> Path:
    """A model that takes some inputs, with a batch that is open, and gives the sum of the first."""
    shapes = {"input_ids": (TensorProto.INT64, ["b", 12]), "pixel_values": (TensorProto.FLOAT, ["b", 3, 96, 96])}
    inputs = [helper.make_tensor_value_info(n, *shapes.get(n, (TensorProto.INT64, ["b", 12]))) for n in names]
    kind = shapes[names[0]][0]
    outputs = [helper.make_tensor_value_info("sum", kind, None)]
    nodes = [helper.make_node("ReduceSum", [names[0]], ["sum"], keepdims=0)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 9
    onnx.save(model, str(path))
    return path


def test_it_is_told_from_an_artifact(tmp_path: Path) -> None:
    other = foreign(tmp_path / "other.onnx", "input_ids")
    assert is_foreign(other) and not is_foreign(artifact())
    (tmp_path / "text.onnx").write_text("no model")
    assert not is_foreign(tmp_path / "text.onnx") and not is_foreign(tmp_path / "missing.onnx")
    said = manifest_of(other)
    assert said["foreign"] and said["inputs"] == {"input_ids": {"shape": ["b", 12], "dtype": "int64"}}
    given = feed()
    total = opened(other)(input_ids=given["input_ids"])["sum"]
    assert int(total) == int(given["input_ids"].sum())


def test_it_is_measured_beside_one(tmp_path: Path) -> None:
    other = foreign(tmp_path / "other.onnx", "pixel_values")
    result = done("bench", artifact(), "--vs", other, "-n", 5, "--warmup", 1)
    words = " ".join(result.out.split())
    assert re.search(r"other\.onnx (is|seems) [0-9.]+x faster than \S+ \(medians\); 95%: ", words), words
    assert "not reduced" in words


def test_what_does_not_fit(tmp_path: Path) -> None:
    other = foreign(tmp_path / "other.onnx", "input_ids", "question_type")
    message = refused(2, "bench", artifact(), "--vs", other)
    assert "question_type" in message and "pixel_values" in message
    assert "not made by pumer-compile" in refused(2, "bench", other)
    with pytest.raises(UsageError, match="No artifact at"):
        manifest_of(tmp_path / "missing.onnx")
