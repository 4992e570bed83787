"""Sizes that follow the reducers: whatever stands behind a site computes what it would on fewer tokens.

Most tests are differential: the head of a small encoder does something with its tokens, written with `x.shape` in
PyTorch, and the reduced graph, in which these sizes were literals, must equal the head on tokens reduced by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pumer_compile import Schedule, capture
from pumer_compile.errors import AxisError, NoRuleError, PumerError
from pumer_compile.passes.annotate import annotate
from pumer_compile.passes.axes import Dim, Fixed, Product, Segment, Tokens
from pumer_compile.passes.emit import actions_after, actions_instead
from pumer_compile.passes.insert import cross_modal_layers, plan_insertions
from pumer_compile.passes.locate import locate, mask_kinds
from pumer_compile.passes.rewrite import Rewriter, Step
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import AlignAxis
from tests.helpers import combine, count_op
from tests.models import Config, Fusion, Head, inputs_for, make, program, reduced, reduced_states, schedule

aten = torch.ops.aten
BASE = Config(mask="none", layers=2)
SITES = {0: (0.2, 0.3, 0.25)}
TEXT, IMAGE, TEXT_AFTER, IMAGE_AFTER = 7, 25, 5, 12


def walk(config: Config, wanted: Schedule) -> tuple[Rewriter, fx.GraphModule]:
    """The rewriting pass alone."""
    module = program(config).module
    annotation = annotate(module)
    attentions = locate(module, annotation)
    insertions = plan_insertions(annotation, attentions, wanted)
    rewriter = Rewriter(module, annotation, mask_kinds(attentions), layers=cross_modal_layers(attentions))
    return rewriter, rewriter.run(actions_after(insertions), actions_instead(insertions))


# --- heads that follow ----------------------------------------------------------------------------------------------


def sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2]


def view_heads(x: Tensor, text: int) -> Tensor:
    b, n, d = sizes(x)
    y = x.view(b, n, 4, d // 4).permute(0, 2, 1, 3).softmax(2)
    return y.transpose(1, 2).reshape(b, n, d).mean(1)


def flat_batch(x: Tensor, text: int) -> Tensor:
    b, n, d = sizes(x)
    return x.reshape(b * n, d).softmax(-1).view(b, n, d).mean(1)


def flatten_unflatten(x: Tensor, text: int) -> Tensor:
    b, n, _ = sizes(x)
    return x.flatten(0, 1).softmax(-1).unflatten(0, (b, n)).mean(1)


def batch_and_heads(x: Tensor, text: int) -> Tensor:
    """Batched products of three dimensions, as in `nn.MultiheadAttention`."""
    b, n, d = sizes(x)
    y = x.view(b, n, 4, d // 4).transpose(1, 2).reshape(b * 4, n, d // 4)
    y = torch.bmm(torch.bmm(y, y.transpose(1, 2)).softmax(-1), y)
    return y.view(b, 4, n, d // 4).transpose(1, 2).reshape(b, n, d).mean(1)


def parts(x: Tensor, text: int) -> Tensor:
    return torch.cat([x[:, :text] * 2, x[:, text:].tanh()], 1).mean(1)


def swapped(x: Tensor, text: int) -> Tensor:
    y = torch.cat([x[:, text:], x[:, :text]], 1)
    return y[:, 0] + y[:, y.shape[1] - text]


def between_streams(x: Tensor, text: int) -> Tensor:
    a, b = x[:, :text], x[:, text:]
    return ((a @ b.transpose(1, 2)).softmax(-1) @ b).mean(1) + a[:, 0] + b.amax(1)


def expanded(x: Tensor, text: int) -> Tensor:
    b, n, d = sizes(x)
    return (x * torch.linspace(0.5, 1.5, d).view(1, 1, d).expand(b, n, d)).amax(1)


def constants(x: Tensor, text: int) -> Tensor:
    b, n, _ = sizes(x)
    x = x * torch.full((b, n, 1), 0.5) + torch.ones(1, n, 1) + torch.zeros(1, n, 1)
    return (x * x.new_ones(b, n, 1)).amax(1)


def self_similarity(x: Tensor, text: int) -> Tensor:
    return ((x @ x.transpose(1, 2)).softmax(-1) @ x).amax(1)


def einsums(x: Tensor, text: int) -> Tensor:
    weights = torch.einsum("bnd,bmd->bnm", x, x).softmax(-1)
    return torch.einsum("bnm,bmd->bnd", weights, x).amax(1)


def centred(x: Tensor, text: int) -> Tensor:
    return (x - x.mean(1, keepdim=True)).amax(1)


def repeated(x: Tensor, text: int) -> Tensor:
    return x.repeat(1, 1, 2).amax(1)[:, : x.shape[-1]]


def reduced_twice(x: Tensor, text: int) -> Tensor:
    return x.mean((1, 2)).unsqueeze(-1) + x.amax(1)


def stacked(x: Tensor, text: int) -> Tensor:
    return torch.stack([x, x.tanh()], 2).amax((1, 2))


def squeezed(x: Tensor, text: int) -> Tensor:
    return x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1).amin(1)


def from_the_end(x: Tensor, text: int) -> Tensor:
    return x[:, -x.shape[1] :].amax(1) + x[:, text - x.shape[1] :].amax(1)


def narrowed(x: Tensor, text: int) -> Tensor:
    return x.narrow(1, 0, x.shape[1]).amax(1)


def first_text(x: Tensor, text: int) -> Tensor:
    return x[:, 0]


def first_image(x: Tensor, text: int) -> Tensor:
    """The class token under `safe`."""
    return x[:, text]


def gathered_features(x: Tensor, text: int) -> Tensor:
    return x.index_select(2, torch.arange(x.shape[2]).flip(0)).amax(1)


def norm_and_dropout(x: Tensor, text: int) -> Tensor:
    return F.dropout(F.layer_norm(x, (x.shape[-1],)), 0.1, False).amax(1)


def chunked(x: Tensor, text: int) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([b, a], -1).amax(1)


HEADS: tuple[Head, ...] = (
    view_heads,
    batch_and_heads,
    parts,
    swapped,
    between_streams,
    expanded,
    constants,
    self_similarity,
    einsums,
    centred,
    repeated,
    reduced_twice,
    stacked,
    squeezed,
    from_the_end,
    first_text,
    first_image,
    gathered_features,
    norm_and_dropout,
    narrowed,
    chunked,
)

ALONE: tuple[Head, ...] = (flat_batch, flatten_unflatten)
"""Each in a model of its own, so that it fails by itself."""


class ManyHeads(Fusion):
    """Gives what every head gives, by name: one capture for all of them."""

    heads: tuple[Head, ...]

    def finish(self, x: Tensor, text: int) -> dict[str, Tensor]:
        x = self.last(x)
        return {head.__name__: head(x, text) for head in self.heads}


@functools.cache
def compared(
    heads: tuple[Head, ...], dynamic: bool, semantics: str, sites: tuple[Any, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by head: of the reduced graph, of the model reduced by hand, and of the unreduced model."""
    kind = type("Heads", (ManyHeads,), {"heads": heads})
    config = dataclasses.replace(BASE, dynamic=dynamic, mask="additive")
    model = make(config, kind=kind)
    captured = capture(model, inputs_for(config), dynamic_batch=dynamic)
    prune, image, text = sites
    wanted = schedule(semantics, (0,), prune=prune, merge={"image": image, "text": text})
    inputs = inputs_for(config, seed=7, batch=3 if dynamic else 2)
    with torch.no_grad():
        found = reduce_graph(captured, wanted)(**inputs)
        expected, _ = reduced(model, inputs, {0: sites}, semantics)
        return found, expected, model(**inputs)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("head", HEADS + ALONE, ids=lambda h: h.__name__)
