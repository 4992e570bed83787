"""Prompt: replace the scatter of image features by an explicit `cat`, and mark the image tokens."""

from __future__ import annotations

from ..analysis.prompts import lower_masked_scatter
from ..analysis.read_images import mark_read_images
from .manager import Pass, State


class MarkPrompt(Pass):
    """Gives the prompts of a language model, for methods that reduce in one; others find the graph as captured."""

    name = "prompt"
    optional = True

    def run(self, state: State) -> int:
        """See `Pass`; counts blocks of image tokens."""
        if state.method.marks is None:
            return 0
        acts_on, votes, early = state.method.marks
        prompt = lower_masked_scatter(state.captured, state.inputs, acts_on, votes=votes, early=early)
        if prompt is None:
            prompt = mark_read_images(state.captured, acts_on, votes=votes)
        if prompt is None:
            return 0
        state.add(prompt)
        state.captured = prompt.module
        return len(prompt.marks)
