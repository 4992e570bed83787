"""Controls: random, strided and pooled tokens, against the model's own modules."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import LocateError, PlanError, ScheduleError
from pumer_compile.frontends import in_fixed_order
from pumer_compile.reducers import reducers_of
from pumer_compile.reducers.fixed import cells, even_places, pooled_grid, random_places
from tests.support.compiling import vilt_inputs
from tests.support.prompt_families import IMAGE, captured, decoder_of, placeholders
from tests.support.prompt_oracle import Sight, kept_places, logits, look
from tests.support.tiny import tiny_vilt

BUDGET = 3


def kept_by_hand(sight: Sight, prompts: int, method: str) -> list[int]:
    """Numbers of the rows that stay, of every picture `BUDGET`."""
    kept, share = [], len(sight.groups) // prompts
    for number, group in enumerate(sight.groups):
        if method == "uniform":
            kept += [group[len(group) * (2 * i + 1) // (2 * BUDGET)] for i in range(BUDGET)]
        else:
            draw = random.Random(f"7 {number % share}")
            lots = [draw.random() for _ in group]
            kept += [row for row, lot in zip(group, lots, strict=True) if lot in sorted(lots)[:BUDGET]]
    return sorted(kept)


@pytest.mark.parametrize("method", ["random", "uniform"])
@pytest.mark.parametrize("name", ["internvl_tiles", "qwen2_5_vl_batch", "llava_next_video", "idefics3", "florence2"])
def test_rows_that_no_data_chooses(name: str, method: str) -> None:
    model, make, output, program = captured(name)
    seed: dict[str, Any] = {"seed": 7} if method == "random" else {}
    # Frames of one film are one image with a budget each; their draws differ.
    reduced = pumer.reduce(program, Schedule(method=method, budget=BUDGET, positions="original", **seed))
    for picture in (0, 1):
        inputs = make(picture)
        sight = look(model, inputs, placeholders(name))
        rows = kept_by_hand(sight, len(inputs["input_ids"]), method)
        wanted = logits(model, inputs, kept_places(sight, inputs, rows), rows, len(sight.places))
        with torch.no_grad():
            found = reduced.module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)


@pytest.mark.parametrize(("name", "grid", "to"), [("aya_vision", (3, 3), (1, 3)), ("qwen2_5_vl", (4, 4), (2, 2))])
def test_a_pooled_grid(name: str, grid: tuple[int, int], to: tuple[int, int]) -> None:
    """Each new token is the mean of its cell, and stands where the first of these stood."""
    model, make, output, program = captured(name)
    reduced = pumer.reduce(
        program, Schedule(method="downsample", budget=to[0] * to[1], grid=grid, positions="original")
    )
    for picture in (0, 1):
        inputs = make(picture)
        sight = look(model, inputs, placeholders(name))
        pooled: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for group in sight.groups:
            cell_of = [(i // grid[1] * to[0] // grid[0], i % grid[1] * to[1] // grid[1]) for i in range(len(group))]
            for cell in dict.fromkeys(cell_of):
                own = [sight.places[number] for number, c in zip(group, cell_of, strict=True) if c == cell]
                pooled[own[0]] = own

        def mean(module: Any, args: Any, kwargs: dict[str, Any], pooled: Any = pooled) -> tuple[Any, dict[str, Any]]:
            embeds = kwargs["inputs_embeds"]
            new = embeds.clone()
            for place, cell in pooled.items():
                new[place] = torch.stack([embeds[one] for one in cell]).mean(0)
            return args, {**kwargs, "inputs_embeds": new}

        rows = [number for number, place in enumerate(sight.places) if place in pooled]
        hook = decoder_of(model).register_forward_pre_hook(mean, with_kwargs=True)
        try:
            wanted = logits(model, inputs, kept_places(sight, inputs, rows), rows, len(sight.places))
        finally:
            hook.remove()
        with torch.no_grad():
            found = reduced.module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)


def test_patches_that_no_attention_has_seen() -> None:
    """Fuyu has no tower: a method that reads none reduces it."""
    model, make, output, program = captured("fuyu")
    reduced = pumer.reduce(program, Schedule(method="uniform", budget=BUDGET, positions="original"))
    inputs = make(0)
    image = inputs["input_ids"] == IMAGE
    keep = ~image
    for row, own in zip(keep, image, strict=True):
        own = own.nonzero().flatten()
        row[own[even_places(len(own), BUDGET)]] = True
    places = torch.stack([row.nonzero().flatten() for row in keep])
    wanted: Tensor = logits(model, inputs, places)
    with torch.no_grad():
        found = reduced.module(**inputs)[output]
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)


def test_one_seed_one_draw() -> None:
    assert random_places(20, 5, 0, 0) == random_places(20, 5, 0, 0) == sorted(set(random_places(20, 5, 0, 0)))
    assert random_places(20, 5, 0, 0) != random_places(20, 5, 1, 0) != random_places(20, 5, 1, 1)


@pytest.mark.parametrize(("length", "count"), [(9, 9), (9, 4), (576, 64), (5, 1)])
def test_even_places(length: int, count: int) -> None:
    places = even_places(length, count)
    assert places == sorted(set(places)) and 0 <= places[0] and places[-1] < length


def test_cells_of_a_grid() -> None:
    assert pooled_grid(12, 12, 36) == (6, 6) and pooled_grid(4, 6, 6) == (2, 3) and pooled_grid(4, 6, 7) is None
    assert cells(4, 2, (2, 1)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    whole = cells(5, 3, (2, 2))
    assert sorted(place for cell in whole for place in cell) == list(range(15))


def test_the_image_of_a_fusion_model() -> None:
    """After the attention that it names; the class token stays."""
    torch.manual_seed(0)
    model = tiny_vilt().eval()
    inputs = vilt_inputs(2)
    program = pumer.capture(model, inputs)
    reduced = pumer.reduce(program, Schedule(method="uniform", budget=5, at="cross_modal.0"))
    (site,) = reduced.plan.sites
    before, text = site.before["image"], inputs["input_ids"].shape[1]
    assert site.site == "cross_modal.0" and site.after["image"] == 6

    kept = [0, *(1 + i for i in even_places(before - 1, 5))]
    layer = model.vilt.encoder.layer[1]
    stays = torch.tensor([*range(text), *(text + i for i in kept)])
    hook = layer.register_forward_pre_hook(lambda m, args: (args[0][:, stays], *(cut(x, stays) for x in args[1:])))
    later = [
        other.register_forward_pre_hook(lambda m, args: (args[0], *(cut(x, stays) for x in args[1:])))
        for other in model.vilt.encoder.layer[2:]
    ]
    try:
        with in_fixed_order(), torch.no_grad():  # ViLT's own order of patches is random
            wanted = model(**inputs).logits
    finally:
        for handle in (hook, *later):
            handle.remove()
    with torch.no_grad():
        found = reduced.module(**inputs)["logits"]
    # Between an attention and its MLP every token is by itself, so where in the layer they go is all one.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (reducer,) = reducers_of(reduced.module).values()
    assert reducer.first_stays
    with pytest.raises(PlanError, match=f"budget of 200 is more than the {before - 1} tokens"):
        pumer.reduce(program, Schedule(method="uniform", budget=200, at="cross_modal.0"))
    with pytest.raises(LocateError, match="nothing is scattered"):
        pumer.reduce(program, Schedule(method="random", budget=4))


def cut(mask: Any, places: Tensor) -> Any:
    """A mask, `[batch, 1, 1 or queries, keys]`."""
    if not isinstance(mask, Tensor):
        return mask
    own = mask[..., places]
    return own if mask.shape[2] == 1 else own[:, :, places]


def test_refusals() -> None:
    *_, program = captured("internvl")
    with pytest.raises(PlanError, match="tokens that an image has in the prompt"):
        pumer.reduce(program, Schedule(method="random", budget=1000))
    with pytest.raises(ScheduleError, match="needs a `budget`"):
        Schedule(method="random")
