"""Where the image tokens of a prompt come from, read off views, cuts and joins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.axes import Dim
from pumer_compile.analysis.marks import visual_tokens, with_separators
from pumer_compile.analysis.prompts import lower_masked_scatter
from pumer_compile.errors import AxisError
from tests.support.talker import IMAGE, SCATTER, Talker

Mover = Callable[[Tensor, Tensor], Tensor]


class Mosaic(Talker):
    """Crops of 2 x 2 tokens; `move` puts them (and a learned separator) together before they fill placeholders."""

    def __init__(self, move: Mover, projector: nn.Module | None = None) -> None:
        super().__init__()
        self.move = move
        self.end = nn.Parameter(torch.randn(16))
        if projector is not None:
            self.projector = projector

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.move(self.projector(self.tower(pixel_values)), self.end)
        words = self.words(input_ids)
        prompt = words.masked_scatter((input_ids == IMAGE).unsqueeze(-1).expand_as(words), features)
        return {"logits": self.read(prompt, attention_mask)}


def side_by_side(x: Tensor, end: Tensor) -> Tensor:
    """Two crops as one picture of 2 x 4, read row by row."""
    return x.view(-1, 2, 2, 2, 16).permute(0, 2, 1, 3, 4).reshape(-1, 16)


def with_ends(x: Tensor, end: Tensor) -> Tensor:
    """The same, and a separator behind each row."""
    rows = x.view(-1, 2, 2, 2, 16).permute(0, 2, 1, 3, 4).reshape(-1, 2, 4, 16)
    ends = end.expand(rows.shape[0], 2, 1, 16)
    return torch.cat([rows, ends], 2).flatten(0, 2)


def prompts(image: int, batch: int = 2, crops: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (batch, 3 + image + 5), generator=generator)
    ids[:, 3 : 3 + image] = IMAGE
    pixels = torch.randn(batch * crops, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def mosaic(move: Mover, projector: nn.Module | None = None) -> Mosaic:
    torch.manual_seed(0)
    return Mosaic(move, projector).eval()


@pytest.mark.parametrize(("move", "image"), [(side_by_side, 8), (with_ends, 10)])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_computes_the_same(move: Mover, image: int, batch: int) -> None:
    model, inputs = mosaic(move), prompts(image, batch)
    whole = pumer.capture(model, inputs)
    prompt = lower_masked_scatter(whole.module, inputs)
    assert prompt is not None
    for arranged in (inputs, prompts(image, batch, seed=5)):
        with torch.no_grad():
            torch.testing.assert_close(prompt.module(**arranged)["logits"], model(**arranged)["logits"])
    targets = [n.target for n in prompt.module.graph.nodes]
    assert targets.count(SCATTER) == 0 and targets.count(visual_tokens) == 1
    assert targets.count(with_separators) == (1 if image == 10 else 0)


class ReadFirst(Mosaic):
    """Features that something reads before they fill placeholders: the model's check of their number, or an output."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.move(self.projector(self.tower(pixel_values)), self.end)
        largest = features.flatten().amax()
        words = self.words(input_ids)
        prompt = words.masked_scatter((input_ids == IMAGE).unsqueeze(-1).expand_as(words), features)
        return {"logits": self.read(prompt, attention_mask), "largest": largest}


@pytest.mark.parametrize(("move", "image"), [(side_by_side, 8), (with_ends, 10)])
def test_features_that_are_read_before_they_are_scattered(move: Mover, image: int) -> None:
    model, inputs = ReadFirst(move).eval(), prompts(image)
    prompt = lower_masked_scatter(pumer.capture(model, inputs).module, inputs)
    assert prompt is not None
    for given_inputs in (inputs, prompts(image, seed=5)):
        with torch.no_grad():
            found, wanted = prompt.module(**given_inputs), model(**given_inputs)
        torch.testing.assert_close(found["logits"], wanted["logits"])
        torch.testing.assert_close(found["largest"], wanted["largest"])


