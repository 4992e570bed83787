"""What the published DivPrune keeps of a small LLaVA, and farthest points in other families' prompts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.errors import PlanError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import noted_decisions
from tests.support.commands import done, inner_manifest, onnx_outputs, refused, tensorrt_refuses
from tests.support.greedy import ORACLE, arrays, cases, expected, farthest, model
from tests.support.prompt_families import IMAGE, captured
from tests.support.prompt_oracle import kept_places, logits, look

FOLDER = ORACLE / "prompt-tiny"
CASES = cases("prompt-tiny", "divprune")
TOKENS = 144
SEMANTICS = ("reference", "stable")


def budget(case: str) -> int:
    return round(CASES[case]["ratio"] * TOKENS)


def tensors(case: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    spec, given = CASES[case], arrays("prompt-tiny")
    ids = given[f"input_ids_{spec['prompt']}"][rows]
    pixels = given["pixel_values"][spec["images"]][rows]
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


@functools.cache
def program(one: bool = False) -> Program:
    """All cases have one prompt."""
    return pumer.capture(model("prompt-tiny"), tensors("r0.25", slice(1) if one else slice(None)), outputs=["logits"])


def run(module: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits, and the kept tokens."""
    with torch.no_grad(), noted_decisions(module) as noted:
        found: Tensor = module(**inputs)["logits"]
    (decisions,) = noted.values()
    return found, decisions.kept


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("case", CASES)
def test_the_published_selection_and_logits(case: str, semantics: str) -> None:
    wanted = expected("prompt-tiny", "divprune")
    reduced = pumer.reduce(program(), Schedule(method="divprune", budget=budget(case), semantics=semantics))
    found, kept = run(reduced.module, tensors(case))
    np.testing.assert_array_equal(kept.numpy(), wanted[f"{case}.kept"])
    assert found.shape[1] == CASES[case]["sequence"]
    assert np.abs(found[:, -1].numpy() - wanted[f"{case}.logits_last"]).max() <= 1e-4
    (site,) = reduced.plan.sites
    assert site.site == "prompt" and site.after == {"prompt_image": budget(case)}


def test_images_one_by_one() -> None:
    """Published, every row takes the choice of the first."""
    together, kept = run(reduce_graph(program(), Schedule(method="divprune", budget=36)), tensors("r0.25"))
    assert kept[0].tolist() != kept[1].tolist()
    alone = reduce_graph(program(one=True), Schedule(method="divprune", budget=36))
    for row in range(2):
        found, own = run(alone, tensors("r0.25", slice(row, row + 1)))
        assert own[0].tolist() == kept[row].tolist()
        torch.testing.assert_close(found[0], together[row], atol=1e-5, rtol=1e-5)


def test_an_even_picture() -> None:
    """Features that are alike but for rounding: `stable` keeps the same, however they are rounded."""
    inputs = tensors("r0.25")
    kept = {}
    for semantics in SEMANTICS:
        module = reduce_graph(program(), Schedule(method="divprune", budget=50, semantics=semantics))
        (reducer,) = (m for m in module.modules() if hasattr(m, "of_crop"))
        rows = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(0)).repeat(2, TOKENS // 4, 1)
        noise = torch.randn(2, TOKENS, 96, generator=torch.Generator().manual_seed(1)) * 1e-7
        noise[1] = 0
        kept[semantics] = reducer(rows + noise).kept
        assert run(module, inputs)[1].shape == (2, 50)
    assert torch.equal(*kept["stable"]) and not torch.equal(*kept["reference"])


@pytest.mark.parametrize("name", ["internvl_tiles", "qwen2_5_vl_batch", "fuyu"])
def test_other_families(name: str) -> None:
    """Tiles and frames have budgets of their own; Fuyu has no tower. Two pictures that keep other tokens."""
    built, make, output, program = captured(name)
    module = reduce_graph(program, Schedule(method="divprune", budget=3, positions="original"))
    choices = []
    for picture in (0, 1):
        inputs = make(picture)
        sight = look(built, inputs, {IMAGE: ""}) if name != "fuyu" else None
        if sight is None:
            rows, wanted = patches_by_hand(built, inputs)
        else:
            image = torch.stack(sight.rows).double()
            rows = sorted(group[i] for group in sight.groups for i in farthest(image[group].tolist(), 3))
            wanted = logits(built, inputs, kept_places(sight, inputs, rows), rows, len(sight.places))
        choices.append(rows)
        with torch.no_grad():
            found = module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
    assert choices[0] != choices[1]


def patches_by_hand(built: Any, inputs: dict[str, Tensor]) -> tuple[list[int], Tensor]:
    """Fuyu's patches are projected straight into the prompt."""
    image = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        rows = built.model.vision_embed_tokens(inputs["pixel_values"])
    places, chosen = [], []
    for row, (own, patches) in enumerate(zip(image, rows.double().tolist(), strict=True)):
        kept = sorted(farthest(patches, 3))
        chosen += [row * len(patches) + i for i in kept]
        stays = ~own
        stays[own.nonzero().flatten()[kept]] = True
        places.append(stays.nonzero().flatten())
    return chosen, logits(built, inputs, torch.stack(places))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="more than the 144 tokens that an image has in the prompt"):
        pumer.reduce(program(), Schedule(method="divprune", budget=145))
    (tmp_path / "schedule.yaml").write_text("method: divprune\nbudget: 36\nimportant: 0.5\n", encoding="utf-8")
    said = refused(2, FOLDER, "--schedule", tmp_path / "schedule.yaml", "-o", tmp_path / "model.onnx")
    assert "important" in said


def test_the_command_line(tmp_path: Path) -> None:
    case, path = "r0.25", tmp_path / "model.onnx"
    (tmp_path / "schedule.yaml").write_text("method: divprune\nbudget: 36\n", encoding="utf-8")
    given = {name: t.numpy() for name, t in tensors(case).items()}
    np.savez(tmp_path / "inputs.npz", **given)
    done(FOLDER, "--schedule", tmp_path / "schedule.yaml", "--inputs", tmp_path / "inputs.npz", "-o", path)
    outputs = onnx_outputs(path, given)
    assert np.abs(outputs["logits"][:, -1] - expected("prompt-tiny", "divprune")[f"{case}.logits_last"]).max() <= 1e-4
    assert inner_manifest(path)["parity"]["passed"] and inner_manifest(path)["parity"]["decisions_compared"]
    assert tensorrt_refuses(path) == []


def test_torch_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        model("prompt-tiny"),
        backend="pumer",
        options={"inner": "aot_eager", "schedule": Schedule(method="divprune", budget=36)},
        fullgraph=True,
    )
    with torch.no_grad():
        found = compiled(**tensors("r0.25")).logits[:, -1]
    assert np.abs(found.numpy() - expected("prompt-tiny", "divprune")["r0.25.logits_last"]).max() <= 1e-4
