"""HoloV: what was published on a small LLaVA, and what is ours, against second programs with sorts and lists."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import PlanError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import noted_decisions
from pumer_compile.reducers.base import Decisions, Forcing
from pumer_compile.reducers.holov import HoloVReducer
from tests.support.commands import done, inner_manifest, onnx_outputs, refused, tensorrt_refuses
from tests.support.prompt_families import captured, placeholders
from tests.support.prompt_oracle import kept_places, logits, look

FOLDER = Path(__file__).parent.parent / "oracle" / "prompt-tiny"
QWEN = FOLDER.parent / "qwen-tiny"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases_holov.json").read_text(encoding="utf-8"))
EXPECTED = dict(np.load(FOLDER / "expected_holov.npz"))
ONE = "T72-p16"
WINDOWS: dict[str, dict[str, Any]] = json.loads((QWEN / "cases_holov.json").read_text(encoding="utf-8"))


@functools.cache
def model() -> Any:
    return load_model(FOLDER).source.eval()


def inputs(case: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    arrays, spec = np.load(FOLDER / "inputs.npz"), CASES[case]
    ids = torch.from_numpy(arrays[f"input_ids_{spec['prompt']}"])[rows]
    pixels = torch.from_numpy(arrays["pixel_values"])[spec["images"]][rows].float()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@functools.cache
def program(prompt: str) -> Program:
    case = next(name for name, spec in CASES.items() if spec["prompt"] == prompt)
    return pumer.capture(model(), inputs(case), outputs=["logits"])


def schedule(case: str, **more: Any) -> Schedule:
    return Schedule(method="holov", budget=CASES[case]["budget"], crops=CASES[case]["crops"], **more)


def run(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Decisions]:
    with torch.no_grad(), noted_decisions(module) as noted:
        found: Tensor = module(**given)["logits"]
    (decisions,) = noted.values()
    return found, decisions


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(features: Tensor, votes: Tensor, budget: int, runs: int, order: str) -> list[int]:
    """One crop: what stays, in its order; -1 is a token of zeros."""
    parts = [part.tolist() for part in torch.tensor_split(torch.arange(len(votes)), runs)]
    scores = []
    for part in parts:
        unit = features[part] / (features[part].norm(dim=-1, keepdim=True) + 1e-6)
        alike, others = unit @ unit.T, max(1, len(part) - 1)
        alike.fill_diagonal_(0)
        variety = torch.stack([((row - row.sum() / others) ** 2).sum() / others for row in alike])
        attention = votes[part] * 1000
        scores.append((attention + 0.09 * variety * attention.abs().mean() / (variety.mean() + 1e-6)).mean())
    weights = torch.stack(scores) / (sum(scores) + 1e-6)
    shares = (weights * budget).floor().long().tolist()
    heaviest = sorted(range(runs), key=lambda i: (-float(weights[i]), i))
    if order == "stable":
        shares = [min(share, len(part)) for share, part in zip(shares, parts, strict=True)]
        while sum(shares) < budget:
            for i in [i for i in heaviest if shares[i] < len(parts[i])]:
                shares[i] += sum(shares) < budget
    else:
        for i in heaviest[: budget - sum(shares)]:
            shares[i] += 1
    kept: list[int] = []
    for share, part in zip(shares, parts, strict=True):
        by_votes = sorted(part, key=lambda i: (-float(votes[i]), i))
        kept += part if share >= len(part) else by_votes[:share]
    return sorted(kept) if order == "stable" else kept + [-1] * (budget - len(kept))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), order=st.sampled_from(["reference", "stable"]), peak=st.booleans())
def test_crops_against_lists(data: st.DataObject, order: str, peak: bool) -> None:
    """Uneven runs, crops of several lengths that lie through one another, budgets of all and of more than a crop."""
    lengths = data.draw(st.lists(st.integers(3, 17), min_size=1, max_size=3))
    runs, budget = data.draw(st.integers(1, 3)), data.draw(st.integers(1, max(lengths)))
    total = sum(lengths)
    shuffled = data.draw(st.permutations(range(total)))
    crops = [sorted(shuffled[sum(lengths[:i]) : sum(lengths[: i + 1])]) for i in range(len(lengths))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens, votes = torch.randn(2, total, 5, generator=generator), torch.rand(2, total, generator=generator)
    if peak:  # much of it in one run
        votes[:, crops[0][: lengths[0] // runs]] *= 9
    found = HoloVReducer(crops, budget, runs, order=order)(tokens, votes)
    for row in range(2):
        wanted: list[int] = []
        for crop in crops:
            kept = by_hand(tokens[row, crop], votes[row, crop], min(budget, len(crop)), runs, order)
            wanted += [crop[i] if i >= 0 else -1 for i in kept]
        wanted = sorted(wanted) if order == "stable" else wanted
        assert found.kept[row].tolist() == wanted
        rows = torch.stack([tokens[row, i] if i >= 0 else torch.zeros(5) for i in wanted])
        torch.testing.assert_close(found.tokens[row], rows)
    torch.testing.assert_close(found.map.sum(-1), torch.ones(2, len(wanted)))
    assert bool((found.place.sum(-1) == 1).all())


# --- published --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_published_tokens_and_logits(case: str) -> None:
    found, chosen = run(reduce_graph(program(CASES[case]["prompt"]), schedule(case)), inputs(case))
    np.testing.assert_array_equal(chosen.kept.numpy(), EXPECTED[f"{case}.kept"])
    assert (chosen.kept < 0).sum(1).tolist() == CASES[case]["zero_rows"]
    assert np.abs(found[:, -1].numpy() - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4


def prompt_by_hand(case: str, kept: list[list[int]], positions: str) -> Tensor:
    """Logits of prompts with these rows of the image, -1 of them zeros."""
    given, start = inputs(case), 5
    with torch.no_grad():
        words = model().get_input_embeddings()(given["input_ids"])
        rows = model().model.get_image_features(given["pixel_values"]).pooler_output
        rows = torch.stack([row[[max(i, 0) for i in own]] for row, own in zip(torch.stack([*rows]), kept, strict=True)])
        nothing = torch.tensor(kept).unsqueeze(-1) < 0
        prompt = torch.cat([words[:, :start], torch.where(nothing, 0.0, rows), words[:, start + 144 :]], 1)
        whole = torch.arange(given["input_ids"].shape[1]).expand(2, -1)
        stand = torch.where(nothing.squeeze(-1), 143, torch.tensor(kept)) + start
        where = torch.cat([whole[:, :start], stand, whole[:, start + 144 :]], 1)
        mask = torch.ones(prompt.shape[:2], dtype=torch.int64)
        where = where if positions == "original" else None
        found: Tensor = model()(inputs_embeds=prompt, attention_mask=mask, position_ids=where).logits
    return found


@pytest.mark.parametrize("order", ["reference", "stable"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_other_positions_and_semantics(order: str, positions: str) -> None:
    """A token of zeros stands where the image's last token stood, and what stands behind attends to it."""
    reduced = reduce_graph(program("b"), schedule(ONE, semantics=order, positions=positions))
    found, chosen = run(reduced, inputs(ONE))
    wanted = prompt_by_hand(ONE, chosen.kept.tolist(), positions)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert bool((chosen.kept < 0).any()) == (order == "reference")