def test_where_each_place_comes_from() -> None:
    inputs = prompts(10)
    prompt = lower_masked_scatter(pumer.capture(mosaic(with_ends), inputs).module, inputs)
    assert prompt is not None
    (mark,) = prompt.marks
    assert mark.order == (0, 1, 4, 5, 2, 3, 6, 7)  # crop * 4 + token
    assert mark.crops == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert mark.origin == (0, 1, 2, 3, -1, 4, 5, 6, 7, -1)
    annotation = annotate(prompt.module)
    assert str(annotation.axis(Dim(mark.node, 1))) == "[crops_image:8]"
    assert str(annotation.axis(Dim(mark.prompted, 1))) == "[prompt_image:10]"


@torch.no_grad()
def votes_of(model: Mosaic, inputs: dict[str, Tensor]) -> Tensor:
    """What the class token of each of four crops gives its tokens, `[4, 4]`."""
    tower = model.tower
    x = torch.cat([tower.token.expand(4, -1, -1), tower.patch(inputs["pixel_values"]).flatten(2).transpose(1, 2)], 1)
    before, last = tower.layers[0](x, None), tower.layers[1]
    q, k = (f(before).view(4, 5, 4, 4).transpose(1, 2) for f in (last.q, last.k))
    votes: Tensor = (q @ k.transpose(-1, -2) / 2.0).softmax(-1).mean(1)[:, 0, 1:]
    return votes


@pytest.mark.parametrize(
    ("move", "image", "budget"),
    [(side_by_side, 8, 1), (side_by_side, 8, 3), (with_ends, 10, 1), (with_ends, 10, 3), (with_ends, 10, 4)],
)
def test_what_is_kept_is_in_the_order_of_the_prompt(move: Mover, image: int, budget: int) -> None:
    model, inputs = mosaic(move), prompts(image)
    found = pumer.reduce(pumer.capture(model, inputs), Schedule(method="vispruner", budget=budget, important=1.0))
    with torch.no_grad():
        votes = votes_of(model, inputs)
        image_tokens = model.projector(model.tower(inputs["pixel_values"])).view(2, 8, 16)
        rows = []
        for row in range(2):
            kept = {4 * c + int(t) for c in range(2) for t in votes[2 * row + c].argsort(descending=True)[:budget]}
            rows.append(image_tokens[row, [n for n in (0, 1, 4, 5, 2, 3, 6, 7) if n in kept]])
        words = model.words(inputs["input_ids"])
        prompt = torch.cat([words[:, :3], torch.stack(rows), words[:, -5:]], 1)
        wanted = model.read(prompt, torch.ones(prompt.shape[:2]))
        torch.testing.assert_close(found.module(**inputs)["logits"], wanted, atol=1e-5, rtol=1e-4)


# Crops, tokens of each as many as heads, as the head size, as the batch; any cut of their picture.
@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.booleans(),
    st.integers(1, 4),
)
def test_any_cut_of_a_picture(high: int, wide: int, cut: int, ends: bool, budget: int) -> None:
    crops = high * wide
    cut = min(cut, 2 * high - 1)

    def move(x: Tensor, end: Tensor) -> Tensor:
        grid = x.view(-1, high, wide, 2, 2, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 2 * high, 2 * wide, 16)[:, cut:]
        stop = end.expand(grid.shape[0], grid.shape[1], 1, 16)
        return (torch.cat([grid, stop], 2) if ends else grid).reshape(-1, 16)

    rows = 2 * high - cut
    inputs = prompts(rows * (2 * wide + ends), batch=2, crops=crops)
    captured, wanted = (
        pumer.capture(mosaic(move), inputs),
        Schedule(method="vispruner", budget=budget, important=0.5),
    )
    shown = [min(4, 2 * max(0, min(2, 2 * (row + 1) - cut))) for row in range(high) for _ in range(wide)]
    kept = sum(min(budget, tokens) for tokens in shown)
    found = pumer.reduce(captured, wanted)
    with torch.no_grad():
        assert found.module(**inputs)["logits"].shape[1] == 8 + kept
    assert sum(found.plan.sites[0].before.values()) == sum(shown)


# --- reduced where they enter the prompt --------------------------------------------------------------------------


def swapped_in_the_second(x: Tensor, end: Tensor) -> Tensor:
    return torch.cat([x[0], x[1], x[3], x[2]])


def blurred(x: Tensor, end: Tensor) -> Tensor:
    return ((x + x.roll(1, 0)) / 2).reshape(-1, 16)