def test_the_rest_of_the_model_follows(head: Head, dynamic: bool) -> None:
    heads = (head,) if head in ALONE else HEADS
    found, expected, unreduced = compared(heads, dynamic, "safe", SITES[0])
    name = head.__name__
    torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    # A reducer that does nothing would be seen.
    assert (unreduced[name] - expected[name]).abs().max() > 1e-3


# --- sums over tokens with a count that was a literal ---------------------------------------------------------------


def mean_by_shape(x: Tensor, text: int) -> Tensor:
    return x.sum(1) / x.shape[1]


def mean_of_text(x: Tensor, text: int) -> Tensor:
    return x[:, :text].sum(1) * (1 / text)


def root_of_count(x: Tensor, text: int) -> Tensor:
    return x.sum(1) / x.shape[1] ** 0.5


@pytest.mark.parametrize("head", [mean_by_shape, mean_of_text, root_of_count], ids=lambda h: h.__name__)
def test_a_count_in_the_arithmetic_follows_or_is_refused(head: Head) -> None:
    """A divisor that was the number of tokens is a plain number in the graph. It must not stay the old one."""
    config = dataclasses.replace(BASE, head=head, mask="additive")
    inputs = inputs_for(config)
    expected, _ = reduced(make(config), inputs, SITES, "safe")
    try:
        module = reduce_graph(program(config), schedule("safe", (0,)))
    except PumerError as error:
        assert "aten.sum" in str(error)
        return
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


