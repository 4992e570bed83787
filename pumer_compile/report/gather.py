"""Run a reduced program on samples, and gather what a report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from transformers.exporters.utils import get_leaf_tensors

from ..analysis.outputs import artifact_outputs
from ..capture.capture import batch_inputs
from ..reduce import Reduced
from ..reducers import forced_decisions, reducers_of
from ..reducers.base import Decisions, Noted, noted_reductions
from .data import Picture, Place, Sample
from .pictures import Canvas, canvases_of, check_pictures, colours_of, placed
from .pixels import owners_of
from .steps import Track, execution_order, step_of, tracks
from .words import Answers, text_of, tokenizer_of, words_of

Outputs = dict[str, Tensor]
Moved = tuple[Track, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """A batch through the reduced and the unreduced module in eager PyTorch.

    Attributes:
        inputs: of the batch.
        noted: what the reducers did.
        outputs: by side, `unreduced` and `reduced`, by name.
    """

    inputs: Mapping[str, Tensor]
    noted: Mapping[str, Noted]
    outputs: Mapping[str, Outputs]


def run(reduced: Reduced, inputs: Mapping[str, Tensor], chosen: Mapping[str, Decisions] | None = None) -> Run:
    """Run a batch.

    Args:
        reduced: in float32.
        inputs: the batch.
        chosen: decisions of an artifact, by reducer, which eager PyTorch is made to follow; None: its own.
    """
    module, whole = reduced.module, reduced.program.module
    with torch.no_grad(), forced_decisions(module, dict(chosen or {})), noted_reductions(module) as noted:
        after = _named(module, inputs)
    with torch.no_grad():
        before = _named(whole, inputs)
    return Run(inputs, noted, {"unreduced": before, "reduced": after})


def _named(module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> Outputs:
    names = artifact_outputs(module, dict(inputs))
    leaves = get_leaf_tensors(module(**inputs)).values()
    return dict(
        zip(names, (leaf.detach().float() if leaf.is_floating_point() else leaf for leaf in leaves), strict=True)
    )


class Gather:
    """Samples of one reduced program.

    Args:
        reduced: in float32.
        processor: of the model: an object, or the folder of the model; None.
    """

    def __init__(self, reduced: Reduced, processor: object = None) -> None:
        self.reduced = reduced
        self.colours = colours_of(processor)
        self.tokenizer = tokenizer_of(processor)
        self.config = getattr(reduced.program.model, "config", None)
        self.answers = Answers(self.config, self.tokenizer)
        self.order = execution_order(reduced.module)
        self.notes: list[str] = []

    def samples(self, given: Run, shown: int, more: Mapping[str, Outputs] | None = None) -> list[Sample]:
        """The first samples of a batch.

        Args:
            given: the batch.
            shown: how many at most.
            more: outputs of further sides (an artifact).
        """
        check_pictures(given.inputs)
        batch = self.batch(given.inputs)
        moved = tracks(given.noted, self.order)
        canvases = canvases_of(given.inputs, self.colours, self._merge())
        firsts = list(dict.fromkeys(track.first for track, *_ in moved.values()))
        owners = owners_of(self.reduced.module, given.inputs, firsts)
        pictures: list[list[Picture]] = [[] for _ in range(batch)]
        places = {
            name: placed(canvases, owners.get(name, {}), pictures, given.noted[name].reduction.assigned.shape[2])
            for name in firsts
        }
        self._note(canvases, owners)
        sides = {**given.outputs, **(more or {})}
        return [
            self._sample(given, row, batch, moved, {name: places[name][row] for name in firsts}, pictures[row], sides)
            for row in range(min(batch, shown))
        ]

    def _sample(
        self,
        given: Run,
        row: int,
        batch: int,
        moved: Mapping[str, Moved],
        places: Mapping[str, Sequence[Place | None]],
        pictures: Sequence[Picture],
        sides: Mapping[str, Outputs],
    ) -> Sample:
        ids = given.inputs.get("input_ids")
        mask = given.inputs.get("attention_mask")
        own = [] if ids is None else ids[row].tolist()
        seen = None if mask is None or ids is None or mask.shape != ids.shape else mask[row].tolist()
        words = words_of(own, self.tokenizer)
        reducers, steps, plan = reducers_of(self.reduced.module), [], self.reduced.plan
        for name in self.order:
            first = moved[name][0].first
            stands = places[first]
            is_text = len(stands) == len(words) and not any(stands)
            own_words = words if is_text else ()
            steps.append(step_of(name, reducers[name], given.noted[name], moved[name], row, stands, own_words, plan))
        last = -1 if not seen or 1 not in seen else max(i for i, one in enumerate(seen) if one) - len(seen)
        text = text_of(own, seen, self._placeholders(), self.tokenizer)
        return Sample(row, tuple(pictures), text, tuple(steps), self.answers.of(sides, row, batch, last))

    def batch(self, inputs: Mapping[str, Tensor]) -> int:
        """How many samples there are."""
        return next((int(inputs[name].shape[0]) for name in batch_inputs(inputs)), 1)

    def _merge(self) -> int:
        """Patches on a side of a row of a prompt, in the layout of Qwen's processors."""
        for config in _configs(self.config):
            found = getattr(config, "spatial_merge_size", None)
            if isinstance(found, int):
                return found
        return 1

    def _placeholders(self) -> set[int]:
        return {place.placeholder for place in self.reduced.plan.prompts}

    def _note(self, canvases: Mapping[str, Sequence[Canvas]], owners: Mapping[str, Any]) -> None:
        """What a reader should know of the pictures."""
        self.notes.append(str(self.colours))
        if not canvases:
            self.notes.append(
                "No picture is drawn: none of the inputs is laid out as [..., channels, height, width] or as patches "
                "with a grid (image_grid_thw). Tokens are shown by their numbers."
            )
        elif not owners:
            self.notes.append(
                "Tokens are not shown on the pictures: no pixel can be followed to a single one of them (patches that "
                "overlap, tokens that are learned queries)."
            )


def _configs(config: Any) -> Iterator[Any]:
    """A configuration, and those of its parts."""
    if config is None:
        return
    yield config
    for name in ("vision_config", "visual_config"):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            yield from _configs(part)


Progress = Callable[[str], None]
