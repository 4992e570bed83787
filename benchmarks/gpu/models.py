"""The models that are measured, with random weights made on the device, at full size and tiny; and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pumer_compile.capture.inputs import forward_inputs
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.schedule import Schedule

from .harness import ROOT, Settings

DEMO = ROOT / "examples" / "easy_vqa"
BEFORE, AFTER = 20, 40
Inputs = dict[str, Tensor]


def vilt_config(*, tiny: bool) -> Any:
    """ViLT-B/32 with the answers of VQAv2."""
    from transformers import ViltConfig

    if not tiny:
        return ViltConfig(num_labels=3129)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 3}
    return ViltConfig(**sizes, image_size=96, patch_size=16, vocab_size=99, num_labels=5)


def vilt(settings: Settings, dtype: torch.dtype, device: torch.device | None = None) -> nn.Module:
    """ViLT for question answering; the same weights whatever the dtype and the device."""
    from transformers import ViltForQuestionAnswering

    torch.manual_seed(0)
    model = ViltForQuestionAnswering(vilt_config(tiny=settings.tiny)).eval()
    return model.to(settings.device if device is None else device, dtype)


def vilt_schedules(settings: Settings) -> dict[str, Schedule]:
    """The paper's two for ViLT, under the semantics of the published code; the tiny model has one of fewer layers."""
    if settings.tiny:
        merge = {"image": 0.3, "text": 0.2}
        return {"tiny": Schedule.load({"layers": [0, 1], "prune": 0.1, "merge": merge, "semantics": "reference"})}
    return {name: Schedule.load(name, semantics="reference") for name in ("vilt-vqa", "vilt-ve")}


def vilt_inputs(model: nn.Module, batch: int, settings: Settings) -> Inputs:
    """Texts of 40 tokens and images, nothing padded, on the model's device."""
    length = 8 if settings.tiny else 40
    made = make_inputs(model, batch=batch, text_length=length, padding=False)
    return placed(made, next(model.parameters()))


def placed(inputs: Inputs, like: Tensor) -> Inputs:
    """Inputs on a device; what is floating in a dtype as well."""
    return {n: t.to(like.device, like.dtype if t.is_floating_point() else None) for n, t in inputs.items()}


# --- Prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptModel:
    """A generative model that reads an image in its prompt.

    Attributes:
        name: in the table.
        rows: image tokens of an image, as the language model sees them.
        build: the model, on what device and in what dtype torch makes tensors by default.
        inputs: of a batch, one image each, on the CPU.
        positions: that the schedules take.
    """

    name: str
    rows: int
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    positions: str


class LastToken(nn.Module):
    """The head on the last token alone, as `generate` has it: the logits of a whole prompt are read by nobody."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Any:
        """Logits `[batch, 1, vocabulary]` of `[batch, tokens, width]`."""
        return self.head(hidden[:, -1:])


def made_on(model: PromptModel, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, made where they will lie: no copy in float32, none on the CPU."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: Any = model.build()
    finally:
        torch.set_default_dtype(before)
    made = made.to(device=device, dtype=dtype).eval().requires_grad_(False)
    made.lm_head = LastToken(made.lm_head)
    return made


def prompts_of(model: PromptModel, made: nn.Module, batch: int) -> Inputs:
    """A batch of prompts on the model's device; what an older transformers does not take is left out."""
    accepted = forward_inputs(made)
    given = {name: tensor for name, tensor in model.inputs(batch).items() if name in accepted}
    return placed(given, next(made.parameters()))


def _ids(batch: int, rows: int, token: int, words: int) -> Inputs:
    ids = torch.randint(5, words, (batch, BEFORE + rows + AFTER), generator=torch.Generator().manual_seed(0))
    ids[:, BEFORE : BEFORE + rows] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def llava(*, tiny: bool, layers: int = 32, width: int = 4096) -> PromptModel:
    """LLaVA-1.5's shape: CLIP ViT-L/14 at 336 px, 576 image tokens; 7B with 32 layers of 4,096."""
    side, token = (6 if tiny else 24), (98 if tiny else 32000)

    def build() -> nn.Module:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        vision: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": 14 * side, "patch_size": 14}
        text: dict[str, Any] = {"model_type": "llama"}
        if tiny:
            vision |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
            text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 99}
            text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
        else:
            vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "projection_dim": 768}
            vision |= {"num_attention_heads": 16}
            text |= {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_hidden_layers": layers}
            text |= {"num_attention_heads": width // 128, "num_key_value_heads": width // 128, "vocab_size": 32064}
            text |= {"max_position_embeddings": 4096}
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
        return LlavaForConditionalGeneration(config)

    def inputs(batch: int) -> Inputs:
        return {**_ids(batch, side**2, token, 90), "pixel_values": _noise(batch, 3, 14 * side, 14 * side)}

    size = "tiny" if tiny else "7B" if (layers, width) == (32, 4096) else f"{layers} layers of {width}"
    return PromptModel(f"LLaVA-1.5 {size}", side**2, build, inputs, "compact")


def qwen2_5_vl(*, tiny: bool) -> PromptModel:
    """Qwen2.5-VL-7B's shape (from its public configuration), with one image of 36 x 36 patches: 324 image tokens."""
    side, token = (8 if tiny else 36), (98 if tiny else 151655)

    def build() -> nn.Module:
        import transformers as hf

        vision: dict[str, Any] = {"patch_size": 14}
        rope: dict[str, Any] = {"rope_type": "default"}
        text: dict[str, Any] = {}
        if tiny:
            vision |= {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
            vision |= {"window_size": 112, "fullatt_block_indexes": [1]}
            text |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
            text |= {"num_key_value_heads": 2, "vocab_size": 99}
            rope |= {"mrope_section": [2, 3, 3], "rope_theta": 1e4}
        else:
            vision |= {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
            vision |= {"out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
            text |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
            text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
            rope |= {"mrope_section": [16, 24, 24], "rope_theta": 1e6}
        named = {"image_token_id": token, "video_token_id": token - 1 if tiny else token + 1}
        text["rope_parameters"] = rope
        return hf.Qwen2_5_VLForConditionalGeneration(
            hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **named)
        )

    def inputs(batch: int) -> Inputs:
        rows = side**2 // 4
        prompt = _ids(batch, rows, token, 90)
        kinds = (prompt["input_ids"] == token).long()
        grid = torch.tensor([[1, side, side]] * batch)
        pixels = _noise(batch * side**2, 3 * 2 * 14**2)
        return {**prompt, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}

    return PromptModel(f"Qwen2.5-VL {'tiny' if tiny else '7B'}", side**2 // 4, build, inputs, "original")
