"""`method: downsample`: an image's grid of tokens pooled to a coarser one, a control that many methods do not beat."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..errors import PlanError
from .about import About
from .control import Control

if TYPE_CHECKING:
    from ..rewrite.sites import Stream

Side = Annotated[int, Field(ge=1, strict=True)]


class Downsample(Control):
    """Makes `budget` tokens of each image: the mean of each cell of a coarser grid, as average pooling of the picture
    gives it (a cell is `floor(row * rows after / rows)`, so cells may differ in size by one).

    Args:
        grid: rows and columns of an image's tokens, such as `[24, 24]`; by default they are a square.
    """

    about = About(
        does="pools the grid of image tokens to a coarser one",
        reads="nothing",
        use="as a control, and where an image is looked at as a whole",
    )

    method: Literal["downsample"] = "downsample"
    grid: tuple[Side, Side] | None = None

    @classmethod
    def near(cls, budget: int, tokens: int) -> int:
        """See `Control.near`: of a square picture, a square."""
        return max(1, math.isqrt(min(budget, tokens))) ** 2

    def groups(self, stream: Stream) -> list[list[int]]:
        """See `Control.groups`."""
        from ..reducers.fixed import cells, pooled_grid

        found = []
        for crop in stream.crops:
            rows, columns = self._grid(len(crop))
            to = pooled_grid(rows, columns, min(self.budget, len(crop)))
            if to is None:
                fits = [n for n in range(1, len(crop) + 1) if pooled_grid(rows, columns, n)]
                near = sorted(sorted(fits, key=lambda n: abs(n - self.budget))[:3])
                raise PlanError(
                    f"A grid of {rows} x {columns} tokens is not pooled to {self.budget}, which is no product of a "
                    f"number of rows up to {rows} and of columns up to {columns}. Near it are "
                    f"{', '.join(map(str, near))}."
                )
            found += [[crop[i] for i in cell] for cell in cells(rows, columns, to)]
        return found

    def _grid(self, length: int) -> tuple[int, int]:
        side = math.isqrt(length)
        if self.grid is None and side * side != length:
            raise PlanError(
                f"`method: downsample` pools a grid, and {length} tokens are no square. Give its rows and columns, "
                "such as `grid: [12, 16]`."
            )
        rows, columns = self.grid or (side, side)
        if rows * columns != length:
            raise PlanError(f"`grid: [{rows}, {columns}]` has {rows * columns} tokens, and an image here has {length}.")
        return rows, columns
