"""PyramidDrop: the published vectors, other models by their own layers, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import LocateError, PlanError, ScheduleError, UsageError
from pumer_compile.generation import Generator, export_decode
from pumer_compile.generation.decode import read_step
from pumer_compile.reducers import NextQueryReducer, forced_decisions
from pumer_compile.reducers.base import Decisions
from tests.support import llava
from tests.support.commands import done, inner_manifest, onnx_outputs, refused
from tests.support.prompt_families import captured
from tests.support.published import Vectors, assert_last, kept_and_logits
from tests.support.stages import by_hand

PUBLISHED = Vectors("pdrop-tiny", "pdrop")
IMAGE = 144
PLACEHOLDER = 299  # of llava-tiny


def schedule(case: str, **more: Any) -> Schedule:
    spec = PUBLISHED.cases[case]
    return Schedule(method="pyramiddrop", stages=dict(zip(spec["layers"], spec["ratios"], strict=True)), **more)


# --- What is published ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PUBLISHED.cases)
def test_the_published_selection_and_logits(case: str) -> None:
    reduced = PUBLISHED.reduced(case, schedule(case))
    kept, logits = kept_and_logits(reduced, PUBLISHED.inputs(case))
    spec = PUBLISHED.cases[case]
    assert len(kept) == len(spec["layers"]) == len(reduced.plan.sites)
    for stage, found in enumerate(kept):
        np.testing.assert_array_equal(found.numpy(), PUBLISHED.wanted(case, f"kept_{stage}"))
    assert_last(logits, PUBLISHED.wanted(case, "logits_last"))
    counts = [plan.after["prompt_image"] for plan in reduced.plan.sites]
    assert counts == [int(IMAGE * ratio) for ratio in spec["ratios"]]
    left = [reduced.plan.layers[f"cross_modal.{i}"]["prompt_image"] for i in range(6)]
    assert left == [([IMAGE, *counts])[sum(i >= layer for layer in spec["layers"])] for i in range(6)]


def test_positions_that_are_not_counted_anew() -> None:
    """`original` is something else than what was published, and what the layers give that keep their angles."""
    case = "L2-4-r.5-.25"
    inputs = PUBLISHED.inputs(case)
    _, logits = kept_and_logits(PUBLISHED.reduced(case, schedule(case, positions="original")), inputs)
    wanted, _ = by_hand(PUBLISHED.model, inputs, {2: 72, 4: 36}, "next", placeholder=199)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert np.abs(logits[:, -1].numpy() - PUBLISHED.wanted(case, "logits_last")).max() > 1e-2


def test_prompts_one_by_one() -> None:
    case = "L1-4-r.4-.11"
    for row in range(2):
        inputs = PUBLISHED.inputs(case, slice(row, row + 1))
        alone = pumer.capture(PUBLISHED.model, inputs, outputs=["logits"])
        kept, logits = kept_and_logits(pumer.reduce(alone, schedule(case)), inputs)
        np.testing.assert_array_equal(kept[-1][0].numpy(), PUBLISHED.wanted(case, "kept_1")[row])
        assert_last(logits, PUBLISHED.wanted(case, "logits_last")[row : row + 1])


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = PUBLISHED.inputs(next(iter(PUBLISHED.cases)))
    return export_decode(PUBLISHED.model, inputs, tmp_path_factory.mktemp("step") / "decode.onnx", by_layer=True)


@pytest.mark.parametrize("case", ["L2-4-r.5-.25", "L1-3-5-r.5-.25-.125"])
def test_the_published_generation(case: str, decode: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = PUBLISHED.inputs(case)
    reduced = pumer.reduce(pumer.capture(PUBLISHED.model, inputs), schedule(case))
    prefill = pumer.export(reduced, tmp_path / "prefill.onnx", verify=False).path
    wanted, seen = PUBLISHED.wanted(case, "generated"), list[Tensor]()

    class Note(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            seen.append(scores.clone())
            return scores

    made = Generator(prefill, decode).generate(inputs, wanted.shape[1], processors=LogitsProcessorList([Note()]))
    np.testing.assert_array_equal(made.numpy(), wanted)
    logits = PUBLISHED.wanted(case, "generated_logits")
    assert np.abs(torch.stack(seen, 1).numpy() - logits).max() <= 1e-4
    step = {**read_step(decode), "positions_by_layer": False}
    monkeypatch.setattr("pumer_compile.generation.loop.read_step", lambda path: step)
    with pytest.raises(UsageError, match="each layer has its own"):
        Generator(prefill, decode)


def test_the_command_line(tmp_path: Path) -> None:
    case = "L2-3-4-r.6-.3-.15"
    inputs = {name: value.numpy() for name, value in PUBLISHED.inputs(case).items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    file, path = tmp_path / "pyramid.yaml", tmp_path / "model.onnx"
    file.write_text("method: pyramiddrop\nstages: {2: 0.6, 3: 0.3, 4: 0.15}\n", encoding="utf-8")
    options = ("--schedule", file, "--inputs", tmp_path / "inputs.npz", "--outputs", "logits")
    done(PUBLISHED.path, *options, "-o", path)
    manifest = inner_manifest(path)
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert len(manifest["parity"]["reducers"]) == 3
    assert Schedule.from_manifest(json.loads(json.dumps(manifest["schedule"]))) == schedule(case)
    assert_last(onnx_outputs(path, inputs)["logits"], PUBLISHED.wanted(case, "logits_last"))
    file.write_text("method: pyramiddrop\nstages: {2: 0.3, 4: 0.5}\n", encoding="utf-8")
    assert "0.5 after layer 4 is not less than 0.3 after layer 2" in refused(2, "plan", PUBLISHED.path, *options)
    file.write_text("method: pyramiddrop\nstages: {6: 0.5}\n", encoding="utf-8")
    assert "this model has 6: choose 1 to 5" in refused(2, "plan", PUBLISHED.path, *options)


def test_torch_compile() -> None:
    case = "L3-r.333"
    inputs, options = PUBLISHED.inputs(case), {"schedule": schedule(case), "inner": "eager"}
    compiled = torch.compile(copy.deepcopy(PUBLISHED.model), backend="pumer", options=options, fullgraph=True)
    with torch.no_grad():
        assert_last(compiled(**inputs, use_cache=False).logits, PUBLISHED.wanted(case, "logits_last"))


# --- Other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_grouped_queries(positions: str) -> None:
    """What the published code fails on: fewer keys than heads."""
    wanted, places = by_hand(
        llava.model(), llava.tensors(), {1: 72, 2: 21}, "next", compact=positions == "compact", placeholder=PLACEHOLDER
    )
    reduced = pumer.reduce(
        llava.program(), Schedule(method="pyramiddrop", stages={1: 0.5, 2: 0.15}, positions=positions)
    )
    kept, logits = kept_and_logits(reduced, llava.tensors())
    assert torch.equal(kept[-1] + 5, places[-1][:, 5 : 5 + 21])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_padding_in_front() -> None:
    inputs = {**llava.tensors(), "attention_mask": llava.tensors()["attention_mask"].clone()}
    inputs["attention_mask"][1, :3] = 0
    wanted, _ = by_hand(llava.model(), inputs, {1: 48}, "next", compact=True, placeholder=PLACEHOLDER)
    reduced = pumer.reduce(llava.program(), Schedule(method="pyramiddrop", stages={1: 1 / 3}))
    _, logits = kept_and_logits(reduced, inputs)
    torch.testing.assert_close(logits[0], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 3:], wanted[1, 3:], atol=1e-4, rtol=1e-4)


FAMILIES = [(name, "original") for name in ("qwen2_5_vl", "internvl", "qwen3_vl", "llava_next")]


@pytest.mark.parametrize(("name", "positions"), [*FAMILIES, ("internvl", "compact")])
def test_other_families(name: str, positions: str) -> None:
    """Angles of three axes, several runs of placeholders, features that come later."""
    model, make, output, program = captured(name)
    reduced = pumer.reduce(program, Schedule(method="pyramiddrop", stages={1: 0.25}, positions=positions))
    budgets = {site.after[s] for site in reduced.plan.sites for s in site.after}
    kept = []
    for seed in (0, 1):
        wanted, places = by_hand(model, make(seed), {1: max(budgets)}, "next", compact=positions == "compact")
        with torch.no_grad():
            found = reduced.module(**make(seed))[output]
        torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
        kept.append(places[-1])
    assert not torch.equal(*kept)


# --- Near-ties --------------------------------------------------------------------------------------------------------


def test_a_near_tie_is_told_from_a_wrong_choice() -> None:
    module = torch.nn.Module()
    module.next = NextQueryReducer(4, 2)
    votes, none = torch.tensor([0.1, 0.5, 0.3 - 1e-7, 0.3]).expand(1, 2, 1, 4), torch.empty(1, 0, dtype=torch.int64)

    def margin(*kept: int) -> float:
        with forced_decisions(module, {"next": Decisions(torch.tensor([kept]), none, none)}) as forcings:
            module.next(torch.ones(1, 4, 1), next_query=votes)
        comparison = forcings["next"].comparison
        assert comparison is not None
        return float(comparison.margin)

    assert module.next(torch.ones(1, 4, 1), votes).kept.tolist() == [[1, 3]]
    assert margin(1, 3) == 0 and 0 < margin(1, 2) < 1e-6 and margin(0, 1) > 0.1
    equal = torch.full((1, 2, 1, 4), 0.25)
    assert module.next(torch.ones(1, 4, 1), equal).kept.tolist() == [[0, 1]]


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "needs a `stages`"),
        ({"stages": {}}, "stages: expected a mapping"),
        ({"stages": [0.5]}, "stages: expected a mapping"),
        ({"stages": {0: 0.5}}, "an integer of at least 1, got 0"),
        ({"stages": {1.5: 0.5}}, "an integer of at least 1, got 1.5"),
        ({"stages": {True: 0.5}}, "an integer of at least 1, got True"),
        ({"stages": {2: 1.0}}, "a share above 0 and below 1, such as 0.5, got 1.0"),
        ({"stages": {2: 72}}, "a share above 0 and below 1, such as 0.5, got 72"),
        ({"stages": {2: 0.5, 4: 0.5}}, "0.5 after layer 4 is not less than 0.5 after layer 2"),
        ({"stages": {2: 0.5}, "budget": 4}, "leave out `budget`"),
        ({"stages": {2: 0.5}, "semantics": "stable"}, "leave out `semantics`"),
    ],
)
def test_schedules_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Schedule(method="pyramiddrop", **keys)


def test_the_schedule() -> None:
    made = Schedule.from_yaml("method: pyramiddrop\nstages: {4: 0.25, 2: 0.5}\n")
    assert made == Schedule(method="pyramiddrop", stages={2: 0.5, 4: 0.25}, positions="compact")
    others = [Schedule(method="pyramiddrop", stages={2: 0.5}), Schedule(method="pyramiddrop", stages={2: 0.5, 4: 0.2})]
    others.append(Schedule(method="pyramiddrop", stages={2: 0.5, 4: 0.25}, positions="original"))
    assert len({s.sha256 for s in (made, *others)}) == 4


@pytest.mark.parametrize(
    ("stages", "words"), [({1: 0.005}, "is 0, and 144 are left"), ({1: 0.505, 2: 0.503}, "is 72, and 72 are left")]
)
def test_a_stage_that_leaves_nothing_or_as_many(stages: dict[int, float], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        pumer.reduce(llava.program(), Schedule(method="pyramiddrop", stages=stages))


def test_positions_that_are_constants() -> None:
    with pytest.raises(UsageError, match="`positions: original`"):
        pumer.reduce(captured("qwen2_5_vl")[3], Schedule(method="pyramiddrop", stages={1: 0.25}))


def test_a_window_that_does_not_reach_the_image() -> None:
    with pytest.raises(PlanError, match="does not see all of prompt_image in language layer 2"):
        pumer.reduce(captured("gemma3")[3], Schedule(method="pyramiddrop", stages={1: 0.25}, positions="original"))


def test_images_that_stand_in_no_prompt() -> None:
    with pytest.raises(LocateError, match="by cross-attention alone"):
        pumer.reduce(captured("mllama")[3], Schedule(method="pyramiddrop", stages={1: 0.25}))
