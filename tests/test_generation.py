"""Generation from a prefill and a decoding step under onnxruntime, against transformers' own `generate`."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import pumer_compile as pumer
from benchmarks.architecture_models import ARCHITECTURES
from pumer_compile import Program, Reduced, Schedule
from pumer_compile.errors import ParityError, UsageError
from pumer_compile.generation import Generator, export_decode
from pumer_compile.generation.decode import _check_step
from pumer_compile.generation.framing import frame
from tests.support.commands import artifact
from tests.support.llava import model, tensors
from tests.support.prompt_families import built, placeholders
from tests.support.prompt_oracle import by_hand
from tests.support.speaking import TOKENS, longer, shortened, speaking_words, widen
from tests.support.tiny import tiny_vilt
from tests.support.visual import select, visual_cues


def reduced_by_hand(inputs: dict[str, Tensor], budget: int, **more: Any) -> Tensor:
    """What transformers generates from the prompt with the kept tokens alone."""
    llava, ids = model(), inputs["input_ids"]
    features, attention = visual_cues(llava, inputs["pixel_values"])
    kept = select(features, attention, budget, 0.5)
    (places,) = (ids[0] == llava.config.image_token_id).nonzero(as_tuple=True)
    words = llava.get_input_embeddings()(ids)
    image = llava.model.multi_modal_projector(torch.stack([f[i] for f, i in zip(features, kept, strict=True)]))
    prompt = torch.cat([words[:, : places[0]], image, words[:, places[-1] + 1 :]], 1)
    with torch.no_grad():
        made: Tensor = llava.generate(
            inputs_embeds=prompt,
            attention_mask=torch.ones(prompt.shape[:2], dtype=torch.int64),
            **{"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, **more},
        )
    return made


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_decode(model(), tensors(), tmp_path_factory.mktemp("decode") / "decode.onnx")


@functools.cache
def reduced(**schedule: Any) -> Reduced:
    return pumer.reduce(captured(), Schedule(method="vispruner", **schedule))


@functools.cache
def captured() -> Program:
    return pumer.capture(model(), tensors())


def prefill(folder: Path, **schedule: Any) -> Path:
    return pumer.export(reduced(**schedule), folder / "prefill.onnx", verify=False).path


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prefill(tmp_path_factory.mktemp("prefill"), budget=48)


def test_the_tokens_that_transformers_generates(decode: Path, prefilled: Path) -> None:
    generator = Generator(prefilled, decode)
    assert generator._manifest["plan"]["signals"] == ["class_token"] and not captured().counted
    made = generator.generate(tensors(), TOKENS)
    assert made.shape == (2, TOKENS)
    assert torch.equal(made, reduced_by_hand(tensors(), 48))


def test_prompts_of_a_batch_by_their_own_lengths(decode: Path, prefilled: Path) -> None:
    """Counted anew; one text is shorter behind the image, and padded in front as transformers' processors do it."""
    inputs = tensors()
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    short = {name: t[1:, :-3] if t.dim() == 2 else t[1:] for name, t in inputs.items()}
    ids[1, 3:], ids[1, :3], mask[1, :3] = short["input_ids"][0], 0, 0
    made = Generator(prefilled, decode).generate({**inputs, "input_ids": ids, "attention_mask": mask}, TOKENS)
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    assert torch.equal(made[:1], reduced_by_hand(first, 48))
    assert torch.equal(made[1:], reduced_by_hand(short, 48))
    assert not torch.equal(made[1:], reduced_by_hand(inputs, 48)[1:])


def test_another_budget_generates_something_else() -> None:
    assert not torch.equal(reduced_by_hand(tensors(), 48), reduced_by_hand(tensors(), 9))


def test_positions_go_on_where_the_prompt_ends(decode: Path, tmp_path: Path) -> None:
    """With original positions a new token stands behind the whole prompt, as if nothing had been left out."""
    path = prefill(tmp_path, budget=48, positions="original")
    made = Generator(path, decode).generate(tensors(), TOKENS)
    with torch.no_grad():
        found = reduced(budget=48, positions="original").module(**tensors())
        token, cache = found.logits[:, -1:].argmax(-1), found.past_key_values
        wanted = [token]
        for position in range(158, 158 + TOKENS - 1):
            ids = torch.full_like(token, position)
            step = model()(input_ids=token, past_key_values=cache, position_ids=ids, use_cache=True)
            token, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
            wanted.append(token)
    assert torch.equal(made, torch.cat(wanted, 1))


