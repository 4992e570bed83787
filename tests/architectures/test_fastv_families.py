"""FastV where image tokens do not come straight from a tower, against the models' own layers given fewer tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.reducers import reducers_of
from tests.support.prompt_families import FAMILIES, IMAGE, OTHER, Tensors, built

LAYER, BUDGET = 1, 3


def by_hand(model: nn.Module, inputs: Tensors) -> tuple[Tensor, Tensor]:
    """Logits of the model whose layers from `LAYER` on see `BUDGET` tokens of each image, and the places in the prompt
    that they see. The layers are called as the model calls them, with what goes by token cut to those places."""
    decoder = next(m for path, m in model.named_modules() if path.endswith(("language_model", "text_model")))
    layers = decoder.layers
    seen: dict[str, Any] = {}
    whole = inputs["input_ids"].shape[1]

    def votes(module: nn.Module, args: Any, result: Any) -> None:
        weights = result[1].mean(1)[:, -1]
        places = []
        for row, ids in zip(weights, inputs["input_ids"], strict=True):
            kept = (ids != IMAGE) & (ids != OTHER)
            for token in (IMAGE, OTHER):
                image = (ids == token).nonzero().flatten()
                if len(image):
                    kept[image[row[image].topk(BUDGET).indices]] = True
            places.append(kept.nonzero().flatten())
        seen["places"] = torch.stack(places)

    def cut(value: Any, name: str = "") -> Any:
        places = seen["places"]
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        if name == "past_key_values":
            return None
        if not isinstance(value, Tensor) or whole not in value.shape:
            return value
        value = value.expand(len(places), *value.shape[1:])
        for dim in [i for i, size in enumerate(value.shape) if i > 0 and size == whole]:
            index = places.view(len(places), *[-1 if i == dim else 1 for i in range(1, value.dim())])
            value = value.gather(
                dim, index.expand(*[s if i != dim else places.shape[1] for i, s in enumerate(value.shape)])
            )
        return value

    def fewer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        first = args[0] if args[0].shape[1] != whole else cut(args[0])
        return (first, *cut(args[1:])), {name: cut(value, name) for name, value in kwargs.items()}

    handles = [layers[LAYER - 1].self_attn.register_forward_hook(votes)]
    handles += [layer.register_forward_pre_hook(fewer, with_kwargs=True) for layer in list(layers)[LAYER:]]
    decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs).logits, seen["places"]
    finally:
        decoder.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()


@functools.cache
def case(name: str) -> tuple[nn.Module, Any, pumer.Reduced]:
    model, make = built(name)
    with torch.no_grad():
        model(**make(0))  # Emu3 keeps tensors that it makes at first, and would keep those of a trace
    program = pumer.capture(model, make(0), outputs=["logits"])
    return model, make, pumer.reduce(program, Schedule(method="fastv", layer=LAYER, budget=BUDGET))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layers_of_the_model(name: str) -> None:
    model, make, reduced = case(name)
    kept = []
    for seed in (0, 1):
        wanted, places = by_hand(model, make(seed))
        with torch.no_grad():
            found = reduced.module(**make(seed))["logits"]
        torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
        kept.append(places)
    assert not torch.equal(*kept)  # another picture keeps other tokens
    images = 2 if name == "video_llava" else 1
    assert wanted.shape[1] == 3 + images * (4 + BUDGET) and len(reducers_of(reduced.module)) == images
