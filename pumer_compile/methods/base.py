"""What a reduction method is: the keys that a schedule has for it, and facts that the rest of the compiler asks for.

A method is one file of this folder, with one subclass of `Method`. Nothing outside compares a method's or a semantics'
name. Reading a schedule loads no torch: what needs it is imported inside the functions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ..added_inputs import AddedInput
from ..errors import ScheduleError
from .about import About
from .proposing import Ask, Outline
from .reading import class_of, explain, read_yaml

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream

TokenOutputs = Literal["refused", "reduced", "restored"]
ActsOn = Literal["tower", "rows", "layers"]
"""Where image tokens of a prompt are reduced: where features leave the vision tower (as long as each makes one row of
the prompt, or else these rows), the rows that enter the prompt, or after layers of the language model."""


class Marking(NamedTuple):
    """How image tokens of a prompt are to be marked.

    Attributes:
        acts_on: where.
        votes: whether the attention of the vision tower is to be found that votes for them.
        early: whether, where the tower's tokens vote themselves (it has no class token), the mark is to begin at the
            token of text in front of an image, and the image's last token to stay; votes then come in the order of the
            tower.
    """

    acts_on: ActsOn
    votes: bool
    early: bool = False


METHODS: dict[str, type[Method]] = {}
"""Every method by its name."""
PRESETS: dict[str, Method] = {}
"""Every method's presets by their names."""


