"""Errors a user can act on.

Every message is one readable paragraph: what was looked for, what was found, and the remedy. The command line
prints it without a traceback (`-v` adds one) and exits with `exit_code`.
"""

from __future__ import annotations

from typing import Any


class PumerError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code: int = 1


class UsageError(PumerError):
    """What the user asked for cannot be done as asked: a flag, a file, an input, a schedule."""

    exit_code = 2


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


class NoRuleError(AxisError):
    """An operator without a rule touches a token axis."""


class VerifyError(PumerError):
    """The rewritten graph does not do what the plan says."""


class ExportError(PumerError):
    """An artifact could not be written or is not valid."""


class ParityError(PumerError):
    """An artifact disagrees with the eager model; `report` is the `ParityReport`, where there is one."""

    exit_code = 3

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
