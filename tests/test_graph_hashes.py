"""Hashes of schedules and graphs are what they were; `python -m tests.support.graph_hashes` compares the others."""

from __future__ import annotations

import json

import pytest

from tests.support.graph_hashes import GOLDEN, PAIRS, fx_hash, schedules

KEPT = json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_schedules_keep_their_hashes() -> None:
    """Manifests hold them: those of artifacts made before must be found again."""
    assert schedules() == KEPT["schedules"]


def test_every_pair_has_its_hashes() -> None:
    assert set(KEPT["fx"]) == set(KEPT["onnx"]) == set(PAIRS)


@pytest.mark.parametrize("pair", ["vit tome", "llava vispruner", "llava fastv"])
def test_a_reduced_graph_is_what_it_was(pair: str) -> None:
    """Whoever means to change graphs writes new hashes (`--write`), and says so."""
    assert fx_hash(pair) == KEPT["fx"][pair]