class Method(BaseModel):
    """A reduction schedule: a method and its keys. `Schedule(method="fastv", ...)` is the class of that method.

    Every method has these keys; the others stand with the method's class, a file of `pumer_compile/methods`.

    Args:
        method: by which algorithm. `pumer`, the default, is text-informed pruning, then modality-aware merging; `tome`
            merges alone; `vispruner` and `fastv` keep image tokens of a language model's prompt; `lossless` reduces
            nothing and runs the exact passes alone.
        semantics: of a method that has several. One that has one meaning calls it `reference`.
        outputs: what becomes of outputs with one entry for each token: `refused` (an error), `reduced` (one entry for
            each token that is left), or `restored` (every original position gets the token it was merged into; pruned
            ones get zeros, and an extra output `<name>.kept` says which those are).

    Raises:
        ScheduleError: an unknown method or key, or a value that the key cannot have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: ClassVar[About] = About("", "", "")
    """For those who choose."""
    needs_prompt: ClassVar[bool] = False
    """It reduces the image tokens that stand in a language model's prompt."""
    acts_on: ClassVar[ActsOn] = "layers"
    """Where it reduces those."""
    reads_tower: ClassVar[bool] = False
    """It reads the attention of a vision tower."""
    exact: ClassVar[bool] = False
    """It has no reducer, and gives the outputs of the model."""
    before_prompt: ClassVar[bool] = False
    """It is done before the prompt: the vision component of a model can be compiled by itself."""
    cache_lengths: ClassVar[Literal["uniform", "by_layer"]] = "uniform"
    """Whether the caches of all language layers have one length."""
    trained_semantics: ClassVar[bool] = False
    """Its semantics are those that a model was fine-tuned with, where its configuration says so."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Schedules by name: their keys."""
    wants: ClassVar[str] = ""
    """What a model must have for it to propose a schedule; with `needs_prompt` an image in a prompt."""
    control: ClassVar[bool] = False
    """It looks at nothing: other methods are compared with it."""
    suggested: ClassVar[int] = 0
    """How early it is suggested for a model that was trained with no schedule: the largest first; 0: never."""

    method: str = "pumer"
    semantics: str = "reference"
    outputs: TokenOutputs = "refused"

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A class whose `method` is a name is a method; one without is what several share."""
        for name in get_args(cls.model_fields["method"].annotation):
            if name in METHODS:
                raise ValueError(f"`method: {name}` is {METHODS[name].__module__}.{METHODS[name].__qualname__} already")
            METHODS[name] = cls
            PRESETS.update((preset, cls(**keys)) for preset, keys in cls.presets.items())

    def __new__(cls, /, **data: Any) -> Method:
        """An object of the class that `method:` names."""
        found = class_of(data, "this schedule") if cls is Method else cls
        return super().__new__(found)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ScheduleError(explain(error, "this schedule", type(self))) from error

    # --- what is true of it -------------------------------------------------------------------------------------------

    @property
    def names_semantics(self) -> bool:
        """Whether it was made with semantics, rather than left to the default."""
        return "semantics" in self.model_fields_set

    @property
    def described(self) -> str:
        """Method and semantics in words, such as `pumer, semantics safe`."""
        several = len(get_args(type(self).model_fields["semantics"].annotation)) > 1
        return self.method + (f", semantics {self.semantics}" if several else "")

    @property
    def renumbers(self) -> bool:
        """Whether positions are counted anew over the tokens that are left."""
        return getattr(self, "positions", "compact") == "compact"

    @property
    def renumbers_layers(self) -> bool:
        """Whether they are inside the language model, so that its layers have positions of their own."""
        return self.needs_prompt and self.acts_on == "layers" and self.renumbers

    @property
    def revision(self) -> int:
        """Counts what the same keys have meant so far, from 1: an artifact made before means what they meant then."""
        return 1

    def giving(self, outputs: TokenOutputs) -> Method:
        """The same schedule, with this for outputs that have an entry for each token."""
        return self.model_copy(update={"outputs": outputs})

    def to_yaml(self) -> str:
        """As a user would write it."""
        import yaml

        keys = self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
        keys = {"method": self.method, "semantics": self.semantics, **keys}
        return str(yaml.safe_dump(keys, sort_keys=False, default_flow_style=None, width=76)).rstrip()

    def with_semantics(self, semantics: str) -> Method:
        """The same schedule under semantics that it need not name itself.

        Raises:
            ScheduleError: the method does not have them.
        """
        return type(self)(**{**self.model_dump(exclude_none=True), "semantics": semantics})

    def canonical(self) -> dict[str, Any]:
        """What its hash is of: schedules that do the same have the same. A method adds its keys."""
        outputs = {} if self.outputs == "refused" else {"outputs": self.outputs}
        return {"method": self.method, "semantics": self.semantics, "sites": [], **outputs}

    @property
    def sha256(self) -> str:
        """Hash of the schedule's canonical form."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The attention nodes that the schedule itself names, such as `cross_modal.2`."""
        return ()

    @property
    def marks(self) -> Marking | None:
        """How image tokens of a prompt are to be marked; None where no prompt is needed."""
        return Marking(self.acts_on, self.reads_tower) if self.needs_prompt else None

    @property
    def adds(self) -> dict[str, AddedInput]:
        """Inputs that it adds to those of the model, by name; `Signal` has one of the same name for each."""
        return {}

    # --- what it proposes ---------------------------------------------------------------------------------------------

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """Its schedules for a model that nobody has chosen one for, the preferred one first: a later one is for a graph
        that refuses those before it. None where the model has nothing that it acts on.

        Args:
            outline: the model.
            ask: chooses the numbers; which are asked for depends on the outline alone.
        """
        yield from ()

    @classmethod
    def in_either_order(cls, **keys: Any) -> Iterator[Method]:
        """With positions that are counted anew, or else the original ones, where there is a choice; results that do not
        hang on near-ties where it has those."""
        if "stable" in get_args(cls.model_fields["semantics"].annotation):
            keys = {"semantics": "stable", **keys}
        choices = get_args(cls.model_fields["positions"].annotation) if "positions" in cls.model_fields else ()
        for positions in choices if len(choices) > 1 else (None,):
            yield cls(**keys, **({} if positions is None else {"positions": positions}))

    # --- what it does -------------------------------------------------------------------------------------------------

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """Where it reduces, in execution order.

        Raises:
            LocateError: a site that does not exist, or has nothing to reduce or to read.
            PlanError: budgets for tokens that a site does not have.
        """
        raise NotImplementedError

    def reducers(self, site: Site, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """The reducers of a site by stream; none leaves the site out.

        Args:
            site: one of `find_sites`.
            streams: its tokens, as the sites before it leave them.

        Raises:
            PlanError: a budget that cannot be met, or nothing to reduce.
        """
        made = {stream.name: self.reducer(site, stream) for stream in streams}
        return {name: reducer for name, reducer in made.items() if reducer is not None}

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """The reducer of one stream; None leaves it as it is.

        Raises:
            PlanError: a budget that cannot be met.
        """
        raise NotImplementedError

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """What else is written otherwise, beside the reducers: a published softmax, renumbered positions.

        Raises:
            UsageError: an input makes it impossible.
        """
        return {}

    # --- reading ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] | Mapping[str, Any] | Method, *, semantics: str | None = None
    ) -> Method:
        """A schedule from a YAML file, the name of a preset, or its keys.

        Args:
            source: any of these, or a schedule.
            semantics: in place of the source's own.

        Raises:
            ScheduleError: neither a file nor a preset, not YAML, or not a valid schedule.
        """
        if semantics is not None:
            return cls.load(source).with_semantics(semantics)
        if isinstance(source, Method):
            return source
        if isinstance(source, Mapping):
            return Method(**{str(key): value for key, value in source.items()})
        if str(source) in PRESETS:
            return PRESETS[str(source)]
        path = Path(source)
        if not path.is_file():
            raise ScheduleError(
                f"No schedule {str(source)!r}: it is neither a file nor a preset. Presets: {', '.join(PRESETS)}."
            )
        return cls.from_yaml(path.read_text(encoding="utf-8", errors="replace"), name=str(path))

    @classmethod
    def from_manifest(cls, data: dict[str, Any]) -> Method:
        """The schedule that an artifact's manifest holds; without semantics it is of the time when `reference` was the
        default."""
        return Method(**{"semantics": "reference", **data})

    @classmethod
    def from_yaml(cls, text: str, name: str = "schedule") -> Method:
        """A schedule from YAML text; `name` appears in error messages.

        Raises:
            ScheduleError: not YAML, not a mapping, or not a valid schedule.
        """
        keys = read_yaml(text, name)
        found = class_of(keys, name)
        try:
            return found(**keys)
        except ScheduleError as error:
            if isinstance(error.__cause__, ValidationError):
                raise ScheduleError(explain(error.__cause__, name, found)) from error.__cause__
            raise
