"""The plan: token counts before and after every reducer, and what they save."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors import PlanError
from .schedule import Budget, Semantics, Site


@dataclass(frozen=True)
class SitePlan:
    """One site.

    Attributes:
        site: address, such as `cross_modal.2`.
        module: path of its attention module.
        before, after: tokens by stream.
        pruned, merged: tokens removed by stream.
        multiply_adds: of one sample from this site to the next (or the end), as (before, after) reduction.
    """

    site: str
    module: str
    before: dict[str, int]
    after: dict[str, int]
    pruned: dict[str, int]
    merged: dict[str, int]
    multiply_adds: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Plan:
    """Sites in execution order and the multiply-adds of one sample, reducers included.

    Attributes:
        sites: where tokens are reduced.
        multiply_adds_before, multiply_adds_after: of the whole model.
        layers: tokens by stream after every attention node that has any, by its address, in execution order.
    """

    sites: tuple[SitePlan, ...]
    multiply_adds_before: int
    multiply_adds_after: int
    layers: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds."""
        return self.multiply_adds_before / self.multiply_adds_after

    def tokens(self) -> dict[str, dict[str, int]]:
        """Tokens by stream after every attention node, by its address."""
        return {site: dict(counts) for site, counts in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"sites": [{site, module, before, after}], "multiply_adds": {before, after, ratio}}`."""
        return {
            "sites": [{"site": s.site, "module": s.module, "before": s.before, "after": s.after} for s in self.sites],
            "multiply_adds": {
                "before": self.multiply_adds_before,
                "after": self.multiply_adds_after,
                "ratio": self.ratio,
            },
        }


def merge_limit(tokens: int, protected: int) -> int:
    """Most tokens that bipartite matching can merge away: the even positions after the protected ones, as
    long as some odd position is free to take them."""
    if tokens // 2 <= protected // 2:
        return 0
    return (tokens + 1) // 2 - (min(protected, tokens) + 1) // 2


def image_counts(tokens: int, site: Site, semantics: Semantics, protected: int) -> tuple[int, int]:
    """Image tokens to keep and to merge.

    Args:
        tokens: the stream's tokens, class token included.
        site: its budgets; shares follow the published code (`n - round(p n)`, then `round(r n)` of the tokens
            before pruning) or, with semantics `paper`, Algorithm 1 (`round((1 - p) n)`, then `round(r n)` of
            those kept).
        semantics: see `Schedule`.
        protected: leading tokens that stay (class token).

    Raises:
        PlanError: an absolute budget larger than the stream allows.
    """
    paper = semantics == "paper"
    if isinstance(site.prune, int):
        keep = tokens - site.prune
    else:
        keep = round((1 - site.prune) * tokens) if paper else tokens - round(site.prune * tokens)
    if keep < max(1, protected):
        raise PlanError(
            f"Site {site.at} would prune {tokens - keep} of {tokens} image tokens; at most "
            f"{tokens - max(1, protected)} can go. Lower `prune`."
        )
    return keep, merge_count(site.at, "image", site.merge.image, keep, keep if paper else tokens, max(1, protected))


def merge_count(site: str, stream: str, budget: Budget, keep: int, of: int, protected: int) -> int:
    """Tokens to merge away: a share of `of`, at most what matching allows, or an absolute number.

    Raises:
        PlanError: an absolute number that matching does not allow.
    """
    limit = merge_limit(keep, protected)
    if isinstance(budget, float):
        return min(round(budget * of), limit)
    if budget > limit:
        raise PlanError(
            f"Site {site} would merge {budget} of {keep} {stream} tokens away; at most {limit} can merge, "
            f"because only every second token does and {protected} stay. Lower `merge: {{{stream}: ...}}`."
        )
    return budget
