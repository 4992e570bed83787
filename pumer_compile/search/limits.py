"""What a schedule may cost and lose, as a user says it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import UsageError

_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Limits:
    """At most so much of each; None: any.

    Attributes:
        multiply_adds: share of the unreduced model's.
        latency: milliseconds of a call.
        memory: bytes that an artifact adds to a process.
        max_drop: of the measure of quality, absolute (0.01 is a point of a percentage).
    """

    multiply_adds: float | None = None
    latency: float | None = None
    memory: int | None = None
    max_drop: float | None = None

    @property
    def measured(self) -> bool:
        """Whether artifacts have to be measured to know."""
        return self.latency is not None or self.memory is not None

    @property
    def described(self) -> str:
        """In words."""
        parts = []
        if self.multiply_adds is not None:
            parts.append(f"at most {self.multiply_adds:.4g} of the multiply-adds")
        if self.latency is not None:
            parts.append(f"at most {self.latency:.4g} ms a call")
        if self.memory is not None:
            parts.append(f"at most {self.memory / 2**20:.4g} MiB")
        if self.max_drop is not None:
            parts.append(f"a drop of at most {self.max_drop:.4g}")
        return ", ".join(parts) or "none"


def share(text: str, option: str) -> float:
    """A share above 0, of `0.5` or `50%`.

    Raises:
        UsageError: it is none.
    """
    number = _number(text.removesuffix("%"), text, option, "a share such as 0.5 or 50%")
    found = number / 100 if text.endswith("%") else number
    if not 0 <= found <= 1:
        raise UsageError(f"{option} {text!r} is not a share from 0 to 1 (or 0% to 100%).")
    return found


def milliseconds(text: str, option: str) -> float:
    """Of `50ms`, `0.05s` or `50` (milliseconds).

    Raises:
        UsageError: it is no time.
    """
    return _with_unit(text, option, _MILLISECONDS, "ms", "a time such as 50ms or 0.05s")


def bytes_of(text: str, option: str) -> int:
    """Of `2GiB`, `500MB`.

    Raises:
        UsageError: it is no amount.
    """
    return int(_with_unit(text, option, _BYTES, None, "an amount of memory such as 2GiB or 500MB"))


def _with_unit(text: str, option: str, units: dict[str, float], usual: str | None, form: str) -> float:
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*([A-Za-z]*)\s*", text)
    unit = (match[2].lower() or usual) if match else None
    if match is None or unit not in units:
        raise UsageError(f"{option} {text!r} is not {form}.")
    found = _number(match[1], text, option, form) * units[unit]
    if found <= 0:
        raise UsageError(f"{option} {text!r} is not above zero.")
    return found


def _number(part: str, text: str, option: str, form: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not {form}.") from None
