"""What a method is asked with for schedules of its own: a model in outline, and who chooses the numbers.

`Method.proposals` is asked by `inspect`, which takes every default, and by `search`, which tries other numbers. No
torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T", bound=str | int)

DEPTHS = (2, 5, 8)
"""Where the paper of PuMer reduces the twelve layers of its ViLT."""


@dataclass(frozen=True)
class Outline:
    """A captured model, as far as a schedule needs to know it.

    Attributes:
        streams: tokens by stream.
        informed: attention in which text can choose among image tokens, by address.
        tower: attention among image tokens alone.
        crops: tokens of the smallest crop (tile, frame) of an image in a prompt; 0 where no image stands in one.
        rows: tokens of the smallest image in a prompt, all its crops together.
        frames: crops of that image.
        layers: language layers that see the prompt with its images.
        read: whether the image stands in no prompt after all, and text reads it by cross-attention.
        learned: class tokens that lead an image which stands in no prompt.
    """

    streams: Mapping[str, int] = field(default_factory=dict)
    informed: tuple[str, ...] = ()
    tower: tuple[str, ...] = ()
    crops: int = 0
    rows: int = 0
    frames: int = 1
    layers: int = 0
    read: bool = False
    learned: int = 0

    @property
    def fuses(self) -> bool:
        """Whether text and image meet in attention, outside a language model's prompt."""
        return bool(self.informed) and (self.read or not self.rows)


class Ask(Protocol):
    """Chooses the numbers of a schedule."""

    def share(self, name: str, most: float, usual: float) -> float:
        """From 0 to `most`."""

    def count(self, name: str, least: int, most: int, usual: int) -> int:
        """From `least` to `most`."""

    def one_of(self, name: str, values: Sequence[T], usual: T) -> T:
        """One of these."""


class Usual:
    """Every number as it is usual."""

    def share(self, name: str, most: float, usual: float) -> float:
        """See `Ask`."""
        return usual

    def count(self, name: str, least: int, most: int, usual: int) -> int:
        """See `Ask`."""
        return min(max(usual, least), most)

    def one_of(self, name: str, values: Sequence[T], usual: T) -> T:
        """See `Ask`."""
        return usual


def at_depths(places: Sequence[T]) -> list[T]:
    """Those of some places, in execution order, that stand as deep as the paper's."""
    return [places[i] for i in sorted({len(places) * depth // 12 for depth in DEPTHS})] if places else []
