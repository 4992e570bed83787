import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViltForImagesAndTextClassification,
    ViltModel,
)

from pumer_compile.capture.capture import capture
from pumer_compile.capture.inputs import describe
from pumer_compile.capture.loading import LoadedModel
from pumer_compile.capture.make_inputs import load_inputs, make_inputs
from pumer_compile.errors import UsageError
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt


def shapes(inputs):
    return {name: describe(tensor) for name, tensor in inputs.items()}


def refused(message, call, *args, **kwargs):
    with pytest.raises(UsageError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Making


def test_defaults_come_from_the_config():
    assert shapes(make_inputs(tiny_vilt())) == {
        "input_ids": "int64[1, 12]",
        "attention_mask": "int64[1, 12]",
        "pixel_values": "float32[1, 3, 96, 96]",
        "pixel_mask": "int64[1, 96, 96]",
    }
    long = tiny_vilt(ViltModel, max_position_embeddings=77, image_size=64, num_channels=1)
    assert shapes(make_inputs(long))["input_ids"] == "int64[1, 40]"
    assert shapes(make_inputs(long))["pixel_values"] == "float32[1, 1, 64, 64]"


def test_sizes_can_be_given():
    made = make_inputs(tiny_vilt(), batch=3, text_length=5, image_size=(48, 80))
    assert made["input_ids"].shape == (3, 5) and made["pixel_values"].shape == (3, 3, 48, 80)
    assert make_inputs(tiny_vilt(), image_size=64)["pixel_mask"].shape == (1, 64, 64)
    for name in ("batch", "text_length", "image_size"):
        refused(f"{name.replace('_', ' ')} must be at least 1; found 0", make_inputs, tiny_vilt(), **{name: 0})


def test_the_seed_decides():
    first, same, other = (make_inputs(tiny_vilt(), batch=4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("seed", range(4))
def test_padding_is_on_the_right_and_differs(seed):
    made = make_inputs(tiny_vilt(pad_token_id=7), batch=6, seed=seed)
    mask, ids = made["attention_mask"], made["input_ids"]
    lengths = mask.sum(1)
    assert lengths[0] == 12 and (lengths[1:] < 12).all() and (lengths >= 6).all() and len(set(lengths.tolist())) > 1
    for row, length in enumerate(lengths):
        assert mask[row, :length].all() and not mask[row, length:].any()
        assert (ids[row, length:] == 7).all() and (ids[row, :length] != 7).all()
    pixels, images = made["pixel_values"], made["pixel_mask"]
    for row in range(6):
        height, width = int(images[row, :, 0].sum()), int(images[row, 0].sum())
        assert images[row].sum() == height * width and images[row, :height, :width].all()
        assert height % 16 == 0 and width % 16 == 0 and min(height, width) >= 48
        assert row % 2 == 1 or (height, width) == (96, 96)
        assert not pixels[row, :, height:].any() and not pixels[row, :, :, width:].any()
    assert (images.flatten(1).sum(1) < 96 * 96).any()


def test_a_batch_of_one_is_padded_unless_the_seed_is_zero():
    assert make_inputs(tiny_vilt(), seed=0)["attention_mask"].all()
    assert not make_inputs(tiny_vilt(), seed=1)["attention_mask"].all()


def test_no_padding():
    made = make_inputs(tiny_vilt(), batch=6, padding=False)
    assert made["attention_mask"].all() and made["pixel_mask"].all()


def test_ids_avoid_special_tokens():
    model = tiny_vilt(vocab_size=4, pad_token_id=0)
    model.config.sep_token_id = 2
    ids = make_inputs(model, batch=8, padding=False)["input_ids"]
    assert set(ids.flatten().tolist()) == {1, 3}


def test_one_token_is_not_padded_away():
    assert make_inputs(tiny_vilt(), batch=4, text_length=1)["attention_mask"].all()


def test_the_models_dtype():
    assert make_inputs(tiny_vilt().half())["pixel_values"].dtype == torch.float16


def test_several_images_a_sample():
    model = tiny_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)
    made = make_inputs(model, batch=2)
    assert made["pixel_values"].shape == (2, 2, 3, 96, 96) and made["pixel_mask"].shape == (2, 2, 96, 96)
    with torch.no_grad():
        expected = model(**made).logits
        torch.testing.assert_close(capture(model, made).module(**made).logits, expected, atol=1e-5, rtol=0)


def test_other_models():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**small, vocab_size=60)).eval()
    assert list(make_inputs(bert)) == ["input_ids", "attention_mask"]
    text = {**small, "vocab_size": 60, "max_position_embeddings": 9}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8})).eval()
    made = make_inputs(clip, batch=2)
    assert shapes(made) == {
        "input_ids": "int64[2, 9]",
        "pixel_values": "float32[2, 3, 32, 32]",
        "attention_mask": "int64[2, 9]",
    }
    for model in (bert, clip):
        made = make_inputs(model, batch=2)
        with torch.no_grad():
            model(**made)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_made_can_be_captured_and_run(seed):
    model = tiny_vilt()
    made = make_inputs(LoadedModel("", "folder", "", model), batch=3, seed=seed)
    with torch.no_grad():
        expected = model(**made).logits
        torch.testing.assert_close(capture(model, made).module(**made).logits, expected, atol=1e-5, rtol=0)


