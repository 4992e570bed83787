import importlib

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import ViltForImagesAndTextClassification, ViltForQuestionAnswering, ViltModel
from transformers.exporters import utils
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

from pumer_compile import frontends
from pumer_compile.capture.capture import capture
from pumer_compile.errors import CaptureError
from pumer_compile.frontends.vilt import hat_weights, nearest_indices, visual_embed
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

# name: image sizes in one batch, canvas. The tiny model's own image size is 96, its patches are 16.
CANVASES = {
    "own size": ([(96, 96), (96, 48), (32, 80), (16, 96)], (96, 96)),
    "larger": ([(160, 128), (96, 96), (144, 16), (160, 112)], (160, 128)),
    "smaller": ([(64, 64), (48, 32), (64, 16)], (64, 64)),
    "wide": ([(32, 160), (16, 16), (32, 96)], (32, 160)),
    "one patch high": ([(16, 96), (16, 48)], (16, 96)),
    "no image fills the canvas": ([(80, 48), (32, 64)], (96, 96)),
    "no multiple of the patch": ([(101, 83), (70, 83), (101, 37), (53, 61)], (101, 83)),
}


@pytest.fixture
def ordered(monkeypatch):
    """transformers' ViLT with its random patch order fixed: the first patches, in raster order."""
    monkeypatch.setattr(
        torch,
        "multinomial",
        lambda weights, count, replacement=False: torch.arange(int(count)) % len(weights),
    )


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def stock_and_captured(model, inputs, run=None):
    program = capture(model, inputs)
    run = inputs if run is None else run
    return logits(model, run), logits(program.module, run)


@pytest.mark.parametrize("case", CANVASES)
def test_equals_stock_on_mixed_image_sizes(case, ordered):
    sizes, canvas = CANVASES[case]
    inputs = {**text_inputs(len(sizes)), **image_inputs(sizes, canvas)}
    expected, actual = stock_and_captured(tiny_vilt(), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_equals_stock_in_its_random_patch_order(seed):
    sizes, canvas = CANVASES["own size"]
    inputs = {**text_inputs(len(sizes), seed=seed), **image_inputs(sizes, canvas, seed=seed)}
    expected, actual = stock_and_captured(tiny_vilt(seed=seed), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_comparison_sees_a_wrong_size():
    """Without this, the tests above could pass because nothing depends on the mask."""
    model = tiny_vilt()
    right = {**text_inputs(2), **image_inputs([(96, 96), (96, 48)], (96, 96))}
    wrong = {**right, "pixel_mask": right["pixel_mask"].clone()}
    wrong["pixel_mask"][1, :, 48:64] = 1
    difference = (logits(model, right) - logits(model, wrong)).abs().amax(dim=1)
    assert difference[0] < 1e-5 < 1e-2 < difference[1]


@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_masks_are_read_at_run_time(dynamic_batch, ordered):
    model = tiny_vilt()
    program = capture(
        model, {**text_inputs(2), **image_inputs([(96, 96), (96, 96)], (96, 96))}, dynamic_batch=dynamic_batch
    )
    for sizes in (
        [(96, 96), (16, 32)],
        [(48, 96), (96, 16)],
        [(64, 80), (80, 64), (32, 32)][: 3 if dynamic_batch else 2],
    ):
        inputs = {**text_inputs(len(sizes), seed=9), **image_inputs(sizes, (96, 96), seed=9)}
        expected = logits(model, inputs)
        torch.testing.assert_close(logits(program.module, inputs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("canvas", [(96, 96), (128, 64), (50, 70)])
def test_without_a_pixel_mask(canvas, ordered):
    images = {"pixel_values": image_inputs([canvas] * 3, canvas)["pixel_values"]}
    expected, actual = stock_and_captured(tiny_vilt(), {**text_inputs(3), **images})
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_masks_of_other_dtypes(dtype, ordered):
    inputs = {**text_inputs(2), **image_inputs([(96, 48), (32, 96)], (96, 96))}
    run = {**inputs, "pixel_mask": inputs["pixel_mask"].to(dtype)}
    expected, actual = stock_and_captured(tiny_vilt(), run)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual, logits(tiny_vilt(), inputs), atol=1e-5, rtol=0)


def test_a_mask_with_holes(ordered):
    """Positions follow the first row and column; what is masked inside is masked and nothing else."""
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (96, 96)], (96, 96))}
    inputs["pixel_mask"][1, 32:64, 16:48] = 0
    expected, actual = stock_and_captured(tiny_vilt(), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_mask_coarser_than_the_pixels(ordered):
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (48, 96)], (96, 96))}
    inputs["pixel_mask"] = inputs["pixel_mask"][:, ::16, ::16].contiguous()
    expected, actual = stock_and_captured(tiny_vilt(), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_tokens_are_in_raster_order(ordered):
    """With its choice fixed to the first patches, stock is in raster order too if images fill the canvas."""
    model = tiny_vilt(ViltModel)
    inputs = {**text_inputs(2, length=5), **image_inputs([(96, 64), (96, 64)], (96, 64))}
    program = capture(model, inputs)
    with torch.no_grad():
        expected, actual = model(**inputs), program.module(**inputs)
    assert actual.last_hidden_state.shape == (2, 5 + 1 + 6 * 4, 24)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)


