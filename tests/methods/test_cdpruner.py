"""What the published CDPruner keeps of small models, in the paper's code and in OpenVINO's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.errors import LocateError, PlanError, ScheduleError, UsageError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import noted_decisions
from pumer_compile.reducers.relevant import RelevantReducer
from tests.support.commands import done, inner_manifest, onnx_outputs, refused, tensorrt_refuses
from tests.support.greedy import ORACLE, arrays, cases, cosine, determinantal, expected, model
from tests.support.prompt_families import IMAGE, captured
from tests.support.prompt_oracle import kept_places, logits, look

Tensors = dict[str, Tensor]
PAPER = [(folder, case) for folder in ("prompt-tiny", "next-tiny") for case in cases(folder, "cdpruner")]
OPENVINO = cases("qwen-tiny", "cdpruner_openvino")
CLIP = str(ORACLE / "prompt-tiny" / "clip_text")


def run(module: Any, inputs: Tensors, output: str = "logits") -> tuple[Tensor, Tensor]:
    """Logits, and the kept tokens."""
    with torch.no_grad(), noted_decisions(module) as noted:
        found: Tensor = module(**inputs)[output]
    (decisions,) = noted.values()
    return found, decisions.kept


# --- The paper's ------------------------------------------------------------------------------------------------------


def llava(folder: str, case: str, rows: slice = slice(None)) -> Tensors:
    spec, given = cases(folder, "cdpruner")[case], arrays(folder)
    ids = given[f"input_ids_{spec['prompt']}"][rows]
    inputs = {"input_ids": ids, "pixel_values": given["pixel_values"][spec["images"]][rows]}
    sizes = {"image_sizes": given["image_sizes"].expand(len(ids), -1).contiguous()} if "image_sizes" in given else {}
    return {**inputs, "attention_mask": torch.ones_like(ids), **sizes}


def question(folder: str, case: str, batch: int = 2) -> Tensor:
    return arrays(folder)[cases(folder, "cdpruner")[case]["text"]].expand(batch, -1)


@functools.cache
def program(folder: str, prompt: str) -> Program:
    case = next(name for name, spec in cases(folder, "cdpruner").items() if spec["prompt"] == prompt)
    return pumer.capture(model(folder), llava(folder, case), outputs=["logits"])


def paper(folder: str, case: str, **more: Any) -> Any:
    spec = cases(folder, "cdpruner")[case]
    keys: dict[str, Any] = {"budget": spec["budget"], "text_tower": str(ORACLE / folder / "clip_text"), **more}
    return reduce_graph(program(folder, spec["prompt"]), Schedule(method="cdpruner", **keys))


@pytest.mark.parametrize(("folder", "case"), PAPER)
def test_the_paper(folder: str, case: str) -> None:
    """With the question's ids; of crops, relevance is spread over all of them."""
    wanted, spec = expected(folder, "cdpruner"), cases(folder, "cdpruner")[case]
    found, kept = run(paper(folder, case), {**llava(folder, case), "question_ids": question(folder, case)})
    if folder == "prompt-tiny":
        np.testing.assert_array_equal(kept.numpy(), wanted[f"{case}.kept"])
    assert found.shape[1] == spec["sequence"]
    assert np.abs(found[:, -1].numpy() - wanted[f"{case}.logits_last"]).max() <= 1e-4


@pytest.mark.parametrize("case", ["T24-long", "T16-short"])
def test_texts_from_outside(case: str) -> None:
    """The graph takes CLIP's texts; and a shorter question with nothing behind it is the same question."""
    wanted, inputs = expected("prompt-tiny", "cdpruner"), llava("prompt-tiny", case)
    outside = paper("prompt-tiny", case, text_tower=None, clip=CLIP)
    texts = torch.from_numpy(wanted[f"{case}.text_embeds"])
    found, kept = run(outside, {**inputs, "text_embeds": texts})
    np.testing.assert_array_equal(kept.numpy(), wanted[f"{case}.kept"])
    assert np.abs(found[:, -1].numpy() - wanted[f"{case}.logits_last"]).max() <= 1e-4
    other = run(outside, {**inputs, "text_embeds": texts.flip(-1)})[1]
    assert other.tolist() != kept.tolist()
    ids = question("prompt-tiny", case)
    longer = torch.nn.functional.pad(ids, (0, 170 - ids.shape[1]), value=-1)
    assert run(paper("prompt-tiny", case), {**inputs, "question_ids": longer})[1].tolist() == kept.tolist()