class Plain(nn.Module):
    def forward(self, ids, x):
        return ids.sum(1) + x.sum(1)


def test_what_cannot_be_made():
    assert ".npz" in refused("Plain has no transformers config", make_inputs, Plain())
    config = LlavaConfig(
        text_config={"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 60,
                     "intermediate_size": 16, "num_attention_heads": 2},
        vision_config={"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        image_token_index=59,
    )  # fmt: skip
    refused("special tokens in its text", make_inputs, LlavaForConditionalGeneration(config))


def tiny_vilt_text():
    class Text(nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids * attention_mask

    return Text()


def test_archives_get_inputs_like_their_examples():
    batch = Dim("batch")
    example = {"ids": torch.randint(5, 20, (3, 4)), "x": torch.randn(3, 4)}
    exported = torch.export.export(Plain(), (), example, dynamic_shapes={"ids": {0: batch}, "x": {0: batch}})
    first, same, other = (make_inputs(exported, seed=seed) for seed in (1, 1, 2))
    assert shapes(first) == shapes(example)
    assert 5 <= first["ids"].min() and first["ids"].max() < 20
    assert torch.equal(first["x"], same["x"]) and not torch.equal(first["x"], other["x"])
    mask = {"ids": torch.ones(3, 4).long(), "x": torch.randn(3, 4)}
    assert make_inputs(torch.export.export(Plain(), (), mask))["ids"].all()
    assert make_inputs(exported, batch=5)["ids"].shape == (5, 4)
    static = torch.export.export(tiny_vilt_text(), (), text_inputs(2))
    assert make_inputs(static, batch=2, text_length=7)["input_ids"].shape == (2, 7)
    refused("fixed one of 2", make_inputs, static, batch=3)
    refused(r"input_ids int64\[2, 7\]; other sizes \(9 were", make_inputs, static, text_length=9)
    exported.example_inputs = None
    assert "ids, x" in refused("holds no example inputs", make_inputs, exported)


# --- Reading


@pytest.fixture
def arrays():
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (48, 80)], (96, 96))}
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def saved(tmp_path, arrays):
    np.savez(tmp_path / "inputs.npz", **arrays)
    return tmp_path / "inputs.npz"


def test_arrays_are_cast(tmp_path, arrays):
    arrays["pixel_values"] = arrays["pixel_values"].astype(np.float16)
    arrays["input_ids"] = arrays["input_ids"].astype(np.int32)
    arrays["attention_mask"] = arrays["attention_mask"].astype(np.uint8)
    arrays["pixel_mask"] = arrays["pixel_mask"].astype(bool)
    path = saved(tmp_path, dict(reversed(arrays.items())))
    loaded = load_inputs(path, tiny_vilt())
    assert list(loaded) == ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]
    assert [tensor.dtype for tensor in loaded.values()] == [
        torch.int64,
        torch.int64,
        torch.float32,
        torch.bool,
    ]
    np.testing.assert_array_equal(loaded["pixel_values"].numpy(), arrays["pixel_values"].astype(np.float32))
    assert load_inputs(path, tiny_vilt().half())["pixel_values"].dtype == torch.float16
    assert load_inputs(path, LoadedModel(path, "folder", "", tiny_vilt())).keys() == loaded.keys()


