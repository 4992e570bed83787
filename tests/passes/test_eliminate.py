"""Dead tokens are not computed, whatever reads is given what it was given before, and nothing else changes.

Every narrowed graph is compared with the graph as captured, which computes everything.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from pumer_compile import Program, capture, reduce
from pumer_compile.analysis.dead_code import drop_dead
from pumer_compile.analysis.narrow import Range, narrowing
from pumer_compile.errors import PlanError
from pumer_compile.passes.eliminate import eliminate
from pumer_compile.passes.manager import State, run_passes
from pumer_compile.passes.pipeline import PASSES
from pumer_compile.reducers import reducers_of
from tests.support.fx_text import fx_text
from tests.support.helpers import count_op
from tests.support.models import Config, Fusion, highest, inputs_for, make, program, reduced, schedule
from tests.support.narrowing import compared, copy_of, last_layer, rows, same

aten = torch.ops.aten
BATCH, TOKENS, WIDTH = 2, 24, 64


class Reader(nn.Module):
    """An MLP of which a classifier reads one token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))[:, 0]


BEFORE = """\
%x -> [2, 24, 8]
%linear: linear(%x, up.weight, up.bias) -> [2, 24, 32]
%gelu: gelu(%linear) -> [2, 24, 32]
%linear_1: linear(%gelu, down.weight, down.bias) -> [2, 24, 8]
%select: select(%linear_1, 1, 0) -> [2, 8]
return %select"""
AFTER = """\
%x -> [2, 24, 8]
%slice: slice(%x, 1, 0, 1) -> [2, 1, 8]
%linear: linear(%slice, up.weight, up.bias) -> [2, 1, 32]
%gelu: gelu(%linear) -> [2, 1, 32]
%linear_1: linear(%gelu, down.weight, down.bias) -> [2, 1, 8]
%select: select(%linear_1, 1, 0) -> [2, 8]
return %select"""


def test_before_and_after() -> None:
    module = copy_of(capture(Reader(), {"x": torch.randn(2, 24, 8)}))
    assert fx_text(module) == BEFORE
    assert eliminate(module) == 3
    assert fx_text(module) == AFTER


# --- one operator after another -------------------------------------------------------------------------------------


class Between(nn.Module):
    """One linear layer, and what is read of it."""

    def __init__(self, body: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.body = nn.Linear(WIDTH, WIDTH), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.up(x))


def between(body: Callable[[Tensor], Any], tokens: int = TOKENS, dynamic: bool = False, batch: int = BATCH) -> Program:
    x = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    return capture(Between(body), {"x": x}, dynamic_batch=dynamic)


def attend(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), k.unsqueeze(1), **options).squeeze(1)


