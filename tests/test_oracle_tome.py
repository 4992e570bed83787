"""ToMe: what the published implementation computes on a ViT, in eager PyTorch and through the command line."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from pumer_compile import Program, Schedule, capture, reduce
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import PlanError, ScheduleError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import reducers_of
from tests.support.commands import done, inner_manifest, onnx_outputs, tensorrt_refuses
from tests.support.helpers import data_dependent
from tests.support.models import passed
from tests.support.tome import Tome

FOLDER = Path(__file__).parent / "oracle" / "tome-tiny"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
EXPECTED = dict(np.load(FOLDER / "expected.npz"))
TOKENS = 145
CLOSE = 2e-5


def arrays() -> dict[str, np.ndarray]:
    return {"pixel_values": np.load(FOLDER / "inputs.npz")["pixel_values"].astype(np.float32)}


def tensors() -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays().items()}


@functools.cache
def program(form: str = "sdpa", dynamic: bool = False) -> Program:
    model = ViTForImageClassification.from_pretrained(FOLDER, attn_implementation=form).eval()
    return capture(model, tensors(), dynamic_batch=dynamic)


def sites(name: str) -> list[dict[str, Any]]:
    merged = CASES[name]["merge_per_layer"]
    return [{"at": f"vision.{i}", "merge": {"image": count}} for i, count in enumerate(merged) if count]


def schedule(name: str) -> Schedule:
    return Schedule(method="tome", sites=sites(name))


def test_every_case_has_its_vectors() -> None:
    assert set(EXPECTED) == {*CASES, "unreduced"}
    assert {0} < set(CASES["sparse"]["merge_per_layer"])  # layers between the sites, too
    for name in CASES:
        assert np.abs(EXPECTED[name] - EXPECTED["unreduced"]).max() > 1e-3


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_published_code(name: str, form: str, dynamic: bool) -> None:
    captured = program(form, dynamic)
    module = passed(captured, schedule(name), verified=not dynamic).reduced
    with torch.no_grad():
        logits = module(**tensors()).logits.numpy()
        assert np.abs(captured.module(**tensors()).logits.numpy() - EXPECTED["unreduced"]).max() <= CLOSE
    assert np.abs(logits - EXPECTED[name]).max() <= CLOSE
    if dynamic:
        one = {"pixel_values": tensors()["pixel_values"][1:2]}
        with torch.no_grad():
            assert np.abs(module(**one).logits.numpy() - EXPECTED[name][1:2]).max() <= CLOSE


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name: str) -> None:
    """The hand-written ToMe that stands in for the published one on other models gives its logits."""
    model = ViTForImageClassification.from_pretrained(FOLDER).eval()
    merged = CASES[name]["merge_per_layer"]
    with torch.no_grad():
        states = model.vit.embeddings(tensors()["pixel_values"])
        rows = []
        for x in states:
            tome = Tome(x, [1.0] * len(x), learned=1)
            for layer, count in zip(model.vit.layers, merged, strict=True):
                tome.vit_layer(layer, count)
            rows.append(model.classifier(model.vit.layernorm(tome.x)[0]))
    assert np.abs(torch.stack(rows).numpy() - EXPECTED[name]).max() <= CLOSE


@pytest.mark.parametrize("name", CASES)
def test_token_counts(name: str) -> None:
    plan = reduce(program(), schedule(name)).plan
    assert list(plan.tokens().values()) == [{"image": count} for count in CASES[name]["tokens_after_layer"]]
    assert list(plan.tokens()) == [f"vision.{i}" for i in range(6)]
    merged = [count for count in CASES[name]["merge_per_layer"] if count]
    assert [site.merged for site in plan.sites] == [{"image": count} for count in merged]
    assert [site.pruned for site in plan.sites] == [{"image": 0}] * len(merged)


def test_reducers_and_their_names() -> None:
    module = passed(program(), schedule("sparse")).reduced
    assert set(reducers_of(module)) == {f"reducer.vision_{i}.image" for i in (1, 3, 5)}
    # From the first site on, every attention knows the sizes.
    sized = {name for name, _ in module.named_modules() if name.startswith("reducer.sizes.")}
    assert sized == {f"reducer.sizes.vision_{i}" for i in (2, 3, 4, 5)}


def test_no_data_dependent_operators_after_export() -> None:
    exported = torch.export.export(reduce_graph(program(), schedule("every-8")), (), tensors(), strict=False)
    assert not data_dependent(exported.graph_module)


def test_the_class_token_stays() -> None:
    """145 tokens: 72 even ones beside the class token may merge away, and no more."""
    most = Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 72}}])
    ((_, plan),) = passed(program(), most).insertions.done
    assert plan.after == {"image": 73}
    with pytest.raises(PlanError, match="at most 72"):
        passed(program(), Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 73}}]))


def test_what_a_share_comes_to() -> None:
    shares = Schedule(method="tome", sites=[{"at": f"vision.{i}", "merge": {"image": 0.1}} for i in range(2)])
    plans = [plan.after["image"] for _, plan in passed(program(), shares).insertions.done]
    assert plans == [145 - 14, 131 - 13]  # round(14.5), then round(13.1): half to even


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"semantics": "stable"}, "semantics"),
        ({"semantics": "paper"}, "semantics"),
        ({"sites": [{"at": "vision.1", "prune": 3, "merge": {"image": 4}}]}, "prune"),
        ({"sites": None, "layers": [0], "prune": 0.1}, "prune"),
    ],
)
def test_tome_neither_prunes_nor_has_other_semantics(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule(**{"method": "tome", "sites": [{"at": "vision.1", "merge": {"image": 4}}], **keys})
    assert "tome" in str(caught.value)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


# --- the command line and onnxruntime ---------------------------------------------------------------------------------

Compiled = Callable[[str], Path]
# The one with an open batch size is not proved by the command, because the tests do that.
OPTIONS = {"sparse": ("--dynamic-batch", "--no-verify")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The artifact of a case, compiled once by the command line."""
    folder = tmp_path_factory.mktemp("tome")

    def artifact(case: str) -> Path:
        path = folder / case / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            np.savez(path.with_name("inputs.npz"), **arrays())
            schedule = write_schedule(case, path.with_name("schedule.yaml"))
            given = ("--inputs", path.with_name("inputs.npz"), *OPTIONS.get(case, ()))
            done(FOLDER, "--schedule", schedule, "-o", path, *given)
        return path

    return artifact


