"""Vision-language models of transformers, each with inputs: what `benchmarks.architectures` compiles.

The models it can reduce have their published sizes (the defaults of their configurations, unless said otherwise), the
others sizes large enough to trace. Weights are whatever the memory holds: nothing here is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from pumer_compile.frontends.meter import MeterConfig, MeterForQuestionAnswering

Built = tuple[nn.Module, dict[str, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """A model to compile.

    Attributes:
        name: as people call it.
        size: of the model and its inputs, in words.
        build: makes the model and its inputs.
        outputs: what is kept of its outputs; () keeps all.
        proof: the tests that hold its numbers against another implementation, or ''.
    """

    name: str
    size: str
    build: Callable[[], Built]
    outputs: tuple[str, ...] = ()
    proof: str = ""


ARCHITECTURES: dict[str, Architecture] = {}
SMALL = "small configuration"


def _architecture(name: str, size: str, *outputs: str, proof: str = "") -> Callable[[Callable[[], Built]], None]:
    def add(build: Callable[[], Built]) -> None:
        ARCHITECTURES[name] = Architecture(name, size, build, outputs, proof)

    return add


def words(length: int, batch: int = 1, first: int = 0) -> dict[str, Tensor]:
    """Ids and a mask; `first` are placeholders for an image (id 99)."""
    ids = torch.full((batch, length), 7)
    ids[:, :first] = 99
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pixels(size: int, batch: int = 1) -> dict[str, Tensor]:
    """A black image."""
    return {"pixel_values": torch.zeros(batch, 3, size, size)}


def _oracle(name: str) -> str:
    return f"tests/architectures/test_{name}.py"


# --- text and image meet in attention: published sizes --------------------------------------------------------------


@_architecture("ViLT", "B/32, 384 px, 40 words", "logits", proof="tests/test_oracle_vilt.py")
def _vilt() -> Built:
    mask = {"pixel_mask": torch.ones(1, 384, 384, dtype=torch.int64)}
    return hf.ViltForQuestionAnswering(hf.ViltConfig(num_labels=3129)), {**words(40), **pixels(384), **mask}


@_architecture("METER", "CLIP-B/16 and RoBERTa, 384 px, 50 words", "logits", proof="tests/test_oracle_meter.py")
def _meter() -> Built:
    return MeterForQuestionAnswering(MeterConfig()), {**words(50), **pixels(384)}


@_architecture("BridgeTower", "base, 288 px, 50 words", "logits", proof=_oracle("bridgetower"))
def _bridgetower() -> Built:
    return hf.BridgeTowerForImageAndTextRetrieval(hf.BridgeTowerConfig()), {**words(50), **pixels(288)}


@_architecture("LXMERT", "base, 36 regions, 20 words", proof=_oracle("lxmert"))
def _lxmert() -> Built:
    regions = {"visual_feats": torch.zeros(1, 36, 2048), "visual_pos": torch.zeros(1, 36, 4)}
    return hf.LxmertForQuestionAnswering(hf.LxmertConfig(num_qa_labels=3129)), {**words(20), **regions}


@_architecture("VisualBERT", "base, 144 regions, 40 words", proof=_oracle("visual_bert"))
def _visual_bert() -> Built:
    regions = {"visual_embeds": torch.zeros(1, 144, 1024), "visual_attention_mask": torch.ones(1, 144).long()}
    config = hf.VisualBertConfig(visual_embedding_dim=1024)
    return hf.VisualBertForVisualReasoning(config), {**words(40), **regions}


@_architecture("BLIP, image-text matching", "base, 384 px, 35 words", "itm_score", proof=_oracle("blip"))
def _blip() -> Built:
    return hf.BlipForImageTextRetrieval(hf.BlipConfig()), {**words(35), **pixels(384)}


class BlipAnswers(nn.Module):
    """The scores of an answer's words, which `BlipForQuestionAnswering` computes and does not return."""

    def __init__(self) -> None:
        super().__init__()
        self.model = hf.BlipForQuestionAnswering(hf.BlipConfig())

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, decoder_input_ids: Tensor
    ) -> dict[str, Tensor]:
        """Scores of the answer's words."""
        model = self.model
        image = model.vision_model(pixel_values=pixel_values).last_hidden_state
        question = model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image
        ).last_hidden_state
        answer = model.text_decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=question,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return {"logits": answer.logits}


