"""A model of another size is refused by the artifact's manifest, before a runtime or PyTorch fails on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pumer_compile as pumer
from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.weights import check_model, read_weights
from pumer_compile.errors import UsageError
from tests.support.commands import artifact, folder, refused
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "a larger vocabulary": ({"vocab_size": 80}, r"1 of shape \[60, 24\] where that has 0"),
    "a smaller vocabulary": ({"vocab_size": 40}, r"1 of shape \[60, 24\] where that has 0"),
    "other images": ({"image_size": 64}, r"1 of shape \[1, 37, 24\] where that has 0"),
    "one layer": ({"num_hidden_layers": 1}, r"of shape \[24\] where that has"),
    "another width": ({"hidden_size": 18}, r"where that has 0.* and others"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_size(name: str) -> None:
    changes, says = OTHERS[name]
    with pytest.raises(UsageError, match=f"model of another size than the one given: its weights are .*{says}"):
        pumer.parity(artifact(), tiny_vilt(**{"num_hidden_layers": 2, **changes}))


def test_the_command_names_both_hashes(tmp_path: Path) -> None:
    tiny_vilt(num_hidden_layers=2, vocab_size=80).save_pretrained(tmp_path / "model")
    message = refused(2, "parity", artifact(), "--model", tmp_path / "model")
    assert load_model(folder()).sha256 in message and load_model(tmp_path / "model").sha256 in message


def test_a_deeper_model_has_all_the_weights_and_is_refused_once_captured() -> None:
    with pytest.raises(UsageError, match=r"of shape \[24, 24\] where that has 13"):
        pumer.parity(artifact(), tiny_vilt(num_hidden_layers=3))


class More(nn.Module):
    """With a weight that the forward does not read, and one that has two names."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(size, size), nn.Parameter(nn.Linear(3, 9).weight)
        self.again = self.linear

    def forward(self, x: Any) -> Any:
        return self.again(self.linear(x))


def test_only_what_is_read_counts_and_tied_weights_once() -> None:
    program = pumer.capture(More(), {"x": torch.ones(2, 4)})
    said = {"weights": read_weights(program.module)}
    assert said["weights"] == [{"shape": [4], "count": 1}, {"shape": [4, 4], "count": 1}]
    check_model(said, program)
    check_model(said, More())
    for model in (More(5), pumer.capture(More(5), {"x": torch.ones(2, 5)})):
        with pytest.raises(UsageError, match="another size"):
            check_model(said, model)


def test_manifests_made_before_and_the_same_checkpoint_are_not_asked() -> None:
    model, manifest = load_model(folder()), dict(read_manifest(artifact()))
    assert sum(Counter({tuple(w["shape"]): w["count"] for w in manifest["weights"]}).values()) > 30
    check_model({**manifest, "weights": [{"shape": [1], "count": 1}]}, model)
    del manifest["weights"]
    check_model(manifest, tiny_vilt(vocab_size=80))


def test_another_seed_is_a_model_of_this_size() -> None:
    check_model(read_manifest(artifact()), tiny_vilt(seed=3, num_hidden_layers=2))
    program = pumer.capture(
        tiny_vilt(seed=3, num_hidden_layers=2), {**text_inputs(2), **image_inputs([(96, 96)] * 2, (96, 96))}
    )
    check_model(read_manifest(artifact()), program)
