"""Budgets: how many tokens of each modality a site loses. The keys that PuMer and ToMe share, and their arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from ..errors import LocateError, PlanError
from .base import Method
from .proposing import Ask

if TYPE_CHECKING:
    from ..analysis.attention import Attention
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Site, Stream


def _check_budget(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a share (a float, 0 <= share < 1) or a number of tokens (an integer)")
    if isinstance(value, float) and not 0.0 <= value < 1.0:
        raise ValueError(f"a share must be at least 0 and below 1 (an integer is a number of tokens), got {value}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"a number of tokens cannot be negative, got {value}")
    return value


Budget = Annotated[StrictInt | StrictFloat, BeforeValidator(_check_budget)]
"""A share of a stream's tokens (float) or an absolute number of tokens (int)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Merge(_Strict):
    """Tokens merged away within each modality."""

    image: Budget = 0
    text: Budget = 0


class SiteBudget(_Strict):
    """Budgets of one attention node, addressed as `<group>.<index>` in execution order."""

    at: str = Field(pattern=r"^[a-z_]+\.\d+$")
    prune: Budget = 0
    merge: Merge = Merge()

    @property
    def reduces(self) -> bool:
        """Whether any budget is above zero."""
        return any(b > 0 for b in (self.prune, self.merge.image, self.merge.text))


