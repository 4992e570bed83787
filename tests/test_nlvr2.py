"""Heads beside question answering, in eager PyTorch and as artifacts: two images and one text, retrieval, entailment.

ViLT is held against its own layers run by hand (`vilt_layers.encode`), METER against its layers run by
`tests.support.pairs.Oracle`; both give the published vectors where there are any.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    ViltForImageAndTextRetrieval,
    ViltForImagesAndTextClassification,
    ViltForQuestionAnswering,
)

import pumer_compile as pumer
from pumer_compile import Program, Reduced, Schedule, capture, reduce
from pumer_compile.errors import UsageError
from pumer_compile.frontends.meter import (
    MeterForImageAndTextRetrieval,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterForVisualReasoning,
)
from tests.support.commands import done, inner_manifest, onnx_outputs, tensorrt_refuses
from tests.support.meter import classify_by_hand, meter_inputs, tiny_meter
from tests.support.models import passed
from tests.support.pairs import Oracle, of_meter
from tests.support.tiny import text_inputs, tiny_vilt
from tests.support.vilt_layers import encode

Inputs = dict[str, Tensor]
NO_SITES: dict[str, Any] = {"layers": []}
TWO: dict[str, Any] = {"layers": [0, 1], "prune": 0.1, "merge_image": 0.3, "merge_text": 0.2}
SCHEDULE = {"layers": [0, 1], "prune": 0.1, "merge": {"image": 0.3, "text": 0.2}}
LABELS = {"num_hidden_layers": 3}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


# --- ViLT -----------------------------------------------------------------------------------------------------------


@functools.cache
def nlvr2() -> tuple[ViltForImagesAndTextClassification, Inputs, Program]:
    """One encoder, run once for each image, with the same text."""
    model = tiny_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3, **LABELS)
    sample = text_inputs(2, 8) | {"pixel_values": pixels(2, 2, 3, 96, 96)}
    return model, sample, capture(model, sample)


def nlvr2_by_hand(cases: list[dict[str, Any]], semantics: str, sample: Inputs) -> tuple[Tensor, list[list[int]]]:
    """Image by image, each of its own token type."""
    model, _, _ = nlvr2()
    pooled, counts = [], []
    for index, case in enumerate(cases):
        one = {**sample, "pixel_values": sample["pixel_values"][:, index]}
        output, after = encode(model.vilt, one, case, semantics, index + 1)
        pooled.append(output)
        counts += after
    with torch.no_grad():
        return model.classifier(torch.cat(pooled, -1)), counts


@functools.cache
def reduced_nlvr2(semantics: str) -> Reduced:
    return reduce(nlvr2()[2], Schedule(semantics=semantics, **SCHEDULE))


def test_two_images_by_hand_is_the_model() -> None:
    model, sample, captured = nlvr2()
    expected, _ = nlvr2_by_hand([NO_SITES] * 2, "paper", sample)
    with torch.no_grad():
        torch.testing.assert_close(model(**sample).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(captured.module(**sample).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
def test_two_images(semantics: str) -> None:
    """A layer is one site whichever image it runs on; the second pass starts with all its tokens again."""
    model, sample, _ = nlvr2()
    expected, counts = nlvr2_by_hand([TWO, TWO], semantics, sample)
    result = reduced_nlvr2(semantics)
    with torch.no_grad():
        torch.testing.assert_close(result.module(**sample).logits, expected, atol=1e-4, rtol=1e-4)
        assert (model(**sample).logits - expected).abs().max() > 1e-2
    assert [list(c.values()) for c in result.plan.tokens().values()] == counts
    assert list(result.plan.tokens()) == [f"cross_modal.{i}{call}" for call in ("", "@1") for i in range(3)]
    assert [site.name for site in result.plan.sites] == [
        f"cross_modal.{i}{call}" for call in ("", "@1") for i in (0, 1)
    ]


def test_swapped_images_are_told_apart() -> None:
    """Token types differ; a pass that took the wrong one would be seen."""
    _, sample, _ = nlvr2()
    swapped = {**sample, "pixel_values": sample["pixel_values"].flip(1)}
    expected, _ = nlvr2_by_hand([TWO, TWO], "reference", swapped)
    with torch.no_grad():
        found = reduced_nlvr2("reference").module(**swapped).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found - reduced_nlvr2("reference").module(**sample).logits).abs().max() > 1e-2


def test_each_image_is_a_stream() -> None:
    state = passed(nlvr2()[2], Schedule(semantics="safe", **SCHEDULE))
    assert {"text", "image"} <= set(state.annotation.streams)
    before = [plan.before for _, plan in state.insertions.done]
    assert [sorted(tokens.values()) for tokens in before] == [[8, 37], [6, 22], [8, 37], [6, 22]]


def test_two_images_as_an_artifact(tmp_path: Path) -> None:
    model, sample, _ = nlvr2()
    result = reduced_nlvr2("reference")
    pumer.export(result, tmp_path / "model.onnx", verify=False)
    report = pumer.parity(tmp_path / "model.onnx", model, sample)
    assert report.passed, report.failures()
    assert tensorrt_refuses(tmp_path / "model.onnx") == []
    assert len(report.reducers) == 8 and report.decisions_compared
    assert inner_manifest(tmp_path / "model.onnx")["tokens"] == result.plan.tokens()
    others = text_inputs(2, 8, seed=4) | {"pixel_values": pixels(3, 2, 3, 96, 96)[1:]}
    expected, _ = nlvr2_by_hand([TWO, TWO], "reference", others)
    found = onnx_outputs(tmp_path / "model.onnx", {k: v.numpy() for k, v in others.items()})["logits"]
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=1e-3)


def test_the_command_tells_the_passes_apart(tmp_path: Path) -> None:
    nlvr2()[0].save_pretrained(tmp_path / "model")
    lines = ["semantics: reference", "layers: [0, 1]", "prune: 0.1", "merge: {image: 0.3, text: 0.2}"]
    (tmp_path / "schedule.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ("plan", tmp_path / "model", "--schedule", tmp_path / "schedule.yaml", "--batch", 2)
    names = [f"cross_modal.{i}{call}" for call in ("", "@1") for i in (0, 1)]
    assert [site["site"] for site in json.loads(done(*arguments, "--json").out)["sites"]] == names
    table = done(*arguments).out
    assert [line.split()[0] for line in table.splitlines() if line.startswith("cross_modal")] == names


HEADS: dict[str, tuple[type[PreTrainedModel], dict[str, Any], str]] = {
    "retrieval": (ViltForImageAndTextRetrieval, {}, "rank_output"),
    "entailment": (ViltForQuestionAnswering, {"num_labels": 3}, "classifier"),
}


@functools.cache
def vilt_head(name: str) -> tuple[PreTrainedModel, Inputs, Program]:
    head, config, _ = HEADS[name]
    model = tiny_vilt(head, **LABELS)
    if "num_labels" in config:
        torch.manual_seed(1)
        model.classifier[-1] = torch.nn.Linear(model.classifier[-1].in_features, config["num_labels"])
        model.classifier[-1].weight.data *= 5
    sample = text_inputs(2, 8) | {"pixel_values": pixels(2, 3, 96, 96)}
    return model.eval(), sample, capture(model, sample)


@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
@pytest.mark.parametrize("name", HEADS)
def test_other_vilt_heads(name: str, semantics: str) -> None:
    model, sample, captured = vilt_head(name)
    pooled, counts = encode(model.vilt, sample, TWO, semantics)
    state = passed(captured, Schedule(semantics=semantics, **SCHEDULE), verified=semantics == "reference")
    with torch.no_grad():
        expected = getattr(model, HEADS[name][2])(pooled)
        torch.testing.assert_close(state.reduced(**sample).logits, expected, atol=1e-5, rtol=0)
        assert (model(**sample).logits - expected).abs().max() > 1e-3
    assert [list(plan.after.values()) for _, plan in state.insertions.done] == [counts[0], counts[1]]


def test_another_vilt_head_as_an_artifact(tmp_path: Path) -> None:
    """Entailment has the class of question answering, of which there are artifacts elsewhere."""
    name = "retrieval"
    model, sample, captured = vilt_head(name)
    pumer.export(reduce(captured, Schedule(semantics="reference", **SCHEDULE)), tmp_path / "model.onnx", verify=False)
    report = pumer.parity(tmp_path / "model.onnx", model, sample)
    assert report.passed, report.failures()
    assert tensorrt_refuses(tmp_path / "model.onnx") == []
    found = onnx_outputs(tmp_path / "model.onnx", {k: v.numpy() for k, v in sample.items()})["logits"]
    pooled, _ = encode(model.vilt, sample, TWO, "reference")
    with torch.no_grad():
        expected = getattr(model, HEADS[name][2])(pooled)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=1e-3)


# --- METER ----------------------------------------------------------------------------------------------------------

METER: dict[str, tuple[type[PreTrainedModel], dict[str, Any], str]] = {
    "question answering": (MeterForQuestionAnswering, {}, "vqa_classifier"),
    "visual reasoning": (MeterForVisualReasoning, {"token_types": 3}, "nlvr2_classifier"),
    "entailment": (MeterForVisualEntailment, {}, "ve_classifier"),
    "retrieval": (MeterForImageAndTextRetrieval, {}, "rank_output"),
}
PAIRS = {0: (0.2, 0.2, 0.2), 1: (0.2, 0.3, 0.2)}
SITES = [
    {"at": f"cross_modal.{2 * pair}", "prune": prune, "merge": {"image": image, "text": text}}
    for pair, (prune, image, text) in PAIRS.items()
]


@functools.cache
def meter_head(name: str, sees: str = "updated_text") -> tuple[PreTrainedModel, Inputs, Program]:
    head, config, _ = METER[name]
    model = tiny_meter(head, image_attends_to=sees, **config)
    sample = meter_inputs(2, 9, images=2 if name == "visual reasoning" else 1)
    return model, sample, capture(model, sample)


def meter_by_hand(name: str, sees: str, sample: Inputs, semantics: str, sites: Any) -> Tensor:
    model, _, _ = meter_head(name, sees)
    images = list(sample["pixel_values"].unbind(1)) if name == "visual reasoning" else [sample["pixel_values"]]
    pooled = []
    for number, image in enumerate(images, 1):
        oracle = Oracle(of_meter(model, sample["attention_mask"], number), sites, semantics)
        pooled.append(oracle({**sample, "pixel_values": image})[0])
    together = torch.cat(pooled, -1)
    if name == "retrieval":
        return model.rank_output(together)
    return classify_by_hand(model, METER[name][2], together.double()).float()


@pytest.mark.parametrize("sees", ["updated_text", "previous_text"])
@pytest.mark.parametrize("name", METER)
def test_meter_by_hand_is_the_model(name: str, sees: str) -> None:
    model, sample, _ = meter_head(name, sees)
    with torch.no_grad():
        expected = meter_by_hand(name, sees, sample, "paper", {})
        torch.testing.assert_close(model(**sample).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("semantics", ["reference", "safe"])
@pytest.mark.parametrize("sees", ["updated_text", "previous_text"])
@pytest.mark.parametrize("name", METER)
def test_meter_heads(name: str, sees: str, semantics: str) -> None:
    """`paper` sorts the image by what the words see, and the image's pooler reads its first token: it is refused."""
    model, sample, captured = meter_head(name, sees)
    state = passed(captured, Schedule(semantics=semantics, sites=SITES), verified=name == "visual reasoning")
    with torch.no_grad():
        expected = meter_by_hand(name, sees, sample, semantics, PAIRS)
        torch.testing.assert_close(state.reduced(**sample).logits, expected, atol=1e-4, rtol=1e-4)
        assert (model(**sample).logits - expected).abs().max() > 1e-3
    calls = ("", "@1") if name == "visual reasoning" else ("",)
    assert [plan.name for _, plan in state.insertions.done] == [f"cross_modal.{i}{c}" for c in calls for i in (0, 2)]