def test_padding_in_front() -> None:
    padded = inputs(ONE)
    padded["attention_mask"][1, :2] = 0
    found, _ = run(reduce_graph(program("b"), schedule(ONE)), padded)
    whole, _ = run(reduce_graph(program("b"), schedule(ONE)), inputs(ONE))
    torch.testing.assert_close(found[0], whole[0], atol=1e-4, rtol=1e-4)
    assert bool(found.isfinite().all()) and float((found[1] - whole[1]).abs().max()) > 1e-3


def test_images_one_by_one() -> None:
    together, _ = run(reduce_graph(program("b"), schedule(ONE)), inputs(ONE))
    for row in range(2):
        own = inputs(ONE, slice(row, row + 1))
        alone, _ = run(reduce_graph(pumer.capture(model(), own, outputs=["logits"]), schedule(ONE)), own)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def test_through_the_command_line(tmp_path: Path) -> None:
    case, path = "T32-p16", tmp_path / "model.onnx"
    given = {name: value.numpy() for name, value in inputs(case).items()}
    np.savez(tmp_path / "inputs.npz", **given)
    (tmp_path / "few.yaml").write_text("method: holov\nbudget: 32\ncrops: 16\n", encoding="utf-8")
    done(FOLDER, "--schedule", tmp_path / "few.yaml", "--inputs", tmp_path / "inputs.npz", "-o", path)
    outputs = onnx_outputs(path, given)
    assert np.abs(outputs["logits"][:, -1] - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4
    manifest = inner_manifest(path)
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert tensorrt_refuses(path) == []
    (tmp_path / "many.yaml").write_text("method: holov\nbudget: 32\ncrops: 145\n", encoding="utf-8")
    arguments = ("--schedule", tmp_path / "many.yaml", "--inputs", tmp_path / "inputs.npz", "-o", tmp_path / "x.onnx")
    assert "`crops: 145` would cut an image of 144 tokens" in refused(2, FOLDER, *arguments)


# --- published for Qwen2.5-VL: a tower without a class token ----------------------------------------------------------


def qwen_inputs(case: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    given, spec = np.load(QWEN / "inputs.npz"), WINDOWS[case]
    ids = torch.from_numpy(given[f"input_ids_{spec['prompt']}"])[rows]
    pixels = torch.from_numpy(given["pixel_values"])[spec["images"]][rows].float()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 199).int(),
        "pixel_values": pixels.flatten(0, 1),
        "image_grid_thw": torch.from_numpy(given["image_grid_thw"]).expand(len(ids), -1).contiguous(),
    }


