"""What the published implementation computes, through the command line, ONNX and onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import ViltForQuestionAnswering

from pumer_compile import Schedule, capture, reduce
from tests.support.commands import done, feed, inner_manifest, onnx_outputs, tensorrt_refuses
from tests.support.tiny import tiny_vilt
from tests.support.vilt import Shares, reduced_vilt
from tests.support.vilt_oracle import CASES, EXPECTED, ORACLE, given, write_schedule

# One case is compiled with an open batch size and the oldest opset; the other with a fixed one and the default, and it
# is proved by the command, too.
OPTIONS = {"vqa-258": ("--dynamic-batch", "--opset", "18", "--no-verify"), "unreduced": ("--no-verify",)}
DATA_DEPENDENT = ("Scatter", "NonZero", "TopK", "Sort", "Unique", "Compress", "Loop", "If", "Scan")
Compiled = Callable[[str], Path]


def test_every_case_has_its_vectors() -> None:
    assert len(CASES) >= 2
    vectors = {f"{case}.{padding}" for case in CASES for padding in ("padded", "unpadded")}
    assert set(EXPECTED) == {*vectors, "unreduced", "unreduced.unpadded"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The artifact of a case (or `unreduced`), compiled once by the command line."""
    folder = tmp_path_factory.mktemp("oracle")

    def artifact(case: str) -> Path:
        path = folder / case / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            schedule = "none" if case == "unreduced" else write_schedule(case, path.with_name("schedule.yaml"))
            options = OPTIONS.get(case, ())
            done(ORACLE, "--schedule", schedule, "--inputs", ORACLE / "inputs.npz", "-o", path, *options)
        return path

    return artifact


def assert_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= 1e-5


@pytest.mark.parametrize("padding", ["padded", "unpadded"])
@pytest.mark.parametrize("case", CASES)
def test_the_published_logits(compiled: Compiled, case: str, padding: str) -> None:
    inputs = given(padding)
    assert (inputs["attention_mask"] == 0).any() == (padding == "padded")
    assert_logits(onnx_outputs(compiled(case), inputs)["logits"], EXPECTED[f"{case}.{padding}"])


@pytest.mark.parametrize("padding", ["padded", "unpadded"])
def test_without_a_schedule_the_stock_logits(compiled: Compiled, padding: str) -> None:
    expected = EXPECTED["unreduced" if padding == "padded" else "unreduced.unpadded"]
    assert_logits(onnx_outputs(compiled("unreduced"), given(padding))["logits"], expected)


def test_the_cases_tell_a_missing_reducer() -> None:
    for case in CASES:
        assert np.abs(EXPECTED[f"{case}.padded"] - EXPECTED["unreduced"]).max() > 1e-3


@pytest.mark.parametrize("rows", [[2], [3, 0, 1], [0, 1, 2, 3]], ids=len)
def test_an_open_batch_size(compiled: Compiled, rows: list[int]) -> None:
    for padding in ("padded", "unpadded"):
        inputs = {name: array[rows] for name, array in given(padding).items()}
        logits = onnx_outputs(compiled("vqa-258"), inputs)["logits"]
        assert_logits(logits, EXPECTED[f"vqa-258.{padding}"][rows])


@pytest.mark.parametrize("case", CASES)
def test_token_counts(compiled: Compiled, case: str, tmp_path: Path) -> None:
    published = [{"text": text, "image": image} for text, image in CASES[case]["tokens_after_layer"]]
    sidecar = json.loads(compiled(case).with_name("model.onnx.manifest.json").read_text(encoding="utf-8"))
    for manifest in (sidecar, inner_manifest(compiled(case))):
        assert manifest["tokens"] == {f"cross_modal.{i}": counts for i, counts in enumerate(published)}

    schedule = write_schedule(case, tmp_path / "schedule.yaml")
    plan = json.loads(done("plan", ORACLE, "--schedule", schedule, "--json").out)
    assert plan == {"schedule": sidecar["schedule"], **sidecar["plan"]}
    layers = CASES[case]["layers"]
    assert [site["site"] for site in plan["sites"]] == [f"cross_modal.{i}" for i in layers]
    assert [site["module"] for site in plan["sites"]] == [f"vilt.encoder.layer.{i}.attention.attention" for i in layers]
    assert [site["before"] for site in plan["sites"]] == [published[i - 1] for i in layers]
    assert [site["after"] for site in plan["sites"]] == [published[i] for i in layers]


@pytest.mark.parametrize("case", [*CASES, "unreduced"])
def test_the_graph(compiled: Compiled, case: str) -> None:
    model = onnx.load(str(compiled(case)))
    onnx.checker.check_model(model, full_check=True)
    dynamic = "--dynamic-batch" in OPTIONS.get(case, ())
    assert [opset.version for opset in model.opset_import if not opset.domain] == [18 if dynamic else 20]
    assert {opset.domain for opset in model.opset_import} == {""} and not model.functions
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "pixel_values"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert not [node.op_type for node in model.graph.node if node.op_type.startswith(DATA_DEPENDENT)]

    batches = set()
    for value in [*model.graph.input, *model.graph.output]:
        batch, *rest = value.type.tensor_type.shape.dim
        batches.add(batch.dim_param or batch.dim_value)
        assert all(size.dim_value > 0 for size in rest), value
    assert len(batches) == 1 and (batches == {4}) != dynamic