def gated(y: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    return (a * b.sigmoid())[:, 0]


def divided_heads(y: Tensor) -> Tensor:
    q, k = y.view(y.shape[0], TOKENS, 2, 4, WIDTH // 8).unbind(2)
    return (q * k)[:, 3]


FOLLOWED: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "select": (1, lambda y: y[:, 0]),
    "the last": (1, lambda y: y[:, -1]),
    "slice": (3, lambda y: y[:, 2:5]),
    "slice from the end": (2, lambda y: y[:, -2:]),
    "slice with steps": (7, lambda y: y[:, 1:10:3]),
    "slice of a slice": (1, lambda y: y[:, 2:9][:, 3]),
    "slice of a slice, cut": (2, lambda y: y[:, 2:9].tanh()[:, 3:5].tanh()),
    "whole slice": (1, lambda y: y[:, 0:TOKENS][:, 4]),
    "a hull": (3, lambda y: y[:, 1] + y[:, 3]),
    "a hull of slices": (5, lambda y: y[:, 1:3].sum(1) + y[:, 2:6].sum(1) * y[:, 4]),
    "pointwise": (1, lambda y: F.gelu(y * y + 1)[:, 0]),
    "an even broadcast": (1, lambda y: (y + y.new_ones(1, TOKENS, 1))[:, 0]),
    "a row of its own": (1, lambda y: (y * torch.linspace(0, 1, WIDTH))[:, 0]),
    "constants": (2, lambda y: (y * torch.full((TOKENS, 1), 0.5) + torch.zeros(1, TOKENS, 1))[:, 3:5]),
    "positions": (1, lambda y: (y * (torch.arange(TOKENS) / TOKENS).unsqueeze(-1))[:, 7]),
    "dtype": (1, lambda y: y.to(torch.float64)[:, 0]),
    "softmax of features": (1, lambda y: y.softmax(-1)[:, 0]),
    "norm of features": (1, lambda y: F.layer_norm(y, (WIDTH,))[:, 0]),
    "dropout at rest": (1, lambda y: F.dropout(y, 0.5, training=False)[:, 0]),
    "transpose": (1, lambda y: y.transpose(1, 2)[..., 0]),
    "permute": (1, lambda y: y.permute(1, 2, 0)[0]),
    "heads": (1, lambda y: y.view(y.shape[0], TOKENS, 4, -1).transpose(1, 2)[:, :, 0]),
    "heads and back": (
        2,
        lambda y: y.unflatten(2, (4, -1)).transpose(1, 2).contiguous().transpose(1, 2).flatten(2)[:, :2],
    ),
    "folded heads": (1, lambda y: y.view(2, TOKENS, 4, -1).transpose(1, 2).reshape(8, TOKENS, -1)[:, 5]),
    "new dimensions": (1, lambda y: y.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1)[:, 0]),
    "expand": (1, lambda y: y.unsqueeze(2).expand(-1, -1, 3, -1)[:, 0]),
    "expand with sizes": (1, lambda y: y.unsqueeze(2).expand(y.shape[0], TOKENS, 3, WIDTH)[:, 0]),
    "joined tokens": (1, lambda y: torch.cat([y.new_zeros(y.shape[0], 1, WIDTH), y], 1)[:, 1]),
    "two joined parts": (3, lambda y: torch.cat([y.new_zeros(y.shape[0], 2, WIDTH), y], 1)[:, 1:5]),
    "joined features": (1, lambda y: torch.cat([y, y.tanh()], -1)[:, 0]),
    "half of each head, turned": (
        1,
        lambda y: (torch.cat([-y[..., WIDTH // 2 :], y[..., : WIDTH // 2]], -1) * 0.5 + y)[:, 3],
    ),
    "every third feature": (2, lambda y: y[:, :, 1::3].tanh()[:, 4:6]),
    "stack": (1, lambda y: torch.stack([y, y.tanh()], 2)[:, 0]),
    "chunk": (1, gated),
    "split": (2, lambda y: torch.cat(y.split([3, WIDTH - 3], -1)[::-1], -1)[:, 4:6]),
    "unbind": (1, divided_heads),
    "mean of features": (1, lambda y: y.mean(-1)[:, 0]),
    "where": (1, lambda y: torch.where(y > 0, y, 0.5 * y)[:, 0]),
    "masked_fill": (1, lambda y: y.masked_fill(y > 0, 0.0)[:, 0]),
    "product": (1, lambda y: (y @ torch.ones(WIDTH, 3))[:, 0]),
    "einsum": (1, lambda y: torch.einsum("bnd,de->bne", y, torch.ones(WIDTH, 3))[:, 0]),
    "queries": (1, lambda y: attend(y, torch.ones(y.shape[0], 5, WIDTH))[:, 0]),
    "queries with a mask": (
        1,
        lambda y: attend(y, torch.ones(y.shape[0], 5, WIDTH), attn_mask=torch.eye(TOKENS, 5))[:, 0],
    ),
}


# Whatever works along the tokens, reads them all, or may change them; and what would cost more than it saves.
LEFT: dict[str, Callable[[Tensor], Any]] = {
    "all are an output": lambda y: (y, y[:, 0]),
    "mean of tokens": lambda y: y.mean(1) + y[:, 0],
    "two dimensions": lambda y: y[:, 0].sum(-1, keepdim=True) + y[:, :, 0].sum(-1, keepdim=True),
    "first and last": lambda y: y[:, 0] + y[:, -1],
    "softmax of tokens": lambda y: y.softmax(1)[:, 0],
    "cumsum": lambda y: y.cumsum(1)[:, 0],
    "norm of tokens": lambda y: F.layer_norm(y, (TOKENS, WIDTH))[:, 0],
    "flip": lambda y: y.flip(1)[:, 0],
    "roll": lambda y: y.roll(1, 1)[:, 0],
    "sort": lambda y: y.sort(1).values[:, 0],
    "flattened": lambda y: y.reshape(y.shape[0], TOKENS * WIDTH)[:, 0],
    "regrouped": lambda y: y.reshape(y.shape[0], 3, TOKENS // 3, WIDTH)[:, 0],
    "repeated": lambda y: y.repeat(1, 2, 1)[:, 0],
    "stacked tokens": lambda y: torch.stack([y, y], 0)[0],
    "divided tokens": lambda y: y.split(4, 1)[0].tanh() + y.split(4, 1)[2],
    "by index": lambda y: y[torch.arange(y.shape[0]), y.sum(-1).argmax(-1)],
    "squeezed when it is 1": lambda y: y.squeeze()[:, 0],
    "features": lambda y: y[..., 0] + y[..., 2],
    "half of the features, of all tokens": lambda y: y[..., :8].sum(1) + y[:, 0, :8],
    "features of tokens": lambda y: y[..., 0] + y[:, 0, 0].unsqueeze(-1),
    "causal": lambda y: attend(y, torch.ones(y.shape[0], TOKENS, WIDTH), is_causal=True)[:, 0],
    "other dtypes joined": lambda y: torch.cat([torch.zeros(2, 1, WIDTH, dtype=torch.int64), y], 1)[:, 3],
    "changed in place": lambda y: y.add_(1)[:, 0],
    "changed through a view": lambda y: y[:, 0].add_(1) + y[:, 0],
    "changed through a view, read elsewhere": lambda y: torch.cat([y[:, :1], y[:, 0].mul_(2).unsqueeze(1)], 1),
    "dearer than the work": lambda y: y[:, 1:],
}


# What has a size in it also with an open batch.
OPENED = [
    "select",
    "slice from the end",
    "a hull",
    "an even broadcast",
    "transpose",
    "heads",
    "heads and back",
    "expand with sizes",
    "two joined parts",
    "stack",
    "split",
    "unbind",
    "queries",
    "queries with a mask",
]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*((name, False) for name in FOLLOWED), *((name, True) for name in OPENED)],
    ids=[*(f"{name}-static" for name in FOLLOWED), *(f"{name}-symbolic" for name in OPENED)],
)
def test_what_is_not_read_is_not_computed(name: str, dynamic: bool) -> None:
    wanted, body = FOLLOWED[name]
    captured = between(body, dynamic=dynamic)
    assert rows(captured.module)[0] == TOKENS
    result = compared(captured, batch=3 if dynamic else None)
    assert rows(result.module)[0] == wanted
    assert result.plan.multiply_adds_before - result.plan.multiply_adds_after >= (TOKENS - wanted) * WIDTH**2


@pytest.mark.parametrize("name", LEFT)
def test_what_is_read_or_not_understood_stays(name: str) -> None:
    captured = between(LEFT[name])
    with pytest.raises(PlanError, match="found nothing to leave out"):
        reduce(captured, "lossless")


def changed_behind(y: Tensor) -> Tensor:
    same = y.clone()
    y.add_(1)
    return (same @ torch.ones(WIDTH, 2 * WIDTH))[:, 0]


def changed_beside(y: Tensor) -> Tensor:
    same = y.clone()
    y.view(y.shape[0], TOKENS, 4, -1).add_(1)
    return (same @ torch.ones(WIDTH, 2 * WIDTH))[:, 0]


@pytest.mark.parametrize("body", [changed_behind, changed_beside])
def test_a_second_name_of_what_is_changed_stays_one(body: Callable[[Tensor], Tensor]) -> None:
    """`contiguous` gives a value itself, which is changed with it; of a part it would give a copy, as it was before."""
    captured = between(body)
    module = copy_of(captured)
    for node in module.graph.find_nodes(op="call_function", target=aten.clone.default):
        node.target = aten.contiguous.default  # tracing leaves out what does nothing
    module.recompile()
    inputs = dict(captured.inputs)
    with torch.no_grad():
        expected = module(**inputs)
        assert (expected - captured.module(**inputs)).abs().max() > 0.1
        eliminate(module)
        torch.testing.assert_close(module(**inputs), expected, atol=1e-4, rtol=0)


# Colliding sizes: tokens as many as features, as heads, as samples; one sample.
@pytest.mark.parametrize(("tokens", "batch"), [(WIDTH, 2), (4, 4), (WIDTH, WIDTH), (4, 1)])
@pytest.mark.parametrize("name", ["select", "transpose", "permute", "joined features", "chunk"])
def test_colliding_sizes_of_one_operator(name: str, tokens: int, batch: int) -> None:
    result = compared(between(FOLLOWED[name][1], tokens, batch=batch))
    assert rows(result.module) == [1]


def test_a_product_with_itself_is_read_whole() -> None:
    """Rows and columns of one value, in one operator."""
    captured = between(lambda y: torch.matmul(y, y)[:, 0], tokens=WIDTH)
    with pytest.raises(PlanError):
        reduce(captured, "lossless")


@pytest.mark.parametrize("target", [aten.matmul.default, aten.scaled_dot_product_attention.default])
def test_one_query_reads_every_key(target: Any) -> None:
    fused = target is aten.scaled_dot_product_attention.default
    body = (lambda y: attend(y, y)[:, 0]) if fused else (lambda y: (y @ y.transpose(1, 2))[:, 0])
    module = compared(between(body)).module
    assert rows(module) == [TOKENS]
    assert rows(module, target, dim=-2) == [1]


def test_a_squeeze_keeps_the_tokens_that_are_left() -> None:
    result = compared(between(lambda y: y.squeeze()[:, 2:4]))
    assert rows(result.module) == [2]


def test_what_nothing_reads_goes() -> None:
    """A part that no output needs, and a fused attention that fx takes for random."""

    def body(y: Tensor) -> Tensor:
        attend(y, y)
        return torch.cat([torch.zeros(BATCH, 3, WIDTH), y], 1)[:, :2].tanh()

    result = compared(between(body))
    assert count_op(result.module, aten.linear.default) == 0
    assert count_op(result.module, aten.scaled_dot_product_attention.default) == 0
    assert result.plan.multiply_adds_after == 0


def test_a_part_that_others_read_stays() -> None:
    """Cutting the join alone would save nothing."""
    captured = between(lambda y: (torch.cat([torch.zeros(BATCH, 3, WIDTH), y], 1)[:, :2].tanh(), y))
    with pytest.raises(PlanError):
        reduce(captured, "lossless")


def test_random_attention_is_not_dropped() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x, None, 0.5))
    graph.call_function(aten.scaled_dot_product_attention.default, (x, x, x))
    graph.output(x)
    drop_dead(graph)
    (left,) = (n for n in graph.nodes if n.op == "call_function")
    assert left.args[4] == 0.5


def test_causal_queries_stay_and_what_follows_goes() -> None:
    class Causal(Between):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.down = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(attend(self.up(x), x, is_causal=True))[:, -1]

    x = torch.randn(BATCH, TOKENS, WIDTH)
    result = compared(capture(Causal(), {"x": x}))
    assert rows(result.module) == [TOKENS, 1]


def test_grouped_heads_are_narrowed_along_the_queries_alone() -> None:
    def heads(y: Tensor, count: int) -> Tensor:
        return y.unflatten(2, (count, -1)).transpose(1, 2)

    def grouped(y: Tensor, memory: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(heads(y, 4), memory, memory, enable_gqa=True)

    class Grouped(Between):
        by_head = False

        def forward(self, x: Tensor) -> Tensor:
            memory = heads(x[..., : WIDTH // 2], 2)
            context = grouped(self.up(x), memory)
            return context[:, 1] if self.by_head else context[:, :, 0]

    model, x = Grouped(lambda y: y), torch.randn(BATCH, TOKENS, WIDTH)
    assert rows(compared(capture(model, {"x": x})).module) == [1]
    model.by_head = True
    with pytest.raises(PlanError):
        reduce(capture(model, {"x": x}), "lossless")


# --- encoders -------------------------------------------------------------------------------------------------------

ENCODERS = [
    Config(mask="none", layers=2),
    Config(mask="none", form="sdpa", norm="post", dynamic=True, layers=2),
    Config(mask="additive", dynamic=True, patch_mask=True, layers=2),
    Config(mask="bool", form="sdpa", dynamic=True, patch_mask=True, layers=2),
    Config(mask="expanded", norm="post", layers=2),
    Config(mask="expanded", form="sdpa", dynamic=True, layers=2),
    Config(text=8, layers=2),  # text = head size = heads x batch
    Config(text=4, grid=(4, 8), cls=False, layers=2, form="sdpa", mask="bool"),  # text = heads, image = width
    Config(text=5, grid=(2, 2), heads=5, width=25, batch=5, layers=2),  # text = image = heads = head size = batch
    Config(text=6, grid=(2, 3), cls=False, heads=2, width=12, layers=2, dynamic=True),  # text + image = width
    Config(batch=1, layers=2),  # every mask begins with 1
    Config(heads=1, width=8, text=8, form="sdpa", mask="bool", layers=2),  # text = width = head size
]


@pytest.mark.parametrize("config", ENCODERS, ids=str)
def test_the_last_layer_has_one_query(config: Config) -> None:
    captured = program(config)
    plan = compared(captured, batch=3 if config.dynamic else None).plan
    n = config.text + config.image
    saved = last_layer(n, n, config.width) - last_layer(n, 1, config.width)
    assert plan.multiply_adds_before - plan.multiply_adds_after == saved
    assert plan.sites == ()
    assert plan.tokens() == {}


def first_tokens(x: Tensor, text: int) -> Tensor:
    return x[:, 0] * x[:, text]


def test_tokens_of_both_streams_are_a_hull() -> None:
    config = Config(layers=2, head=first_tokens)
    plan = compared(program(config)).plan
    n, width = config.text + config.image, config.width
    saved = last_layer(n, n, width) - last_layer(n, config.text + 1, width)
    assert plan.multiply_adds_before - plan.multiply_adds_after == saved


def test_a_head_that_reads_every_token() -> None:
    config = Config(layers=2, head=highest)
    with pytest.raises(PlanError) as caught:
        reduce(program(config), "lossless")
    assert "`none`" in str(caught.value)


def test_operators_stay_as_many() -> None:
    captured = program(Config(layers=2, mask="expanded"))
    module = compared(captured).module
    for target in (aten.linear.default, aten.matmul.default, aten.softmax.int, aten.layer_norm.default):
        assert count_op(module, target) == count_op(captured.module, target) > 0
    width = Config.width
    linears = [tuple(n.meta["val"].shape) for n in module.graph.nodes if n.target is aten.linear.default]
    # Queries, keys, values, output projection and MLP of the last layer; the classifier.
    assert [shape[1] for shape in linears[6:12]] == [1, 32, 32, 1, 1, 1]
    assert linears[-1] == (2, 5)
    assert {shape[-1] for shape in linears[6:12]} == {width, 2 * width}
    # What was cut: the norm for the queries, the residual, rows of the mask.
    cuts = count_op(module, aten.slice.Tensor) - count_op(captured.module, aten.slice.Tensor)
    assert cuts == 3


def test_gradients_are_those_of_the_model() -> None:
    config = Config(layers=2)
    model, inputs = make(config), inputs_for(config)
    model(**inputs).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    result = reduce(capture(model, inputs), "lossless")
    result.module(**inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert set(result.module.state_dict()) == set(model.state_dict())


def test_the_captured_module_is_left_as_it_was() -> None:
    captured = program(Config(layers=2, mask="none"))
    code = captured.module.code
    result = reduce(captured, "lossless")
    assert captured.module.code == code
    assert {id(p) for p in result.module.parameters()} == {id(p) for p in captured.module.parameters()}


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Config, int, int]:
    """An encoder, its sizes as likely to be equal as not, and which of its tokens are read."""
    heads = draw(st.integers(1, 4))
    mask = draw(st.sampled_from(("none", "additive", "bool", "expanded")))
    config = Config(
        form=draw(st.sampled_from(("unfused", "sdpa"))),
        norm=draw(st.sampled_from(("pre", "post"))),
        mask=mask,
        patch_mask=mask != "none" and draw(st.booleans()),
        text=draw(st.integers(1, 8)),
        grid=(draw(st.integers(1, 4)), draw(st.integers(1, 4))),
        cls=draw(st.booleans()),
        heads=heads,
        width=heads * draw(st.integers(2, 8)),
        layers=draw(st.integers(1, 2)),
        batch=draw(st.integers(1, 4)),
        dynamic=draw(st.booleans()),
    )
    start = draw(st.integers(0, config.text + config.image - 1))
    return config, start, draw(st.integers(start + 1, config.text + config.image))


@given(stacks())
@settings(max_examples=12, phases=(Phase.explicit, Phase.generate))
def test_random_encoders(drawn: tuple[Config, int, int]) -> None:
    config, start, stop = drawn

    class Part(Fusion):
        def finish(self, x: Tensor, text: int) -> Tensor:
            return self.classify(self.last(x)[:, start:stop])

    captured = capture(make(config, kind=Part), inputs_for(config), dynamic_batch=config.dynamic)
    module = copy_of(captured)
    matches = eliminate(module)
    same(captured, module, dict(captured.inputs))
    if config.dynamic:
        same(captured, module, inputs_for(config, seed=4, batch=3))
    # Worth it where few are read, and never where all are.
    n = config.text + config.image
    assert matches > 0 or 4 * (stop - start) > n or config.width < 16
    assert matches == 0 or stop - start < n


# --- with reducers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sdpa", "unfused"])
@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
def test_reducers_read_whole_streams(semantics: str, form: str) -> None:
    """A site before the last layer: the same decisions and outputs with the pass as without it, at less cost."""
    config = Config(layers=2, mask="additive", form=form)
    states = []
    for left_out in (("absorb_single_query",), ("eliminate", "absorb_single_query")):
        captured = program(config)
        state = State(captured.module, schedule(semantics, (0,)), dict(captured.inputs), {})
        run_passes(state, tuple(step for step in PASSES if step.name not in left_out))
        states.append(state)
    inputs = inputs_for(config, seed=5)
    with torch.no_grad():
        with_pass, without = (s.reduced(**inputs) for s in states)
    torch.testing.assert_close(with_pass, without, atol=1e-6, rtol=0)
    expected, _ = reduced(make(config), inputs, {0: (0.2, 0.3, 0.25)}, semantics)
    torch.testing.assert_close(with_pass, expected.detach(), atol=1e-5, rtol=0)
    plans = [s.plan for s in states]
    n, width = sum(plans[0].layers["cross_modal.1"].values()), config.width
    saved = last_layer(n, n, width) - last_layer(n, 1, width)
    assert plans[1].multiply_adds_after - plans[0].multiply_adds_after == saved
    assert plans[0].multiply_adds_before == plans[1].multiply_adds_before
    assert plans[0].sites[0].multiply_adds[0] == plans[1].sites[0].multiply_adds[0]


def last_word(x: Tensor, text: int) -> Tensor:
    """A token that is not the first."""
    return x[:, text - 1]


def test_a_row_of_the_published_softmax_knows_its_number() -> None:
    """The only query left is of a masked word, which sees the key of its own number."""
    config = Config(layers=2, mask="additive", head=last_word)
    captured = program(config)
    narrowed = reduce(captured, schedule("reference", (0,), prune=0.2, merge={"image": 0.3, "text": 0}))
    state = State(captured.module, narrowed.schedule, dict(captured.inputs), {})
    run_passes(state, tuple(step for step in PASSES if step.name != "eliminate"))
    inputs = inputs_for(config, seed=5)
    assert inputs["attention_mask"][:, -1].tolist() == [1, 0]
    with torch.no_grad():
        found, expected = narrowed.module(**inputs), state.reduced(**inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    *_, softmax = (n for n in narrowed.module.graph.nodes if "published_softmax" in str(n.target))
    assert softmax.kwargs["first"] == config.text - 1 and softmax.meta["val"].shape[2] == 1
    again = narrowing(softmax, Range(2, 0, 1))  # as where its readers were narrowed once more
    assert again is not None and again.kwargs["first"] == config.text - 1


def test_a_site_that_nothing_reads_any_more_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Behind the last attention only token 0 is read, which reducers leave alone."""
    config = Config(layers=2, mask="none")
    with caplog.at_level(logging.WARNING, "pumer_compile"):
        result = reduce(program(config), schedule("safe", (0, 1), prune=0.3))
    assert [r.getMessage() for r in caplog.records] == [
        "Site cross_modal.1 has no effect: nothing reads the tokens it reduces. Leave it out."
    ]
    assert set(reducers_of(result.module)) == {"reducer.cross_modal_0.image"}
    first, second = result.plan.sites
    assert second.multiply_adds[1] == 0 < first.multiply_adds[1]
    alone = reduce(program(config), schedule("safe", (0,), prune=0.3))
    assert alone.plan.multiply_adds_after == result.plan.multiply_adds_after
    inputs = inputs_for(config)
    with torch.no_grad():
        torch.testing.assert_close(result.module(**inputs), alone.module(**inputs), atol=1e-6, rtol=0)