class Pooled(Fusion):
    """Mean over real tokens, by the attention mask."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        x = self.layers[0](x, self.mask(x, attention_mask, None))
        weights = self.tokens_open(x, attention_mask, None).to(x.dtype)
        return (x * 0 + 1 * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


def test_masked_mean_pooling_stays_a_mean_or_is_refused() -> None:
    """The mean of ones is one, over however many tokens."""
    config = dataclasses.replace(BASE, mask="additive", layers=1)
    captured = capture(make(config, kind=Pooled), inputs_for(config))
    try:
        module = reduce_graph(captured, schedule("safe", (0,)))
    except PumerError as error:
        assert "sum" in str(error)
        return
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs_for(config)), torch.ones(2, config.width))


# --- heads that cannot follow ---------------------------------------------------------------------------------------


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


def repeated_tokens(x: Tensor, text: int) -> Tensor:
    return x.repeat_interleave(2, 1).amax(1)


def constants_without_batch(x: Tensor, text: int) -> Tensor:
    return (x + torch.ones(x.shape[1], 1)).amax(1)


def positions(x: Tensor, text: int) -> Tensor:
    return (x * torch.arange(x.shape[1]).view(1, -1, 1)).amax(1)


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
    rolled: ("roll", "position by position"),
    rolled_in_a_row: ("roll", "position by position"),
    turned: ("flip", "position by position"),
    ranked: ("sort", "position by position"),
    largest: ("topk", "position by position"),
    padded: ("pad", "position by position"),
    pooled_by_twos: ("avg_pool1d", "position by position"),
    convolved: ("conv1d", "position by position"),
    triangle: ("tril", "position by position"),
    spread_of_tokens: ("var", "position by position"),
    length_of_tokens: ("linalg_vector_norm", "position by position"),
    repeated_tokens: ("repeat_interleave", "position by position"),
    constants_without_batch: ("add", "cannot be aligned"),
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
    assert "tests/models.py:" in message
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


@pytest.mark.parametrize(
    ("semantics", "budgets", "fine"),
    [
        ("safe", {"prune": 4}, True),  # the class token is protected
        ("paper", {"merge": {"image": 4}}, True),  # token 0 never merges away
        ("paper", {"prune": 4}, False),  # the most salient token comes first
        ("reference", {"prune": 4}, True),  # the published code takes whatever comes first
    ],
)
def test_the_first_image_token_after_a_reducer(semantics: str, budgets: dict[str, Any], fine: bool) -> None:
    config = dataclasses.replace(BASE, head=first_image)
    if not fine:
        with pytest.raises(AxisError, match=r"aten\.select\.int.*takes position 7"):
            reduce_graph(program(config), schedule(semantics, (0,), **budgets))
        return
    module, inputs = reduce_graph(program(config), schedule(semantics, (0,), **budgets)), inputs_for(config)
    sites = {0: (budgets.get("prune", 0), budgets.get("merge", {}).get("image", 0), 0)}
    expected, _ = reduced(make(config), inputs, sites, semantics)
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


# --- values from before a reducer -----------------------------------------------------------------------------------


class Skip(Fusion):
    """Adds something that was there before the reducers to what comes after them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(1, config.text + config.image, config.width))

    old: Callable[[Skip, Tensor], Tensor]

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        before = self.embed(input_ids, pixel_values)
        x = before
        for layer in self.layers:
            x = layer(x, None)
        return (x + self.old(before)).amax(1)


OLD: dict[str, Callable[[Skip, Tensor], Tensor]] = {
    "features from before": lambda m, x: x.tanh(),
    "a table": lambda m, x: m.table,
    "a slice of a wider table": lambda m, x: m.table[:, : x.shape[1]] * 2,
    "one number for each token": lambda m, x: x.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_features_from_before_are_averaged(name: str, semantics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Skip, "old", OLD[name], raising=False)
    model, inputs = make(BASE, kind=Skip), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule(semantics, (0,)))
    states, _ = reduced_states(model, inputs, SITES, semantics)
    before = model.embed(**inputs)
    old = OLD[name](model, before).expand(2, -1, -1)
    expected = torch.stack([(s.x + combine(old[b], s.members)).amax(0) for b, s in enumerate(states)])
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected.float(), atol=1e-5, rtol=0)
    assert sum(isinstance(m, AlignAxis) for m in module.modules()) == 1


