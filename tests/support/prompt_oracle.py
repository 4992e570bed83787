"""A visual method on the rows that enter a prompt, by the model's own modules: hooks, gradients and lists, no graph.

What a row is made of comes from autograd: the tokens of the deciding attention whose gradient is not zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from tests.support.prompt_families import decoder_of, layers_of
from tests.support.visual import select

Tensors = dict[str, Tensor]


@dataclass
class Attention:
    """What one attention did: the module it is in, its weights `[batch, heads, queries, keys]` and its output
    `[batch, heads, queries, width]`."""

    module: nn.Module | None
    weights: Tensor
    output: Tensor


@dataclass
class Sight:
    """What a model sees of its pictures.

    Attributes:
        rows: by what rows are alike, `[width]` each, those of the first prompt first.
        places: `(prompt, place in it)` of every row.
        groups: numbers of rows that share a budget, in the order of the rows.
        votes: `[rows]`.
        members: of every row, `(call, batch row, token)` of the deciding attention; none of a mark at a line's end,
            which no method keeps.
        deciding: for every placeholder the module, and whose votes count: a class token's alone, or everyone's.
    """

    rows: list[Tensor]
    places: list[tuple[int, int]]
    groups: list[list[int]]
    votes: Tensor
    members: list[list[tuple[int, int, int]]]
    deciding: list[tuple[nn.Module | None, str]]


# --- looking --------------------------------------------------------------------------------------------------------


class _Attentions(TorchFunctionMode):
    """Every softmax that meets values, with the module in which it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[nn.Module] = []
        self.found: list[Attention] = []
        self.weights: dict[int, Tensor] = {}
        self.alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name == "softmax":
            # Weights say how much; a token is made of values.
            result = result.detach() if result.dim() > 3 or self._folded(result) else result
            self._same(result, result)
        elif name == "conv2d":
            return _by_centre(args, kwargs or {}, result)
        elif name in ("dropout", "to", "type", "type_as", "contiguous") and id(first) in self.weights:
            self._same(result, self.weights[id(first)])
        elif name in ("matmul", "__matmul__", "bmm") and id(first) in self.weights and args[1].dim() == first.dim():
            heads = self._folded(first)
            apart = result.unflatten(0, (-1, heads)) if heads else result
            weights = first.unflatten(0, (-1, heads)) if heads else first
            self.found.append(Attention(self.inside[-1] if self.inside else None, weights, apart))
            return apart.flatten(0, 1) if heads else result
        return result

    def _folded(self, weights: Tensor) -> int:
        """How many heads are folded into the batch of an attention's weights; 0 where they have their own dimension."""
        heads = getattr(self.inside[-1], "num_attention_heads", 0) if self.inside and weights.dim() == 3 else 0
        return heads if heads and weights.shape[0] % heads == 0 else 0

    def _same(self, value: Tensor, weights: Tensor) -> None:
        self.weights[id(value)] = weights
        self.alive.append(value)