class Budgeted(Method):
    """A method with budgets at attention nodes.

    Args:
        layers: cross-modal attention nodes in execution order, from 0, all with the budgets `prune` and `merge`.
        prune: share (float) or number (int) of image tokens pruned at each layer.
        merge: share or number of tokens merged away, by modality.
        sites: instead of `layers`: one entry for each site, with its own budgets.
    """

    layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = None
    prune: Budget | None = None
    merge: Merge | None = None
    sites: tuple[SiteBudget, ...] | None = None

    @model_validator(mode="after")
    def _layers_or_sites(self) -> Budgeted:
        if (self.layers is None) == (self.sites is None):
            raise ValueError("a schedule names its places with either `layers` or `sites`, exactly one of them")
        if self.sites is not None and (self.prune is not None or self.merge is not None):
            raise ValueError("`prune` and `merge` at the top go with `layers`; with `sites` each site has its own")
        places = [site.at for site in self.resolve()]
        duplicates = sorted({p for p in places if places.count(p) > 1})
        if duplicates:
            raise ValueError(f"the schedule names {', '.join(duplicates)} more than once")
        idle = [site.at for site in self.resolve() if not site.reduces]
        if not places or idle:
            what = f"site {idle[0]} has no budget above zero" if idle else "the list of places is empty"
            raise ValueError(f"it would reduce nothing: {what} (use `none` to compile without reduction)")
        return self

    def resolve(self) -> tuple[SiteBudget, ...]:
        """The sites with their budgets, `layers` spelled out as `cross_modal.<index>`."""
        if self.sites is not None:
            return self.sites
        prune, merge = self.prune or 0, self.merge or Merge()
        return tuple(SiteBudget(at=f"cross_modal.{index}", prune=prune, merge=merge) for index in self.layers or ())

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        sites = ((s.at, *(b or 0 for b in (s.prune, s.merge.image, s.merge.text))) for s in self.resolve())
        return {**super().canonical(), "sites": sorted(sites)}

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Method.addresses`."""
        return tuple(site.at for site in self.resolve())

    @classmethod
    def chosen(
        cls, places: Sequence[str], usual: Sequence[str], ask: Ask, *, text: bool = False, prunes: bool = False
    ) -> tuple[SiteBudget, ...]:
        """Budgets of some places, those of the paper where they are `usual`; places without any are left out.

        Args:
            places: addresses.
            usual: of these.
            ask: chooses.
            text: whether text may merge.
            prunes: whether text chooses among image tokens.
        """
        found = []
        for at in places:
            here = at in usual
            image = ask.share(f"{at}.merge.image", 0.5, 0.3 * here)
            words = ask.share(f"{at}.merge.text", 0.5, 0.2 * here) if text else 0.0
            prune = ask.share(f"{at}.prune", 0.5, 0.1 * here) if prunes else 0.0
            found.append(SiteBudget(at=at, prune=prune, merge=Merge(image=image, text=words)))
        return tuple(site for site in found if site.reduces)

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the attention nodes that the schedule names; the carrier of each is reduced."""
        from ..rewrite.sites import Site

        chosen = [(attention, budget) for budget in self.resolve() for attention in graph.choose(budget.at)]
        chosen.sort(key=lambda pair: graph.attentions.index(pair[0]))
        for attention, budget in chosen:
            check_site(graph, attention, budget)
        graph.check_masks(chosen[0][0])
        _check_order(graph, chosen)
        return [Site(a, after=a.carrier, streams=a.streams, budget=budget) for a, budget in chosen]

    def reducers(self, site: Site, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """See `Method.reducers`."""
        found = super().reducers(site, streams)
        if not found:
            assert site.budget is not None
            raise PlanError(
                f"Site {site.budget.at} would reduce nothing: its shares round to zero tokens of "
                f"{ {s.name: s.tokens for s in streams} }. Raise them or leave the site out."
            )
        return found


def _check_order(graph: LocatedGraph, chosen: list[tuple[Attention, SiteBudget]]) -> None:
    """Text tokens that may see only those before them cannot merge: one would see what comes after it."""
    for site, budget in chosen:
        text = {stream for stream in site.streams if graph.modality(stream) == "text"}
        if budget.merge.text == 0:
            continue
        for attention in graph.attentions_from(site):
            mask = next((mask for mask in attention.masks if mask.by_query), None)
            over = text & set(attention.query_axis.streams) & set(attention.key_axis.streams)
            if mask is not None and over:
                raise LocateError(
                    f"Site {site.described} merges text tokens, but the mask {mask.node.name} of the attention "
                    f"{attention.described} differs from query to query, as a causal mask does, and merged tokens have "
                    "no order. Set `merge: {text: 0}`; the image may be reduced."
                )


def check_site(graph: LocatedGraph, attention: Attention, budget: SiteBudget) -> None:
    """Whether a site has what its budgets need.

    Raises:
        LocateError: no carrier, no heads of their own, image-to-text attention.
        PlanError: a budget for tokens that it does not have.
    """
    if not attention.query_axis.streams:
        raise LocateError(
            f"Site {attention.described} is attention of learned queries, {attention.query_axis}, to "
            f"{attention.key_axis}: there is no stream of tokens to carry on. Choose a site before it."
        )
    graph.check_reducible(attention)
    graph.check_whole(attention)
    queries, keys = (graph.modalities(axis) for axis in (attention.query_axis, attention.key_axis))
    if attention.cross_modal and "text" not in queries and "image" not in keys:
        raise LocateError(
            f"Site {attention.described} is cross-attention from {attention.query_axis} to {attention.key_axis}: "
            "image-to-text attention, which has no text-to-image map to prune by. In a co-attention pair reduce at the "
            "text layer's attention (even layers); it reduces the image for both."
        )
    wanted = {"image": budget.prune > 0 or budget.merge.image > 0, "text": budget.merge.text > 0}
    missing = [stream for stream, asked in wanted.items() if asked and stream not in queries | keys]
    if missing:
        raise PlanError(
            f"Site {budget.at} has budgets for {' and '.join(missing)} tokens, but its attention is over "
            f"{attention.query_axis}."
        )
    if wanted["image"] and "image" not in keys:
        raise PlanError(
            f"Site {budget.at} has budgets for image tokens, but its keys are {attention.key_axis}, and an image is "
            "matched by its keys. Choose a site that attends to the image."
        )
    if budget.prune > 0 and "text" not in queries:
        raise PlanError(
            f"Site {budget.at} prunes image tokens by the attention of the text, but its attention is over "
            f"{attention.query_axis} alone. Merge there instead, or prune at a cross-modal site."
        )


def in_short(sites: Sequence[SiteBudget]) -> dict[str, Any]:
    """The keys of a schedule: `layers`, where all sites are cross-modal and have the same budgets, else `sites`."""
    budgets = {(site.prune, site.merge) for site in sites}
    numbers = [site.at.removeprefix("cross_modal.") for site in sites]
    if len(budgets) > 1 or not all(number.isdecimal() for number in numbers):
        return {"sites": tuple(sites)}
    ((prune, merge),) = budgets
    return {"layers": tuple(map(int, numbers)), "prune": prune, "merge": merge}


def merge_limit(tokens: int, protected: int) -> int:
    """Most tokens that bipartite matching can merge away: the even positions after the protected ones, as
    long as some odd position is free to take them."""
    if tokens // 2 <= protected // 2:
        return 0
    return (tokens + 1) // 2 - (min(protected, tokens) + 1) // 2


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
