"""What an artifact says of itself, inside and beside it."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.artifacts.manifest import FORMAT, KEY, library_versions, read_manifest, seal_onnx, sidecar
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import UsageError
from pumer_compile.files import sha256_file
from pumer_compile.schedule import Schedule
from tests.support.commands import (
    SCHEDULE,
    TOKENS,
    artifact,
    done,
    feed,
    folder,
    inner_manifest,
    onnx_outputs,
    refused,
    schedule,
    with_manifest,
)


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
    assert report["passed"] and report["decisions_compared"] and report["samples"] >= 6
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


# --- Changed since ----------------------------------------------------------------------------------------------------


def flipped(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def spread_out(path: Path) -> Path:
    """The artifact with its weights beside it, alone; returns their file."""
    model, weights = onnx.load(str(artifact())), path.with_name(f"{path.name}.0.data")
    kept = [entry for entry in model.metadata_props if entry.key == KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, str(path), save_as_external_data=True, location=weights.name, size_threshold=100)
    seal_onnx(path, {weights.name: weights})
    return weights


def test_an_onnx_file_alone_is_read_by_what_is_in_it(manifest: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "renamed.onnx"
    path.write_bytes(artifact().read_bytes())
    assert read_manifest(path) == manifest
    assert pumer.Engine(path).outputs == ["logits"]


def test_any_changed_byte_of_an_onnx_file_alone_is_refused(tmp_path: Path) -> None:
    """In the graph, in the weights, in the manifest, in the seal itself; cut short, or longer."""
    path, whole = tmp_path / "model.onnx", artifact().read_bytes()
    places = [*range(0, len(whole), len(whole) // 60), *range(len(whole) - 200, len(whole))]
    for number, place in enumerate(places):
        path.write_bytes(whole)
        flipped(path, place, bit=number % 8)
        with pytest.raises(UsageError):
            read_manifest(path)
    for content in (whole[:-1], whole + b"\x00", whole + whole[-100:], b"", whole[:-400]):
        path.write_bytes(content)
        with pytest.raises(UsageError):
            read_manifest(path)


def test_what_another_tool_writes_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load(str(artifact()))
    model.graph.node[0].doc_string = "changed"
    onnx.save(model, str(path))
    words = "changed since it was written: the SHA-256 at its end"
    with pytest.raises(UsageError, match=words):
        pumer.Engine(path)
    assert words in refused(2, "parity", path, "--model", folder())
    assert words in refused(2, "bench", path)


def test_an_onnx_file_beside_the_manifest_of_another_is_refused(tmp_path: Path) -> None:
    """Whole in itself, but not the one that was written with the manifest; and a changed one likewise."""
    path = tmp_path / "model.onnx"
    with_manifest(onnx.load(str(artifact())), inner_manifest(artifact()), path)
    beside = tmp_path / "model.onnx.manifest.json"
    beside.write_bytes(artifact().with_name(beside.name).read_bytes())
    with pytest.raises(UsageError, match=r"not the file that .*manifest\.json describes: its SHA-256 differs"):
        read_manifest(path)
    path.write_bytes(artifact().read_bytes())
    read_manifest(path)
    flipped(path, path.stat().st_size // 2)
    message = refused(2, "parity", path, "--model", folder())
    assert "its SHA-256 differs" in message
    assert "its SHA-256 differs" in refused(2, "bench", path)


@pytest.mark.parametrize("change", ["a bit", "gone"])
def test_changed_weights_beside_the_graph_are_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    weights = spread_out(path)
    read_manifest(path)
    if change == "gone":
        weights.unlink()
    else:
        flipped(weights, weights.stat().st_size - 1)
    with pytest.raises(UsageError, match=r"model\.onnx\.0\.data does not belong to .*in its metadata"):
        pumer.Engine(path)


def test_an_artifact_from_before_there_were_seals_is_read(tmp_path: Path) -> None:
    path = with_manifest(onnx.load(str(artifact())), inner_manifest(artifact()), tmp_path / "model.onnx")
    assert pumer.Engine(path).outputs == ["logits"]
    described = {"artifact": path.name, "sha256": sha256_file(path)}
    (tmp_path / "manifest.json").write_text(json.dumps(described), encoding="utf-8")
    read_manifest(path)
    flipped(path, path.stat().st_size // 2)
    with pytest.raises(UsageError, match="SHA-256 differs"):
        read_manifest(path)


# --- In a cache of links, such as the Hub's ---------------------------------------------------------------------------


def linked(tmp_path: Path, *, weights_too: bool) -> Path:
    """Links to an artifact with weights beside it; with the weights, these go by the hashes of their files."""
    whole, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    whole.mkdir()
    snapshot.mkdir(parents=True)
    weights = spread_out(whole / "model.onnx")
    (whole / "manifest.json").write_text(
        json.dumps({"artifact": "model.onnx", "sha256": sha256_file(whole / "model.onnx")}), encoding="utf-8"
    )
    if not weights_too:
        (snapshot / "model.onnx").symlink_to(whole / "model.onnx")
        return snapshot / "model.onnx"
    for file in (whole / "model.onnx", weights, whole / "manifest.json"):
        blob = file.rename(whole / sha256_file(file))
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot / "model.onnx"


@pytest.mark.parametrize("weights_too", [True, False], ids=["cache", "one link"])
def test_links_to_an_artifact_with_weights_beside_it(
    weights_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = linked(tmp_path, weights_too=weights_too)
    inputs = {name: torch.from_numpy(array) for name, array in feed().items()}
    assert np.array_equal(pumer.Engine(path)(**inputs)["logits"], onnx_outputs(artifact(), feed())["logits"])
    report = pumer.parity(path, folder(), [inputs])
    assert report.passed and report.decisions_compared
    monkeypatch.chdir(path.parent)
    assert pumer.parity("model.onnx", folder(), [inputs]).decisions_compared


def test_the_name_of_the_version() -> None:
    assert library_versions().get("pumer-compile", pumer.__version__) == pumer.__version__
