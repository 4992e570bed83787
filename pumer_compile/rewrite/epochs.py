"""EpochTable: which reducers shortened each stream, and which of them a value of the rewriter has seen.

Each value's token axes are at an epoch for each stream: 0 before the first reducer of that stream; every reducer
makes a new one out of the one it read, so that a model which runs a text once for each image has a branch of epochs
for each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ..analysis.annotate import Annotation
from ..analysis.axes import AxisKind, Dim, Fixed, Product, Segment, Size, Tokens
from ..analysis.nodes import describe
from ..analysis.rules import shape
from ..errors import SiteError

Epochs = dict[str, int]


@dataclass(frozen=True)
class Step:
    """A stream from one epoch to the next.

    Attributes:
        parent: the epoch it was made from.
        map: node of the map `[batch, after, before]`.
        assigned: node that says which old tokens went into which new one, like `map`.
        after: tokens after.
        merged: whether any tokens were merged (and not only pruned).
        first_stays: whether token 0 is token 0 afterwards.
        in_order: whether those that are left are some of the old ones, in their order.
        place: node that says where each new token stands, like `map`; None where the map does, or nothing.
        recounts: whether positions are counted anew over the tokens that are left.
        covers: whether every old token went into a new one, as none was pruned.
    """

    parent: int
    map: fx.Node
    assigned: fx.Node
    after: int
    merged: bool
    first_stays: bool
    in_order: bool = False
    place: fx.Node | None = None
    recounts: bool = False
    covers: bool = False


@dataclass
class EpochTable:
    """The reducers so far, and where each value stands among them.

    Attributes:
        annotation: axes of the captured graph.
        newest: epochs of each captured dimension's newest value, where any is above 0.
        steps: reducers of each stream so far; step `i` made epoch `i + 1`.
    """

    annotation: Annotation
    newest: dict[Dim, Epochs] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)

    def at(self, dim: Dim) -> Epochs:
        """Epochs of the newest value of a captured dimension."""
        return self.newest.get(dim, {})

    def adopt_epochs(self, node: fx.Node, like: fx.Node) -> None:
        """A replaced node has the epochs of another, dimension by dimension."""
        for index in range(len(shape(node))):
            self.record(Dim(node, index), self.at(Dim(like, index)))

    def bump(self, dim: Dim, epochs: Epochs) -> None:
        """A reducer replaced a value: some of its streams are at new epochs."""
        self.record(dim, {**self.at(dim), **epochs})

    def add_step(self, stream: str, step: Step) -> int:
        """A reducer of a stream; gives the epoch it makes."""
        self.steps.setdefault(stream, []).append(step)
        return len(self.steps[stream])

    def lineage(self, stream: str, epoch: int, since: int = 0) -> list[Step]:
        """The reducers between two epochs of a stream, oldest first."""
        found: list[Step] = []
        while epoch > since:
            found.insert(0, self.steps[stream][epoch - 1])
            epoch = found[0].parent
        return found

    def newer(self, node: fx.Node, stream: str, a: int, b: int) -> int:
        """The later of two epochs of a stream that meet in a node.

        Raises:
            AxisError: neither was made from the other.
        """
        for old, new in ((a, b), (b, a)):
            epoch = new
            while epoch > old:
                epoch = self.steps[stream][epoch - 1].parent
            if epoch == old:
                return new
        raise SiteError(
            f"{describe(node)} joins the {stream} tokens of two passes that were reduced apart (one pass for each "
            "image, say); their tokens are no longer the same. Leave the sites before it out of the schedule."
        )

    def record(self, dim: Dim, epochs: Epochs) -> None:
        """The newest value of a captured dimension is at these epochs."""
        if any(epochs.values()):
            self.newest[dim] = dict(epochs)

    def restore(self, dim: Dim, epochs: Epochs) -> None:
        """The newest value of a captured dimension is at these epochs again, which may all be 0."""
        self.newest.pop(dim, None)
        self.record(dim, epochs)

    def streams(self, dim: Dim) -> tuple[str, ...]:
        """Streams of a captured dimension."""
        kind = self.annotation.axis(dim)
        return () if isinstance(kind, Fixed) else kind.streams

    def behind(self, dim: Dim, target: Epochs) -> bool:
        """Whether the newest value of a dimension is not at given epochs of its own streams."""
        have = self.at(dim)
        return any(have.get(s, 0) != target.get(s, 0) for s in self.streams(dim))

    def length(self, segment: Segment, epochs: Epochs) -> int:
        """Tokens of a segment."""
        epoch = epochs.get(segment.stream, 0) if segment.stream else 0
        return self.steps[segment.stream or ""][epoch - 1].after if epoch else segment.length

    def size(self, kind: AxisKind, epochs: Epochs) -> Size:
        """Length of an axis."""
        match kind:
            case Fixed(size):
                return size
            case Tokens(segments):
                return sum(self.length(s, epochs) for s in segments)
            case Product(factors):
                total: Size = 1
                for factor in factors:
                    total = total * self.size(factor, epochs)
                return total

    def expected_shape(self, node: fx.Node, output: int = 0) -> list[Size]:
        """Shape of the newest value of a captured node, as the plan has it."""
        dims = [Dim(node, i, output) for i in range(len(shape(node, output)))]
        return [self.size(self.annotation.axis(d), self.at(d)) for d in dims]

    def span(self, axis: Tokens, stream: str, epochs: Epochs) -> tuple[int, int]:
        """Where a stream starts and stops on an axis at given epochs."""
        start = 0
        for segment in axis.segments:
            length = self.length(segment, epochs)
            if segment.stream == stream:
                return start, start + length
            start += length
        raise KeyError(stream)
