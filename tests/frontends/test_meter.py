"""METER: against vectors of the published implementation, and against its weights multiplied out by hand."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, PreTrainedModel
from transformers.models.roberta import modeling_roberta

from pumer_compile import Program, capture
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.errors import CaptureError, PumerError, UsageError
from pumer_compile.frontends import meter
from pumer_compile.frontends.meter import (
    MODELS,
    MeterConfig,
    MeterForImageAndTextRetrieval,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterForVisualReasoning,
    MeterModel,
)
from pumer_compile.frontends.meter.positions import resize_positions
from tests.support.helpers import published_softmax
from tests.support.meter import classify_by_hand, meter_inputs, pooled_by_hand, tiny_meter

ORACLE = Path(__file__).parents[1] / "oracle" / "meter-tiny"
EXPECTED = dict(np.load(ORACLE / "expected.npz"))
TABLE = "meter.vit_model.positional_embedding"

# class: settings it needs, images in a sample, shape of the logits of a batch of 2.
HEADS: dict[type[PreTrainedModel], tuple[dict[str, Any], int, tuple[int, int]]] = {
    MeterForQuestionAnswering: ({}, 1, (2, 5)),
    MeterForVisualReasoning: ({"token_types": 3}, 2, (2, 2)),
    MeterForVisualEntailment: ({}, 1, (2, 3)),
    MeterForImageAndTextRetrieval: ({}, 1, (2, 1)),
}
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)


def headed(head: type[PreTrainedModel], **config: Any) -> PreTrainedModel:
    return tiny_meter(head, **{**HEADS[head][0], **config})


def logits(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def oracle_inputs(padded: bool) -> dict[str, Tensor]:
    arrays = np.load(ORACLE / "inputs.npz")
    ids = torch.from_numpy(arrays["input_ids_padded" if padded else "input_ids"])
    mask = torch.from_numpy(arrays["attention_mask"]) if padded else torch.ones_like(ids)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.from_numpy(arrays["pixel_values"]).float(),
    }


def rewritten(source: Path, target: Path, weights: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """A copy of a folder with other weights and settings."""
    target.mkdir(exist_ok=True)
    values = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    save_file(dict(weights or load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def refused(message: str, path: Path, kind: type[PumerError] = CaptureError, **options: Any) -> str:
    with pytest.raises(kind, match=message) as error:
        load_model(path, **options)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# --- the published implementation -----------------------------------------------------------------------------------


def test_logits_of_the_published_code_without_padding() -> None:
    found = logits(load_model(ORACLE).source, oracle_inputs(False))
    assert np.abs(found.numpy() - EXPECTED["unreduced.unpadded"]).max() <= 1e-6
    without_mask = {name: t for name, t in oracle_inputs(False).items() if name != "attention_mask"}
    assert torch.equal(logits(load_model(ORACLE).source, without_mask), found)


def test_padding_differs_from_the_published_code_by_its_softmax_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = load_model(ORACLE).source, oracle_inputs(True)
    expected = EXPECTED["unreduced.padded"]
    stock = np.abs(logits(model, inputs).numpy() - expected).max(axis=1)
    assert stock[0] <= 1e-6 < 1e-5 < stock[1:].min()  # the first sample has no padding
    cross_modal = {
        module for name, module in model.named_modules() if ".cross_modal_" in name and name.endswith(".self")
    }
    assert len(cross_modal) == 24
    original = modeling_roberta.eager_attention_forward

    def published(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        if module not in cross_modal:
            return original(module, q, k, v, mask, **rest)
        scores = torch.matmul(q, k.transpose(2, 3)) * rest["scaling"]
        weights = torch.ones(len(k), k.shape[2]) if mask is None else mask.exp()[:, 0, 0]
        rows = [
            torch.stack([torch.from_numpy(published_softmax(head.numpy(), row.numpy())) for head in sample])
            for sample, row in zip(scores, weights, strict=True)
        ]
        context = torch.matmul(torch.stack(rows).to(v.dtype), v).transpose(1, 2).contiguous()
        return context, None

    monkeypatch.setattr(modeling_roberta, "eager_attention_forward", published)
    assert np.abs(logits(model, inputs).numpy() - expected).max() <= 1e-6


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
def test_by_hand_is_the_published_code(padded: bool) -> None:
    model = load_model(ORACLE).source
    assert isinstance(model, PreTrainedModel)
    pooled = pooled_by_hand(model, oracle_inputs(padded), published=True)
    found = classify_by_hand(model, "vqa_classifier", pooled).numpy()
    assert np.abs(found - EXPECTED[f"unreduced.{'padded' if padded else 'unpadded'}"]).max() <= 1e-6


@pytest.mark.parametrize("image_attends_to", ["updated_text", "previous_text"])
def test_the_model_is_its_weights_multiplied_out(image_attends_to: str) -> None:
    model, inputs = tiny_meter(image_attends_to=image_attends_to), meter_inputs(3)
    expected = classify_by_hand(model, "vqa_classifier", pooled_by_hand(model, inputs))
    exact = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    torch.testing.assert_close(logits(model.double(), exact), expected, atol=1e-10, rtol=1e-10)


def test_the_image_attends_to_the_text_of_its_own_pair_unless_told_otherwise() -> None:
    assert MeterConfig().image_attends_to == "updated_text"
    release, original = tiny_meter(), tiny_meter(image_attends_to="previous_text")
    assert all(torch.equal(a, b) for a, b in zip(release.parameters(), original.parameters(), strict=True))
    assert (logits(release, meter_inputs(2)) - logits(original, meter_inputs(2))).abs().max() > 1e-2


def test_words_that_are_padding_do_not_count() -> None:
    model, inputs = tiny_meter(), meter_inputs(2)
    longer = {**inputs, **{name: F.pad(inputs[name], (0, 3), value=value) for name, value in PADDING.items()}}
    torch.testing.assert_close(logits(model, longer), logits(model, inputs), atol=1e-5, rtol=1e-5)
    seen = {**longer, "attention_mask": torch.ones_like(longer["attention_mask"])}
    assert (logits(model, seen) - logits(model, inputs)).abs().max() > 1e-2


PADDING = {"input_ids": 1, "attention_mask": 0}


# --- heads ----------------------------------------------------------------------------------------------------------


@functools.cache
def captured(head: type[PreTrainedModel], dynamic: bool = False) -> Program:
    return capture(headed(head), meter_inputs(2, images=HEADS[head][1]), dynamic_batch=dynamic)


def equals_the_captured(program: Program, batch: int, images: int) -> torch.Size:
    assert program.model is not None
    other = meter_inputs(batch, images=images, seed=1)
    expected = logits(program.model, other)
    torch.testing.assert_close(logits(program.module, other), expected, atol=1e-5, rtol=1e-5)
    return expected.shape


@each_head
def test_every_head_is_captured(head: type[PreTrainedModel]) -> None:
    _, images, shape = HEADS[head]
    assert equals_the_captured(captured(head), 2, images) == shape
    assert list(captured(head).inputs) == ["input_ids", "attention_mask", "pixel_values"]


@pytest.mark.parametrize("head", [MeterForQuestionAnswering, MeterForVisualReasoning])
def test_heads_are_captured_for_any_batch(head: type[PreTrainedModel]) -> None:
    _, images, shape = HEADS[head]
    for batch in (1, 5):
        assert equals_the_captured(captured(head, True), batch, images) == (batch, shape[1])


@each_head
def test_probabilities_are_in_the_graph(head: type[PreTrainedModel]) -> None:
    graph, images = captured(head).module.graph, HEADS[head][1]
    softmaxes = [node for node in graph.nodes if node.target is torch.ops.aten.softmax.int]
    assert len(softmaxes) == images * (1 + 1 + 2 * 4)  # text, vision and two pairs
    assert not [node for node in graph.nodes if "scaled_dot_product" in str(node.target)]


def test_classifiers_by_hand() -> None:
    for head, name in ((MeterForQuestionAnswering, "vqa_classifier"), (MeterForVisualEntailment, "ve_classifier")):
        model, inputs = headed(head), meter_inputs(2)
        expected = classify_by_hand(model, name, pooled_by_hand(model, inputs)).float()
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_retrieval_by_hand() -> None:
    model, inputs = headed(MeterForImageAndTextRetrieval), meter_inputs(2)
    pooled = pooled_by_hand(model, inputs).float()
    expected = pooled @ model.rank_output.weight.T + model.rank_output.bias
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_two_images_are_two_runs_of_the_encoder() -> None:
    model, inputs = headed(MeterForVisualReasoning), meter_inputs(2, images=2)
    ones = [{**inputs, "pixel_values": inputs["pixel_values"][:, index]} for index in range(2)]
    by_hand = torch.cat([pooled_by_hand(model, one, image_type=i + 1) for i, one in enumerate(ones)], -1)
    expected = classify_by_hand(model, "nlvr2_classifier", by_hand).float()
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        pooled = [model.meter(**one, image_token_type_idx=i + 1).pooler_output for i, one in enumerate(ones)]
        torch.testing.assert_close(model.nlvr2_classifier(torch.cat(pooled, -1)), logits(model, inputs))
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(1)}
    assert (logits(model, swapped) - logits(model, inputs)).abs().max() > 1e-2


def test_losses() -> None:
    inputs, pair = meter_inputs(2), meter_inputs(2, images=2)
    scores = torch.tensor([[0.0, 1.0, 0.3, 0.0, 0.6], [1.0, 0.0, 0.0, 0.0, 0.0]])
    model = headed(MeterForQuestionAnswering)
    p = logits(model, inputs).sigmoid()
    expected = -(scores * p.log() + (1 - scores) * (1 - p).log()).mean()
    torch.testing.assert_close(model(**inputs, labels=scores).loss, expected, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([1, 0])
    for model, given in ((headed(MeterForVisualEntailment), inputs), (headed(MeterForVisualReasoning), pair)):
        expected = -logits(model, given).log_softmax(-1)[[0, 1], labels].mean()
        torch.testing.assert_close(model(**given, labels=labels).loss, expected, atol=1e-5, rtol=1e-5)


@each_head
def test_every_weight_that_a_head_reads_can_be_trained(head: type[PreTrainedModel]) -> None:
    model = headed(head)
    logits_with_gradient = model(**meter_inputs(2, images=HEADS[head][1])).logits
    logits_with_gradient.square().sum().backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == ({f"itm_score.fc.{n}" for n in ("weight", "bias")} if hasattr(model, "itm_score") else set())


@each_head
def test_outputs_as_a_tuple(head: type[PreTrainedModel]) -> None:
    model, inputs = headed(head), meter_inputs(2, images=HEADS[head][1])
    with torch.no_grad():
        (found,) = model(**inputs, return_dict=False)
        assert torch.equal(found, logits(model, inputs))
        model.config.return_dict = False
        assert torch.equal(model(**inputs)[0], found)


def test_the_model_without_a_head() -> None:
    model, inputs = tiny_meter(MeterModel), meter_inputs(2)
    with torch.no_grad():
        outputs, captured = model(**inputs), capture(model, inputs).module(**inputs)
    assert outputs.text_hidden_state.shape == (2, 7, 24)
    assert outputs.image_hidden_state.shape == (2, 10, 24)
    assert outputs.pooler_output.shape == (2, 48)
    for name, value in outputs.items():
        torch.testing.assert_close(captured[name], value, atol=1e-5, rtol=1e-5)


@each_head
def test_half_precision(head: type[PreTrainedModel]) -> None:
    model, inputs = headed(head), meter_inputs(2, images=HEADS[head][1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    expected = logits(model, inputs)
    model = model.to(torch.bfloat16)
    found = logits(model, {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)})
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


# --- full size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "billions"), [(MeterForQuestionAnswering, 91.9), (MeterForVisualReasoning, 183.8)], ids=["vqa", "nlvr2"]
)
def test_multiply_adds_at_full_size(head: type[PreTrainedModel], billions: float) -> None:
    """Table 7 of the paper: 384 pixels, 32 words."""
    images = HEADS[head][1]
    with torch.device("meta"):
        model = head(MeterConfig(image_size=384, **HEADS[head][0])).eval()
        ids = torch.zeros(1, 32, dtype=torch.int64)
        pixels = torch.zeros(1, *([2] if images == 2 else []), 3, 384, 384)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    assert counter.get_total_flops() / 2e9 == pytest.approx(billions, rel=1e-3)


def test_the_defaults_are_the_released_sizes() -> None:
    with torch.device("meta"):
        model = MeterForQuestionAnswering(MeterConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(model.meter.vit_model.transformer["resblocks"]) == 11  # without CLIP's last one
    assert len(model.meter.text_transformer.encoder.layer) == 12
    assert shapes[TABLE] == (577, 768)
    assert shapes["meter.text_transformer.embeddings.word_embeddings.weight"] == (50265, 768)
    assert shapes["meter.text_transformer.embeddings.position_embeddings.weight"] == (514, 768)
    assert shapes["meter.cross_modal_image_layers.5.crossattention.self.key.weight"] == (768, 768)
    assert shapes["meter.cross_modal_text_layers.5.intermediate.dense.weight"] == (3072, 768)
    assert shapes["vqa_classifier.3.weight"] == (3129, 1536)
    assert model.config.max_text_length == 512
    assert model.meter.text_transformer.embeddings.LayerNorm.eps == 1e-5
    assert model.meter.cross_modal_image_layers[0].output.LayerNorm.eps == 1e-12


# --- loading --------------------------------------------------------------------------------------------------------

# The names that the released checkpoints have beside `meter.*`.
HEAD_KEYS = {
    MeterForQuestionAnswering: [f"vqa_classifier.{i}.{n}" for i in (0, 1, 3) for n in ("weight", "bias")],
    MeterForVisualReasoning: [f"nlvr2_classifier.{i}.{n}" for i in (0, 1, 3) for n in ("weight", "bias")],
    MeterForVisualEntailment: [f"ve_classifier.{i}.{n}" for i in (0, 1, 3) for n in ("weight", "bias")],
    MeterForImageAndTextRetrieval: [f"{m}.{n}" for m in ("itm_score.fc", "rank_output") for n in ("weight", "bias")],
}


@each_head
def test_a_saved_model_is_loaded_again(head: type[PreTrainedModel], tmp_path: Path) -> None:
    model = headed(head)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sorted(name for name in stored if not name.startswith("meter.")) == sorted(HEAD_KEYS[head])
    loaded = load_model(tmp_path).source
    assert type(loaded) is head and not loaded.training
    assert stored.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.state_dict().items())
    inputs = meter_inputs(2, images=HEADS[head][1])
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-5, rtol=1e-5)


def test_the_names_of_the_released_layout() -> None:
    assert load_model(ORACLE).source.state_dict().keys() == load_file(ORACLE / "model.safetensors").keys()


@pytest.mark.parametrize("form", ["pytorch_model.bin", "checkpoint", "state dict", "safetensors"])
def test_every_kind_of_file(form: str, tmp_path: Path) -> None:
    weights = load_file(ORACLE / "model.safetensors")
    config = json.loads((ORACLE / "config.json").read_text())
    path, options = tmp_path / "weights.pt", {}
    if form == "pytorch_model.bin":
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.save(weights, tmp_path / form)
        path = tmp_path
    elif form == "checkpoint":
        torch.save({"config": config, "state_dict": weights}, path)
    else:
        (torch.save if form == "state dict" else save_file)(weights, path)
        options["config"] = ORACLE
    loaded = load_model(path, **options).source
    assert isinstance(loaded, MeterForQuestionAnswering)
    assert np.abs(logits(loaded, oracle_inputs(False)).numpy() - EXPECTED["unreduced.unpadded"]).max() <= 1e-6


def test_what_released_folders_have_besides(tmp_path: Path) -> None:
    """Settings of the published code, buffers of old transformers, a pooler and CLIP's last block."""
    weights = load_file(ORACLE / "model.safetensors")
    text, blocks = "meter.text_transformer", "meter.vit_model.transformer.resblocks"
    weights[f"{text}.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    weights[f"{text}.embeddings.token_type_ids"] = torch.zeros(1, 64, dtype=torch.int64)
    weights[f"{text}.pooler.dense.weight"] = torch.zeros(32, 32)
    weights |= {n.replace(f"{blocks}.2.", f"{blocks}.3."): t.clone() for n, t in weights.items() if f"{blocks}.2." in n}
    settings = {"tokenizer": "roberta-base", "max_text_len": 40, "num_layers": 12, "torch_dtype": "float32"}
    reduction = {"reduce_layers": [0, 2, 4, 6], "merge_r": 0.2, "prune_r": 0.2, "merge_text": 0.2, "keep_ratio": 1}
    folder = rewritten(ORACLE, tmp_path / "m", weights, **settings, **reduction, itm_loss=1, token_types=2)
    found = logits(load_model(folder).source, oracle_inputs(False))
    assert np.abs(found.numpy() - EXPECTED["unreduced.unpadded"]).max() <= 1e-6
    weights[f"{blocks}.4.ln_1.weight"] = torch.ones(32)
    refused(rf"unexpected {blocks}.4.ln_1.weight", rewritten(ORACLE, tmp_path / "m", weights))


@pytest.mark.parametrize(
    "name", ["vqa_classifier.3.bias", "meter.cross_modal_image_layers.3.output.dense.weight", TABLE]
)
def test_weights_that_do_not_match_are_named(name: str, tmp_path: Path) -> None:
    weights = load_file(ORACLE / "model.safetensors")
    tensor = weights.pop(name)
    refused(f"lack {name}, so", rewritten(ORACLE, tmp_path / "m", weights))
    more = {**weights, name: tensor, f"{name}x": tensor.clone()}
    refused(f"unexpected {name}x, so", rewritten(ORACLE, tmp_path / "m", more))
    wrong = tensor.new_zeros(8, *tensor.shape[1:])
    refused(rf"weight {name} .* shape \[8", rewritten(ORACLE, tmp_path / "m", {**weights, name: wrong}))


def test_the_wrong_class_is_an_error(tmp_path: Path) -> None:
    refused(
        "lack nlvr2_classifier",
        rewritten(ORACLE, tmp_path / "m", architectures=["MeterForVisualReasoning"], token_types=3),
    )
    text = refused("MeterForPreTraining", rewritten(ORACLE, tmp_path / "m", architectures=["MeterForPreTraining"]))
    assert text.startswith(
        f"The architecture MeterForPreTraining of {tmp_path / 'm'} is no model class of transformers "
    )
    assert " or of pumer_compile.frontends. " in text


def test_a_config_that_cannot_be_is_explained_as_such(tmp_path: Path) -> None:
    folder = rewritten(ORACLE, tmp_path / "m", num_heads=5)
    refused("hidden_size 32, which is no multiple of its num_heads 5", folder, UsageError)
    torch.save(load_file(ORACLE / "model.safetensors"), tmp_path / "weights.pt")
    refused("no multiple of its num_heads 5", tmp_path / "weights.pt", UsageError, config=folder)


# --- transformers ---------------------------------------------------------------------------------------------------


def test_auto_classes(tmp_path: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(ORACLE), MeterConfig)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(ORACLE)
    assert isinstance(model, MeterForQuestionAnswering)
    base = AutoModel.from_pretrained(ORACLE)
    assert isinstance(base, MeterModel)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.meter.parameters(), strict=True))
    base.save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path).source, MeterModel)


