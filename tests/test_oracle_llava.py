"""What the published VisPruner computes on a small LLaVA, in eager PyTorch and through the command line."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Reduced, Schedule
from pumer_compile.errors import UsageError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import reducers_of
from tests.support.commands import done, inner_manifest, onnx_outputs, refused, tensorrt_refuses
from tests.support.llava import CASES, EXPECTED, FOLDER, model, program, schedule, tensors
from tests.support.prompt_oracle import by_hand
from tests.support.visual import logits_by_hand, select, visual_cues

TOKENS = 144


@functools.cache
def reduced(case: str) -> Reduced:
    return pumer.reduce(program(), schedule(case))


def run(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(**inputs)["logits"]
    return logits


# --- In eager PyTorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_published_selection_and_logits(case: str) -> None:
    seen = []
    (reducer,) = reducers_of(reduced(case).module).values()
    handle = reducer.register_forward_hook(lambda module, args, result: seen.append(result))
    try:
        logits = run(reduced(case).module, tensors())
    finally:
        handle.remove()
    np.testing.assert_array_equal(seen[0].kept.numpy(), EXPECTED[f"{case}.kept"])
    assert logits.shape[1] == CASES[case]["sequence"]
    assert np.abs(logits[:, -1].numpy() - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4


def test_the_cases_tell_a_wrong_selection() -> None:
    case = "T48-r0.5"
    kept = torch.from_numpy(EXPECTED[f"{case}.kept"]).clone()
    features, _ = visual_cues(model(), tensors()["pixel_values"])
    right = logits_by_hand(model(), tensors(), kept, features)[:, -1]
    assert np.abs(right.numpy() - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4
    free = next(i for i in range(TOKENS) if i not in kept[0])
    kept[0, 20] = free
    wrong = logits_by_hand(model(), tensors(), kept.sort(-1).values, features)[:, -1]
    assert np.abs(wrong[0].numpy() - EXPECTED[f"{case}.logits_last"][0]).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_plan(case: str) -> None:
    plan = reduced(case).plan
    (site,) = plan.sites
    assert site.before == {"prompt_image": TOKENS} and site.after == {"prompt_image": CASES[case]["budget"]}
    assert site.site == "vision.2"  # the layer whose output is used, of four
    assert (plan.ratio > 1) == (CASES[case]["budget"] < TOKENS)


def test_images_one_by_one() -> None:
    together = run(reduced("T48-r0.5").module, tensors())
    for row in range(2):
        alone = pumer.capture(model(), tensors(slice(row, row + 1)), outputs=["logits"])
        logits = run(reduce_graph(alone, schedule("T48-r0.5")), tensors(slice(row, row + 1)))
        torch.testing.assert_close(logits[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 33, 143])
@pytest.mark.parametrize("important", [0.0, 0.3, 1.0])
def test_other_budgets(budget: int, important: float) -> None:
    """Also such as end the published code: odd lists, and more to drop than there are."""
    features, attention = visual_cues(model(), tensors()["pixel_values"])
    kept = select(features, attention, budget, important)
    wanted = logits_by_hand(model(), tensors(), kept, features)
    found = reduce_graph(program(), Schedule(method="vispruner", budget=budget, important=important))
    torch.testing.assert_close(run(found, tensors()), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_positions(positions: str) -> None:
    case = "T48-r0.5"
    features, _ = visual_cues(model(), tensors()["pixel_values"])
    kept = torch.from_numpy(EXPECTED[f"{case}.kept"])
    start, length = 5, 158
    whole = torch.arange(length).expand(2, -1)
    left = torch.cat([whole[:, :start], kept + start, whole[:, start + TOKENS :]], 1)
    wanted = {
        "compact": logits_by_hand(model(), tensors(), kept, features),
        "original": logits_by_hand(model(), tensors(), kept, features, left),
    }
    found = run(reduce_graph(program(), schedule(case, positions=positions)), tensors())
    torch.testing.assert_close(found, wanted[positions], atol=1e-4, rtol=1e-4)
    assert (wanted["compact"] - wanted["original"]).abs().max() > 1e-2


def test_padding_in_front() -> None:
    inputs = tensors()
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, :2] = 0
    features, _ = visual_cues(model(), inputs["pixel_values"])
    kept = torch.from_numpy(EXPECTED["T48-r0.5.kept"])
    wanted = logits_by_hand(model(), inputs, kept, features)
    found = run(reduced("T48-r0.5").module, inputs)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1, 2:], wanted[1, 2:], atol=1e-4, rtol=1e-4)
    assert (found - run(reduced("T48-r0.5").module, tensors())).abs().max() > 1e-3


# --- Through the command line -----------------------------------------------------------------------------------------


# What is left of one case through the command line and proved by it, and a case that drops nothing; all go through
# eager PyTorch.
COMPILED = {"T48-r0.5": (), "T144-r1.0": ("--no-verify",)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The whole prefill of a case, with the cache, compiled once by the command line."""
    folder = tmp_path_factory.mktemp("llava")

    def artifact(case: str) -> Path:
        path: Path = folder / case / "model.onnx"
        if not path.exists():
            path.parent.mkdir()
            spec = CASES[case]
            given = path.with_name("schedule.yaml")
            given.write_text(
                f"method: vispruner\nbudget: {spec['budget']}\nimportant: {spec['important_ratio']}\n", encoding="utf-8"
            )
            options = COMPILED[case]
            done(FOLDER, "--schedule", given, "--inputs", FOLDER / "inputs.npz", "-o", path, *options)
        return path

    return artifact


