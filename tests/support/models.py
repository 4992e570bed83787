"""Small fusion encoders written by hand, and the same forward passes with reducers in them, written again.

`Fusion` is what a user brings: text ids, a patch convolution, layers over both. `reduced` runs its layers one by one
with the algorithms of `tests.support.helpers`; it shares no code with the package.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import Program, Schedule, capture
from pumer_compile.passes.manager import State as PassState
from pumer_compile.passes.manager import run_passes
from pumer_compile.passes.pipeline import PASSES
from tests.support.helpers import (
    combine,
    paper_counts,
    published_counts,
    published_softmax,
    reduce_image,
    reduce_text,
)

Head = Callable[[Tensor, int], Tensor]


def first_token(x: Tensor, text: int) -> Tensor:
    """What most models read: the first text token."""
    return x[:, 0]


def highest(x: Tensor, text: int) -> Tensor:
    """A head that reads every token, and none by its place: what a reducer in the last layer does is seen."""
    return x.amax(1)


@dataclass(frozen=True)
class Config:
    """A fusion encoder and its inputs.

    `mask`: none, additive (`[B, 1, 1, N]`), bool, or expanded (additive, `[B, 1, N, N]`). `head` reads the last
    hidden state, given how many of its tokens are text.
    """

    form: str = "unfused"
    norm: str = "pre"
    mask: str = "additive"
    patch_mask: bool = False
    text: int = 7
    grid: tuple[int, int] = (4, 6)
    cls: bool = True
    heads: int = 4
    width: int = 32
    layers: int = 3
    batch: int = 2
    dynamic: bool = False
    head: Head = field(default=first_token, repr=False)

    @property
    def image(self) -> int:
        """Image tokens, class token included."""
        return self.grid[0] * self.grid[1] + self.cls


class Attention(nn.Module):
    """Multi-head attention to itself or to a memory, written out or fused."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.form = config.heads, config.form

    def split(self, x: Tensor) -> Tensor:
        """`[B, heads, N, size]`."""
        batch, n, width = x.shape
        return x.view(batch, n, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = self.split(self.q(x)), self.split(self.k(memory)), self.split(self.v(memory))
        if self.form == "sdpa":
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            elif mask is not None:
                scores = scores + mask
            context = torch.matmul(scores.softmax(-1), v)
        batch, n, width = x.shape
        return self.out(context.transpose(1, 2).reshape(batch, n, width))


class Layer(nn.Module):
    """Attention and MLP with residuals, pre-norm or post-norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.norm = config.norm
        self.attention = Attention(config)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.norm == "pre":
            x = x + self.attention(self.norm1(x), mask)
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class Fusion(nn.Module):
    """Text ids and an image in, one vector out."""

    patch = 2
    vocabulary = 50

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.words = nn.Embedding(self.vocabulary, width)
        self.positions = nn.Embedding(config.text, width)
        self.kinds = nn.Embedding(2, width)
        self.patches = nn.Conv2d(3, width, self.patch, self.patch)
        self.image_positions = nn.Parameter(torch.randn(1, config.image, width))
        if config.cls:
            self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.last = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 5)

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """`[B, text + image, width]`."""
        n = input_ids.shape[1]
        text = self.words(input_ids) + self.positions(torch.arange(n, device=input_ids.device))
        text = text + self.kinds(torch.zeros_like(input_ids))
        image = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.config.cls:
            image = torch.cat([self.cls.expand(image.shape[0], -1, -1), image], 1)
        image = image + self.image_positions + self.kinds.weight[1]
        return torch.cat([text, image], 1)

    def tokens_open(self, x: Tensor, attention_mask: Tensor, patch_mask: Tensor | None) -> Tensor:
        """`[B, text + image]`: 1 is a real token."""
        rest = x.shape[1] - attention_mask.shape[1]
        ones = torch.ones(x.shape[0], rest, dtype=attention_mask.dtype, device=x.device)
        if patch_mask is not None:
            learned = ones[:, :1]
            ones = torch.cat([learned, patch_mask], 1) if self.config.cls else patch_mask
        return torch.cat([attention_mask, ones], 1)

    def mask(self, x: Tensor, attention_mask: Tensor, patch_mask: Tensor | None) -> Tensor:
        opened = self.tokens_open(x, attention_mask, patch_mask)[:, None, None, :]
        if self.config.mask == "bool":
            return opened > 0
        mask = (1.0 - opened.to(x.dtype)) * torch.finfo(x.dtype).min
        if self.config.mask == "expanded":
            mask = mask.expand(x.shape[0], 1, x.shape[1], x.shape[1])
        return mask

    def finish(self, x: Tensor, text: int) -> Tensor:
        return self.classify(self.config.head(self.last(x), text))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
    ) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        mask = None if attention_mask is None else self.mask(x, attention_mask, patch_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return self.finish(x, input_ids.shape[1])


class Staged(Fusion):
    """A text tower and an image tower of one layer each, then layers over both."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.text_layers = nn.ModuleList([Layer(config)])
        self.image_layers = nn.ModuleList([Layer(config)])

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x, text = super().embed(input_ids, pixel_values), input_ids.shape[1]
        return torch.cat([self.text_layers[0](x[:, :text], None), self.image_layers[0](x[:, text:], None)], 1)


def make(config: Config, seed: int = 0, kind: type[Fusion] = Fusion) -> Fusion:
    """A model with random weights of a size that makes attention uneven."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".q.weight", ".k.weight")):
                parameter.mul_(3)
    return model


def inputs_for(config: Config, seed: int = 1, batch: int | None = None) -> dict[str, Tensor]:
    """Random inputs; the first sample has no padding, the next ones have."""
    g = torch.Generator().manual_seed(seed)
    batch = batch or config.batch
    height, width = (Fusion.patch * n for n in config.grid)
    inputs = {
        "input_ids": torch.randint(0, Fusion.vocabulary, (batch, config.text), generator=g),
        "pixel_values": torch.randn(batch, 3, height, width, generator=g),
    }
    if config.mask != "none":
        lengths = torch.tensor([config.text, *[config.text - 2 - i for i in range(batch - 1)]]).clamp(min=1)
        inputs["attention_mask"] = (torch.arange(config.text) < lengths[:, None]).long()
    if config.patch_mask:
        patches = config.grid[0] * config.grid[1]
        inputs["patch_mask"] = (torch.rand(batch, patches, generator=g) < 0.7).long()
        inputs["patch_mask"][0] = 1
    return inputs


@functools.cache
def program(config: Config, kind: type[Fusion] = Fusion) -> Program:
    """The captured model; shared by tests, which must not change it."""
    return capture(make(config, kind=kind), inputs_for(config), dynamic_batch=config.dynamic)


def schedule(semantics: str = "reference", layers: tuple[int, ...] = (0, 1), **budgets: Any) -> Schedule:
    """A schedule over cross-modal layers, 0.2 pruned, 0.3 and 0.25 merged unless said otherwise."""
    budgets = budgets or {"prune": 0.2, "merge": {"image": 0.3, "text": 0.25}}
    return Schedule(semantics=semantics, layers=layers, **budgets)


def passed(captured: Program, wanted: Schedule, verified: bool = False) -> PassState:
    """What the passes make of a program: quickly, without counting or (unless asked) verifying."""
    state = PassState(captured.module, wanted, dict(captured.inputs), dict(captured.streams))
    left_out = {"count"} if verified else {"verify", "eliminate", "absorb_single_query", "count"}
    run_passes(state, tuple(step for step in PASSES if step.name not in left_out))
    return state


# --- the same model with reducers in it ---------------------------------------------------------------------


@dataclass
class State:
    """The stream of one sample on its way through the layers.

    `sizes` and `shares` by token: how much of it is real, as carried by the reducers and as the mask has it. `members`
    are the groups of the last reducer, `history` those of each.
    """

    x: Tensor
    text: int
    sizes: list[float]
    shares: list[float]
    members: list[list[int]] = dataclasses.field(default_factory=list)
    history: list[list[list[int]]] = dataclasses.field(default_factory=list)

    def places(self, tokens: int) -> list[int | None]:
        """Where each of the first tokens is now; None for those that were pruned."""
        now: list[int | None] = list(range(tokens))
        for members in self.history:
            place = {old: new for new, group in enumerate(members) for old in group}
            now = [None if old is None else place.get(old) for old in now]
        return now


Sites = Mapping[int, tuple[Any, Any, Any]]
"""Shares or numbers `(prune, image merge, text merge)` by layer."""

WEIGHTED = ("safe", "tome")
"""Semantics whose means go by size, and that keep padding apart; `tome` stands for the method of that name."""


def reduced(
    model: Fusion, inputs: Mapping[str, Tensor], sites: Sites, semantics: str
) -> tuple[Tensor, list[tuple[int, int]]]:
    """The model with reducers after the attention of some layers: its output and `(text, image)` after each layer."""
    states, counts = reduced_states(model, inputs, sites, semantics)
    return model.finish(torch.stack([s.x for s in states]), states[0].text), counts


def reduced_states(
    model: Fusion, inputs: Mapping[str, Tensor], sites: Sites, semantics: str
) -> tuple[list[State], list[tuple[int, int]]]:
    """Every sample after the last layer."""
    config = model.config
    text = config.text
    x = model.embed(inputs["input_ids"], inputs["pixel_values"])
    opened = torch.ones(x.shape[:2])
    if "attention_mask" in inputs:
        opened = model.tokens_open(x, inputs["attention_mask"], inputs.get("patch_mask")).float()
    states = [State(x[b], text, opened[b].tolist(), opened[b].tolist()) for b in range(len(x))]
    counts = []
    for index, layer in enumerate(model.layers):
        for state in states:
            run_layer(layer, state, sites.get(index), semantics, config)
        counts.append((states[0].text, len(states[0].x) - states[0].text))
    return states, counts


def run_layer(layer: Layer, state: State, budgets: tuple[Any, Any, Any] | None, semantics: str, config: Config) -> None:
    x = state.x
    normed = layer.norm1(x) if config.norm == "pre" else x
    output, probabilities, keys = attend(
        layer.attention, normed, normed, state.sizes, state.shares, semantics, config.mask
    )
    x = x + output
    x = layer.norm1(x) if config.norm == "post" else x
    state.x = x
    if budgets is not None:
        _reduce(state, probabilities, keys, budgets, semantics, config)
        x = state.x
    if config.norm == "pre":
        state.x = x + layer.mlp(layer.norm2(x))
    else:
        state.x = layer.norm2(x + layer.mlp(x))


def attend(
    attention: Attention, x: Tensor, memory: Tensor, sizes: list[float], shares: list[float], semantics: str, mask: str
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Output of an attention of one sample, its probabilities `[heads, queries, keys]` and its keys `[heads, keys,
    size]`. `sizes` and `shares` are the memory's."""
    q, k, v = (
        linear(given).unflatten(-1, (attention.heads, -1)).movedim(-2, 0)
        for linear, given in ((attention.q, x), (attention.k, memory), (attention.v, memory))
    )
    scores = torch.einsum("hqd,hkd->hqk", q, k) / math.sqrt(q.shape[-1])
    probabilities = _probabilities(scores, sizes, shares, semantics, mask)
    context = torch.einsum("hqk,hkd->hqd", probabilities, v).movedim(0, -2).flatten(-2)
    return attention.out(context), probabilities.detach().double().numpy(), k.detach().double().numpy()


def _probabilities(scores: Tensor, sizes: list[float], shares: list[float], semantics: str, mask: str) -> Tensor:
    if semantics == "reference":
        weights = np.array(sizes)
        rows = [published_softmax(s.detach().double().numpy(), weights) for s in scores]
        return torch.from_numpy(np.stack(rows)).to(scores.dtype)
    if semantics == "tome":
        return (scores + torch.tensor(sizes).log()).softmax(-1)
    opened = torch.tensor(shares)
    if mask == "bool":
        opened = (opened > 0).float()
    return (scores + opened.log().clamp(min=torch.finfo(scores.dtype).min)).softmax(-1)


def _reduce(
    state: State,
    probabilities: np.ndarray,
    keys: np.ndarray,
    budgets: tuple[Any, Any, Any],
    semantics: str,
    config: Config,
) -> None:
    text = state.text
    real = [size > 0 for size in state.sizes]
    words, patches = choose(
        probabilities[:, :text, text:],
        (keys[:, :text], keys[:, text:]),
        (real[:text], real[text:]),
        budgets,
        semantics,
        int(config.cls),
    )
    members = words + [[text + i for i in group] for group in patches]
    state.members = members
    state.history.append(members)
    state.x = combine(state.x, members, state.sizes if semantics in WEIGHTED else None).to(state.x.dtype)
    parts = (slice(0, text), words, False), (slice(text, None), patches, True)
    carried = [carry(state.sizes[part], state.shares[part], *how, semantics) for part, *how in parts]
    state.sizes, state.shares = (a + b for a, b in zip(*carried, strict=True))
    state.text = len(words)


def choose(
    attention: np.ndarray,
    keys: tuple[np.ndarray, np.ndarray],
    real: tuple[list[bool], list[bool]],
    budgets: tuple[Any, Any, Any],
    semantics: str,
    learned: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of old text tokens and of old image tokens of one sample, each numbered from 0.

    `attention` is `[heads, text, image]`, `keys` and `real` are of text and image; `learned` leads the image.
    """
    safe = semantics in WEIGHTED
    text, image = len(real[0]), len(real[1])
    counting = paper_counts if semantics == "paper" else published_counts
    keep, merge_image, merge_text = counting(image, text, *(b if isinstance(b, float) else 0.0 for b in budgets))
    keep = image - budgets[0] if isinstance(budgets[0], int) else keep
    merge_image = budgets[1] if isinstance(budgets[1], int) else merge_image
    merge_text = budgets[2] if isinstance(budgets[2], int) else merge_text
    similarity = "dot" if semantics == "paper" else "cosine"
    how: dict[str, Any] = {
        "similarity": similarity,
        "first_stays": semantics != "tome",
        "in_order": semantics == "safe",
    }
    words = reduce_text(keys[0], merge_text, real=real[0] if safe else None, **how)
    if image == 0:
        return words, []
    patches = reduce_image(
        attention,
        keys[1],
        keep,
        merge_image,
        votes=real[0] if safe else None,
        learned=learned if safe else 0,
        real=real[1] if safe else None,
        sort=keep < image,
        **how,
    )
    return words, patches


def carry(
    sizes: list[float], shares: list[float], members: list[list[int]], image: bool, semantics: str
) -> tuple[list[float], list[float]]:
    """Sizes and shares of a stream's new tokens."""
    if semantics != "reference":
        new = [sum(sizes[i] for i in group) for group in members]
    elif len(members) == len(sizes):
        new = sizes
    else:
        new = [1.0 if image else sum(sizes[i] for i in group) / len(group) for group in members]
    weight = sizes if semantics in WEIGHTED else [1.0] * len(sizes)
    parts = []
    for group in members:
        total = sum(weight[i] for i in group)
        part = sum(weight[i] * shares[i] for i in group) / total if total else sum(shares[i] for i in group)
        parts.append(part)
    return new, parts


def variants(**options: tuple[Any, ...]) -> list[Config]:
    """Configurations over the product of some fields."""
    configs = [Config()]
    for name, values in options.items():
        configs = [dataclasses.replace(c, **{name: v}) for c in configs for v in values]
    return configs


def describe(config: Config) -> str:
    """What differs from the default, for test ids."""
    default = Config()
    fields = [f.name for f in dataclasses.fields(Config)]
    parts = [f"{n}={getattr(config, n)}" for n in fields if getattr(config, n) != getattr(default, n)]
    return ",".join(parts).replace(" ", "") or "default"
