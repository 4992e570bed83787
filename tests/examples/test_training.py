"""Training on the scenes: several questions of one picture at once, and a run that was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.scenes import llava
from examples.scenes.data import NOT, Split, build_tokenizer, load_split
from examples.scenes.finetune import FineTuning, Settings
from examples.scenes.generate import write_shard
from examples.scenes.learners import Kind
from examples.scenes.llava import Vocabulary, build_llava
from examples.scenes.questions import ANSWERS
from examples.scenes.rows import TRAINED, Row
from examples.scenes.train import Recipe, Run, save_folder
from examples.scenes.vilt import answer_logits, build_vilt, packed, see

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder, "train", 0, size=8)
    return load_split(folder, "train", TOKENIZER)


def test_every_word_has_its_token_and_every_label_its_object(split: Split) -> None:
    unknown, end = TOKENIZER.unk_token_id, TOKENIZER.sep_token_id
    assert not (split.input_ids == unknown).any() and (split.input_ids == end).sum() == split.labels.numel()
    told = split.mentions[..., 0] >= 0
    assert told.any() and (split.mentions[told] >= 0).all()
    picture, question, phrase = told.nonzero(as_tuple=True)
    things = split.mentions[picture, question, phrase, 1]
    assert (split.attributes[picture, things] != NOT).all()


def test_packed_questions_do_not_see_each_other_and_stock_is_the_models_own_forward(split: Split) -> None:
    torch.manual_seed(0)
    model = build_vilt(len(TOKENIZER), layers=3).eval()
    pixels, ids = split.pixels(torch.arange(2)), split.input_ids[:2, :4]
    with torch.no_grad():
        *_, (text, image) = packed(model, pixels, ids, False)
        together = answer_logits(model, text)
        for number in range(4):
            *_, (alone, same) = packed(model, pixels, ids[:, number : number + 1], False)
            torch.testing.assert_close(answer_logits(model, alone)[:, 0], together[:, number], atol=1e-5, rtol=0)
        torch.testing.assert_close(same, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(see(model, pixels, 3), image, atol=1e-5, rtol=0)
        *_, (text, _) = packed(model, pixels, ids[:, :1], True)
        batch = {"input_ids": ids[:, 0], "attention_mask": (ids[:, 0] != 0).long(), "pixel_values": pixels}
        stock = model(**batch, pixel_mask=torch.ones(2, 112, 112, dtype=torch.long)).logits
    torch.testing.assert_close(answer_logits(model, text)[:, 0], stock, atol=1e-5, rtol=0)
    assert (stock - together[:, 0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="one question a picture; found 4"):
        next(packed(model, pixels, ids, True))


@pytest.mark.parametrize("kind", ["vilt", "llava"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(split: Split, tmp_path: Path, kind: Kind) -> None:
    """Through all three kinds of steps."""
    recipe = Recipe(1, 2, 2, 2, seen=2, pictures=2, questions=2, stock_pictures=2)
    whole = Run(tmp_path / "whole", recipe, kind)
    losses = [whole.advance(split) for _ in range(5)]
    assert [set(loss) for loss in losses] == [{"cells"}, *[{"cells", "phrases", "answers"}] * 4]
    (tmp_path / "parts").mkdir()
    found = []
    for steps in (1, 2, 2):
        run = Run(tmp_path / "parts", recipe, kind)
        found += [run.advance(split) for _ in range(steps)]
        run.save()
    assert found == losses and run.step == 5
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), whole.model.parameters(), strict=True))
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["state.pt"]


def test_fine_tuning_goes_on_as_well_and_trains_the_model_that_is_saved(split: Split, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_folder(build_vilt(len(TOKENIZER), width=64, layers=2, inner=64).eval(), TOKENIZER, tmp_path / "base")
    recipe = Recipe(0, 0, 2, 2, stock_pictures=2, warmup_steps=1)
    keys = {"method": "dynamicvit", "layers": (1,), "keep": 0.5}
    settings = Settings(Row("", "", TRAINED, seed=0), keys, 0.5, recipe)
    tuning = FineTuning(tmp_path, tmp_path / "base", settings, split)
    before = tuning.student.classifier[3].weight.detach().clone()
    assert set(tuning.advance(split)) == {"ratio", "distillation", "answers"}
    tuning.save()
    losses = tuning.advance(split)
    again = FineTuning(tmp_path, tmp_path / "base", settings, split)
    assert again.step == 1 and again.advance(split) == losses
    weights = again.student.classifier[3].weight
    assert torch.equal(weights, tuning.student.classifier[3].weight) and not torch.equal(weights, before)


def test_a_llava_with_packed_questions_is_the_stock_one(split: Split) -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary.made()
    model = build_llava(vocabulary, width=64, seen=1, layers=2).eval()
    pixels, ids = split.pixels(torch.arange(2)), split.input_ids[:2, :3]
    assert len(set(vocabulary.answers.tolist())) == len(ANSWERS) and vocabulary.tokenizer.unk_token_id not in ids
    with torch.no_grad():
        found, _, features = llava.packed(model, pixels, ids)
        for number in range(3):
            prompts = vocabulary.prompts(ids[:, number])
            stock = model(input_ids=prompts, pixel_values=pixels, attention_mask=(prompts != 0).long()).logits
            real = ids[:, number, 1:] != 0
            torch.testing.assert_close(found[:, number][real], stock[:, llava.PREFIX :][real], atol=1e-4, rtol=0)
    assert features.shape == (2, 196, 64)
    places = llava.answer_places(ids)
    assert (ids[..., 1:].gather(2, places[..., None]) == vocabulary.tokenizer.sep_token_id).all()
