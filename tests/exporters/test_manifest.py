"""What an artifact says of itself, inside and beside it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest

import pumer_compile as pumer
from pumer_compile.errors import UsageError
from pumer_compile.exporters.manifest import FORMAT, KEY, library_versions, read_manifest, sidecar
from pumer_compile.files import sha256_file
from pumer_compile.loading import load_model
from pumer_compile.schedule import Schedule
from tests.commands import SCHEDULE, TOKENS, artifact, done, folder, inner_manifest, schedule


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return read_manifest(artifact())


def test_the_schedule(manifest: dict[str, Any]) -> None:
    given = Schedule.from_yaml(SCHEDULE)
    assert manifest["schedule_sha256"] == given.sha256
    assert manifest["schedule"] == {
        "method": "pumer",
        "semantics": "reference",
        "layers": [0],
        "prune": 0.1,
        "merge": {"image": 0.3, "text": 0.2},
        "outputs": "refused",
    }
    assert manifest["kept_outputs"] == []
    assert Schedule.from_manifest(manifest["schedule"]) == given


def test_the_schedule_of_an_artifact_from_before_there_were_outputs() -> None:
    """Its manifest does not say what becomes of outputs; that means they are refused."""
    data = json.loads(json.dumps(Schedule.from_yaml(SCHEDULE).model_dump(mode="json", exclude_none=True)))
    del data["outputs"]
    assert Schedule.from_manifest(data) == Schedule.from_yaml(SCHEDULE)


@pytest.mark.parametrize("name", ["vilt-vqa", "vilt-ve", "meter-vqa"])
def test_a_schedule_comes_back_from_json(name: str) -> None:
    given = Schedule.load(name)
    data = json.loads(json.dumps(given.model_dump(mode="json", exclude_none=True)))
    assert Schedule.from_manifest(data) == given and Schedule.from_manifest(data).sha256 == given.sha256


def test_token_counts_and_plan(manifest: dict[str, Any]) -> None:
    assert manifest["tokens"] == TOKENS
    printed = json.loads(done("plan", folder(), "--schedule", schedule(), "--json").out)
    assert {"schedule": manifest["schedule"], **manifest["plan"]} == printed


def test_where_it_comes_from(manifest: dict[str, Any]) -> None:
    assert manifest["checkpoint_sha256"] == load_model(folder()).sha256
    assert manifest["checkpoint_sha256"] != load_model(folder(seed=1)).sha256
    versions = manifest["versions"]
    assert versions == library_versions()
    assert {"torch", "transformers", "onnx", "onnxscript", "onnxruntime"} <= set(versions)
    assert versions["torch"] == metadata.version("torch") and versions["onnx"] == metadata.version("onnx")
    assert manifest["format"] == FORMAT


def test_how_it_was_made(manifest: dict[str, Any]) -> None:
    assert (manifest["opset"], manifest["dtype"], manifest["target"]) == (20, "float32", None)
    assert manifest["dynamic_batch"] is False and manifest["streams"] == {}
    model = onnx.load(str(artifact()))
    types = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}
    inputs = {
        value.name: {
            "shape": [size.dim_value for size in value.type.tensor_type.shape.dim],
            "dtype": types[value.type.tensor_type.elem_type],
        }
        for value in model.graph.input
    }
    assert manifest["inputs"] == inputs
    assert inputs["input_ids"] == {"shape": [2, 12], "dtype": "int64"}
    assert inputs["pixel_values"] == {"shape": [2, 3, 96, 96], "dtype": "float32"}
    assert manifest["outputs"] == [value.name for value in model.graph.output] == ["logits"]
    values = {name for node in model.graph.node for name in node.output}
    assert len(manifest["decisions"]) == 5 and set(manifest["decisions"]) <= values


def test_the_proof(manifest: dict[str, Any]) -> None:
    report = json.loads(artifact().with_name("report.json").read_text(encoding="utf-8"))
    assert manifest["parity"] == report
    assert report["passed"] and report["decisions_compared"] and report["samples"] == 6
    assert [row["name"] for row in report["reducers"]] == [
        "reducer.cross_modal_0.text",
        "reducer.cross_modal_0.image",
    ]


def test_the_sidecar_says_the_same(manifest: dict[str, Any]) -> None:
    sidecar = json.loads(artifact().with_name("model.onnx.manifest.json").read_text(encoding="utf-8"))
    assert sidecar.pop("artifact") == "model.onnx"
    assert sidecar.pop("sha256") == sha256_file(artifact())
    assert sidecar == manifest == inner_manifest(artifact())


# --- Which name the sidecar has ---------------------------------------------------------------------------------------


def test_it_is_the_artifacts_whole_name(tmp_path: Path) -> None:
    """So that artifacts of any names and formats have one each, and nobody else's is overwritten."""
    (tmp_path / "manifest.json").write_text('{"name": "a web application"}', encoding="utf-8")
    for name in ("model.onnx", "model.engine", "model.xml", "model"):
        assert sidecar(tmp_path / name) == tmp_path / f"{name}.manifest.json"


@pytest.mark.parametrize("name", ["model.engine.manifest.json", "model.manifest.json", "manifest.json"])
def test_the_names_that_it_had_before_are_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine")
    said = {"format": FORMAT, "artifact": path.name, "sha256": sha256_file(path)}
    (tmp_path / name).write_text(json.dumps(said), encoding="utf-8")
    assert read_manifest(path) == said


@pytest.mark.parametrize("text", ['{"name": "a web application"}', "not JSON", "[1, 2]", '"text"', "null", ""])
def test_the_manifest_of_somebody_else_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"an engine")
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    looked = "looked for model.engine.manifest.json, model.manifest.json, manifest.json beside it"
    with pytest.raises(UsageError, match=looked):
        read_manifest(tmp_path / "model.engine")


def test_an_outdated_manifest_beside_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    path.write_bytes(b"an engine")
    right = {"format": FORMAT, "artifact": path.name, "sha256": sha256_file(path)}
    for name in ("model.engine.manifest.json", "model.manifest.json", "manifest.json"):
        for other in ("model.engine.manifest.json", "model.manifest.json", "manifest.json"):
            said = right if other == name else {**right, "sha256": "0"}
            (tmp_path / other).write_text(json.dumps(said), encoding="utf-8")
        assert read_manifest(path) == right
    (tmp_path / "manifest.json").unlink()  # the right one
    with pytest.raises(UsageError, match="SHA-256 differs"):
        read_manifest(path)


# --- Reading ----------------------------------------------------------------------------------------------------------


def with_metadata(path: Path, **metadata: str) -> Path:
    model = onnx.load(str(artifact()))
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, str(path))
    return path


def test_what_it_refuses(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match=r"No artifact at .*model\.onnx"):
        read_manifest(path)
    path.write_bytes(b"\x00garbage")
    with pytest.raises(UsageError, match="not an ONNX model"):
        read_manifest(path)
    with pytest.raises(UsageError, match="not made by pumer-compile"):
        read_manifest(with_metadata(path, author="somebody"))
    with pytest.raises(UsageError, match=f"format 99; this reads {FORMAT}"):
        read_manifest(with_metadata(path, **{KEY: json.dumps({"format": 99})}))
    for text in ("not JSON", "[1]"):
        with pytest.raises(UsageError, match=r"manifest .* cannot be read"):
            read_manifest(with_metadata(path, **{KEY: text}))
    path.write_bytes(artifact().read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r"not an ONNX model|not made by"):
        read_manifest(path)


def test_the_name_of_the_version() -> None:
    assert library_versions().get("pumer-compile", pumer.__version__) == pumer.__version__
