"""The plan: token counts before and after every reducer, and what they save."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .shown.tables import Shown, Table, giga


@dataclass(frozen=True)
class SitePlan:
    """One site.

    Attributes:
        site: address, such as `cross_modal.2`.
        module: path of its attention module.
        before, after: tokens by stream.
        pruned, merged: tokens removed by stream.
        multiply_adds: of one sample from this site to the next (or the end), as (before, after) reduction.
        call: 1 and more where the model runs the layer again on other inputs (a second image).
    """

    site: str
    module: str
    before: dict[str, int]
    after: dict[str, int]
    pruned: dict[str, int]
    merged: dict[str, int]
    multiply_adds: tuple[int, int] = (0, 0)
    call: int = 0

    @property
    def name(self) -> str:
        """The address, and `@1` and so on where the layer runs again."""
        return self.site + (f"@{self.call}" if self.call else "")


@dataclass(frozen=True)
class PromptPlace:
    """Where an image stands in every prompt of a compiled model.

    Attributes:
        input: that holds the ids.
        placeholder: the id that fills the place.
        start, stop: first position, and the one after the last.
    """

    input: str
    placeholder: int
    start: int
    stop: int


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Sites in execution order and the multiply-adds of one sample, reducers included.

    Attributes:
        sites: where tokens are reduced.
        multiply_adds_before, multiply_adds_after: of the whole model.
        layers: tokens by stream after every attention node that has any, by its address, in execution order.
        prompts: where images stand in prompts.
        signals: what the reducers read, such as `last_query`.
    """

    sites: tuple[SitePlan, ...]
    multiply_adds_before: int
    multiply_adds_after: int
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    prompts: tuple[PromptPlace, ...] = ()
    signals: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds."""
        return self.multiply_adds_before / self.multiply_adds_after

    def tables(self) -> list[Table]:
        """See `Shown`: a row for each site."""
        before, after = self.multiply_adds_before, self.multiply_adds_after
        gain = f"{giga(before)} multiply-adds before, {giga(after)} after, {self.ratio:.2f}x fewer"
        rows = [
            (site.name, _counts(site), " -> ".join(map(giga, site.multiply_adds)), site.module) for site in self.sites
        ]
        count = f"{len(rows)} site{'' if len(rows) == 1 else 's'}"
        return [Table(f"Plan of {count}: {gain}", ("site", "tokens", "multiply-adds", "module"), rows)]

    def tokens(self) -> dict[str, dict[str, int]]:
        """Tokens by stream after every attention node, by its address."""
        return {site: dict(counts) for site, counts in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"signals": [...], "sites": [{site, module, before, after}], "multiply_adds": {before, after, ratio}}`."""
        prompts = {"prompts": [asdict(place) for place in self.prompts]} if self.prompts else {}
        return {
            **prompts,
            "signals": list(self.signals),
            "sites": [{"site": s.name, "module": s.module, "before": s.before, "after": s.after} for s in self.sites],
            "multiply_adds": {
                "before": self.multiply_adds_before,
                "after": self.multiply_adds_after,
                "ratio": self.ratio,
            },
        }


def _counts(site: SitePlan) -> str:
    return ", ".join(f"{stream} {count} -> {site.after[stream]}" for stream, count in site.before.items())
