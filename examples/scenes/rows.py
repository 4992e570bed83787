"""The rows of the tables: which reduction, at which share of the multiply-adds, fine-tuned or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LAYERS = (1, 2, 4)
"""The relative depths of the paper's layers 2, 5 and 8 of twelve."""
FIRST = LAYERS[0]
RATIOS = (1.4, 1.8, 2.5)
"""How many times fewer multiply-adds."""
SIZES = (96, 80, 64)
"""Pixels of smaller pictures; the model's own are 112."""
PATCHES = 196
CONTROL_SEEDS = (0, 1, 2, 3, 4)
SEEDS = (0, 1, 2)


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
    "dynamicvit": lambda share: {"method": "dynamicvit", "layers": LAYERS, "keep": 1 - share},
}  # fmt: skip
"""Schedules by how much they reduce, a share from 0 to 1; multiply-adds fall with it."""
TRAINED = "dynamicvit"
"""The family whose predictors have to be trained."""
RECIPE = "pumer, reference"
"""What the paper's recipe fine-tunes with."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: of its result file.
        label: in tables.
        family: one of `FAMILIES`; '' reduces nothing.
        ratio: how many times fewer multiply-adds it shall have than the unreduced model with the exact passes, before
            `without`.
        image_size: pixels, where the picture is made smaller first.
        extra: keys of the schedule beside those of the family.
        without: keys of the schedule that are left out once the ratio is met (`prune`, `merge`).
        like: the layers at which the ratio is met, where `extra` has others: as much at each of those.
        seed: of fine-tuning; None is off the shelf.
        distilled: whether fine-tuning learns from the unreduced model too.
    """

    name: str
    label: str
    family: str = ""
    ratio: float = 1.0
    image_size: int | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    without: str = ""
    like: tuple[int, ...] = ()
    seed: int | None = None
    distilled: bool = True

    @property
    def group(self) -> tuple[str, float, int | None]:
        """What rows of several seeds have in common."""
        return self.label, self.ratio, self.image_size


def shelf_rows() -> list[Row]:
    """Off the shelf: a trained model, reduced without any training."""
    rows = [Row("unreduced", "unreduced")]
    rows += [Row(f"size-{size}", f"{size} px", image_size=size) for size in SIZES]
    for ratio in RATIOS:
        for family in FAMILIES:
            seeds = CONTROL_SEEDS if family.startswith("random") else (None,)
            for seed in seeds if family != TRAINED else ():
                suffix, extra = ("", ()) if seed is None else (f"-{seed}", (("seed", seed),))
                rows.append(Row(f"{_file(family)}-{ratio}{suffix}", family, family, ratio, extra=extra))
    return rows


def tuned_rows() -> dict[int, list[Row]]:
    """Fine-tuned by the paper's recipe, by table; 5 is the figure. A row of several tables has one name."""
    pumer = {ratio: _seeds(f"tuned-pumer-{ratio}", "PuMer", RECIPE, ratio) for ratio in (*RATIOS, 2.0)}
    control = _seeds("tuned-unreduced", "unreduced, trained further", "", 1.0)
    smaller = [Row(f"tuned-size-{size}-s0", f"{size} px", image_size=size, seed=0) for size in SIZES]
    both = Row("tuned-pumer-1.8-size-96-s0", "PuMer and 96 px", RECIPE, 1.8, 96, seed=0)
    single = {ratio: rows[0] for ratio, rows in pumer.items()}
    parts = [
        Row("tuned-no-prune-s0", "without pruning", RECIPE, 1.8, without="prune", seed=0),
        Row("tuned-no-merge-s0", "without merging", RECIPE, 1.8, without="merge", seed=0),
        Row("tuned-no-distillation-s0", "without distillation", RECIPE, 1.8, seed=0, distilled=False),
    ]
    layers = [_at(f"layers {_words(places)}", places) for places in ((1,), (1, 3), (1, 2, 3, 4))]
    places = [_at(f"as much at {_words(at)}", at, LAYERS) for at in ((0, 1, 2), (2, 3, 4))]
    others = [
        Row(f"tuned-{_file(family)}-{ratio}-s0", family, family, ratio, seed=0)
        for ratio in RATIOS
        for family in ("tome", "random, once", TRAINED)
    ]
    return {
        1: [*control, *pumer[1.8], *pumer[2.0]],
        2: [control[0], *smaller, single[1.8], both],
        3: [single[1.8], *parts],
        4: [single[1.8], *layers, single[1.4], single[2.5], *places],
        5: [control[0], *(single[ratio] for ratio in RATIOS), *smaller, *others],
    }


def _file(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "-")


def _words(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _seeds(name: str, label: str, family: str, ratio: float) -> list[Row]:
    return [Row(f"{name}-s{seed}", label, family, ratio, seed=seed) for seed in SEEDS]


def _at(label: str, layers: tuple[int, ...], like: tuple[int, ...] = ()) -> Row:
    name = f"tuned-{_file(label)}-s0"
    return Row(name, label, RECIPE, 1.8, extra=(("layers", layers),), like=like, seed=0)
