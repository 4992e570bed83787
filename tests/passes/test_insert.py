"""Which reducers a schedule comes to, and the schedules a graph cannot satisfy."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import Program, Schedule, capture
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import Attention, locate
from pumer_compile.errors import LocateError, PlanError, PumerError
from pumer_compile.methods.pumer import stream_reducer
from pumer_compile.passes.insert import Insertions, plan_insertions
from pumer_compile.passes.manager import State, run_passes
from pumer_compile.passes.pipeline import ANALYSE, REDUCE
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import reducers_of
from pumer_compile.rewrite.sites import LocatedGraph, Site, Stream, repeated_module
from tests.support.helpers import paper_counts, published_counts
from tests.support.models import Config, Fusion, Staged, highest, inputs_for, make, program, schedule

SEMANTICS = ("reference", "paper", "safe")


def chosen(captured: Program, wanted: Schedule) -> Insertions:
    """What is known before the walk: the sites, in order."""
    annotation = annotate(captured.module, captured.streams)
    return plan_insertions(LocatedGraph(annotation, locate(captured.module, annotation)), wanted)


def softmaxes(captured: Program, wanted: Schedule) -> list[Attention]:
    """The attentions whose softmax becomes the published one."""
    annotation = annotate(captured.module, captured.streams)
    graph = LocatedGraph(annotation, locate(captured.module, annotation))
    replaced = wanted.replacements(graph, wanted.find_sites(graph))
    return [a for a in graph.attentions if (a.probabilities or a.context) in replaced]


def planned(captured: Program, wanted: Schedule) -> Insertions:
    """With the plans and reducers that the walk makes."""
    state = State(captured.module, wanted, dict(captured.inputs), dict(captured.streams))
    run_passes(
        state,
        tuple(step for step in ANALYSE + REDUCE if step.name != "verify"),
    )
    return state.insertions


def test_the_walk_makes_the_plans() -> None:
    """Choosing a site says nothing of its tokens: what came before it decides how many there are."""
    insertions = chosen(program(Config()), schedule(layers=(2, 0), prune=0.2))
    assert [(s.attention.address, s.plan, s.reducers) for s in insertions.sites] == [
        ("cross_modal.0", None, {}),
        ("cross_modal.2", None, {}),
    ]
    assert insertions.done == []
    assert insertions.sites[0].budget.prune == 0.2


@pytest.mark.parametrize("form", ["unfused", "sdpa"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_counts_go_from_site_to_site(semantics: str, form: str) -> None:
    budgets = {"prune": 0.2, "merge": {"image": 0.3, "text": 0.25}}
    insertions = planned(program(Config(form=form)), schedule(semantics, (0, 1, 2), **budgets))
    text, image = 7, 25
    counting = paper_counts if semantics == "paper" else published_counts
    assert len(insertions.sites) == len(insertions.done) == 3
    for index, (site, plan) in enumerate(insertions.done):
        keep, merge, words = counting(image, text, 0.2, 0.3, 0.25)
        assert plan is site.plan
        assert (plan.site, plan.call, plan.name) == (f"cross_modal.{index}", 0, f"cross_modal.{index}")
        assert plan.module == f"layers.{index}.attention"
        assert plan.before == {"text": text, "image": image}
        assert plan.pruned == {"text": 0, "image": image - keep}
        assert plan.merged == {"text": words, "image": merge}
        text, image = text - words, keep - merge
        assert plan.after == {"text": text, "image": image}
        assert set(site.reducers) == {"text", "image"}
        assert site.reducers["image"].tokens_after == image
        assert site.reducers["text"].tokens_after == text


def test_sites_are_taken_in_execution_order() -> None:
    insertions = planned(program(Config()), schedule(layers=(2, 0), prune=0.2))
    (_, first), (_, second) = insertions.done
    assert [first.site, second.site] == ["cross_modal.0", "cross_modal.2"]
    assert second.before == first.after


def test_a_stream_without_budget_has_no_reducer() -> None:
    ((site, plan),) = planned(program(Config()), schedule(layers=(1,), merge={"text": 2})).done
    assert set(site.reducers) == {"text"}
    assert plan.after == {"text": 5, "image": 25}
    ((site, plan),) = planned(program(Config()), schedule(layers=(1,), prune=5)).done
    assert set(site.reducers) == {"image"}
    assert plan.after == {"text": 7, "image": 20}


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_only_the_published_semantics_brings_its_softmax(semantics: str) -> None:
    assert len(softmaxes(program(Config()), schedule(semantics))) == (3 if semantics == "reference" else 0)


def test_the_published_softmax_stays_in_cross_modal_layers() -> None:
    config = Config(mask="none")
    found = softmaxes(program(config, Staged), schedule(layers=(0,), prune=2))
    assert [a.address for a in found] == ["cross_modal.0", "cross_modal.1", "cross_modal.2"]


class Pairs(nn.Module):
    """Layers of self-attention over text, then attention over text and image together."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(20, 8), nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(8, 8), "both": nn.Linear(8, 8)}) for _ in range(2))
        self.towers = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        text, image = self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)
        text = text + self.towers[0](attend(text))
        for layer in self.layers:
            text = text + layer["own"](attend(text))
            x = torch.cat([text, image], 1)
            x = x + layer["both"](attend(x))
            text, image = x[:, : ids.shape[1]], x[:, ids.shape[1] :]
        return text[:, 0]