@functools.cache
def qwen_program(prompt: str) -> Program:
    case = next(name for name, spec in WINDOWS.items() if spec["prompt"] == prompt)
    return pumer.capture(load_model(QWEN).source.eval(), qwen_inputs(case), outputs=["logits"])


def windowed(case: str, **more: Any) -> Schedule:
    spec = WINDOWS[case]
    return Schedule(method="holov", budget=spec["kept"], crops=spec["crops"], positions="original", **more)


@pytest.mark.parametrize("case", [name for name, spec in WINDOWS.items() if "kept" in spec])
def test_the_published_window_begins_in_the_text(case: str) -> None:
    """Place 0 is the token in front of the image; the last token stays; votes are those of the tower's windows."""
    expected, spec = np.load(QWEN / "expected_holov.npz"), WINDOWS[case]
    found, chosen = run(reduce_graph(qwen_program(spec["prompt"]), windowed(case)), qwen_inputs(case))
    start = int((qwen_inputs(case)["input_ids"][0] == 199).nonzero()[0]) - 1
    kept = np.where(chosen.kept.numpy() < 0, -1, chosen.kept.numpy() + start)
    whole = expected[f"{case}.sequence_index"]
    np.testing.assert_array_equal(kept, whole[:, start : start + spec["kept"] + 1])
    assert bool((chosen.kept[:, -1] == 144).all())
    assert np.abs(found[:, -1].numpy() - expected[f"{case}.logits_last"]).max() <= 1e-4


# --- other families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl_tiles", "mistral3"])
def test_rows_of_other_families(name: str) -> None:
    family, make, output, own = captured(name)
    keys = {"semantics": "stable", "positions": "original"}
    reduced = pumer.reduce(own, Schedule(method="holov", budget=5, crops=3, **keys))
    seen = []
    for seed in (0, 1):
        given = make(seed)
        # Rows are compared as they enter the prompt.
        sight = look(family, given, dict.fromkeys(placeholders(name), ""))
        rows = []
        for group in sight.groups:
            features = torch.stack([sight.rows[i] for i in group])
            rows += [group[i] for i in by_hand(features, sight.votes[group], 5, 3, "stable")]
        places = kept_places(sight, given, sorted(rows))
        wanted = logits(family, given, places, sorted(rows), len(sight.places))
        with torch.no_grad():
            found = reduced.module(**given)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        seen.append(places)
    assert not torch.equal(*seen)


def test_frames_have_no_published_window() -> None:
    """A tower without a class token: what is published for it is one image behind a token of text."""
    with pytest.raises(PlanError, match="in one piece behind a token of text"):
        pumer.reduce(captured("qwen2_5_vl_video")[3], Schedule(method="holov", budget=3, crops=2, positions="original"))


def test_lines_with_text_between_have_no_published_order() -> None:
    with pytest.raises(PlanError, match="semantics: stable"):
        pumer.reduce(captured("mistral3")[3], Schedule(method="holov", budget=5, crops=3, positions="original"))


# --- the reducer ------------------------------------------------------------------------------------------------------


def test_near_ties() -> None:
    """Rounding of features and votes swaps no more than what is nearly equal."""
    generator = torch.Generator().manual_seed(0)
    tokens, votes = torch.randn(1, 24, 5, generator=generator), torch.rand(1, 24, generator=generator)
    reducer = HoloVReducer([range(24)], 8, 4, order="stable")
    own = reducer(tokens, votes).kept
    order = votes[0, :6].argsort(descending=True)
    taken = int((own < 6).sum())
    votes[0, order[taken - 1]] = votes[0, order[taken]] * (1 + 1e-7)
    first = reducer(tokens, votes).kept
    votes[0, order[taken - 1]] = votes[0, order[taken]] * (1 - 1e-7)
    second = reducer(tokens, votes).kept
    assert len(set(first[0].tolist()) ^ set(second[0].tolist())) == 2


@pytest.mark.parametrize("order", ["reference", "stable"])
def test_forced_decisions_are_followed(order: str) -> None:
    tokens = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    reducer = HoloVReducer([range(12)], 4, 3, order=order)
    votes = torch.arange(12.0).unsqueeze(0)
    kept = torch.tensor([[5, 2, -1, -1] if order == "reference" else [0, 2, 3, 5]])
    reducer.forcing = Forcing(Decisions(kept, kept[:, :0], kept[:, :0]))
    found = reducer(tokens, votes)
    wanted = torch.stack([tokens[0, i] if i >= 0 else torch.zeros(5) for i in kept[0].tolist()])
    torch.testing.assert_close(found.tokens[0], wanted)
    assert reducer.forcing.comparison is not None and bool(reducer.forcing.comparison.differs)
    assert bool(reducer.forcing.comparison.margin.isnan())