@pytest.mark.parametrize("case", ["ve-2468", "unreduced"])
def test_every_shape_is_static(compiled: Compiled, case: str) -> None:
    model = onnx.shape_inference.infer_shapes(
        onnx.load(str(compiled(case))), check_type=True, strict_mode=True, data_prop=True
    )
    known = {value.name: value.type.tensor_type for value in [*model.graph.value_info, *model.graph.output]}
    for node in model.graph.node:
        for name in node.output:
            assert known[name].HasField("shape"), node
            assert all(size.HasField("dim_value") for size in known[name].shape.dim), node


@pytest.mark.parametrize("case", CASES)
def test_reducers_can_be_read_in_a_viewer(compiled: Compiled, case: str) -> None:
    model = onnx.load(str(compiled(case)))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    scopes = {name.split("/")[0] for name in names if name.startswith("reducer.")}
    wanted = {f"reducer.cross_modal_{i}.{stream}" for i in CASES[case]["layers"] for stream in ("text", "image")}
    for scope in wanted:
        assert any(found == scope or found.startswith(f"{scope}.") for found in scopes), scope
    for scope in scopes:
        known = {*wanted, "reducer.weights"}  # masks, once
        assert any(scope == found or scope.startswith(f"{found}.") for found in known), scope
    assert any(name.startswith("published_softmax.cross_modal_0/") for name in names)
    reducing = [node for node in model.graph.node if node.name.startswith("reducer.")]
    assert "MatMul" in {node.op_type for node in reducing}
    picking = [node for node in reducing if node.op_type.startswith(("Gather", "ArgM"))]
    constants = {weight.name for weight in model.graph.initializer}
    assert not [node for node in picking if node.op_type != "Gather" or node.input[1] not in constants]
    assert b"site-packages" not in compiled(case).read_bytes()  # nothing of the machine that compiled it


# --- Sizes that collide -----------------------------------------------------------------------------------------------


class Collision:
    """A ViLT whose token counts equal other sizes of it, and its inputs."""

    def __init__(self, text: int, batch: int, canvas: tuple[int, int], sites: dict[int, Shares], **config: int) -> None:
        self.model = tiny_vilt(num_hidden_layers=3, patch_size=8, **config)
        self.inputs = feed(batch, text, canvas, seed=3)
        self.sites = sites

    @property
    def schedule(self) -> Schedule:
        sites = [
            {"at": f"cross_modal.{i}", "prune": prune, "merge": {"image": image, "text": text}}
            for i, (prune, image, text) in self.sites.items()
        ]
        return Schedule(semantics="reference", sites=sites)


STRONG, WEAK = (0.2, 0.3, 0.25), (0.1, 0.2, 0.3)
COLLISIONS: dict[str, Callable[[], Collision]] = {
    # text = head size = heads * batch; image = intermediate size = 10
    "text=head_size=heads*batch": lambda: Collision(
        8, 2, (24, 24), {1: STRONG}, hidden_size=32, num_attention_heads=4, intermediate_size=10, image_size=24
    ),
    # text = heads = batch; image = hidden size = 36, with interpolated positions
    "text=heads=batch,image=hidden": lambda: Collision(
        4, 4, (40, 56), {0: STRONG, 1: WEAK}, hidden_size=36, num_attention_heads=4, image_size=48
    ),
    # text = image = 10; text + image = intermediate = hidden = 20; after the site text = heads
    "text=image,both=hidden": lambda: Collision(
        10,
        3,
        (24, 24),
        {1: (0.1, 0.4, 0.45)},
        hidden_size=20,
        num_attention_heads=5,
        intermediate_size=20,
        image_size=24,
    ),
}


@pytest.mark.parametrize("name", COLLISIONS)
def test_colliding_sizes(name: str, tmp_path: Path) -> None:
    collision = COLLISIONS[name]()
    model, sites = collision.model, collision.sites
    model.save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "inputs.npz", **collision.inputs)
    lines = [
        f"- {{at: cross_modal.{i}, prune: {prune}, merge: {{image: {image}, text: {text}}}}}"
        for i, (prune, image, text) in sites.items()
    ]
    (tmp_path / "schedule.yaml").write_text(
        "semantics: reference\nsites:\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
    arguments = ("--schedule", tmp_path / "schedule.yaml", "--inputs", tmp_path / "inputs.npz")
    done(tmp_path / "model", *arguments, "-o", tmp_path / "model.onnx", "--no-verify")
    artifact = onnx_outputs(tmp_path / "model.onnx", collision.inputs)["logits"]

    tensors = {key: torch.from_numpy(array) for key, array in collision.inputs.items()}
    reduced = reduce(capture(model, tensors), collision.schedule)
    with torch.no_grad():
        eager = reduced.module(**tensors).logits.numpy()
    assert np.abs(artifact - eager).max() <= 1e-5

    assert isinstance(model, ViltForQuestionAnswering)
    independent, counts = reduced_vilt(model, tensors, sites)
    assert np.abs(artifact - independent.numpy()).max() <= 1e-5
    tokens = inner_manifest(tmp_path / "model.onnx")["tokens"]
    assert list(tokens.values()) == [{"text": text, "image": image} for text, image in counts]
    assert counts[-1] != counts[0] or 0 in sites


@pytest.mark.parametrize("case", CASES)
def test_tensorrt_takes_it(compiled: Compiled, case: str) -> None:
    assert tensorrt_refuses(compiled(case)) == []
