"""VisionZip by hand, with sorts and lists, one image at a time; and what towers give it, read by hooks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.support.prompt_families import decoder_of
from tests.support.prompt_oracle import Sight, kept_places, logits, look
from tests.support.visual import visual_cues


@dataclass
class Zipped:
    """What becomes of one crop, with places in it.

    Attributes:
        dominant: that stay.
        targets: that others are merged into.
        into: of every other one the target.
    """

    dominant: list[int]
    targets: list[int]
    into: dict[int, int]

    def merged(self, features: Tensor, target: int, order: str) -> Tensor:
        """The token that a target becomes."""
        joined = [features[i] for i, t in self.into.items() if t == target]
        if order == "reference":
            return features[target] + (torch.stack(joined).mean(0) if joined else 0)
        return torch.stack([features[target], *joined]).mean(0)


def zipped(votes: Tensor, keys: Tensor, dominant: int, contextual: int, order: str) -> Zipped:
    """One crop; `dominant` without a class token."""
    count = len(votes)
    kept = sorted(votes.argsort(descending=True, stable=True)[:dominant].tolist())
    rest = [i for i in range(count) if i not in kept]
    contextual = min(contextual, len(rest))
    if order == "reference":
        step = max(1, len(rest) // contextual) if contextual else 1
        targets = rest[::step][:contextual]
    else:
        targets = []
        for i in range(contextual):
            behind = [t for t in rest if t >= i * count // contextual and (not targets or t > targets[-1])]
            needed = contextual - i
            latest = rest[len(rest) - needed]
            targets.append(min(behind[0], latest) if behind else latest)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    into = {}
    for i in rest:
        if i not in targets:
            into[i] = targets[int((unit[targets] @ unit[i]).argmax())]
    return Zipped(kept, targets, into)


# --- a CLIP tower -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noted_keys(module: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """The keys `[batch, heads, tokens, head size]` of every attention that runs in the block by the function
    `eager_attention_forward` beside the module's class."""
    beside = sys.modules[type(module).__module__]
    eager, found = beside.eager_attention_forward, {}

    def noting(own: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.setdefault(own, []).append(key.detach())
        return eager(own, query, key, *args, **kwargs)

    with mock.patch.object(beside, "eager_attention_forward", noting):
        yield found


@dataclass
class Cues:
    """What a tower gives: features `[images, tokens, width]`, the class token's `[images, 1, width]`, its attention
    `[images, tokens]`, and keys `[images, tokens, head size]`."""

    features: Tensor
    class_feature: Tensor
    votes: Tensor
    keys: Tensor


def cues(model: Any, pixels: Tensor) -> Cues:
    """Of a CLIP tower whose second last layer is used."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        with torch.no_grad(), noted_keys(tower) as noted:
            found = tower(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(before)
    states, attention, keys = found.hidden_states[-2], found.attentions[-2].mean(1), [*noted.values()][-2][0].mean(1)
    return Cues(states[:, 1:], states[:, :1], attention[:, 0, 1:], keys[:, 1:])


def tokens_of(own: Cues, row: int, dominant: int, contextual: int, order: str) -> tuple[Tensor, list[int]]:
    """The tokens of one image in their order, class token first, `[after, width]`, and where each stands in it."""
    found = zipped(own.votes[row], own.keys[row], dominant - 1, contextual, order)
    features = own.features[row]
    made = {i: features[i] for i in found.dominant} | {t: found.merged(features, t, order) for t in found.targets}
    places = [*found.dominant, *found.targets] if order == "reference" else sorted(made)
    return torch.cat([own.class_feature[row], *(made[i].unsqueeze(0) for i in places)]), [0, *places]


def crops_by_hand(
    model: Any, pixels: Tensor, order: list[int], crop_tokens: int, dominant: int, contextual: int, semantics: str
) -> Tensor:
    """The tokens of one image of several crops, before the projector, `[after, width]`.

    Args:
        order: of each place of the image in the prompt its token, `crop * crop_tokens + token`, without newlines.
        dominant: with the class token, where the tower has one.
    """
    clip = model.config.vision_config.model_type == "clip_vision_model"
    tower = model.model.vision_tower
    with torch.no_grad(), noted_keys(tower) as noted:
        features, votes = visual_cues(model, pixels)
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2] if clip else None
    layer = (model.config.vision_feature_layer if clip else -1) + len(noted)
    keys = [*noted.values()][layer][0].mean(1)[:, int(clip) :]
    made: list[tuple[tuple[float, ...], Tensor]] = []
    for number, crop in enumerate(dict.fromkeys(i // crop_tokens for i in order)):
        shown = sorted(i % crop_tokens for i in order if i // crop_tokens == crop)
        own = features[crop, shown]
        found = zipped(votes[crop, shown], keys[crop, shown], dominant - clip, contextual, semantics)
        places = [order.index(crop * crop_tokens + i) for i in shown]
        tokens = [(0, i, own[i]) for i in found.dominant]
        tokens += [(1, t, found.merged(own, t, semantics)) for t in found.targets]
        if semantics == "reference":
            made += [((number, 1 + late, places[i]), token) for late, i, token in tokens]
        else:
            made += [((places[i],), token) for _, i, token in tokens]
        if states is not None:
            made.append(((number, 0, 0) if semantics == "reference" else (min(places) - 0.5,), states[crop, 0]))
    return torch.stack([token for _, token in sorted(made, key=lambda pair: pair[0])])


# --- rows of any family -----------------------------------------------------------------------------------------------


def keys_of_rows(
    model: nn.Module, inputs: dict[str, Tensor], placeholders: dict[int, str]
) -> tuple[Sight, list[Tensor]]:
    """What a model sees, and of every row the mean of its members' keys."""
    first = look(model, inputs, placeholders)
    deciding = first.deciding[0][0]
    assert deciding is not None
    with noted_keys(deciding) as noted:
        sight = look(model, inputs, placeholders)
    calls = [call.mean(1) for call in noted[deciding]]
    return sight, [torch.stack([calls[c][b, t] for c, b, t in own]).mean(0) for own in sight.members]


def zipped_logits(
    model: nn.Module, inputs: dict[str, Tensor], dominant: int, contextual: int, placeholders: dict[int, str]
) -> tuple[Tensor, Tensor]:
    """Logits of a model that sees the rows of `stable` where they stood, and the places in the prompts that it sees."""
    sight, keys = keys_of_rows(model, inputs, placeholders)
    kept, instead, joined = [], {}, {}
    for group in sight.groups:
        rows = torch.stack([sight.rows[i] for i in group])
        own = torch.stack([keys[i] for i in group])
        found = zipped(sight.votes[group], own, dominant, contextual, "stable")
        kept += [group[i] for i in (*found.dominant, *found.targets)]
        instead.update({sight.places[group[t]]: found.merged(rows, t, "stable") for t in found.targets})
        for target in found.targets:
            merged = [target, *(i for i, t in found.into.items() if t == target)]
            joined[group[target]] = [group[i] for i in merged]

    def replace(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = kwargs["inputs_embeds"].clone()
        for (prompt, place), row in instead.items():
            embeds[prompt, place] = row
        # What is added in later layers.
        deeper = [value.clone() for value in kwargs.get("deepstack_visual_embeds") or ()]
        for value in deeper:
            value[[*joined]] = torch.stack([value[rows].mean(0) for rows in joined.values()])
        more = {"deepstack_visual_embeds": deeper} if deeper else {}
        return args, {**kwargs, "inputs_embeds": embeds, **more}

    places = kept_places(sight, inputs, kept)
    handle = decoder_of(model).register_forward_pre_hook(replace, with_kwargs=True)
    try:
        return logits(model, inputs, places, sorted(kept), len(sight.places)), places
    finally:
        handle.remove()
