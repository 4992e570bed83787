"""All passes together: the reduced graph against the same model reduced by hand, layer by layer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import Schedule, capture, reduce
from pumer_compile.errors import PumerError, VerifyError
from pumer_compile.passes.manager import Pass, ReducedGraph, State, run_passes
from pumer_compile.passes.pipeline import ANALYSE, PASSES
from pumer_compile.plan import Plan
from pumer_compile.reduce import reduce_graph, with_decisions
from pumer_compile.reducers import AlignAxis, forced_decisions
from pumer_compile.reducers.base import Decisions
from tests.support import models
from tests.support.helpers import count_op
from tests.support.models import (
    Attention,
    Config,
    Fusion,
    Staged,
    describe,
    highest,
    inputs_for,
    make,
    program,
    reduced,
    run_layer,
    schedule,
)
from tests.support.narrowing import last_layer

aten = torch.ops.aten
SEMANTICS = ("reference", "paper", "safe")
SITES = {0: (0.2, 0.3, 0.25), 1: (0.2, 0.3, 0.25)}

# Every form, norm and mask, a symbolic batch and padded patches with each of them somewhere.
FORMS = [
    Config(mask="none"),
    Config(mask="none", form="sdpa", norm="post", dynamic=True, layers=2),
    Config(mask="additive", dynamic=True, patch_mask=True, layers=2),
    Config(mask="additive", form="sdpa", norm="post"),
    Config(mask="bool", norm="post"),
    Config(mask="bool", form="sdpa", dynamic=True, patch_mask=True, layers=2),
    Config(mask="expanded", norm="post", dynamic=True, patch_mask=True, layers=2),
    Config(mask="expanded", form="sdpa"),
]

# Sizes that collide: with each other, with heads, widths and batch.
COLLISIONS = [
    Config(text=8, layers=2),  # text = head size = heads x batch
    Config(text=4, grid=(4, 8), cls=False, layers=2, form="sdpa", mask="bool"),  # text = heads, image = width
    Config(text=5, grid=(2, 2), heads=5, width=25, batch=5, layers=2),  # text = image = heads = head size = batch
    Config(text=9, grid=(3, 3), heads=3, width=27, batch=3, cls=False, layers=2),  # text = image = head size
    Config(text=6, grid=(2, 3), cls=False, heads=2, width=12, layers=2, dynamic=True),  # text + image = width
    Config(batch=1, layers=2),  # every mask begins with 1
    Config(heads=1, width=8, text=8, form="sdpa", mask="bool", layers=2),  # text = width = head size
]


def check(config: Config, semantics: str, sites: dict[int, Any], wanted: Schedule) -> None:
    """The reduced graph equals the model reduced by hand on inputs it was not captured with."""
    module = reduce_graph(program(config), wanted)
    inputs = inputs_for(config, seed=5, batch=3 if config.dynamic else None)
    expected, _ = reduced(make(config), inputs, sites, semantics)
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)
        unreduced = make(config)(**inputs)
    assert (unreduced - expected).abs().max() > 1e-4  # a reducer that does nothing would be seen


# Every form under two of the three semantics.
@pytest.mark.parametrize(
    ("config", "semantics"),
    [(config, SEMANTICS[(i + j) % 3]) for i, config in enumerate(FORMS) for j in range(2)],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)
def test_reduced_by_hand(config: Config, semantics: str) -> None:
    check(config, semantics, SITES, schedule(semantics))


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("config", COLLISIONS, ids=describe)
def test_colliding_sizes(config: Config, semantics: str) -> None:
    check(config, semantics, {0: SITES[0]}, schedule(semantics, (0,)))


BUDGETS: dict[str, tuple[dict[str, Any], tuple[Any, Any, Any]]] = {
    "pruning alone": ({"prune": 0.3}, (0.3, 0, 0)),
    "image merging alone": ({"merge": {"image": 0.3}}, (0, 0.3, 0)),
    "text merging alone": ({"merge": {"text": 0.4}}, (0, 0, 0.4)),
    "merging alone": ({"merge": {"image": 5, "text": 2}}, (0, 5, 2)),
    "numbers of tokens": ({"prune": 7, "merge": {"image": 4, "text": 1}}, (7, 4, 1)),
    "as many as can": ({"prune": 2, "merge": {"image": 11, "text": 3}}, (2, 11, 3)),
    "all but one": ({"prune": 24}, (24, 0, 0)),
}


@pytest.mark.parametrize(
    ("semantics", "mask"), [("reference", "none"), ("reference", "additive"), ("safe", "additive")]
)
@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(name: str, semantics: str, mask: str) -> None:
    budgets, site = BUDGETS[name]
    config = Config(layers=2, mask=mask)
    check(config, semantics, {0: site}, schedule(semantics, (0,), **budgets))


def test_semantics_are_three_different_things() -> None:
    config = FORMS[3]
    inputs = inputs_for(config)
    with torch.no_grad():
        outputs = [reduce_graph(program(config), schedule(s))(**inputs) for s in SEMANTICS]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[a] - outputs[b]).abs().max() > 1e-4


# --- towers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_a_tower_by_hand(semantics: str) -> None:
    """The image is merged in its own tower; the layers over both see fewer image tokens."""
    config = Config(mask="none", layers=1)
    model, inputs = make(config, kind=Staged), inputs_for(config)
    wanted = Schedule(semantics=semantics, sites=({"at": "vision.0", "merge": {"image": 8}},))
    module = reduce_graph(capture(model, inputs), wanted)
    x = Fusion.embed(model, **inputs)
    rows = []
    for b in range(2):
        image = models.State(x[b, 7:], 0, [1.0] * 25, [1.0] * 25)
        run_layer(model.image_layers[0], image, (0, 8, 0), semantics, config)
        text = models.State(x[b, :7], 7, [1.0] * 7, [1.0] * 7)
        run_layer(model.text_layers[0], text, None, semantics, config)
        both = models.State(torch.cat([text.x, image.x]), 7, [1.0] * 24, [1.0] * 24)
        run_layer(model.layers[0], both, None, semantics, config)
        rows.append(both.x)
    assert rows[0].shape == (24, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), model.finish(torch.stack(rows), 7), atol=1e-5, rtol=0)


# --- graphs that are the easy or the odd case -----------------------------------------------------------------------


def test_a_graph_without_any_literal_to_rewrite() -> None:
    """No mask, and heads made by `unflatten`: nothing after the reducer has to change."""

    class Plain(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x = self.embed(input_ids, pixel_values)
            for layer in self.layers:
                normed = layer.norm1(x)
                q, k, v = (
                    m(normed).unflatten(-1, (4, 8)).transpose(1, 2)
                    for m in (layer.attention.q, layer.attention.k, layer.attention.v)
                )
                context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
                x = x + layer.attention.out(context)
                x = x + layer.mlp(layer.norm2(x))
            return self.finish(x, input_ids.shape[1])

    config = Config(mask="none", layers=2)
    inputs = inputs_for(config)
    module = reduce_graph(capture(make(config, kind=Plain), inputs), schedule("paper", (0,)))
    expected, _ = reduced(make(config), inputs, {0: SITES[0]}, "paper")
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


def test_a_site_in_the_last_layer() -> None:
    config = Config(mask="none", layers=1, head=lambda x, text: x.mean(1))
    check(config, "safe", {0: SITES[0]}, schedule("safe", (0,)))


@pytest.mark.parametrize("projection", ["chunk", "unbind"])
def test_queries_keys_and_values_from_one_projection(projection: str) -> None:
    class Packed(Attention):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])
            bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
            packed = F.linear(x, weight, bias)
            if projection == "chunk":
                q, k, v = (self.split(part) for part in packed.chunk(3, -1))
            else:
                b, n, _ = x.shape
                q, k, v = packed.view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(context.transpose(1, 2).flatten(2))

    config = Config(layers=2, mask="additive")
    model = make(config)
    for layer in model.layers:
        layer.attention.__class__ = Packed
    inputs = inputs_for(config)
    module = reduce_graph(capture(model, inputs), schedule("safe", (0,)))
    expected, _ = reduced(make(config), inputs, {0: SITES[0]}, "safe")
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_causal_attention_is_refused(semantics: str) -> None:
    """Its triangle goes by position; reduced tokens are in another order, and recomputed text rows would see all."""

    class Causal(Attention):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(context.transpose(1, 2).flatten(2))

    config = Config(layers=2, mask="none")
    model = make(config)
    for layer in model.layers:
        layer.attention.__class__ = Causal
    with pytest.raises(PumerError) as caught:
        reduce_graph(capture(model, inputs_for(config)), schedule(semantics, (0,)))
    assert "causal" in str(caught.value) or "position" in str(caught.value)


def test_a_mask_that_says_what_to_drop() -> None:
    """`masked_fill(dropped, -inf)` and `where(kept, scores, -inf)` mean the same."""
    config = Config(layers=2, mask="bool")  # the unfused form fills where not open
    check(config, "safe", {0: SITES[0]}, schedule("safe", (0,)))

    class Where(Attention):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model, inputs = make(config), inputs_for(config)
    for layer in model.layers:
        layer.attention.__class__ = Where
    for semantics in SEMANTICS:
        module = reduce_graph(capture(model, inputs), schedule(semantics, (0,)))
        expected, _ = reduced(make(config), inputs, {0: SITES[0]}, semantics)
        with torch.no_grad():
            torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


def subtracted(scores: Tensor, mask: Tensor) -> Tensor:
    """As the first GPT-2 wrote it."""
    return scores - (~mask) * 1e9


def multiplied(scores: Tensor, mask: Tensor) -> Tensor:
    return scores * mask - 1e9 * (~mask)


def lowered(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.minimum(scores, torch.where(mask, 1e9, -1e9))


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("apply", [subtracted, multiplied, lowered])
def test_masks_in_other_words_are_read_or_refused(apply: Any, semantics: str) -> None:
    """Padding must not be taken for real tokens because the mask was not recognised."""

    class Other(Attention):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            return self.out((apply(scores, mask).softmax(-1) @ v).transpose(1, 2).flatten(2))

    config = Config(layers=1, mask="bool", head=lambda x, text: x.amax(1))
    model, inputs = make(config), inputs_for(config)
    model.layers[0].attention.__class__ = Other
    captured = capture(model, inputs)
    try:
        module = reduce_graph(captured, schedule(semantics, (0,)))
    except PumerError:
        return
    expected, _ = reduced(make(config), inputs, {0: SITES[0]}, semantics)
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


# --- what comes out -------------------------------------------------------------------------------------------------


def test_plan_and_history() -> None:
    config = Config(layers=2)
    result = reduce(program(config), schedule("reference", (0,)))
    (site,) = result.plan.sites
    assert (site.site, site.module) == ("cross_modal.0", "layers.0.attention")
    assert (site.before, site.after) == ({"text": 7, "image": 25}, {"text": 5, "image": 12})
    assert result.plan.tokens() == {
        "cross_modal.0": {"text": 5, "image": 12},
        "cross_modal.1": {"text": 5, "image": 12},
    }
    width, embed = 32, 24 * 3 * 4 * 32

    def layer(before: int, after: int) -> int:
        attention = 4 * before * width**2 + 2 * before**2 * width
        return attention + 2 * after * width * 2 * width

    # The classifier reads token 0: one query, its scores and its row of the published softmax.
    last = last_layer(17, 1, width, config.heads)
    assert result.plan.multiply_adds_before == embed + 2 * layer(32, 32) + width * 5
    model_alone = embed + layer(32, 17) + last + width * 5
    reducers = result.plan.multiply_adds_after - model_alone
    assert 0 < reducers < 0.2 * model_alone
    assert result.plan.ratio == result.plan.multiply_adds_before / result.plan.multiply_adds_after
    rest = 2 * 32 * width * 2 * width + layer(32, 32) + width * 5
    assert site.multiply_adds[0] == rest
    assert site.multiply_adds[1] == 2 * 17 * width * 2 * width + last + width * 5 + reducers

    records = result.history.records
    names = ["annotate", "locate", "insert", "rewrite", "verify", "eliminate", "absorb_single_query", "count"]
    assert [r.name for r in records] == names
    # Two streams, two attentions, one site of two reducers.
    assert [r.matches for r in records][:4] == [2, 2, 1, 2]
    assert [r.matches for r in records][6:] == [2, 1]  # keys and values of the last layer; one site
    assert all(r.matches > 0 for r in records)
    nodes = len(program(config).module.graph.nodes)
    assert [r.nodes_before for r in records][:4] == [nodes] * 4
    assert records[-1].nodes_after == len(result.module.graph.nodes)
    lines = str(result.history).splitlines()
    assert len(lines) == 9
    assert lines[4].startswith("rewrite")
    assert f"{nodes} -> {records[5].nodes_before}" in lines[4]


def test_multiply_adds_are_of_one_sample() -> None:
    plans = [
        reduce(program(Config(layers=1, mask="none", batch=b, dynamic=d)), schedule("safe", (0,))).plan
        for b, d in ((2, False), (3, False), (2, True))
    ]
    assert plans[0] == plans[1] == plans[2]


def test_operator_counts() -> None:
    """Reducers are added; the model's own operators stay, but for the softmax under `reference`."""
    config = Config(layers=2, mask="additive", head=highest)  # of every token: nothing is left out or reordered
    before = program(config).module
    after = {s: reduce_graph(program(config), schedule(s, (0,))) for s in SEMANTICS}
    for semantics, module in after.items():
        assert count_op(module, aten.linear.default) == count_op(before, aten.linear.default) == 13
        assert count_op(module, aten.matmul.default) == count_op(before, aten.matmul.default) == 4
        softmaxes = 0 if semantics == "reference" else 2
        assert count_op(module, aten.softmax.int) == softmaxes
        reducers = [n for n in module.graph.nodes if n.op == "call_module"]
        assert all(str(n.target).startswith(("reducer.", "published_softmax.")) for n in reducers)
        aligned = sum(isinstance(m, AlignAxis) for m in module.modules())
        assert aligned == (0 if semantics == "reference" else 1)  # the additive mask of the second layer


