"""FastV by hand: a language model's layers run one by one, and the whole layer over every token before any goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class ByHand:
    """What comes out.

    Attributes:
        logits: `[batch, left, vocabulary]`.
        kept: image tokens that stay, ascending, `[batch, budget]`.
        places: of everything that stays in the whole prompt, `[batch, left]`.
        cache: keys and values of every layer, as they were attended to.
    """

    logits: Tensor
    kept: Tensor
    places: Tensor
    cache: list[tuple[Tensor, Tensor]]


def places_left(kept: Tensor, start: int, image: int, length: int) -> Tensor:
    """Places in the prompt of what stays: the words, and the kept tokens among them."""
    whole = torch.arange(length).expand(kept.shape[0], -1)
    return torch.cat([whole[:, :start], kept + start, whole[:, start + image :]], 1)


def rows_of(value: Tensor, places: Tensor) -> Tensor:
    """Other rows of every sample: `value[b, places[b]]`."""
    return torch.stack([one[index] for one, index in zip(value, places, strict=True)])


def by_hand(model: Any, inputs: dict[str, Tensor], layer: int, budget: int, *, compact: bool = False) -> ByHand:
    """The prefill of LLaVA or PaliGemma whose language layers from `layer` on see `budget` image tokens.

    Mask, angles and embeddings are transformers' own for the whole prompt; the model has eager attention meanwhile.
    `compact` counts positions anew, as FastV does not.
    """
    return by_hand_after(model, lambda: model(**inputs), inputs["input_ids"], layer, budget, compact=compact)


def by_hand_after(
    model: Any, run: Callable[[], Any], ids: Tensor, layer: int, budget: int, *, compact: bool = False
) -> ByHand:
    """The same of the prompt that its language model sees in `run`, whose ids are `ids`."""
    decoder = model.model.language_model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return _layers(model, decoder, ids, _first_inputs(decoder, run), layer, budget, compact)
    finally:
        model.set_attn_implementation(before)


def _first_inputs(decoder: Any, run: Callable[[], Any]) -> tuple[Tensor, Tensor, Tensor]:
    seen: dict[str, Any] = {}

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0])

    handle = decoder.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen["hidden"], seen["attention_mask"], seen["position_ids"].expand(len(seen["hidden"]), -1)


def _layers(
    model: Any, decoder: Any, ids: Tensor, first: tuple[Tensor, Tensor, Tensor], layer: int, budget: int, compact: bool
) -> ByHand:
    hidden, mask, positions = first
    image = (ids[0] == model.config.image_token_id).nonzero().flatten()
    start, stop, length = int(image[0]), int(image[-1]) + 1, ids.shape[1]
    mask = mask.expand(len(ids), -1, -1, -1)
    cache, kept = [], torch.empty(0)
    places = torch.arange(length).expand(len(ids), -1)
    for index, block in enumerate(decoder.layers):
        angles = decoder.rotary_emb(hidden, position_ids=positions)
        normed = block.input_layernorm(hidden)
        attention = block.self_attn
        recorder = _Recorder()
        update, weights = attention(
            hidden_states=normed, position_embeddings=angles, attention_mask=mask, past_key_values=recorder
        )
        cache.append(recorder.pair)
        hidden = hidden + update
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        if index == layer - 1:
            votes = weights.mean(1)[:, -1, start:stop]
            kept = votes.topk(budget).indices.sort(-1).values
            places = places_left(kept, start, stop - start, length)
            hidden = rows_of(hidden, places)
            positions = positions[:, : places.shape[1]] if compact else rows_of(positions, places)
            mask = torch.stack([m[:, p][:, :, p] for m, p in zip(mask, places, strict=True)])
    return ByHand(model.lm_head(decoder.norm(hidden)), kept, places, cache)


class _Recorder:
    """A cache of one layer that remembers what it was given."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.pair = (keys, values)
        return keys, values
