"""SparseVLM: other models by lists and their own layers, near-ties, an artifact, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import LocateError, PlanError, ScheduleError
from pumer_compile.reducers import RatedReducer, TextRating, forced_decisions
from pumer_compile.reducers.base import Decisions, Forcing
from tests.support import llava
from tests.support.clusters import clusters_of
from tests.support.commands import done, inner_manifest, onnx_outputs, refused, tensorrt_refuses
from tests.support.prompt_families import Tensors, captured
from tests.support.published import kept_and_logits
from tests.support.stages import Staged, by_hand

IMAGE, PLACEHOLDER = 144, 299  # of llava-tiny
BEFORE, WORDS = 5, 9  # words in front of its image, and behind it


# --- By lists ---------------------------------------------------------------------------------------------------------


def raters_of(embeddings: Tensor, image: list[int], words: list[int], count: int) -> list[int]:
    """The words of one prompt, `[places, width]`, that its image's tokens are most like."""
    rating = dict.fromkeys(words, 0.0)
    for place in image:
        likeness = [float(embeddings[place].double() @ embeddings[word].double()) for word in words]
        for word, share in zip(words, torch.tensor(likeness, dtype=torch.float64).softmax(0).tolist(), strict=True):
            rating[word] += share
    return sorted(words, key=lambda word: (-rating[word], word))[:count]