def test_reduced_module_takes_and_gives_what_the_model_does() -> None:
    class Named(Fusion):
        def finish(self, x: Tensor, text: int) -> dict[str, Tensor]:
            return {"logits": super().finish(x, text)}

    config = Config(layers=1, mask="additive", head=lambda x, text: x.mean(1))
    model, inputs = make(config, kind=Named), inputs_for(config)
    module = reduce_graph(capture(model, inputs), schedule("safe", (0,)))
    assert set(module(**inputs)) == {"logits"}
    assert set(module.state_dict()) == set(model.state_dict())
    with pytest.raises(Exception, match="pixel_values"):
        module(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_gradients_are_those_of_the_model_reduced_by_hand(semantics: str) -> None:
    config = Config(layers=2, mask="additive")
    model, inputs = make(config), inputs_for(config)
    module = reduce_graph(capture(model, inputs), schedule(semantics, (0,)))
    module(**inputs).square().sum().backward()
    found = {n: p.grad for n, p in module.named_parameters()}
    twin = make(config)
    reduced(twin, inputs, {0: SITES[0]}, semantics)[0].square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert found[name] is not None, name
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_reach_every_parameter_under_reference() -> None:
    config = Config(layers=3, mask="additive")
    model, inputs = make(config), inputs_for(config)
    model(**inputs).square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-9}
    model.zero_grad(set_to_none=True)
    module = reduce_graph(capture(model, inputs), schedule("reference"))
    module(**inputs).square().sum().backward()
    again = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-9}
    assert again == reached
    assert len(reached) > 0.9 * len(list(model.parameters()))


