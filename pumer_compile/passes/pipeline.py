"""The passes by stage, and the pipelines that they make."""

from __future__ import annotations

from ..methods.base import Method
from .absorb_single_query import AbsorbSingleQuery
from .annotate import Annotate
from .count import Count
from .eliminate import Eliminate, EliminateAlone
from .fold_masks import FoldMasks
from .insert import Insert
from .join_writes import JoinWrites
from .locate import Locate
from .lower_einsum import LowerEinsum
from .manager import Pass
from .prompt import MarkPrompt
from .rewrite import Rewrite
from .unfold_heads import UnfoldHeads
from .verify import Verify

UNPADDED: tuple[Pass, ...] = (FoldMasks(),)
"""At capture, of a sample without padding: masks of ones are written into the graph."""
ANALYSE: tuple[Pass, ...] = (JoinWrites(), LowerEinsum(), UnfoldHeads(), MarkPrompt(), Annotate(), Locate())
"""What is there: tokens, attentions, prompts."""
REDUCE: tuple[Pass, ...] = (Insert(), Rewrite(), Verify())
"""Reducers go in, and every size follows."""
EXACT: tuple[Pass, ...] = (Eliminate(), AbsorbSingleQuery())
"""The same outputs with less work."""
EXACT_ALONE: tuple[Pass, ...] = (EliminateAlone(), AbsorbSingleQuery())
"""These without a reducer, on a copy of the captured graph."""
COUNT: tuple[Pass, ...] = (Count(),)
"""Multiply-adds, for one batch size."""
PASSES: tuple[Pass, ...] = ANALYSE + REDUCE + EXACT + COUNT
"""All of a method that reduces."""


def passes_of(method: Method) -> tuple[Pass, ...]:
    """The passes of a method, in order, but for `COUNT`."""
    return EXACT_ALONE if method.exact else ANALYSE + REDUCE + EXACT
