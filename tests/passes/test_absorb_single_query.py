"""Attention with one query computes no keys and no values, and nothing else changes.

Every reordered graph is compared with the graph as captured, in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import pumer_compile as pumer
from pumer_compile import Program, capture, reduce
from pumer_compile.analysis.cost import SMALL_PRODUCTS
from pumer_compile.analysis.nodes import values
from pumer_compile.analysis.propagate import propagate
from pumer_compile.passes.absorb_single_query import absorb_single_query
from pumer_compile.passes.manager import State, run_passes
from pumer_compile.passes.pipeline import COUNT, PASSES, passes_of
from pumer_compile.schedule import Schedule
from tests.support import commands
from tests.support.fx_text import fx_text
from tests.support.helpers import count_op
from tests.support.meter import meter_inputs, tiny_meter
from tests.support.models import Config, highest, inputs_for, make, program, schedule
from tests.support.narrowing import copy_of
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

aten = torch.ops.aten
BATCH, TOKENS, HEADS, SIZE = 2, 24, 4, 8
Views = Callable[[Tensor], Tensor]


class Attend(nn.Module):
    """Queries that are given, keys and values of given states."""

    def __init__(
        self, keys: Views, values: Views, heads: int = HEADS, size: int = SIZE, bias: bool = True, width: int = 20
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.k, self.v = (nn.Linear(width, heads * size, bias=bias) for _ in range(2))
        self.keys, self.values = keys, values

    def forward(self, x: Tensor, q: Tensor) -> Any:
        return (q @ self.keys(self.k(x))).softmax(-1) @ self.values(self.v(x))


class Scores(nn.Module):
    """The scores of one query, and the heads of a linear layer as its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(20, HEADS * SIZE, bias=False)

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        return q @ as_keys(self.k(x))


BEFORE = """\
%x -> [2, 24, 20]
%q -> [2, 4, 1, 8]
%linear: linear(%x, k.weight) -> [2, 24, 32]
%view: view(%linear, [2, 24, 4, -1]) -> [2, 24, 4, 8]
%transpose: transpose(%view, 1, 2) -> [2, 4, 24, 8]
%transpose_1: transpose(%transpose, -1, -2) -> [2, 4, 8, 24]
%matmul: matmul(%q, %transpose_1) -> [2, 4, 1, 24]
return %matmul"""
AFTER = """\
%x -> [2, 24, 20]
%q -> [2, 4, 1, 8]
%squeeze: squeeze(%q, 2) -> [2, 4, 8]
%view: view(k.weight, [4, 8, 20]) -> [4, 8, 20]
%transpose: transpose(%squeeze, 0, 1) -> [4, 2, 8]
%bmm: bmm(%transpose, %view) -> [4, 2, 20]
%transpose_1: transpose(%bmm, 0, 1) -> [2, 4, 20]
%transpose_2: transpose(%x, 1, 2) -> [2, 20, 24]
%bmm_1: bmm(%transpose_1, %transpose_2) -> [2, 4, 24]
%unsqueeze: unsqueeze(%bmm_1, 2) -> [2, 4, 1, 24]
return %unsqueeze"""


def test_before_and_after() -> None:
    module = copy_of(capture(Scores().double(), inputs()))
    assert fx_text(module) == BEFORE
    assert absorb_single_query(module) == 1
    assert fx_text(module) == AFTER


def as_values(y: Tensor, heads: int = HEADS) -> Tensor:
    return y.view(*y.shape[:2], heads, -1).transpose(1, 2)


def as_keys(y: Tensor, heads: int = HEADS) -> Tensor:
    return as_values(y, heads).transpose(-1, -2)


