"""VisionZip: what was published on a small LLaVA, and what is ours on other families, against second programs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
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
from pumer_compile.reducers.visionzip import VisionZipReducer
from tests.support.commands import done, inner_manifest, onnx_outputs, refused, tensorrt_refuses
from tests.support.crops import TOKENS, crops_inputs, crops_model, packing, run_by_hand
from tests.support.prompt_families import captured, placeholders
from tests.support.visual import logits_by_hand
from tests.support.zipped import crops_by_hand, cues, tokens_of, zipped, zipped_logits

FOLDER = Path(__file__).parent.parent / "oracle" / "prompt-tiny"
CASES: dict[str, dict[str, Any]] = {
    name: case
    for name, case in json.loads((FOLDER / "cases_visionzip.json").read_text(encoding="utf-8")).items()
    if "dominant" in case
}
EXPECTED = dict(np.load(FOLDER / "expected_visionzip.npz"))
ONE = "d48-c16"


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
    spec = CASES[case]
    return Schedule(method="visionzip", dominant=spec["dominant"], contextual=spec["contextual"], **more)


def run(module: Any, given: dict[str, Tensor]) -> tuple[Tensor, Decisions]:
    with torch.no_grad(), noted_decisions(module) as noted:
        logits: Tensor = module(**given)["logits"]
    (decisions,) = noted.values()
    return logits, decisions


# --- published --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_the_published_tokens_and_logits(case: str) -> None:
    logits, chosen = run(reduce_graph(program(CASES[case]["prompt"]), schedule(case)), inputs(case))
    np.testing.assert_array_equal(chosen.kept.numpy(), EXPECTED[f"{case}.kept"])
    np.testing.assert_array_equal(chosen.source.numpy(), EXPECTED[f"{case}.merged"])
    into = np.take_along_axis(EXPECTED[f"{case}.targets"], EXPECTED[f"{case}.into"], 1)
    np.testing.assert_array_equal(chosen.target.numpy(), into)
    assert np.abs(logits[:, -1].numpy() - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4


def test_the_plan() -> None:
    (site,) = pumer.reduce(program("b"), schedule(ONE)).plan.sites
    # The class token goes into the prompt, and no patch is thrown away.
    assert site.before == {"prompt_image": 144} and site.after == {"prompt_image": 64}
    assert site.pruned == {"prompt_image": 0} and site.merged == {"prompt_image": 144 - 63}


@pytest.mark.parametrize("order", ["reference", "stable"])
@pytest.mark.parametrize("positions", ["compact", "original"])
def test_other_positions_and_semantics(order: str, positions: str) -> None:
    spec, given = CASES[ONE], inputs(ONE)
    own = cues(model(), given["pixel_values"])
    found = [tokens_of(own, row, spec["dominant"], spec["contextual"], order) for row in range(2)]
    features, places = torch.stack([f for f, _ in found]), torch.tensor([p for _, p in found])
    whole, start = torch.arange(given["input_ids"].shape[1]).expand(2, -1), 5
    where = torch.cat([whole[:, :start], places + start, whole[:, start + 144 :]], 1)
    everything = torch.arange(features.shape[1]).expand(2, -1)
    wanted = logits_by_hand(model(), given, everything, features, where if positions == "original" else None)
    reduced = reduce_graph(program("b"), schedule(ONE, semantics=order, positions=positions))
    torch.testing.assert_close(run(reduced, given)[0], wanted, atol=1e-4, rtol=1e-4)


def test_padding_in_front() -> None:
    """A class token and merged ones are seen, as the tokens that they are made of."""
    given = inputs(ONE)
    given["attention_mask"][1, :2] = 0
    own = cues(model(), given["pixel_values"])
    found = torch.stack([tokens_of(own, row, 48, 16, "reference")[0] for row in range(2)])
    wanted = logits_by_hand(model(), given, torch.arange(64).expand(2, -1), found)
    logits, _ = run(reduce_graph(program("b"), schedule(ONE)), given)
    torch.testing.assert_close(logits[0], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 2:], wanted[1, 2:], atol=1e-4, rtol=1e-4)


def test_images_one_by_one() -> None:
    together, _ = run(reduce_graph(program("b"), schedule(ONE)), inputs(ONE))
    for row in range(2):
        own = inputs(ONE, slice(row, row + 1))
        alone, _ = run(reduce_graph(pumer.capture(model(), own, outputs=["logits"]), schedule(ONE)), own)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def test_through_the_command_line(tmp_path: Path) -> None:
    case, path = "d12-c4", tmp_path / "model.onnx"
    given = {name: value.numpy() for name, value in inputs(case).items()}
    np.savez(tmp_path / "inputs.npz", **given)
    (tmp_path / "zip.yaml").write_text("method: visionzip\ndominant: 12\ncontextual: 4\n", encoding="utf-8")
    done(FOLDER, "--schedule", tmp_path / "zip.yaml", "--inputs", tmp_path / "inputs.npz", "-o", path)
    logits = onnx_outputs(path, given)["logits"]
    assert np.abs(logits[:, -1] - EXPECTED[f"{case}.logits_last"]).max() <= 1e-4
    manifest = inner_manifest(path)
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    (row,) = manifest["parity"]["reducers"]
    assert row["judged"] and row["differ"] == 0
    assert tensorrt_refuses(path) == []
    (tmp_path / "many.yaml").write_text("method: visionzip\ndominant: 140\ncontextual: 6\n", encoding="utf-8")
    arguments = (FOLDER, "--schedule", tmp_path / "many.yaml", "--inputs", tmp_path / "inputs.npz")
    assert "more tokens than the 145" in refused(2, *arguments, "-o", tmp_path / "x.onnx")


def test_under_torch_compile() -> None:
    torch._dynamo.reset()
    options = {"schedule": schedule(ONE), "inner": "eager"}
    compiled = torch.compile(model(), backend="pumer", fullgraph=True, options=options)
    with torch.no_grad():
        logits = compiled(**inputs(ONE)).logits
    assert np.abs(logits[:, -1].numpy() - EXPECTED[f"{ONE}.logits_last"]).max() <= 1e-4


# --- other families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-OneVision"])
def test_crops_of_an_image(name: str) -> None:
    """With a class token for each crop, and without; crops that are shown in part, and lie side by side."""
    family, size = crops_model(name), (90, 120)
    own = crops_inputs(family, size)
    captured_once = pumer.capture(family, own, outputs=["logits"])
    order = [number for number in packing(family, size) if number >= 0]
    for semantics in ("reference", "stable"):
        reduced = reduce_graph(
            captured_once, Schedule(method="visionzip", dominant=6, contextual=3, semantics=semantics)
        )
        for seed in (0, 1):
            own = crops_inputs(family, size, seed=seed)
            tokens = crops_by_hand(family, own["pixel_values"][0], order, TOKENS, 6, 3, semantics)
            with torch.no_grad():
                words, image = (
                    family.get_input_embeddings()(own["input_ids"]),
                    family.model.multi_modal_projector(tokens),
                )
            behind = 3 + len(packing(family, size))
            wanted = run_by_hand(family, torch.cat([words[:, :3], image.unsqueeze(0), words[:, behind:]], 1))
            torch.testing.assert_close(run(reduced, own)[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_video", "internvl", "mistral3", "qwen3_vl"])
def test_rows_that_are_made_of_several_tokens(name: str) -> None:
    family, make, output, own = captured(name)
    given = {"semantics": "stable", "positions": "original"}
    reduced = pumer.reduce(own, Schedule(method="visionzip", dominant=3, contextual=2, **given))
    seen = []
    for seed in (0, 1):
        wanted, places = zipped_logits(family, make(seed), 3, 2, placeholders(name))
        with torch.no_grad():
            found = reduced.module(**make(seed))[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        seen.append(places)
    assert not torch.equal(*seen)


# --- the reducer ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), order=st.sampled_from(["reference", "stable"]), classes=st.booleans())
def test_crops_against_lists(data: st.DataObject, order: str, classes: bool) -> None:
    """Crops of several lengths that lie through one another, and pinned tokens between them."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    pins, dominant = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3))
    contextual = data.draw(st.integers(1, 3))
    lengths[0] = dominant + contextual + lengths[0]
    total = sum(lengths) + pins
    shuffled = data.draw(st.permutations(range(total)))
    crops = [sorted(shuffled[sum(lengths[:i]) : sum(lengths[: i + 1])]) for i in range(len(lengths))]
    pinned = sorted(shuffled[sum(lengths) :])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens, votes, keys, own = (
        torch.randn(2, *shape, generator=generator) for shape in ((total, 5), (total,), (total, 4), (len(crops), 5))
    )
    reducer = VisionZipReducer(crops, dominant, contextual, class_tokens=classes, order=order, pinned=pinned)
    found = reducer(tokens, votes, keys, *([own] if classes else []))
    for row in range(2):
        wanted, first = [], pinned if order == "stable" else []
        made: list[tuple[tuple[float, ...], Tensor]] = [((float(p),), tokens[row, p]) for p in first]
        for number, crop in enumerate(crops):
            part = zipped(votes[row, crop], keys[row, crop], dominant, contextual, order)
            features = tokens[row, crop]
            by_place = [(crop[i], 0, features[i]) for i in part.dominant]
            by_place += [(crop[t], 1, part.merged(features, t, order)) for t in part.targets]
            if order == "reference":
                by_place += [(p, 0, tokens[row, p]) for p in pinned if number == 0]
                made += [((number, 1 + merged, place), token) for place, merged, token in by_place]
            else:
                made += [((place,), token) for place, _, token in by_place]
            if classes:
                made.append(((number, 0, 0) if order == "reference" else (crop[0] - 0.5,), own[row, number]))
            wanted += [(crop[i], crop[t]) for i, t in part.into.items()]
        made.sort(key=lambda pair: pair[0])
        torch.testing.assert_close(found.tokens[row], torch.stack([token for _, token in made]))
        pairs = list(zip(found.source[row].tolist(), found.target[row].tolist(), strict=True))
        assert pairs == sorted(wanted)
    torch.testing.assert_close(found.map.sum(-1), torch.ones(2, reducer.tokens_after))
    assert bool((found.place.sum(-1) == 1).all()) and found.tokens.shape[1] == reducer.tokens_after


