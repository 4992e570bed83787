"""Which test files go to one process of pytest-xdist: those that share what is captured once for a process."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

TESTS = Path(__file__).parent.parent
# A capture of a family takes one to four seconds, there are 45 of them, and a dozen files reduce them.
_SHARES = re.compile(r"^from tests\.support\.prompt_families import .*\bcaptured\b", re.MULTILINE)


@functools.cache
def group(file: str) -> str:
    """What a test file (`tests/methods/test_dart.py`) is run together with: the captures that it shares, or itself."""
    path = TESTS.parent / file
    shares = path.is_file() and _SHARES.search(path.read_text(encoding="utf-8"))
    return "captures of prompt families" if shares else file


class ByCaptures(LoadFileScheduling):
    """`--dist loadfile`, where files that share captures count as one."""

    def _split_scope(self, nodeid: str) -> str:
        return group(str(super()._split_scope(nodeid)))
