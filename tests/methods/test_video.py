"""EVS and VidCom2: tokens of films, against second programs with sorts and lists, and the models' own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import PlanError
from pumer_compile.reducers.base import Decisions, Forcing
from pumer_compile.reducers.shares import shared_out
from pumer_compile.reducers.video import ChangeReducer, UniqueReducer
from tests.support.prompt_families import captured, placeholders
from tests.support.prompt_oracle import kept_places, logits, look

Chosen = Callable[[Tensor, int], list[int]]


def by_change(film: Tensor, keep: int) -> list[int]:
    """Of `[frames, length, width]` the tokens that stay, numbered through."""
    changes = {}
    for number, frame in enumerate(film):
        for place, token in enumerate(frame):
            before = film[number - 1, place]
            same = torch.nn.functional.cosine_similarity(token, before, dim=0)
            changes[number * len(frame) + place] = 9.0 if number == 0 else float(1 - same)
    return sorted(sorted(changes, key=lambda i: (-changes[i], i))[:keep])


def by_uniqueness(film: Tensor, keep: int) -> list[int]:
    """The same of VidCom2, with a fixed number."""
    frames, length, width = film.shape
    variances = film.reshape(-1, width).var(0, unbiased=False).tolist()
    calm = sorted(range(width), key=lambda i: (variances[i], i))[: width // 2]
    unit = torch.nn.functional.normalize(film[:, :, calm], dim=-1)

    def like(token: Tensor, centre: Tensor) -> float:
        return sum(float(torch.exp(-((token - centre) ** 2).sum() / (2 * 2.0**k))) for k in range(-3, 2))

    to_film = [[like(token, unit.reshape(-1, width // 2).mean(0)) for token in frame] for frame in unit]
    to_frame = [[like(token, frame.mean(0)) for token in frame] for frame in unit]
    odd = torch.tensor([-sum(frame) / length for frame in to_film])
    share = ((odd - odd.max()) / 0.01).softmax(0)
    wanted = [min(float(length), float(keep / frames * (1 + p - share.mean()))) for p in share]
    counts = [int(w + 1e-3) for w in wanted]
    order = sorted(range(frames), key=lambda i: (-float(odd[i]), i))
    while sum(counts) < keep:
        for i in [i for i in order if counts[i] < length]:
            counts[i] += sum(counts) < keep
    kept = []
    for number, count in enumerate(counts):
        both = [a + b for a, b in zip(to_film[number], to_frame[number], strict=True)]
        kept += [number * length + i for i in sorted(range(length), key=lambda i: (both[i], i))[:count]]
    return sorted(kept)


METHODS: dict[str, Chosen] = {"evs": by_change, "vidcom2": by_uniqueness}
REDUCERS: dict[str, Any] = {"evs": ChangeReducer, "vidcom2": UniqueReducer}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "positions"), [("qwen2_5_vl_video", "original"), ("llava_next_video", "original")])
def test_films_of_families(method: str, name: str, positions: str) -> None:
    family, make, output, own = captured(name)
    keep = 13
    reduced = pumer.reduce(own, Schedule(method=method, keep=keep, positions=positions))
    seen = []
    for seed in (0, 1):
        inputs = make(seed)
        sight = look(family, inputs, dict.fromkeys(placeholders(name), ""))
        share = len(sight.groups) // len(inputs["input_ids"])
        rows: list[int] = []
        for first in range(0, len(sight.groups), share):  # each prompt's film
            frames = sight.groups[first : first + share]
            film = torch.stack([torch.stack([sight.rows[i] for i in frame]) for frame in frames])
            numbers = [i for frame in frames for i in frame]
            rows += [numbers[i] for i in METHODS[method](film, keep)]
        places = kept_places(sight, inputs, sorted(rows))
        wanted = logits(family, inputs, places, sorted(rows), len(sight.places))
        with torch.no_grad():
            found = reduced.module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        seen.append(places)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_films_against_lists(method: str, data: st.DataObject) -> None:
    """Frames that lie through one another, pinned tokens, two films that keep other tokens."""
    frames, length = data.draw(st.integers(3, 5)), data.draw(st.integers(2, 6))
    pins = data.draw(st.integers(0, 2))
    total = frames * length + pins
    keep = data.draw(st.integers(length if method == "evs" else 1, frames * length))
    shuffled = data.draw(st.permutations(range(total)))
    crops = [sorted(shuffled[i * length : (i + 1) * length]) for i in range(frames)]
    pinned = sorted(shuffled[frames * length :])
    tokens = torch.randn(2, total, 8, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    found = REDUCERS[method](crops, keep, pinned=pinned)(tokens)
    numbers = [place for crop in crops for place in crop]
    for row in range(2):
        film = tokens[row, numbers].unflatten(0, (frames, length))
        wanted = sorted([numbers[i] for i in METHODS[method](film, keep)] + pinned)
        assert found.kept[row].tolist() == wanted
        torch.testing.assert_close(found.tokens[row], tokens[row, wanted])


@given(data=st.data())
def test_shares(data: st.DataObject) -> None:
    """All of the budget, nobody more than there is, nobody less than what is wanted, rounded down."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    budget = data.draw(st.integers(1, sum(lengths)))
    lots = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    wanted = torch.tensor([[budget * lot / max(1, sum(lots)) for lot in lots]])
    shares = shared_out(wanted, wanted, torch.tensor(lengths).float(), budget)[0].tolist()
    assert sum(shares) == budget
    for share, length, want in zip(shares, lengths, wanted[0].tolist(), strict=True):
        assert min(int(want), length) <= share <= length


