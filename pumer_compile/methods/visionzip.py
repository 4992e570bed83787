"""`method: visionzip`: dominant image tokens, and the others merged into a few (Yang et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import PlanError
from .about import About
from .base import ActsOn, Method, TokenOutputs
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream


class VisionZip(Method):
    """Keeps `dominant` tokens of each image, and merges the others into `contextual` ones: nothing is thrown away.

    Dominant are the class token of the vision tower, which goes into the prompt, and those that it attends to. The
    others join the one of a few among them whose key is most like theirs. A tower without a class token has none to
    give: then all dominant tokens are its own, by the attention they get. So are rows made of several tokens of a
    tower, by the means of these.

    Args:
        semantics: `reference`, the default, is what the published code computes: a merged token is the sum of two, and
            the merged ones stand last; in `stable` it is the mean of all that are in it and stands where its first one
            did, and a nearly equal choice changes no other.
        dominant: tokens of each image that stay; the class token is one of them, where there is one.
        contextual: tokens of each image that the others are merged into.
        positions: of the tokens that are left: `compact` (renumbered, as published) or `original` (where they stood in
            the whole prompt; a merged one where that stood which the others joined, a class token at the beginning).
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens with the most attention and the class token, and merges the others into a few",
        reads="attention of the class token, its feature, keys of the tower",
        use="high reductions; nothing of the picture is thrown away",
        paper="Yang et al., VisionZip, CVPR 2025",
        code="dvlab-research/VisionZip, Apache-2.0",
        held="published vectors",
    )

    needs_prompt = True
    wants = "an image of four tokens and more in a prompt"
    acts_on: ClassVar[ActsOn] = "tower"
    reads_tower = True
    before_prompt = True

    method: Literal["visionzip"] = "visionzip"
    semantics: Literal["reference", "stable"] = "reference"
    outputs: TokenOutputs = "reduced"
    dominant: Annotated[int, Field(ge=2, strict=True, description="the image tokens that stay, such as 54")]
    contextual: Annotated[int, Field(ge=1, strict=True, description="those that others are merged into, such as 10")]
    positions: Literal["compact", "original"] = "compact"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: in the published proportion of 54 to 10."""
        if outline.crops > 3:
            whole = ask.count("budget", 3, outline.crops - 1, outline.crops // 3)
            contextual = max(1, round(whole * 10 / 64))
            yield from cls.in_either_order(dominant=whole - contextual, contextual=contextual)

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        keys = {"dominant": self.dominant, "contextual": self.contextual, "positions": self.positions}
        return {**super().canonical(), **keys}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: where features leave the vision tower, read by its last attention before that."""
        from ..rewrite.sites import Site

        return [Site(attention, instead=marks) for attention, marks in graph.towers()]

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import VisionZipReducer

        own = self.dominant - stream.class_token
        if own + self.contextual > stream.row:
            raise PlanError(
                f"`dominant: {self.dominant}` and `contextual: {self.contextual}` are more tokens than the "
                f"{stream.row + stream.class_token} that the vision tower gives. Choose fewer, or `none`."
            )
        return VisionZipReducer(
            stream.crops,
            own,
            self.contextual,
            class_tokens=stream.class_token,
            order=self.semantics,
            pinned=stream.pinned,
        )

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: positions along the prompt."""
        from ..rewrite.renumber_positions import renumbered_positions

        return renumbered_positions(graph, compact=self.positions == "compact")
