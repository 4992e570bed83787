"""OpenVINO models: reduced, named, proved on the CPU plugin, published with the weights that belong to them."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.artifacts.session import open_session, open_with_decisions
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import ExportError, ParityError, UsageError
from pumer_compile.exporters import OpenVinoOptions
from pumer_compile.files import sha256_file
from pumer_compile.reduce import with_decisions
from tests.support.commands import TOKENS, done, feed, folder, refused, run, schedule
from tests.support.conversions import openvino_converted_once
from tests.support.models import Config, Fusion, highest, inputs_for, make, program
from tests.support.models import schedule as budgets
from tests.support.vilt_oracle import CASES, EXPECTED, ORACLE, given, write_schedule

openvino = pytest.importorskip("openvino")
pytest.importorskip("transformers.exporters.exporter_openvino")

from pumer_compile.runtimes.openvino import OpenVinoSession  # noqa: E402

__all__ = ["openvino_converted_once"]

pytestmark = pytest.mark.usefixtures("openvino_converted_once")
HALF = ("--dtype", "float16", "--with-decisions", "--no-verify")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny ViLT, reduced, batch 2; by options. Tests must not change them."""

    @functools.cache
    def artifact(*options: str) -> Path:
        path = tmp_path_factory.mktemp("openvino") / "model.xml"
        report = ("--report", path.with_name("report.json")) if "--no-verify" not in options else ()
        done(folder(), "--schedule", schedule(), "-o", path, "--batch", 2, *report, *options)
        return path

    return artifact


