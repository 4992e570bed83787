"""What to reduce, where, and by which algorithm: the YAML a user writes.

```yaml
method: pumer
semantics: safe               # safe (the default) | reference | paper
layers: [2, 5, 8]             # cross-modal attention nodes in execution order, from 0
prune: 0.1                    # share of image tokens pruned at each
merge: {image: 0.3, text: 0.2}
```

Instead of `layers` a schedule may list `sites`, each with its own budgets. A float is a share of the stream
(0 <= share < 1); an integer is a number of tokens. Unknown keys, duplicate keys and schedules that reduce
nothing are errors: a compiler that silently does nothing is the worst bug there is.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from .errors import ScheduleError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Method = Literal["pumer", "tome", "vispruner", "fastv", "lossless"]
Semantics = Literal["reference", "paper", "safe", "stable"]
Positions = Literal["compact", "original"]
TokenOutputs = Literal["refused", "reduced", "restored"]


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


class Site(_Strict):
    """Budgets of one attention node, addressed as `<group>.<index>` in execution order."""

    at: str = Field(pattern=r"^[a-z_]+\.\d+$")
    prune: Budget = 0
    merge: Merge = Merge()

    @property
    def reduces(self) -> bool:
        """Whether any budget is above zero."""
        return any(b > 0 for b in (self.prune, self.merge.image, self.merge.text))


def _default_semantics(keys: dict[str, Any]) -> Semantics:
    """Of a schedule that names none. Methods with one meaning have it under the name that their hashes always had."""
    return "safe" if keys.get("method", "pumer") == "pumer" else "reference"


class Schedule(_Strict):
    """A reduction schedule.

    Args:
        method: `pumer` is text-informed pruning, then modality-aware merging (PuMer, section 4); `tome` is merging
            alone, with token sizes carried along and counted in every later attention (Bolya et al. 2023);
            `vispruner` keeps `budget` image tokens of a prompt by visual cues alone, before the projector (Zhang et
            al. 2025); `fastv` keeps those that the last token of the prompt looks at, from a layer of the language
            model on (Chen et al. 2024); `lossless` has no reducer and no other key: the exact passes alone.
        semantics: of `pumer`. `safe`, the default, is for models that were not fine-tuned with reduction (padding
            neither votes nor merges, class tokens stay, token sizes are carried from reducer to reducer); `reference`
            computes what the published code computes, its masked softmax included, for models fine-tuned with it;
            `paper` is Algorithm 1 and equation 1 as written, with the model's own softmax. `vispruner` has `reference`
            (its default) and `stable`, whose result does not depend on the order of nearly equal similarities. The
            other methods have one meaning. A schedule that names none takes those that the model was trained with,
            where its configuration says so (`as_trained`).
        layers: cross-modal attention nodes in execution order, all with the budgets `prune` and `merge`.
        sites: instead of `layers`: one entry for each site, with its own budgets.
        budget: image tokens that `vispruner` or `fastv` keeps of each image.
        important: share of them kept for the attention they get; the others are kept for being unlike each other.
        layer: of `fastv`, the paper's K: so many language layers see every token; the attention of the last of them
            decides.
        positions: of the tokens that `vispruner` leaves: `compact` (counted anew, as published) or `original` (where
            they stood in the whole prompt); those that `fastv` leaves have their original ones.
        outputs: what becomes of outputs with one entry for each token: `refused` (an error; the default), `reduced`
            (the default of `vispruner` and `fastv`, whose logits have an entry for each token; one entry for
            each token that is left), or `restored` (every original position gets the token it was merged into; pruned
            ones get zeros, and an extra output `<name>.kept` says which those are).
        prune: share (float) or number (int) of image tokens pruned at each layer.
        merge: share or number of tokens merged away, by modality.
    """

    method: Method = "pumer"
    semantics: Semantics = Field(default_factory=_default_semantics)
    layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = None
    prune: Budget | None = None
    merge: Merge | None = None
    sites: tuple[Site, ...] | None = None
    budget: Annotated[int, Field(ge=1, strict=True)] | None = None
    important: Annotated[float, Field(ge=0, le=1)] | None = None
    layer: Annotated[int, Field(strict=True)] | None = None
    positions: Positions | None = None
    outputs: TokenOutputs = "refused"

    def __init__(self, /, **data: Any) -> None:
        if data.get("method") == "vispruner":
            data = {"important": 0.5, "positions": "compact", "outputs": "reduced", **data}
        if data.get("method") == "fastv":
            data = {"positions": "original", "outputs": "reduced", **data}
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ScheduleError(_explain(error, "this schedule")) from error

    @model_validator(mode="after")
    def _layers_or_sites(self) -> Schedule:
        if self.method == "vispruner":
            return self._visual()
        if self.method == "fastv":
            return self._last_query()
        if self.method == "lossless":
            return self._without_reducers()
        owners = {"budget": "`method: vispruner` and `method: fastv`", "layer": "`method: fastv`"}
        foreign = [n for n in ("budget", "important", "layer", "positions") if getattr(self, n) is not None]
        if foreign:
            raise ValueError(f"`{foreign[0]}` is for {owners.get(foreign[0], '`method: vispruner`')}")
        if self.semantics == "stable":
            raise ValueError("`semantics: stable` is for `method: vispruner`; choose reference, paper or safe")
        if (self.layers is None) == (self.sites is None):
            raise ValueError("a schedule names its places with either `layers` or `sites`, exactly one of them")
        if self.sites is not None and (self.prune is not None or self.merge is not None):
            raise ValueError("`prune` and `merge` at the top go with `layers`; with `sites` each site has its own")
        if self.method == "tome" and (self.semantics != "reference" or any(s.prune for s in self.resolve())):
            raise ValueError("`method: tome` merges and has one meaning: leave out `prune` and `semantics`")
        places = [site.at for site in self.resolve()]
        duplicates = sorted({p for p in places if places.count(p) > 1})
        if duplicates:
            raise ValueError(f"the schedule names {', '.join(duplicates)} more than once")
        idle = [site.at for site in self.resolve() if not site.reduces]
        if not places or idle:
            what = f"site {idle[0]} has no budget above zero" if idle else "the list of places is empty"
            raise ValueError(f"it would reduce nothing: {what} (use `none` to compile without reduction)")
        return self

    def _visual(self) -> Schedule:
        given = [n for n in ("layers", "sites", "prune", "merge", "layer") if getattr(self, n) is not None]
        if given:
            raise ValueError(f"`method: vispruner` has a `budget` and no places of its own: leave out `{given[0]}`")
        if self.budget is None:
            raise ValueError("`method: vispruner` needs a `budget`, the image tokens to keep, such as 64")
        if self.semantics not in ("reference", "stable"):
            raise ValueError("`method: vispruner` has the semantics `reference` and `stable`")
        return self

    def _without_reducers(self) -> Schedule:
        has = {"method": "lossless", "semantics": "reference"}
        fields = type(self).model_fields.items()
        given = [n for n, f in fields if getattr(self, n) != has.get(n, f.default)]
        if given:
            raise ValueError(f"`method: lossless` reduces no token and has no other key: leave out `{given[0]}`")
        return self

    def _last_query(self) -> Schedule:
        given = [n for n in ("layers", "sites", "prune", "merge", "important") if getattr(self, n) is not None]
        if given:
            raise ValueError(f"`method: fastv` has one `layer` and one `budget`: leave out `{given[0]}`")
        if self.budget is None:
            raise ValueError("`method: fastv` needs a `budget`, the image tokens to keep, such as 64")
        if self.layer is None:
            raise ValueError("`method: fastv` needs a `layer`, how many language layers see every token, such as 2")
        if self.layer < 1:
            raise ValueError(
                f"`layer` counts the language layers that see every token, at least 1 (whose own attention then "
                f"decides), got {self.layer}"
            )
        if self.semantics != "reference":
            raise ValueError("`method: fastv` has one meaning: leave out `semantics`")
        if self.positions != "original":
            raise ValueError(
                "`method: fastv` leaves tokens at their original positions (layers before it have counted them "
                "already): leave out `positions`"
            )
        return self

    def resolve(self) -> tuple[Site, ...]:
        """The sites with their budgets, `layers` spelled out as `cross_modal.<index>`."""
        if self.sites is not None:
            return self.sites
        merge = self.merge or Merge()
        return tuple(Site(at=f"cross_modal.{index}", prune=self.prune or 0, merge=merge) for index in self.layers or ())

    @property
    def names_semantics(self) -> bool:
        """Whether it was made with semantics, rather than left to the default."""
        return "semantics" in self.model_fields_set

    @property
    def described(self) -> str:
        """Method and semantics in words, such as `pumer, semantics safe`."""
        return self.method + (f", semantics {self.semantics}" if self.method in ("pumer", "vispruner") else "")

    def with_semantics(self, semantics: str) -> Schedule:
        """The same schedule under semantics that it need not name itself.

        Raises:
            ScheduleError: the method does not have them.
        """
        return type(self)(**{**self.model_dump(exclude_none=True), "semantics": semantics})

    @property
    def sha256(self) -> str:
        """Hash of the schedule's canonical form: schedules that do the same have the same."""
        canonical: dict[str, Any] = {
            "method": self.method,
            "semantics": self.semantics,
            "sites": sorted((s.at, *(b or 0 for b in (s.prune, s.merge.image, s.merge.text))) for s in self.resolve()),
        }
        if self.method == "vispruner":
            canonical |= {"budget": self.budget, "important": self.important, "positions": self.positions}
        if self.method == "fastv":
            canonical |= {"budget": self.budget, "layer": self.layer}
        if self.outputs != "refused":
            canonical["outputs"] = self.outputs
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] | Mapping[str, Any] | Schedule, *, semantics: str | None = None
    ) -> Schedule:
        """A schedule from a YAML file, the name of a preset, or its keys.

        Args:
            source: any of these, or a schedule.
            semantics: in place of the source's own.

        Raises:
            ScheduleError: neither a file nor a preset, not YAML, or not a valid schedule.
        """
        if semantics is not None:
            return cls.load(source).with_semantics(semantics)
        if isinstance(source, Schedule):
            return source
        if isinstance(source, Mapping):
            return cls(**{str(key): value for key, value in source.items()})
        if str(source) in PRESETS:
            return PRESETS[str(source)]
        path = Path(source)
        if not path.is_file():
            raise ScheduleError(
                f"No schedule {str(source)!r}: it is neither a file nor a preset. Presets: {', '.join(PRESETS)}."
            )
        return cls.from_yaml(path.read_text(encoding="utf-8", errors="replace"), name=str(path))

    @classmethod
    def from_manifest(cls, data: dict[str, Any]) -> Schedule:
        """The schedule that an artifact's manifest holds; without semantics it is of the time when `reference` was the
        default."""
        return cls(**{"semantics": "reference", **data})

    @classmethod
    def from_yaml(cls, text: str, name: str = "schedule") -> Schedule:
        """A schedule from YAML text; `name` appears in error messages.

        Raises:
            ScheduleError: not YAML, not a mapping, or not a valid schedule.
        """
        try:
            data = yaml.load(text, Loader=_UniqueKeyLoader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
            raise ScheduleError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ScheduleError(f"{name} must hold a mapping such as `layers: [2, 5, 8]`, found {type(data).__name__}.")
        try:
            return cls(**{str(key): value for key, value in data.items()})
        except ScheduleError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ScheduleError(_explain(error.__cause__, name)) from error.__cause__
            raise


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; plain YAML keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _explain(error: ValidationError, name: str) -> str:
    """One paragraph from pydantic's list of problems."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part not in ("int", "float"))
        text = f"{where}: {_in_words(item)}" if where else _in_words(item)
        if text not in problems:
            problems.append(text)
    return f"{name} is not valid: {'; '.join(problems)}."


_FORMS: dict[str, str] = {
    "layers": "a list of layers, such as [2, 5, 8]",
    "sites": "a list of sites, such as [{at: cross_modal.2, prune: 0.1}]",
    "merge": "a mapping, such as {image: 0.3, text: 0.2}",
    "at": "the address of an attention, such as cross_modal.2",
}
_KINDS: dict[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
}
_LIMITS: dict[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "finite_number": ("", "a finite number"),
}


def _in_words(item: ErrorDetails) -> str:
    """A problem as the user would say it: what is expected there, and what was given."""
    kind, place = item["type"], item["loc"]
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "is required, and is not there"
    key = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        expected = f"{words} {item.get('ctx', {}).get(limit, '')}".strip()
    elif kind == "literal_error":
        expected = f"one of {', '.join(get_args(_CHOICES[key]))}"
    elif kind in _KINDS and key != "at":
        expected = _KINDS[kind]
    elif place and isinstance(place[-1], int):
        expected = "a mapping, such as {at: cross_modal.2, prune: 0.1}"
    else:
        expected = _FORMS.get(key, "another kind of value")
    return f"expected {expected}, got {item['input']!r}"


_CHOICES: dict[str, Any] = {"method": Method, "semantics": Semantics, "positions": Positions, "outputs": TokenOutputs}


def _unknown_key(place: tuple[int | str, ...]) -> str:
    *outer, key = place
    owner: type[BaseModel] = Merge if "merge" in outer else Site if "sites" in outer else Schedule
    near = difflib.get_close_matches(str(key), owner.model_fields, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {meant}known keys: {', '.join(owner.model_fields)}"


_BUDGETS: dict[str, Any] = {"prune": 0.1, "merge": Merge(image=0.3, text=0.2)}
_METER: dict[str, Any] = {"prune": 0.3, "merge": Merge(image=0.5, text=0.2)}


def _with_tower(tower: float, **budgets: Any) -> Schedule:
    """METER's schedule with merging inside its image tower as well, since most of its arithmetic is before the first
    cross-modal layer; the share is merged at three of the tower's eleven layers."""
    inside = tuple(Site(at=f"vision.{layer}", merge=Merge(image=tower)) for layer in (2, 5, 8))
    return Schedule(sites=inside + tuple(Site(at=f"cross_modal.{layer}", **budgets) for layer in (0, 2, 4, 6)))


PRESETS: dict[str, Schedule] = {
    "vilt-vqa": Schedule(layers=(2, 5, 8), **_BUDGETS),
    "vilt-nlvr2": Schedule(layers=(2, 5, 8), **_BUDGETS),
    "vilt-ve": Schedule(layers=(2, 4, 6, 8), **_BUDGETS),
    "vilt-irtr": Schedule(layers=(2, 4, 6, 8), **_BUDGETS),
    "meter-vqa": Schedule(layers=(0, 2, 4, 6), prune=0.2, merge=Merge(image=0.2, text=0.2)),
    "meter-ve": Schedule(layers=(0, 2, 4, 6), **_METER),
    "meter-nlvr2": Schedule(layers=(2, 4, 6), **_METER),
    "meter-irtr": Schedule(layers=(2, 4, 6), prune=0.2, merge=Merge(image=0.5, text=0.2)),
    "meter-vqa-tower": _with_tower(0.2, prune=0.2, merge=Merge(image=0.2, text=0.2)),
    "meter-ve-tower": _with_tower(0.25, **_METER),
    "lossless": Schedule(method="lossless"),
}
"""Table 6 of the paper; and for METER, where that leaves most of the arithmetic alone, with the tower (`-tower`), whose
accuracy nobody has measured."""


# --- models that say what they were trained with ----------------------------------------------------------------------


def trained_with(configs: Iterable[Any]) -> Schedule | None:
    """The schedule that a model was fine-tuned with, where its configuration says so: the key `pumer_schedule`.

    Args:
        configs: of the model and of the modules in it, the outer ones first; the first that has the key counts.

    Raises:
        ScheduleError: it is not a valid schedule.
    """
    found = (getattr(config, "pumer_schedule", None) for config in configs)
    given = next((value for value in found if value is not None), None)
    if given is None:
        return None
    if not isinstance(given, str | Mapping):
        raise ScheduleError(
            f"pumer_schedule of the model's configuration is {given!r}; it must be a preset, a file or a mapping."
        )
    return Schedule.load(given)


def as_trained(schedule: Schedule, configs: Iterable[Any]) -> Schedule:
    """`schedule` under the semantics that the model was fine-tuned with, where it names none itself.

    Raises:
        ScheduleError: see `trained_with`.
    """
    if schedule.method != "pumer" or schedule.names_semantics:
        return schedule
    trained = trained_with(configs)
    if trained is None or trained.method != "pumer" or not trained.names_semantics:
        return schedule
    return schedule.with_semantics(trained.semantics)
