"""What methods share that keep a number of tokens of a whole film."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import PlanError
from .base import ActsOn, Method, TokenOutputs
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream


class Film(Method):
    """Keeps `keep` tokens of each film in a prompt, where its rows enter it.

    Args:
        keep: tokens to keep of all frames together.
        positions: of the tokens that are left: `compact` (renumbered) or `original` (where they stood in the whole
            prompt).
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    needs_prompt = True
    wants = "a film, of two frames and more, in a prompt"
    acts_on: ClassVar[ActsOn] = "rows"
    before_prompt = True

    outputs: TokenOutputs = "reduced"
    keep: Annotated[int, Field(ge=1, strict=True, description="the tokens to keep of a film, such as 512")]
    positions: Literal["compact", "original"] = "original"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: a third of the film, and at least a frame."""
        if outline.frames > 1:
            yield from cls.in_either_order(
                keep=ask.count("keep", outline.crops, outline.rows - 1, max(outline.crops, outline.rows // 3))
            )

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        return {**super().canonical(), "keep": self.keep, "positions": self.positions}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the rows that enter the prompt."""
        return graph.rows()

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        lengths = [len(frame) for frame in stream.crops]
        if len(lengths) < 2 or len(set(lengths)) > 1:
            raise PlanError(
                f"`method: {self.method}` compares the frames of a film, and {stream.name} has "
                f"{'no frames' if len(lengths) < 2 else f'parts of {sorted(set(lengths))} tokens'}. Compile it for a "
                "prompt with a film, or choose another method."
            )
        if not self.least(stream) <= self.keep <= sum(lengths):
            raise PlanError(
                f"`keep: {self.keep}` does not fit a film of {len(lengths)} frames of {lengths[0]} tokens: choose "
                f"{self.least(stream)} to {sum(lengths)}."
            )
        return self.chooser(stream)

    def least(self, stream: Stream) -> int:
        """The tokens that are kept at least."""
        return 1

    def chooser(self, stream: Stream) -> Reducer:
        """The reducer of one film, whose `keep` is checked."""
        raise NotImplementedError

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: positions along the prompt."""
        from ..rewrite.renumber_positions import renumbered_positions

        return renumbered_positions(graph, compact=self.positions == "compact")
