"""Attention within segments of several lengths, against the model's own loop over them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pumer_compile.frontends.uneven_segments import TARGET, patch

pytestmark = pytest.mark.fast

HEADS, SIZE = 2, 3


def even(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, *, angles: Any = None, **kwargs: Any) -> Any:
    """As transformers' exporter has it: segments of one length, as a batch."""
    bounds = cu_seqlens.tolist()
    (length,) = {stop - start for start, stop in itertools.pairwise(bounds)}
    cos, sin = angles
    rotated = hidden_states * cos + hidden_states.flip(-1) * sin
    rows = rotated.unflatten(-1, (HEADS, SIZE)).unflatten(-3, (-1, length))
    rows = rows.transpose(-3, -2)
    mixed = functional.scaled_dot_product_attention(rows, rows, rows).transpose(-3, -2)
    result = mixed.flatten(-4, -3).flatten(-2)
    return (result, None) if kwargs.get("pair") else result


def one_by_one(hidden_states: Tensor, bounds: list[int], angles: tuple[Tensor, Tensor]) -> Tensor:
    """The loop of the models."""
    parts = []
    for start, stop in itertools.pairwise(bounds):
        own = hidden_states[..., start:stop, :]
        cut = (angles[0][start:stop], angles[1][start:stop])
        parts.append(even(None, own, torch.tensor([0, stop - start]), angles=cut))
    return torch.cat(parts, -2)


def ends(bounds: list[int], followed: bool = True) -> Tensor:
    found = torch.tensor(bounds, dtype=torch.int32)
    if followed:
        found._pumer_shadow = object()  # type: ignore[attr-defined]
    return found


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), leading=st.booleans(), seed=st.integers(0, 3))
def test_the_loop_of_the_models(lengths: list[int], leading: bool, seed: int) -> None:
    """Lengths collide with heads, their size and the width (6 is one of the totals)."""
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    generator = torch.Generator().manual_seed(seed)
    shape = (1, bounds[-1], HEADS * SIZE) if leading else (bounds[-1], HEADS * SIZE)
    states = torch.randn(*shape, generator=generator)
    angles = tuple(torch.randn(bounds[-1], HEADS * SIZE, generator=generator) for _ in range(2))
    found = patch(even)(None, states, ends(bounds), angles=angles)
    torch.testing.assert_close(found, one_by_one(states, bounds, angles), atol=1e-6, rtol=1e-5)


def test_as_many_attentions_as_lengths() -> None:
    calls: list[int] = []

    def counting(self: Any, states: Tensor, bounds: Tensor, **kwargs: Any) -> Any:
        calls.append(len(bounds) - 1)
        return even(self, states, bounds, **kwargs)

    bounds = [0, 4, 8, 10, 14, 16]
    angles = (torch.randn(16, 6), torch.randn(16, 6))
    result = patch(counting)(None, torch.randn(16, 6), ends(bounds), angles=angles, pair=True)
    assert sorted(calls) == [2, 3]
    assert isinstance(result, tuple) and result[1] is None and result[0].shape == (16, 6)


@pytest.mark.parametrize(("bounds", "followed"), [([0, 4, 8, 12], True), ([0, 4, 12], False)])
def test_left_to_the_exporter(bounds: list[int], followed: bool) -> None:
    """Segments of one length; and a trace that follows no sample, whose ends are not known."""
    given_ends = ends(bounds, followed)
    seen: list[Tensor] = []

    def original(self: Any, states: Tensor, cu_seqlens: Tensor) -> str:
        seen.append(cu_seqlens)
        return "its own"

    assert patch(original)(None, torch.randn(12, 6), given_ends) == "its own"
    assert seen[0] is given_ends


def test_the_target_is_there() -> None:
    """transformers may move what is replaced."""
    import importlib

    module, _, name = TARGET.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
