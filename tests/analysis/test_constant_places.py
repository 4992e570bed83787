"""Reads and writes at constant places of a prompt, as slices and joins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import pumer_compile as pumer
from pumer_compile.analysis.constant_places import lower_constant_places, masked_updates, same_tokens
from pumer_compile.analysis.operators import aten
from pumer_compile.capture.capture import Program
from pumer_compile.errors import AxisError

IMAGE, WIDTH = 9, 4
Body = Callable[["Deep", Tensor, Tensor, Tensor], Tensor]


class Deep(nn.Module):
    """A tower over `[prompts, rows, 4]` pixels whose features a test writes into a prompt."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.words, self.tower = body, nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        assert bool((ids == IMAGE).any()), "no image"  # asks for data: the trace follows its sample
        rows = self.tower(pixels).unsqueeze(1)
        features = functional.scaled_dot_product_attention(rows, rows, rows).squeeze(1)
        return {"out": self.body(self, self.words(ids), ids == IMAGE, features)}


def deepstack(self: Deep, states: Tensor, image: Tensor, features: Tensor) -> Tensor:
    """As Qwen3-VL adds features of several depths: reads the image's places, adds, writes back."""
    states = states.clone()
    local = states[image] + features.flatten(0, 1)
    states[image] = local
    return states * 2


def in_place(self: Deep, states: Tensor, image: Tensor, features: Tensor) -> Tensor:
    """Later readers see what was written, earlier ones what was there."""
    states = states.clone()
    before = states.sum(1)
    states[image] = features.flatten(0, 1)
    return states + before[:, None]


def update(self: Deep, states: Tensor, image: Tensor, features: Tensor) -> Tensor:
    """As Granite 4 Vision adds them: a scatter over a mask of what stood there and the features."""
    local = states[image] + features.flatten(0, 1)
    return states.masked_scatter(image[..., None], local.view(-1)) * 2


def learned(self: Deep, states: Tensor, image: Tensor, features: Tensor) -> Tensor:
    """One row over every placeholder."""
    states = states.clone()
    states[image] = self.words.weight[3]
    return states + features.mean(1, keepdim=True)


def sample(seed: int, mask: list[list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.tensor(mask, dtype=torch.bool)
    ids = torch.randint(0, IMAGE, places.shape, generator=generator).masked_fill(places, IMAGE)
    rows = max(int(places.sum()) // len(mask), 1)
    return {"ids": ids, "pixels": torch.randn(len(mask), rows, WIDTH, generator=generator)}


def lowered(body: Body, mask: list[list[int]], images: dict[tuple[int, int], str]) -> Program:
    program = pumer.capture(Deep(body).eval(), sample(0, mask))
    graph = program.module.graph
    marks = [node for node in graph.nodes if node.target is aten.embedding.default]
    lower_constant_places(graph, images, marks, sample(0, mask), masked_updates(graph))
    graph.eliminate_dead_code()
    graph.lint()
    program.module.recompile()
    return program


def left(program: Program) -> int:
    targets = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten.masked_scatter.default)
    return sum(node.target in targets for node in program.module.graph.nodes)


def agree(program: Program, body: Body, mask: list[list[int]]) -> None:
    model = Deep(body).eval()
    for seed in (0, 1):
        inputs = sample(seed, mask)
        with torch.no_grad():
            assert torch.equal(program.module(**inputs)["out"], model(**inputs)["out"])


ONE = [[0, 1, 1, 1, 0, 0]] * 2
TWO = [[0, 1, 1, 0, 1, 0]] * 2


@pytest.mark.parametrize("body", [deepstack, in_place, update, learned])
@pytest.mark.parametrize("mask", [ONE, TWO])
def test_slices_and_joins(body: Body, mask: list[list[int]]) -> None:
    blocks = {(1, 4): "prompt"} if mask is ONE else {(1, 3): "prompt", (4, 5): "prompt_2"}
    program = lowered(body, mask, blocks)
    assert left(program) == 0
    agree(program, body, mask)
    marked = [n.args[1] for n in program.module.graph.nodes if n.target is same_tokens]
    assert marked == ([] if body is learned else list(blocks.values()))


@settings(max_examples=12)
@given(row=st.lists(st.integers(0, 1), min_size=2, max_size=6).filter(any), batch=st.integers(1, 2))
def test_places_of_any_prompt(row: list[int], batch: int) -> None:
    starts = [i for i, one in enumerate(row) if one and not (i and row[i - 1])]
    stops = [i + 1 for i, one in enumerate(row) if one and not (i + 1 < len(row) and row[i + 1])]
    blocks = {block: f"prompt_{i}" for i, block in enumerate(zip(starts, stops, strict=True))}
    program = lowered(deepstack, [row] * batch, blocks)
    assert left(program) == 0
    agree(program, deepstack, [row] * batch)


def test_other_places_in_another_prompt_are_left() -> None:
    mask = [[0, 1, 1, 0], [1, 1, 0, 0]]
    program = lowered(deepstack, mask, {(1, 3): "prompt"})
    assert left(program) > 0
    agree(program, deepstack, mask)


def test_places_that_are_no_whole_image() -> None:
    message = r"writes features of the vision tower to places 1 to 3 of the prompt.*\(images stand at 1 to 2\)"
    with pytest.raises(AxisError, match=message):
        lowered(deepstack, ONE, {(1, 3): "prompt"})
    with pytest.raises(AxisError, match=r"\(images stand at none\)"):
        lowered(deepstack, ONE, {})


@pytest.mark.parametrize("mask", [ONE, [[0, 1, 1, 0], [1, 1, 0, 0]]])
def test_a_mask_of_other_places_is_left(mask: list[list[int]]) -> None:
    program = lowered(update, mask, {(1, 3): "prompt"})
    assert sum(node.target is aten.masked_scatter.default for node in program.module.graph.nodes) == 1
    agree(program, update, mask)


def test_a_scatter_of_something_else_is_left() -> None:
    def over(self: Deep, states: Tensor, image: Tensor, features: Tensor) -> Tensor:
        return states.masked_scatter(image[..., None], features) + states

    program = lowered(over, ONE, {(1, 4): "prompt"})
    assert left(program) == 1
    agree(program, over, ONE)


def test_places_that_add_up() -> None:
    def body(self: Deep, states: Tensor, image: Tensor, features: Tensor) -> Tensor:
        rows, places = image.nonzero(as_tuple=True)
        return states.clone().index_put_((rows, places), features.flatten(0, 1), accumulate=True)

    with pytest.raises(AxisError, match="adds up what it writes at places of a prompt"):
        lowered(body, ONE, {(1, 4): "prompt"})