def test_maps_are_composed_over_several_reducers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning only: features from before two reducers are those of the tokens that survived both."""
    monkeypatch.setattr(Skip, "old", OLD["features from before"], raising=False)
    config = dataclasses.replace(BASE, layers=3)
    model, inputs = make(config, kind=Skip), inputs_for(config)
    module = reduce_graph(capture(model, inputs), schedule("paper", (0, 1), prune=6))
    first, _ = reduced_states(model, inputs, {0: (6, 0, 0)}, "paper")
    both, _ = reduced_states(model, inputs, {0: (6, 0, 0), 1: (6, 0, 0)}, "paper")
    before = model.embed(**inputs).tanh()
    rows = []
    for b, state in enumerate(both):
        members = [[first[b].members[i][0]] for (i,) in state.members]
        rows.append((state.x + combine(before[b], members)).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(rows).float(), atol=1e-5, rtol=0)


def test_positions_are_gathered_after_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    def places(model: Skip, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1]).view(1, -1, 1)

    monkeypatch.setattr(Skip, "old", places, raising=False)
    model, inputs = make(BASE, kind=Skip), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule("paper", (0,), prune=6))
    states, _ = reduced_states(model, inputs, {0: (6, 0, 0)}, "paper")
    expected = []
    for state in states:
        place = torch.tensor([[float(i)] for (i,) in state.members])
        expected.append((state.x + place).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected), atol=1e-5, rtol=0)
    with pytest.raises(AxisError, match="integers of merged tokens have no mean"):
        reduce_graph(capture(model, inputs), schedule("paper", (0,), merge={"text": 2}))


def test_flags_from_before_are_true_where_any_token_was() -> None:
    class Flagged(Skip):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            high = before.mean(-1, keepdim=True) > 0
            return torch.where(high, self.layers[1](self.layers[0](before, None), None), -9.0).amax(1)

    model, inputs = make(BASE, kind=Flagged), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule("paper", (0,)))
    states, _ = reduced_states(model, inputs, SITES, "paper")
    high = model.embed(**inputs).mean(-1) > 0
    expected = []
    for b, state in enumerate(states):
        keep = torch.tensor([[any(high[b, i] for i in group)] for group in state.members])
        expected.append(torch.where(keep, state.x, -9.0).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected), atol=1e-5, rtol=0)


def test_a_sum_over_tokens_from_before_and_after_is_refused() -> None:
    class Rollout(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x = self.layers[1](self.layers[0](before, None), None)
            return ((before @ before.transpose(1, 2)).sigmoid() @ x).amax(1)

    captured = capture(make(BASE, kind=Rollout), inputs_for(BASE))
    with pytest.raises(AxisError) as caught:
        reduce_graph(captured, schedule("paper", (0,)))
    message = str(caught.value)
    assert "aten.matmul.default" in message
    assert "before a reducer" in message
    assert "test_rewrite.py:" in message


@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_attention_to_tokens_from_before_sees_them_reduced(semantics: str) -> None:
    """The same with a softmax is a cross-modal attention, and there every use of a reduced stream sees the reduced
    one."""

    class Rollout(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x = self.layers[1](self.layers[0](before, None), None)
            return ((before @ before.transpose(1, 2) / 32).softmax(-1) @ x).amax(1)

    model, inputs = make(BASE, kind=Rollout), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule(semantics, (0,)))
    states, _ = reduced_states(model, inputs, SITES, semantics)
    before = model.embed(**inputs)
    expected = []
    for b, state in enumerate(states):
        old = combine(before[b], state.members).float()
        expected.append(((old @ old.T / 32).softmax(-1) @ state.x).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected), atol=1e-5, rtol=0)


def test_parts_from_before_and_after_are_not_joined() -> None:
    class Halves(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x = self.layers[1](self.layers[0](before, None), None)
            both = torch.cat([x[:, :7], before[:, 7:]], 1)
            return (both + x).amax(1)

    captured = capture(make(BASE, kind=Halves), inputs_for(BASE))
    inputs = inputs_for(BASE)
    model = make(BASE, kind=Halves)
    module = reduce_graph(captured, schedule("paper", (0,)))
    states, _ = reduced_states(model, inputs, SITES, "paper")
    before = model.embed(**inputs)
    expected = []
    for b, state in enumerate(states):
        old = combine(before[b], state.members)
        expected.append((torch.cat([state.x[: state.text], old[state.text :]]) + state.x).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected).float(), atol=1e-5, rtol=0)


# --- the walk -------------------------------------------------------------------------------------------------------


def test_the_captured_graph_is_left_as_it_was() -> None:
    captured = program(Config())
    code, names = captured.module.code, {n for n, _ in captured.module.named_modules()}
    walk(Config(), schedule())
    assert captured.module.code == code
    assert {n for n, _ in captured.module.named_modules()} == names


def test_nothing_before_the_first_site_changes() -> None:
    rewriter, module = walk(Config(), schedule("paper", (1,)))
    sites = locate(rewriter.source, rewriter.annotation)
    for node in rewriter.source.graph.nodes:
        new = rewriter.env[node]
        if node is sites[1].carrier:
            break
        assert new.target == node.target
        assert [a for a in new.args if not isinstance(a, fx.Node | list | tuple)] == [
            a for a in node.args if not isinstance(a, fx.Node | list | tuple)
        ]
    module.graph.lint()


def test_literals_follow() -> None:
    """`view` to heads after the site: the sequence length is the new one, everything else as it was."""
    rewriter, _ = walk(BASE, schedule("paper", (0,)))
    found = []
    for node in rewriter.source.graph.nodes:
        if node.target in (aten.view.default, aten.reshape.default):
            found.append((list(node.args[1]), list(rewriter.env[node].args[1])))
    old, image = TEXT + IMAGE, 14
    new = TEXT_AFTER + image
    assert ([2, old, 4, 8], [2, new, 4, 8]) in found
    assert ([2, old, 32], [2, new, 32]) in found
    assert rewriter.literals == sum(a != b for a, b in found)
    unchanged = [(a, b) for a, b in found if a == b]
    assert unchanged  # those of the layer before the site


def test_operator_counts() -> None:
    """The walk adds reducers and slices, and takes away nothing but what they replace."""
    before = program(BASE).module
    _, after = walk(BASE, schedule("paper", (0,)))
    for target in (aten.linear.default, aten.softmax.int, aten.matmul.default, aten.layer_norm.default):
        assert count_op(after, target) == count_op(before, target)
    modules = [n for n in after.graph.nodes if n.op == "call_module"]
    assert [str(n.target) for n in modules] == ["reducer.cross_modal_0.text", "reducer.cross_modal_0.image"] or [
        str(n.target) for n in modules
    ] == ["reducer.cross_modal_0.image", "reducer.cross_modal_0.text"]
    assert count_op(after, aten.cat.default) == count_op(before, aten.cat.default) + 1


def test_sizes_by_epoch() -> None:
    rewriter, _ = walk(BASE, schedule("paper", (0,)))
    text, learned, image = Segment("text", 7), Segment(None, 3), Segment("image", 25)
    axis = Tokens((text, learned, image))
    assert rewriter.size(axis, {}) == 35
    assert rewriter.size(axis, {"text": 1}) == 33
    assert rewriter.size(axis, {"text": 1, "image": 1}) == 5 + 3 + 14
    assert rewriter.size(Fixed(7), {"text": 1}) == 7
    assert rewriter.size(Product((Fixed(2), axis)), {"text": 1}) == 66
    assert rewriter.length(learned, {"text": 1}) == 3


def test_expected_shapes_follow_the_plan() -> None:
    rewriter, _ = walk(BASE, schedule("paper", (0,)))
    carrier = locate(rewriter.source, rewriter.annotation)[0].carrier
    assert rewriter.expected_shape(carrier) == [2, 19, 32]
    assert rewriter.at(Dim(carrier, 1)) == {"text": 1, "image": 1}
    assert rewriter.at(Dim(carrier, 2)) == {}
    steps = rewriter.steps["image"]
    assert [type(s) for s in steps] == [Step]
    assert (steps[0].after, steps[0].merged) == (14, True)


def test_new_nodes_say_where_they_come_from() -> None:
    _, module = walk(BASE, schedule("paper", (0,)))
    for node in module.graph.nodes:
        if node.op == "call_module":
            assert "tests/models.py" in node.meta["stack_trace"]


def test_parameters_are_shared_and_keep_their_names() -> None:
    captured = program(Config()).module
    module = reduce_graph(program(Config()), schedule("paper", (0,)))
    own = dict(module.named_parameters())
    assert own.keys() == dict(captured.named_parameters()).keys()
    for name, parameter in captured.named_parameters():
        assert own[name] is parameter
    assert set(module.state_dict()) == set(captured.state_dict())
