"""METER's encoder: RoBERTa, CLIP, and pairs of co-attention layers.

The text encoder and the parts of a co-attention layer are transformers' own RoBERTa modules, whose parameters
have the released names. Attention is in its eager form (matmul, softmax, matmul) everywhere, so that the
probabilities a reducer reads are values of the captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, RobertaConfig, RobertaModel, initialization
from transformers.models.roberta.modeling_roberta import (
    RobertaAttention,
    RobertaIntermediate,
    RobertaOutput,
    RobertaPooler,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from ...errors import UsageError
from .configuration import MeterConfig
from .vision import VisionAttention, VisionTransformer

Forward = TypeVar("Forward", bound=Callable[..., ModelOutput])

or_tuple: Callable[[Forward], Forward] = can_return_tuple
"""transformers' decorator for `return_dict=False`, with the type it lacks."""


@dataclass
class MeterModelOutput(ModelOutput):
    """What `MeterModel` returns.

    Attributes:
        text_hidden_state: `[B, text, hidden]`.
        image_hidden_state: `[B, 1 + patches, hidden]`, the class token first.
        pooler_output: `[B, 2 * hidden]`, the pooled first tokens of text and image, side by side.
    """

    text_hidden_state: Tensor | None = None
    image_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None


class CoAttentionLayer(nn.Module):
    """One side of a pair: post-norm self-attention, cross-attention to the other modality, feed-forward."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.attention = RobertaAttention(config)
        self.crossattention = RobertaAttention(config, is_cross_attention=True)
        self.intermediate = RobertaIntermediate(config)
        self.output = RobertaOutput(config)

    def forward(self, own: Tensor, own_mask: Tensor | None, other: Tensor, other_mask: Tensor | None) -> Tensor:
        """`own [B, n, hidden]` after attending to itself and to `other [B, m, hidden]`.

        The masks are additive, `[B, 1, 1, n]` and `[B, 1, 1, m]`.
        """
        states, _ = self.attention(own, own_mask)
        states, _ = self.crossattention(states, None, other, other_mask)
        result: Tensor = self.output(self.intermediate(states), states)
        return result


class MeterPreTrainedModel(PreTrainedModel):
    """What all METER models share: configuration, names of the checkpoint, new weights."""

    config_class = MeterConfig
    base_model_prefix = "meter"
    # Buffers that older transformers saved, and a pooler of the text encoder that METER does not read.
    _keys_to_ignore_on_load_unexpected: set[str] | list[str] | None = [  # noqa: RUF012  (transformers' declaration)
        r"text_transformer\.embeddings\.(position_ids|token_type_ids)$",
        r"text_transformer\.pooler\.",
    ]

    def __init__(self, config: MeterConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # CLIP's last block, where a checkpoint still has it.
        last = rf"vit_model\.transformer\.resblocks\.{config.vit_layers - 1}\."
        self._keys_to_ignore_on_load_unexpected = [*(self._keys_to_ignore_on_load_unexpected or []), last]

    def post_init(self) -> None:
        """What every constructor ends with: new weights, and what transformers collects from the parts."""
        super().post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, VisionTransformer):
            scale = module.class_embedding.shape[0] ** -0.5
            initialization.normal_(module.class_embedding, std=scale)
            initialization.normal_(module.positional_embedding, std=scale)
        elif isinstance(module, VisionAttention):
            initialization.normal_(module.in_proj_weight, std=self.config.initializer_range)
            initialization.zeros_(module.in_proj_bias)


class MeterModel(MeterPreTrainedModel):
    """METER without a head."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        text = _roberta_config(config, config.text_layers, config.layer_norm_eps_text)
        pair = _roberta_config(config, config.num_top_layer, config.layer_norm_eps_cross)
        self.text_transformer = RobertaModel(text, add_pooling_layer=False)
        self.vit_model = VisionTransformer(config)
        self.cross_modal_text_transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.cross_modal_image_transform = nn.Linear(config.vit_width, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.hidden_size)
        self.cross_modal_text_layers = nn.ModuleList(CoAttentionLayer(pair) for _ in range(config.num_top_layer))
        self.cross_modal_image_layers = nn.ModuleList(CoAttentionLayer(pair) for _ in range(config.num_top_layer))
        self.cross_modal_text_pooler = RobertaPooler(pair)
        self.cross_modal_image_pooler = RobertaPooler(pair)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """RoBERTa's word embeddings."""
        embeddings: nn.Module = self.text_transformer.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace RoBERTa's word embeddings."""
        self.text_transformer.set_input_embeddings(value)

    @or_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor,
        image_token_type_idx: int = 1,
    ) -> MeterModelOutput:
        """Text and image states and their pooled first tokens.

        Args:
            input_ids: int64 `[B, text]`.
            attention_mask: `[B, text]`, 1 for tokens and 0 for padding; ones unless given.
            pixel_values: `[B, C, H, W]` of the config's `image_size`.
            image_token_type_idx: which image of a sample this is, from 1.

        Raises:
            UsageError: a text longer than the position table, or images of another size.
        """
        mask = self._text_mask(input_ids, attention_mask)
        text, image = self._embed(input_ids, mask, pixel_values, image_token_type_idx)
        # Images are never padded. The published code passes a mask of ones to its masked softmax here, which
        # only adds that softmax's epsilon; an ordinary softmax needs no mask.
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            updated = text_layer(text, mask, image, None)
            seen = updated if self.config.image_attends_to == "updated_text" else text
            image = image_layer(image, None, seen, mask)
            text = updated
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)
        return MeterModelOutput(text_hidden_state=text, image_hidden_state=image, pooler_output=pooled)

    def _text_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The additive mask `[B, 1, 1, text]`: 0 for tokens and the lowest number for padding."""
        length, limit = input_ids.shape[1], self.config.max_text_length
        if length > limit:
            raise UsageError(
                f"The text has {length} tokens, but METER's position table (config.max_position_embeddings "
                f"{self.config.max_position_embeddings}) has room for {limit}. Truncate the text."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        dtype = self.token_type_embeddings.weight.dtype
        padding = 1.0 - attention_mask.unsqueeze(1).unsqueeze(1).to(dtype)
        return padding * torch.finfo(dtype).min

    def _embed(
        self, input_ids: Tensor, mask: Tensor, pixel_values: Tensor, image_token_type_idx: int
    ) -> tuple[Tensor, Tensor]:
        """The two encoders' outputs, projected and marked with their token types."""
        # Without token types RoBERTa gathers zeros out of a buffer, by the positions of the tokens.
        zeros = torch.zeros_like(input_ids)
        encoded = self.text_transformer(input_ids, attention_mask=mask, token_type_ids=zeros).last_hidden_state
        types = self.token_type_embeddings.weight
        text = self.cross_modal_text_transform(encoded) + types[0]
        image = self.cross_modal_image_transform(self.vit_model(pixel_values)) + types[image_token_type_idx]
        return text, image


def _roberta_config(config: MeterConfig, layers: int, layer_norm_eps: float) -> RobertaConfig:
    """The sizes of a METER as RoBERTa's modules take them."""
    return RobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.hidden_size * config.mlp_ratio,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=1,
        layer_norm_eps=layer_norm_eps,
        hidden_dropout_prob=config.drop_rate,
        attention_probs_dropout_prob=config.drop_rate,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        attn_implementation="eager",  # type: ignore[call-arg]  # taken by every config
    )
