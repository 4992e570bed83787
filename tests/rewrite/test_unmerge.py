"""Heads that take tokens by position, behind a reducer that merges and prunes nothing: they read the old places.

The oracle is the model reduced by hand, each old place filled with the token that its own went into.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pumer_compile import Schedule, capture
from pumer_compile.errors import AxisError
from pumer_compile.passes.rewrite import log
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import AlignAxis
from tests.support.models import Config, Fusion, Head, State, inputs_for, make, reduced_states, schedule
from tests.support.walks import BASE, ManyHeads


def second_text(x: Tensor, text: int) -> Tensor:
    return x[:, 1]


def last_token(x: Tensor, text: int) -> Tensor:
    return x[:, -1]


def across_the_border(x: Tensor, text: int) -> Tensor:
    return x[:, text - 1 : text + 1].mean(1)


def without_first(x: Tensor, text: int) -> Tensor:
    return x[:, 1:].amax(1)


def every_second(x: Tensor, text: int) -> Tensor:
    return x[:, ::2].mean(1)


def grid(x: Tensor, text: int) -> Tensor:
    """Rows and columns of patches."""
    patches = x[:, text:].transpose(1, 2)
    return patches.view(x.shape[0], x.shape[2], 5, 5).amax(3).mean(2)


def convolved(x: Tensor, text: int) -> Tensor:
    weight = torch.linspace(-1, 1, x.shape[2] ** 2 * 3).view(x.shape[2], x.shape[2], 3).sin()
    return nn.functional.conv1d(x.transpose(1, 2), weight, padding=1).amax(2)


def mixed_again(x: Tensor, text: int) -> Tensor:
    """Behind an operator that goes by position, tokens from before it: each is brought to the tokens that are left."""
    return (x * x.roll(1, 1)).amax(1)


def mask_by_position(x: Tensor, text: int) -> Tensor:
    return (x > 0).flip(1)[:, 2].to(x.dtype)


HEADS = (second_text, last_token, across_the_border, without_first, every_second, grid, convolved, mask_by_position)
OF_MANY = (without_first, every_second, grid, convolved)
"""Those that read so many tokens that a merge shows."""
MERGE = {"image": 6, "text": 2}


def spread(state: State, members: list[list[list[int]]]) -> Tensor:
    """The token that each old one went into, by the groups of one reducer after the other."""
    x = state.x
    for groups in reversed(members):
        place = {old: new for new, group in enumerate(groups) for old in group}
        x = torch.stack([x[place[old]] for old in range(len(place))])
    return x


def states_of(config: Config, model: Fusion, inputs: dict[str, Tensor]) -> list[State]:
    counts = (0, MERGE["image"], MERGE["text"])
    states, _ = reduced_states(model, inputs, dict.fromkeys(range(config.layers), counts), "safe")
    return states


@pytest.mark.parametrize("layers", [1, 2])
def test_each_old_place_has_the_token_that_its_own_went_into(layers: int) -> None:
    config = dataclasses.replace(BASE, layers=layers)
    model = make(config, kind=type("Heads", (ManyHeads,), {"heads": HEADS}))
    captured = capture(model, inputs_for(config))
    module = reduce_graph(captured, schedule("safe", tuple(range(layers)), merge=MERGE))
    for seed in (7, 8):
        inputs = inputs_for(config, seed=seed)
        with torch.no_grad():
            found, states = module(**inputs), states_of(config, model, inputs)
            old = torch.stack([spread(state, state.history) for state in states]).float()
            expected = {head.__name__: head(model.last(old), config.text) for head in HEADS}
            unreduced = model(**inputs)
        assert states[0].history != states[1].history
        for head in HEADS:
            name = head.__name__
            torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=0)
            if head in OF_MANY:
                assert (unreduced[name] - expected[name]).abs().max() > 1e-3


def test_once_for_all_that_read_it() -> None:
    """Several heads of one value, and values that only the tokens' features go into: one product."""
    config = dataclasses.replace(BASE, layers=1)
    model = make(config, kind=type("Heads", (ManyHeads,), {"heads": (second_text, last_token, without_first)}))
    module = reduce_graph(capture(model, inputs_for(config)), schedule("safe", (0,), merge=MERGE))
    names = [name for name, m in module.named_modules() if isinstance(m, AlignAxis)]
    assert len(names) == 1 and names[0].startswith("reducer.unmerge.")


def test_what_is_mixed_with_reduced_tokens_is_brought_to_them_again() -> None:
    config = dataclasses.replace(BASE, layers=1, head=mixed_again)
    model = make(config)
    module = reduce_graph(capture(model, inputs_for(config)), schedule("safe", (0,), merge=MERGE))
    inputs = inputs_for(config, seed=7)
    with torch.no_grad():
        found, rows = module(**inputs), []
        for state in states_of(config, model, inputs):
            x = model.last(state.x.float())
            place = {old: new for new, group in enumerate(state.members) for old in group}
            rolled = torch.stack([x[place[old]] for old in range(len(place))]).roll(1, 0)
            means = torch.stack([rolled[group].mean(0) for group in state.members])
            rows.append((x * means).amax(0))
        expected = model.classify(torch.stack(rows))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("head", [second_text, without_first, grid, convolved], ids=lambda h: h.__name__)
def test_pruned_tokens_have_no_place_to_go_back_to(head: Head) -> None:
    config = dataclasses.replace(BASE, head=head, layers=1)
    captured = capture(make(config), inputs_for(config))
    with pytest.raises(AxisError, match="those that were pruned have none, so merging without `prune`"):
        reduce_graph(captured, schedule("paper", (0,), prune=4, merge={"text": 1}))


def test_a_slice_at_a_border_brings_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    """Text and image are taken apart where they meet, which a reducer only moves."""
    config = dataclasses.replace(BASE, head=lambda x, text: x[:, :text].amax(1) + x[:, text:].amax(1), layers=1)
    with caplog.at_level("INFO", log.name):
        module = reduce_graph(
            capture(make(config), inputs_for(config)),
            Schedule(method="tome", sites=[{"at": "cross_modal.0", "merge": MERGE}]),
        )
    assert not any(isinstance(m, AlignAxis) for m in module.modules())
    assert "0 brought back to their old places" in caplog.text