def test_a_reload_keeps_what_is_registered() -> None:
    importlib.reload(meter)
    assert isinstance(AutoConfig.from_pretrained(ORACLE), meter.MeterConfig)
    assert meter.MODELS == MODELS


def test_new_weights_follow_the_published_scales() -> None:
    model = MeterForQuestionAnswering(MeterConfig(hidden_size=96, vit_width=100, vit_heads=2, initializer_range=0.05))
    vision = model.meter.vit_model
    for tensor in (vision.positional_embedding, vision.class_embedding):
        assert tensor.std().item() == pytest.approx(0.1, rel=0.3)
    for tensor in (vision.transformer["resblocks"][0].attn.in_proj_weight, model.vqa_classifier[0].weight):
        assert tensor.std().item() == pytest.approx(0.05, rel=0.1)
    assert not vision.transformer["resblocks"][0].attn.in_proj_bias.any()


@each_head
def test_random_inputs_from_the_config(head: type[PreTrainedModel]) -> None:
    model, images = headed(head), HEADS[head][1]
    inputs = make_inputs(model, batch=2)
    assert inputs["input_ids"].shape == (2, 40)
    assert inputs["pixel_values"].shape == (2, *([2] if images == 2 else []), 3, 48, 48)
    assert logits(model, inputs).shape == HEADS[head][2]
    with pytest.raises(UsageError, match="from 0 to 59"):
        capture(model, {**inputs, "input_ids": inputs["input_ids"] + 60})