def one(order: str = "reference") -> tuple[VisionZipReducer, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, *shape, generator=generator) for shape in ((12, 5), (12,), (12, 4))]
    return VisionZipReducer([range(12)], 4, 3, class_tokens=False, order=order), given


def test_near_ties_of_votes_and_of_keys() -> None:
    reducer, (tokens, votes, keys) = one()
    by_votes = votes[0].argsort(descending=True)
    votes[0, by_votes[4]] = votes[0, by_votes[3]] * (1 - 1e-6)
    own = reducer(tokens, votes, keys).decisions
    for last, tied in ((4, True), (8, False)):
        kept = torch.tensor([sorted([*by_votes[:3].tolist(), int(by_votes[last])])])
        other = votes.clone()
        other[0, by_votes[last]] = 9.0 if last == 8 else votes[0, by_votes[3]] * (1 + 1e-6)
        if last == 8:
            other[0, by_votes[3]] = -9.0
        forced = reducer(tokens, other, keys)
        assert forced.kept.equal(kept) and not own.kept.equal(kept)
        margin = compared(reducer, (tokens, votes, keys), forced.decisions, forced.tokens)
        assert (margin < 1e-5) == tied
    target = own.target.clone()
    target[0, 0] = next(t for t in own.target[0].tolist() if t != int(own.target[0, 0]))
    assert compared(reducer, (tokens, votes, keys), own._replace(target=target)) > 1e-3