def _by_centre(args: Any, kwargs: Any, result: Tensor) -> Tensor:
    """The same numbers. A convolution that keeps the grid looks at neighbours; a place is made of what was there."""
    image, weight = args[:2]
    if weight.shape[-1] == 1 or result.shape[-2:] != image.shape[-2:]:
        return result
    high, wide = (size // 2 for size in weight.shape[-2:])
    centre = weight[..., high : high + 1, wide : wide + 1]
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    own = torch.nn.functional.conv2d(image, centre, groups=groups)
    return result.detach() + own - own.detach()


@contextlib.contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """All attention of the model written out as products."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


class _Enough(Exception):
    """The prompt is seen."""


def look(model: nn.Module, inputs: Tensors, placeholders: dict[int, str]) -> Sight:
    """What stands in the prompts at the placeholders, what each of it is made of, and the attention that gets.

    Args:
        placeholders: tokens; and the projector, by the end of its path, where rows are alike by what goes into it (as
            was published, of rows that are one token each), or "" where they are alike as they enter the prompt.
    """
    seen: dict[str, Any] = {"projected": []}

    def prompt(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["embeds"] = kwargs["inputs_embeds"]
        if kwargs.get("deepstack_features"):  # the first of them make the rows
            seen["embeds"] = seen["embeds"].masked_scatter(kwargs["vision_mask"], kwargs["deepstack_features"][0])
        raise _Enough

    attentions = _Attentions()
    handles = [
        register_module_forward_pre_hook(lambda m, args: attentions.inside.append(m)),
        register_module_forward_hook(lambda m, args, out: attentions.inside.pop() and None),
        decoder_of(model).register_forward_pre_hook(prompt, with_kwargs=True),
    ]
    ends = tuple(filter(None, placeholders.values())) or ("none",)
    handles += [
        module.register_forward_hook(lambda m, args, out: seen["projected"].append((args[0], out)))
        for path, module in model.named_modules()
        if path.endswith(ends)
    ]
    try:
        with eagerly(model), torch.enable_grad(), attentions, contextlib.suppress(_Enough):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    # Its keys are no queries: nothing says which of them a row is.
    crossing = {m for path, m in model.named_modules() if path.endswith("crossattention.attention")}
    image = torch.isin(inputs["input_ids"], torch.tensor([*placeholders]))
    embeds = seen["embeds"].expand(len(image), -1, -1)
    places = [(int(b), int(p)) for b, p in image.nonzero()]
    sight = Sight([*embeds[image].detach()], places, [], torch.zeros(len(places)), [[] for _ in places], [])
    for token, projector in placeholders.items():
        # Pictures and films may come from towers of their own.
        numbers = (inputs["input_ids"][image] == token).nonzero().flatten().tolist()
        if not numbers:
            continue
        rows = embeds[inputs["input_ids"] == token]
        _votes(sight, numbers, rows, [call for call in attentions.found if call.module not in crossing])
        if projector:
            for number, feature in zip(numbers, _before_projector(rows, seen["projected"]), strict=True):
                sight.rows[number] = feature
    return sight


def _before_projector(rows: Tensor, projected: list[tuple[Tensor, Tensor]]) -> Tensor:
    for features, made in projected:
        if made.shape[:-1].numel() == len(rows):
            cosine = torch.nn.functional.cosine_similarity(made.reshape(len(rows), -1), rows)
            if bool((cosine > 1 - 1e-5).all()):
                return features.reshape(len(rows), -1).detach()
    raise AssertionError("No projector gives the rows.")


def _votes(sight: Sight, numbers: list[int], rows: Tensor, found: list[Attention]) -> None:
    """Fill in what is known of the rows of these numbers."""
    calls, members = _deciding(rows, found)
    received, voters = [], set()
    for index, call in enumerate(calls):
        # Latents are the last keys, behind the picture that they read.
        weights = call.weights.mean(1)[..., -call.weights.shape[-2] :]
        # A token in front of the others that becomes no row of any picture is a class token: it speaks for the picture.
        alone = not any(m[index][:, 0].any() for m in members)
        voters.add("class" if alone else "all")
        received.append(weights[:, 0] if alone else weights.mean(1))
    (voter,) = voters
    sight.deciding.append((calls[0].module, voter))
    groups: list[tuple[set[tuple[int, int]], list[int]]] = []
    for number, row in zip(numbers, members, strict=True):
        own = [(i, int(b), int(t)) for i, m in enumerate(row) for b, t in m.nonzero()]
        if not own:
            continue
        sight.members[number] = own
        sight.votes[number] = torch.stack([received[i][b, t] for i, b, t in own]).mean().detach()
        # Rows of one picture are attended to together; a row of tokens from several windows joins those.
        where = {(i, b) for i, b, _ in own}
        same = [g for g in groups if g[0] & where]
        groups = [g for g in groups if not g[0] & where]
        groups.append((where.union(*(g[0] for g in same)), sorted([number, *(n for g in same for n in g[1])])))
    sight.groups += sorted(g[1] for g in groups)


def _deciding(rows: Tensor, found: list[Attention]) -> tuple[list[Attention], list[list[Tensor]]]:
    """The last attention of tokens among themselves that tells rows apart, and its tokens in every row. Rows that no
    attention is behind (learned marks at the ends of lines) have none."""
    found = [call for call in found if call.output.requires_grad]
    everything = _members(rows, found)
    made = [number for number, row in enumerate(everything) if any(bool(m.any()) for m in row)]
    modules = list(dict.fromkeys(reversed([a.module for a in found])))
    for module in modules:
        own = [i for i, a in enumerate(found) if a.module is module and a.weights.shape[-1] >= a.weights.shape[-2]]
        members = [[row[i] for i in own] for row in everything]
        if own and made and len({tuple(tuple(m.flatten().tolist()) for m in members[i]) for i in made}) == len(made):
            return [found[i] for i in own], members
    raise AssertionError("No attention tells the rows apart.")


def _members(rows: Tensor, calls: list[Attention]) -> list[list[Tensor]]:
    """Of every row and call, the tokens whose change would change the row: `[batch, queries]`."""
    generator = torch.Generator().manual_seed(0)
    mixed = rows @ torch.randn(rows.shape[1], generator=generator)
    members = []
    for row in mixed:
        slopes = torch.autograd.grad(row, [a.output for a in calls], retain_graph=True, allow_unused=True)
        members.append(
            [
                torch.zeros_like(a.output[:, 0, :, 0], dtype=torch.bool) if g is None else (g != 0).any(-1).any(1)
                for a, g in zip(calls, slopes, strict=True)
            ]
        )
    return members


# --- choosing ---------------------------------------------------------------------------------------------------------


def kept_rows(sight: Sight, budget: int, important: float = 0.5) -> list[int]:
    """Numbers of the rows that VisPruner keeps, `budget` of every group."""
    kept: list[int] = []
    for group in sight.groups:
        chosen = select(torch.stack([sight.rows[i] for i in group])[None], sight.votes[group][None], budget, important)[
            0
        ]
        kept += [group[int(i)] for i in chosen]
    return sorted(kept)


def kept_places(sight: Sight, inputs: Tensors, rows: list[int]) -> Tensor:
    """Places in the prompts of words and these rows, `[batch, left]`."""
    stays = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    for number, place in enumerate(sight.places):
        stays[place] = number in set(rows)
    return torch.stack([row.nonzero().flatten() for row in stays])


# --- the language model on what is kept -------------------------------------------------------------------------------


def _cut(value: Tensor, places: Tensor, dim: int) -> Tensor:
    """Of every prompt its places along a dimension; dimension 0 is the prompt."""
    value = value.expand(len(places), *value.shape[1:])
    return torch.stack([one.index_select(dim - 1, index) for one, index in zip(value, places, strict=True)])


def _cut_mask(mask: Any, places: Tensor) -> Any:
    if isinstance(mask, dict):
        return {name: _cut_mask(m, places) for name, m in mask.items()}
    if mask is None:
        return None
    return _cut(mask, places, 1) if mask.dim() == 2 else _cut(_cut(mask, places, 2), places, 3)


@dataclass
class _Reading:
    """Hooks that let a language model read some places of the prompts alone, each where it stood."""

    places: Tensor | None
    rows: Tensor  # [rows] which are kept
    masks: dict[nn.Module, Any] = field(default_factory=dict)

    def prompt(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Cut what goes by token."""
        assert not args, "the prompt comes by name"
        embeds = kwargs["inputs_embeds"]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(embeds.shape[1])[None]
        if self.places is None:
            return args, kwargs
        return args, {name: self._by_name(name, value) for name, value in kwargs.items()}

    def _by_name(self, name: str, value: Any) -> Any:
        places = self.places
        if value is None or isinstance(value, bool | int | str) or name in ("past_key_values", "cache"):
            return value
        if name in ("inputs_embeds", "per_layer_inputs", "visual_pos_masks", "vision_mask", "input_ids"):
            return _cut(value, places, 1)
        if name == "position_ids":
            # [batch, length], or one of those for each axis of a position.
            return _cut(value, places, 1) if value.dim() == 2 else torch.stack([_cut(v, places, 1) for v in value])
        if name == "attention_mask":
            return _cut_mask(value, places)
        if name == "deepstack_visual_embeds":
            return [v[self.rows] for v in value]
        if name == "deepstack_features":
            return {layer: v[self.rows] for layer, v in value.items()}
        raise AssertionError(f"{name} goes into the language model; nobody said what of it is a token's")

    def layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The mask of the whole prompt, seen before, cut: windows are as wide as they were."""
        where = "attention_mask"
        if self.places is None:
            self.masks[module] = kwargs[where] if where in kwargs else args[1]
            return args, kwargs
        mask = _cut_mask(self.masks[module], self.places)
        return (args, {**kwargs, where: mask}) if where in kwargs else ((args[0], mask, *args[2:]), kwargs)

    def table(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Learned positions, looked up for the whole prompt."""
        if self.places is None:
            self.masks[module] = output if output.dim() == 3 else output[None]
            return output
        return _cut(self.masks[module], self.places, 1)


def scores(output: Any) -> Tensor:
    """Logits, or a retrieval model's embeddings."""
    return output.logits if "logits" in output else output.embeddings


@dataclass
class _Spread:
    """Hook that puts a language model's states back where they stood: a head may meet them with the prompt's mask."""

    places: Tensor
    length: int

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        whole = states.new_zeros(len(states), self.length, states.shape[2])
        output.last_hidden_state = whole.scatter(1, self.places[..., None].expand_as(states), states)
        return output


def logits(
    model: nn.Module,
    inputs: Tensors,
    places: Tensor,
    rows: list[int] | None = None,
    of: int = 0,
    *,
    anew: bool = False,
) -> Tensor:
    """Logits of the prompts' places, the others left out before the language model.

    Args:
        rows: which of the rows are kept, and `of` how many; for features that are added in later layers.
        anew: learned positions are counted over what is left.
    """
    decoder = decoder_of(model)
    reading = _Reading(None, torch.isin(torch.arange(of), torch.tensor(rows or [])))
    handles = [decoder.register_forward_pre_hook(reading.prompt, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(reading.layer, with_kwargs=True) for layer in layers_of(model)]
    tables = [m for path, m in decoder.named_modules() if path.split(".")[-1] == "embed_positions" and not anew]
    handles += [table.register_forward_hook(reading.table) for table in tables]
    try:
        with eagerly(model), torch.no_grad():
            retrieves = "embeddings" in model(**inputs)
            reading.places = places
            if retrieves:
                handles.append(decoder.register_forward_hook(_Spread(places, inputs["input_ids"].shape[1])))
            found = scores(model(**inputs))
            return _cut(found, places, 1) if retrieves else found
    finally:
        for handle in handles:
            handle.remove()


def by_hand(
    model: nn.Module, inputs: Tensors, budget: int, placeholders: dict[int, str], important: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Logits of a model that sees `budget` rows of each picture, and the places in the prompts that it sees."""
    sight = look(model, inputs, placeholders)
    rows = kept_rows(sight, budget, important)
    places = kept_places(sight, inputs, rows)
    return logits(model, inputs, places, rows, len(sight.places)), places