# --- positions of another image size --------------------------------------------------------------------------------


def cubic(grid: np.ndarray, size: int) -> np.ndarray:
    """Rows of `grid` resampled to `size` by Keys' cubic convolution (a = -0.75), borders repeated."""
    rows = []
    for i in range(size):
        centre = (i + 0.5) * len(grid) / size - 0.5
        row = np.zeros_like(grid[0])
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            row = row + (near if d <= 1 else far) * grid[min(max(j, 0), len(grid) - 1)]
        rows.append(row)
    return np.stack(rows)


def resized_by_hand(table: Tensor, size: int) -> Tensor:
    grid = table[1:].double().numpy().reshape(math.isqrt(len(table)), -1, table.shape[1])
    resized = cubic(cubic(grid, size).transpose(1, 0, 2), size).transpose(1, 0, 2)
    return torch.from_numpy(np.concatenate([table[:1].double().numpy(), resized.reshape(size * size, -1)])).float()


@pytest.mark.parametrize("image_size", [64, 96, 192], ids=["smaller", "uneven", "larger"])
@pytest.mark.parametrize("way", ["folder", "state dict", "from_pretrained", "AutoModel"])
def test_positions_follow_the_image_size(way: str, image_size: int, tmp_path: Path) -> None:
    before = load_file(ORACLE / "model.safetensors")[TABLE]
    if way == "folder":
        model = load_model(rewritten(ORACLE, tmp_path / "m", image_size=image_size)).source
    elif way == "state dict":
        config = rewritten(ORACLE, tmp_path / "m", image_size=image_size)
        model = load_model(ORACLE / "model.safetensors", config=config).source
    elif way == "from_pretrained":
        model = MeterForQuestionAnswering.from_pretrained(ORACLE, image_size=image_size)
    else:
        model = AutoModel.from_pretrained(ORACLE, image_size=image_size)
    table = dict(model.named_parameters())[TABLE if way != "AutoModel" else TABLE.removeprefix("meter.")]
    expected = resized_by_hand(before, image_size // 16)
    torch.testing.assert_close(table.detach(), expected, atol=1e-5, rtol=1e-5)
    if way == "folder":
        pixels = torch.randn(3, 3, image_size, image_size)
        assert logits(model, {**oracle_inputs(True), "pixel_values": pixels}).isfinite().all()
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[TABLE], table)


