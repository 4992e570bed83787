"""Methods inside a language model by hand: its own layers, called as the model calls them, given fewer tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tests.support.fastv_families import images_of
from tests.support.prompt_families import Tensors, decoder_of, layers_of
from tests.support.prompt_oracle import eagerly, scores

Images = list[list[int]]
Rule = Literal["own", "next"]


class Staged:
    """Hooks by which later layers of a language model see fewer image tokens.

    Args:
        model: with eager attention.
        images: places of each image in the prompts, alike in all rows.
        length: of the prompt.
        stages: after so many layers: tokens of each image.
        rule: by whose attention: the last layer's that saw them all, or the next one's, of the tokens that are there.
        compact: positions are counted anew.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        length: int,
        stages: Mapping[int, int],
        rule: Rule,
        compact: bool,
    ) -> None:
        self.images, self.length, self.stages = images, length, dict(stages)
        self.rule, self.compact = rule, compact
        self.places: Tensor | None = None
        self.votes: Tensor | None = None
        self.kept: list[Tensor] = []
        self.layers = layers_of(model)

    def hooks(self) -> list[Any]:
        """Put in place."""
        found = [layer.self_attn.register_forward_hook(self._note) for layer in self.layers]
        for number, layer in enumerate(self.layers):
            found.append(layer.register_forward_pre_hook(self._before(number), with_kwargs=True))
        return found

    def _note(self, module: nn.Module, args: Any, result: Any) -> None:
        self.votes = result[1].mean(1)[:, -1]

    def _before(self, number: int) -> Any:
        def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            states = args[0] if args else kwargs["hidden_states"]
            if self.places is None:
                self.places = torch.arange(self.length).expand(len(states), -1)
            if number in self.stages:
                if self.rule == "next":
                    layer.forward(states, *args[1:], **self._cut(kwargs))
                states = self._choose(states, self.stages[number])
            return (states, *args[1:]), {k: v for k, v in self._cut(kwargs).items() if k != "hidden_states"}

        return before

    def _choose(self, states: Tensor, budget: int) -> Tensor:
        assert self.places is not None and self.votes is not None
        left = []
        for row, places in enumerate(self.places.tolist()):
            gone: set[int] = set()
            for image in self.images:
                there = [i for i, place in enumerate(places) if place in image]
                best = sorted(there, key=lambda i, row=row: (-float(self.votes[row, i]), i))[:budget]  # type: ignore[misc]
                gone |= set(there) - set(best)
            left.append([i for i in range(len(places)) if i not in gone])
        index = torch.tensor(left)
        self.places = self.places.gather(1, index)
        self.kept.append(self.places)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))

    def _cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {name: None if "past" in name else value for name, value in kwargs.items()}
        return {name: self._rows(value, name == "position_embeddings") for name, value in given.items()}

    def _rows(self, value: Any, position: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._rows(v, position) for v in value)
        places = self.places
        assert places is not None
        if not isinstance(value, Tensor) or self.length not in value.shape:
            return value
        axes = int(value.dim() > 2 and value.shape[0] in (3, 4) and value.shape[2] == self.length)
        if position and self.compact:
            return value.narrow(axes + 1, 0, places.shape[1])
        value = value.expand(*value.shape[:axes], len(places), *value.shape[axes + 1 :])
        for dim in [i for i, size in enumerate(value.shape) if i > axes and size == self.length]:
            ones = [-1 if i == dim else 1 for i in range(axes + 1, value.dim())]
            index = places.view(*[1] * axes, len(places), *ones)
            shape = [places.shape[1] if i == dim else size for i, size in enumerate(value.shape)]
            value = value.gather(dim, index.expand(*shape))
        return value

    def deepstack(self, process: Any) -> Any:
        """What adds features of the tower behind a layer, of those image tokens that are left."""

        def processed(states: Tensor, images: Tensor, features: Tensor) -> Tensor:
            if self.places is not None and states.shape[1] != self.length:
                kept = torch.zeros_like(images).scatter(1, self.places, True)
                images, features = self._rows(images, False), features[kept[images]]
            found: Tensor = process(states, images, features)
            return found

        return processed


def by_hand(
    model: nn.Module,
    inputs: Tensors,
    stages: Mapping[int, int],
    rule: Rule,
    *,
    compact: bool = False,
    placeholder: int = 0,
    kind: type[Staged] = Staged,
    call: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Scores of every token that is left, and the places in the prompt that are left after each stage.

    Args:
        placeholder: of the image tokens; those of `prompt_families` by default.
        kind: how tokens are chosen.
        call: runs the language model on a prompt, whose ids are those of `inputs`; None for the model on its inputs.
    """
    ids = inputs["input_ids"]
    images = [(ids[0] == placeholder).nonzero().flatten().tolist()] if placeholder else images_of(ids[0])
    staged = kind(model, images, ids.shape[1], stages, rule, compact)
    handles: list[Any] = []
    decoder = decoder_of(model)
    if hasattr(decoder, "_deepstack_process"):
        decoder._deepstack_process = staged.deepstack(decoder._deepstack_process)
    try:
        with eagerly(model), torch.no_grad():
            handles = staged.hooks()
            return (call() if call else scores(model(**inputs))), staged.kept
    finally:
        vars(decoder).pop("_deepstack_process", None)
        for handle in handles:
            handle.remove()