def test_paper_semantics_would_move_the_token_that_meters_image_pooler_reads() -> None:
    with pytest.raises(pumer.PumerError, match="takes position 0"):
        passed(meter_head("entailment")[2], Schedule(semantics="paper", sites=SITES))


def test_meter_with_two_images_as_an_artifact(tmp_path: Path) -> None:
    model, sample, captured = meter_head("visual reasoning")
    pumer.export(reduce(captured, Schedule(semantics="reference", sites=SITES)), tmp_path / "model.onnx", verify=False)
    report = pumer.parity(tmp_path / "model.onnx", model, sample)
    assert report.passed, report.failures()
    assert tensorrt_refuses(tmp_path / "model.onnx") == []
    found = onnx_outputs(tmp_path / "model.onnx", {k: v.numpy() for k, v in sample.items()})["logits"]
    with torch.no_grad():
        expected = meter_by_hand("visual reasoning", "updated_text", sample, "reference", PAIRS)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=1e-3)


def test_presets_fit_their_models() -> None:
    """Table 6 counts layers of a model of one image; with two images each runs twice."""
    with pytest.raises(UsageError, match=r"cross_modal\.5"):
        passed(nlvr2()[2], Schedule.load("vilt-nlvr2"))
    twelve = tiny_vilt(
        ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3, num_hidden_layers=12
    )
    _, sample, _ = nlvr2()
    done = passed(capture(twelve, sample), Schedule.load("vilt-nlvr2")).insertions.done
    assert [plan.name for _, plan in done] == [f"cross_modal.{i}{c}" for c in ("", "@1") for i in (2, 5, 8)]