def test_a_text_that_ends(decode: Path, prefilled: Path) -> None:
    """Of which the other goes on, and behind its end stands padding."""
    generator = Generator(prefilled, decode)
    whole = generator.generate(tensors(), TOKENS)
    stop = next(int(token) for token in whole[0, 1:6] if token not in whole[1])
    other, pad = int(whole[1, 9]), 7
    found = generator.generate(tensors(), TOKENS, stop, config=GenerationConfig(eos_token_id=other, pad_token_id=pad))
    wanted = reduced_by_hand(tensors(), 48, min_new_tokens=0, eos_token_id=[stop, other], pad_token_id=pad)
    assert found.shape[1] < TOKENS and torch.equal(found, wanted)


def test_tokens_that_are_drawn(decode: Path, prefilled: Path) -> None:
    """With the same random numbers, those that transformers draws."""
    how = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    torch.manual_seed(5)
    wanted = reduced_by_hand(tensors(), 48, **how)
    torch.manual_seed(5)
    found = Generator(prefilled, decode).generate(tensors(), TOKENS, config=GenerationConfig(**how))
    assert torch.equal(found, wanted) and not torch.equal(found, reduced_by_hand(tensors(), 48))


def test_the_cache_may_have_any_length(decode: Path) -> None:
    inputs = [v for v in onnx.load(str(decode)).graph.input if v.name.startswith("input.past_key_values")]
    assert len(inputs) == 6
    assert all(v.type.tensor_type.shape.dim[2].dim_param for v in inputs)


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_padding_is_refused(tmp_path: Path) -> None:
    inputs = tensors()
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, 0] = 0
    with pytest.raises(UsageError, match="no padding"):
        export_decode(model(), inputs, tmp_path / "decode.onnx")
    assert not list(tmp_path.iterdir())


def test_padding_in_front_that_would_be_counted(decode: Path, prefilled: Path) -> None:
    inputs = tensors()
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, 0] = 0
    with pytest.raises(UsageError, match=r"counts padding in front .* 157 and 158 tokens .* position_ids"):
        Generator(prefilled, decode).generate(inputs, TOKENS)


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not generate"):
        export_decode(tiny_vilt(), {}, tmp_path / "decode.onnx")


def test_a_wrong_step_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumer_compile.generation.decode.TOLERANCE", -1.0)
    with pytest.raises(ParityError, match="decoding step differs"):
        export_decode(model(), tensors(), tmp_path / "decode.onnx")
    assert not list(tmp_path.iterdir())


def test_artifacts_of_another_kind(decode: Path, prefilled: Path) -> None:
    with pytest.raises(UsageError, match="needs logits and a cache"):
        Generator(artifact(), decode)
    with pytest.raises(UsageError, match="is no decoding step"):
        Generator(prefilled, prefilled)


def test_models_that_count_from_one(tmp_path: Path) -> None:
    """PaliGemma's positions begin at 1, and all of a prompt looks at all of it, but for padding; a budget of everything
    leaves its own `generate`."""
    torch.manual_seed(0)
    paligemma, one = ARCHITECTURES["PaliGemma"].build()
    paligemma.eval()
    reduced = pumer.reduce(pumer.capture(paligemma, one), Schedule(method="vispruner", budget=36))
    path = pumer.export(reduced, tmp_path / "prefill.onnx", samples=[one]).path
    step = export_decode(paligemma, one, tmp_path / "decode.onnx")
    for inputs in (one, shortened(one, 0, 2)):
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            wanted = paligemma.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        assert torch.equal(Generator(path, step).generate(inputs, TOKENS), wanted[:, length:])


def test_what_the_loop_does_not_give() -> None:
    """A new token's type, which transformers gives to PaliGemma, is known; anything else is refused."""
    known = ["input_ids", "position_ids", "token_type_ids", "input.past_key_values.layers.0.keys"]
    _check_step(model(), SimpleNamespace(inputs=known))
    with pytest.raises(UsageError, match="takes cache_position; a token"):
        _check_step(model(), SimpleNamespace(inputs=[*known, "cache_position"]))
    with pytest.raises(UsageError, match="takes no position_ids"):
        _check_step(model(), SimpleNamespace(inputs=["input_ids"]))


