"""Which reducers a schedule comes to, and the schedules a graph cannot satisfy."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import Program, Schedule, capture
from pumer_compile.errors import LocateError, PlanError, PumerError
from pumer_compile.passes.annotate import annotate
from pumer_compile.passes.insert import (
    Insertions,
    make_reducer,
    plan_insertions,
    reducers_of,
    repeated_module,
)
from pumer_compile.passes.locate import locate
from pumer_compile.reduce import reduce_graph
from tests.helpers import paper_counts, published_counts
from tests.models import Config, Fusion, Staged, inputs_for, make, program, schedule

SEMANTICS = ("reference", "paper", "safe")


def planned(captured: Program, wanted: Schedule) -> Insertions:
    annotation = annotate(captured.module, captured.streams)
    return plan_insertions(annotation, locate(captured.module, annotation), wanted)


@pytest.mark.parametrize("form", ["unfused", "sdpa"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_counts_go_from_site_to_site(semantics: str, form: str) -> None:
    budgets = {"prune": 0.2, "merge": {"image": 0.3, "text": 0.25}}
    insertions = planned(program(Config(form=form)), schedule(semantics, (0, 1, 2), **budgets))
    text, image = 7, 25
    counting = paper_counts if semantics == "paper" else published_counts
    assert len(insertions.sites) == 3
    for index, site in enumerate(insertions.sites):
        keep, merge, words = counting(image, text, 0.2, 0.3, 0.25)
        assert site.plan.site == f"cross_modal.{index}"
        assert site.plan.module == f"layers.{index}.attention"
        assert site.plan.before == {"text": text, "image": image}
        assert site.plan.pruned == {"text": 0, "image": image - keep}
        assert site.plan.merged == {"text": words, "image": merge}
        text, image = text - words, keep - merge
        assert site.plan.after == {"text": text, "image": image}
        assert set(site.reducers) == {"text", "image"}
        assert site.reducers["image"].tokens_after == image
        assert site.reducers["text"].tokens_after == text


def test_sites_are_taken_in_execution_order() -> None:
    insertions = planned(program(Config()), schedule(layers=(2, 0), prune=0.2))
    assert [s.plan.site for s in insertions.sites] == ["cross_modal.0", "cross_modal.2"]
    assert insertions.sites[1].plan.before == insertions.sites[0].plan.after


def test_a_stream_without_budget_has_no_reducer() -> None:
    (site,) = planned(program(Config()), schedule(layers=(1,), merge={"text": 2})).sites
    assert set(site.reducers) == {"text"}
    assert site.plan.after == {"text": 5, "image": 25}
    (site,) = planned(program(Config()), schedule(layers=(1,), prune=5)).sites
    assert set(site.reducers) == {"image"}
    assert site.plan.after == {"text": 7, "image": 20}


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_only_the_published_semantics_brings_its_softmax(semantics: str) -> None:
    insertions = planned(program(Config()), schedule(semantics))
    assert len(insertions.softmaxes) == (3 if semantics == "reference" else 0)


def test_the_published_softmax_stays_in_cross_modal_layers() -> None:
    config = Config(mask="none")
    insertions = planned(program(config, Staged), schedule(layers=(0,), prune=2))
    assert [a.site for a in insertions.softmaxes] == ["cross_modal.0", "cross_modal.1", "cross_modal.2"]


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
    image, text = (make_reducer(s, 20, k, 4, "reference", 1) for s, k in (("image", 15), ("text", 20)))
    assert (image.pruner.keep, image.pruner.protected, image.pruner.pads_vote) == (15, 0, True)
    assert (image.merger.similarity, image.merger.protected) == ("cosine", 1)
    assert not image.merger.keep_padding_apart
    assert (image.averaging, image.carried) == ("plain", "ones")
    assert text.pruner is None
    assert (text.averaging, text.carried) == ("plain", "mean")


def test_paper_reducers() -> None:
    image, text = (make_reducer(s, 20, k, 4, "paper", 1) for s, k in (("image", 15), ("text", 20)))
    assert (image.pruner.protected, image.pruner.pads_vote) == (0, True)
    assert image.merger.similarity == text.merger.similarity == "dot"
    assert (image.averaging, text.averaging) == ("plain", "plain")


def test_safe_reducers() -> None:
    image, text = (make_reducer(s, 20, k, 4, "safe", n) for s, k, n in (("image", 15, 3), ("text", 20, 0)))
    assert (image.pruner.protected, image.pruner.pads_vote) == (3, False)
    assert (image.merger.protected, text.merger.protected) == (3, 1)
    for reducer in (image, text):
        assert reducer.merger.similarity == "cosine"
        assert reducer.merger.keep_padding_apart
        assert (reducer.averaging, reducer.carried) == ("sizes", "sum")


def test_reducers_of() -> None:
    module = reduce_graph(program(Config(mask="none", layers=1)), schedule("paper", (0,)))
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
    assert [s.plan.site for s in insertions.sites] == ["cross_modal.0"]
    assert "cross_modal.1" in caplog.text
    assert "13 image tokens" in caplog.text


def test_merging_alone_is_not_left_out() -> None:
    insertions = planned(program(Config()), schedule(layers=(0,), merge={"image": 0.3, "text": 0.2}))
    assert insertions.sites[0].plan.after == {"text": 6, "image": 17}
    assert insertions.sites[0].reducers["image"].pruner is None


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
    assert {s.plan.site: s.plan.after for s in insertions.sites} == {
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


def test_cross_attention_is_refused() -> None:
    class Cross(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x, n = self.embed(input_ids, pixel_values), input_ids.shape[1]
            attention = self.layers[0].attention
            text, image = attention.split(x[:, :n]), attention.split(x[:, n:])
            context = F.scaled_dot_product_attention(text, image, image).transpose(1, 2).flatten(2)
            return (x[:, :n] + attention.out(context)).mean(1)

    config = Config(mask="none", layers=1)
    captured = capture(make(config, kind=Cross), inputs_for(config))
    message = refused(captured, schedule("paper", (0,), prune=3), LocateError)
    assert "cross-attention" in message
    assert "[text:7]" in message
    assert "[image:25]" in message


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
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.finish(x + layer.attention.out(context), input_ids.shape[1])


@pytest.mark.parametrize(("kind", "says"), [("two", "several masks"), ("flat", "2 dimensions, not 4")])
@pytest.mark.parametrize("semantics", ["reference", "safe"])
def test_a_mask_that_cannot_be_read_as_padding(kind: str, says: str, semantics: str) -> None:
    config = Config(layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Masked, "kind", kind)
        captured = capture(make(config, kind=Masked), inputs_for(config))
    with pytest.raises(LocateError, match=says):
        reduce_graph(captured, schedule(semantics, (0,)))


def test_attention_without_a_head_dimension_is_refused_in_words() -> None:
    """`nn.MultiheadAttention` multiplies batch and heads into one dimension."""

    class Torch(Fusion):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.mixed = nn.MultiheadAttention(config.width, config.heads, batch_first=True)

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x = self.embed(input_ids, pixel_values)
            x = x + self.mixed(x, x, x, need_weights=True)[0]
            return self.finish(self.layers[0](x, None), input_ids.shape[1])

    config = Config(mask="none", layers=1)
    captured = capture(make(config, kind=Torch), inputs_for(config))
    with pytest.raises(PumerError) as caught:
        reduce_graph(captured, schedule("safe", (0,)))
    assert "mixed" in str(caught.value)


def test_layers_hold_their_own_self_attention() -> None:
    """The published softmax goes into every attention of a cross-modal layer, and into no tower."""
    inputs = {"ids": torch.randint(0, 20, (2, 5)), "pixels": torch.randn(2, 3, 4, 6)}
    insertions = planned(capture(Pairs(), inputs), schedule(layers=(0,), prune=2))
    assert [a.site for a in insertions.softmaxes if a.cross_modal] == ["cross_modal.0", "cross_modal.1"]
    assert "text.0" not in [a.site for a in insertions.softmaxes]
