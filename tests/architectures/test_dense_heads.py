"""Heads that go by the place of a patch (boxes, masks, videos), and towers that were not reduced beside them: merged
tokens are brought back to their old places where these count.

The reference runs the models' own modules, with the layers of the vision tower by hand; past the last one it copies
each token to every place whose own went into it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlignConfig,
    AlignModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    GroupViTConfig,
    GroupViTModel,
    Owlv2Config,
    Owlv2ForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    PreTrainedModel,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    XCLIPConfig,
    XCLIPModel,
)

from pumer_compile import Program, Reduced, Schedule, export, reduce
from tests.architectures.builders import PATCHED_IMAGE, TEXT, VISION, Build, Inputs, randomised, words
from tests.architectures.merging import METHODS, Merged, attended
from tests.architectures.suite import Forward, built, captured, cast, difference, forwards, run
from tests.support.commands import tensorrt_refuses

PATCHES, LAYERS, FRAMES = 36, 3, 3
OWN_TEXT = {**TEXT, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
OWN_VISION = {**VISION, "num_hidden_layers": LAYERS}
MERGED, WORDS_MERGED = {0: 6, 1: 9}, {0: 2, 1: 1}


# --- models ---------------------------------------------------------------------------------------------------------


def owlvit() -> PreTrainedModel:
    config = OwlViTConfig(text_config=OWN_TEXT, vision_config=OWN_VISION, projection_dim=TEXT["hidden_size"])
    return randomised(OwlViTForObjectDetection(config))


def owlv2() -> PreTrainedModel:
    config = Owlv2Config(text_config=OWN_TEXT, vision_config=OWN_VISION, projection_dim=TEXT["hidden_size"])
    return randomised(Owlv2ForObjectDetection(config))


def clipseg() -> PreTrainedModel:
    config = CLIPSegConfig(
        text_config=OWN_TEXT,
        vision_config=OWN_VISION,
        projection_dim=16,
        extract_layers=[0, 1, 2],
        reduce_dim=20,
        decoder_num_attention_heads=5,
        decoder_intermediate_size=28,
    )
    return randomised(CLIPSegForImageSegmentation(config))


def xclip() -> PreTrainedModel:
    inner = {
        "mit_hidden_size": 16,
        "mit_intermediate_size": 20,
        "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2,
    }
    config = XCLIPConfig(
        text_config=OWN_TEXT,
        vision_config={**OWN_VISION, **inner, "num_frames": FRAMES},
        projection_dim=16,
        prompt_layers=1,
        prompt_num_attention_heads=2,
    )
    return randomised(XCLIPModel(config))


GROUPS = 5


def groupvit() -> PreTrainedModel:
    """Patches and group tokens for two layers, then groups of patches, each by the group that it is most like."""
    stages = {"depths": [LAYERS, 1, 1], "num_group_tokens": [GROUPS, 3, 0], "num_output_groups": [GROUPS, 3, 3]}
    vision = {**OWN_VISION, **stages}
    config = GroupViTConfig(
        text_config=OWN_TEXT, vision_config=vision, projection_dim=16, projection_intermediate_dim=20
    )
    return randomised(GroupViTModel(config))


def align() -> PreTrainedModel:
    """A convolutional tower, whose positions are no tokens, beside a text that may be reduced."""
    convolutions = {
        "image_size": PATCHED_IMAGE,
        "kernel_sizes": [3, 3],
        "in_channels": [32, 16],
        "out_channels": [16, 32],
        "strides": [1, 2],
        "num_block_repeats": [1, 1],
        "expand_ratios": [1, 2],
        "depthwise_padding": [],
        "hidden_dim": 32,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    }
    text = {**TEXT, "num_hidden_layers": LAYERS, "pad_token_id": 1}
    return randomised(AlignModel(AlignConfig(text_config=text, vision_config=convolutions, projection_dim=32)))


def trocr() -> PreTrainedModel:
    """Its decoder folds heads into the batch."""
    decoder = TrOCRConfig(
        vocab_size=TEXT["vocab_size"],
        d_model=TEXT["hidden_size"],
        decoder_layers=2,
        decoder_attention_heads=3,
        decoder_ffn_dim=28,
        cross_attention_hidden_size=OWN_VISION["hidden_size"],
        max_position_embeddings=32,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**OWN_VISION), decoder)
    return randomised(VisionEncoderDecoderModel(config))


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, 3, PATCHED_IMAGE, PATCHED_IMAGE, generator=torch.Generator().manual_seed(100 + seed))


def two_queries(seed: int = 0) -> Inputs:
    """Two images and two queries for each."""
    return {**words(4, seed=seed), "pixel_values": images(seed, 2)}


def one_query(seed: int = 0) -> Inputs:
    return {**words(2, seed=seed), "pixel_values": images(seed, 2)}


def videos(seed: int = 0) -> Inputs:
    return {**words(2, seed=seed), "pixel_values": images(seed, 2, FRAMES)}


def lines(seed: int = 0) -> Inputs:
    return {"pixel_values": images(seed, 2), "decoder_input_ids": words(2, seed=seed)["input_ids"]}


# --- by hand --------------------------------------------------------------------------------------------------------


def tower(layers: nn.ModuleList, merged: Merged, last: bool = True) -> dict[nn.Module, Forward]:
    """The layers of a tower; behind the last one every place has its token again, where `last`."""

    def layer_forward(layer: Any, index: int) -> Forward:
        def run(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            context, keys = attended(layer.self_attn, layer.layer_norm1(hidden), merged.bias())
            carrier = hidden + context
            if index in MERGED:
                carrier = merged.shrink(carrier, keys, MERGED[index])
            found = carrier + layer.mlp(layer.layer_norm2(carrier))
            return merged.spread(found) if last and index == LAYERS - 1 else found

        return run

    return {layer: layer_forward(layer, i) for i, layer in enumerate(layers)}


def of_owl(model: Any, merged: Merged) -> dict[nn.Module, Forward]:
    return tower(getattr(model, model.base_model_prefix).vision_model.encoder.layers, merged)


def of_clipseg(model: Any, merged: Merged) -> dict[nn.Module, Forward]:
    """The decoder reads the tower before and after each merge, and makes a grid behind its own attention."""
    decoder = model.decoder

    def decoded(states: Any, conditions: Tensor, **_: Any) -> Any:
        output = torch.zeros(())
        for index, (state, reduce_, layer) in enumerate(
            zip(states[::-1], decoder.reduces, decoder.layers, strict=True)
        ):
            output = output + merged.bring(reduce_(state))
            if index == decoder.conditional_layer:
                scale, shift = decoder.film_mul(conditions), decoder.film_add(conditions)
                output = scale.unsqueeze(1) * output + shift.unsqueeze(1)
            context, _keys = attended(layer.self_attn, output, merged.bias())
            output = layer.layer_norm1(output + context)
            output = layer.layer_norm2(output + layer.mlp(output))
        grid = merged.spread(output)[:, 1:].transpose(1, 2).unflatten(-1, (6, 6))
        logits = decoder.transposed_convolution(grid).squeeze(1)
        return type("Decoded", (), {"logits": logits, "__getitem__": lambda self, i: logits})()

    return {**tower(model.clip.vision_model.encoder.layers, merged, last=False), decoder: decoded}


def of_xclip(model: Any, merged: Merged) -> dict[nn.Module, Forward]:
    """A token of what other frames say stands behind the tokens of each layer's attention, and no longer."""

    def layer_forward(layer: Any, index: int) -> Forward:
        def run(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            message = layer.message_fc(hidden[:, 0]).unflatten(0, (-1, FRAMES))
            message = message + layer.message_attn(layer.message_ln(message))[0]
            joined = torch.cat([hidden, message.flatten(0, 1).unsqueeze(1)], 1)
            bias = torch.nn.functional.pad(merged.bias(), (0, 1))
            context, keys = attended(layer.self_attn, layer.layer_norm1(joined), bias)
            carrier = (joined + context)[:, :-1]
            if index in MERGED:
                carrier = merged.shrink(carrier, keys[:, :, :-1], MERGED[index])
            found = carrier + layer.mlp(layer.layer_norm2(carrier))
            return merged.spread(found) if index == LAYERS - 1 else found

        return run

    return {layer: layer_forward(layer, i) for i, layer in enumerate(model.vision_model.encoder.layers)}


def of_groupvit(model: Any, merged: Merged) -> dict[nn.Module, Forward]:
    """Group tokens stand behind the patches of the first stage; what reads the patches for each group counts sizes."""
    stage = model.vision_model.encoder.stages[0]
    reader = stage.downsample.pre_assign_attn.attn

    def layer_forward(layer: Any, index: int) -> Forward:
        def run(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            context, keys = attended(
                layer.self_attn, layer.layer_norm1(hidden), nn.functional.pad(merged.bias(), (0, GROUPS))
            )
            carrier = hidden + context
            if index in MERGED:
                patches = merged.shrink(carrier[:, :-GROUPS], keys[:, :, :-GROUPS], MERGED[index])
                carrier = torch.cat([patches, carrier[:, -GROUPS:]], 1)
            return carrier + layer.mlp(layer.layer_norm2(carrier))

        return run

    def read(queries: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, None]:
        return attended(reader, queries, merged.bias(), encoder_hidden_states)[0], None

    return {reader: read, **{layer: layer_forward(layer, i) for i, layer in enumerate(stage.layers)}}


def of_align(model: Any, merged: Merged) -> dict[nn.Module, Forward]:
    """BERT's layers; the pooler reads where the first word went."""

    def layer_forward(layer: Any, index: int) -> Forward:
        def run(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            context, keys = attended(layer.attention.self, hidden, merged.bias())
            carrier = layer.attention.output(context, hidden)
            if index in WORDS_MERGED:
                carrier = merged.shrink(carrier, keys, WORDS_MERGED[index])
            found = layer.output(layer.intermediate(carrier), carrier)
            return merged.spread(found) if index == LAYERS - 1 else found

        return run

    return {layer: layer_forward(layer, i) for i, layer in enumerate(model.text_model.encoder.layer)}


def of_trocr(model: Any, merged: Merged) -> dict[nn.Module, Forward]:
    """The decoder's words read merged patches, by their sizes."""

    def layer_forward(layer: Any, index: int) -> Forward:
        def run(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            context, keys = attended(layer.attention, layer.layernorm_before(hidden), merged.bias())
            carrier = hidden + context
            if index in MERGED:
                carrier = merged.shrink(carrier, keys, MERGED[index])
            return carrier + layer.mlp(layer.layernorm_after(carrier))

        return run

    def read_by(attention: Any) -> Forward:
        def read(hidden_states: Tensor, key_value_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return attended(attention, hidden_states, merged.bias(), key_value_states)[0], None

        return read

    readers = [layer.encoder_attn for layer in model.decoder.model.decoder.layers]
    layers = {layer: layer_forward(layer, i) for i, layer in enumerate(model.encoder.layers)}
    return {**layers, **{attention: read_by(attention) for attention in readers}}


@dataclass(frozen=True)
class Dense:
    """A model by name.

    Attributes:
        stream: what its reduced tokens are called.
        rows: how many images a sample has.
        tokens, learned: of each, and how many class tokens lead them.
        at: the group of its sites.
        counts: merged tokens by layer.
    """

    name: str
    build: Build
    inputs: Any
    outputs: tuple[str, ...]
    replaced: Any
    stream: str = "image"
    rows: int = 1
    tokens: int = PATCHES + 1
    learned: int = 1
    at: str = "vision"

    @property
    def counts(self) -> dict[int, int]:
        return MERGED if self.at == "vision" else WORDS_MERGED


DENSE = (
    Dense("owlvit", owlvit, two_queries, ("logits", "pred_boxes"), of_owl, "image_1"),
    Dense("owlv2", owlv2, two_queries, ("logits", "pred_boxes", "objectness_logits"), of_owl, "image_1"),
    Dense("clipseg", clipseg, one_query, ("logits",), of_clipseg),
    Dense("xclip", xclip, videos, ("logits_per_video",), of_xclip, rows=FRAMES),
    Dense("groupvit", groupvit, one_query, ("logits_per_image",), of_groupvit, tokens=PATCHES, learned=0),
    Dense("align", align, one_query, ("logits_per_image",), of_align, "text", tokens=11, learned=0, at="text"),
    Dense("trocr", trocr, lines, ("logits",), of_trocr),
)
each_model = pytest.mark.parametrize("dense", DENSE, ids=lambda dense: dense.name)
each_method = pytest.mark.parametrize("method", METHODS)


def program(dense: Dense, dtype: torch.dtype = torch.float64) -> Program:
    return captured(dense.build, dense.inputs, dense.outputs, dtype)


@functools.cache
def reduced(dense: Dense, method: str, dtype: torch.dtype = torch.float64) -> Reduced:
    modality = "text" if dense.at == "text" else "image"
    sites = [{"at": f"{dense.at}.{layer}", "merge": {modality: count}} for layer, count in dense.counts.items()]
    return reduce(program(dense, dtype), Schedule(sites=sites, **METHODS[method]))


def by_hand(dense: Dense, method: str, inputs: Inputs, wrong: int | None = None) -> tuple[dict[str, Tensor], Merged]:
    model = built(dense.build, torch.float64)
    sizes = [[1.0] * dense.tokens for _ in range(2 * dense.rows)]
    sizes = inputs["attention_mask"].double().tolist() if dense.at == "text" else sizes
    merged = Merged(method, sizes, dense.learned, wrong)
    with forwards(dense.replaced(model, merged)):
        return run(model, cast(inputs, torch.float64), dense.outputs), merged


# --- tests ----------------------------------------------------------------------------------------------------------


@each_model
@each_method
def test_outputs_are_those_of_the_reference(dense: Dense, method: str) -> None:
    found = reduced(dense, method)
    left = [dense.tokens - sum(list(dense.counts.values())[:n]) for n in range(3)]
    assert [(s.before, s.after) for s in found.plan.sites] == [
        ({dense.stream: before}, {dense.stream: after}) for before, after in itertools.pairwise(left)
    ]
    assert found.plan.ratio > 1
    for seed in range(2):
        inputs = dense.inputs(seed)
        expected, merged = by_hand(dense, method, inputs)
        first, *others = merged.steps[0][0]
        assert all(first != other for other in others)  # every sample merges other tokens
        assert difference(run(found.module, cast(inputs, torch.float64), dense.outputs), expected) <= 1e-5
    unreduced = run(program(dense).module, cast(inputs, torch.float64), dense.outputs)
    wrong, _ = by_hand(dense, method, inputs, wrong=1)
    for other in (unreduced, wrong):
        assert difference(other, expected) > 1e-4


@each_model
def test_onnx(dense: Dense, tmp_path: Path) -> None:
    report = export(reduced(dense, "tome", torch.float32), tmp_path / "model.onnx").report
    assert report is not None and report.passed
    assert tensorrt_refuses(tmp_path / "model.onnx") == []
    judged = [o for o in report.outputs if o.judged]
    assert judged and all(o.required_atol <= 1e-4 for o in judged)
