"""Co-attention models written by hand, and the same forward passes with reducers in them, written again.

Every model keeps text and image apart: text layers attend to the image, image layers to the text. The oracles run one
sample at a time with the algorithms of `tests.support.helpers` and share no code with the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.helpers import combine
from tests.support.models import WEIGHTED, Attention, Config, Fusion, Layer, attend, carry, choose

Budgets = tuple[Any, Any, Any]
Sites = Mapping[int, Budgets]
"""Shares or numbers `(prune, image merge, text merge)` by pair (or layer)."""


@dataclass(frozen=True)
class PairConfig(Config):
    """`layers` are pairs. `sees`: the text that an image layer attends to, `updated` by the text layer or the `old` one
    (METER has been published with either)."""

    layers: int = 2
    sees: str = "updated"


class CrossLayer(nn.Module):
    """Self-attention, attention to the other stream, MLP, each with a residual."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.norm = config.norm
        self.own, self.cross = Attention(config), Attention(config)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def residual(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return x + branch(norm(x)) if self.norm == "pre" else norm(x + branch(x))

    def forward(self, x: Tensor, mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Tensor:
        x = self.residual(x, self.norm1, lambda y: self.own(y, mask))
        x = self.residual(x, self.norm2, lambda y: self.cross(y, other_mask, other))
        return self.residual(x, self.norm3, self.mlp)


class CoAttention(Fusion):
    """Pairs of a text layer and an image layer, like METER."""

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        del self.layers
        self.make_layers(config)

    def make_layers(self, config: PairConfig) -> None:
        self.text_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.layers))
        self.image_layers = nn.ModuleList(CrossLayer(config) for _ in range(config.layers))

    def streams(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        x, text = self.embed(input_ids, pixel_values), input_ids.shape[1]
        return x[:, :text], x[:, text:]

    def masks(
        self, image: Tensor, attention_mask: Tensor | None, patch_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of text and image, `[B, 1, 1, N]`."""
        if patch_mask is not None and self.config.cls:
            patch_mask = torch.cat([torch.ones_like(patch_mask[:, :1]), patch_mask], 1)
        return tuple(None if m is None else self.one_mask(m, image.dtype) for m in (attention_mask, patch_mask))

    def one_mask(self, opened: Tensor, dtype: torch.dtype) -> Tensor:
        if self.config.mask == "bool":
            return opened[:, None, None, :] > 0
        return (1.0 - opened[:, None, None, :].to(dtype)) * torch.finfo(dtype).min

    def conclude(self, text: Tensor, image: Tensor) -> Tensor:
        return self.classify(self.last(text[:, 0]) + self.last(image).mean(1))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        text, image = self.streams(input_ids, pixel_values)
        text_mask, image_mask = self.masks(image, attention_mask, patch_mask)
        return self.conclude(*self.fuse(text, text_mask, image, image_mask))

    def fuse(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            new = text_layer(text, text_mask, image, image_mask)
            seen = new if self.config.sees == "updated" else text
            image = image_layer(image, image_mask, seen, text_mask)
            text = new
        return text, image


class ImageFirst(CoAttention):
    """The pairs the other way round: the image layer comes first."""

    def fuse(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            image = image_layer(image, image_mask, text, text_mask)
            text = text_layer(text, text_mask, image, image_mask)
        return text, image


class Decoder(CoAttention):
    """Text layers that attend to the same image features in every layer, like BLIP."""

    def fuse(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        image = image.tanh()
        for layer in self.text_layers:
            text = layer(text, text_mask, image, image_mask)
        return text, image

    def conclude(self, text: Tensor, image: Tensor) -> Tensor:
        return self.classify(self.last(text[:, 0]))


class Bridge(CoAttention):
    """Towers that run on beside the pairs, and links that add what they give, like BridgeTower."""

    def make_layers(self, config: PairConfig) -> None:
        super().make_layers(config)
        self.text_tower = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.image_tower = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.links = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(config.layers))

    def fuse(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        text_beside, image_beside = text, image
        towers = zip(self.text_tower, self.image_tower, self.links, strict=True)
        pairs = zip(self.text_layers, self.image_layers, strict=True)
        for (text_tower, image_tower, link), (text_layer, image_layer) in zip(towers, pairs, strict=True):
            text_beside, image_beside = text_tower(text_beside, text_mask), image_tower(image_beside, image_mask)
            text, image = link(text + text_beside), link(image + image_beside)
            new = text_layer(text, text_mask, image, image_mask)
            image = image_layer(image, image_mask, new, text_mask)
            text = new
        return text, image


class Shared(nn.Module):
    """One attention for both directions, then a self-attention and an MLP for each stream, like LXMERT."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.both = Attention(config)
        self.text_norm, self.image_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.text_own, self.image_own = Layer(config), Layer(config)

    def forward(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        seen = self.text_norm(text + self.both(text, image_mask, image))
        looked = self.image_norm(image + self.both(image, text_mask, text))
        return self.text_own(seen, text_mask), self.image_own(looked, image_mask)


class SharedAttention(CoAttention):
    """A text layer, then layers whose two directions share an attention."""

    def make_layers(self, config: PairConfig) -> None:
        self.first = nn.ModuleList([Layer(config)])
        self.both_layers = nn.ModuleList(Shared(config) for _ in range(config.layers))

    def fuse(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        text = self.first[0](text, text_mask)
        for layer in self.both_layers:
            text, image = layer(text, text_mask, image, image_mask)
        return text, image


class CrossOnly(CoAttention):
    """Text that attends to the image without ever attending to itself."""

    def fuse(
        self, text: Tensor, text_mask: Tensor | None, image: Tensor, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        for layer in self.text_layers:
            text = layer.residual(text, layer.norm2, lambda y, layer=layer: layer.cross(y, image_mask, image))
            text = layer.residual(text, layer.norm3, layer.mlp)
        return text, image


# --- the same models with reducers in them --------------------------------------------------------------------------


@dataclass
class Stream:
    """One sample's tokens of one stream; `sizes` and `shares` as in `models.State`. `history` are the groups of
    each reducer so far, with the weights of their mean; `tokens` were there before them."""

    x: Tensor
    image: bool
    sizes: list[float]
    shares: list[float]
    history: list[tuple[list[list[int]], list[float] | None]] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.tokens or len(self.x)

    def with_x(self, x: Tensor) -> Stream:
        return dataclasses.replace(self, x=x)

    def reduced(self, members: list[list[int]], semantics: str) -> Stream:
        """The stream after a reducer that makes these groups."""
        weights = self.sizes if semantics in WEIGHTED else None
        x = combine(self.x, members, weights).to(self.x.dtype)
        sizes, shares = carry(self.sizes, self.shares, members, self.image, semantics)
        return Stream(x, self.image, sizes, shares, [*self.history, (members, weights)], self.tokens)

    def places(self) -> list[int | None]:
        """Where each of the stream's first tokens is now; None for those that were pruned."""
        now: list[int | None] = list(range(self.tokens))
        for members, _ in self.history:
            place = {old: new for new, group in enumerate(members) for old in group}
            now = [None if old is None else place.get(old) for old in now]
        return now

    def brought(self, x: Tensor) -> Tensor:
        """Features of the stream's first tokens, brought to its tokens of now."""
        for members, weights in self.history:
            x = combine(x, members, weights).to(x.dtype)
        return x


@dataclass
class Pair:
    """One sample on its way through a model with two streams; `counts` are `(text, image)` after each
    text-to-image attention."""

    text: Stream
    image: Stream
    counts: list[tuple[int, int]] = field(default_factory=list)

    def reduce(
        self, attention: np.ndarray, keys: tuple[np.ndarray, np.ndarray], budgets: Budgets, semantics: str, cls: bool
    ) -> tuple[list[list[int]], list[list[int]]]:
        real = tuple([size > 0 for size in s.sizes] for s in (self.text, self.image))
        words, patches = choose(attention, keys, real, budgets, semantics, int(cls))
        self.text, self.image = self.text.reduced(words, semantics), self.image.reduced(patches, semantics)
        return words, patches


class Oracle:
    """Runs a model sample by sample, with reducers at some pairs."""

    def __init__(self, model: CoAttention, sites: Sites, semantics: str) -> None:
        self.model, self.sites, self.semantics, self.config = model, sites, semantics, model.config

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
        """The model's output, and the counts."""
        pairs = [self.run(pair) for pair in self.start(inputs)]
        return torch.cat([self.conclude(pair) for pair in pairs]), pairs[0].counts

    def conclude(self, pair: Pair) -> Tensor:
        return self.model.conclude(pair.text.x.unsqueeze(0), pair.image.x.unsqueeze(0))

    def start(self, inputs: Mapping[str, Tensor]) -> list[Pair]:
        text, image = self.model.streams(inputs["input_ids"], inputs["pixel_values"])
        words, patches = torch.ones(text.shape[:2]), torch.ones(image.shape[:2])
        if "attention_mask" in inputs:
            words = inputs["attention_mask"].float()
        if "patch_mask" in inputs:
            patches[:, int(self.config.cls) :] = inputs["patch_mask"].float()
        return [
            Pair(
                Stream(text[b], False, words[b].tolist(), words[b].tolist()),
                Stream(image[b], True, patches[b].tolist(), patches[b].tolist()),
            )
            for b in range(len(text))
        ]

    def run(self, pair: Pair) -> Pair:
        """All layers."""
        ways = {
            ImageFirst: self.image_first,
            Decoder: self.decoder,
            Bridge: self.bridge,
            SharedAttention: self.shared,
        }
        ways.get(type(self.model), self.co_attention)(pair)
        return pair

    def attend(self, attention: Attention, x: Tensor, memory: Stream) -> tuple[Tensor, np.ndarray, np.ndarray]:
        return attend(attention, x, memory.x, memory.sizes, memory.shares, self.semantics, self.config.mask)

    def residual(self, norm: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        return x + branch(norm(x)) if self.config.norm == "pre" else norm(x + branch(x))

    def tower(self, layer: Layer, stream: Stream, semantics: str) -> tuple[Stream, np.ndarray]:
        """A plain layer of one stream, and the keys of its attention."""
        found: list[np.ndarray] = []

        def own(y: Tensor) -> Tensor:
            output, _, keys = attend(layer.attention, y, y, stream.sizes, stream.shares, semantics, self.config.mask)
            found.append(keys)
            return output

        x = self.residual(layer.norm1, stream.x, own)
        return stream.with_x(self.residual(layer.norm2, x, layer.mlp)), found[0]

    def cross_layer(self, layer: CrossLayer, x: Stream, other: Stream, reduce: Callable[..., Stream] | None) -> Stream:
        """`reduce` takes the stream after the cross-attention, its probabilities, the keys of the self-attention and
        those of the cross-attention."""
        keys: list[np.ndarray] = []
        probabilities: list[np.ndarray] = []

        def own(y: Tensor) -> Tensor:
            output, _, found = self.attend(layer.own, y, x.with_x(y))
            keys.append(found)
            return output

        def cross(y: Tensor) -> Tensor:
            output, seen, found = self.attend(layer.cross, y, other)
            probabilities.append(seen)
            keys.append(found)
            return output

        after = x.with_x(self.residual(layer.norm1, x.x, own))
        after = after.with_x(self.residual(layer.norm2, after.x, cross))
        if reduce is not None:
            after = reduce(after, probabilities[0], keys[0], keys[1])
        return after.with_x(self.residual(layer.norm3, after.x, layer.mlp))

    def text_layer(self, index: int, pair: Pair, layer: CrossLayer) -> Stream:
        """Runs a text layer; gives the text that it began with, reduced as the text is."""
        old = [pair.text]

        def reduce(after: Stream, seen: np.ndarray, text_keys: np.ndarray, image_keys: np.ndarray) -> Stream:
            pair.text = after
            words, _ = pair.reduce(seen, (text_keys, image_keys), self.sites[index], self.semantics, self.config.cls)
            old.append(old[0].reduced(words, self.semantics))
            return pair.text

        pair.text = self.cross_layer(layer, pair.text, pair.image, reduce if index in self.sites else None)
        pair.counts.append((len(pair.text.x), len(pair.image.x)))
        return old[-1]

    def pair_of_layers(self, index: int, pair: Pair) -> None:
        old = self.text_layer(index, pair, self.model.text_layers[index])
        seen = pair.text if self.config.sees == "updated" else old
        pair.image = self.cross_layer(self.model.image_layers[index], pair.image, seen, None)

    def co_attention(self, pair: Pair) -> None:
        for index in range(self.config.layers):
            self.pair_of_layers(index, pair)

    def image_first(self, pair: Pair) -> None:
        for index in range(self.config.layers):
            pair.image = image = self.cross_layer(self.model.image_layers[index], pair.image, pair.text, None)
            self.text_layer(index, pair, self.model.text_layers[index])
        # What reads the image after the last text layer is no cross-modal layer: it sees every token.
        pair.image = image

    def decoder(self, pair: Pair) -> None:
        pair.image = pair.image.with_x(pair.image.x.tanh())
        for index, layer in enumerate(self.model.text_layers):
            self.text_layer(index, pair, layer)

    def bridge(self, pair: Pair) -> None:
        """The towers keep all their tokens, and their own softmax."""
        text_beside, image_beside = pair.text, pair.image
        for index in range(self.config.layers):
            text_beside, _ = self.tower(self.model.text_tower[index], text_beside, "paper")
            image_beside, _ = self.tower(self.model.image_tower[index], image_beside, "paper")
            link = self.model.links[index]
            pair.text = pair.text.with_x(link(pair.text.x + pair.text.brought(text_beside.x)))
            pair.image = pair.image.with_x(link(pair.image.x + pair.image.brought(image_beside.x)))
            self.pair_of_layers(index, pair)

    def shared(self, pair: Pair) -> None:
        pair.text, keys = self.tower(self.model.first[0], pair.text, "paper")
        for index, layer in enumerate(self.model.both_layers):
            old = pair.text
            output, seen, image_keys = self.attend(layer.both, pair.text.x, pair.image)
            pair.text = pair.text.with_x(layer.text_norm(pair.text.x + output))
            if index in self.sites:
                words, _ = pair.reduce(seen, (keys, image_keys), self.sites[index], self.semantics, self.config.cls)
                old = old.reduced(words, self.semantics)
            pair.counts.append((len(pair.text.x), len(pair.image.x)))
            output, _, _ = self.attend(layer.both, pair.image.x, old)
            pair.image = pair.image.with_x(layer.image_norm(pair.image.x + output))
            pair.text, keys = self.tower(layer.text_own, pair.text, self.semantics)
            pair.image, _ = self.tower(layer.image_own, pair.image, self.semantics)


# --- METER's weights in these layers --------------------------------------------------------------------------------


class OfMeter:
    """A METER as the oracle takes models: its encoders as they are, its pairs of layers as `CrossLayer`s, and its
    pooled text and image as the output."""

    def __init__(self, model: PreTrainedModel, attention_mask: Tensor, image: int) -> None:
        self.meter, self.attention_mask, self.number = model.meter, attention_mask, image
        pairs = len(self.meter.cross_modal_text_layers)
        sees = {"updated_text": "updated", "previous_text": "old"}[model.config.image_attends_to]
        config = model.config
        self.config = PairConfig(
            norm="post", layers=pairs, sees=sees, heads=config.num_heads, width=config.hidden_size, mask="additive"
        )
        self.text_layers, self.image_layers = (
            [self.layer(layer) for layer in layers]
            for layers in (self.meter.cross_modal_text_layers, self.meter.cross_modal_image_layers)
        )

    def layer(self, source: nn.Module) -> CrossLayer:
        layer = CrossLayer(self.config)
        for attention, found in ((layer.own, source.attention), (layer.cross, source.crossattention)):
            attention.q, attention.k, attention.v = found.self.query, found.self.key, found.self.value
            attention.out = found.output.dense
        layer.norm1, layer.norm2 = source.attention.output.LayerNorm, source.crossattention.output.LayerNorm
        layer.norm3 = source.output.LayerNorm
        layer.up, layer.down = source.intermediate.dense, source.output.dense
        return layer

    def streams(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the first pair."""
        found: list[Tensor] = []
        first = self.meter.cross_modal_text_layers[0]
        handle = first.register_forward_pre_hook(lambda module, args: found.extend([args[0], args[2]]))
        given = {"pixel_values": pixel_values, "image_token_type_idx": self.number}
        self.meter(input_ids, self.attention_mask, **given)
        handle.remove()
        return found[0], found[1]

    def conclude(self, text: Tensor, image: Tensor) -> Tensor:
        return torch.cat([self.meter.cross_modal_text_pooler(text), self.meter.cross_modal_image_pooler(image)], -1)


def of_meter(model: PreTrainedModel, attention_mask: Tensor, image: int = 1) -> Any:
    """See `OfMeter`; `image` counts the images of a sample from 1."""
    return OfMeter(model, attention_mask, image)
