"""The models that learn the scenes, as one training sees them."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import llava, vilt
from .data import build_tokenizer
from .hints import CELL_LAYER, PHRASE_LAYER

Kind = Literal["vilt", "llava"]


class Seen(NamedTuple):
    """What a model makes of pictures and questions.

    Attributes:
        cells: of the picture, float [batch, 196, width].
        words: of the questions, float [batch, questions, TEXT_LENGTH, width].
        logits: of the answers, float [batch, questions, ...].
    """

    cells: Tensor
    words: Tensor
    logits: Tensor


class Learner(Protocol):
    """A model with what its training asks of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    width: int

    def cells(self, pixels: Tensor) -> Tensor:
        """Cells of pictures without a question, float [batch, 196, width]."""

    def answered(self, pixels: Tensor, ids: Tensor, stock: bool) -> Seen:
        """Several questions about each picture, int64 [batch, questions, TEXT_LENGTH]; `stock` for one question and the
        model's own attention."""

    def targets(self, labels: Tensor) -> Tensor:
        """The right places among the logits, for labels."""


class ViltLearner:
    """A ViLT."""

    def __init__(self) -> None:
        self.tokenizer = build_tokenizer()
        self.model = vilt.build_vilt(len(self.tokenizer))
        self.width = self.model.config.hidden_size

    def cells(self, pixels: Tensor) -> Tensor:
        """See `Learner`."""
        return vilt.see(self.model, pixels, CELL_LAYER + 1)[:, 1:]

    def answered(self, pixels: Tensor, ids: Tensor, stock: bool) -> Seen:
        """See `Learner`."""
        layers = list(vilt.packed(self.model, pixels, ids, stock))
        logits = vilt.answer_logits(self.model, layers[-1][0])
        return Seen(layers[CELL_LAYER][1][:, 1:], layers[PHRASE_LAYER][0], logits)

    def targets(self, labels: Tensor) -> Tensor:
        """See `Learner`."""
        return labels


class LlavaLearner:
    """A LLaVA; its attention is always its own."""

    def __init__(self) -> None:
        self.vocabulary = llava.Vocabulary.made()
        self.tokenizer = self.vocabulary.tokenizer
        self.model = llava.build_llava(self.vocabulary)
        # Two products: twice as fast as the fused operator in bfloat16 on processors, with its backward.
        self.model.set_attn_implementation("eager")
        self.width = self.model.config.text_config.hidden_size

    def cells(self, pixels: Tensor) -> Tensor:
        """See `Learner`."""
        return llava.tower_features(self.model, pixels)

    def answered(self, pixels: Tensor, ids: Tensor, stock: bool) -> Seen:
        """See `Learner`."""
        made = llava.packed(self.model, pixels, ids)
        words = nn.functional.pad(made.words, (0, 0, 1, 0))  # [CLS] stands before the image
        places = llava.answer_places(ids)[..., None, None].expand(-1, -1, 1, made.logits.shape[-1])
        return Seen(made.features, words, made.logits.gather(2, places)[:, :, 0])

    def targets(self, labels: Tensor) -> Tensor:
        """See `Learner`."""
        return self.vocabulary.answers[labels]


def make_learner(kind: Kind, seed: int) -> Learner:
    """A new model, drawn with a seed."""
    torch.manual_seed(seed)
    return ViltLearner() if kind == "vilt" else LlavaLearner()
