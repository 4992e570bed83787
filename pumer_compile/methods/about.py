"""What is to be known of a method before it is used: for `pumer-compile list methods` and `docs/methods.md`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """A method in a few words.

    Attributes:
        does: what becomes of which tokens.
        reads: what it decides by.
        use: when to choose it.
        paper: authors and place; '' where there is none.
        code: the published repository and its licence; '' where there is none.
        held: what its results are held against.
    """

    does: str
    reads: str
    use: str
    paper: str = ""
    code: str = ""
    held: str = "an implementation of our own that shares no code"
