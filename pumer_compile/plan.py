"""The plan: token counts before and after every reducer, and what they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .errors import PlanError, UsageError
from .schedule import Budget, Schedule, Semantics, Site


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


@dataclass(frozen=True)
class Plan:
    """Sites in execution order and the multiply-adds of one sample, reducers included.

    Attributes:
        sites: where tokens are reduced.
        multiply_adds_before, multiply_adds_after: of the whole model.
        layers: tokens by stream after every attention node that has any, by its address, in execution order.
        prompts: where images stand in prompts.
    """

    sites: tuple[SitePlan, ...]
    multiply_adds_before: int
    multiply_adds_after: int
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    prompts: tuple[PromptPlace, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds."""
        return self.multiply_adds_before / self.multiply_adds_after

    def tokens(self) -> dict[str, dict[str, int]]:
        """Tokens by stream after every attention node, by its address."""
        return {site: dict(counts) for site, counts in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"sites": [{site, module, before, after}], "multiply_adds": {before, after, ratio}}`."""
        prompts = {"prompts": [asdict(place) for place in self.prompts]} if self.prompts else {}
        return {
            **prompts,
            "sites": [{"site": s.name, "module": s.module, "before": s.before, "after": s.after} for s in self.sites],
            "multiply_adds": {
                "before": self.multiply_adds_before,
                "after": self.multiply_adds_after,
                "ratio": self.ratio,
            },
        }


def check_prompts(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Whether images stand in these prompts where the artifact has them compiled in, and are cut as it has them.

    Raises:
        UsageError: elsewhere, in another number of places, or an input has other values than it was compiled for.
    """
    for name, values in (manifest.get("fixed_inputs") or {}).items():
        if name in inputs and inputs[name].tolist() != values:
            raise UsageError(
                f"The artifact was compiled for {name} {values}, which is written into it (images of another shape are "
                f"cut otherwise), and was given {inputs[name].tolist()}. Compile it for this shape."
            )
    for name in manifest.get("unpadded_inputs") or ():
        if name in inputs and not bool((inputs[name] == 1).all()):
            raise UsageError(
                f"The artifact was compiled with --no-padding, and {name} has padding (zeros). Compile it without, or "
                "give it samples of full length."
            )
    for name, value in (manifest.get("constant_inputs") or {}).items():
        if name in inputs and not bool((inputs[name] == value).all()):
            raise UsageError(
                f"The artifact was compiled without {name}, which is as good as {value} in every place, and was given "
                f"other values. Compile it with {name} among its inputs (--inputs)."
            )
    blocks: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for place in (manifest.get("plan") or {}).get("prompts", ()):
        blocks.setdefault((place["input"], place["placeholder"]), []).append((place["start"], place["stop"]))
    for (name, placeholder), places in blocks.items():
        if name in inputs:
            _check_places(name, inputs[name], placeholder, places)


def without_constants(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without those that `check_prompts` found to say nothing."""
    return {name: tensor for name, tensor in inputs.items() if name not in (manifest.get("constant_inputs") or {})}


def _check_places(name: str, ids: Tensor, placeholder: int, places: list[tuple[int, int]]) -> None:
    found = ids == placeholder
    total = sum(stop - start for start, stop in places)
    there = all(bool(found[:, start:stop].all()) for start, stop in places)
    if not there or int(found.sum()) != total * ids.shape[0]:
        positions = " and ".join(f"{start} to {stop - 1}" for start, stop in places)
        raise UsageError(
            f"The artifact has the image at positions {positions} of every prompt, and these {name} do not have its "
            f"placeholders (id {placeholder}) just there. Compile it for prompts of this form."
        )


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


def published_stands_still(site: Site, image: int) -> bool:
    """The published code reduces a layer only where its share of image tokens to prune rounds to at least
    one. A site that asks for merging alone (`prune: 0`) is our extension, and merges."""
    share = site.prune
    return isinstance(share, float) and share > 0 and round(share * image) == 0


def stream_counts(
    site: Site, schedule: Schedule, before: dict[str, int], modality: dict[str, str], learned: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """Tokens to keep and to merge of every stream that shrinks.

    Args:
        site: its budgets.
        schedule: their method and semantics.
        before: tokens by stream.
        modality: `text` or `image` by stream.
        learned: leading learned tokens by stream.

    Raises:
        PlanError: a budget that cannot be met, or nothing to reduce.
    """
    counts: dict[str, tuple[int, int]] = {}
    for stream, tokens in before.items():
        keep, merge = tokens, 0
        if schedule.method == "tome":
            budget = site.merge.image if modality[stream] == "image" else site.merge.text
            if modality[stream] in ("image", "text"):
                merge = merge_count(site.at, modality[stream], budget, tokens, tokens, learned[stream])
        elif modality[stream] == "image":
            stays = learned[stream] if schedule.semantics == "safe" else 0
            keep, merge = image_counts(tokens, site, schedule.semantics, stays)
        elif modality[stream] == "text":
            stays = learned[stream] if schedule.semantics == "safe" else 0
            merge = merge_count(site.at, "text", site.merge.text, tokens, tokens, max(1, stays))
        if keep - merge < tokens:
            counts[stream] = (keep, merge)
    if not counts:
        raise PlanError(
            f"Site {site.at} would reduce nothing: its shares round to zero tokens of {before}. Raise them "
            "or leave the site out."
        )
    return counts
