"""FastV by hand where image tokens come in several ways: models whose later layers see some places alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.prompt_families import IMAGE, OTHER, ROW, Tensors, decoder_of, layers_of
from tests.support.prompt_oracle import eagerly, scores

LAYER = 1
BUDGET = 3
# Where not every layer attends: the first that the first attention leaves fewer tokens.
FEWER_FROM = {"lfm2_vl": 2, "qwen3_5": 2}


def images_of(ids: Tensor) -> list[list[int]]:
    """Places of each image of a prompt: of a run of placeholders, which marks at the ends of lines do not end."""
    found: list[list[int]] = []
    tokens = ids.tolist()
    for place, token in enumerate(tokens):
        if token not in (IMAGE, OTHER):
            continue
        before = place - 2 if place and tokens[place - 1] == ROW else place - 1
        goes_on = found and found[-1][-1] == before and tokens[before] == token
        (found[-1] if goes_on else found.append([]) or found[-1]).append(place)
    return found


class _Cut:
    """Hooks that let a language model's later layers see some places of the prompts alone."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.whole = ids, ids.shape[1]
        self.places: Tensor | None = None

    def votes(self, module: nn.Module, args: Any, result: Any) -> None:
        weights = result[1].mean(1)[:, -1]
        kept = (self.ids != IMAGE) & (self.ids != OTHER)
        for prompt, row in enumerate(weights):
            for image in map(torch.tensor, images_of(self.ids[prompt])):
                kept[prompt, image[row[image].topk(BUDGET).indices]] = True
        self.places = torch.stack([one.nonzero().flatten() for one in kept])

    def cut(self, value: Any, name: str = "") -> Any:
        if isinstance(value, tuple):
            return tuple(self.cut(v) for v in value)
        if name == "past_key_values":
            return None
        if not isinstance(value, Tensor) or self.whole not in value.shape:
            return value
        places, whole = self.places, self.whole
        assert places is not None
        if whole not in value.shape[1:]:  # an angle for each place of all prompts
            value = value[None]
        first = int(value.dim() > 2 and value.shape[0] in (3, 4) and value.shape[2] == whole)  # axes of a position
        value = value.expand(*value.shape[:first], len(places), *value.shape[first + 1 :])
        for dim in [i for i, size in enumerate(value.shape) if i > first and size == whole]:
            index = places.view(
                *[1] * first, len(places), *[-1 if i == dim else 1 for i in range(first + 1, value.dim())]
            )
            value = value.gather(
                dim, index.expand(*[s if i != dim else places.shape[1] for i, s in enumerate(value.shape)])
            )
        return value

    def fewer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            args = (args[0] if args[0].shape[1] != self.whole else self.cut(args[0]), *self.cut(args[1:]))
        return args, {name: self.cut(value, name) for name, value in kwargs.items()}

    def deepstack(self, process: Any) -> Any:
        """What adds features of the tower behind a layer, of those image tokens that are left."""

        def processed(states: Tensor, images: Tensor, features: Tensor) -> Tensor:
            if self.places is not None and states.shape[1] != self.whole:
                kept = torch.zeros_like(images).scatter(1, self.places, True)
                states, images, features = states, self.cut(images), features[kept[images]]
            found: Tensor = process(states, images, features)
            return found

        return processed


def by_hand(model: nn.Module, inputs: Tensors, first: int = LAYER) -> tuple[Tensor, Tensor]:
    """Logits of the model whose layers from `first` on see `BUDGET` tokens of each image, and the places in the prompt
    that they see. The layers are called as the model calls them, with what goes by token cut to those places."""
    decoder, layers = decoder_of(model), layers_of(model)
    cut = _Cut(inputs["input_ids"])
    handles = [layers[first - 1].self_attn.register_forward_hook(cut.votes)]
    handles += [layer.register_forward_pre_hook(cut.fewer, with_kwargs=True) for layer in layers[first:]]
    spread = _Spread(cut)
    if "embeddings" in vars(model) or hasattr(model, "embedding_proj_layer"):
        handles.append(decoder.register_forward_hook(spread))
    if "deepstack_features" in inspect.signature(decoder.forward).parameters:
        handles += [layer.register_forward_hook(spread.states) for layer in layers[first:]]
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = cut.deepstack(decoder._deepstack_process)
    try:
        with eagerly(model), torch.no_grad():
            found = scores(model(**inputs))
            assert cut.places is not None
            return (cut.cut(found) if found.shape[1] == cut.whole else found), cut.places
    finally:
        vars(decoder).pop("_deepstack_process", None)
        for handle in handles:
            handle.remove()


class _Spread:
    """Puts states back where they stood: a head, or features for places of the prompt, may meet them there."""

    def __init__(self, cut: _Cut) -> None:
        self.cut = cut

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = self.states(module, args, output.last_hidden_state)
        return output

    def states(self, module: nn.Module, args: Any, states: Tensor) -> Tensor:
        """Those of a layer."""
        places = self.cut.places
        assert places is not None
        whole = states.new_zeros(len(states), self.cut.whole, states.shape[2])
        return whole.scatter(1, places[..., None].expand_as(states), states)
