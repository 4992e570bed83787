"""A fault inside an artifact is found where it was put."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import pumer_compile as pumer
from pumer_compile.parity.inside import FirstDifference, first_difference
from tests.support.commands import artifact, done, feed, folder, inner_manifest, run, with_manifest
from tests.support.models import Config, Fusion, inputs_for, program, schedule


def changed(tmp_path: Path, change: Callable[[onnx.ModelProto], str]) -> tuple[Path, str]:
    """The tiny ViLT's artifact with a fault, and the module that it is in."""
    model = onnx.load(str(artifact()))
    where = change(model)
    return with_manifest(model, inner_manifest(artifact()), tmp_path / "model.onnx"), where


def weight_of(scope: str) -> Callable[[onnx.ModelProto], str]:
    """One weight of the product in a module is another."""

    def change(model: onnx.ModelProto) -> str:
        node = next(
            n for n in model.graph.node if n.name.startswith(f"{scope}/MatMul") or n.name.startswith(f"{scope}/Gemm")
        )
        weight = next(w for w in model.graph.initializer if w.name == node.input[1])
        values = numpy_helper.to_array(weight).copy()
        values[0, 0] += 3
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        return scope

    return change


LAYER = "vilt.encoder.layer.1"


@pytest.mark.parametrize("scope", [f"{LAYER}.intermediate.dense", f"{LAYER}.output.dense"])
def test_a_fault_is_named_with_its_module_and_its_line(tmp_path: Path, scope: str) -> None:
    path, where = changed(tmp_path, weight_of(scope))
    samples = tmp_path / "samples.npz"
    np.savez(samples, **feed())
    result = run("parity", path, "--model", folder(), "--inputs", samples, "--first-difference")
    assert result.code == 3
    said = " ".join(result.out.split())
    assert "Inside: the first value that differs is that of aten.linear.default" in said
    assert f"inmodule{where},at" in said.replace(" ", "")  # the screen breaks long names
    assert "modeling_vilt.py:" in said and "the last that agrees is" in said


def test_a_sound_artifact_has_none(tmp_path: Path) -> None:
    samples = tmp_path / "samples.npz"
    np.savez(samples, **feed())
    said = " ".join(
        done("parity", artifact(), "--model", folder(), "--inputs", samples, "--first-difference").out.split()
    )
    assert "Inside: no value inside differs" in said


def test_what_follows_a_fault_and_what_is_merely_absent() -> None:
    """Values of the graph itself, one of them left out, then all from one on changed."""
    reduced = pumer.reduce(program(Config(layers=2, batch=2), Fusion), schedule(layers=(0,)))
    inputs = inputs_for(Config(layers=2, batch=2))
    from pumer_compile.parity.inside import _values

    values = _values(reduced.module, inputs, {})
    nodes = list(values)
    middle = next(i for i, node in enumerate(nodes) if i > len(nodes) // 2 and "linear" in str(node.target))
    absent = [value for node, value in values.items() if node is not nodes[middle]]
    found = first_difference(reduced.module, inputs, {}, absent, "float32")
    assert found.node == "" and found.agree in (len(nodes) - 1, len(nodes)) and found.compared == len(nodes)
    # What depends on it, with something added; the rest as it is.
    behind = {nodes[middle]}
    for node in reduced.module.graph.nodes:
        if behind & set(node.all_input_nodes):
            behind.add(node)
    wrong = [value + (node in behind) * 0.01 * np.abs(value).max() for node, value in values.items()]
    found = first_difference(reduced.module, inputs, {}, wrong, "float32")
    assert f"node {nodes[middle].name}" in found.node and 1e-4 < found.difference < 1
    assert found.last and found.last in str(found) and "differs" in str(found)


@pytest.mark.fast
def test_in_words() -> None:
    assert str(FirstDifference()) == "no inner value could be compared"
    assert "none has its size" in str(FirstDifference("x", "", float("inf"), 3, 1, 1e-4))
    assert "3 of 4 inner values" in str(FirstDifference(compared=4, agree=3, tolerance=1e-4))
