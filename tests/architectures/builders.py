"""Small models of several architectures, with random weights, and inputs for them.

Widths, heads and token counts differ wherever an architecture lets them, so that no mix-up of two of them fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    CLIPConfig,
    CLIPModel,
    FlavaConfig,
    FlavaModel,
    LxmertConfig,
    LxmertForQuestionAnswering,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    VisualBertConfig,
    VisualBertForVisualReasoning,
)

Model = TypeVar("Model", bound=nn.Module)
Inputs = dict[str, Tensor]
Build = Callable[[], nn.Module]

WORDS = 61
PATCHED_IMAGE = 48
TEXT: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 32,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": PATCHED_IMAGE,
    "patch_size": 8,
}
# Two that reduce, and one that reads what is left.
FUSION_LAYERS = 3


def randomised(model: Model, seed: int = 0) -> Model:
    """The model in eval mode, with weights so large that a wrong token shows in its outputs."""
    generator = torch.Generator().manual_seed(seed)
    norms = {m for m in model.modules() if isinstance(m, nn.LayerNorm)}
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                mean = float(module in norms and name == "weight")
                parameter.copy_(mean + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


# --- models ---------------------------------------------------------------------------------------------------------


def bridgetower() -> PreTrainedModel:
    """Two towers of three layers and three co-attention pairs, linked from the second pair on."""
    # The attention of its vision tower has heads of 64, whatever the configuration says.
    vision = {"hidden_size": 128, "num_hidden_layers": FUSION_LAYERS, "patch_size": 8, "image_size": PATCHED_IMAGE}
    config = BridgeTowerConfig(
        hidden_size=TEXT["hidden_size"],
        num_attention_heads=TEXT["num_attention_heads"],
        num_hidden_layers=FUSION_LAYERS,
        text_config={**TEXT, "num_hidden_layers": FUSION_LAYERS, "pad_token_id": 1},
        vision_config={**vision, "num_channels": 3},
    )
    return randomised(BridgeTowerForImageAndTextRetrieval(config))


def lxmert() -> PreTrainedModel:
    """Region features; one layer for each modality and three that cross."""
    config = LxmertConfig(
        vocab_size=WORDS,
        hidden_size=TEXT["hidden_size"],
        intermediate_size=TEXT["intermediate_size"],
        num_attention_heads=TEXT["num_attention_heads"],
        max_position_embeddings=TEXT["max_position_embeddings"],
        num_qa_labels=7,
        l_layers=1,
        r_layers=1,
        x_layers=FUSION_LAYERS,
        visual_feat_dim=20,
    )
    return randomised(LxmertForQuestionAnswering(config))


def visual_bert() -> PreTrainedModel:
    """Region features beside the text in one encoder."""
    config = VisualBertConfig(**{**TEXT, "num_hidden_layers": FUSION_LAYERS}, visual_embedding_dim=20, num_labels=4)
    return randomised(VisualBertForVisualReasoning(config))


def _blip_config(**vision: int) -> BlipConfig:
    special = {"bos_token_id": 0, "eos_token_id": 1, "sep_token_id": 2, "pad_token_id": 3}
    text = {**TEXT, **special, "num_hidden_layers": FUSION_LAYERS}
    return BlipConfig(
        text_config=text, vision_config={**VISION, **vision}, projection_dim=16, image_text_hidden_size=16
    )


def blip() -> PreTrainedModel:
    """A text encoder whose every layer attends to the finished image tower."""
    return randomised(BlipForImageTextRetrieval(_blip_config()))


class BlipAnswers(nn.Module):
    """The scores of an answer's words, which `BlipForQuestionAnswering` computes and does not return."""

    def __init__(self, model: BlipForQuestionAnswering) -> None:
        super().__init__()
        self.vision_model, self.text_encoder, self.text_decoder = (
            model.vision_model,
            model.text_encoder,
            model.text_decoder,
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, decoder_input_ids: Tensor
    ) -> dict[str, Tensor]:
        image = self.vision_model(pixel_values=pixel_values).last_hidden_state
        question = self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image
        ).last_hidden_state
        answer = self.text_decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=question,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return {"logits": answer.logits}


def blip_answers() -> nn.Module:
    """BLIP with a decoder that reads the question and not the image."""
    # Encoder and decoder are of one class, so the question must be as wide as the image.
    config = _blip_config(hidden_size=TEXT["hidden_size"], num_attention_heads=TEXT["num_attention_heads"])
    return BlipAnswers(randomised(BlipForQuestionAnswering(config))).eval()


def flava() -> PreTrainedModel:
    """Two towers, then one encoder over a learned token, the image and the text."""
    fusion = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
    config = FlavaConfig(
        text_config=TEXT,
        image_config=VISION,
        multimodal_config={**fusion, "num_hidden_layers": FUSION_LAYERS},
        hidden_size=24,
        projection_dim=16,
    )
    config.return_loss = False  # transformers refuses to export a model that would compute its loss
    return randomised(FlavaModel(config))


def clip() -> PreTrainedModel:
    """Two towers that meet in one product."""
    text = {**TEXT, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    vision = {**VISION, "num_hidden_layers": 3}
    return randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


def siglip() -> PreTrainedModel:
    """The same without a class token: a learned query pools the image."""
    text = {**TEXT, "projection_size": VISION["hidden_size"]}
    vision = {**VISION, "num_hidden_layers": 3}
    return randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))


# --- inputs ---------------------------------------------------------------------------------------------------------


def words(batch: int = 3, length: int = 11, seed: int = 0) -> Inputs:
    """Random words; every sample but the first is padded, each a little more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, WORDS, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 1 - 2 * row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def words_and_pixels(seed: int = 0) -> Inputs:
    """Words and images of 36 patches."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {**words(seed=seed), "pixel_values": torch.randn(3, 3, PATCHED_IMAGE, PATCHED_IMAGE, generator=generator)}


def words_pixels_and_answers(seed: int = 0) -> Inputs:
    """Words, images, and an answer of seven words."""
    generator = torch.Generator().manual_seed(200 + seed)
    return {**words_and_pixels(seed), "decoder_input_ids": torch.randint(4, WORDS, (3, 7), generator=generator)}


def words_and_regions(seed: int = 0) -> Inputs:
    """Words, and for each image the features and boxes of 18 regions."""
    generator = torch.Generator().manual_seed(100 + seed)
    features, boxes = torch.randn(3, 18, 20, generator=generator), torch.rand(3, 18, 4, generator=generator)
    return {**words(seed=seed), "visual_feats": features, "visual_pos": boxes}


def words_and_visual_embeds(seed: int = 0) -> Inputs:
    """Words and the features of 18 regions."""
    found = words_and_regions(seed)
    del found["visual_pos"]
    found["visual_embeds"] = found.pop("visual_feats")
    return {**found, "visual_attention_mask": torch.ones(3, 18, dtype=torch.int64)}
