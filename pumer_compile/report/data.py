"""What a report shows, apart from how it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..parity.report import ParityReport
from ..passes.manager import Record
from ..plan import Plan

Box = tuple[int, int, int, int]
"""Left, top, width, height, in pixels of a picture."""
Fate = Literal["gone", "pruned", "kept", "merged"]
"""Of a token at a site: gone before it; pruned there; kept as it is; merged with others (there or before)."""


@dataclass(frozen=True)
class Picture:
    """A picture of a sample.

    Attributes:
        name: of the input, and its number there.
        pixels: `[height, width, 3]`, uint8.
    """

    name: str
    pixels: np.ndarray[Any, Any]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[0])


@dataclass(frozen=True)
class Place:
    """Where a token stands: a box of a picture, by the picture's number in its sample."""

    picture: int
    box: Box


@dataclass(frozen=True)
class Step:
    """A reducer, on one sample. Tokens are numbered as the stream's first reducer found them.

    Attributes:
        site: such as `cross_modal.2`.
        stream: whose tokens.
        before, after: how many.
        reads: what the decision was made from, in words.
        fates: of each token.
        group: of each token, the number of the token that it is in afterwards; -1 where it is gone.
        scores: what tokens were ranked by, NaN of those that were gone; None where no one score says it.
        places: of each token on a picture; None of one that stands nowhere.
        words: of each token of a text; empty where the stream is none.
    """

    site: str
    stream: str
    before: int
    after: int
    reads: tuple[str, ...]
    fates: tuple[Fate, ...]
    group: tuple[int, ...]
    scores: tuple[float, ...] | None
    places: tuple[Place | None, ...]
    words: tuple[str, ...] = ()

    def count(self, fate: Fate) -> int:
        """How many tokens had it."""
        return self.fates.count(fate)

    @property
    def groups(self) -> dict[int, list[int]]:
        """The tokens in each token afterwards that has several, by its number."""
        found: dict[int, list[int]] = {}
        for token, number in enumerate(self.group):
            if self.fates[token] == "merged":
                found.setdefault(number, []).append(token)
        return found


@dataclass(frozen=True)
class Ranked:
    """What one side answers.

    Attributes:
        side: `unreduced`, `reduced` or `artifact`.
        best: the answers with the highest probability, best first.
        margin: by how much the logit of the first exceeds that of the second.
    """

    side: str
    best: tuple[tuple[str, float], ...]
    margin: float


@dataclass(frozen=True)
class Answer:
    """An output of a sample, of every side.

    Attributes:
        output: its name.
        ranked: where it ranks answers; empty where it does not.
        difference: of reduced from unreduced, in the Euclidean norm relative to unreduced; None where their shapes
            differ.
    """

    output: str
    ranked: tuple[Ranked, ...]
    difference: float | None

    @property
    def agrees(self) -> bool:
        """Whether all sides answer alike; true where nothing is ranked."""
        return len({side.best[0][0] for side in self.ranked}) <= 1


@dataclass(frozen=True)
class Sample:
    """A sample.

    Attributes:
        number: in the inputs.
        pictures: that its tokens are of.
        text: what was asked, in words (or ids, where no tokenizer is at hand), images as `[image]`.
        steps: in execution order.
        answers: by output.
    """

    number: int
    pictures: tuple[Picture, ...]
    text: str
    steps: tuple[Step, ...]
    answers: tuple[Answer, ...]

    @property
    def sites(self) -> dict[str, list[Step]]:
        """Steps by site."""
        found: dict[str, list[Step]] = {}
        for step in self.steps:
            found.setdefault(step.site, []).append(step)
        return found


@dataclass(frozen=True)
class Layer:
    """Multiply-adds of one layer for one sample, before and after reduction."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Tokens:
    """Tokens of a stream after an attention, with and without reduction."""

    site: str
    stream: str
    before: int
    after: int


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        title: of the page.
        subject: what was reduced, and by what, in a sentence.
        facts: about it, by name.
        plan: token counts and multiply-adds.
        samples: those that are shown.
        tokens, layers: for the bars.
        passes: what each pass did to the graph.
        parity: the proof; None where none was made.
        no_parity: why, then.
        bench: what `pumer-compile bench --json` wrote; None where nothing was measured.
        notes: what a reader should know besides.
    """

    title: str
    subject: str
    facts: Mapping[str, str]
    plan: Plan
    samples: Sequence[Sample]
    tokens: Sequence[Tokens]
    layers: Sequence[Layer]
    passes: Sequence[Record]
    parity: ParityReport | None = None
    no_parity: str = ""
    bench: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)