@_architecture("BLIP, questions", "base, 384 px, 35 words, 10 of the answer", proof=_oracle("blip"))
def _blip_questions() -> Built:
    return BlipAnswers(), {**words(35), **pixels(384), "decoder_input_ids": torch.full((1, 10), 7)}


@_architecture("BLIP, captions", "base, 384 px, 20 words", "logits")
def _blip_captions() -> Built:
    return hf.BlipForConditionalGeneration(hf.BlipConfig()), {**words(20), **pixels(384)}


@_architecture("FLAVA", "base, 224 px, 77 words", "multimodal_output.pooler_output", proof=_oracle("flava"))
def _flava() -> Built:
    config = hf.FlavaConfig()
    config.return_loss = False
    return hf.FlavaModel(config), {**words(77), **pixels(224)}


@_architecture("LayoutLMv3", "base, 224 px, 512 words, documents", "logits")
def _layoutlmv3() -> Built:
    boxes = {"bbox": torch.zeros(1, 512, 4, dtype=torch.int64)}
    model = hf.LayoutLMv3ForSequenceClassification(hf.LayoutLMv3Config(input_size=224, num_labels=16))
    return model, {**words(512), **boxes, **pixels(224)}


@_architecture("TVP", "base, 48 frames of 448 px, 20 words", "logits")
def _tvp() -> Built:
    video = {"pixel_values": torch.zeros(1, 48, 3, 448, 448)}
    return hf.TvpForVideoGrounding(hf.TvpConfig()), {**words(20), **video}


@_architecture("GIT", "base, 224 px, 40 words", "logits")
def _git() -> Built:
    return hf.GitForCausalLM(hf.GitConfig()), {**words(40), **pixels(224)}


@_architecture("Pix2Struct", "base, 2048 patches, 40 words", "logits")
def _pix2struct() -> Built:
    patches = {"flattened_patches": torch.zeros(1, 2048, 770), "attention_mask": torch.ones(1, 2048)}
    answer = {"decoder_input_ids": torch.full((1, 40), 7)}
    return hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig()), {**patches, **answer}


@_architecture("ViT and GPT-2 captions (VisionEncoderDecoder)", "base, 224 px, 20 words", "logits")
def _vit_gpt2() -> Built:
    decoder = hf.GPT2Config(add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(), decoder)
    return hf.VisionEncoderDecoderModel(config), {**pixels(224), "decoder_input_ids": torch.full((1, 20), 7)}


@_architecture("TrOCR", "base, 384 px, 20 words", "logits", proof=_oracle("dense_heads"))
def _trocr() -> Built:
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(image_size=384), hf.TrOCRConfig(cross_attention_hidden_size=768)
    )
    return hf.VisionEncoderDecoderModel(config), {**pixels(384), "decoder_input_ids": torch.full((1, 20), 7)}


# --- text and image meet in a product: published sizes --------------------------------------------------------------


def _dual(model: Any, config: Any, size: int, length: int) -> Built:
    return model(config), {**words(length), **pixels(size)}


@_architecture("CLIP", "B/32, 224 px, 77 words", "logits_per_image", proof=_oracle("dual_encoders"))
def _clip() -> Built:
    return _dual(hf.CLIPModel, hf.CLIPConfig(), 224, 77)


@_architecture("SigLIP", "B/16, 224 px, 64 words", "logits_per_image", proof=_oracle("dual_encoders"))
def _siglip() -> Built:
    return _dual(hf.SiglipModel, hf.SiglipConfig(), 224, 64)


@_architecture("SigLIP 2", "B/16, 256 patches, 64 words", "logits_per_image")
def _siglip2() -> Built:
    image = {
        "pixel_values": torch.zeros(1, 256, 768),
        "pixel_attention_mask": torch.ones(1, 256, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[16, 16]]),
    }
    return hf.Siglip2Model(hf.Siglip2Config()), {**words(64), **image}


