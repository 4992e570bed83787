"""Batch sizes that an artifact with an open batch is built for."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class Profile:
    """Batch sizes of an artifact with an open batch: the smallest, the one to tune for, the largest.

    Attributes:
        minimum, optimum, maximum: samples.
    """

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise UsageError(f"Profile {self} is not of the form MIN:OPT:MAX with 1 <= MIN <= OPT <= MAX.")

    @classmethod
    def parse(cls, text: str) -> Profile:
        """From `batch=1:8:32`.

        Raises:
            UsageError: another form, or sizes in another order.
        """
        name, _, sizes = text.partition("=")
        parts = sizes.split(":")
        if name != "batch" or len(parts) != 3 or not all(p.isascii() and p.isdigit() for p in parts):
            raise UsageError(
                f"--profile {text!r} is not of the form batch=MIN:OPT:MAX, such as batch=1:8:32. Only the batch can "
                "be open: token counts are fixed by the schedule."
            )
        return cls(*(int(part) for part in parts))

    def __str__(self) -> str:
        return f"batch={self.minimum}:{self.optimum}:{self.maximum}"
