"""Positions of prompts with images, with padding in front left open, against transformers' own positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.capture.capture import Program
from pumer_compile.errors import UsageError
from pumer_compile.frontends.rope_index import METHOD, open_padding
from tests.support.prompt_families import FAMILIES, Tensors, built

NAMES = ("qwen2_5_vl_two", "qwen3_vl")


@functools.cache
def case(name: str) -> tuple[nn.Module, Callable[[int], Tensors], Program]:
    model, make = built(name)
    return model, make, pumer.capture(model, make(0), outputs=["logits"])


def padded(inputs: Tensors, pads: int) -> Tensors:
    mask = inputs["attention_mask"].clone()
    mask[:, :pads] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("pads", [0, 1, 3])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_the_model_with_padding_in_front(name: str, seed: int, pads: int) -> None:
    """Three words stand in front of the image. What the places of padding themselves give is nobody's."""
    model, make, program = case(name)
    assert program.counted == ("attention_mask",)
    inputs = padded(make(seed), pads)
    for guard in program.guards:
        guard.check(inputs)
    with torch.no_grad():
        found, wanted = program.module(**inputs)["logits"], model(**inputs)["logits"]
    torch.testing.assert_close(found[:, pads:], wanted[:, pads:], atol=1e-6, rtol=1e-5)


def test_padding_moves_positions() -> None:
    """Were the mask no part of them, angles would differ by the padding, and the test above would see it."""
    _, make, program = case("qwen3_vl")
    with torch.no_grad():
        whole, fewer = (program.module(**padded(make(1), pads))["logits"][:, 3:] for pads in (0, 3))
    assert not torch.allclose(whole, fewer, atol=1e-3)


def test_words_stay_open_where_images_are_found_among_the_ids() -> None:
    """Qwen Omni reads every id as a number; what it asks of them holds for other words, and not for other places."""
    model, make, program = case("qwen2_5_omni")
    other = make(1)
    assert not torch.equal(other["input_ids"], make(0)["input_ids"])
    for guard in program.guards:
        guard.check(other)
    with torch.no_grad():
        torch.testing.assert_close(program.module(**other)["logits"], model(**other)["logits"], atol=1e-6, rtol=1e-5)
    moved = {**other, "input_ids": other["input_ids"].roll(1, 1)}
    with pytest.raises(UsageError, match="input_ids"):
        for guard in program.guards:
            guard.check(moved)


def test_a_masked_image_is_refused() -> None:
    _, make, program = case("qwen3_vl")
    with pytest.raises(UsageError, match="attention_mask and mm_token_type_ids"):
        for guard in program.guards:
            guard.check(padded(make(1), 6))


# --- the rewrite alone ------------------------------------------------------------------------------------------------


def counter() -> tuple[nn.Module, Callable[..., tuple[Tensor, Tensor]], Tensors]:
    """The module that counts, its method, and what it takes."""
    model, make = FAMILIES["qwen2_5_vl"]()
    (owner,) = [module for module in model.modules() if hasattr(type(module), METHOD)]
    inputs = make(0)
    del inputs["pixel_values"]
    return owner, getattr(owner, METHOD), inputs


@pytest.mark.parametrize("pads", [0, 1, 2, 3, 4])
def test_transformers_own_positions(pads: int) -> None:
    owner, original, inputs = counter()
    inputs = padded(inputs, pads)
    wanted, _ = original(**inputs)
    opened: list[Tensor] = []
    with open_padding(owner, opened.append):
        found, _ = getattr(owner, METHOD)(**inputs)
    real = inputs["attention_mask"].bool().expand_as(found)
    assert torch.equal(found[real], wanted[real]) and bool((found[~real] == 0).all())
    assert opened == [inputs["attention_mask"]]


def test_without_a_mask_nothing_is_opened() -> None:
    owner, original, inputs = counter()
    del inputs["attention_mask"]
    with open_padding(owner, lambda mask: pytest.fail("there is none")):
        found = getattr(owner, METHOD)(**inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, original(**inputs), strict=True))


def test_an_image_under_the_mask() -> None:
    owner, _, inputs = counter()
    inputs["attention_mask"][0, 6] = 0
    with open_padding(owner, lambda mask: None), pytest.raises(RuntimeError, match="image tokens are masked"):
        getattr(owner, METHOD)(**inputs)


def test_the_module_is_as_it_was() -> None:
    owner, _, _inputs = counter()
    with pytest.raises(KeyError), open_padding(owner, lambda mask: None):
        assert METHOD in vars(owner)
        raise KeyError
    assert METHOD not in vars(owner)


def test_a_model_without_such_positions() -> None:
    module: Any = nn.Linear(2, 2)
    before = dict(vars(module))
    with open_padding(module, lambda mask: None):
        assert vars(module) == before