@_architecture("AltCLIP", "base, 224 px, 77 words", "logits_per_image")
def _altclip() -> Built:
    return _dual(hf.AltCLIPModel, hf.AltCLIPConfig(), 224, 77)


@_architecture("Chinese CLIP", "B/16, 224 px, 52 words", "logits_per_image")
def _chinese_clip() -> Built:
    return _dual(hf.ChineseCLIPModel, hf.ChineseCLIPConfig(vision_config={"patch_size": 16}), 224, 52)


@_architecture("MetaCLIP 2", "B/32, 224 px, 77 words", "logits_per_image")
def _metaclip2() -> Built:
    return _dual(hf.MetaClip2Model, hf.MetaClip2Config(), 224, 77)


@_architecture("ViT and BERT (VisionTextDualEncoder)", "base, 224 px, 40 words", "logits_per_image")
def _vit_bert() -> Built:
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(), hf.BertConfig())
    return _dual(hf.VisionTextDualEncoderModel, config, 224, 40)


@_architecture("ALIGN", "EfficientNet-B7, 289 px, 64 words", "logits_per_image", proof=_oracle("dense_heads"))
def _align() -> Built:
    return _dual(hf.AlignModel, hf.AlignConfig(), 289, 64)


@_architecture("X-CLIP", "B/32, 8 frames of 224 px, 77 words", "logits_per_video", proof=_oracle("dense_heads"))
def _x_clip() -> Built:
    return hf.XCLIPModel(hf.XCLIPConfig()), {**words(77), "pixel_values": torch.zeros(1, 8, 3, 224, 224)}


@_architecture("GroupViT", "base, 224 px, 77 words", "logits_per_image", proof=_oracle("dense_heads"))
def _groupvit() -> Built:
    return _dual(hf.GroupViTModel, hf.GroupViTConfig(), 224, 77)


@_architecture("CLIPSeg", "B/16, 352 px, 77 words", "logits", proof=_oracle("dense_heads"))
def _clipseg() -> Built:
    vision = {"patch_size": 16, "image_size": 352}
    return _dual(hf.CLIPSegForImageSegmentation, hf.CLIPSegConfig(vision_config=vision), 352, 77)


@_architecture("OWL-ViT", "B/32, 768 px, 2 queries of 16 words", "logits", "pred_boxes", proof=_oracle("dense_heads"))
def _owlvit() -> Built:
    return hf.OwlViTForObjectDetection(hf.OwlViTConfig()), {**words(16, 2), **pixels(768)}


@_architecture("OWLv2", "B/16, 960 px, 2 queries of 16 words", "logits", "pred_boxes", proof=_oracle("dense_heads"))
def _owlv2() -> Built:
    config = hf.Owlv2Config(vision_config={"patch_size": 16, "image_size": 960})
    return hf.Owlv2ForObjectDetection(config), {**words(16, 2), **pixels(960)}


# --- a query transformer between image and language model -----------------------------------------------------------

_QUERY: dict[str, Any] = {"vocab_size": 100, "num_hidden_layers": 4}
_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 8,
}
_LANGUAGE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 100,
    "hidden_size": 64,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


class Blip2Matching(nn.Module):
    """BLIP-2 with its image-text matching head, which a flag chooses."""

    def __init__(self) -> None:
        super().__init__()
        query = {"vocab_size": 30523, "use_qformer_text_input": True}
        self.model = hf.Blip2ForImageTextRetrieval(hf.Blip2Config(qformer_config=query, image_token_index=99))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            use_image_text_matching_head=True,
        )


@_architecture("BLIP-2, image-text matching", "ViT-g, 224 px, 32 queries, 40 words", "logits_per_image")
def _blip2_matching() -> Built:
    return Blip2Matching(), {**words(72, first=32), **pixels(224)}