def inputs(
    batch: int = BATCH, tokens: int = TOKENS, heads: int = HEADS, size: int = SIZE, queries: int = 1, width: int = 20
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, q = (
        torch.randn(*n, generator=g, dtype=torch.float64)
        for n in ((batch, tokens, width), (batch, heads, queries, size))
    )
    return {"x": x, "q": q}


def attention(model: nn.Module | None = None, dynamic: bool = False, **sizes: int) -> Program:
    return capture((model or Attend(as_keys, as_values)).double(), inputs(**sizes), dynamic_batch=dynamic)


def compared(captured: Program, gradients: bool = True) -> tuple[int, fx.GraphModule]:
    """How many products are reordered, after outputs and gradients were compared."""
    module = copy_of(captured)
    count = absorb_single_query(module)
    module.graph.lint()
    given = dict(captured.inputs)
    results = []
    for m in (captured.module, module):
        out = m(**given)
        out = out if isinstance(out, tuple) else (out,)
        loss, wanted = sum(o.square().sum() for o in out), list(captured.module.parameters())
        grads = torch.autograd.grad(loss, wanted, allow_unused=True) if gradients else ()
        results.append(([o.detach() for o in out], [g for g in grads if g is not None]))
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)
    return count, module


# --- what is reordered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_neither_keys_nor_values_are_computed(bias: bool) -> None:
    captured = attention(Attend(as_keys, as_values, bias=bias))
    assert count_op(captured.module, aten.linear.default) == count_op(captured.module, aten.matmul.default) == 2
    count, module = compared(captured)
    assert count == 2
    assert count_op(module, aten.linear.default) == 0
    assert count_op(module, aten.bmm.default) == 4
    assert count_op(module, aten.matmul.default) == 0
    assert set(module.state_dict()) == set(captured.module.state_dict())
    largest = max(v.numel() for n in module.graph.nodes for v in values(n) if n.op == "call_function")
    assert largest <= BATCH * TOKENS * 20  # the states, transposed


KEYS: dict[str, Views] = {
    "transposed": as_keys,
    "permuted": lambda y: y.view(*y.shape[:2], HEADS, SIZE).permute(0, 2, 3, 1),
    "reshaped": lambda y: y.reshape(y.shape[0], TOKENS, HEADS, SIZE).permute(0, 2, 3, 1).contiguous(),
    "tokens last at once": lambda y: y.transpose(1, 2).reshape(y.shape[0], HEADS, SIZE, TOKENS),
    "by sample": lambda y: y.reshape(-1, HEADS * SIZE).view(y.shape[0], TOKENS, HEADS, SIZE).permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("name", KEYS)
def test_views_that_give_heads(name: str) -> None:
    model = Attend(KEYS[name], lambda y: KEYS[name](y).transpose(-1, -2))
    assert compared(attention(model))[0] == 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 8, "heads": 8, "size": 8, "batch": 8},  # all the same
        {"tokens": 8, "heads": 4, "size": 8, "batch": 2},  # tokens = head size = heads x batch
        {"tokens": 16, "heads": 1, "size": 16, "batch": 1},
        {"tokens": 20, "heads": 5, "size": 4, "batch": 4},  # tokens = heads x batch = width
    ],
)
def test_colliding_sizes(sizes: dict[str, int]) -> None:
    """Values whose head size is the number of tokens are taken for keys and left; they could be reordered."""
    heads, size = sizes["heads"], sizes["size"]
    keys, values_ = (lambda y, f=f: f(y, heads) for f in (as_keys, as_values))
    count, module = compared(attention(Attend(keys, values_, heads, size), **sizes))
    assert count == (1 if sizes["tokens"] == size else 2)
    assert count_op(module, aten.linear.default) == 2 - count


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))))
@pytest.mark.parametrize("tokens", [8, 24])
def test_only_one_order_of_heads_is_right(order: tuple[int, ...], tokens: int) -> None:
    """Tokens, heads and head size may be 8 each, and every order fits both products. Two are right: that of keys, and
    that of values, which then is that of keys in the product with values."""

    def ordered(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], 8, 8).permute(0, *order)

    sizes = {"tokens": tokens, "heads": 8, "size": 8}
    if tokens == 8 or order in ((2, 3, 1), (3, 2, 1)):
        count, _ = compared(attention(Attend(ordered, lambda y: ordered(y).transpose(-1, -2), 8, 8), **sizes))
        right = order in ((2, 3, 1), (2, 1, 3))
        assert count == (0 if not right else 1 if tokens == 8 else 2)


