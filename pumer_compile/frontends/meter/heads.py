"""METER with the heads that were released: VQA, NLVR2, SNLI-VE, retrieval."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from ...errors import UsageError
from .configuration import MeterConfig
from .modeling import MeterModel, MeterPreTrainedModel, or_tuple


def _classifier(width: int, hidden: int, labels: int) -> nn.Sequential:
    """The head of every classifier: one hidden layer, normed."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, labels))


class MeterForQuestionAnswering(MeterPreTrainedModel):
    """METER for VQA: one logit for each answer."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        width = 2 * config.hidden_size
        self.meter = MeterModel(config)
        self.vqa_classifier = _classifier(width, width, config.vqa_label_size)
        self.post_init()

    @or_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits `[B, vqa_label_size]`; arguments and errors as in `MeterModel`.

        `labels`, floating `[B, vqa_label_size]`, are the scores of the answers; the loss is their binary
        cross-entropy.
        """
        outputs = self.meter(input_ids, attention_mask, pixel_values=pixel_values, return_dict=True)
        logits = self.vqa_classifier(outputs.pooler_output)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForVisualReasoning(MeterPreTrainedModel):
    """METER for NLVR2: whether a text is true of two images."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        if config.num_images != 2:
            raise UsageError(
                f"MeterForVisualReasoning compares two images, but its config has num_images {config.num_images} "
                f"and token_types {config.token_types}. Set num_images to 2 and token_types to 3."
            )
        self.meter = MeterModel(config)
        self.nlvr2_classifier = _classifier(4 * config.hidden_size, 2 * config.hidden_size, 2)
        self.post_init()

    @or_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits `[B, 2]`, false and true, for `pixel_values [B, 2, C, H, W]`; the rest as in `MeterModel`.

        As in the published code, the whole encoder runs once for each image, text included. `labels` are int64
        `[B]`; the loss is cross-entropy.

        Raises:
            UsageError: not two images in a sample, and as in `MeterModel`.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise UsageError(
                "MeterForVisualReasoning takes pixel_values [B, 2, C, H, W], two images in a sample; found "
                f"{list(pixel_values.shape)}. Stack the two images of each sample in dimension 1."
            )
        pooled = [
            self.meter(
                input_ids,
                attention_mask,
                pixel_values=pixel_values[:, index],
                image_token_type_idx=index + 1,
                return_dict=True,
            ).pooler_output
            for index in range(2)
        ]
        logits = self.nlvr2_classifier(torch.cat(pooled, dim=-1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForVisualEntailment(MeterPreTrainedModel):
    """METER for SNLI-VE: whether an image entails a text, contradicts it or neither."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        width = 2 * config.hidden_size
        self.meter = MeterModel(config)
        self.ve_classifier = _classifier(width, width, 3)
        self.post_init()

    @or_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits `[B, 3]`; arguments and errors as in `MeterModel`.

        `labels` are int64 `[B]`; the loss is cross-entropy.
        """
        outputs = self.meter(input_ids, attention_mask, pixel_values=pixel_values, return_dict=True)
        logits = self.ve_classifier(outputs.pooler_output)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """METER for retrieval: how well a text fits an image.

    `itm_score` (does the text belong to the image?) is part of every released checkpoint. Only training reads
    it, beside a ranking loss over several texts of one image; neither is a loss of single samples, so the
    forward takes no labels.
    """

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.itm_score = nn.ModuleDict({"fc": nn.Linear(2 * config.hidden_size, 2)})
        self.rank_output = nn.Linear(2 * config.hidden_size, 1)
        self.post_init()

    @or_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, pixel_values: Tensor
    ) -> SequenceClassifierOutput:
        """Logits `[B, 1]`, the score of each text with its image; arguments and errors as in `MeterModel`."""
        outputs = self.meter(input_ids, attention_mask, pixel_values=pixel_values, return_dict=True)
        return SequenceClassifierOutput(logits=self.rank_output(outputs.pooler_output))