@_architecture("BLIP-2", f"{SMALL}, OPT", "logits", proof=_oracle("prompt_rows"))
def _blip2() -> Built:
    config = hf.Blip2Config(
        vision_config=_TOWER,
        qformer_config={**_QUERY, "encoder_hidden_size": 64},
        text_config=_OPT,
        num_query_tokens=6,
        image_token_index=99,
    )
    return hf.Blip2ForConditionalGeneration(config), {**words(20, first=6), **pixels(48)}


@_architecture("InstructBLIP", f"{SMALL}, OPT", "logits", proof=_oracle("prompt_rows"))
def _instructblip() -> Built:
    config = hf.InstructBlipConfig(
        vision_config=_TOWER,
        qformer_config={**_QUERY, "encoder_hidden_size": 64},
        text_config=_OPT,
        num_query_tokens=6,
        image_token_index=99,
    )
    asked = {f"qformer_{name}": ids for name, ids in words(9).items()}
    return hf.InstructBlipForConditionalGeneration(config), {**words(20, first=6), **pixels(48), **asked}


# --- image features in the place of words of a language model: small ------------------------------------------------

_CLIP: dict[str, Any] = {"model_type": "clip_vision_model", **_TOWER}
_SIGLIP: dict[str, Any] = {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER}
_LLAMA: dict[str, Any] = {"model_type": "llama", **_LANGUAGE}
_QWEN: dict[str, Any] = {"model_type": "qwen2", **_LANGUAGE}


@_architecture("LLaVA", SMALL, "logits", proof="tests/test_oracle_llava.py")
def _llava() -> Built:
    config = hf.LlavaConfig(vision_config=_CLIP, text_config=_LLAMA, image_token_index=99, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config), {**words(50, first=36), **pixels(48)}


def _tiles() -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(1, 2, 3, 48, 48), "image_sizes": torch.tensor([[48, 48]])}


@_architecture("LLaVA-NeXT", SMALL, "logits", proof="tests/architectures/test_crops.py")
def _llava_next() -> Built:
    config = hf.LlavaNextConfig(
        vision_config=_CLIP,
        text_config=_LLAMA,
        image_token_index=99,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[48, 48]],
    )
    return hf.LlavaNextForConditionalGeneration(config), {**words(90, first=78), **_tiles()}


@_architecture("LLaVA-OneVision", SMALL, "logits", proof="tests/architectures/test_crops.py")
def _llava_onevision() -> Built:
    config = hf.LlavaOnevisionConfig(
        vision_config=_SIGLIP, text_config=_QWEN, image_token_index=99, image_grid_pinpoints=[[48, 48]]
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), {**words(90, first=78), **_tiles()}


@_architecture("VipLLaVA", SMALL, "logits", proof=_oracle("prompt_rows"))
def _vipllava() -> Built:
    config = hf.VipLlavaConfig(
        vision_config=_CLIP, text_config=_LLAMA, image_token_index=99, vision_feature_layers=[0, 1, 2]
    )
    return hf.VipLlavaForConditionalGeneration(config), {**words(50, first=36), **pixels(48)}


@_architecture("PaliGemma", SMALL, "logits", proof="tests/architectures/test_prompts.py")
def _paligemma() -> Built:
    text = {"model_type": "gemma", "head_dim": 16, **_LANGUAGE}
    config = hf.PaliGemmaConfig(
        vision_config={**_SIGLIP, "projection_dim": 64}, text_config=text, image_token_index=99, projection_dim=64
    )
    types = {"token_type_ids": torch.zeros(1, 50, dtype=torch.int64)}
    return hf.PaliGemmaForConditionalGeneration(config), {**words(50, first=36), **pixels(48), **types}


@_architecture("Gemma 3", SMALL, "logits", proof=_oracle("prompt_rows"))
def _gemma3() -> Built:
    text = {"model_type": "gemma3_text", "head_dim": 16, **_LANGUAGE}
    config = hf.Gemma3Config(vision_config=_SIGLIP, text_config=text, image_token_id=99, mm_tokens_per_image=9)
    asked = words(20, first=9)
    types = {"token_type_ids": (asked["input_ids"] == 99).long()}
    return hf.Gemma3ForConditionalGeneration(config), {**asked, **pixels(48), **types}