@pytest.mark.parametrize(
    "after",
    [
        lambda c: c.transpose(1, 2).view(c.shape[0], 1, -1),
        lambda c: c.view(c.shape[0], -1),
        lambda c: c.view(-1, SIZE) + 1,
        lambda c: c.transpose(1, 2).reshape(c.shape[0], 1, -1).tanh(),
    ],
)
def test_what_follows_may_view_the_product(after: Views) -> None:
    class Viewed(Attend):
        def forward(self, x: Tensor, q: Tensor) -> Tensor:
            return after(super().forward(x, q))

    assert compared(attention(Viewed(as_keys, as_values)))[0] == 2


def test_new_operators_know_their_values_and_where_they_come_from() -> None:
    captured = attention()
    module = copy_of(captured)
    absorb_single_query(module)
    given = {str(n.target): values(n)[0] for n in module.graph.nodes if n.op == "placeholder"}
    found = propagate(module, given)
    for node in module.graph.nodes:
        if node.op == "call_function":
            assert node.meta["stack_trace"] and "nn_module_stack" in node.meta
            (value,) = values(node)
            assert (value.shape, value.dtype) == (found[node].shape, found[node].dtype)


# --- what is not ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [2, TOKENS])
def test_more_queries_stay(queries: int) -> None:
    assert compared(attention(queries=queries))[0] == 0


@pytest.mark.parametrize("tokens", [9, 16, 17, 64])
def test_few_tokens_stay(tokens: int) -> None:
    """What is saved must be worth smaller products."""
    pays = tokens * SIZE > SMALL_PRODUCTS * (tokens + SIZE)
    assert compared(attention(tokens=tokens))[0] == (2 if pays else 0)


def grouped(y: Tensor) -> Tensor:
    """One head of keys for all."""
    return y[..., :SIZE].view(BATCH, TOKENS, 1, SIZE).permute(0, 2, 3, 1)