def test_big_endian_and_strided_arrays(tmp_path, arrays):
    arrays["pixel_values"] = np.asfortranarray(arrays["pixel_values"].astype(">f8"))
    arrays["input_ids"] = arrays["input_ids"].astype(">i4")
    loaded = load_inputs(saved(tmp_path, arrays), tiny_vilt())
    np.testing.assert_allclose(loaded["pixel_values"].numpy(), arrays["pixel_values"], rtol=1e-6)
    np.testing.assert_array_equal(loaded["input_ids"].numpy(), arrays["input_ids"])


def test_arrays_for_an_archive(tmp_path):
    exported = torch.export.export(
        Plain(), (), {"ids": torch.ones(3, 4, dtype=torch.int32), "x": torch.randn(3, 4).half()}
    )
    path = saved(tmp_path, {"ids": np.ones((3, 4), np.int64), "x": np.ones((3, 4), np.float32)})
    assert shapes(load_inputs(path, exported)) == {"ids": "int32[3, 4]", "x": "float16[3, 4]"}
    path = saved(tmp_path, {"ids": np.ones((3, 5), np.int64), "x": np.ones((3, 4), np.float32)})
    refused(r"ids int32\[3, 4\]; found int32\[3, 5\]", load_inputs, path, exported)


def test_files_that_are_no_npz(tmp_path):
    model = tiny_vilt()
    refused("does not exist", load_inputs, tmp_path / "nothing.npz", model)
    refused("cannot be read", load_inputs, tmp_path, model)
    (tmp_path / "text.npz").write_text("input_ids: 3")
    refused("cannot be read as an .npz", load_inputs, tmp_path / "text.npz", model)
    (tmp_path / "empty.npz").write_bytes(b"")
    refused("cannot be read as an .npz", load_inputs, tmp_path / "empty.npz", model)
    np.save(tmp_path / "single.npy", np.zeros(3))
    refused("is one array", load_inputs, tmp_path / "single.npy", model)
    np.savez(tmp_path / "objects.npz", input_ids=np.array([object()], dtype=object))
    refused("cannot be read as an .npz", load_inputs, tmp_path / "objects.npz", model)
    np.savez(tmp_path / "strings.npz", input_ids=np.array(["a"]))
    refused("dtype <U1; numbers or booleans", load_inputs, tmp_path / "strings.npz", model)
    np.savez(tmp_path / "whole.npz", input_ids=np.zeros((50, 50)))
    content = (tmp_path / "whole.npz").read_bytes()
    for keep in (0.1, 0.5, 0.99):
        (tmp_path / "cut.npz").write_bytes(content[: int(keep * len(content))])
        refused("cannot be read as an .npz", load_inputs, tmp_path / "cut.npz", model)
    np.savez(tmp_path / "none.npz")
    refused("at least one entry", load_inputs, tmp_path / "none.npz", model)


def test_arrays_that_do_not_fit(tmp_path, arrays):
    model = tiny_vilt()
    text = refused("no input 'image'", load_inputs, saved(tmp_path, {**arrays, "image": np.zeros(1)}), model)
    assert "input_ids, attention_mask, token_type_ids, pixel_values" in text
    path = saved(tmp_path, {**arrays, "input_ids": np.ones((2, 7))})
    refused("input_ids .* must be integers", load_inputs, path, model)
    path = saved(tmp_path, {**arrays, "pixel_values": (arrays["pixel_values"] * 9).astype(np.uint8)})
    refused("pixel_values .* must be floating point", load_inputs, path, model)
    path = saved(tmp_path, {**arrays, "input_ids": arrays["input_ids"][:1]})
    refused("differ in their batch size", load_inputs, path, model)