class Rated(Staged):
    """Chooses by what raters attend to."""

    share = 0.5
    attention: Tensor
    entered: Tensor

    def _note(self, module: nn.Module, args: Any, result: Any) -> None:
        self.attention = result[1].double().mean(1)

    def _before(self, number: int) -> Any:
        cut = super()._before(number)

        def before(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if number == 0:
                self.entered = args[0] if args else kwargs["hidden_states"]
            found: tuple[Any, dict[str, Any]] = cut(layer, args, kwargs)
            return found

        return before

    def _choose(self, states: Tensor, budget: int) -> Tensor:
        assert self.places is not None
        every = [place for image in self.images for place in image]
        left = []
        for row, places in enumerate(self.places.tolist()):
            gone: set[int] = set()
            for image in self.images:
                words = [place for place in range(image[-1], self.length) if place not in every]
                raters = raters_of(self.entered[row], image, words, round(len(words) * self.share))
                votes = self.attention[row][[places.index(word) for word in raters]].mean(0).tolist()
                there = [number for number, place in enumerate(places) if place in image]
                gone |= set(sorted(there, key=lambda number, votes=votes: (-votes[number], number))[budget:])  # type: ignore[misc]
            left.append([number for number in range(len(places)) if number not in gone])
        index = torch.tensor(left)
        self.places = self.places.gather(1, index)
        self.kept.append(self.places)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


class Recycled(Rated):
    """Merges some of those that go."""

    recycle = 0.3

    def _choose(self, states: Tensor, budget: int) -> Tensor:
        assert self.places is not None
        image, rows, left = self.images[0], states.clone(), []
        for row, places in enumerate(self.places.tolist()):
            words = [place for place in range(image[-1], self.length) if place not in image]
            raters = raters_of(self.entered[row], image, words, round(len(words) * self.share))
            seen = self.attention[row][[places.index(word) for word in raters]].mean(0).tolist()
            there = [number for number, place in enumerate(places) if place in image]
            order = sorted(there, key=lambda number, seen=seen: (-seen[number], number))  # type: ignore[misc]
            again = sorted(order[budget : budget + int((len(there) - budget) * self.recycle) + 1])
            found = clusters_of([states[row, number].double() for number in again], len(again) // 10 + 1)
            for center, members in found.items():
                rows[row, again[center]] = states[row, [again[i] for i in members]].mean(0)
            gone = set(order[budget:]) - {again[center] for center in found}
            left.append([number for number in range(len(places)) if number not in gone])
        index = torch.tensor(left)
        self.places = self.places.gather(1, index)
        self.kept.append(self.places)
        return rows.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def rated_by_hand(
    model: Any, inputs: Tensors, stages: Mapping[int, int], share: float, placeholder: int = 0, recycle: float = 0
) -> tuple[Tensor, list[Tensor]]:
    kind = type("Of", (Recycled if recycle else Rated,), {"share": share, "recycle": recycle})
    return by_hand(model, inputs, stages, "own", placeholder=placeholder, kind=kind)


def reduced(stages: dict[int, int], **more: Any) -> pumer.Reduced:
    return pumer.reduce(llava.program(), Schedule(method="sparsevlm", stages=stages, **more))


@pytest.mark.parametrize(
    ("stages", "raters"), [({1: 60, 2: 21}, 0.5), ({1: 36}, 0.34), ({2: 1}, 0.12), ({1: 143}, 1.0)]
)
def test_its_layers_given_fewer_tokens(stages: dict[int, int], raters: float) -> None:
    """Grouped queries, two prompts that keep other tokens."""
    wanted, places = rated_by_hand(llava.model(), llava.tensors(), stages, raters, PLACEHOLDER)
    made = reduced(stages, raters=raters)
    kept, logits = kept_and_logits(made, llava.tensors())
    assert [site.after["prompt_image"] for site in made.plan.sites] == list(stages.values())
    for own, left in zip(kept, places, strict=True):
        assert torch.equal(own + BEFORE, left[:, BEFORE : BEFORE + own.shape[1]])
        assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_each_prompt_recycles_its_own() -> None:
    made = reduced({1: 60}, recycle=0.3)
    with torch.no_grad():
        together = made.module(**llava.tensors())["logits"]
        turned = made.module(**{name: value.flip(0) for name, value in llava.tensors().items()})["logits"]
    torch.testing.assert_close(turned.flip(0), together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("stages", "recycle"), [({1: 60, 2: 21}, 0.3), ({1: 4}, 1.0)])
def test_what_goes_is_recycled(stages: dict[int, int], recycle: float) -> None:
    """Clusters by loops; a merged token stands where its center stood, and is there at the next stage."""
    wanted, places = rated_by_hand(llava.model(), llava.tensors(), stages, 0.5, PLACEHOLDER, recycle)
    made = reduced(stages, recycle=recycle)
    with torch.no_grad():
        logits = made.module(**llava.tensors())["logits"]
    assert [site.after["prompt_image"] for site in made.plan.sites] == [p.shape[1] - BEFORE - WORDS for p in places]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    plain, _ = rated_by_hand(llava.model(), llava.tensors(), stages, 0.5, PLACEHOLDER)
    assert float((logits[:, -1] - plain[:, -1]).abs().max()) > 1e-3


def test_raters_decide() -> None:
    """Fewer words see other tokens."""
    found = [kept_and_logits(reduced({1: 36}, raters=share), llava.tensors())[0][0] for share in (1.0, 0.5, 0.12)]
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


def test_prompts_one_by_one() -> None:
    (together, last), logits = kept_and_logits(reduced({1: 60, 2: 21}), llava.tensors())
    for row in range(2):
        inputs = llava.tensors(slice(row, row + 1))
        alone = pumer.capture(llava.model(), inputs, outputs=["logits"])
        (kept, after), own = kept_and_logits(
            pumer.reduce(alone, Schedule(method="sparsevlm", stages={1: 60, 2: 21})), inputs
        )
        assert torch.equal(kept[0], together[row]) and torch.equal(after[0], last[row])
        torch.testing.assert_close(own[0], logits[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_vl_two", "internvl"])
def test_other_families(name: str) -> None:
    """Of two images each has its own words behind it, those between them among the first one's."""
    model, make, output, program = captured(name)
    made = pumer.reduce(program, Schedule(method="sparsevlm", stages={1: 3}, raters=0.4))
    left = []
    for seed in (0, 1):
        wanted, places = rated_by_hand(model, make(seed), {1: 3}, 0.4)
        with torch.no_grad():
            found = made.module(**make(seed))[output]
        torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
        left.append(places[-1])
    assert not torch.equal(*left)


def test_the_text_is_rated_once_and_padding_in_front_is_not_read() -> None:
    made = reduced({1: 60, 2: 21})
    assert sum(isinstance(module, TextRating) for module in made.module.modules()) == 1
    assert len([n for n in made.module.graph.nodes if str(n.target) == "reducer.rating.prompt_image"]) == 1
    inputs = {**llava.tensors(), "attention_mask": llava.tensors()["attention_mask"].clone()}
    inputs["attention_mask"][1, :3] = 0
    wanted, _ = rated_by_hand(llava.model(), inputs, {1: 60, 2: 21}, 0.5, PLACEHOLDER)
    _, logits = kept_and_logits(made, inputs)
    torch.testing.assert_close(logits[0], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1, 3:], wanted[1, 3:], atol=1e-4, rtol=1e-4)


def test_the_command_line(tmp_path: Any) -> None:
    file, path = tmp_path / "sparse.yaml", tmp_path / "model.onnx"
    file.write_text("method: sparsevlm\nstages: {2: 21, 1: 60}\nraters: 0.34\n", encoding="utf-8")
    options = ("--schedule", file, "--inputs", llava.FOLDER / "inputs.npz", "--outputs", "logits")
    done(llava.FOLDER, *options, "-o", path)
    manifest = inner_manifest(path)
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert len(manifest["parity"]["reducers"]) == 2 and all(row["judged"] for row in manifest["parity"]["reducers"])
    assert Schedule.from_manifest(manifest["schedule"]) == Schedule(
        method="sparsevlm", stages={1: 60, 2: 21}, raters=0.34
    )
    wanted, _ = rated_by_hand(llava.model(), llava.tensors(), {1: 60, 2: 21}, 0.34, PLACEHOLDER)
    found = onnx_outputs(path, {name: value.numpy() for name, value in llava.tensors().items()})["logits"]
    torch.testing.assert_close(torch.as_tensor(found), wanted, atol=1e-4, rtol=1e-4)
    file.write_text("method: sparsevlm\nstages: {1: 60, 2: 21}\nrecycle: 0.3\n", encoding="utf-8")
    done(llava.FOLDER, *options, "-o", path)
    assert inner_manifest(path)["parity"]["passed"] and tensorrt_refuses(path) == []
    wanted, _ = rated_by_hand(llava.model(), llava.tensors(), {1: 60, 2: 21}, 0.5, PLACEHOLDER, 0.3)
    found = onnx_outputs(path, {name: value.numpy() for name, value in llava.tensors().items()})["logits"]
    torch.testing.assert_close(torch.as_tensor(found), wanted, atol=1e-4, rtol=1e-4)
    file.write_text("method: sparsevlm\nstages: {3: 21}\n", encoding="utf-8")
    assert "this model has 3: choose 1 to 2" in refused(2, "plan", llava.FOLDER, *options)


# --- Ratings, ties and near-ties --------------------------------------------------------------------------------------


def test_a_rating_is_a_share_of_every_token() -> None:
    image, text = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    first, second = torch.tensor([3.0, 0.0]).softmax(0), torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(TextRating()(image, text)[0], (first + second) / 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(TextRating()(image, text), TextRating()(image.bfloat16(), text.bfloat16()))
        assert TextRating()(image, text).dtype == torch.float32


def test_a_near_tie_is_told_from_a_wrong_choice() -> None:
    module = nn.Module()
    module.rated = RatedReducer(5, 2, 0.5)
    rows = torch.tensor([[0.4, 0.2, 0.2 - 1e-7, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4]]).view(1, 1, 2, 5)
    tokens, none = torch.zeros(1, 5, 3), torch.empty(1, 0, dtype=torch.int64)

    def margin(rating: list[float], *kept: int) -> float:
        with forced_decisions(module, {"rated": Decisions(torch.tensor([kept]), none, none)}) as forcings:
            module.rated(tokens, rows, torch.tensor([rating]))
        comparison = forcings["rated"].comparison
        assert comparison is not None
        return float(comparison.margin)

    certain, close = [0.6, 0.4], [0.5 + 1e-7, 0.5 - 1e-7]
    assert margin(certain, 0, 1) == 0 and 0 < margin(certain, 0, 2) < 1e-5 and margin(certain, 0, 3) > 0.1
    assert margin(certain, 3, 4) > 0.1 > 1e-5 > margin(close, 3, 4) > 0  # the other word's choice
    assert margin(close, 4, 3) == 1 and margin(certain, 1, 1) == 1


def test_forced_merges_are_followed() -> None:
    """Places are numbered among the tokens that stay or merge."""
    reducer = RatedReducer(8, 2, 1.0, recycle=0.5)
    tokens, rows = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8.0).view(1, 1, 1, 8)
    own = reducer(tokens, rows, torch.ones(1, 1))
    assert own.kept.tolist() == [[2, 3, 4, 5, 6, 7]] and own.source.shape == (1, 3) and not reducer.judged
    forced = Decisions(torch.tensor([[0, 1, 4, 5, 6, 7]]), torch.tensor([[0, 1, 2]]), torch.tensor([[3, 3, 3]]))
    reducer.forcing = Forcing(forced)
    found = reducer(tokens, rows, torch.ones(1, 1))
    wanted = torch.stack([tokens[0, [0, 1, 4, 5]].mean(0), tokens[0, 6], tokens[0, 7]])
    torch.testing.assert_close(found.tokens[0], wanted)
    assert found.place[0].argmax(-1).tolist() == [5, 6, 7]
    assert reducer.forcing.comparison is not None and bool(reducer.forcing.comparison.margin.isnan())


def test_ties_go_to_the_lowest_index_and_pinned_tokens_stay() -> None:
    tokens, rows = torch.zeros(1, 6, 3), torch.full((1, 2, 3, 6), 0.1)
    rows[:, :, 0, 4] = 0.5
    even = torch.full((1, 3), 1 / 3)
    assert RatedReducer(6, 2, 0.34)(tokens, rows, even).kept.tolist() == [[0, 4]]  # the first word rates
    assert RatedReducer(6, 2, 0.01, pinned=(2, 5))(tokens, rows, even).kept.tolist() == [[0, 2, 4, 5]]
    rows[:, :, 0, 4] = 0.1
    assert RatedReducer(6, 3, 1.0)(tokens, rows, even).kept.tolist() == [[0, 1, 2]]


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "needs a `stages`, after so many layers"),
        ({"stages": {1: 0.5}}, "what is left after layer 1 is a number of tokens, at least 1, got 0.5"),
        ({"stages": {2: 30, 3: 30}}, "30 after layer 3 is not less than 30 after layer 2"),
        ({"stages": {1: 30}, "raters": 0}, "above 0 and at most 1, such as 0.5; got 0"),
        ({"stages": {1: 30}, "raters": 1.5}, "raters: a share of the text .* got 1.5"),
        ({"stages": {1: 30}, "raters": True}, "got True"),
        ({"stages": {1: 30}, "positions": "compact"}, "leave out `positions`"),
        ({"stages": {1: 30}, "semantics": "reference"}, "leave out `semantics`"),
        ({"stages": {1: 30}, "recycle": 1.5}, "recycle: .* at most 1"),
    ],
)
def test_schedules_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Schedule(method="sparsevlm", **keys)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({1: IMAGE}, "leaves 144 tokens of prompt_image at .*, where it has 144: a stage leaves fewer"),
        ({3: 20}, "`stages: 3` lets the first 3 language layers .* this model has 3: choose 1 to 2"),
    ],
)
def test_plans_that_cannot_be(stages: dict[int, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        reduced(stages)


def test_images_that_stand_in_no_prompt() -> None:
    with pytest.raises(LocateError, match="by cross-attention alone"):
        pumer.reduce(captured("mllama")[3], Schedule(method="sparsevlm", stages={1: 4}))
