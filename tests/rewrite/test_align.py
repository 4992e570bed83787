"""Values from before a reducer, brought to the tokens after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pumer_compile import capture
from pumer_compile.analysis.axes import Dim, Tokens
from pumer_compile.errors import AxisError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import AlignAxis
from tests.support.helpers import combine
from tests.support.models import Config, Fusion, highest, inputs_for, make, reduced, reduced_states, schedule
from tests.support.walks import BASE, SITES
from tests.support.walks import walk as walked


class Skip(Fusion):
    """Adds something that was there before the reducers to what comes after them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(1, config.text + config.image, config.width))

    old: Callable[[Skip, Tensor], Tensor]

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        before = self.embed(input_ids, pixel_values)
        x = before
        for layer in self.layers:
            x = layer(x, None)
        return (x + self.old(before)).amax(1)


OLD: dict[str, Callable[[Skip, Tensor], Tensor]] = {
    "features from before": lambda m, x: x.tanh(),
    "a table": lambda m, x: m.table,
    "a slice of a wider table": lambda m, x: m.table[:, : x.shape[1]] * 2,
    "one number for each token": lambda m, x: x.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_features_from_before_are_averaged(name: str, semantics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Skip, "old", OLD[name], raising=False)
    model, inputs = make(BASE, kind=Skip), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule(semantics, (0,)))
    states, _ = reduced_states(model, inputs, SITES, semantics)
    before = model.embed(**inputs)
    old = OLD[name](model, before).expand(2, -1, -1)
    expected = torch.stack([(s.x + combine(old[b], s.members)).amax(0) for b, s in enumerate(states)])
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected.float(), atol=1e-5, rtol=0)
    assert sum(isinstance(m, AlignAxis) for m in module.modules()) == 1


def test_maps_are_composed_over_several_reducers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning only: features from before two reducers are those of the tokens that survived both."""
    monkeypatch.setattr(Skip, "old", OLD["features from before"], raising=False)
    config = dataclasses.replace(BASE, layers=3)
    model, inputs = make(config, kind=Skip), inputs_for(config)
    module = reduce_graph(capture(model, inputs), schedule("paper", (0, 1), prune=6))
    first, _ = reduced_states(model, inputs, {0: (6, 0, 0)}, "paper")
    both, _ = reduced_states(model, inputs, {0: (6, 0, 0), 1: (6, 0, 0)}, "paper")
    before = model.embed(**inputs).tanh()
    rows = []
    for b, state in enumerate(both):
        members = [[first[b].members[i][0]] for (i,) in state.members]
        rows.append((state.x + combine(before[b], members)).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(rows).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", ["expanded", "bool"])
def test_a_mask_is_aligned_anew_for_every_reducer(mask: str) -> None:
    """One mask for all layers, whose rows are alike: each layer takes it at its own tokens."""
    config = dataclasses.replace(BASE, mask=mask, layers=3, patch_mask=True, head=highest)
    model, inputs = make(config), inputs_for(config)
    module = reduce_graph(capture(model, inputs), schedule("safe", (0, 1), prune=4, merge={"image": 3, "text": 1}))
    sites = {0: (4, 3, 1), 1: (4, 3, 1)}
    with torch.no_grad():
        expected, _ = reduced(model, inputs, sites, "safe")
        torch.testing.assert_close(module(**inputs), expected.float(), atol=1e-5, rtol=0)


class Biased(Fusion):
    """A mask and a learned bias in one, made once for all layers or for each."""

    once = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        length = config.text + config.image
        self.bias = nn.Parameter(torch.randn(1, config.heads, length, length))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        mask = self.mask(x, attention_mask, None)
        both = mask + self.bias
        for layer in self.layers:
            x = layer(x, both if self.once else mask + self.bias)
        return self.last(x).amax(1)


def test_a_mask_and_a_bias_in_one_are_aligned_anew_for_every_reducer() -> None:
    config = dataclasses.replace(BASE, mask="additive", layers=3)
    model, inputs = make(config, kind=Biased), inputs_for(config)
    found = []
    for once in (True, False):
        model.once = once  # type: ignore[assignment]  # a plain attribute
        module = reduce_graph(capture(model, inputs), schedule("safe", (0, 1), prune=4))
        with torch.no_grad():
            found.append(module(**inputs))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


class CutText(Fusion):
    """Without the first word: cut before old and new tokens meet, or after."""

    late = True

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        old = self.embed(input_ids, pixel_values)
        x = self.layers[0](old, None)
        y = (x + old.tanh())[:, 1:] if self.late else x[:, 1:] + old.tanh()[:, 1:]
        return y.amax(1)


def test_a_part_of_a_stream_that_no_reducer_changes_stands_beside_one_that_is_aligned() -> None:
    config = dataclasses.replace(BASE, layers=1)
    model, inputs = make(config, kind=CutText), inputs_for(config)
    found = []
    for late in (True, False):
        model.late = late  # type: ignore[assignment]  # a plain attribute
        module = reduce_graph(capture(model, inputs), schedule("safe", (0,), prune=4))
        assert sum(isinstance(m, AlignAxis) for m in module.modules()) == 1
        with torch.no_grad():
            found.append(module(**inputs))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_a_part_of_a_stream_is_not_aligned() -> None:
    """A map is of a whole stream. Cuts of reduced tokens are refused before; this is asked again where a map is
    applied."""
    walk, _ = walked(BASE, schedule("paper", (0,)))
    cut = next(n for n in walk.source.graph.nodes if n.target is torch.ops.aten.cat.default)
    kind = walk.annotation.axis(Dim(cut, 1))
    assert isinstance(kind, Tokens)
    parts = Tokens(tuple(s._replace(whole=False) for s in kind.segments))
    with pytest.MonkeyPatch.context() as patch:
        assert walk.aligner.whole_streams(walk, Dim(cut, 1), cut, ["image"]) == kind
        patch.setattr(walk.annotation, "axis", lambda dim: parts)
        with pytest.raises(AxisError, match=r"cannot be aligned.*whole streams"):
            walk.aligner.whole_streams(walk, Dim(cut, 1), cut, ["image"])


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_in_front_are_not_aligned(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample keeps other tokens, so a table without a batch dimension has no room for them; one sample is no
    exception."""
    monkeypatch.setattr(Skip, "old", lambda m, x: m.table[0], raising=False)
    config = dataclasses.replace(BASE, batch=batch)
    with pytest.raises(AxisError, match=r"dimension 0 of .* cannot be aligned"):
        reduce_graph(capture(make(config, kind=Skip), inputs_for(config)), schedule("paper", (0,)))


