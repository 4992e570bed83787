"""What every exporter has in common: options, a build in memory, and what the build is proved by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from ..artifacts.options import Options as Options
from ..artifacts.options import Precision as Precision
from ..artifacts.session import Session
from ..capture.capture import Program
from ..errors import UsageError
from ..files import check_writable
from ..reduce import Reduced


class Build(Protocol):
    """An artifact before it is written.

    Attributes:
        inputs: names, in order.
        outputs: the model's own outputs, in order.
        decisions: names of the reducers' decisions: outputs after the model's own, or inner values.
    """

    @property
    def inputs(self) -> list[str]:
        """See above."""

    @property
    def outputs(self) -> list[str]:
        """See above."""

    @property
    def decisions(self) -> list[str]:
        """See above."""


@dataclass(frozen=True)
class Evidence:
    """What a written artifact is proved by.

    Attributes:
        session: gives the outputs.
        reopen: opens such a session again.
        open_with_decisions: opens what gives the decisions, where the artifact does not give them itself.
        reason: why the artifact cannot run here, where it cannot.
        stand_in: what is run in place of the artifact, which cannot run here; empty where it is the artifact itself.
    """

    session: Session
    reopen: Callable[[], Session]
    open_with_decisions: Callable[[], Session] | None = None
    stand_in: str = ""
    reason: str = ""


OptionsT = TypeVar("OptionsT", bound=Options)
BuildT = TypeVar("BuildT", bound=Build)


class Writer(ABC, Generic[OptionsT, BuildT]):
    """Writes artifacts of one format; its record in `artifacts.formats` says which.

    Attributes:
        options_class: what it takes.
    """

    options_class: ClassVar[type[Options]]

    def __init__(self, options: OptionsT, progress: Callable[[str], None] = lambda text: None) -> None:
        self.options = options
        self.progress = progress

    def check(self, *, dynamic_batch: bool, verify: bool) -> None:
        """Refuse, before any long work, what cannot be done here.

        Args:
            dynamic_batch: whether the program has an open batch.
            verify: whether the artifact is to be proved.

        Raises:
            UsageError: a package, a device or a target is missing, or options that do not fit together.
        """
        if self.options.profiles and not dynamic_batch:
            raise UsageError(
                "A profile gives the sizes of an open batch, but the program was captured with a fixed one. Capture "
                "with dynamic_batch=True, or leave the profile out."
            )

    def check_path(self, path: Path) -> None:
        """Refuse a path that cannot be written.

        Raises:
            UsageError: it, or a file that goes with it, cannot be.
        """
        check_writable(path)

    @abstractmethod
    def build(self, reduced: Reduced | Program) -> BuildT:
        """Convert the graph of a reduced program, or of a captured one as it is."""

    @abstractmethod
    def save(self, build: BuildT, path: Path, *, with_decisions: bool) -> list[Path]:
        """Write a build; the artifact itself is the last of the files."""

    def companion(self, file: Path, path: Path) -> Path:
        """Where a file that `save` wrote besides the artifact goes, for an artifact at `path`."""
        return path.with_name(file.name)

    @abstractmethod
    def evidence(self, build: BuildT, files: Sequence[Path]) -> Evidence:
        """Open what was written, for its proof."""

    def record(self, manifest: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Put the manifest into the artifact, where the format has room for one; `files` as `save` gives them."""

    def describe(self, build: BuildT) -> dict[str, Any]:
        """What the manifest says of the options and of the build, as JSON holds it; paths of this machine do not."""
        described = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.options).items()
            if not isinstance(value, Path)
        }
        return {**described, "profiles": [str(profile) for profile in self.options.profiles]}