def attend(x: Tensor) -> Tensor:
    h = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("encoder.layer.2.attention", "encoder.layer.2"),
        ("encoder.3.layer.2.attention.self", "encoder.3.layer.2"),
        ("layer.2", "layer.2"),
        ("encoder.attention", ""),
        ("", ""),
    ],
)
def test_repeated_module(path: str, expected: str) -> None:
    assert repeated_module(path) == expected


# --- reducers by semantics ------------------------------------------------------------------------------------------


def test_reference_reducers() -> None:
    image, text = (stream_reducer("reference", Stream(s, s, 20, 1), k, 4) for s, k in (("image", 15), ("text", 20)))
    assert (image.pruner.keep, image.pruner.protected, image.pruner.pads_vote) == (15, 0, True)
    assert (image.merger.similarity, image.merger.protected) == ("cosine", 1)
    assert not image.merger.keep_padding_apart
    assert (image.averaging, image.carried) == ("plain", "ones")
    assert text.pruner is None
    assert (text.averaging, text.carried) == ("plain", "mean")


def test_paper_reducers() -> None:
    image, text = (stream_reducer("paper", Stream(s, s, 20, 1), k, 4) for s, k in (("image", 15), ("text", 20)))
    assert (image.pruner.protected, image.pruner.pads_vote) == (0, True)
    assert image.merger.similarity == text.merger.similarity == "dot"
    assert (image.averaging, text.averaging) == ("plain", "plain")


def test_safe_reducers() -> None:
    parts = (("image", 15, 3), ("text", 20, 0))
    image, text = (stream_reducer("safe", Stream(s, s, 20, n), k, 4) for s, k, n in parts)
    assert (image.pruner.protected, image.pruner.pads_vote) == (3, False)
    assert (image.merger.protected, text.merger.protected) == (3, 1)
    for reducer in (image, text):
        assert reducer.merger.similarity == "cosine"
        assert reducer.merger.keep_padding_apart and reducer.merger.in_order
        assert (reducer.averaging, reducer.carried) == ("sizes", "sum")
    assert image.pruner.in_order


@pytest.mark.parametrize("learned", [0, 1, 3])
@pytest.mark.parametrize("stream", ["image", "text"])
def test_tome_reducers(stream: str, learned: int) -> None:
    """Merging alone; learned tokens stay, and where there are none, token 0 may merge away like any other."""
    wanted = Schedule(method="tome", sites=({"at": "vision.0", "merge": {stream: 4}},))
    reducer = wanted.reducer(Site(None, budget=wanted.resolve()[0]), Stream(stream, stream, 20, learned))
    assert reducer.pruner is None
    assert (reducer.merger.merge, reducer.merger.protected, reducer.merger.similarity) == (4, learned, "cosine")
    assert reducer.merger.keep_padding_apart
    assert (reducer.averaging, reducer.carried) == ("sizes", "sum")


def test_reducers_of() -> None:
    config = Config(mask="none", layers=1, head=highest)  # what nothing reads is left out
    module = reduce_graph(program(config), schedule("paper", (0,)))
    assert set(reducers_of(module)) == {"reducer.cross_modal_0.image", "reducer.cross_modal_0.text"}
    assert reducers_of(nn.Linear(1, 1)) == {}


# --- what a graph cannot satisfy ------------------------------------------------------------------------------------


def refused(captured: Program, wanted: Schedule, error: type[PumerError]) -> str:
    with pytest.raises(error) as caught:
        planned(captured, wanted)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_layer_that_does_not_exist() -> None:
    message = refused(program(Config()), schedule(layers=(3,)), LocateError)
    assert "cross_modal.3" in message
    assert "cross_modal.0 to cross_modal.2" in message


