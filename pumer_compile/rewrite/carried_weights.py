"""Carried weights: how much each token counts, by an attention mask at first, then from reducer to reducer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from ..analysis.attention import NOT_KNOWN, Attention
from ..analysis.axes import Dim, Tokens
from ..analysis.nodes import describe
from ..analysis.rules import shape
from ..errors import LocateError
from ..reducers import TokenWeights, UnitWeights
from .rewriter import Rewriter


@dataclass
class CarriedWeights:
    """The weights `[batch, tokens]` of each stream at each epoch."""

    _known: dict[tuple[str, int], fx.Node] = field(default_factory=dict)
    _ones: dict[int, UnitWeights] = field(default_factory=dict)

    def known(self, stream: str, epoch: int) -> fx.Node | None:
        """Those that a reducer or a mask gave."""
        return self._known.get((stream, epoch))

    def keep(self, stream: str, epoch: int, weights: fx.Node) -> None:
        """Those that a reducer gives."""
        self._known[stream, epoch] = weights

    def ones(self, rewriter: Rewriter, length: int, like: fx.Node) -> fx.Node:
        """Weights of 1."""
        module = self._ones.setdefault(length, UnitWeights(length))
        return rewriter.call_module(f"reducer.ones.{length}", module, like)

    def of(self, rewriter: Rewriter, stream: str, epoch: int, readers: Iterable[Attention]) -> fx.Node | None:
        """Those that the last reducer of a stream gave, or else read from the first mask over it that `readers` have;
        None without a mask.

        Raises:
            LocateError: what an attention adds to its scores may be a mask, and is not understood.
        """
        known = self.known(stream, epoch)
        if known is not None or epoch > 0:
            return known
        for reader in readers:
            found = self._from_mask(rewriter, stream, reader)
            if found is not None:
                self.keep(stream, epoch, found)
                return found
        return None

    @staticmethod
    def _from_mask(rewriter: Rewriter, stream: str, reader: Attention) -> fx.Node | None:
        if NOT_KNOWN in reader.unusual and stream in reader.key_axis.streams:
            raise LocateError(
                f"Whether the attention {reader.described} hides padding cannot be told, because {reader.unusual}. "
                "Hide keys with a boolean mask (masked_fill, where), or add 0 and -inf; or use semantics `paper`, "
                "which knows no padding."
            )
        covering = [m for m in reader.masks if m.of_input and stream in key_streams(rewriter, m.node)]
        if not covering:
            return None
        if len(covering) > 1:
            raise LocateError(
                f"The attention {reader.described} adds several masks ({', '.join(m.node.name for m in covering)}); "
                "which of them marks padding cannot be told. Join them into one before the attention."
            )
        (mask,) = covering
        rank = len(shape(mask.node))
        if rank != 4:
            raise LocateError(f"The mask of {describe(reader.context)} has {rank} dimensions, not 4.")
        axis, epochs = rewriter.annotation.axis(Dim(mask.node, 3)), rewriter.epochs.at(Dim(mask.node, 3))
        if mask.node not in rewriter.env or epochs.get(stream, 0) or not isinstance(axis, Tokens):
            return None
        # Other streams of this mask may be reduced already.
        start, stop = rewriter.epochs.span(axis, stream, epochs)
        weights = TokenWeights(start, stop - start, mask.kind)
        return rewriter.call_module(f"reducer.weights.{stream}", weights, rewriter.env[mask.node])


def key_streams(rewriter: Rewriter, mask: fx.Node) -> tuple[str, ...]:
    """The streams along the last dimension of a mask."""
    axis = rewriter.annotation.axis(Dim(mask, len(shape(mask)) - 1))
    return axis.streams if isinstance(axis, Tokens) else ()
