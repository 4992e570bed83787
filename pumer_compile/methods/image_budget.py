"""What methods share that keep a number of tokens of each image where they enter a prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import PlanError
from .base import ActsOn, Method, TokenOutputs
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream

log = logging.getLogger("pumer_compile")


class ImageBudget(Method):
    """Keeps `budget` tokens of each image of a prompt.

    Args:
        budget: tokens to keep of each image (of each crop, tile or frame, where it has several).
        positions: of the tokens that are left: `compact` (renumbered) or `original` (where they stood in the whole
            prompt).
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    needs_prompt = True
    wants = "an image of two tokens and more in a prompt"
    acts_on: ClassVar[ActsOn] = "rows"
    before_prompt = True

    outputs: TokenOutputs = "reduced"
    budget: Annotated[int, Field(ge=1, strict=True, description="the image tokens to keep, such as 64")]
    positions: Literal["compact", "original"] = "compact"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: a third of the tokens, with which papers lose next to nothing."""
        if outline.crops > 1:
            yield from cls.in_either_order(budget=ask.count("budget", 1, outline.crops - 1, outline.crops // 3))

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        own = {key: getattr(self, key) for key in type(self).model_fields if key not in Method.model_fields}
        return {**super().canonical(), **own}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the rows that enter the prompt; or those that a tower's attention votes for."""
        from ..rewrite.sites import Site

        if not self.reads_tower:
            return graph.rows()
        return [Site(attention, instead=marks) for attention, marks in graph.towers()]

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        if self.budget > stream.row:
            raise PlanError(
                f"A budget of {self.budget} is more than the {stream.row} tokens that {self.described_source}. Choose "
                "a smaller one, or `none`."
            )
        if self.budget >= max(map(len, stream.crops)):
            log.warning("A budget of %d keeps every token of an image: nothing of it is pruned.", self.budget)
        return self.chooser(stream)

    @property
    def described_source(self) -> str:
        """For messages: what gives an image its tokens."""
        return "the vision tower gives" if self.acts_on == "tower" else "an image has in the prompt"

    def chooser(self, stream: Stream) -> Reducer:
        """The reducer of one stream, whose budget is checked.

        Raises:
            PlanError: it cannot be met.
        """
        raise NotImplementedError

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: positions along the prompt."""
        from ..rewrite.renumber_positions import renumbered_positions

        return renumbered_positions(graph, compact=self.positions == "compact")
