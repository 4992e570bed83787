"""Files that reduce the same captured models are run by one process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.scheduling import TESTS, ByCaptures, group

pytestmark = pytest.mark.fast
FAMILIES = "prompt_families"


def imports_captured(file: Path) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and (node.module or "").endswith(f".{FAMILIES}")
        and "captured" in {alias.name for alias in node.names}
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    )


def test_files_that_share_captures_are_one_group() -> None:
    files = sorted(file for file in TESTS.rglob("test_*.py"))
    names = {file: str(file.relative_to(TESTS.parent)) for file in files}
    together = {file for file in files if group(names[file]) != names[file]}
    assert together == {file for file in files if imports_captured(file)}
    assert len(together) > 9 and len({group(names[file]) for file in together}) == 1


def test_the_scheduler_splits_by_group() -> None:
    split = ByCaptures._split_scope
    scheduler = object.__new__(ByCaptures)
    rows, dart = (
        split(scheduler, f"tests/{file}::test_a[x::y]")
        for file in ("architectures/test_prompt_rows.py", "methods/test_dart.py")
    )
    assert rows == dart
    assert split(scheduler, "tests/test_plan.py::test_a") == "tests/test_plan.py"