@pytest.mark.parametrize("method", METHODS)
def test_onnx(method: str, tmp_path: Path) -> None:
    _, make, output, own = captured("qwen2_5_vl_video")
    reduced, inputs = pumer.reduce(own, Schedule(method=method, keep=12)), make(1)
    report = pumer.export(reduced, tmp_path / "film.onnx")
    assert report.path.exists()
    with torch.no_grad():
        wanted = reduced.module(**inputs)[output]
    found = pumer.Engine(tmp_path / "film.onnx")(**inputs)[output]
    np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule", "words"),
    [
        ("qwen2_5_vl_video", {"method": "evs", "keep": 8}, "choose 9 to 27"),
        ("qwen2_5_vl_video", {"method": "vidcom2", "keep": 28}, "choose 1 to 27"),
        ("qwen2_5_vl", {"method": "evs", "keep": 9}, "has no frames"),
    ],
)
def test_refused(name: str, schedule: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        pumer.reduce(captured(name)[3], Schedule(**schedule))


def test_near_ties() -> None:
    tokens = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(0))
    reducer = ChangeReducer([range(4), range(4, 8), range(8, 12)], 6)
    scores = reducer.scores(tokens)[0]
    order = scores.argsort(descending=True).tolist()
    for other in (order[6], order[11]):
        assert margin(reducer, tokens, torch.tensor([sorted([*order[:5], other])])) > 1e-3
    # Two tokens that change as much, but for rounding.
    still = torch.eye(6)[:4].repeat(3, 1)
    still[4:] += torch.tensor([[0.1], [0.2], [0.2], [0.3]]).repeat(2, 1)
    own = reducer(still.unsqueeze(0)).kept[0].tolist()
    assert len(own) == 6 and 7 in own
    other = sorted({*own, 5, 6} - {min({*own} & {5, 6})})
    assert margin(reducer, still.unsqueeze(0), torch.tensor([other])) < 1e-5


def margin(reducer: ChangeReducer, tokens: Tensor, kept: Tensor) -> float:
    reducer.forcing = Forcing(Decisions(kept, kept[:, :0], kept[:, :0]))
    try:
        reducer(tokens)
        assert reducer.forcing.comparison is not None
        return float(reducer.forcing.comparison.margin)
    finally:
        reducer.forcing = None
