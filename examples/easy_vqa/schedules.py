"""The strengths at which easy-VQA's six-layer ViLT is reduced."""

from typing import Literal

import torch
from transformers import ViltForQuestionAnswering

import pumer_compile as pumer
from examples.easy_vqa.data import Split

Strength = Literal["mild", "paper", "strong"]
Semantics = Literal["safe", "reference"]

STRENGTHS: dict[Strength, dict[str, object]] = {
    "mild": {"layers": [2, 4], "prune": 0.1, "merge": {"image": 0.2, "text": 0.1}},
    # The published ratios, at the relative depths of the published twelve-layer ViLT (layers 2, 5 and 8).
    "paper": {"layers": [1, 2, 4], "prune": 0.1, "merge": {"image": 0.3, "text": 0.2}},
    "strong": {"layers": [1, 2, 3, 4], "prune": 0.2, "merge": {"image": 0.3, "text": 0.2}},
}


def schedule_for(strength: Strength, semantics: Semantics) -> pumer.Schedule:
    """The PuMer schedule of one strength."""
    return pumer.Schedule(method="pumer", semantics=semantics, **STRENGTHS[strength])


def reduce_model(model: ViltForQuestionAnswering, split: Split, schedule: pumer.Schedule) -> pumer.Reduced:
    """Capture `model` on two samples of `split`, for any batch size, and insert the reducers."""
    program = pumer.capture(model, split.batch(torch.arange(2)), dynamic_batch=True)
    return pumer.reduce(program, schedule)
