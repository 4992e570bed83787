"""FasterVLM: what was published on a small LLaVA and LLaVA-NeXT, and other families against the models' own modules."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.capture.loading import load_model
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import noted_decisions
from pumer_compile.reducers.base import Decisions, Forcing
from pumer_compile.reducers.fastervlm import VotesReducer
from tests.support.commands import done, inner_manifest, onnx_outputs, refused
from tests.support.prompt_families import captured, placeholders
from tests.support.prompt_oracle import kept_places, logits, look
from tests.support.visual import logits_by_hand, visual_cues

ORACLE = Path(__file__).parent.parent / "oracle"
FOLDERS = {"prompt": ORACLE / "prompt-tiny", "next": ORACLE / "next-tiny"}
CASES: dict[tuple[str, str], dict[str, Any]] = {
    (name, case): spec
    for name, folder in FOLDERS.items()
    for case, spec in json.loads((folder / "cases_fastervlm.json").read_text(encoding="utf-8")).items()
}
ONE = ("prompt", "T36")


@functools.cache
def model(folder: str) -> Any:
    return load_model(FOLDERS[folder]).source.eval()


def inputs(case: tuple[str, str], rows: slice = slice(None)) -> dict[str, Tensor]:
    arrays, spec = np.load(FOLDERS[case[0]] / "inputs.npz"), CASES[case]
    ids = torch.from_numpy(arrays[f"input_ids_{spec['prompt']}"])[rows]
    pixels = torch.from_numpy(arrays["pixel_values"])[spec["images"]][rows].float()
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if "image_sizes" in arrays:
        found["image_sizes"] = torch.from_numpy(arrays["image_sizes"]).repeat(len(ids), 1)
    return found


@functools.cache
def program(folder: str, prompt: str) -> Program:
    case = next(name for name, spec in CASES.items() if name[0] == folder and spec["prompt"] == prompt)
    return pumer.capture(model(folder), inputs(case), outputs=["logits"])


def schedule(case: tuple[str, str], **more: Any) -> Schedule:
    return Schedule(method="fastervlm", budget=CASES[case]["budget"], **more)


def run(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Decisions]:
    with torch.no_grad(), noted_decisions(module) as noted:
        found: Tensor = module(**given)["logits"]
    (decisions,) = noted.values()
    return found, decisions


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_published_tokens_and_logits(case: tuple[str, str]) -> None:
    expected = np.load(FOLDERS[case[0]] / "expected_fastervlm.npz")
    reduced = reduce_graph(program(case[0], CASES[case]["prompt"]), schedule(case))
    found, chosen = run(reduced, inputs(case))
    if case[0] == "prompt":
        np.testing.assert_array_equal(chosen.kept.numpy(), expected[f"{case[1]}.kept"])
    else:  # of each crop, and of the five together in the prompt's order
        assert chosen.kept.shape == (2, 5 * CASES[case]["budget"]) and bool((chosen.kept.diff() > 0).all())
    assert np.abs(found[:, -1].numpy() - expected[f"{case[1]}.logits_last"]).max() <= 1e-4


def test_original_positions_and_stable() -> None:
    given = inputs(ONE)
    features, votes = visual_cues(model("prompt"), given["pixel_values"])
    kept = votes.topk(36).indices.sort().values
    whole, start = torch.arange(given["input_ids"].shape[1]).expand(2, -1), 5
    places = torch.cat([whole[:, :start], kept + start, whole[:, start + 144 :]], 1)
    wanted = logits_by_hand(model("prompt"), given, kept, features, places)
    reduced = reduce_graph(program("prompt", "b"), schedule(ONE, semantics="stable", positions="original"))
    torch.testing.assert_close(run(reduced, given)[0], wanted, atol=1e-4, rtol=1e-4)


def test_images_one_by_one() -> None:
    together, _ = run(reduce_graph(program("prompt", "b"), schedule(ONE)), inputs(ONE))
    for row in range(2):
        own = inputs(ONE, slice(row, row + 1))
        alone, _ = run(reduce_graph(pumer.capture(model("prompt"), own, outputs=["logits"]), schedule(ONE)), own)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl_two", "internvl_tiles", "mistral3", "llava_next_video"])
def test_rows_of_other_families(name: str) -> None:
    family, make, output, own = captured(name)
    reduced = pumer.reduce(own, Schedule(method="fastervlm", budget=4, positions="original"))
    seen = []
    for seed in (0, 1):
        given = make(seed)
        sight = look(family, given, placeholders(name))
        rows = [group[int(i)] for group in sight.groups for i in sight.votes[group].topk(4).indices]
        places = kept_places(sight, given, sorted(rows))
        wanted = logits(family, given, places, sorted(rows), len(sight.places))
        with torch.no_grad():
            found = reduced.module(**given)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        seen.append(places)
    assert not torch.equal(*seen)


def test_through_the_command_line(tmp_path: Path) -> None:
    case, path = ("prompt", "T16"), tmp_path / "model.onnx"
    given = {name: value.numpy() for name, value in inputs(case).items()}
    np.savez(tmp_path / "inputs.npz", **given)
    (tmp_path / "few.yaml").write_text("method: fastervlm\nbudget: 16\n", encoding="utf-8")
    done(FOLDERS["prompt"], "--schedule", tmp_path / "few.yaml", "--inputs", tmp_path / "inputs.npz", "-o", path)
    expected = np.load(FOLDERS["prompt"] / "expected_fastervlm.npz")["T16.logits_last"]
    assert np.abs(onnx_outputs(path, given)["logits"][:, -1] - expected).max() <= 1e-4
    (row,) = inner_manifest(path)["parity"]["reducers"]
    assert row["judged"] and row["differ"] == 0
    (tmp_path / "many.yaml").write_text("method: fastervlm\nbudget: 145\n", encoding="utf-8")
    arguments = ("--schedule", tmp_path / "many.yaml", "--inputs", tmp_path / "inputs.npz", "-o", tmp_path / "x.onnx")
    assert "more than the 144 tokens that the vision tower gives" in refused(2, FOLDERS["prompt"], *arguments)


def test_near_ties_in_one_of_two_crops() -> None:
    votes = torch.tensor([[0.1, 0.4, 0.4 * (1 - 1e-6), 0.2, 0.5, 0.3, 0.1, 0.05]])
    tokens = torch.zeros(1, 8, 3)
    reducer = VotesReducer([range(4), range(4, 8)], 1)
    assert reducer(tokens, votes).kept.tolist() == [[1, 4]]
    for kept, tied in (([2, 4], True), ([3, 4], False), ([1, 5], False), ([2, 5], False)):
        reducer.forcing = Forcing(Decisions(torch.tensor([kept]), *[torch.zeros(1, 0, dtype=torch.int64)] * 2))
        reducer(tokens, votes)
        assert reducer.forcing.comparison is not None
        assert (float(reducer.forcing.comparison.margin) < 1e-5) == tied
    reducer.forcing = None
    # Ties go to the lowest index.
    assert VotesReducer([range(8)], 3)(tokens, torch.ones(1, 8)).kept.tolist() == [[0, 1, 2]]
