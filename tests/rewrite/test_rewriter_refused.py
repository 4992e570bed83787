"""Heads that take tokens by position or sum them: refused after a reducer, fine on a stream that none touches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pumer_compile import capture
from pumer_compile.errors import AxisError, NoRuleError
from pumer_compile.reduce import reduce_graph
from tests.support.models import Config, Fusion, Head, inputs_for, make, program, schedule
from tests.support.walks import BASE, compared


def second_text(x: Tensor, text: int) -> Tensor:
    return x[:, 1]


def last_token(x: Tensor, text: int) -> Tensor:
    return x[:, -1]


def inside_text(x: Tensor, text: int) -> Tensor:
    return x[:, 1:3].mean(1)


def across_the_border(x: Tensor, text: int) -> Tensor:
    return x[:, text - 1 : text + 1].mean(1)


def without_first(x: Tensor, text: int) -> Tensor:
    return x[:, 1:].amax(1)


def every_second(x: Tensor, text: int) -> Tensor:
    return x[:, ::2].mean(1)


def grid(x: Tensor, text: int) -> Tensor:
    image = x[:, text:].transpose(1, 2)
    return image.view(x.shape[0], x.shape[2], 5, 5).amax(3).mean(2)


def running_sum(x: Tensor, text: int) -> Tensor:
    return x.cumsum(1).amax(1)


def position_of_largest(x: Tensor, text: int) -> Tensor:
    return x.argmax(1).to(x.dtype)


def largest_with_position(x: Tensor, text: int) -> Tensor:
    return x.max(1).values


def norm_over_tokens(x: Tensor, text: int) -> Tensor:
    return F.layer_norm(x, x.shape[1:]).amax(1)


def picked(x: Tensor, text: int) -> Tensor:
    return x.index_select(1, torch.tensor([0, 3])).mean(1)


def split_by_position(x: Tensor, text: int) -> Tensor:
    a, b = x.split([text + 1, x.shape[1] - text - 1], 1)
    return a.mean(1) + b.mean(1)


def weighted_sum(x: Tensor, text: int) -> Tensor:
    """Weights by position, summed with the tokens in one product."""
    return (torch.linspace(0, 1, x.shape[1]).view(1, 1, -1).expand(x.shape[0], -1, -1) @ x).squeeze(1)


def total(x: Tensor, text: int) -> Tensor:
    return x.sum(1)


def shares_of_others(x: Tensor, text: int) -> Tensor:
    """Divided by a sum over other numbers than these."""
    weights = x.mean(-1).sigmoid()
    return ((weights.tanh() / weights.sum(1, keepdim=True)).unsqueeze(1) @ x).squeeze(1)


def rolled(x: Tensor, text: int) -> Tensor:
    return (x * x.roll(1, 1)).amax(1)


def rolled_in_a_row(x: Tensor, text: int) -> Tensor:
    """Without dimensions, `roll` goes over everything in a row."""
    return (x * x.roll(1)).amax(1)


def turned(x: Tensor, text: int) -> Tensor:
    return (x * x.flip(1)).amax(1)


def ranked(x: Tensor, text: int) -> Tensor:
    return x.sort(1).values[:, 0]


def largest(x: Tensor, text: int) -> Tensor:
    return x.topk(3, 1).values.amax(1)


def in_blocks(x: Tensor, text: int) -> Tensor:
    """The best token of each of two blocks, as attention that chooses blocks of keys finds it."""
    block = x.shape[1] - 1
    filled = F.pad(x, (0, 0, 0, block - 1), value=-torch.inf)
    return filled.view(x.shape[0], 2, block, x.shape[2]).amax(2)[:, 0]


def padded(x: Tensor, text: int) -> Tensor:
    return F.pad(x, (0, 0, 1, 1)).amax(1)


def pooled_by_twos(x: Tensor, text: int) -> Tensor:
    return F.avg_pool1d(x.transpose(1, 2), 2).amax(2)


def convolved(x: Tensor, text: int) -> Tensor:
    weight = torch.linspace(-1, 1, x.shape[2] ** 2 * 3).view(x.shape[2], x.shape[2], 3).sin()
    return F.conv1d(x.transpose(1, 2), weight, padding=1).amax(2)


def triangle(x: Tensor, text: int) -> Tensor:
    return ((x @ x.transpose(1, 2) / 32).tril() @ x).amax(1)


def spread_of_tokens(x: Tensor, text: int) -> Tensor:
    return x.var(1)


def length_of_tokens(x: Tensor, text: int) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def constants_without_batch(x: Tensor, text: int) -> Tensor:
    return (x + torch.ones(x.shape[1], 1)).amax(1)


def positions(x: Tensor, text: int) -> Tensor:
    return (x * torch.arange(x.shape[1]).view(1, -1, 1)).amax(1)


def pairs_in_a_row(x: Tensor, text: int) -> Tensor:
    """Every token with every other: the same tokens on two dimensions of one reshape."""
    batch, n, _ = x.shape
    return ((x @ x.transpose(1, 2) / 32).flatten(1).view(batch, n, n) @ x).amax(1)


REFUSED: dict[Head, tuple[str, str]] = {
    second_text: ("select", "only the first token of a stream keeps its place"),
    last_token: ("select", "only the first token of a stream keeps its place"),
    inside_text: ("slice", "by position"),
    across_the_border: ("slice", "by position"),
    without_first: ("slice", "by position"),
    every_second: ("slice", "position by position"),
    grid: ("view", "grid is gone"),
    running_sum: ("cumsum", "position by position"),
    position_of_largest: ("argmax", "position by position"),
    largest_with_position: ("max", "position by position"),
    norm_over_tokens: ("layer_norm", "position by position"),
    picked: ("index_select", "position by position"),
    split_by_position: ("split", "position by position"),
    weighted_sum: ("matmul", "Nothing aligns a sum over tokens"),
    total: ("sum", "sums over the token axis"),
    shares_of_others: ("sum", "sums over the token axis"),
    rolled: ("roll", "position by position"),
    rolled_in_a_row: ("roll", "position by position"),
    turned: ("flip", "position by position"),
    ranked: ("sort", "position by position"),
    largest: ("topk", "position by position"),
    padded: ("pad", "position by position"),
    in_blocks: ("pad", "nothing in front of it can be reduced"),
    pooled_by_twos: ("avg_pool1d", "position by position"),
    convolved: ("conv1d", "position by position"),
    triangle: ("tril", "position by position"),
    spread_of_tokens: ("var", "position by position"),
    length_of_tokens: ("linalg_vector_norm", "position by position"),
    constants_without_batch: ("add", "cannot be aligned"),
    pairs_in_a_row: ("view", "grid is gone"),
    positions: ("mul", "integers of merged tokens have no mean"),
}


@pytest.mark.parametrize("head", REFUSED, ids=lambda h: h.__name__)
def test_positions_after_a_reducer_are_refused(head: Head) -> None:
    operator, says = REFUSED[head]
    config = dataclasses.replace(BASE, head=head, layers=1)
    with pytest.raises(AxisError) as caught:
        reduce_graph(program(config), schedule("paper", (0,)))
    message = str(caught.value)
    assert f"aten.{operator}" in message
    assert says in message
    assert "tests/support/models.py:" in message
    assert "\n" not in message
    assert not isinstance(caught.value, NoRuleError)


def of_text(head: Head) -> Head:
    """The head on the text alone."""

    def text_only(x: Tensor, text: int) -> Tensor:
        return head(x[:, :text], text - 2)

    text_only.__name__ = head.__name__
    return text_only


OF_TEXT = tuple(of_text(head) for head in REFUSED if head is not grid)


@pytest.mark.parametrize("head", OF_TEXT, ids=lambda h: h.__name__)
def test_positions_of_a_stream_that_is_not_reduced_are_fine(head: Head) -> None:
    found, expected, unreduced = compared(OF_TEXT, False, "paper", (4, 3, 0))
    name = head.__name__
    torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    if name != "position_of_largest":
        assert (unreduced[name] - expected[name]).abs().max() > 1e-3


def test_a_sum_is_divided_by_one_over_its_own_tokens() -> None:
    class Mixed(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.layers[0](self.embed(input_ids, pixel_values), None)
            return x[:, self.config.text :].sum(1) / attention_mask.sum(1, keepdim=True)

    config = Config(layers=1)
    with pytest.raises(AxisError, match="not divided by a sum over the same reduced tokens"):
        reduce_graph(capture(make(config, kind=Mixed), inputs_for(config)), schedule("paper", (0,), prune=4))


def test_what_was_before_a_reducer_is_not_changed_in_place() -> None:
    class Changed(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x, kept = self.layers[0](before, None), before.tanh()
            kept.add_(x)
            return kept.amax(1)

    config = Config(layers=1, mask="none")
    with pytest.raises(AxisError, match="changes its input in place"):
        reduce_graph(capture(make(config, kind=Changed), inputs_for(config)), schedule("paper", (0,), prune=4))