def test_positions_of_the_same_size_are_kept_to_the_bit() -> None:
    before = load_file(ORACLE / "model.safetensors")[TABLE]
    assert torch.equal(dict(load_model(ORACLE).source.named_parameters())[TABLE], before)


def test_positions_in_half_precision_are_computed_in_float32() -> None:
    table = torch.randn(17, 6, generator=torch.Generator().manual_seed(0)).half()
    found = resize_positions(table, 26)
    assert found.dtype == torch.float16
    assert torch.equal(found, resized_by_hand(table, 5).half())


def test_a_table_that_is_no_grid_is_an_error(tmp_path: Path) -> None:
    weights = load_file(ORACLE / "model.safetensors")
    weights[TABLE] = weights[TABLE][:60].clone()
    refused(rf"{TABLE} .* \[60, 32\], but the config asks for \[65, 32\]", rewritten(ORACLE, tmp_path / "m", weights))


# --- refusals -------------------------------------------------------------------------------------------------------

BAD_INPUTS: dict[str, tuple[type[PreTrainedModel], dict[str, tuple[int, ...]], str]] = {
    "a long text": (MeterForQuestionAnswering, {"text": (2, 47)}, "47 tokens, .* room for 46"),
    "large images": (
        MeterForQuestionAnswering,
        {"pixels": (2, 3, 64, 64)},
        r"\[B, C, 48, 48\].* found \[2, 3, 64, 64\]",
    ),
    "wide images": (MeterForVisualEntailment, {"pixels": (2, 3, 48, 64)}, r"found \[2, 3, 48, 64\]"),
    "two images": (MeterForQuestionAnswering, {"pixels": (2, 2, 3, 48, 48)}, r"found \[2, 2, 3, 48, 48\]"),
    "one image of two": (MeterForVisualReasoning, {"pixels": (2, 3, 48, 48)}, r"\[B, 2, C, H, W\].*\[2, 3, 48, 48\]"),
    "three images": (MeterForVisualReasoning, {"pixels": (2, 3, 3, 48, 48)}, r"\[B, 2, C, H, W\].*\[2, 3, 3, 48, 48\]"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit(case: str) -> None:
    head, shapes, message = BAD_INPUTS[case]
    model = headed(head)
    text, pixels = shapes.get("text", (2, 7)), shapes.get("pixels", (2, 3, 48, 48))
    inputs = {"input_ids": torch.full(text, 5), "pixel_values": torch.zeros(pixels)}
    for run in (lambda: model(**inputs), lambda: capture(model, inputs)):
        with pytest.raises(UsageError, match=message) as error:
            run()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_the_longest_text_fits() -> None:
    model = tiny_meter()
    assert logits(model, {**meter_inputs(2, length=46)}).isfinite().all()


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 7}, "hidden_size 768, .* num_heads 7"),
    "vision heads": ({"vit_heads": 7}, "vit_width 768, .* vit_heads 7"),
    "patches": ({"image_size": 100}, "image_size 100, .* vit_patch_size 16"),
    "token types": ({"num_images": 2}, "token_types 2, but a text and 2 .* need 3"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_sizes_that_do_not_fit_together(case: str) -> None:
    settings, message = BAD_CONFIGS[case]
    with pytest.raises(UsageError, match=message):
        MeterConfig(**settings)


def test_values_of_the_wrong_type() -> None:
    for settings in ({"image_attends_to": "both"}, {"num_top_layer": "six"}):
        with pytest.raises(Exception, match=next(iter(settings))):
            MeterConfig(**settings)


def test_two_images_need_three_token_types() -> None:
    with pytest.raises(UsageError, match="num_images 1 and token_types 2"):
        MeterForVisualReasoning(MeterConfig())
    assert MeterConfig(token_types=3).num_images == 2
    assert MeterConfig(token_types=3, num_images=1).num_images == 1
    assert MeterConfig(token_types=1, num_images=0).num_images == 0
