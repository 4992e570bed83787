"""`method: tome` in graphs: merging by size, and attention that knows the sizes, against the same written by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pumer_compile import Program, Schedule, capture
from pumer_compile.errors import PlanError, PumerError
from pumer_compile.passes.count import tokens_after_layers
from pumer_compile.reducers import SizeBias
from tests.support.helpers import groups, match
from tests.support.models import Attention, Config, Fusion, Layer, Staged, describe, inputs_for, make, passed, reduced
from tests.support.pairs import CoAttention, Oracle, Pair, PairConfig
from tests.support.tome import Tome
from tests.support.towers import Images, Words, given


@functools.cache
def program(config: Config, kind: type[Fusion]) -> Program:
    return capture(make(config, kind=kind), given(config, kind), dynamic_batch=config.dynamic)


def schedule(group: str, counts: Mapping[int, float], modality: str, semantics: str = "reference") -> Schedule:
    sites = [{"at": f"{group}.{i}", "merge": {modality: n}} for i, n in counts.items()]
    return Schedule(method="tome", semantics=semantics, sites=sites)


def by_hand(
    model: Fusion, inputs: dict[str, Tensor], counts: dict[int, int], semantics: str = "reference"
) -> tuple[list[Tome], Tensor]:
    """Every sample after its layers, and what the model makes of them."""
    image = "pixel_values" in inputs
    states = model.start(inputs["pixel_values" if image else "input_ids"])
    opened = torch.ones(states.shape[:2])
    if "attention_mask" in inputs:
        opened = inputs["attention_mask"].float()
    if "patch_mask" in inputs:
        opened[:, int(model.config.cls) :] = inputs["patch_mask"].float()
    learned = int(model.config.cls) if image else 0
    safe = semantics == "safe"
    samples = [Tome(x, real.tolist(), learned, safe) for x, real in zip(states, opened, strict=True)]
    for tome in samples:
        for index, layer in enumerate(model.layers):
            run_layer(tome, layer, counts.get(index, 0))
    return samples, model.conclude(model.last(torch.stack([tome.x for tome in samples])))


def run_layer(tome: Tome, layer: Layer, count: int) -> None:
    x = tome.x
    normed = layer.norm1(x) if layer.norm == "pre" else x
    attention = layer.attention
    query, key, value = (
        linear(normed).unflatten(-1, (attention.heads, -1)).transpose(0, 1)
        for linear in (attention.q, attention.k, attention.v)
    )
    x = x + attention.out(tome.attend(query, key, value))
    tome.x = layer.norm1(x) if layer.norm == "post" else x
    if count:
        tome.merge(key, count)
    x = tome.x
    tome.x = x + layer.mlp(layer.norm2(x)) if layer.norm == "pre" else layer.norm2(x + layer.mlp(x))


def check(
    config: Config, kind: type[Fusion], counts: dict[int, int], verified: bool = False, semantics: str = "reference"
) -> list[Tome]:
    group, modality = ("vision", "image") if kind is Images else ("text", "text")
    state = passed(program(config, kind), schedule(group, counts, modality, semantics), verified)
    inputs = given(config, kind, seed=5, batch=3 if config.dynamic else None)
    model = make(config, kind=kind)
    with torch.no_grad():
        samples, expected = by_hand(model, inputs, counts, semantics)
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=1e-5, rtol=0)
        assert (model(**inputs) - expected).abs().max() > 1e-4
    tokens = config.image if kind is Images else config.text
    left = [tokens - sum(n for i, n in counts.items() if i <= layer) for layer in range(config.layers)]
    found = tokens_after_layers(state.attentions, state.insertions, state.rewriter)
    assert found == {f"{group}.{i}": {modality: n} for i, n in enumerate(left)}
    return samples


IMAGES = [
    Config(mask="none", form="sdpa"),
    Config(mask="none", cls=False, norm="post"),
    Config(mask="bool", form="sdpa", patch_mask=True),
    Config(mask="additive", form="sdpa", patch_mask=True, dynamic=True),
    Config(mask="bool", patch_mask=True, cls=False, dynamic=True),
    Config(mask="additive", patch_mask=True, norm="post"),
    Config(mask="expanded", form="sdpa", patch_mask=True),
    Config(mask="none", grid=(2, 4), cls=False, heads=4, width=32, form="sdpa"),  # image = head size = heads x batch
]


@pytest.mark.parametrize("config", IMAGES, ids=describe)
def test_an_image_tower(config: Config) -> None:
    count = 3 if config.image < 10 else 8
    check(config, Images, {0: count, 1: count - 1}, verified=config is IMAGES[2])


def test_sizes_are_what_was_merged() -> None:
    """Padded patches have none; the class token is one token."""
    for tome in check(IMAGES[2], Images, {0: 10, 1: 6}):
        assert tome.sizes[0] == 1.0
        assert len(tome.sizes) == 9
        assert sum(tome.sizes) <= 25
    first, second = check(IMAGES[0], Images, {0: 12, 1: 6})
    assert sum(first.sizes) == sum(second.sizes) == 25


def test_the_first_token_may_go_where_no_learned_one_leads() -> None:
    config = Config(mask="none", cls=False, text=7, layers=1)
    state = passed(program(config, Images), schedule("vision", {0: 12}, "image"))
    assert state.insertions.sites[0].reducers["image"].merger.protected == 0
    check(config, Images, {0: 12})  # all twelve even ones, the first too


TEXTS = [
    Config(mask="none", form="sdpa"),
    Config(mask="bool", form="sdpa", text=10),
    Config(mask="additive", text=10, dynamic=True),
    Config(mask="additive", form="sdpa", text=8, norm="post"),  # text = head size = heads x batch
    Config(mask="expanded", text=9),
]


@pytest.mark.parametrize("config", TEXTS, ids=describe)
def test_a_text_tower_with_padding(config: Config) -> None:
    check(config, Words, {0: 2, 1: 2}, verified=config is TEXTS[1])


SAFE = [
    (Images, IMAGES[3], {0: 8, 1: 7}),
    (Images, IMAGES[4], {0: 8, 1: 7}),
    (Images, IMAGES[7], {0: 3, 1: 2}),  # without a class token: the first token may merge away
    (Words, TEXTS[2], {0: 2, 1: 2}),
]


@pytest.mark.parametrize(("kind", "config", "counts"), SAFE)
def test_tokens_in_their_old_order(kind: type[Fusion], config: Config, counts: dict[int, int]) -> None:
    """The second layer splits what the first has left by its place, so that the order tells in what it gives."""
    check(config, kind, counts, semantics="safe")
    inputs, model = given(config, kind, seed=5), make(config, kind=kind)
    with torch.no_grad():
        found, published = (by_hand(model, inputs, counts, semantics)[1] for semantics in ("safe", "reference"))
    assert (found - published).abs().max() > 1e-4


def test_padding_does_not_count() -> None:
    """Real words merge with each other; what padding has joined still counts as its words alone."""
    samples = check(Config(mask="bool", form="sdpa", text=12), Words, {0: 5, 1: 3})
    lengths = [12, 10]
    assert [sum(tome.sizes) for tome in samples] == lengths


def test_a_head_that_reads_the_first_word_gets_that_word_or_nothing() -> None:
    """No learned token leads a text: its first word (`[CLS]`, say) may merge away like any other, and another one comes
    first."""

    class First(Words):
        def conclude(self, x: Tensor) -> Tensor:
            return self.classify(x[:, 0])

    config = Config(mask="none", text=8, layers=2)
    model, inputs = make(config, kind=First), given(config, First)
    captured, wanted = capture(model, inputs), schedule("text", {0: 4}, "text")  # every even one merges away
    try:
        module = passed(captured, wanted).reduced
    except PumerError as error:
        assert "position 0" in str(error)
        return
    rows = []
    with torch.no_grad():
        for tome in [Tome(x, [1.0] * 8, 0) for x in model.start(**inputs)]:
            normed = model.layers[0].norm1(tome.x)
            keys = model.layers[0].attention.k(normed).unflatten(-1, (4, 8)).transpose(0, 1)
            pairs = match(keys.double().mean(0).numpy(), 4, protected=0)
            place = next(i for i, group in enumerate(groups(8, pairs)) if 0 in group)
            run_layer(tome, model.layers[0], 4)
            run_layer(tome, model.layers[1], 0)
            rows.append(model.last(tome.x)[place])
        torch.testing.assert_close(module(**inputs), model.classify(torch.stack(rows)), atol=1e-5, rtol=0)


# --- both modalities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["unfused", "sdpa"])
@pytest.mark.parametrize("mask", ["none", "additive", "bool"])
def test_text_and_image_in_one_attention(mask: str, form: str) -> None:
    config = Config(form=form, mask=mask, patch_mask=mask == "bool", head=lambda x, text: x.amax(1))
    model, inputs = make(config), inputs_for(config)
    merge = {"image": 6, "text": 2}
    wanted = Schedule(method="tome", sites=[{"at": f"cross_modal.{i}", "merge": merge} for i in (0, 1)])
    module = passed(capture(model, inputs), wanted).reduced
    with torch.no_grad():
        expected, _ = reduced(model, inputs, {0: (0, 6, 2), 1: (0, 6, 2)}, "tome")
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


def test_layers_after_a_tower_know_the_sizes() -> None:
    """The image is merged in its tower; where text joins it, words count once."""
    config = Config(mask="none", layers=1, form="sdpa")
    model, inputs = make(config, kind=Staged), inputs_for(config)
    module = passed(capture(model, inputs), schedule("vision", {0: 8}, "image")).reduced
    x = Fusion.embed(model, **inputs)
    rows = []
    with torch.no_grad():
        for tokens in x:
            text, image = Tome(tokens[:7], [1.0] * 7, 0), Tome(tokens[7:], [1.0] * 25, 1)
            run_layer(text, model.text_layers[0], 0)
            run_layer(image, model.image_layers[0], 8)
            both = Tome(torch.cat([text.x, image.x]), [*text.sizes, *image.sizes], 0)
            run_layer(both, model.layers[0], 0)
            rows.append(both.x)
        torch.testing.assert_close(module(**inputs), model.finish(torch.stack(rows), 7), atol=1e-5, rtol=0)
    assert sum(isinstance(m, SizeBias) for m in module.modules()) == 1


class ToMeInPairs(Oracle):
    """Merges the image after its self-attention in the first image layer."""

    def pair_of_layers(self, index: int, pair: Pair) -> None:
        self.text_layer(index, pair, self.model.text_layers[index])
        layer, image = self.model.image_layers[index], pair.image
        keys: list[Any] = []

        def own(y: Tensor) -> Tensor:
            output, _, found = self.attend(layer.own, y, image.with_x(y))
            keys.append(found)
            return output

        image = image.with_x(self.residual(layer.norm1, image.x, own))
        if index == 0:
            tome = Tome(image.x, image.sizes, int(self.config.cls))
            image = image.reduced(tome.merge(torch.from_numpy(keys[0]), 8), "tome")
        crossed = self.residual(layer.norm2, image.x, lambda y: self.attend(layer.cross, y, pair.text)[0])
        pair.image = image.with_x(self.residual(layer.norm3, crossed, layer.mlp))


@pytest.mark.parametrize(
    "config",
    [PairConfig(form="sdpa", patch_mask=True, mask="bool"), PairConfig(norm="post"), PairConfig(mask="none")],
    ids=describe,
)
def test_text_that_attends_to_merged_image_tokens_knows_their_sizes(config: PairConfig) -> None:
    model, inputs = make(config, kind=CoAttention), inputs_for(config)
    wanted = Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 8}}])
    module = passed(capture(model, inputs), wanted, verified=True).reduced
    with torch.no_grad():
        expected, _ = ToMeInPairs(model, {}, "tome")(inputs)
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)
        assert (model(**inputs) - expected).abs().max() > 1e-4


class Highest(CoAttention):
    """Reads every token, and none by its place."""

    def conclude(self, text: Tensor, image: Tensor) -> Tensor:
        return self.classify(self.last(text).amax(1) + self.last(image).amax(1))


def test_tome_at_a_text_to_image_attention_merges_both() -> None:
    """The image by the keys that the text attends to, the text by those of its own attention."""
    config = PairConfig(form="sdpa", mask="additive")
    model, inputs = make(config, kind=Highest), inputs_for(config)
    wanted = Schedule(method="tome", sites=[{"at": "cross_modal.0", "merge": {"image": 8, "text": 2}}])
    module = passed(capture(model, inputs), wanted).reduced
    with torch.no_grad():
        expected, counts = Oracle(model, {0: (0, 8, 2)}, "tome")(inputs)
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)
    assert counts == [(5, 17), (5, 17)]


# --- what does not go -----------------------------------------------------------------------------------------------


def test_only_later_attentions_know_sizes() -> None:
    module = passed(program(IMAGES[0], Images), schedule("vision", {1: 8}, "image")).reduced
    sized = [n for n in module.graph.nodes if n.op == "call_module" and "sizes" in str(n.target)]
    assert [str(n.target) for n in sized] == ["reducer.sizes.vision_2"]


def test_budgets_that_do_not_fit() -> None:
    with pytest.raises(PlanError, match="at most 12"):
        passed(program(IMAGES[0], Images), schedule("vision", {0: 13}, "image"))
    with pytest.raises(PlanError, match="nothing"):
        passed(
            program(IMAGES[0], Images), Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 0.01}}])
        )
    with pytest.raises(PlanError, match="text"):
        passed(program(IMAGES[0], Images), schedule("vision", {0: 3}, "text"))


class Causal(Attention):
    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(context.transpose(1, 2).flatten(2))


def test_a_causal_attention_after_a_site_is_refused() -> None:
    config = Config(mask="none", layers=2)
    model = make(config, kind=Images)
    model.layers[1].attention.__class__ = Causal
    captured = capture(model, given(config, Images))
    with pytest.raises(PumerError) as caught:
        passed(captured, schedule("vision", {0: 4}, "image"))
    assert "vision.1" in str(caught.value)
    assert "causal" in str(caught.value)


class Folded(Attention):
    """Heads folded into the batch, as `nn.MultiheadAttention` has them."""

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        q, k, v = (self.split(m(x)).flatten(0, 1) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        context = (scores.softmax(-1) @ v).unflatten(0, (x.shape[0], -1))
        return self.out(context.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_heads_folded_into_the_batch_know_the_sizes(dynamic: bool) -> None:
    config = Config(mask="none", layers=2)
    model, inputs = make(config, kind=Images), given(config, Images)
    plain = make(config, kind=Images)
    model.layers[1].attention.__class__ = Folded
    module = passed(capture(model, inputs, dynamic_batch=dynamic), schedule("vision", {0: 8}, "image")).reduced
    inputs = given(config, Images, seed=5, batch=3 if dynamic else 2)
    with torch.no_grad():
        _, expected = by_hand(plain, inputs, {0: 8})
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)