def test_prompts_one_by_one() -> None:
    case = "T32-short"
    inputs = {**llava("prompt-tiny", case), "question_ids": question("prompt-tiny", case)}
    together, kept = run(paper("prompt-tiny", case), inputs)
    alone = pumer.capture(model("prompt-tiny"), llava("prompt-tiny", case, slice(1)), outputs=["logits"])
    module = reduce_graph(alone, Schedule(method="cdpruner", budget=32, text_tower=CLIP))
    for row in range(2):
        found, own = run(module, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
        assert own[0].tolist() == kept[row].tolist()
        torch.testing.assert_close(found[0], together[row], atol=1e-5, rtol=1e-5)


def test_the_command_line(tmp_path: Path) -> None:
    """A graph with the text tower inside, proved by the command line."""
    case, path = "T24-long", tmp_path / "model.onnx"
    (tmp_path / "schedule.yaml").write_text("method: cdpruner\nvariant: paper\nbudget: 24\n", encoding="utf-8")
    inputs = {**llava("prompt-tiny", case), "question_ids": question("prompt-tiny", case)}
    given = {name: t.numpy() for name, t in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **given)
    how = ("--schedule", tmp_path / "schedule.yaml", "--text-tower", CLIP, "--inputs", tmp_path / "inputs.npz")
    done(ORACLE / "prompt-tiny", *how, "-o", path)
    outputs, wanted = onnx_outputs(path, given), expected("prompt-tiny", "cdpruner")
    assert np.abs(outputs["logits"][:, -1] - wanted[f"{case}.logits_last"]).max() <= 1e-4
    manifest = inner_manifest(path)
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert manifest["inputs"]["question_ids"]["shape"][1] == 92
    assert tensorrt_refuses(path) == []
    done("parity", path, "--model", ORACLE / "prompt-tiny")


# --- OpenVINO's -------------------------------------------------------------------------------------------------------


def qwen(case: str, row: int) -> Tensors:
    spec, given = OPENVINO[case], arrays("qwen-tiny")
    ids = given[f"input_ids_{spec['prompt']}"][row : row + 1]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 199).int(),
        "pixel_values": given["pixel_values"][spec["images"][row]],
        "image_grid_thw": given["image_grid_thw"],
    }


@functools.cache
def qwen_program(prompt: str) -> Program:
    case = next(name for name, spec in OPENVINO.items() if spec["prompt"] == prompt)
    return pumer.capture(model("qwen-tiny"), qwen(case, 0), outputs=["logits"])


@pytest.mark.parametrize("case", OPENVINO)
def test_openvino(case: str) -> None:
    """The text behind the image stands where it stood: a token of the last row or column of the image is left."""
    spec, wanted = OPENVINO[case], expected("qwen-tiny", "cdpruner_openvino")
    budget = int(144 * (1 - spec["prune_percent"] / 100) + 0.5)
    keys = {"relevance_weight": spec["weight"], "split": bool(spec["split"])}
    schedule = Schedule(method="cdpruner", variant="openvino", budget=budget, **keys)
    module = reduce_graph(qwen_program(spec["prompt"]), schedule)
    for row in range(2):
        found, kept = run(module, qwen(case, row))
        np.testing.assert_array_equal(kept[0].numpy(), wanted[f"{case}.kept"][row])
        assert np.abs(found[0, -1].numpy() - wanted[f"{case}.logits_last"][row]).max() <= 1e-4