# Of keys; values are always reordered.
LEFT: dict[str, Views] = {
    "heads inside": lambda y: y.view(BATCH, TOKENS, SIZE, HEADS).permute(0, 3, 2, 1),
    "tokens and heads not parted": lambda y: y.view(BATCH, HEADS, SIZE, TOKENS),
    "tokens and heads mixed": lambda y: y.view(BATCH, HEADS, TOKENS, SIZE).transpose(-1, -2),
    "samples mixed": lambda y: y.view(TOKENS, BATCH, HEADS, SIZE).permute(1, 2, 3, 0),
    "flipped": lambda y: as_keys(y).flip(-1),
    "rolled": lambda y: as_keys(y).roll(1, -1),
    "scaled": lambda y: as_keys(y) * 2,
    "positions": lambda y: as_keys(y + torch.linspace(0, 1, TOKENS, dtype=y.dtype).unsqueeze(-1)),
    "a slice": grouped,
    "an expanded head": lambda y: grouped(y).expand(-1, HEADS, -1, -1),
    "another dtype between": lambda y: as_keys(y.float()).double(),
    "numbers read as others": lambda y: as_keys(y.view(torch.int64).view(torch.float64)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_head_of_the_layer_stays(name: str) -> None:
    count, module = compared(attention(Attend(LEFT[name], as_values)))
    assert count == 1
    assert count_op(module, aten.linear.default) == 1


class Also(Attend):
    """Something else reads what the product reads."""

    what = ""

    def forward(self, x: Tensor, q: Tensor) -> Any:
        y = self.k(x)
        keys = self.keys(y)
        context = (q @ keys).softmax(-1) @ self.values(self.v(x))
        return context, {"layer": y, "keys": keys, "a view": keys[:, 0]}[self.what].sum()


@pytest.mark.parametrize("what", ["layer", "keys", "a view"])
def test_keys_that_something_else_reads_stay(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Also, "what", what)
    assert compared(attention(Also(as_keys, as_values)))[0] == 1


def test_states_that_are_changed_in_between_stay() -> None:
    """The layer reads them before, and the reordered product would after."""

    class Changed(Attend):
        def forward(self, x: Tensor, q: Tensor) -> Tensor:
            x = x * 2
            keys, values_ = self.keys(self.k(x)), self.values(self.v(x))
            x.add_(1)
            return (q @ keys).softmax(-1) @ values_

    captured = attention(Changed(as_keys, as_values))
    assert count_op(captured.module, aten.add_.Tensor) == 1
    assert compared(captured, gradients=False)[0] == 0


def test_an_open_batch() -> None:
    captured = attention(dynamic=True)
    count, module = compared(captured)
    assert count == 2 and count_op(module, aten.linear.default) == 0
    more = inputs(batch=5)
    torch.testing.assert_close(module(**more), captured.module(**more), atol=1e-10, rtol=1e-10)


def test_a_fused_attention_stays() -> None:
    class Fused(Attend):
        def forward(self, x: Tensor, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, self.values(self.k(x)), self.values(self.v(x)))

    assert compared(attention(Fused(as_keys, as_values)))[0] == 0


def test_a_default_device_without_numbers() -> None:
    captured = attention()
    module = copy_of(captured)
    with torch.device("meta"):
        assert absorb_single_query(module) == 2


@st.composite
def layouts(draw: st.DrawFn) -> tuple[dict[str, int], bool, tuple[int, ...], bool]:
    sizes = {n: draw(st.sampled_from((1, 2, 4, 8, 12))) for n in ("batch", "tokens", "heads", "size")}
    right = draw(st.booleans())
    order = (2, 1, 3) if right else draw(st.permutations((1, 2, 3)))
    return {**sizes, "queries": draw(st.integers(1, 3))}, draw(st.booleans()), tuple(order), right


@given(layouts())
@settings(max_examples=40, phases=(Phase.explicit, Phase.generate), deadline=None)
def test_random_layouts(drawn: tuple[dict[str, int], bool, tuple[int, ...], bool]) -> None:
    """Whatever order the views give, the result is the same; the right one is reordered where it pays."""
    sizes, bias, order, right = drawn
    batch, tokens, heads, size, queries = (sizes[n] for n in ("batch", "tokens", "heads", "size", "queries"))

    def ordered(y: Tensor) -> Tensor:
        return y.view(batch, tokens, heads, size).permute(0, *order).reshape(batch, heads, tokens, size)

    model = Attend(lambda y: ordered(y).transpose(-1, -2), ordered, heads, size, bias)
    count, _ = compared(attention(model, **sizes))
    pays = queries == 1 and tokens * size > SMALL_PRODUCTS * (tokens + size)
    assert count <= (2 if pays else 0)
    if right and pays:
        assert count == (1 if tokens == size else 2)


# --- in models ------------------------------------------------------------------------------------------------------


def without(captured: Program, wanted: Schedule) -> State:
    """What the other passes make."""
    state = State(captured.module, wanted, dict(captured.inputs), {})
    run_passes(state, tuple(step for step in passes_of(wanted) + COUNT if step.name != "absorb_single_query"))
    return state


def doubled(config: Config) -> Program:
    model = make(config).double()
    return capture(model, {n: t.double() if t.is_floating_point() else t for n, t in inputs_for(config).items()})


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_last_layer_of_an_encoder(norm: str) -> None:
    config = Config(layers=2, norm=norm, mask="expanded")
    captured = doubled(config)
    result, state = reduce(captured, "lossless"), without(captured, Schedule.load("lossless"))
    assert [(r.name, r.matches) for r in result.history.records][1:] == [("absorb_single_query", 2), ("count", 1)]
    with torch.no_grad():
        found, expected = result.module(**captured.inputs), state.reduced(**captured.inputs)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    n, width, heads = config.text + config.image, config.width, config.heads
    # Keys and values of every token, and their products; or the heads of one query, each as wide as the states.
    before = 2 * n * width**2 + 2 * n * width
    after = 2 * width**2 + 2 * heads * n * width
    assert state.plan.multiply_adds_after - result.plan.multiply_adds_after == before - after
    assert captured.module(**captured.inputs).shape == found.shape


@pytest.mark.parametrize("form", ["unfused", "sdpa"])
@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
def test_behind_reducers(semantics: str, form: str) -> None:
    """The published softmax is written out, also of a fused attention, whose keys then are the left alone."""
    captured = program(Config(layers=2, form=form))
    result, state = reduce(captured, schedule(semantics, (0,))), without(captured, schedule(semantics, (0,)))
    counts = {r.name: r.matches for r in result.history.records}
    assert counts.get("absorb_single_query", 0) == (2 if form == "unfused" or semantics == "reference" else 0)
    with torch.no_grad():
        given = inputs_for(Config(), seed=5)
        torch.testing.assert_close(result.module(**given), state.reduced(**given), atol=1e-5, rtol=0)


def test_keys_of_the_last_layer_that_a_reducer_reads_stay() -> None:
    """Token 0 is read, into which words may merge: the reducer of the text decides by the keys, and has all queries."""
    captured = program(Config(layers=2, text=3, width=128))
    first = {"at": "cross_modal.0", "prune": 0.2}
    for sites, products in (((first,), 2), ((first, {"at": "cross_modal.1", "merge": {"text": 1}}), 0)):
        wanted = Schedule(semantics="safe", sites=sites)
        result, state = reduce(captured, wanted), without(captured, wanted)
        assert {r.name: r.matches for r in result.history.records}.get("absorb_single_query", 0) == products
        with torch.no_grad():
            found, expected = (m(**captured.inputs) for m in (result.module, state.reduced))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert any("cross_modal_1.text" in str(n.target) for n in result.module.graph.nodes)


def test_a_head_that_reads_every_token_leaves_it_out() -> None:
    result = reduce(program(Config(layers=2, head=highest)), schedule("safe", (0,)))
    assert "absorb_single_query" not in [r.name for r in result.history.records]
    names = [step.name for step in PASSES]
    assert names.index("eliminate") < names.index("absorb_single_query") < names.index("count")


def test_gradients_are_those_of_the_model() -> None:
    config = Config(layers=2)
    model, given_ = make(config), inputs_for(config)
    model(**given_).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    result = reduce(capture(model, given_), "lossless")
    assert result.history.records[1].name == "absorb_single_query"
    result.module(**given_).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_under_torch_compile() -> None:
    config = Config(layers=2)
    model, given_, wanted = make(config), inputs_for(config), schedule("safe", (0,))
    expected = reduce(capture(model, given_), wanted)
    assert "absorb_single_query" in [r.name for r in expected.history.records]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="pumer", options={"schedule": wanted, "inner": "eager"}, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given_), expected.module(**given_), atol=1e-5, rtol=0)
    torch._dynamo.reset()