# --- Prompts of every family ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_prompt_families_by_hand(name: str, tmp_path: Path) -> None:
    """Twenty tokens of prompts of several lengths with one artifact, each the most likely one of the model's own
    modules given the rows that stay and what was made."""
    family, make = speaking_words(name)
    widen(family, 64)
    sample = make(0)
    if "image_grid_thw" not in sample:  # whose positions are counted over the mask
        sample["position_ids"] = torch.arange(sample["input_ids"].shape[1]).repeat(len(sample["input_ids"]), 1)
    schedule = Schedule(method="vispruner", budget=4, positions="original")
    reduced = pumer.reduce(pumer.capture(family, sample), schedule)
    pumer.export(reduced, tmp_path / "prefill.onnx", verify=False)
    export_decode(family, make(0), tmp_path / "decode.onnx")
    generator = Generator(tmp_path / "prefill.onnx", tmp_path / "decode.onnx")
    for seed, front, back in ((2, 0, 0), (3, 1, 2)):
        inputs = shortened(make(seed), front, back)
        found = generator.generate(inputs, tokens=20)
        logits, _ = by_hand(family, longer(inputs, found[:, :-1]), 4, placeholders(name))
        assert torch.equal(logits[:, -20:].argmax(-1), found), (seed, front, back)
        assert torch.equal(eager(family, reduced, generator, inputs), found)


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """Florence-2: the decoder reads what the encoder leaves of a reduced prompt, for texts of two lengths."""
    family, make = speaking_words("florence2")
    start = torch.full((2, 1), 2)
    sample = {**make(0), "decoder_input_ids": start}
    schedule = Schedule(method="vispruner", budget=4, positions="original")
    reduced = pumer.reduce(pumer.capture(family, sample), schedule)
    pumer.export(reduced, tmp_path / "prefill.onnx", verify=False)
    export_decode(family, sample, tmp_path / "decode.onnx")
    generator = Generator(tmp_path / "prefill.onnx", tmp_path / "decode.onnx")
    for seed, back in ((2, 0), (3, 2)):
        inputs = shortened({name: t for name, t in make(seed).items() if name != "decoder_input_ids"}, 0, back)
        found = generator.generate(inputs, tokens=TOKENS)
        said = torch.cat([start, found[:, :-1]], 1)
        logits, _ = by_hand(family, {**inputs, "decoder_input_ids": said}, 4, placeholders("florence2"))
        assert torch.equal(logits.argmax(-1), found), seed


def eager(family: Any, reduced: Reduced, generator: Generator, inputs: dict[str, Tensor]) -> Tensor:
    """Twenty tokens of the reduced module in eager PyTorch, then of the model: the cache without padding."""
    framed = frame(generator._manifest, inputs)
    front, back = framed.front[0], framed.back[0]
    with torch.no_grad():
        found = reduced.module(**{name: framed.inputs[name] for name in reduced.program.inputs})
        cache, length = found["past_key_values"], found["logits"].shape[1]
        for layer in cache.layers:
            layer.keys, layer.values = (t[:, :, front : length - back] for t in (layer.keys, layer.values))
        made = [found["logits"][:, length - back - 1 : length - back].argmax(-1)]
        for position in range(framed.lengths[0], framed.lengths[0] + 19):
            places = torch.tensor(generator._offset).view(-1, 1, 1) + torch.full_like(made[-1], position)
            step = family(
                input_ids=made[-1],
                past_key_values=cache,
                position_ids=places if len(places) > 1 else places[0],
                use_cache=True,
            )
            made.append(step.logits[:, -1:].argmax(-1))
    return torch.cat(made, 1)


def test_a_sliding_window_that_a_gap_would_fall_into(tmp_path: Path) -> None:
    family, make = built("gemma3")
    program = pumer.capture(family, make(0))
    schedule = Schedule(method="vispruner", budget=4, positions="original")
    pumer.export(pumer.reduce(program, schedule), tmp_path / "prefill.onnx", verify=False)
    export_decode(family, make(0), tmp_path / "decode.onnx")
    generator = Generator(tmp_path / "prefill.onnx", tmp_path / "decode.onnx")
    with pytest.raises(UsageError, match=r"18 tokens and 3 new ones are more than the .* window of 8"):
        generator.generate(make(1), tokens=3)