def test_two_images_a_sample(ordered):
    model = tiny_vilt(ViltForImagesAndTextClassification, num_images=2, modality_type_vocab_size=3)
    images = image_inputs([(96, 96), (48, 96), (96, 32), (80, 80)], (96, 96))
    inputs = {**text_inputs(2), **{name: t.view(2, 2, *t.shape[1:]) for name, t in images.items()}}
    expected, actual = stock_and_captured(model, inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_float64_is_exact(ordered):
    inputs = {**text_inputs(3), **image_inputs([(112, 96), (48, 80), (96, 16)], (112, 96))}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected, actual = stock_and_captured(tiny_vilt().double(), inputs)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_positions_are_computed_in_float32(dtype):
    model = tiny_vilt(ViltModel)
    table = model.embeddings.position_embeddings
    with torch.no_grad():
        for parameter in model.embeddings.parameters():
            if parameter is not table:
                parameter.zero_()
    model = model.to(dtype)
    reference = tiny_vilt(ViltModel)
    reference.load_state_dict(model.state_dict())
    images = image_inputs([(160, 144), (112, 48)], (160, 144))
    with torch.no_grad():
        pixels, mask = images["pixel_values"], images["pixel_mask"]
        tokens, token_mask, _ = visual_embed(model.embeddings, pixels.to(dtype), mask, -1)
        exact, _, _ = visual_embed(reference.embeddings, pixels, mask, -1)
    assert tokens.dtype == dtype and token_mask.dtype == torch.int64
    torch.testing.assert_close(tokens, exact.to(dtype), atol=0, rtol=0)


def test_half_precision_model_traces_and_runs():
    model = tiny_vilt().half()
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (48, 64)], (96, 96))}
    program = capture(model, inputs)
    assert program.inputs["pixel_values"].dtype == torch.float16
    actual = logits(program.module, program.inputs)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.float(), logits(tiny_vilt(), inputs), atol=0.05, rtol=0.05)


def test_gradients_equal_stock(ordered):
    inputs = {**text_inputs(3), **image_inputs([(96, 96), (32, 80), (96, 16)], (96, 96))}
    stock, captured = tiny_vilt(), tiny_vilt()
    program = capture(captured, inputs)
    stock(**inputs).logits.square().sum().backward()
    program.module(**inputs).logits.square().sum().backward()
    for (name, expected), actual in zip(stock.named_parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-3, rtol=1e-4, msg=name)
    assert captured.vilt.embeddings.position_embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize("limit", [0, 5, 35])
def test_a_limit_on_patches_is_refused(limit):
    model = tiny_vilt(max_image_length=limit)
    with pytest.raises(CaptureError, match=rf"config.max_image_length is {limit}, .* 36 patches \(6 x 6\)") as error:
        capture(model, {**text_inputs(1), **image_inputs([(96, 96)], (96, 96))})
    assert "\n" not in str(error.value) and "at least 36" in str(error.value)


@pytest.mark.parametrize("limit", [-1, 36, 200])
def test_a_limit_that_no_image_exceeds_is_no_limit(limit, ordered):
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (48, 96)], (96, 96))}
    expected, actual = stock_and_captured(tiny_vilt(max_image_length=limit), inputs)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_equals_the_oracle():
    folder = "tests/oracle/vilt-tiny"
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    inputs = {name: torch.from_numpy(a) for name, a in np.load(f"{folder}/inputs.npz").items()}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    expected = torch.from_numpy(np.load(f"{folder}/expected.npz")["unreduced"])
    torch.testing.assert_close(logits(capture(model, inputs).module, inputs), expected, atol=1e-5, rtol=0)


def test_nearest_indices_are_those_of_interpolate():
    for size in [*range(1, 130), 384, 500, 641, 1333]:
        source = torch.arange(size, dtype=torch.float32)[None, None]
        for target in [*range(1, 42), size, 2 * size, 3 * size]:
            expected = interpolate(source, size=target)[0, 0].long().tolist()
            assert nearest_indices(size, target) == expected, (size, target)


def test_nearest_indices_round_as_torch_does():
    """Exact arithmetic reads another entry at these sizes: their scale is rounded to float32 in torch."""
    for size, target in [(14, 46), (26, 22), (62, 14), (76, 28)]:
        exact = [i * size // target for i in range(target)]
        source = torch.arange(size, dtype=torch.float32)[None, None]
        assert nearest_indices(size, target) == interpolate(source, size=target)[0, 0].long().tolist() != exact


@pytest.mark.parametrize("grid", [1, 2, 6, 12])
def test_hat_weights_interpolate_and_pad(grid):
    size = 15
    lengths = torch.arange(1, size + 1)
    weights = hat_weights(lengths, size, grid, torch.float64)
    values = torch.randn(1, 4, grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths.tolist()):
        expected = interpolate(values, size=length, mode="linear", align_corners=True)[0].T
        torch.testing.assert_close(weights[row, :length] @ values[0].T, expected, atol=1e-12, rtol=0)
        assert weights[row, length:].count_nonzero() == 0


def test_it_is_installed_only_while_tracing():
    original = ViltEmbeddings.visual_embed
    capture(tiny_vilt(), {**text_inputs(1), **image_inputs([(96, 96)], (96, 96))})
    assert ViltEmbeddings.visual_embed is original


def test_a_reload_does_not_register_it_twice():
    importlib.reload(frontends)
    entries = [entry for entry in utils._PATCHES["dynamo"] if entry[2].__module__ == visual_embed.__module__]
    assert len(entries) == 1
