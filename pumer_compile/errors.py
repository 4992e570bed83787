"""Errors a user can act on.

Every message is one readable paragraph: what was looked for, what was found, and the remedy. The command line
prints it without a traceback (`-v` adds one) and exits with `exit_code_of` it. The rule is by class, here alone:

- 2, bad usage: what was asked for does not fit (an option, a schedule, a path, sample inputs, a library or device that
  is not there). Another command, or another machine, is the remedy. `UsageError` and the classes below it.
- 3: the artifact was compared with eager PyTorch and differs. `ParityError`.
- 1, failed: all else. The request was right, and it could not be done: a damaged model file, a graph that cannot be
  followed, a runtime, memory or a disk that gave up.
"""

from __future__ import annotations

from typing import Any

FAILED, BAD_USAGE, PARITY_FAILED = 1, 2, 3


class PumerError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code: int = FAILED


class UsageError(PumerError):
    """What the user asked for cannot be done as asked: a flag, a file, an input, a schedule."""

    exit_code = BAD_USAGE


class ScheduleError(UsageError):
    """A schedule that is not valid: unknown key, ratio out of range, unknown preset."""


class LocateError(UsageError):
    """A schedule that names a site which the graph does not have."""


class PlanError(UsageError):
    """A budget that a site cannot meet."""


class CaptureError(PumerError):
    """A model that could not be loaded or traced."""


class AxisError(PumerError):
    """A graph whose token axes could not be followed."""


class SiteError(UsageError, AxisError):
    """A site of the schedule behind which this model's graph cannot follow; another place is the remedy."""


class NoRuleError(AxisError):
    """An operator without a rule touches a token axis."""


class VerifyError(PumerError):
    """The rewritten graph does not do what the plan says."""


class OutputsError(UsageError, VerifyError):
    """Outputs with an entry for each token, whose tokens are reduced: the schedule must say what becomes of them."""


class ExportError(PumerError):
    """An artifact could not be written or is not valid."""


class ParityError(PumerError):
    """An artifact disagrees with the eager model; `report` is the `ParityReport`, where there is one."""

    exit_code = PARITY_FAILED

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


def exit_code_of(error: BaseException) -> int:
    """What the command line exits with after this error; any that is not ours is a failure."""
    return error.exit_code if isinstance(error, PumerError) else FAILED
