"""METER (Dou et al., 2022), which transformers lacks, in the layout that PuMer's authors released.

Importing this package makes it known to transformers' auto classes. Each model is found by the name that the
`architectures` of a released config.json gives:

| class | head | logits |
| --- | --- | --- |
| `MeterForQuestionAnswering` | VQA | `[B, vqa_label_size]` |
| `MeterForVisualReasoning` | NLVR2, two images | `[B, 2]` |
| `MeterForVisualEntailment` | SNLI-VE | `[B, 3]` |
| `MeterForImageAndTextRetrieval` | ranking a text against an image | `[B, 1]` |
| `MeterModel` | none | |
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForVisualQuestionAnswering, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration import MeterConfig
from .heads import (
    MeterForImageAndTextRetrieval,
    MeterForQuestionAnswering,
    MeterForVisualEntailment,
    MeterForVisualReasoning,
)
from .modeling import MeterModel, MeterModelOutput, MeterPreTrainedModel
from .positions import position_conversion

MODELS: dict[str, type[PreTrainedModel]] = {
    model.__name__: model
    for model in (
        MeterModel,
        MeterForQuestionAnswering,
        MeterForVisualReasoning,
        MeterForVisualEntailment,
        MeterForImageAndTextRetrieval,
    )
}

AutoConfig.register(MeterConfig.model_type, MeterConfig, exist_ok=True)
AutoModel.register(MeterConfig, MeterModel, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(MeterConfig, MeterForQuestionAnswering, exist_ok=True)
register_checkpoint_conversion_mapping(MeterConfig.model_type, [position_conversion()], overwrite=True)

__all__ = [
    "MODELS",
    "MeterConfig",
    "MeterForImageAndTextRetrieval",
    "MeterForQuestionAnswering",
    "MeterForVisualEntailment",
    "MeterForVisualReasoning",
    "MeterModel",
    "MeterModelOutput",
    "MeterPreTrainedModel",
]
