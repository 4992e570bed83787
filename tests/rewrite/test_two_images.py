"""Models that run the same text beside each of two images: each pass equals the model of one image, reduced by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pumer_compile import Program, Schedule, capture, reduce
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import locate
from pumer_compile.errors import AxisError, PumerError
from pumer_compile.passes.count import tokens_after_layers
from tests.support.helpers import combine, reduce_image, reduce_text
from tests.support.models import Config, Fusion, Layer, attend, inputs_for, make, passed, reduced, schedule
from tests.support.pairs import CoAttention, Oracle, PairConfig
from tests.support.two_images import Inputs, OwnPlaces, TextOnce, TwoPasses, one_image, two_images

SEMANTICS = ("reference", "paper", "safe")
ONE = (0.2, 0.3, 0.25)


@functools.cache
def program(config: Config, kind: type[Fusion]) -> Program:
    return capture(make(config, kind=kind), two_images(config), dynamic_batch=config.dynamic)


def counts_of(state: Any) -> dict[str, tuple[int, ...]]:
    found = tokens_after_layers(state.attentions, state.insertions, state.rewriter)
    return {name: tuple(tokens.values()) for name, tokens in found.items()}


@pytest.mark.parametrize("kind", [OwnPlaces, TextOnce])
def test_streams_of_their_own(kind: type[Fusion]) -> None:
    annotation = annotate(program(Config(layers=2), kind).module)
    assert annotation.streams == {"text": 7, "image": 25, "image_1": 25}
    assert annotation.modality == {"text": "text", "image": "image", "image_1": "image"}
    assert annotation.learned == {"text": 0, "image": 1, "image_1": 1}
    axes = [str(a.query_axis) for a in locate(program(Config(layers=2), kind).module, annotation)]
    assert axes == ["[text:7 | image:25]"] * 2 + ["[text:7 | image_1:25]"] * 2


def test_a_layer_that_runs_again_is_the_same_site() -> None:
    module = program(Config(layers=2), TwoPasses).module
    found = locate(module, annotate(module))
    assert [(a.address, a.call) for a in found] == [
        ("cross_modal.0", 0),
        ("cross_modal.1", 0),
        ("cross_modal.0", 1),
        ("cross_modal.1", 1),
    ]
    assert [a.name for a in found] == [
        "cross_modal_0",
        "cross_modal_1",
        "cross_modal_0.call_1",
        "cross_modal_1.call_1",
    ]


def test_layers_that_share_their_weights_are_not_one_layer() -> None:
    """A layer that runs on what came out of it is another node each time (ALBERT)."""

    class Albert(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x = self.embed(input_ids, pixel_values)
            for _ in range(3):
                x = self.layers[0](x, None)
            return self.finish(x, input_ids.shape[1])

    config = Config(mask="none", layers=1)
    model, inputs = make(config, kind=Albert), inputs_for(config)
    state = passed(capture(model, inputs), schedule("paper", (1,)))
    assert [(a.address, a.call) for a in state.attentions] == [(f"cross_modal.{i}", 0) for i in range(3)]
    assert list(counts_of(state).values()) == [(7, 25), (5, 14), (5, 14)]
    three = make(Config(mask="none", layers=3))
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("layers.")}
    for i in range(3):
        weights |= {k.replace("layers.0", f"layers.{i}"): v for k, v in model.state_dict().items() if "layers.0" in k}
    three.load_state_dict(weights)
    with torch.no_grad():
        expected, _ = reduced(three, inputs, {1: ONE}, "paper")
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=1e-5, rtol=0)


CONFIGS = [
    Config(),
    Config(form="sdpa", mask="bool", norm="post", dynamic=True, layers=2),
    Config(text=8, grid=(2, 4), cls=False, mask="none", layers=2),  # text = image = head size = heads x batch
]


# Every two of a kind, a configuration and a semantics meet.
@pytest.mark.parametrize(
    ("kind", "config", "semantics"),
    [
        pytest.param(kind, CONFIGS[i], SEMANTICS[(i + j) % 3], id=f"{kind.__name__}-{name}-{SEMANTICS[(i + j) % 3]}")
        for j, kind in enumerate((TwoPasses, OwnPlaces, TextOnce))
        for i, name in enumerate(("default", "fused", "colliding"))
    ],
)
def test_each_pass_is_the_model_of_one_image(kind: type[Fusion], config: Config, semantics: str) -> None:
    verified = semantics == "safe" and not config.dynamic
    state = passed(program(config, kind), schedule(semantics, (0, 1)), verified)
    inputs, model = two_images(config, 5), make(config, kind=kind)
    with torch.no_grad():
        parts = [reduced(model, one_image(inputs, i), {0: ONE, 1: ONE}, semantics) for i in range(2)]
        expected = torch.cat([output for output, _ in parts], -1)
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=1e-5, rtol=0)
        assert (model(**inputs) - expected).abs().max() > 1e-4
    names = [f"cross_modal.{i}{call}" for call in ("", "@1") for i in range(config.layers)]
    assert counts_of(state) == dict(zip(names, parts[0][1] + parts[1][1], strict=True))


def test_the_plan_has_both_passes() -> None:
    result = reduce(program(Config(layers=2), OwnPlaces), schedule("reference", (0,)))
    assert [(s.name, s.site, s.call, s.module) for s in result.plan.sites] == [
        ("cross_modal.0", "cross_modal.0", 0, "layers.0.attention"),
        ("cross_modal.0@1", "cross_modal.0", 1, "layers.0.attention"),
    ]
    assert [list(s.after.values()) for s in result.plan.sites] == [[5, 12], [5, 12]]
    assert result.plan.sites[1].before == {"text": 7, "image_1": 25}
    assert [s["site"] for s in result.plan.to_dict()["sites"]] == ["cross_modal.0", "cross_modal.0@1"]
    first, second = (s.multiply_adds for s in result.plan.sites)
    assert first[1] < first[0] and second[1] < second[0]
    total = result.plan.multiply_adds_before, result.plan.multiply_adds_after
    assert total[0] - total[1] == first[0] - first[1] + second[0] - second[1]


class TwoSizes(OwnPlaces):
    """Two images of different sizes."""

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor, smaller: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        outputs = [Fusion.forward(self, input_ids, image, attention_mask) for image in (pixel_values, smaller)]
        return torch.cat(outputs, -1)


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("budgets", [ONE, (0, 0.3, 0.25)], ids=["all", "merging alone"])
def test_images_of_different_sizes(budgets: tuple[Any, Any, Any], semantics: str) -> None:
    """The words are embedded for each; that the second image has fewer tokens is no reason to refuse."""
    config = Config(layers=2)
    model, inputs = make(config, kind=TwoSizes), inputs_for(config)
    inputs["smaller"] = inputs_for(Config(grid=(3, 4)), 3)["pixel_values"]
    prune, image, text = budgets
    wanted = schedule(semantics, (0,), prune=prune, merge={"image": image, "text": text})
    state = passed(capture(model, inputs), wanted)
    given = {k: v for k, v in inputs.items() if k != "smaller"}
    with torch.no_grad():
        expected = [
            reduced(model, {**given, "pixel_values": inputs[name]}, {0: budgets}, semantics)
            for name in ("pixel_values", "smaller")
        ]
        found = state.reduced(**inputs)
        torch.testing.assert_close(found, torch.cat([output for output, _ in expected], -1), atol=1e-5, rtol=0)
    assert list(counts_of(state).values()) == expected[0][1] + expected[1][1]


# --- layers that take the text and the image apart ------------------------------------------------------------------


class TwoImages(CoAttention, OwnPlaces):
    """Co-attention with each image; the words are embedded for each (like METER) or once."""

    once = False

    def streams(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(input_ids), self.image(pixel_values)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.with_images(input_ids, list(pixel_values.unbind(1)), attention_mask)

    def with_images(self, input_ids: Tensor, images: list[Tensor], attention_mask: Tensor | None) -> Tensor:
        outputs, known = [], self.text(input_ids)
        for pixels in images:
            text, image = self.streams(input_ids, pixels)
            masks = self.masks(image, attention_mask, None)
            outputs.append(self.conclude(*self.fuse(known if self.once else text, masks[0], image, masks[1])))
        return torch.cat(outputs, -1)


class EncodedOnce(TwoImages):
    once = True


def by_hand(model: TwoImages, inputs: Inputs, sites: dict[int, Any], semantics: str) -> Tensor:
    """The model of one image."""
    return Oracle(model, sites, semantics)(inputs)[0]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("kind", [TwoImages, EncodedOnce])
@pytest.mark.parametrize("budgets", [ONE, (5, 4, 0), (0, 0, 2)], ids=["all", "image alone", "text alone"])
def test_co_attention_with_each_image(budgets: tuple[Any, Any, Any], kind: type[CoAttention], semantics: str) -> None:
    """A text that was encoded once and is merged for the first image must not come to the second one merged."""
    config = PairConfig(sees="old" if semantics == "safe" else "updated")
    prune, image, text = budgets
    wanted = schedule(semantics, (0,), prune=prune, merge={"image": image, "text": text})
    captured, model = program(config, kind), make(config, kind=kind)
    if kind is EncodedOnce and text:
        with pytest.raises(AxisError) as caught:
            passed(captured, wanted)
        assert "cross_modal.0" in str(caught.value)
        assert "more than once" in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    inputs = two_images(config, 5)
    with torch.no_grad():
        expected = torch.cat([by_hand(model, one_image(inputs, i), {0: budgets}, semantics) for i in range(2)], -1)
        torch.testing.assert_close(passed(captured, wanted).reduced(**inputs), expected, atol=1e-5, rtol=0)
        assert (model(**inputs) - expected).abs().max() > 1e-4


def test_a_text_encoded_once_is_refused_wherever_the_site_is() -> None:
    """The second pass would run its first layer on the text that the first one's second layer merged."""
    for layers in ((0,), (2,), (0, 2)):
        with pytest.raises(AxisError, match="more than once"):
            passed(program(PairConfig(), EncodedOnce), schedule("paper", layers, merge={"text": 1}))