@_architecture("Janus", SMALL, "logits", proof=_oracle("prompt_rows"))
def _janus() -> Built:
    vision = {**_TOWER, "mlp_ratio": 2, "projection_dim": 64, "num_image_tokens": 36}
    codes = {"embed_dim": 8, "num_embeddings": 32, "latent_channels": 8, "num_patches": 4, "base_channels": 32}
    config = hf.JanusConfig(
        text_config=_LLAMA,
        vision_config=vision,
        vq_config={**codes, "channel_multiplier": [1, 1], "projection_dim": 8, "image_token_embed_dim": 64},
        image_token_id=99,
    )
    return hf.JanusForConditionalGeneration(config), {**words(50, first=36), **pixels(48)}


@_architecture("InternVL", SMALL, "logits", proof=_oracle("prompt_rows"))
def _internvl() -> Built:
    vision = {**_TOWER, "image_size": [48, 48], "patch_size": [8, 8]}
    config = hf.InternVLConfig(vision_config=vision, text_config=_QWEN, image_token_id=99, downsample_ratio=0.5)
    return hf.InternVLForConditionalGeneration(config), {**words(20, first=9), **pixels(48)}


@_architecture("Aya Vision", SMALL, "logits", proof=_oracle("prompt_rows"))
def _aya_vision() -> Built:
    text = {"model_type": "cohere2", **_LANGUAGE}
    config = hf.AyaVisionConfig(
        vision_config=_SIGLIP, text_config=text, image_token_index=99, downsample_factor=2, vision_feature_layer=-1
    )
    return hf.AyaVisionForConditionalGeneration(config), {**words(20, first=9), **pixels(48)}