def kept_by_hand(rows: list[list[float]], text: list[float], budget: int, weight: float) -> list[int]:
    """Of one image, in halves."""
    kept, middle = [], len(rows) // 2
    for start, stop, share in ((0, middle, budget // 2), (middle, len(rows), budget - budget // 2)):
        own = rows[start:stop]
        like = [cosine(row, text, 1e-6) for row in own]
        worth = [(value - min(like)) / (max(like) - min(like) + 1e-6) for value in like]
        kernel = [
            [
                (1 - weight) * cosine(a, b, 1e-6) + weight * p * cosine(a, b, 1e-6) * q
                for b, q in zip(own, worth, strict=True)
            ]
            for a, p in zip(own, worth, strict=True)
        ]
        kept += [start + i for i in sorted(determinantal(kernel, share))]
    return kept


@pytest.mark.parametrize("name", ["internvl_tiles", "gemma3"])
def test_other_families(name: str) -> None:
    """Two pictures that keep other tokens; each tile has a budget."""
    built, make, output, program = captured(name)
    keys = {"budget": 3, "relevance_weight": 0.7, "positions": "original"}
    module = reduce_graph(program, Schedule(method="cdpruner", variant="openvino", **keys))
    choices = []
    for picture in (0, 1):
        inputs = make(picture)
        sight = look(built, inputs, {IMAGE: ""})
        share = len(sight.groups) // len(inputs["input_ids"])
        rows = []
        for number, group in enumerate(sight.groups):
            text = mean_of_words(built, inputs["input_ids"][number // share])
            image = torch.stack([sight.rows[i] for i in group]).double().tolist()
            rows += [group[i] for i in kept_by_hand(image, text, 3, 0.7)]
        rows.sort()
        choices.append(rows)
        wanted = logits(built, inputs, kept_places(sight, inputs, rows), rows, len(sight.places))
        with torch.no_grad():
            found = module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
    assert choices[0] != choices[1]


def mean_of_words(built: Any, ids: Tensor) -> list[float]:
    """Without those beside an image."""
    image = ids == IMAGE
    beside = image.clone()
    beside[1:] |= image[:-1]
    beside[:-1] |= image[1:]
    with torch.no_grad():
        words: Tensor = built.get_input_embeddings()(ids[~beside]).double()
    mean: list[float] = words.mean(0).tolist()
    return mean


def test_padding_is_no_text() -> None:
    """A prompt that is padded in front keeps what it keeps alone."""
    case = "T32-short"
    inputs = llava("prompt-tiny", case)
    module = reduce_graph(program("prompt-tiny", "b"), Schedule(method="cdpruner", budget=16, positions="compact"))
    _, kept = run(module, inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, :2] = 0
    _, padded = run(module, inputs)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][1, :2] = 7
    assert run(module, inputs)[1].tolist() == padded.tolist()
    assert padded[0].tolist() == kept[0].tolist()


def test_near_ties() -> None:
    """Of copies that differ by rounding, `stable` keeps the first, whatever rounding says."""
    tokens = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    text, kept = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)), []
    reducer = RelevantReducer([range(8)], 4, 0.5, order="stable")
    first = reducer(tokens, text).kept[0].tolist()
    copied, other = first[1], next(i for i in range(first[1] + 1, 8) if i not in first)
    for sign in (1, -1):
        tokens[0, other] = tokens[0, copied] * (1 + sign * 1e-6)
        tokens[0, other, 0] += sign * 1e-6
        kept.append(reducer(tokens, text).kept[0].tolist())
    assert kept[0] == kept[1] and copied in kept[0] and other not in kept[0]


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_keys_that_are_refused() -> None:
    with pytest.raises(ScheduleError, match="give the folder of the CLIP checkpoint"):
        Schedule(method="cdpruner", variant="paper", budget=4)
    with pytest.raises(ScheduleError, match="one of the two"):
        Schedule(method="cdpruner", budget=4, clip=CLIP, text_tower=CLIP)
    with pytest.raises(ScheduleError, match="for `variant: paper`"):
        Schedule(method="cdpruner", variant="openvino", budget=4, clip=CLIP)
    with pytest.raises(ScheduleError, match="`split` is for"):
        Schedule(method="cdpruner", budget=4, clip=CLIP, split=True)
    with pytest.raises(UsageError, match="it has no config"):
        _ = Schedule(method="cdpruner", budget=4, text_tower="/nowhere").adds


def test_a_budget_above_the_rank() -> None:
    with pytest.raises(PlanError, match="there are 96 at most"):
        paper("prompt-tiny", "T32-short", budget=97)
    inputs = {**llava("prompt-tiny", "T32-short"), "question_ids": question("prompt-tiny", "T32-short")}
    found, kept = run(paper("prompt-tiny", "T32-short", budget=97, semantics="stable"), inputs)
    assert kept.shape == (2, 97) and bool(found.isfinite().all())
    assert all(len(set(row)) == 97 for row in kept.tolist())


def test_prompts_without_clip() -> None:
    """Patches that no tower has seen, and a tower of another width."""
    for name, error, words in (
        ("fuyu", LocateError, "not one of its tokens each"),
        ("internvl", UsageError, "takes features of width 48, and the vision tower gives 128"),
    ):
        *_, program = captured(name)
        with pytest.raises(error, match=words):
            reduce_graph(program, Schedule(method="cdpruner", budget=3, clip=CLIP, positions="original"))


def test_samples_of_an_added_input() -> None:
    from pumer_compile.capture.added import with_added_inputs

    adds = Schedule(method="cdpruner", budget=4, clip=CLIP).adds
    whole = program("prompt-tiny", "b")
    with pytest.raises(UsageError, match=r"text_embeds is torch.float32 \[2, 1, 9\].*numbers \[2, any, 40\]"):
        with_added_inputs(whole, adds, {"text_embeds": torch.ones(2, 1, 9)})
    grown = with_added_inputs(whole, adds, {"text_embeds": torch.ones(2, 3, 40)})
    assert grown.inputs["text_embeds"].shape == (2, 3, 40) and "text_embeds" not in whole.inputs
    inputs = llava("prompt-tiny", "T32-short")
    with torch.no_grad():
        found = grown.module(**inputs, text_embeds=torch.ones(2, 3, 40))["logits"]
        assert torch.equal(found, whole.module(**inputs)["logits"])


def test_the_option_is_for_methods_that_have_the_key(tmp_path: Path) -> None:
    (tmp_path / "schedule.yaml").write_text("method: divprune\nbudget: 36\n", encoding="utf-8")
    how = ("--schedule", tmp_path / "schedule.yaml", "--text-tower", CLIP, "-o", tmp_path / "x.onnx")
    assert "text_tower" in refused(2, ORACLE / "prompt-tiny", *how)
    how = ("--schedule", "vilt-vqa", "--text-tower", CLIP, "-o", tmp_path / "x.onnx")
    assert "--text-tower adds a key" in refused(2, ORACLE / "prompt-tiny", *how)
