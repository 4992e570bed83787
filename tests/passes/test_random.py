"""Random shapes, masks and budgets: the reduced graph against the model reduced by hand."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile import Schedule, capture
from pumer_compile.passes.count import tokens_after_layers
from tests.support.models import Config, inputs_for, make, passed, reduced
from tests.support.pairs import CoAttention, Oracle, PairConfig

SEMANTICS = ("reference", "paper", "safe", "tome")
# A capture takes a second: a failing example is shown as it is, and not made smaller.
few = settings(max_examples=10, phases=(Phase.explicit, Phase.generate))


def highest(x: Tensor, text: int) -> Tensor:
    """A head that reads every token, and none by its place."""
    return x.amax(1)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes that are as likely to be equal as not."""
    heads, size = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    mask = draw(st.sampled_from(("none", "additive", "bool")))
    return {
        "form": draw(st.sampled_from(("unfused", "sdpa"))),
        "norm": draw(st.sampled_from(("pre", "post"))),
        "mask": mask,
        "patch_mask": mask != "none" and draw(st.booleans()),
        "text": draw(st.integers(3, 9)),
        "grid": (draw(st.integers(2, 4)), draw(st.integers(2, 4))),
        "cls": draw(st.booleans()),
        "heads": heads,
        "width": heads * size,
        "batch": draw(st.integers(1, 4)),
        "layers": 2,
    }


@st.composite
def budgets(draw: st.DrawFn, config: Config, semantics: str) -> tuple[int, int, int]:
    """Numbers of tokens that fit: `(prune, image merge, text merge)`, not all of them 0."""
    most = config.image - max(1, config.cls)
    prune = 0 if semantics == "tome" else draw(st.integers(0, most))
    keep = config.image - prune
    image = draw(st.integers(0, (keep - 1) // 2))
    text = draw(st.integers(0 if prune or image else 1, (config.text - 1) // 2))
    return prune, image, text


def wanted(semantics: str, sites: dict[str, tuple[int, int, int]]) -> Schedule:
    entries = [{"at": at, "prune": p, "merge": {"image": i, "text": t}} for at, (p, i, t) in sites.items()]
    if semantics == "tome":
        return Schedule(method="tome", sites=entries)
    return Schedule(semantics=semantics, sites=entries)


@few
@given(st.data())
def test_one_sequence(data: st.DataObject) -> None:
    config = Config(**data.draw(shapes()), head=highest)
    semantics = data.draw(st.sampled_from(SEMANTICS))
    site, layer = data.draw(budgets(config, semantics)), data.draw(st.integers(0, 1))
    model = make(config)
    captured = capture(model, inputs_for(config))
    state = passed(captured, wanted(semantics, {f"cross_modal.{layer}": site}))
    inputs = inputs_for(config, seed=5)
    with torch.no_grad():
        expected, counts = reduced(model, inputs, {layer: site}, semantics)
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=2e-5, rtol=0)
    found = tokens_after_layers(state.attentions, state.insertions, state.rewriter)
    assert [tuple(tokens.values()) for tokens in found.values()] == counts


class Highest(CoAttention):
    """Reads every token of both streams."""

    def conclude(self, text: Tensor, image: Tensor) -> Tensor:
        return self.classify(self.last(text).amax(1) + self.last(image).amax(1))


@few
@given(st.data())
def test_pairs(data: st.DataObject) -> None:
    config = PairConfig(**data.draw(shapes()), sees=data.draw(st.sampled_from(("updated", "old"))))
    semantics = data.draw(st.sampled_from(SEMANTICS))
    site, pair = data.draw(budgets(config, semantics)), data.draw(st.integers(0, 1))
    model = make(config, kind=Highest)
    captured = capture(model, inputs_for(config))
    state = passed(captured, wanted(semantics, {f"cross_modal.{2 * pair}": site}))
    inputs = inputs_for(config, seed=5)
    with torch.no_grad():
        expected, counts = Oracle(model, {pair: site}, semantics)(inputs)
        torch.testing.assert_close(state.reduced(**inputs), expected, atol=2e-5, rtol=0)
    found = tokens_after_layers(state.attentions, state.insertions, state.rewriter)
    assert [(found[f"cross_modal.{2 * i}"]["text"], found[f"cross_modal.{2 * i}"]["image"]) for i in (0, 1)] == counts