def test_onnx_of_vilt(tmp_path: Path) -> None:
    given_ = {**text_inputs(2), **image_inputs([(96, 96), (64, 96)], (96, 96))}
    result = reduce(capture(tiny_vilt(), given_), "lossless")
    assert ("absorb_single_query", 2) in [(r.name, r.matches) for r in result.history.records]
    done = pumer.export(result, tmp_path / "few.onnx")
    assert done.report is not None
    assert done.report.passed
    feed = {name: tensor.numpy() for name, tensor in given_.items()}
    found = commands.onnx_outputs(tmp_path / "few.onnx", feed)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), tiny_vilt()(**given_).logits, atol=1e-5, rtol=0)


def test_onnx_of_meter_with_its_decisions(tmp_path: Path) -> None:
    """Two last layers, of which the poolers read a token each; the image's keys are read by a reducer before them."""
    sites = [{"at": "cross_modal.0", "prune": 0.2, "merge": {"image": 0.3, "text": 0.2}}]
    result = reduce(
        capture(tiny_meter(vit_width=40, hidden_size=48), meter_inputs(2, length=12)),
        Schedule(semantics="reference", sites=sites),
    )
    assert {r.name: r.matches for r in result.history.records}["absorb_single_query"] > 0
    done = pumer.export(result, tmp_path / "meter.onnx", with_decisions=True)
    assert done.report is not None
    assert done.report.passed
    assert done.report.decisions_compared