def test_absolute_budgets_that_do_not_fit() -> None:
    message = refused(program(Config()), schedule(layers=(0,), prune=25), PlanError)
    assert "25 of 25 image tokens" in message
    message = refused(program(Config()), schedule(layers=(0,), merge={"text": 4}), PlanError)
    assert "4 of 7 text tokens" in message
    assert "at most 3" in message


def test_shares_that_round_to_nothing() -> None:
    for semantics in ("paper", "safe"):
        message = refused(program(Config()), schedule(semantics, (0,), prune=0.01), PlanError)
        assert "round" in message
        assert "cross_modal.0" in message


def test_the_published_code_merges_nothing_where_it_prunes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    budgets = {"prune": 0.02, "merge": {"image": 0.3, "text": 0.2}}  # 0.02 of 25 rounds to 0
    assert "prune" in refused(program(Config()), schedule(layers=(0, 1), **budgets), PlanError)
    two = {"prune": 0.021, "merge": {"image": 0.45, "text": 0.2}}  # rounds to 1 of 25, then to 0 of 13
    with caplog.at_level(logging.WARNING, "pumer_compile"):
        insertions = planned(program(Config()), schedule(layers=(0, 1), **two))
    assert [plan.site for _, plan in insertions.done] == ["cross_modal.0"]
    assert [(s.attention.address, s.plan is None) for s in insertions.sites] == [
        ("cross_modal.0", False),
        ("cross_modal.1", True),
    ]
    assert "cross_modal.1" in caplog.text
    assert "13 image tokens" in caplog.text


def test_merging_alone_is_not_left_out() -> None:
    insertions = planned(program(Config()), schedule(layers=(0,), merge={"image": 0.3, "text": 0.2}))
    ((site, plan),) = insertions.done
    assert plan.after == {"text": 6, "image": 17}
    assert site.reducers["image"].pruner is None


def at(site: str, semantics: str = "paper", **budgets: Any) -> Schedule:
    return Schedule(semantics=semantics, sites=({"at": site, **budgets},))


def test_budgets_for_tokens_a_site_does_not_have() -> None:
    captured = program(Config(mask="none"), Staged)
    message = refused(captured, at("vision.0", merge={"text": 2}), PlanError)
    assert "text" in message
    assert "[image:25]" in message
    message = refused(captured, at("text.0", merge={"image": 2}), PlanError)
    assert "image" in message
    assert "[text:7]" in message


def test_pruning_by_text_needs_text() -> None:
    message = refused(program(Config(mask="none"), Staged), at("vision.0", prune=2), PlanError)
    assert "attention of the text" in message
    assert "cross-modal" in message


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_towers_merge_their_own_tokens(semantics: str) -> None:
    insertions = planned(
        program(Config(mask="none"), Staged),
        Schedule(
            semantics=semantics,
            sites=({"at": "vision.0", "merge": {"image": 8}}, {"at": "text.0", "merge": {"text": 2}}),
        ),
    )
    assert {plan.site: plan.after for _, plan in insertions.done} == {
        "text.0": {"text": 5},
        "vision.0": {"image": 17},
    }


def test_a_site_without_residual_is_refused() -> None:
    class Bare(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x = self.embed(input_ids, pixel_values)
            return self.finish(self.layers[0].attention(x, None), input_ids.shape[1])

    config = Config(mask="none", layers=1)
    captured = capture(make(config, kind=Bare), inputs_for(config))
    message = refused(captured, schedule("paper", (0,)), LocateError)
    assert "cross_modal.0" in message
    assert "layers.0.attention" in message
    assert "residual" in message


class Cross(Fusion):
    """One cross-attention between the streams, after a self-attention of each."""

    direction = ""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x, n = self.embed(input_ids, pixel_values), input_ids.shape[1]
        text, image = self.layers[1](x[:, :n], None), self.layers[2](x[:, n:], None)
        asking, asked = (text, image) if self.direction == "text to image" else (image, text)
        attention = self.layers[0].attention
        query, key = attention.split(attention.q(asking)), attention.split(attention.k(asked))
        context = F.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)
        return (asking + attention.out(context)).mean(1) + asked.mean(1)


