"""The sizes of a METER, by the names that released config files use."""

# No `from __future__ import annotations`: transformers checks values against the types themselves.

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...errors import UsageError


@strict
class MeterConfig(PreTrainedConfig):
    """Configuration of a METER with a CLIP image encoder and a RoBERTa text encoder.

    The defaults are METER-CLIP16-RoBERTa at full size, for images of 384 pixels. What else a released
    config.json says (its tokenizer, training and reduction settings) is kept as it is and not used.

    Attributes:
        vocab_size, pad_token_id, bos_token_id, eos_token_id: RoBERTa's vocabulary.
        max_position_embeddings: rows of the text's position table. RoBERTa counts positions from
            `pad_token_id + 1`, so a text has at most `max_text_length` tokens.
        text_layers: layers of the text encoder.
        layer_norm_eps_text: of the text encoder.
        image_size: height and width of the images; the positions of a checkpoint made for another size are
            resized when it is loaded.
        num_channels, vit_patch_size, vit_width, vit_heads: CLIP's image encoder.
        vit_layers: blocks of CLIP's image encoder, the last one of which METER leaves out.
        num_top_layer: co-attention pairs, each a text layer and an image layer.
        hidden_size, num_heads: of the text encoder and the co-attention layers.
        mlp_ratio: width of their feed-forward layers, as a multiple of `hidden_size`.
        layer_norm_eps_cross: of the co-attention layers.
        image_attends_to: the text that the image layer of a pair attends to: "updated_text", the output of the
            text layer of the same pair, as in PuMer's release; or "previous_text", that layer's input, as in
            the original METER.
        token_types: rows of the table that tells the modalities apart: one for text, one for each image.
        num_images: images in a sample of the NLVR2 head; one fewer than `token_types` unless given.
        vqa_label_size: answers of the VQA head.
        drop_rate: dropout while training.
        initializer_range: standard deviation of new weights.

    Raises UsageError for sizes that do not fit together.
    """

    model_type = "meter"
    attribute_map: ClassVar[dict[str, str]] = {
        "patch_size": "vit_patch_size",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_top_layer",
    }

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    max_position_embeddings: int = 514
    text_layers: int = 12
    layer_norm_eps_text: float = 1e-5
    image_size: int = 384
    num_channels: int = 3
    vit_patch_size: int = 16
    vit_layers: int = 12
    vit_width: int = 768
    vit_heads: int = 12
    num_top_layer: int = 6
    hidden_size: int = 768
    num_heads: int = 12
    mlp_ratio: int = 4
    layer_norm_eps_cross: float = 1e-12
    image_attends_to: Literal["updated_text", "previous_text"] = "updated_text"
    token_types: int = 2
    num_images: int | None = None
    vqa_label_size: int = 3129
    drop_rate: float | int = 0.1
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.num_images is None:
            self.num_images = max(self.token_types - 1, 1)
        for size, parts in (
            ("hidden_size", "num_heads"),
            ("vit_width", "vit_heads"),
            ("image_size", "vit_patch_size"),
        ):
            if getattr(self, size) % getattr(self, parts):
                raise UsageError(
                    f"The config of METER has {size} {getattr(self, size)}, which is no multiple of its {parts} "
                    f"{getattr(self, parts)}. Change one of them."
                )
        if self.token_types < self.num_images + 1:
            raise UsageError(
                f"The config of METER has token_types {self.token_types}, but a text and {self.num_images} "
                f"image(s) need {self.num_images + 1}. Set token_types to that, or num_images lower."
            )

    @property
    def max_text_length(self) -> int:
        """Most tokens that a text may have."""
        return self.max_position_embeddings - (self.pad_token_id or 0) - 1

    @property
    def image_tokens(self) -> int:
        """Image tokens, the class token included."""
        return (self.image_size // self.vit_patch_size) ** 2 + 1
