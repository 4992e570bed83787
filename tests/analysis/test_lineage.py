"""Lineage against autograd: the tokens that a row is made of are those that it has a gradient for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

import pumer_compile as pumer
from pumer_compile.analysis.attention import attention_parts
from pumer_compile.analysis.lineage import Lineage, lineage
from pumer_compile.errors import AxisError

HEADS, WIDTH = 2, 8
Body = Callable[[Tensor], Tensor]


class Tower(nn.Module):
    """Self-attention over `[images, tokens, 8]`, and what a test does to its tokens on their way into a prompt."""

    def __init__(self, body: Body, mask: Tensor | None = None) -> None:
        super().__init__()
        self.body, self.mask = body, mask
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"rows": self.body(self.attended(pixels))}

    def attended(self, pixels: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(pixels).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return mixed.transpose(1, 2).flatten(2)


def source_of(body: Body, images: int, tokens: int, mask: Tensor | None = None) -> fx.Node:
    torch.manual_seed(0)
    program = pumer.capture(Tower(body, mask).eval(), {"pixels": torch.randn(images, tokens, WIDTH)}, outputs=["rows"])
    (output,) = program.module.graph.find_nodes(op="output")
    (source,) = output.all_input_nodes
    return source


def lineage_of(body: Body, images: int, tokens: int, width: int, mask: Tensor | None = None) -> Lineage | None:
    return lineage(source_of(body, images, tokens, mask), width)


def by_gradient(body: Body, images: int, tokens: int, width: int) -> list[tuple[int, ...]]:
    """Of every row, the tokens of the attention that it changes with."""
    attended = torch.randn(images, tokens, WIDTH, requires_grad=True)
    rows = body(attended).reshape(-1, width)
    found = []
    for row in rows:
        # Numbers of any sign: a sum of them may not cancel out.
        (gradient,) = torch.autograd.grad((row * torch.randn_like(row)).sum(), attended, retain_graph=True)
        found.append(tuple(gradient.reshape(-1, WIDTH).abs().sum(1).nonzero().flatten().tolist()))
    return found


# --- chains of what models do to tokens -------------------------------------------------------------------------------


class Chain:
    """Steps drawn at random for a grid of tokens `[images, height, width, features]`."""

    def __init__(self, draw: Callable[..., object], images: int, height: int, across: int) -> None:
        self.steps: list[Body] = []
        self.images, self.height, self.across, self.features = images, height, across, WIDTH
        for name in draw(st.lists(st.sampled_from(sorted(self.KINDS)), max_size=4)):  # type: ignore[attr-defined]
            getattr(self, name)(draw)

    KINDS = ("project", "transpose", "unshuffle", "pool", "flip", "norm", "reorder", "stack")

    def __call__(self, attended: Tensor) -> Tensor:
        grid = attended.unflatten(1, (self.start[0], self.start[1]))
        for step in self.steps:
            grid = step(grid)
        return grid

    @classmethod
    def drawn(cls, draw: Callable[..., object], images: int, height: int, across: int) -> Chain:
        made = cls(draw, images, height, across)
        made.start = (height, across)
        return made

    start: tuple[int, int] = (0, 0)

    def project(self, draw: Callable[..., object]) -> None:
        layer = nn.Sequential(nn.Linear(self.features, 6), nn.GELU(), nn.Linear(6, WIDTH)).requires_grad_(False)
        self.features = WIDTH
        self.steps.append(layer)

    def norm(self, draw: Callable[..., object]) -> None:
        features = self.features
        self.steps.append(lambda x: functional.layer_norm(x, (features,)) + 0.5 * x)

    def transpose(self, draw: Callable[..., object]) -> None:
        self.height, self.across = self.across, self.height
        self.steps.append(lambda x: x.transpose(1, 2))

    def flip(self, draw: Callable[..., object]) -> None:
        self.steps.append(lambda x: x.flip(1))

    def reorder(self, draw: Callable[..., object]) -> None:
        order = draw(st.permutations(range(self.across)))
        self.steps.append(lambda x: x[:, :, torch.tensor(order)])

    def unshuffle(self, draw: Callable[..., object]) -> None:
        """Neighbours of 2 x 2 side by side in the width, as Qwen and InternVL fold them."""
        if self.height % 2 or self.across % 2:
            return
        self.height, self.across, self.features = self.height // 2, self.across // 2, 4 * self.features

        def fold(x: Tensor) -> Tensor:
            batch, height, across, features = x.shape
            x = x.view(batch, height // 2, 2, across // 2, 2, features).permute(0, 1, 3, 2, 4, 5)
            return x.reshape(batch, height // 2, across // 2, 4 * features)

        self.steps.append(fold)

    def pool(self, draw: Callable[..., object]) -> None:
        kernel = draw(st.sampled_from([n for n in (1, 2, 3) if self.height % n == 0 and self.across % n == 0]))
        assert isinstance(kernel, int)
        self.height, self.across = self.height // kernel, self.across // kernel
        self.steps.append(lambda x: functional.avg_pool2d(x.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1))

    def stack(self, draw: Callable[..., object]) -> None:
        """Every second row of the grid beside the one before it."""
        if self.height % 2:
            return
        self.height, self.features = self.height // 2, 2 * self.features
        self.steps.append(lambda x: torch.cat([x[:, ::2], x[:, 1::2]], -1))


@settings(max_examples=25)
@given(data=st.data(), images=st.integers(1, 2), height=st.integers(1, 4), across=st.integers(1, 4))
def test_the_gradient_of_random_chains(data: st.DataObject, images: int, height: int, across: int) -> None:
    """Sizes collide all the time: images, heads, rows, columns and folds are small numbers."""
    torch.manual_seed(0)
    chain = Chain.drawn(data.draw, images, height, across)
    wanted = by_gradient(chain, images, height * across, chain.features)
    found = lineage_of(chain, images, height * across, chain.features)
    assert found is not None and list(found.members) == wanted
    assert found.own == (0,) and len(found.deciding) == 1


# --- single operators -------------------------------------------------------------------------------------------------

WEIGHT = torch.randn(WIDTH, WIDTH, 3, 3)
ONE_EACH = [(i,) for i in range(8)]
ALONE: dict[str, Body] = {
    "nothing": lambda x: x,
    "a type": lambda x: x.double().float(),
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "a softmax over features": lambda x: x.softmax(-1) @ torch.ones(WIDTH, WIDTH),
    "a norm written out": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "a gate": lambda x: x * torch.sigmoid(x @ torch.ones(WIDTH, 1)),
    "a position": lambda x: x + torch.arange(8.0).view(1, 8, 1),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_token_by_itself(name: str) -> None:
    found = lineage_of(ALONE[name], 1, 8, WIDTH)
    assert found is not None and list(found.members) == ONE_EACH


def test_padding_and_separators_are_made_of_nothing() -> None:
    found = lineage_of(lambda x: functional.pad(x, (0, 0, 1, 2)), 1, 3, WIDTH)
    assert found is not None and found.members == ((), (0,), (1,), (2,), (), ())


def test_convolutions() -> None:
    def grid(x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, (4, 4))

    def strides(x: Tensor) -> Tensor:
        return functional.conv2d(grid(x), WEIGHT[:, :, :2, :2], stride=2).flatten(2).transpose(1, 2)

    found = lineage_of(strides, 1, 16, WIDTH)
    assert found is not None and found.members == ((0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))

    def neighbours(x: Tensor) -> Tensor:
        """It looks at neighbours and keeps the grid: a place stays made of its own token."""
        return functional.conv2d(grid(x), WEIGHT, padding=1).flatten(2).transpose(1, 2)

    found = lineage_of(neighbours, 1, 16, WIDTH)
    assert found is not None and list(found.members) == [(i,) for i in range(16)]


def test_convolutions_along_time() -> None:
    """Four frames of 2 x 2 places, two of them in every window; padding in front is made of nothing."""

    def films(x: Tensor) -> Tensor:
        grid = functional.pad(x.transpose(1, 2).unflatten(2, (4, 2, 2)), (1, 1, 1, 1, 1, 0))
        weight = torch.randn(WIDTH, WIDTH, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        return functional.conv3d(grid, weight, stride=(2, 1, 1)).flatten(2).transpose(1, 2)

    found = lineage_of(films, 1, 16, WIDTH)
    assert found is not None and found.members == (
        *((place, 4 + place) for place in range(4)),
        *((4 + place, 8 + place, 12 + place) for place in range(4)),
    )

    def in_a_row(x: Tensor) -> Tensor:
        return functional.conv1d(x.transpose(1, 2), WEIGHT[:, :, 0], stride=3).transpose(1, 2)

    found = lineage_of(in_a_row, 1, 6, WIDTH)
    assert found is not None and found.members == ((0, 1, 2), (3, 4, 5))


def test_a_quantizer() -> None:
    """The nearest entry of a table, its number in another one, a line end, and what a third one has for it."""
    codes, numbers, words = torch.randn(5, WIDTH), torch.tensor([4, 3, 2, 1, 0]), torch.randn(6, WIDTH)

    def quantized(x: Tensor) -> Tensor:
        nearest = ((x.flatten(0, 1) ** 2).sum(1, keepdim=True) - 2 * x.flatten(0, 1) @ codes.T).argmin(1)
        lines = numbers[nearest.view(2, 3)]
        return functional.embedding(torch.cat([lines, torch.full((2, 1), 5)], 1).flatten(), words)

    found = lineage_of(quantized, 1, 6, WIDTH)
    assert found is not None and found.members == ((0,), (1,), (2,), (), (3,), (4,), (5,), ())


def test_norms_that_keep_the_grid() -> None:
    def normed(x: Tensor) -> Tensor:
        grid = functional.group_norm(x.transpose(1, 2).unflatten(2, (2, 4)), 2)
        grid = functional.batch_norm(grid, torch.zeros(WIDTH), torch.ones(WIDTH))
        return grid.flatten(2).transpose(1, 2)

    found = lineage_of(normed, 1, 8, WIDTH)
    assert found is not None and list(found.members) == ONE_EACH


RESIZED: dict[str, tuple[int, int, dict[str, object]]] = {
    "halved": (2, 3, {"mode": "bilinear"}),
    "an odd share": (3, 2, {"mode": "bilinear"}),
    "smoothed": (2, 2, {"mode": "bilinear", "antialias": True}),
    "larger": (5, 8, {"mode": "nearest"}),
    "cubic": (3, 4, {"mode": "bicubic"}),
}


@pytest.mark.parametrize("name", RESIZED)
def test_a_grid_that_is_resized(name: str) -> None:
    height, across, how = RESIZED[name]

    def resize(x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).unflatten(2, (4, 6))
        return functional.interpolate(grid, size=(height, across), **how).flatten(2).transpose(1, 2)  # type: ignore[arg-type]

    found = lineage_of(resize, 2, 24, WIDTH)
    assert found is not None and list(found.members) == by_gradient(resize, 2, 24, WIDTH)


def test_a_patch_merger_of_windows() -> None:
    def unfold(x: Tensor) -> Tensor:
        patches = functional.unfold(x.transpose(1, 2).unflatten(2, (4, 4)), 2, stride=2)
        return patches.transpose(1, 2)

    found = lineage_of(unfold, 1, 16, 4 * WIDTH)
    assert found is not None and found.members[0] == (0, 1, 4, 5) and found.members[3] == (10, 11, 14, 15)


# --- what is refused, and what decides --------------------------------------------------------------------------------


def test_no_attention_before_it() -> None:
    class Plain(nn.Module):
        def forward(self, pixels: Tensor) -> dict[str, Tensor]:
            return {"rows": pixels * 2}

    program = pumer.capture(Plain(), {"pixels": torch.randn(1, 3, WIDTH)})
    (source,) = next(iter(program.module.graph.find_nodes(op="output"))).all_input_nodes
    assert lineage(source, WIDTH) is None


def test_all_rows_of_all_tokens_tell_nothing_apart() -> None:
    def mixed(x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) + torch.arange(3.0).view(1, 3, 1)

    assert lineage_of(mixed, 1, 6, WIDTH) is None


def test_the_attention_before_one_that_mixes_everything() -> None:
    """Attention over channels makes every row of every token; the one before it says which places matter."""

    def channels(x: Tensor) -> Tensor:
        turned = x.transpose(1, 2).unsqueeze(1)
        mixed = functional.scaled_dot_product_attention(turned, turned, turned)
        return mixed.squeeze(1).transpose(1, 2)

    source = source_of(channels, 1, 6)
    assert len(attention_parts(source)) == 2
    found = lineage(source, WIDTH)
    assert found is not None and [tuple(m) for m in found.members] == [(i,) for i in range(6)]
    assert found.deciding[0].context in {p.context for p in attention_parts(source)}


REFUSED: dict[str, tuple[Body, str]] = {
    "an unknown operator": (lambda x: x.cumprod(1), "cumprod.*which tokens go into which of its results is not known"),
    "an order that is sorted": (lambda x: x[:, x.sum((0, 2)).argsort()], "argsort.*is not known"),
    "uneven pools": (
        lambda x: functional.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (2, 4)), (2, 3)).flatten(2),
        "pools image tokens in windows of several sizes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    body, message = REFUSED[name]
    with pytest.raises(AxisError, match=rf"(?s){message}") as caught:
        lineage_of(body, 1, 8, WIDTH)
    assert "test_lineage.py" in str(caught.value)


def test_places_that_are_data() -> None:
    class Ordered(Tower):
        def forward(self, pixels: Tensor, order: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"rows": self.attended(pixels)[:, order]}

    inputs = {"pixels": torch.randn(1, 4, WIDTH), "order": torch.tensor([3, 1, 0, 2])}
    program = pumer.capture(Ordered(lambda x: x).eval(), inputs)
    (source,) = next(iter(program.module.graph.find_nodes(op="output"))).all_input_nodes
    with pytest.raises(AxisError, match=r"moves image tokens to places that depend on data .*order"):
        lineage(source, WIDTH)


# --- images, tiles and frames -----------------------------------------------------------------------------------------


def test_images_in_the_batch_are_owners() -> None:
    found = lineage_of(lambda x: x.flatten(0, 1).unsqueeze(0), 3, 4, WIDTH)
    assert found is not None and found.owners() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.places() == [0, 1, 2, 3] * 3
    assert list(found.members) == [(i,) for i in range(12)]


@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3), additive=st.booleans())
@settings(max_examples=6)
def test_blocks_of_a_constant_mask_are_owners(sizes: list[int], additive: bool) -> None:
    """Images packed into one row, each attending to itself alone."""
    seen = torch.block_diag(*[torch.ones(n, n) for n in sizes]).bool()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min) if additive else seen
    found = lineage_of(lambda x: x, 1, sum(sizes), WIDTH, mask)
    assert found is not None
    assert found.owners() == [number for number, size in enumerate(sizes) for _ in range(size)]