@_architecture("Ovis 2", SMALL, "logits", proof=_oracle("prompt_rows"))
def _ovis2() -> Built:
    vision = {**_TOWER, "vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5}
    config = hf.Ovis2Config(
        vision_config=vision,
        text_config=_QWEN,
        image_token_id=99,
        visual_indicator_token_ids=[91, 92, 93, 94, 95],
        vocab_size=100,
        hidden_size=64,
    )
    return hf.Ovis2ForConditionalGeneration(config), {**words(20, first=9), **pixels(48)}


@_architecture("Idefics 3", SMALL, "logits", proof=_oracle("prompt_rows"))
def _idefics3() -> Built:
    config = hf.Idefics3Config(vision_config=_TOWER, text_config=_LLAMA, image_token_id=99, scale_factor=2)
    return hf.Idefics3ForConditionalGeneration(config), {
        **words(20, first=9),
        "pixel_values": torch.ones(1, 1, 3, 48, 48),
    }


@_architecture("SmolVLM", SMALL, "logits", proof=_oracle("prompt_rows"))
def _smolvlm() -> Built:
    config = hf.SmolVLMConfig(vision_config=_TOWER, text_config=_LLAMA, image_token_id=99, scale_factor=2)
    return hf.SmolVLMForConditionalGeneration(config), {
        **words(20, first=9),
        "pixel_values": torch.zeros(1, 1, 3, 48, 48),
    }


@_architecture("Qwen2-VL", SMALL, "logits", proof=_oracle("prompt_rows"))
def _qwen2_vl() -> Built:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    config = hf.Qwen2VLConfig(
        text_config={**_LANGUAGE, "rope_parameters": rope},
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        image_token_id=99,
        video_token_id=98,
        vision_start_token_id=97,
    )
    asked = words(20, first=9)
    types = {"mm_token_type_ids": (asked["input_ids"] == 99).long()}
    image = {"pixel_values": torch.zeros(36, 384), "image_grid_thw": torch.tensor([[1, 6, 6]])}
    return hf.Qwen2VLForConditionalGeneration(config), {**asked, **types, **image}


@_architecture("Kosmos-2", SMALL, "logits")
def _kosmos2() -> Built:
    text = {"vocab_size": 100, "embed_dim": 64, "layers": 4, "ffn_dim": 128, "attention_heads": 4}
    config = hf.Kosmos2Config(text_config=text, vision_config=_TOWER, latent_query_num=6)
    asked = words(20)
    places = torch.zeros(1, 20, dtype=torch.int64)
    places[:, 1:7] = 1
    return hf.Kosmos2ForConditionalGeneration(config), {**asked, **pixels(48), "image_embeds_position_mask": places}


@_architecture("Florence-2", SMALL, "logits", proof=_oracle("prompt_rows"))
def _florence2() -> Built:
    vision = {"embed_dim": [8, 16, 32], "depths": [1, 1, 1], "num_heads": [2, 2, 2], "num_groups": [2, 2, 2]}
    patches = {"patch_size": [7, 3, 3], "patch_stride": [4, 2, 2], "patch_padding": [3, 1, 1], "window_size": 4}
    text = {"model_type": "bart", "vocab_size": 100, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = hf.Florence2Config(
        vision_config={**vision, **patches, "patch_prenorm": [False, True, True], "projection_dim": 32},
        text_config={**text, **heads, "decoder_start_token_id": 2},
        image_token_id=99,
    )
    answer = {"decoder_input_ids": torch.full((1, 6), 7)}
    return hf.Florence2ForConditionalGeneration(config), {**words(27, first=17), **pixels(64), **answer}


@_architecture("Fuyu", SMALL, "logits", proof=_oracle("fastv_families"))
def _fuyu() -> Built:
    text = {**_LANGUAGE, "model_type": "persimmon"}
    config = hf.FuyuConfig(**_LANGUAGE, image_size=48, patch_size=8, image_token_id=99, text_config=text)
    return hf.FuyuForCausalLM(config), {**words(46, first=36), "image_patches": torch.zeros(1, 36, 192)}


# --- image features that a language model attends to: small ---------------------------------------------------------


@_architecture("Idefics", SMALL, "logits")
def _idefics() -> Built:
    language = {k: v for k, v in _LANGUAGE.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    config = hf.IdeficsConfig(
        **{**language, "num_hidden_layers": 6},
        additional_vocab_size=0,
        cross_layer_interval=1,
        qk_layer_norms=False,
        use_resampler=False,
        vision_config={**_TOWER, "embed_dim": 64},
    )
    image = {"pixel_values": torch.zeros(1, 1, 3, 48, 48), "image_attention_mask": torch.ones(1, 20, 1).long()}
    return hf.IdeficsForVisionText2Text(config), {**words(20), **image}


@_architecture("Llama 3.2 Vision (Mllama)", SMALL, "logits", proof=_oracle("cross_attention"))
def _mllama() -> Built:
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_global_layers": 1}
    tiles = {"image_size": 32, "patch_size": 8, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    read = {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192, "attention_heads": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**_LANGUAGE, "num_hidden_layers": 5, "cross_attention_layers": [1, 3], "rope_parameters": rope}
    config = hf.MllamaConfig(
        vision_config={**tower, **tiles, **read}, text_config={**text, "pad_token_id": 0}, image_token_index=98
    )
    image = {
        "pixel_values": torch.zeros(1, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.full((1, 1), 2),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.int64),
        "cross_attention_mask": torch.ones(1, 20, 1, 2, dtype=torch.int64),
    }
    return hf.MllamaForConditionalGeneration(config), {**words(20), **image}


# --- detection and documents: small ---------------------------------------------------------------------------------


def _grounding(model: Any, config_class: Any) -> Built:
    backbone = hf.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=64, out_indices=[1, 2]
    )
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = config_class(
        **sizes,
        backbone_config=backbone,
        text_config={"model_type": "bert", "vocab_size": 1100, "hidden_size": 32, "num_attention_heads": 4},
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        num_queries=5,
        num_feature_levels=3,
        max_text_len=16,
        disable_custom_kernels=True,
    )
    return model(config), {**words(10), **pixels(64), "pixel_mask": torch.ones(1, 64, 64, dtype=torch.int64)}


@_architecture("Grounding DINO", SMALL, "logits", "pred_boxes")
def _grounding_dino() -> Built:
    return _grounding(hf.GroundingDinoForObjectDetection, hf.GroundingDinoConfig)


@_architecture("MM Grounding DINO", SMALL, "logits", "pred_boxes")
def _mm_grounding_dino() -> Built:
    return _grounding(hf.MMGroundingDinoForObjectDetection, hf.MMGroundingDinoConfig)


@_architecture("OmDet-Turbo", SMALL, "decoder_class_logits")
def _omdet() -> Built:
    classes, task = words(5, 2), words(8)
    text = {f"classes_{k}": v for k, v in classes.items()} | {f"tasks_{k}": v for k, v in task.items()}
    backbone = hf.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[2] * 4, window_size=4, image_size=64, out_indices=[2, 3, 4]
    )
    widths = {f"{part}_hidden_dim": 32 for part in ("encoder", "decoder", "task_encoder")}
    config = hf.OmDetTurboConfig(
        **widths,
        text_config={"model_type": "clip_text_model", "hidden_size": 64, "num_attention_heads": 4},
        backbone_config=backbone,
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=64,
        text_projection_out_dim=64,
        class_embed_dim=64,
        vision_features_channels=[32] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_projection_indices=[2],
        num_queries=5,
    )
    return hf.OmDetTurboForObjectDetection(config), {**pixels(64), **text, "classes_structure": torch.tensor([2])}


@_architecture("UDOP", SMALL, "logits")
def _udop() -> Built:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
    config = hf.UdopConfig(vocab_size=100, image_size=32, decoder_start_token_id=0, **sizes)
    boxes, answer = {"bbox": torch.zeros(1, 20, 4)}, {"decoder_input_ids": torch.full((1, 6), 7)}
    return hf.UdopForConditionalGeneration(config), {**words(20), **boxes, **pixels(32), **answer}


@_architecture("LayoutLMv2", "base, 224 px, 512 words", "logits")
def _layoutlmv2() -> Built:
    boxes = {"bbox": torch.zeros(1, 512, 4, dtype=torch.int64)}
    return hf.LayoutLMv2ForSequenceClassification(hf.LayoutLMv2Config()), {
        **words(512),
        **boxes,
        "image": torch.zeros(1, 3, 224, 224),
    }


# --- more families with an image in the prompt, as the tests build them -----------------------------------------------

_PROMPTS = {
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen2.5-VL, video": "qwen2_5_vl_video",
    "Qwen3-VL": "qwen3_vl",
    "Qwen3-VL, mixture of experts": "qwen3_vl_moe",
    "Qwen3.5-VL": "qwen3_5",
    "GLM-4V": "glm4v",
    "GLM-4.6V": "glm46v",
    "PaddleOCR-VL": "paddleocr_vl",
    "Kimi K2.5": "kimi_k25",
    "MiniCPM-V 4.6": "minicpmv4_6",
    "LFM2-VL": "lfm2_vl",
    "Gemma 4": "gemma4",
    "Llama 4": "llama4",
    "Idefics 2": "idefics2",
    "Cohere 2 Vision": "cohere2_vision",
    "Mistral 3": "mistral3",
    "LLaVA-NeXT-Video": "llava_next_video",
    "Video-LLaVA": "video_llava",
    "ColPali": "colpali",
    "ColQwen2": "colqwen2",
}
_BY_LAYERS = {"FastVLM": "fast_vlm", "GOT-OCR 2": "got_ocr2", "Emu 3": "emu3"}


def _of_tests(family: str) -> Built:
    from tests.support.prompt_families import FAMILIES

    model, make = FAMILIES[family]()
    return model, make(0)


for _proof, _families in (("prompt_rows", _PROMPTS), ("fastv_families", _BY_LAYERS)):
    for _name, _family in _families.items():
        _output = "embeddings" if _name.startswith("Col") else "logits"
        _architecture(_name, SMALL, _output, proof=_oracle(_proof))(partial(_of_tests, _family))
