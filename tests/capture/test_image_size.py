"""Other image sizes: positions as transformers interpolates them, in graphs and artifacts, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn

import pumer_compile as pumer
from pumer_compile.capture.image_size import TABLE, fit_images
from pumer_compile.errors import UsageError
from tests.support import llava
from tests.support.commands import done
from tests.support.tiny import tiny_vilt

OWN = 32
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": OWN, "patch_size": 8}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 40, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1,
        "pad_token_id": 0}  # fmt: skip


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


def clip() -> Any:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def siglip() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


def blip() -> Any:
    config = transformers.BlipConfig(text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION)
    return transformers.BlipForImageTextRetrieval(config)


def deit() -> Any:
    return transformers.DeiTModel(transformers.DeiTConfig(**VISION))


KINDS: dict[str, Callable[[], Any]] = {"vit": vit, "clip": clip, "siglip": siglip, "blip": blip, "deit": deit}


def made(kind: str) -> Any:
    """A model whose positions count: what they are drawn as is next to nothing."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.normal_()
    return model


def inputs(kind: str, size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    found = {"pixel_values": torch.randn(2, 3, *size, generator=g)}
    if kind in ("clip", "blip"):
        ids = torch.randint(3, 40, (2, 6), generator=g)
        ids[:, -1] = 2
        found = {"input_ids": ids, **found, "attention_mask": torch.ones_like(ids)}
    return found


def first(output: Any) -> torch.Tensor:
    return next(value for value in output.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("size", [(16, 16), (48, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_what_it_gives_when_told_to_interpolate(kind: str, size: tuple[int, int]) -> None:
    stock, model = made(kind), made(kind)
    (name,) = pumer.resize_images(model, size)
    for seed in (1, 2):
        given = inputs(kind, size, seed)
        with torch.no_grad():
            wanted = first(stock(**given, interpolate_pos_encoding=True))
            assert torch.equal(first(model(**given)), wanted)
    table = model.get_submodule(name)._parameters[TABLE]
    assert table is not None and table.requires_grad
    with torch.no_grad():
        table.zero_()
        assert not torch.equal(first(model(**given)), wanted)  # it is what the model reads


def test_a_prompt_whose_tower_is_told_by_nobody() -> None:
    """LLaVA has no such option: its tower is called without, and still has the positions of the smaller picture."""
    stock, model = llava.model(), copy.deepcopy(llava.model())
    own = model.config.vision_config.image_size
    half = own // 2
    pumer.resize_images(model, half)
    pixels = torch.randn(2, 3, half, half, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = stock.model.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
        found = model.model.vision_tower(pixels, output_hidden_states=True)
    assert torch.equal(found.hidden_states[-2], told.hidden_states[-2])
    assert found.hidden_states[-2].shape[1] == (half // model.config.vision_config.patch_size) ** 2 + 1


def test_a_graph_has_a_table_and_no_interpolation(tmp_path: Path) -> None:
    model = made("vit")
    pumer.resize_images(model, 16)
    program = pumer.capture(model, inputs("vit", (16, 16), 1), dynamic_batch=True)
    assert not [node for node in program.module.graph.nodes if "upsample" in str(node.target)]
    given = inputs("vit", (16, 16), 5)
    with torch.no_grad():
        wanted = made("vit")(**given, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(first(program.module(**given)), wanted, atol=1e-6, rtol=0)
    twin = copy.deepcopy(model)  # a teacher
    with torch.no_grad():
        twin.get_submodule("vit.embeddings")._parameters[TABLE].zero_()
        assert torch.equal(model(**given).logits, wanted) and not torch.equal(twin(**given).logits, wanted)


def test_fit_does_nothing_where_sizes_agree() -> None:
    model = made("clip")
    assert fit_images(model, OWN) == fit_images(model, None) == fit_images(model, inputs("vit", (OWN, OWN), 0)) == []
    assert fit_images(tiny_vilt(), {"pixel_values": torch.zeros(1, 3, 16, 16)}) == []  # it interpolates by itself
    assert fit_images(model, {"pixel_values": torch.zeros(1, 3, 16, 24)}) == ["vision_model.embeddings"]


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear has no position embeddings that transformers interpolates"):
        pumer.resize_images(nn.Linear(2, 2), 16)
    model = made("vit")
    pumer.resize_images(model, 16)
    with pytest.raises(UsageError, match="interpolated for images of 16 x 16, and it is given 24 x 24"):
        model(**inputs("vit", (24, 24), 0))
    with pytest.raises(UsageError, match="has no position embeddings"):
        pumer.resize_images(model, 24)


def test_from_the_command_line(tmp_path: Path) -> None:
    """Compiled, proved, and proved again by `parity`, which interpolates as well."""
    made("vit").save_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    said = done(str(tmp_path / "model"), "--schedule", "none", "--image-size", "16", "-o", str(path))
    assert "Position embeddings of vit.embeddings are interpolated for images of 16 x 16." in " ".join(
        (said.out + said.err).split()
    )
    assert "Resize" not in {node.op_type for node in onnx.load(path).graph.node}
    given = inputs("vit", (16, 16), 4)
    with torch.no_grad():
        wanted = made("vit")(pixel_values=given["pixel_values"][:1], interpolate_pos_encoding=True).logits
    found = pumer.OnnxSession(path).run({"pixel_values": given["pixel_values"][:1]})
    np.testing.assert_allclose(found["logits"], wanted.numpy(), atol=1e-5)
    proved = done("parity", str(path), "--model", str(tmp_path / "model"))
    assert "agrees with eager PyTorch" in " ".join((proved.out + proved.err).split())