def write_schedule(case: str, path: Path) -> Path:
    lines = [f"- {{at: {site['at']}, merge: {{image: {site['merge']['image']}}}}}" for site in sites(case)]
    path.write_text("method: tome\nsites:\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_published_logits(compiled: Compiled, case: str) -> None:
    logits = onnx_outputs(compiled(case), arrays())["logits"]
    assert logits.shape == EXPECTED[case].shape
    assert np.abs(logits - EXPECTED[case]).max() <= CLOSE


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 1, 2, 0]], ids=len)
def test_an_open_batch_size(compiled: Compiled, rows: list[int]) -> None:
    logits = onnx_outputs(compiled("sparse"), {"pixel_values": arrays()["pixel_values"][rows]})["logits"]
    assert np.abs(logits - EXPECTED["sparse"][rows]).max() <= CLOSE


@pytest.mark.parametrize("case", CASES)
def test_the_artifact(compiled: Compiled, case: str) -> None:
    manifest = inner_manifest(compiled(case))
    assert list(manifest["tokens"].values()) == [{"image": n} for n in CASES[case]["tokens_after_layer"]]
    assert manifest["schedule"]["method"] == "tome"
    model = onnx.load(str(compiled(case)))
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.output] == ["logits"]
    forbidden = ("Scatter", "NonZero", "TopK", "Sort", "Unique", "Compress", "Loop", "If", "Scan")
    assert not [node.op_type for node in model.graph.node if node.op_type.startswith(forbidden)]


def test_the_folder_is_loaded_as_the_model_it_names() -> None:
    assert isinstance(load_model(FOLDER).model, ViTForImageClassification)


@pytest.mark.parametrize("case", CASES)
def test_tensorrt_takes_it(compiled: Compiled, case: str) -> None:
    assert tensorrt_refuses(compiled(case)) == []