class SmallSecond(EncodedOnce):
    """A second image of so few tokens that a share of them rounds to none."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, smaller: Tensor) -> Tensor:
        return self.with_images(input_ids, [pixel_values, smaller], None)


def test_a_second_pass_that_is_left_out_does_not_get_the_text_of_the_first() -> None:
    """The published code leaves a layer out where its share prunes nothing; the check must look at that pass too."""
    config = PairConfig(mask="none", layers=1)
    model, inputs = make(config, kind=SmallSecond), inputs_for(config)
    inputs["smaller"] = inputs_for(Config(grid=(1, 2), mask="none"), 3)["pixel_values"]
    captured = capture(model, inputs)
    try:
        found = passed(captured, schedule("reference", (0,), prune=0.1, merge={"text": 2})).reduced
    except PumerError:
        return  # refusing it in words is right
    expected = []
    with torch.no_grad():
        for name, sites in (("pixel_values", {0: (0.1, 0, 2)}), ("smaller", {})):
            given = {"input_ids": inputs["input_ids"], "pixel_values": inputs[name]}
            expected.append(by_hand(model, given, sites, "reference"))
        torch.testing.assert_close(found(**inputs), torch.cat(expected, -1), atol=1e-5, rtol=0)


# --- where the two passes meet --------------------------------------------------------------------------------------


class Meeting(OwnPlaces):
    """Compares the words of the two passes, one by one."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        states = []
        for image in pixel_values.unbind(1):
            x = self.embed(input_ids, image)
            for layer in self.layers:
                x = layer(x, None)
            states.append(x[:, : input_ids.shape[1]])
        return (states[0] * states[1]).amax(1)