def compared(reducer: VisionZipReducer, given: Any, forced: Decisions, tokens: Tensor | None = None) -> float:
    """The margin of forced decisions, which are followed."""
    reducer.forcing = Forcing(forced)
    try:
        found = reducer(*given)
        assert reducer.forcing.comparison is not None and bool(reducer.forcing.comparison.differs)
        if tokens is not None:
            torch.testing.assert_close(found.tokens, tokens)
        return float(reducer.forcing.comparison.margin)
    finally:
        reducer.forcing = None


def test_another_dominant_token_moves_no_more_than_a_neighbour_in_stable() -> None:
    moved = {}
    for order in ("reference", "stable"):
        worst = 0
        for old in range(1, 5):
            votes = torch.zeros(1, 24)
            votes[0, [0, 6, 12, 18]] = 1.0
            reducer = VisionZipReducer([range(24)], 4, 5, class_tokens=False, order=order)
            first = reducer._targets(votes > 0.5).float() @ torch.arange(24.0)
            votes[0, [0, 6, 12, 18][old - 1]], votes[0, 23] = 0.0, 1.0
            other = reducer._targets(votes > 0.5).float() @ torch.arange(24.0)
            worst = max(worst, int((first != other).sum()))
        moved[order] = worst
    assert moved["stable"] <= 1 < moved["reference"]


def test_a_class_token_alone_is_no_dominant_patch() -> None:
    with pytest.raises(pumer.errors.ScheduleError, match="dominant"):
        Schedule(method="visionzip", dominant=1, contextual=4)
    with pytest.raises(PlanError, match="more tokens than the 9"):
        pumer.reduce(captured("internvl")[3], Schedule(method="visionzip", dominant=8, contextual=2))
