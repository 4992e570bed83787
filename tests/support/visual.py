"""VisPruner by hand, with sorts and lists, and prompts put together outside of any graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def select(features: Tensor, attention: Tensor, budget: int, important: float) -> Tensor:
    """Kept tokens in raster order, `[batch, budget]`, as the published code chooses them.

    Args:
        features: `[batch, tokens, width]`.
        attention: `[batch, tokens]`.
    """
    kept = []
    for one, votes in zip(features, attention, strict=True):
        unit = one / one.norm(dim=-1, keepdim=True)
        order = votes.argsort(descending=True)
        most = int(budget * important)
        chosen, rest = order[:most], order[most:] if most < budget else order[:0]
        while len(rest) > budget - most:
            drop = min(8, len(rest) - (budget - most))
            even, odd = rest[0::2], rest[1::2]
            alike = (unit[even] @ unit[odd].T).amax(-1)
            rest = torch.cat([even[alike.argsort(descending=True)[drop:]], odd])
        kept.append(torch.cat([chosen, rest]).sort().values)
    return torch.stack(kept)


def visual_cues(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What leaves the tower for the projector, and the attention it gets there, from the tower's own eager outputs."""
    tower, config = model.model.vision_tower, model.config
    layer = getattr(config, "vision_feature_layer", -1)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        found = tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation("sdpa")
    states = found.hidden_states[layer]
    attention = found.attentions[layer].mean(1)
    if config.vision_config.model_type == "clip_vision_model":
        return states[:, 1:], attention[:, 0, 1:]
    # Towers without a class token: all tokens vote. PaliGemma names no layer and takes the normalized output.
    named = hasattr(config, "vision_feature_layer")
    return states if named else found.last_hidden_state, attention.mean(1)


def logits_by_hand(
    model: Any, inputs: dict[str, Tensor], kept: Tensor, features: Tensor, positions: Tensor | None = None, **more: Any
) -> Tensor:
    """Logits of a prompt whose image is the kept tokens alone.

    Args:
        model: LLaVA, or PaliGemma.
        inputs: with the whole image's placeholders.
        kept: `[batch, budget]`.
        features: `[batch, tokens, width]`.
        positions: of what is left, `[batch, length]`; None counts anew.
    """
    ids = inputs["input_ids"]
    (places,) = (ids[0] == model.config.image_token_id).nonzero(as_tuple=True)
    start, stop = int(places[0]), int(places[-1]) + 1
    with torch.no_grad():
        words = model.get_input_embeddings()(ids)
        chosen = torch.stack([one[index] for one, index in zip(features, kept, strict=True)])
        image = model.model.multi_modal_projector(chosen)
        prompt = torch.cat([words[:, :start], image, words[:, stop:]], 1)
        mask = torch.cat([inputs["attention_mask"][:, : start + kept.shape[1]], inputs["attention_mask"][:, stop:]], 1)
        return model(inputs_embeds=prompt, attention_mask=mask, position_ids=positions, **more).logits