def test_words_of_two_passes_that_were_merged_apart_do_not_meet() -> None:
    config = Config(mask="none", layers=2)
    captured = program(config, Meeting)
    with pytest.raises(AxisError) as caught:
        passed(captured, schedule("paper", (0,)))
    message = str(caught.value)
    assert "two passes" in message
    assert "text" in message
    assert "aten.mul.Tensor" in message
    # With words that stay as they are there is nothing against it.
    module = passed(captured, schedule("paper", (0,), prune=5)).reduced
    model, inputs, states = make(config, kind=Meeting), two_images(config), []
    one = make(config, kind=OwnPlaces)
    one.load_state_dict(model.state_dict())
    one.finish = lambda x, text: x[:, :text]
    with torch.no_grad():
        for index in range(2):
            states.append(reduced(one, one_image(inputs, index), {0: (5, 0, 0)}, "paper")[0])
        torch.testing.assert_close(module(**inputs), (states[0] * states[1]).amax(1), atol=1e-5, rtol=0)


class SideBySide(OwnPlaces):
    """Words and both images in one sequence."""

    forward = Fusion.forward

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return torch.cat([self.text(input_ids), *map(self.image, pixel_values.unbind(1))], 1)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_images_side_by_side_are_one_stream(semantics: str) -> None:
    """What is joined belongs together, like the crops of one image."""
    config = Config(mask="none", cls=False, layers=2)
    model, inputs = make(config, kind=SideBySide), two_images(config)
    state = passed(capture(model, inputs), schedule(semantics, (0,)), verified=True)
    with torch.no_grad():
        expected, counts = reduced(model, inputs, {0: ONE}, semantics)
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=1e-5, rtol=0)
    assert state.annotation.streams == {"text": 7, "image": 48}
    assert list(counts_of(state).values()) == counts