class Placed(nn.Module):
    """A projector that adds what depends on the place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.places = nn.Linear(16, 16), nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.first(x) + self.places
        return projected


def by_line(prompt: int) -> list[list[tuple[int, int]]]:
    """Of two crops side by side, read row by row: crop and token of each place."""
    return [[(2 * prompt + n // 4, n % 4)] for n in (0, 1, 4, 5, 2, 3, 6, 7)]


CROPS = ((0, 1, 2, 3), (4, 5, 6, 7))
LINES = ((0, 1, 4, 5), (2, 3, 6, 7))
# What every row of both prompts is made of, and the rows that share a budget.
ROWS: dict[str, tuple[Mover, nn.Module | None, list[list[list[tuple[int, int]]]], tuple[tuple[int, ...], ...]]] = {
    "crops in another order": (
        swapped_in_the_second,
        None,
        [[[(crop, t)] for crop in pair for t in range(4)] for pair in ((0, 1), (3, 2))],
        CROPS,
    ),
    "means over crops": (
        blurred,
        None,
        [[[(crop, t), ((crop - 1) % 4, t)] for crop in pair for t in range(4)] for pair in ((0, 1), (2, 3))],
        (tuple(range(8)),),
    ),
    "a projector that knows places": (side_by_side, Placed(), [by_line(0), by_line(1)], LINES),
    "two blocks": (side_by_side, None, [by_line(0), by_line(1)], LINES),
}


@pytest.mark.parametrize("budget", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_reduced_where_they_enter_the_prompt(name: str, budget: int) -> None:
    move, projector, members, groups = ROWS[name]
    model, inputs = mosaic(move, projector), prompts(8)
    if name == "two blocks":  # a word in the middle of the image
        inputs["input_ids"][:, 2], inputs["input_ids"][:, 6] = IMAGE, 1
    found = pumer.reduce(pumer.capture(model, inputs), Schedule(method="vispruner", budget=budget, important=1.0))
    kept_by_seed = []
    for seed in (0, 5):
        inputs["pixel_values"] = prompts(8, seed=seed)["pixel_values"]
        votes = votes_of(model, inputs)
        with torch.no_grad():
            rows = model.move(model.projector(model.tower(inputs["pixel_values"])), model.end).view(2, 8, 16)
            words, parts, kept = model.words(inputs["input_ids"]), [], []
            for prompt in range(2):
                got = torch.stack([torch.stack([votes[at] for at in row]).mean() for row in members[prompt]])
                stay = {g[int(i)] for g in groups for i in got[list(g)].topk(budget).indices}
                places = (inputs["input_ids"][prompt] == IMAGE).nonzero().flatten().tolist()
                filled = words[prompt].clone()
                filled[places] = rows[prompt]
                left = [p for p in range(16) if p not in places or places.index(p) in stay]
                parts.append(filled[left])
                kept.append(sorted(stay))
            wanted = model.read(torch.stack(parts), torch.ones(2, len(left)))
            torch.testing.assert_close(found.module(**inputs)["logits"], wanted, atol=1e-5, rtol=1e-4)
        kept_by_seed.append(kept)
    assert kept_by_seed[0] != kept_by_seed[1]


# --- refused ----------------------------------------------------------------------------------------------------


def twice(x: Tensor, end: Tensor) -> Tensor:
    return torch.cat([x.view(2, 8, 16), x.view(2, 8, 16)[:, :2]], 1).reshape(-1, 16)


def transposed(x: Tensor, end: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, 16)


class AcrossTokens(nn.Module):
    """A projector that looks at neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Linear(16, 16), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.first(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("move", "image", "projector", "words"),
    [
        (twice, 10, None, "at several places"),
        (transposed, 8, None, "mixed from parts of several tokens"),
        (side_by_side, 8, AcrossTokens(), "mixed from parts of several tokens"),
    ],
)
def test_what_is_refused(move: Mover, image: int, projector: nn.Module | None, words: str) -> None:
    inputs = prompts(image)
    with pytest.raises(AxisError, match=words):
        lower_masked_scatter(pumer.capture(mosaic(move, projector), inputs).module, inputs)
