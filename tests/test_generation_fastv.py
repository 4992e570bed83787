"""Generation behind a FastV prefill: the cache of the first layers is longer than that of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import UsageError
from pumer_compile.exporters.onnx import append_metadata
from pumer_compile.generation import Generator, export_decode
from pumer_compile.generation.decode import KEY, read_step
from tests.support.fastv import by_hand
from tests.support.llava import model, tensors

TOKENS, LENGTH = 20, 158


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_decode(model(), tensors(), tmp_path_factory.mktemp("decode") / "decode.onnx")


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    schedule = Schedule(method="fastv", layer=2, budget=30)
    inputs = {**tensors(), "position_ids": torch.arange(LENGTH).repeat(2, 1)}
    reduced = pumer.reduce(pumer.capture(model(), inputs), schedule)
    return pumer.export(reduced, tmp_path_factory.mktemp("prefill") / "prefill.onnx", verify=False).path


def rotated(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (angle.unsqueeze(1) for angle in angles)
    first, second = states.chunk(2, -1)
    turned: Tensor = states * cos + torch.cat([-second, first], -1) * sin
    return turned


def loop_by_hand(layer: int, budget: int, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """New tokens one by one, every layer over its own keys and values."""
    llava, inputs = model(), inputs or tensors()
    length, decoder = inputs["input_ids"].shape[1], llava.model.language_model
    first = by_hand(llava, inputs, layer, budget)
    caches, made = list(first.cache), [first.logits[:, -1:].argmax(-1)]
    with torch.no_grad():
        for position in range(length, length + TOKENS - 1):
            x = llava.get_input_embeddings()(made[-1])
            angles = decoder.rotary_emb(x, position_ids=torch.full_like(made[-1], position))
            for index, block in enumerate(decoder.layers):
                attention, normed = block.self_attn, block.input_layernorm(x)
                q, k, v = (
                    f(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                    for f in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                keys = torch.cat([caches[index][0], rotated(k, angles)], 2)
                values = torch.cat([caches[index][1], v], 2)
                caches[index] = (keys, values)
                shared = q.shape[1] // keys.shape[1]
                keys, values = (t.repeat_interleave(shared, 1) for t in (keys, values))
                weights = (rotated(q, angles) @ keys.transpose(-1, -2) * attention.scaling).softmax(-1)
                x = x + attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
                x = x + block.mlp(block.post_attention_layernorm(x))
            made.append(llava.lm_head(decoder.norm(x)).argmax(-1))
    return torch.cat(made, 1)


def test_the_tokens_of_a_loop_by_hand(decode: Path, prefill: Path) -> None:
    made = Generator(prefill, decode).generate(tensors(), TOKENS)
    assert made.shape == (2, TOKENS)
    assert torch.equal(made, loop_by_hand(2, 30))


def test_prompts_of_other_lengths(decode: Path, prefill: Path) -> None:
    """The last token votes, so the padding of a text behind the image goes in front of that text."""
    inputs = tensors()
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    short = {name: t[1:, 1:-3] if t.dim() == 2 else t[1:] for name, t in inputs.items()}
    ids[1, 4:], mask[1, :4] = short["input_ids"][0], 0
    made = Generator(prefill, decode).generate({**inputs, "input_ids": ids, "attention_mask": mask}, TOKENS)
    assert torch.equal(made[:1], loop_by_hand(2, 30)[:1])
    assert torch.equal(made[1:], loop_by_hand(2, 30, short))
    assert not torch.equal(made[1:], loop_by_hand(2, 30)[1:])


def test_the_loop_by_hand_is_the_models() -> None:
    """With every token kept it is transformers' own `generate`; with fewer it says something else."""
    with torch.no_grad():
        whole = model().generate(**tensors(), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    assert torch.equal(loop_by_hand(1, 144), whole[:, LENGTH:])
    assert not torch.equal(loop_by_hand(2, 30), loop_by_hand(1, 144))


def test_every_layer_has_a_length_of_its_own(decode: Path, prefill: Path) -> None:
    def lengths(values: Any, folder: str) -> dict[str, Any]:
        shapes = {v.name.removeprefix(folder): v.type.tensor_type.shape.dim for v in values}
        return {n: d[2].dim_param or d[2].dim_value for n, d in shapes.items() if n.endswith(".keys")}

    names = lengths(onnx.load(str(decode)).graph.input, "input.")
    assert len(names) == 3 and all(names.values()) and len(set(names.values())) == 3
    assert list(lengths(onnx.load(str(prefill)).graph.output, "").values()) == [LENGTH, LENGTH, LENGTH - 144 + 30]


def test_the_model_is_left_as_it_was(decode: Path) -> None:
    assert decode.is_file()
    assert model().config.text_config._attn_implementation == model().config._attn_implementation == "sdpa"


def test_a_step_of_one_length_is_refused(decode: Path, prefill: Path, tmp_path: Path) -> None:
    one = tmp_path / "decode.onnx"
    one.write_bytes(decode.read_bytes())
    described = {**read_step(decode), "lengths_by_layer": False}
    loaded = onnx.load(str(one))
    del loaded.metadata_props[:]
    onnx.save(loaded, str(one))
    append_metadata(one, {KEY: json.dumps(described)})
    with pytest.raises(UsageError, match=r"longer in the first layers .* one of the same length in all"):
        Generator(prefill, one)


@pytest.mark.parametrize("change", ["window", "attention"])
def test_a_step_that_needs_its_mask_keeps_it(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = model().config.text_config
    if change == "window":
        monkeypatch.setattr(text, "sliding_window", 4096, raising=False)
    else:
        monkeypatch.setattr(text, "_attn_implementation_internal", "eager")
    path = export_decode(model(), tensors(), tmp_path / "decode.onnx")
    assert read_step(path)["lengths_by_layer"] is False
    inputs = [v for v in onnx.load(str(path)).graph.input if v.name.endswith(".keys")]
    assert len(inputs) == 3 and len({v.type.tensor_type.shape.dim[2].dim_param for v in inputs}) == 1


def test_an_exporter_that_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers 5.17 has it not."""
    monkeypatch.setattr("pumer_compile.generation.decode.OnnxExporter", type("OnnxExporter", (), {}))
    with pytest.raises(UsageError, match="cannot convert a decoding step"):
        export_decode(model(), tensors(), tmp_path / "decode.onnx")