def test_positions_are_gathered_after_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    def places(model: Skip, x: Tensor) -> Tensor:
        return torch.arange(x.shape[1]).view(1, -1, 1)

    monkeypatch.setattr(Skip, "old", places, raising=False)
    model, inputs = make(BASE, kind=Skip), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule("paper", (0,), prune=6))
    states, _ = reduced_states(model, inputs, {0: (6, 0, 0)}, "paper")
    expected = []
    for state in states:
        place = torch.tensor([[float(i)] for (i,) in state.members])
        expected.append((state.x + place).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected), atol=1e-5, rtol=0)
    with pytest.raises(AxisError, match="integers of merged tokens have no mean"):
        reduce_graph(capture(model, inputs), schedule("paper", (0,), merge={"text": 2}))


def test_flags_from_before_are_true_where_any_token_was() -> None:
    class Flagged(Skip):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            high = before.mean(-1, keepdim=True) > 0
            return torch.where(high, self.layers[1](self.layers[0](before, None), None), -9.0).amax(1)

    model, inputs = make(BASE, kind=Flagged), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule("paper", (0,)))
    states, _ = reduced_states(model, inputs, SITES, "paper")
    high = model.embed(**inputs).mean(-1) > 0
    expected = []
    for b, state in enumerate(states):
        keep = torch.tensor([[any(high[b, i] for i in group)] for group in state.members])
        expected.append(torch.where(keep, state.x, -9.0).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected), atol=1e-5, rtol=0)


def test_a_sum_over_tokens_from_before_and_after_is_refused() -> None:
    class Rollout(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x = self.layers[1](self.layers[0](before, None), None)
            return ((before @ before.transpose(1, 2)).sigmoid() @ x).amax(1)

    captured = capture(make(BASE, kind=Rollout), inputs_for(BASE))
    with pytest.raises(AxisError) as caught:
        reduce_graph(captured, schedule("paper", (0,)))
    message = str(caught.value)
    assert "aten.matmul.default" in message
    assert "before a reducer" in message
    assert "test_align.py:" in message


@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_attention_to_tokens_from_before_sees_them_reduced(semantics: str) -> None:
    """The same with a softmax is a cross-modal attention, and there every use of a reduced stream sees the reduced
    one."""

    class Rollout(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x = self.layers[1](self.layers[0](before, None), None)
            return ((before @ before.transpose(1, 2) / 32).softmax(-1) @ x).amax(1)

    model, inputs = make(BASE, kind=Rollout), inputs_for(BASE)
    module = reduce_graph(capture(model, inputs), schedule(semantics, (0,)))
    states, _ = reduced_states(model, inputs, SITES, semantics)
    before = model.embed(**inputs)
    expected = []
    for b, state in enumerate(states):
        old = combine(before[b], state.members).float()
        expected.append(((old @ old.T / 32).softmax(-1) @ state.x).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected), atol=1e-5, rtol=0)


def test_parts_from_before_and_after_are_not_joined() -> None:
    class Halves(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            before = self.embed(input_ids, pixel_values)
            x = self.layers[1](self.layers[0](before, None), None)
            both = torch.cat([x[:, :7], before[:, 7:]], 1)
            return (both + x).amax(1)

    captured = capture(make(BASE, kind=Halves), inputs_for(BASE))
    inputs = inputs_for(BASE)
    model = make(BASE, kind=Halves)
    module = reduce_graph(captured, schedule("paper", (0,)))
    states, _ = reduced_states(model, inputs, SITES, "paper")
    before = model.embed(**inputs)
    expected = []
    for b, state in enumerate(states):
        old = combine(before[b], state.members)
        expected.append((torch.cat([state.x[: state.text], old[state.text :]]) + state.x).amax(0))
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), torch.stack(expected).float(), atol=1e-5, rtol=0)
