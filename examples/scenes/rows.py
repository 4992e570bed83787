"""The rows of the tables: which reduction, at which share of the multiply-adds, of which training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LAYERS = (1, 2, 4)
"""The relative depths of the paper's layers 2, 5 and 8 of twelve."""
FIRST = LAYERS[0]
RATIOS = (1.4, 1.8, 2.5)
"""How many times fewer multiply-adds."""
PATCHES = 196
CONTROL_SEEDS = (0, 1, 2, 3, 4)


def _pumer(share: float) -> dict[str, Any]:
    # The paper's 0.1 and 0.3, more or less of both; text as there.
    return {"layers": LAYERS, "prune": share / 3, "merge": {"image": share, "text": 0.2}}


def _kept(share: float) -> int:
    return round((1 - share) * PATCHES)


FAMILIES: dict[str, Callable[[float], dict[str, Any]]] = {
    "pumer": lambda share: {"method": "pumer", "semantics": "safe", **_pumer(share)},
    "pumer, reference": lambda share: {"method": "pumer", "semantics": "reference", **_pumer(share)},
    "pruning alone": lambda share: {"method": "pumer", "semantics": "safe", "layers": LAYERS, "prune": share},
    "merging alone": lambda share: {
        "method": "pumer", "semantics": "safe", "layers": LAYERS, "merge": {"image": share, "text": 0.2},
    },
    "tome": lambda share: {"method": "tome", "layers": LAYERS, "merge": {"image": share}},
    "text-informed, once": lambda share: {
        "method": "pumer", "semantics": "safe", "layers": (FIRST,), "prune": PATCHES - _kept(share),
    },
    "random, once": lambda share: {"method": "random", "at": f"cross_modal.{FIRST}", "budget": _kept(share)},
    "uniform, once": lambda share: {"method": "uniform", "at": f"cross_modal.{FIRST}", "budget": _kept(share)},
}  # fmt: skip
"""Schedules by how much they reduce, a share from 0 to 1; multiply-adds fall with it."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: of its result file.
        label: in tables.
        family: one of `FAMILIES`; '' reduces nothing.
        ratio: how many times fewer multiply-adds it shall have.
        image_size: pixels, where the picture is made smaller first.
        extra: keys of the schedule beside those of the family.
    """

    name: str
    label: str
    family: str = ""
    ratio: float = 1.0
    image_size: int | None = None
    extra: tuple[tuple[str, Any], ...] = ()


def shelf_rows() -> list[Row]:
    """Off the shelf: a trained model, reduced without any training."""
    rows = [Row("unreduced", "unreduced")]
    for size in (96, 80, 64):
        rows.append(Row(f"size-{size}", f"{size} px", image_size=size))
    for ratio in RATIOS:
        for family in FAMILIES:
            name = f"{family.replace(', ', '-').replace(' ', '-')}-{ratio}"
            seeds = CONTROL_SEEDS if family.startswith("random") else (None,)
            for seed in seeds:
                suffix, extra = ("", ()) if seed is None else (f"-{seed}", (("seed", seed),))
                rows.append(Row(name + suffix, family, family, ratio, extra=extra))
    return rows