def given() -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in tensors().items()}


@pytest.mark.parametrize("case", COMPILED)
def test_onnx(compiled: Any, case: str) -> None:
    outputs = onnx_outputs(compiled(case), given())
    logits = outputs["logits"]
    assert logits.shape == (2, CASES[case]["sequence"], 300)
    assert np.abs(logits[:, -1] - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4
    caches = [name for name in outputs if name.startswith("past_key_values.")]
    assert len(caches) == 6 and {outputs[name].shape[2] for name in caches} == {CASES[case]["sequence"]}
    features = outputs["image_hidden_states"].reshape(2, CASES[case]["budget"], -1)
    assert np.abs(features[:, :8] - EXPECTED[f"{case}.features"]).max() <= 1e-4
    assert tensorrt_refuses(compiled(case)) == []


def test_blocks_that_nothing_reads_are_gone(compiled: Any) -> None:
    """The second last of the tower's four layers is used."""
    names = [node.name for node in onnx.load(str(compiled("T48-r0.5"))).graph.node]
    for part, there in (("vision_tower.encoder.layers.3.", False), ("vision_tower.encoder.layers.2.", True)):
        assert any(part in name for name in names) == there
    assert any("multi_modal_projector" in name for name in names)


def test_the_manifest(compiled: Any) -> None:
    manifest = inner_manifest(compiled("T48-r0.5"))
    assert manifest["schedule"]["method"] == "vispruner" and manifest["schedule"]["budget"] == 48
    assert manifest["tokens"]["cross_modal.0"] == {"text": 14, "prompt_image": 48}
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    (row,) = manifest["parity"]["reducers"]
    assert row["differ"] == 0 and not row["judged"]


def test_the_tower_alone(tmp_path: Path) -> None:
    """For a server that takes prompt embeddings: pixels in, the budget's features and the kept positions out."""
    path = tmp_path / "vision.onnx"
    (tmp_path / "schedule.yaml").write_text("method: vispruner\nbudget: 48\n", encoding="utf-8")
    inputs = ("--inputs", FOLDER / "inputs.npz")
    done(FOLDER, "--schedule", tmp_path / "schedule.yaml", *inputs, "-o", path, "--component", "vision", "--no-verify")
    outputs = onnx_outputs(path, {"pixel_values": given()["pixel_values"]})
    assert set(outputs) == {"image_hidden_states", "reducer.vision_2.prompt_image.kept"}
    np.testing.assert_array_equal(outputs["reducer.vision_2.prompt_image.kept"], EXPECTED["T48-r0.5.kept"])
    features = outputs["image_hidden_states"].reshape(2, 48, -1)
    assert np.abs(features[:, :8] - EXPECTED["T48-r0.5.features"]).max() <= 1e-4
    manifest = inner_manifest(path)
    assert list(manifest["inputs"]) == ["pixel_values"]
    assert sorted(manifest["unread_inputs"]) == ["attention_mask", "input_ids"]
    done("parity", path, "--model", FOLDER, *inputs)


def test_the_tower_of_a_batch_without_a_prompt(tmp_path: Path) -> None:
    """Nobody has to make a prompt for it; the proof does."""
    path = tmp_path / "vision.onnx"
    (tmp_path / "schedule.yaml").write_text("method: vispruner\nbudget: 48\n", encoding="utf-8")
    done(FOLDER, "--schedule", tmp_path / "schedule.yaml", "-o", path, "--component", "vision", "--batch", "2")
    outputs = onnx_outputs(path, {"pixel_values": given()["pixel_values"]})
    np.testing.assert_array_equal(outputs["reducer.vision_2.prompt_image.kept"], EXPECTED["T48-r0.5.kept"])
    assert inner_manifest(path)["parity"]["samples"] > 2
    done("parity", path, "--model", FOLDER)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--component", "text"), "No component 'text': choose vision"),
        (("--component", "vision", "--outputs", "logits"), "leave out --outputs"),
        (("--component", "vision", "--text-length", "9"), "has no text"),
    ],
)
def test_components_that_are_refused(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text("method: vispruner\nbudget: 48\n", encoding="utf-8")
    path = tmp_path / "x.onnx"
    assert words in refused(2, FOLDER, "--schedule", tmp_path / "schedule.yaml", "-o", path, *arguments)
    assert not path.exists()


def test_a_component_that_nothing_reduces(tmp_path: Path) -> None:
    said = refused(2, FOLDER, "--schedule", "vilt-vqa", "-o", tmp_path / "x.onnx", "--component", "vision")
    assert "does nothing before the prompt" in said


def test_an_engine_of_the_tower(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "vision.engine"
    (tmp_path / "schedule.yaml").write_text("method: vispruner\nbudget: 48\n", encoding="utf-8")
    done(FOLDER, "--schedule", tmp_path / "schedule.yaml", "-o", path, "--component", "vision")
    manifest = json.loads((tmp_path / "vision.engine.manifest.json").read_text(encoding="utf-8"))
    assert list(manifest["inputs"]) == ["pixel_values"]
    assert manifest["outputs"] == ["image_hidden_states"]
    assert manifest["decisions"] == ["reducer.vision_2.prompt_image.kept"]
    assert path.stat().st_size > 0 and manifest["parity"]["passed"]


def test_a_class_token_in_the_prompt_is_a_row_like_the_others() -> None:
    llava = copy.deepcopy(model())
    llava.config.vision_feature_select_strategy = "full"
    inputs = tensors()
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, :6], inputs["input_ids"][:, 5:]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    reduced = pumer.reduce(
        pumer.capture(llava, inputs, outputs=["logits"]), Schedule(method="vispruner", budget=48, positions="original")
    )
    wanted, _ = by_hand(llava, inputs, 48, {llava.config.image_token_id: ""})
    with torch.no_grad():
        found = reduced.module(**inputs)["logits"]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0.0)


# --- The place of the image -------------------------------------------------------------------------------------------


def test_prompts_of_another_form_are_refused(compiled: Any, tmp_path: Path) -> None:
    path = compiled("T48-r0.5")
    (place,) = inner_manifest(path)["plan"]["prompts"]
    assert place == {"input": "input_ids", "placeholder": 299, "start": 5, "stop": 149}
    engine = pumer.Engine(path)
    assert engine(**tensors())["logits"].shape == (2, 62, 300)
    moved = {**tensors(), "input_ids": tensors()["input_ids"].roll(1, 1)}
    for run_it in (lambda: engine(**moved), lambda: engine.run(moved), lambda: pumer.parity(path, model(), moved)):
        with pytest.raises(UsageError, match="positions 5 to 148 of every prompt"):
            run_it()
    fewer = {**tensors(), "input_ids": tensors()["input_ids"].clone()}
    fewer["input_ids"][1, 20] = 1
    with pytest.raises(UsageError, match="id 299"):
        engine(**fewer)
    more = {**tensors(), "input_ids": tensors()["input_ids"].clone()}
    more["input_ids"][1, 0] = 299
    with pytest.raises(UsageError, match="id 299"):
        engine(**more)
