"""Images that a language model reads by cross-attention (Mllama), against its own layers given fewer image tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import PlanError
from tests.support.visual import select

LAYERS, READING, BUDGET, WORDS = 5, (1, 3), 4, 10


@functools.cache
def mllama() -> Any:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "max_num_tiles": 2,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2]],
    }
    text = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": list(READING),
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=99)
    model = hf.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # The gates of cross-attention begin at 0.
            parameter.normal_(std=0.3) if parameter.dim() > 1 or parameter.numel() == 1 else None
    return model.eval()


def make(seed: int, batch: int = 2, *, one_tile: bool = False) -> dict[str, Tensor]:
    """Prompts of one image in two tiles; the first words of the first prompt do not see the second tile. With
    `one_tile` the second tile of the first prompt is padding, and no word sees it."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.ones(batch, WORDS, 1, 2, dtype=torch.int64)
    seen[0, :6, 0, 1] = 0
    ids = torch.randint(1, 98, (batch, WORDS), generator=generator)
    tiles = torch.ones(batch, 1, 2, dtype=torch.int64)
    if one_tile:
        seen[0, :, 0, 1] = tiles[0, 0, 1] = 0
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 1, 2, 3, 32, 32, generator=generator),
        "aspect_ratio_ids": torch.full((batch, 1), 2),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }


def _only(places: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What layers are given, with these tokens of every prompt's image alone."""
    states, mask = kwargs["cross_attention_states"], kwargs["cross_attention_mask"]
    rows = states.reshape(len(places), -1, states.shape[-1])
    states = torch.stack([one[index] for one, index in zip(rows, places, strict=True)])
    mask = torch.stack([one[..., index] for one, index in zip(mask, places, strict=True)])
    return {**kwargs, "cross_attention_states": states, "cross_attention_mask": mask}


def by_vispruner(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits where all layers have the `BUDGET` image tokens that VisPruner keeps, and which."""
    model, seen = mllama(), {}
    tiles, batch = inputs["aspect_ratio_mask"][:, 0], len(inputs["input_ids"])
    patches = 16 + 1  # with a class token; the model pads a tile to 24

    def votes(module: Any, args: Any, result: Any) -> None:
        weights = result[1].mean(1).unflatten(1, (2, 24)).unflatten(3, (2, 24))  # [batch, tile, token, tile, token]
        voters = [weights[b, tiles[b] > 0, :patches].flatten(0, 1) for b in range(batch)]
        given = torch.stack([v.mean(0) for v in voters])[..., :patches]
        seen["votes"] = (given * tiles[:, :, None]).flatten(1)

    def fewer(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = kwargs["cross_attention_states"].reshape(batch, 2 * patches, -1)
        seen["kept"] = select(rows, seen["votes"], BUDGET, 0.5)
        return args, _only(seen["kept"], kwargs)

    last = model.model.vision_model.global_transformer.layers[-1].self_attn
    handles = [
        last.register_forward_hook(votes),
        model.model.language_model.register_forward_pre_hook(fewer, with_kwargs=True),
    ]
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs).logits, seen["kept"]
    finally:
        model.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()


def by_hand(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits where the second reading layer has `BUDGET` image tokens alone, and which."""
    model, seen = mllama(), {}
    layers = model.model.language_model.layers

    def votes(module: Any, args: Any, result: Any) -> None:
        seen["kept"] = result[1].mean(1)[:, -1].topk(BUDGET).indices.sort(-1).values

    def fewer(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, _only(seen["kept"], kwargs)

    handles = [
        layers[READING[0]].cross_attn.register_forward_hook(votes),
        layers[READING[1]].register_forward_pre_hook(fewer, with_kwargs=True),
    ]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs).logits, seen["kept"]
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


@functools.cache
def program() -> pumer.Program:
    return pumer.capture(mllama(), make(0), outputs=["logits"])


@functools.cache
def reduced() -> pumer.Reduced:
    return pumer.reduce(program(), Schedule(method="fastv", layer=1, budget=BUDGET))


def test_vispruner_with_padding_that_only_padding_does_not_see() -> None:
    """Its tower hides padding from padding alone, and lets every other token see it."""
    found = pumer.reduce(program(), Schedule(method="vispruner", budget=BUDGET, positions="original"))
    kept = []
    for inputs in (make(0), make(1), make(0, one_tile=True)):
        wanted, own = by_vispruner(inputs)
        with torch.no_grad():
            logits = found.module(**inputs)["logits"]
        torch.testing.assert_close(logits, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        kept.append(own)
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])
    assert found.plan.tokens()["cross_modal.0"] == {"text": WORDS, "prompt_image": BUDGET}


def test_later_layers_read_the_tokens_that_the_last_word_looks_at() -> None:
    kept = []
    for seed in (0, 1):
        wanted, own = by_hand(make(seed))
        with torch.no_grad():
            found = reduced().module(**make(seed))["logits"]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        assert (wanted - mllama()(**make(seed)).logits).abs().max() > 1e-3
        kept.append(own)
    assert not torch.equal(*kept)
    tokens = reduced().plan.tokens()
    assert tokens["cross_modal.1"] == {"text": WORDS, "prompt_image": BUDGET}
    assert tokens["cross_modal.0"]["prompt_image"] == BUDGET  # behind it
    assert reduced().plan.multiply_adds_after < reduced().plan.multiply_adds_before


def test_onnx(tmp_path: Path) -> None:
    pumer.export(reduced(), tmp_path / "model.onnx")
    engine = pumer.Engine(tmp_path / "model.onnx")
    wanted, _ = by_hand(make(1))
    torch.testing.assert_close(engine(**make(1))["logits"], wanted, atol=1e-4, rtol=0.0)


def test_a_budget_beyond_the_image() -> None:
    with pytest.raises(PlanError, match=r"more than the .* tokens of prompt_image"):
        pumer.reduce(reduced().program, Schedule(method="fastv", layer=1, budget=1000))