def outputs_of(path: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name under plain OpenVINO, as a user would run it."""
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = compiled({port.get_any_name(): inputs[port.get_any_name()] for port in compiled.inputs})
    return {port.get_any_name(): given[port].copy() for port in compiled.outputs}


@functools.cache
def eager() -> np.ndarray:
    """Logits of the tiny ViLT, reduced, in eager PyTorch."""
    inputs = {name: torch.from_numpy(array) for name, array in feed().items()}
    reduced = pumer.reduce(pumer.capture(load_model(folder()), inputs), schedule())
    with torch.no_grad():
        return reduced.module(**inputs).logits.numpy()


# --- Transformers' models ---------------------------------------------------------------------------------------------


def test_a_reduced_model(artifacts: Any) -> None:
    model = openvino.Core().read_model(str(artifacts()))
    assert [port.get_names() for port in model.inputs] == [
        {"input_ids"},
        {"attention_mask"},
        {"pixel_values"},
        {"pixel_mask"},
    ]
    assert [port.get_names() for port in model.outputs] == [{"logits"}]
    assert all(port.get_partial_shape().is_static for port in [*model.inputs, *model.outputs])
    assert model.get_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"]).astype(str) == "f32"
    assert {p.name for p in artifacts().parent.iterdir()} == {
        "model.xml",
        "model.bin",
        "model.xml.manifest.json",
        "report.json",
    }
    assert np.abs(outputs_of(artifacts(), feed())["logits"] - eager()).max() <= 1e-5


def test_it_says_nothing_of_the_machine(artifacts: Any) -> None:
    content = artifacts().read_bytes() + artifacts().with_suffix(".bin").read_bytes()
    for text in (b"site-packages", str(Path.home()).encode() + b"/", str(folder()).encode(), b".py"):
        assert text not in content


def test_the_manifest(artifacts: Any) -> None:
    manifest = read_manifest(artifacts())
    assert manifest["tokens"] == TOKENS and manifest["dtype"] == "float32"
    assert manifest["companions"] == {"model.bin": sha256_file(artifacts().with_suffix(".bin"))}
    assert manifest["inputs"]["pixel_values"] == {"shape": [2, 3, 96, 96], "dtype": "float32"}
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert manifest["parity"]["provider"] == "OpenVINO CPU"
    assert manifest["versions"]["openvino"]


def test_proved_again(artifacts: Any, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done("parity", artifacts(), "--model", folder(), "--atol", "1e-5", "--rtol", "1e-5", "--report", report)
    said = json.loads(report.read_text(encoding="utf-8"))
    assert not said["decisions_compared"]  # OpenVINO keeps no inner value that no output needs
    done("parity", artifacts("--with-decisions"), "--model", folder(), "--report", report)
    said = json.loads(report.read_text(encoding="utf-8"))
    assert said["decisions_compared"] and [row["samples"] for row in said["reducers"]] == [said["samples"]] * 2
    message = refused(3, "parity", artifacts(), "--model", folder(seed=1))
    assert "output logits (end to end)" in message


def test_decisions_are_outputs_where_they_are_asked_for(artifacts: Any) -> None:
    path = artifacts("--with-decisions")
    names = read_manifest(path)["decisions"]
    shown = outputs_of(path, feed())
    assert list(shown) == ["logits", *names] and len(names) == 5
    inputs = {name: torch.from_numpy(array) for name, array in feed().items()}
    twin, named = with_decisions(pumer.reduce(pumer.capture(load_model(folder()), inputs), schedule()).module)
    assert named == names
    with torch.no_grad():
        expected = twin(**inputs)
    for name in names:
        assert np.array_equal(shown[name], expected[name].numpy()), name
    session = OpenVinoSession(path)
    assert session.outputs == ["logits", *names] and open_with_decisions(session, names) is session
    hidden = OpenVinoSession(artifacts())
    assert hidden.outputs == ["logits"]
    with pytest.raises(ParityError, match="--with-decisions"):
        open_with_decisions(hidden, names)


def test_half_precision_is_in_the_weights_alone(artifacts: Any, tmp_path: Path) -> None:
    path = artifacts(*HALF)
    model = openvino.Core().read_model(str(path))
    ports = {port.get_any_name(): port.get_element_type().to_string() for port in [*model.inputs, *model.outputs]}
    assert ports["pixel_values"] == ports["logits"] == "f32"
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    kinds = {kind: [c for c in constants if c.get_element_type().to_string() == kind] for kind in ("f16", "f32")}
    assert len(kinds["f16"]) >= 50
    # What half precision cannot hold stays: the published softmax divides by sums with an epsilon of 1e-6 / tokens.
    assert all(constant.get_data().size == 1 for constant in kinds["f32"])
    assert any(0 < constant.get_data().min() < 1e-7 for constant in kinds["f32"])
    # Everything else computes in float32.
    halves = {
        n.get_type_name() for n in model.get_ops() if "f16" in {o.get_element_type().to_string() for o in n.outputs()}
    }
    assert halves <= {"Constant"}
    assert path.with_suffix(".bin").stat().st_size < 0.6 * artifacts().with_suffix(".bin").stat().st_size
    assert 1e-6 < np.abs(outputs_of(path, feed())["logits"] - eager()).max() < 2e-2
    manifest = read_manifest(path)
    assert manifest["dtype"] == "float16" and manifest["inputs"]["pixel_values"]["dtype"] == "float32"
    done("parity", path, "--model", folder())


def test_an_open_batch(artifacts: Any) -> None:
    path = artifacts("--dynamic-batch")
    assert read_manifest(path)["dynamic_batch"] is True
    session = open_session(path)
    together = session.run({name: torch.from_numpy(array) for name, array in feed(5).items()})["logits"]
    assert together.shape == (5, 5)
    for rows in ([0], [1, 2, 3]):
        part = session.run({name: torch.from_numpy(array[rows]) for name, array in feed(5).items()})["logits"]
        assert np.abs(part - together[rows]).max() <= 1e-5
    model = openvino.Core().read_model(str(path))
    for port in [*model.inputs, *model.outputs]:
        batch, *rest = port.get_partial_shape()
        assert batch.is_dynamic and all(size.is_static for size in rest), port


def test_a_profile_bounds_the_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    done(folder(layers=1), "--schedule", "none", "-o", path, "--profile", "batch=1:2:4", "--no-verify")
    (batch, *_) = openvino.Core().read_model(str(path)).input("input_ids").get_partial_shape()
    assert (batch.get_min_length(), batch.get_max_length()) == (1, 4)
    session = open_session(path)
    assert session.run({n: torch.from_numpy(a) for n, a in feed(4).items()})["logits"].shape == (4, 5)
    with pytest.raises(UsageError, match="batch of 5 is not within 1 to 4"):
        session.run({n: torch.from_numpy(a) for n, a in feed(5).items()})


def test_without_a_schedule(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    done(folder(layers=1), "--schedule", "none", "-o", path, "--batch", 2)
    manifest = read_manifest(path)
    assert manifest["tokens"] is None and manifest["decisions"] == [] and manifest["parity"]["passed"]


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_what_the_published_implementation_computes(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    specification = write_schedule(case, tmp_path / "schedule.yaml")
    done(ORACLE, "--schedule", specification, "--inputs", ORACLE / "inputs.npz", "-o", path, "--no-verify")
    published = [{"text": text, "image": image} for text, image in CASES[case]["tokens_after_layer"]]
    assert list(read_manifest(path)["tokens"].values()) == published
    for padding in ("padded", "unpadded"):
        logits = outputs_of(path, given(padding))["logits"]
        assert np.abs(logits - EXPECTED[f"{case}.{padding}"]).max() <= 1e-5


# --- Plain modules and archives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "dynamic"), [("unfused", True), ("sdpa", False)], ids=["open", "fused, fixed"])
def test_a_plain_module(form: str, dynamic: bool, tmp_path: Path) -> None:
    config = Config(form=form, layers=1, dynamic=dynamic, head=highest)
    reduced = pumer.reduce(program(config), budgets(layers=(0,)))
    exported = pumer.export(reduced, tmp_path / "model.xml")
    assert exported.report is not None and exported.report.passed and exported.report.decisions_compared
    session = open_session(exported.path)
    assert session.inputs == ["input_ids", "pixel_values", "attention_mask"] and session.outputs == ["output"]
    inputs = inputs_for(config, batch=5 if dynamic else None)
    with torch.no_grad():
        expected = reduced.module(**inputs).numpy()
    assert np.abs(session.run(inputs)["output"] - expected).max() <= 1e-5
    assert pumer.parity(exported.path, reduced.program.model, inputs_for(config, seed=3)).passed


def test_an_archive(tmp_path: Path) -> None:
    config = Config(layers=1, head=highest)
    inputs = inputs_for(config)
    archive = torch.export.export(make(config), args=(), kwargs=inputs)
    torch.export.save(archive, tmp_path / "model.pt2")
    np.savez(tmp_path / "inputs.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    (tmp_path / "schedule.yaml").write_text(
        "semantics: reference\nlayers: [0]\nprune: 0.2\nmerge: {image: 0.3, text: 0.25}\n"
    )
    given = ("--schedule", tmp_path / "schedule.yaml", "--inputs", tmp_path / "inputs.npz")
    done(tmp_path / "model.pt2", *given, "-o", tmp_path / "model.xml", "--dtype", "float16")
    done("parity", tmp_path / "model.xml", "--model", tmp_path / "model.pt2", "--inputs", tmp_path / "inputs.npz")


def test_an_operator_that_openvino_does_not_have() -> None:
    def special(x: torch.Tensor, text: int) -> torch.Tensor:
        return torch.special.bessel_j0(x[:, 0])

    from pumer_compile.exporters.openvino import build_openvino

    with pytest.raises(ExportError, match="could not convert") as error:
        build_openvino(program(Config(layers=1, head=special)), OpenVinoOptions())
    assert "\n" not in str(error.value)


# --- Refused before any long work -------------------------------------------------------------------------------------


def test_a_dtype_that_it_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not bfloat16"):
        OpenVinoOptions(dtype="bfloat16")
    missing = tmp_path / "no-model"  # not even looked for
    message = refused(2, missing, "-s", "none", "-o", tmp_path / "model.xml", "--dtype", "bfloat16")
    assert "float32 or float16" in message
    assert list(tmp_path.iterdir()) == []


def test_options_of_other_formats(tmp_path: Path) -> None:
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / "model.xml", "--opset", "20")
    assert "--opset does not apply to .xml" in message


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / "model.xml")
    assert "pumer-compile[openvino]" in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"pumer-compile\[openvino\]"):
        OpenVinoSession(tmp_path / "model.xml")


def test_transformers_has_no_exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.exporters.configs.OpenVINOConfig")
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / "model.xml")
    assert "This version of transformers has no exporter for OpenVINO" in message


def test_a_place_for_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.bin").mkdir()
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / "model.xml")
    assert "model.bin is a directory" in message


# --- Two files that belong together -----------------------------------------------------------------------------------


def copied(artifact: Path, folder: Path) -> Path:
    for name in ("model.xml", "model.bin", "model.xml.manifest.json"):
        (folder / name).write_bytes(artifact.with_name(name).read_bytes())
    return folder / "model.xml"


def test_other_weights_are_noticed(artifacts: Any, tmp_path: Path) -> None:
    path = copied(artifacts(), tmp_path)
    read_manifest(path)
    path.with_suffix(".bin").write_bytes(artifacts(*HALF).with_suffix(".bin").read_bytes())
    assert "model.bin does not belong to" in refused(2, "parity", path, "--model", folder())
    path.with_suffix(".bin").unlink()
    with pytest.raises(UsageError, match=r"model\.bin does not belong to .*missing"):
        read_manifest(path)


@functools.cache
def another_model() -> pumer.Program:
    return pumer.capture(load_model(folder(1, layers=1)), {n: torch.from_numpy(a) for n, a in feed().items()})


class Killed(BaseException):
    """In place of SIGKILL: nothing of ours runs after it but the interpreter's clean-up."""


@pytest.mark.parametrize("renamed", [1, 2, 3])  # the weights, the manifest, the graph
def test_killed_between_renames(artifacts: Any, renamed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is there that would read weights of another one."""
    path = copied(artifacts(), tmp_path)
    captured = another_model()
    replace, left = os.replace, renamed

    def counted(source: Any, target: Any) -> None:
        nonlocal left
        replace(source, target)
        left -= Path(target).parent == tmp_path
        if left == 0:
            raise Killed

    monkeypatch.setattr(os, "replace", counted)
    with pytest.raises(Killed):
        pumer.export(captured, path, verify=False)
    monkeypatch.undo()
    assert path.exists() == (renamed == 3)
    if renamed == 3:
        assert np.isfinite(outputs_of(path, feed())["logits"]).all() and read_manifest(path)["tokens"] is None
    # The next run is not hindered.
    pumer.export(captured, path, verify=False)
    assert read_manifest(path)["companions"]


def test_killed_before_the_first_rename(artifacts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied(artifacts(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    monkeypatch.setattr("pumer_compile.exporters.publish.make_manifest", killed)
    captured = another_model()
    with pytest.raises(Killed):
        pumer.export(captured, path, verify=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failed_proof_leaves_the_old_pair(artifacts: Any, tmp_path: Path) -> None:
    path = copied(artifacts(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    result = run(folder(layers=1), "-s", "none", "-o", path, "--batch", 2, "--atol", "0", "--rtol", "0")
    assert result.code == 3
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(after) == {*before, "model.xml.failed", "model.bin.failed"} and before.items() < after.items()
    read_manifest(path)


def test_the_same_weights_again_keep_the_graph_in_place(tmp_path: Path) -> None:
    captured = program(Config(layers=1), Fusion)
    path = tmp_path / "model.xml"
    pumer.export(captured, path, verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, **options: pytest.fail(f"{self} was removed"))
        pumer.export(captured, path, verify=False)
    assert read_manifest(path)["artifact"] == "model.xml"
