"""Short tables that objects show themselves as: text for `repr`, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# A table is to be looked at: of more rows the first are shown, and how many there are.
ROWS = 24


@dataclass(frozen=True)
class Table:
    """A heading, and rows of cells below column names.

    Attributes:
        heading: a line.
        columns: names; none where there are no rows.
        rows: cells, as many as there are columns.
    """

    heading: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def text(self) -> str:
        """With columns of one width, for a terminal."""
        if not self.rows:
            return self.heading
        lines = [self.columns, *self.rows[:ROWS]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        written = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.heading, *(f"  {line.rstrip()}" for line in written), *self._left_out()])

    def html(self) -> str:
        """As a table of a page."""
        heading = f"<p>{escape(self.heading)}</p>"
        if not self.rows:
            return heading
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows[:ROWS]
        )
        more = "".join(f"<p>{escape(line.strip())}</p>" for line in self._left_out())
        return f"{heading}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _left_out(self) -> list[str]:
        left = len(self.rows) - ROWS
        return [f"  and {left} more"] if left > 0 else []


class Shown:
    """What shows itself as tables; a dataclass that is one of these has `repr=False`."""

    def tables(self) -> list[Table]:
        """What is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        """For a notebook."""
        return "".join(table.html() for table in self.tables())


def giga(count: float) -> str:
    """A number of multiply-adds, in the unit that fits."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f}"