class WordsBetween(OwnPlaces):
    """An image, words, and another image in one sequence."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.whole(input_ids, pixel_values)
        for layer in self.layers:
            x = layer(x, None)
        return self.classify(self.last(x).mean(1))

    def whole(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        first, second = map(self.image, pixel_values.unbind(1))
        return torch.cat([first, self.text(input_ids), second], 1)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_images_on_both_sides_of_the_words_are_two_streams(semantics: str) -> None:
    """Each is pruned by what the words see in it, and merged by itself."""
    config = Config(mask="none", cls=False, layers=2)
    model, inputs = make(config, kind=WordsBetween), two_images(config)
    wanted = schedule(semantics, (0,), prune=4, merge={"image": 5, "text": 2})
    state = passed(capture(model, inputs), wanted, verified=True)
    assert counts_of(state) == {f"cross_modal.{i}": (15, 5, 15) for i in range(2)}
    rows = []
    with torch.no_grad():
        for x in model.whole(inputs["input_ids"], inputs["pixel_values"]):
            x = three_streams(model.layers[0], x, semantics)
            last, ones = model.layers[1], [1.0] * 35
            normed = last.norm1(x)
            x = x + attend(last.attention, normed, normed, ones, ones, semantics, "none")[0]
            rows.append(x + last.mlp(last.norm2(x)))
        expected = model.classify(model.last(torch.stack(rows)).mean(1))
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=1e-5, rtol=0)


def three_streams(layer: Layer, x: Tensor, semantics: str) -> Tensor:
    """A layer over an image of 24 tokens, 7 words and another image, with reducers after its attention."""
    ones, words = [1.0] * len(x), slice(24, 31)
    normed = layer.norm1(x)
    output, seen, keys = attend(layer.attention, normed, normed, ones, ones, semantics, "none")
    kind, safe = "dot" if semantics == "paper" else "cosine", semantics == "safe"

    def image(start: int) -> list[list[int]]:
        part = slice(start, start + 24)
        groups = reduce_image(seen[:, words, part], keys[:, part], 20, 5, similarity=kind, in_order=safe)
        return [[start + i for i in group] for group in groups]

    text = [[24 + i for i in group] for group in reduce_text(keys[:, words], 2, similarity=kind, in_order=safe)]
    x = combine(x + output, image(0) + text + image(31)).float()
    return x + layer.mlp(layer.norm2(x))


def test_a_tower_that_runs_on_each_image_is_one_site() -> None:
    class Towers(OwnPlaces):
        def image(self, pixel_values: Tensor) -> Tensor:
            return self.layers[0](super().image(pixel_values), None)

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            outputs = [self.embed(input_ids, pixels) for pixels in pixel_values.unbind(1)]
            return torch.cat([self.finish(self.layers[1](x, None), 7) for x in outputs], -1)

    config = Config(mask="none", layers=2)
    captured = capture(make(config, kind=Towers), two_images(config))
    wanted = Schedule(semantics="paper", sites=({"at": "vision.0", "merge": {"image": 8}},))
    state = passed(captured, wanted)
    assert [(p.name, p.after) for _, p in state.insertions.done] == [
        ("vision.0", {"image": 17}),
        ("vision.0@1", {"image_1": 17}),
    ]
    assert counts_of(state)["cross_modal.0@1"] == (7, 17)