def test_training_trains_the_captured_model() -> None:
    config = Config(layers=2, mask="additive")
    model, inputs = make(config), inputs_for(config)
    module = reduce(capture(model, inputs), schedule("safe", (0,))).module
    before = model.classify.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), 0.02)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(module(**inputs), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(model.classify.weight, before)
    expected, _ = reduced(model, inputs, {0: SITES[0]}, "safe")
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


def test_half_precision() -> None:
    """Decisions are made in float32; features stay in the model's dtype."""
    config = Config(layers=2, mask="none")
    model = make(config).half()
    inputs = inputs_for(config)
    inputs["pixel_values"] = inputs["pixel_values"].half()
    module = reduce_graph(capture(model, inputs), schedule("safe", (0,)))
    with torch.no_grad():
        found = module(**inputs)
    assert found.dtype == torch.float16
    with torch.no_grad():
        whole = model(**inputs)
    assert torch.isfinite(found).all()
    assert (found.float() - whole.float()).abs().max() < 1.0


# --- decisions ------------------------------------------------------------------------------------------------------


def test_decisions_can_be_read_and_forced_back() -> None:
    config = Config(layers=2, mask="additive")
    module = reduce_graph(program(config), schedule("safe", (0,)))
    twin, names = with_decisions(module, ["logits"])
    path = "reducer.cross_modal_0"
    assert set(names) == {f"{path}.image.{n}" for n in ("kept", "source", "target")} | {
        f"{path}.text.source",
        f"{path}.text.target",
    }
    inputs = inputs_for(config)
    with torch.no_grad():
        given = twin(**inputs)
        expected = module(**inputs)
    torch.testing.assert_close(given["logits"], expected)
    kept = torch.arange(7).expand(2, -1)
    decisions = {
        f"{path}.image": Decisions(*(given[f"{path}.image.{n}"] for n in ("kept", "source", "target"))),
        f"{path}.text": Decisions(kept, given[f"{path}.text.source"], given[f"{path}.text.target"]),
    }
    with torch.no_grad(), forced_decisions(module, decisions) as forcings:
        assert torch.equal(module(**inputs), expected)
        assert not any(f.comparison.differs.any() for f in forcings.values())
    shuffled = decisions[f"{path}.image"]._replace(kept=decisions[f"{path}.image"].kept.flip(1))
    with torch.no_grad(), forced_decisions(module, {f"{path}.image": shuffled}) as forcings:
        assert (module(**inputs) - expected).abs().max() > 1e-4
        assert forcings[f"{path}.image"].comparison.differs.all()


# --- the manager ----------------------------------------------------------------------------------------------------


def state(config: Config | None = None) -> State:
    captured = program(config or Config(mask="none", layers=2))
    return State(captured.module, schedule("paper", (0,)), dict(captured.inputs), {})


def test_a_pass_without_what_it_requires() -> None:
    with pytest.raises(PumerError, match="Pass locate requires Annotation"):
        run_passes(state(), tuple(step for step in PASSES if step.name == "locate"))


def made(name: str, run: Callable[[State], int], **facts: Any) -> Pass:
    """A pass of a function."""
    kind = type("Made", (Pass,), {"name": name, "run": lambda self, s: run(s), **facts})
    return kind()


def test_a_pass_that_breaks_its_promise() -> None:
    with pytest.raises(VerifyError, match="Pass idle did not give Plan"):
        run_passes(state(), (made("idle", lambda s: 1, ensures=(Plan,)),))


def test_a_pass_that_matches_nothing() -> None:
    nothing = made("nothing", lambda s: 0)
    with pytest.raises(VerifyError, match="Pass nothing matched nothing"):
        run_passes(state(), (nothing,))


def test_a_pass_that_leaves_a_broken_graph() -> None:
    def spoil(s: State) -> int:
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        y = graph.call_function(aten.relu.default, (x,))
        graph.output(y)
        x.prepend(y)
        s.add(ReducedGraph(torch.fx.GraphModule(nn.Module(), graph)))
        return 1

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        run_passes(state(), (made("spoil", spoil),))


def test_every_pass_leaves_its_graph(tmp_path: Path) -> None:
    reduce(program(Config(mask="none", layers=2)), schedule("paper", (0,)), dump_graph=tmp_path / "graphs")
    files = sorted(p.name for p in (tmp_path / "graphs").iterdir())
    assert files == [
        "1_annotate.py",
        "2_locate.py",
        "3_insert.py",
        "4_rewrite.py",
        "5_verify.py",
        "6_eliminate.py",
        "7_absorb_single_query.py",
        "8_count.py",
    ]
    first, last = ((tmp_path / "graphs" / files[i]).read_text() for i in (0, -1))
    assert "[text:7 | image:25]" in first
    assert "reducer.cross_modal_0.image" in last or "reducer_cross_modal_0_image" in last


def test_a_pass_that_may_match_nothing() -> None:
    nothing = made("nothing", lambda s: 0, optional=True)
    assert run_passes(state(), (nothing,)).records == []


def test_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pumer_compile"):
        run_passes(state(), ANALYSE)  # einsums and prompts: nothing to do, not recorded
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["pass annotate", "pass locate"]
    assert "2 matches" in caplog.text


def test_no_site_is_reduced_twice() -> None:
    """Two schedules give two modules; neither touches the other or the capture."""
    config = Config(mask="none", layers=2)
    code = program(config).module.code
    one = reduce_graph(program(config), schedule("paper", (0,)))
    two = reduce_graph(program(config), schedule("safe", (1,)))
    inputs = inputs_for(config)
    with torch.no_grad():
        first = one(**inputs)
        two(**inputs)
        assert torch.equal(one(**inputs), first)
    assert program(config).module.code == code


def test_variants_cover_what_they_say() -> None:
    """The table above has every form, norm and mask, each with a symbolic batch at least once."""
    for field, values in {"form": ("unfused", "sdpa"), "norm": ("pre", "post")}.items():
        for value in values:
            assert any(getattr(c, field) == value and c.dynamic for c in FORMS)
    assert {c.mask for c in FORMS} == {"none", "additive", "bool", "expanded"}
    assert {dataclasses.replace(c).patch_mask for c in FORMS} == {False, True}
