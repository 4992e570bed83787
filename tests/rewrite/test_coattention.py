"""Text and image in layers of their own that attend to each other: against the same models reduced by hand."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pumer_compile import Program, Schedule, capture, reduce
from pumer_compile.errors import LocateError, PlanError, PumerError
from pumer_compile.passes.count import tokens_after_layers
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import AlignAxis
from tests.support.models import describe, inputs_for, make, passed, schedule
from tests.support.pairs import (
    Bridge,
    CoAttention,
    CrossLayer,
    CrossOnly,
    Decoder,
    ImageFirst,
    Oracle,
    PairConfig,
    SharedAttention,
    Sites,
)

SEMANTICS = ("reference", "paper", "safe")
ONE = (0.2, 0.3, 0.25)


@functools.cache
def program(config: PairConfig, kind: type[CoAttention] = CoAttention) -> Program:
    return capture(make(config, kind=kind), inputs_for(config), dynamic_batch=config.dynamic)


def wanted(semantics: str, sites: Sites, kind: type[CoAttention] = CoAttention) -> Schedule:
    """Of pairs the even nodes are text-to-image; a decoder has no others."""
    step, first = (1, 0) if kind in (Decoder, CrossOnly) else (2, int(kind is ImageFirst))
    entries = [
        {"at": f"cross_modal.{step * i + first}", "prune": p, "merge": {"image": m, "text": t}}
        for i, (p, m, t) in sites.items()
    ]
    return Schedule(semantics=semantics, sites=entries)


def check(config: PairConfig, semantics: str, sites: Sites, kind: type[CoAttention] = CoAttention) -> None:
    """The reduced graph equals the model reduced by hand, on inputs it was not captured with."""
    state = passed(
        program(config, kind), wanted(semantics, sites, kind), verified=semantics == "safe" and not config.dynamic
    )
    inputs = inputs_for(config, seed=5, batch=3 if config.dynamic else None)
    model = make(config, kind=kind)
    with torch.no_grad():
        expected, counts = Oracle(model, sites, semantics)(inputs)
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=1e-5, rtol=0)
        assert (model(**inputs) - expected).abs().max() > 1e-4  # a reducer that does nothing would be seen
    found = tokens_after_layers(state.attentions, state.insertions, state.rewriter)
    step, first = (1, 0) if kind is Decoder else (2, int(kind is ImageFirst))
    layers = [found[f"cross_modal.{step * i + first}"] for i in range(config.layers)]
    assert [(layer["text"], layer["image"]) for layer in layers] == counts


@pytest.mark.parametrize("kind", [CoAttention, ImageFirst, Decoder, Bridge, SharedAttention])
@pytest.mark.parametrize("form", ["unfused", "sdpa"])
def test_the_oracle_without_reducers_is_the_model(kind: type[CoAttention], form: str) -> None:
    config = PairConfig(form=form, patch_mask=True)
    model, inputs = make(config, kind=kind), inputs_for(config, seed=5)
    with torch.no_grad():
        expected, _ = Oracle(model, {}, "paper")(inputs)
        torch.testing.assert_close(model(**inputs), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(program(config, kind).module(**inputs), expected, atol=1e-5, rtol=0)


# Every form, norm and mask, what the image layer sees, a symbolic batch and padded patches, each somewhere.
FORMS = [
    PairConfig(mask="none"),
    PairConfig(mask="none", form="sdpa", norm="post", sees="old", dynamic=True),
    PairConfig(mask="additive", sees="old", patch_mask=True, dynamic=True),
    PairConfig(mask="additive", form="sdpa", norm="post"),
    PairConfig(mask="bool", norm="post", sees="old", layers=3),
    PairConfig(mask="bool", form="sdpa", patch_mask=True, dynamic=True),
]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("config", FORMS, ids=describe)
def test_reduced_by_hand(config: PairConfig, semantics: str) -> None:
    check(config, semantics, {0: ONE, 1: ONE})


COLLISIONS = [
    PairConfig(text=8, sees="old"),  # text = head size = heads x batch
    PairConfig(text=8, grid=(2, 4), cls=False, form="sdpa", mask="bool"),  # and image = text
    PairConfig(text=4, grid=(2, 2), cls=False, heads=4, width=16, batch=4, layers=1),  # everything is 4
    PairConfig(text=25, grid=(4, 6), heads=5, width=25, batch=5, layers=1, sees="old"),  # text = image = width
]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("config", COLLISIONS, ids=describe)
def test_colliding_sizes(config: PairConfig, semantics: str) -> None:
    check(config, semantics, {0: ONE})


BUDGETS: dict[str, tuple[Any, Any, Any]] = {
    "pruning alone": (7, 0, 0),
    "image merging alone": (0, 0.3, 0),
    "text merging alone": (0, 0, 0.4),
    "merging alone": (0, 5, 2),
}


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(name: str, semantics: str) -> None:
    check(PairConfig(sees="old"), semantics, {1: BUDGETS[name]})


def test_what_the_image_layer_sees_matters() -> None:
    """The two kinds of METER are two models; a mix-up would not go unseen."""
    inputs = inputs_for(PairConfig())
    outputs = []
    for sees in ("updated", "old"):
        config = PairConfig(sees=sees)
        with torch.no_grad():
            outputs.append(reduce_graph(program(config), wanted("reference", {0: ONE}))(**inputs))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


# --- other shapes of model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("semantics", "form", "mask"),
    [
        ("reference", "unfused", "additive"),
        ("reference", "sdpa", "bool"),
        ("paper", "unfused", "bool"),
        ("safe", "sdpa", "additive"),
    ],
)
@pytest.mark.parametrize("kind", [ImageFirst, Decoder, Bridge, SharedAttention])
def test_other_models(kind: type[CoAttention], semantics: str, form: str, mask: str) -> None:
    layers = 3 if kind is Decoder else 2
    check(PairConfig(form=form, mask=mask, layers=layers), semantics, {0: ONE, 1: ONE}, kind)


@pytest.mark.parametrize("kind", [Decoder, Bridge, SharedAttention])
def test_other_models_with_an_open_batch_and_padded_patches(kind: type[CoAttention]) -> None:
    config = PairConfig(dynamic=True, patch_mask=True, norm="post")
    check(config, "paper", {0: ONE}, kind)
    if kind is Bridge:
        passed(program(config, kind), wanted("safe", {0: ONE}), verified=True)


def test_later_layers_of_a_decoder_see_the_reduced_image() -> None:
    """Its image features are computed once, before every site."""
    config = PairConfig(layers=3, mask="none")
    plan = reduce(program(config, Decoder), wanted("paper", {0: ONE}, Decoder)).plan
    assert plan.tokens() == {
        name: {"text": 5, **({"image": 14} if name.startswith("cross") else {})}
        for layer in range(3)
        for name in (f"text.{layer}", f"cross_modal.{layer}")
    } | {"text.0": {"text": 7}}


def test_towers_beside_the_pairs_keep_their_tokens() -> None:
    config = PairConfig(layers=3)
    reduced = reduce(program(config, Bridge), wanted("paper", {0: ONE, 1: ONE}))
    # Sites `text.0, text.1, ...` go tower, pair, tower, pair.
    tokens = reduced.plan.tokens()
    assert [tokens[f"text.{2 * i}"] for i in range(3)] == [{"text": 7}] * 3
    assert [tokens[f"vision.{2 * i}"] for i in range(3)] == [{"image": 25}] * 3
    assert [tokens[f"text.{2 * i + 1}"]["text"] for i in range(3)] == [7, 5, 4]
    aligned = [m for m in reduced.module.modules() if isinstance(m, AlignAxis) and m.mode == "mean"]
    assert len(aligned) >= 4  # text and image of two links


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(kind: type[CoAttention], schedule: Schedule, config: PairConfig | None = None) -> str:
    with pytest.raises(LocateError) as caught:
        reduce_graph(program(config or PairConfig(), kind), schedule)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_image_layer_of_a_pair_is_no_site(semantics: str) -> None:
    message = refused(CoAttention, schedule(semantics, (1,)))
    assert "cross_modal.1 (image_layers.0.cross)" in message
    assert "from [image:25] to [text:7]" in message
    assert "image-to-text" in message
    assert "even layers" in message


def test_where_the_image_layer_comes_first_the_even_nodes_are_refused() -> None:
    message = refused(ImageFirst, schedule("reference", (0,)))
    assert "cross_modal.0 (image_layers.0.cross)" in message
    assert "text layer" in message


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_text_that_never_attends_to_itself_cannot_be_merged(semantics: str) -> None:
    message = refused(CrossOnly, wanted(semantics, {0: ONE}, CrossOnly))
    assert "cross_modal.0 (text_layers.0.cross)" in message
    assert "no self-attention over the text" in message
    assert "merge: {text: 0}" in message


def test_text_that_never_attends_to_itself_has_no_say_over_the_image() -> None:
    """The image alone can be reduced there."""
    config = PairConfig(mask="none")
    reduced = reduce(program(config, CrossOnly), wanted("paper", {0: (5, 4, 0)}, CrossOnly))
    assert reduced.plan.tokens() == {f"cross_modal.{i}": {"text": 7, "image": 16} for i in range(2)}


def test_a_site_whose_tokens_nothing_reads_is_refused() -> None:
    """After the last layer of a decoder nothing attends to the image."""
    config = PairConfig(layers=2, mask="none")
    for sites in ({1: (5, 4, 0)}, {0: ONE, 1: (5, 0, 0)}):
        with pytest.raises(PlanError) as caught:
            reduce_graph(program(config, Decoder), wanted("paper", sites, Decoder))
        assert "cross_modal.1 (text_layers.1.cross)" in str(caught.value)
        assert "image tokens that nothing reads" in str(caught.value)
    # One layer earlier there is somebody.
    plan = reduce(program(config, Decoder), wanted("paper", {0: (5, 4, 0)}, Decoder)).plan
    assert plan.tokens()["cross_modal.1"] == {"text": 7, "image": 16}


class TowerThenCross(CrossOnly):
    """A text tower of one layer, then attention to the image twice, and none to itself between."""

    def make_layers(self, config: PairConfig) -> None:
        super().make_layers(config)
        self.tower = nn.ModuleList([self.image_layers[0].own])

    def fuse(self, text: Tensor, text_mask: Any, image: Tensor, image_mask: Any) -> tuple[Tensor, Tensor]:
        return super().fuse(text + self.tower[0](text, text_mask), text_mask, image, image_mask)


def test_keys_from_before_the_last_reducer_are_not_taken() -> None:
    """The second site's text was merged since its last self-attention: that one's keys are of other tokens."""
    one = reduce(program(PairConfig(), TowerThenCross), wanted("safe", {0: ONE}, CrossOnly))
    assert one.plan.sites[0].after["text"] == 5
    message = refused(TowerThenCross, wanted("safe", {0: ONE, 1: ONE}, CrossOnly))
    assert "cross_modal.1" in message
    assert "self-attention" in message


# --- one module, no layers ------------------------------------------------------------------------------------------


class Flat(CoAttention):
    """One pair, in modules without a number."""

    def make_layers(self, config: PairConfig) -> None:
        self.asking, self.asked = CrossLayer(config), CrossLayer(config)

    def fuse(self, text: Tensor, text_mask: Any, image: Tensor, image_mask: Any) -> tuple[Tensor, Tensor]:
        new = self.asking(text, text_mask, image, image_mask)
        return new, self.asked(image, image_mask, new, text_mask)


@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_pairs_without_a_number_in_their_path(semantics: str) -> None:
    config = PairConfig(layers=1)
    flat, numbered = make(config, kind=Flat), make(config, kind=CoAttention)
    places = {"asking.": "text_layers.0.", "asked.": "image_layers.0."}
    weights = flat.state_dict()
    for old, new in places.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    numbered.load_state_dict(weights)
    inputs = inputs_for(config)
    module = passed(capture(flat, inputs), wanted(semantics, {0: ONE})).reduced
    with torch.no_grad():
        expected, _ = Oracle(numbered, {0: ONE}, semantics)(inputs)
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


def test_every_option_is_somewhere() -> None:
    for name, values in {"form": 2, "norm": 2, "mask": 3, "sees": 2, "dynamic": 2, "patch_mask": 2}.items():
        assert len({getattr(config, name) for config in FORMS}) == values
    assert issubclass(LocateError, PumerError)
    assert dataclasses.replace(FORMS[0]).layers == 2