def crossing(direction: str) -> Program:
    config = Config(mask="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cross, "direction", direction)
        return capture(make(config, kind=Cross), inputs_for(config))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_image_to_text_attention_is_refused(semantics: str) -> None:
    for budgets in ({"prune": 3}, {"merge": {"image": 3}}, {"merge": {"text": 2}}):
        message = refused(crossing("image to text"), schedule(semantics, (0,), **budgets), LocateError)
        assert "cross_modal.0 (layers.0.attention)" in message or "cross_modal.0 ()" in message
        assert "from [image:25] to [text:7]" in message
        assert "image-to-text" in message
        assert "text layer" in message  # what to do instead


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_text_to_image_attention_reduces_both(semantics: str) -> None:
    ((site, plan),) = planned(
        crossing("text to image"), schedule(semantics, (0,), prune=5, merge={"image": 4, "text": 2})
    ).done
    assert plan.before == {"text": 7, "image": 25}
    assert plan.after == {"text": 5, "image": 16}
    assert set(site.reducers) == {"text", "image"}


@pytest.mark.parametrize("at_text", ["text.0", "vision.0"])
def test_the_plain_towers_of_a_cross_attention_have_sites_too(at_text: str) -> None:
    merge = {"image": 4} if at_text == "vision.0" else {"text": 2}
    ((_, plan),) = planned(crossing("text to image"), at(at_text, merge=merge)).done
    assert plan.after == ({"image": 21} if at_text == "vision.0" else {"text": 5})


# --- masks that cannot be read --------------------------------------------------------------------------------------


class Masked(Fusion):
    """Attention masks of other kinds."""

    kind = ""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        mask = self.mask(x, attention_mask, None)
        layer = self.layers[0]
        q, k, v = (layer.attention.split(m(x)) for m in (layer.attention.q, layer.attention.k, layer.attention.v))
        scores = q @ k.transpose(-1, -2)
        n = x.shape[1]
        if self.kind == "two":
            scores = scores + mask + torch.ones(1, 1, n, n).tril().log()
        elif self.kind == "flat":
            scores = scores + torch.ones(n, n).tril().log()
        elif self.kind == "two of inputs":
            scores = scores + mask + mask.clamp(min=-1e30)
        elif self.kind == "of one sample":
            scores = scores + mask[0]
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.finish(x + layer.attention.out(context), input_ids.shape[1])


@pytest.mark.parametrize(
    ("kind", "semantics", "says"),
    [
        ("two", "reference", "merges text tokens, but the mask log .* differs from query to query"),
        ("flat", "reference", "merges text tokens, but the mask log .* differs from query to query"),
        ("flat", "published", "cannot have the published softmax, because its mask log differs from query to query"),
        ("two", "safe", "merges text tokens, but the mask log .* differs from query to query"),
        ("flat", "safe", "merges text tokens, but the mask log .* differs from query to query"),
        ("two of inputs", "image only", "several masks"),
        ("of one sample", "image only", "3 dimensions, not 4"),
    ],
)
def test_a_mask_that_cannot_be_read_as_padding(kind: str, semantics: str, says: str) -> None:
    config = Config(layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masked, "kind", kind)
        captured = capture(make(config, kind=Masked), inputs_for(config))
    image_only = {"published": "reference", "image only": "safe"}
    wanted = schedule(semantics, (0,)) if semantics not in image_only else None
    wanted = wanted or schedule(image_only[semantics], (0,), prune=0.2, merge={"image": 0.3})
    with pytest.raises(LocateError, match=says):
        reduce_graph(captured, wanted)


@pytest.mark.parametrize("kind", ["two", "flat"])
def test_padding_is_read_from_a_mask_of_an_input_and_not_from_a_constant(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Masked, "kind", kind)
    config = Config(layers=1)
    inputs = inputs_for(config)
    module = reduce_graph(capture(make(config, kind=Masked), inputs), schedule("safe", (0,), merge={"image": 4}))
    seen: list[Tensor | None] = []
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target.endswith("cross_modal_0.image"):
            reducer = module.get_submodule(node.target)
            reducer.register_forward_hook(lambda _, args, result: seen.append(args[2] if len(args) > 2 else None))
    padding = [n for n in module.graph.nodes if n.op == "call_module" and ".weights." in n.target]
    module(**inputs)
    assert len(seen) == 1
    if kind == "two":
        assert seen[0] is not None and bool((seen[0] == 1).all())
        assert padding and all("log" not in n.args[0].name for n in padding)
    else:
        assert seen[0] is None and not padding


def test_layers_hold_their_own_self_attention() -> None:
    """The published softmax goes into every attention of a cross-modal layer, and into no tower."""
    inputs = {"ids": torch.randint(0, 20, (2, 5)), "pixels": torch.randn(2, 3, 4, 6)}
    found = softmaxes(capture(Pairs(), inputs), schedule(layers=(0,), prune=2))
    assert [a.address for a in found if a.cross_modal] == ["cross_modal.0", "cross_modal.1"]
    assert "text.0" not in [a.address for a in found]
