"""Imports go down the list of stages, never up: what exporters and runtimes share knows neither of them; and functions
fit a screen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pumer_compile

pytestmark = pytest.mark.fast

PACKAGE = Path(pumer_compile.__file__).parent
# From the lowest to the highest; what is not named here is below them all.
ORDER = (
    "reducers",
    "distill",
    "analysis",
    "rewrite",
    "methods",
    "schedule",
    "passes",
    "frontends",
    "capture",
    "reduce",
    "inspection",
    "torch_compile",
    "artifacts",
    "runtimes",
    "exporters",
    "generation",
    "parity",
    "bench",
    "search",
    "evaluation",
    "report",
    "cli",
)
STAGES = {part: number for number, part in enumerate(ORDER, start=1)}
# The door of the command, and the one function that proves what it exports before it publishes it.
EXCEPT = {("__main__.py", "cli"), ("exporters/publish.py", "parity")}


def stage(part: str) -> int:
    return STAGES.get(part, 0)


def imported(tree: ast.AST, inside: tuple[str, ...]) -> Iterator[str]:
    """What a file of the folder `inside` imports of the package, by its first part (`exporters`); a name that is
    imported for types alone is no import when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pumer_compile."))
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            path = (node.module or "").split(".") if node.module else []
            if node.level:
                outer = list(inside[: len(inside) - node.level + 1])
                yield from [[*outer, *path][0]] if outer or path else names
            elif path[:1] == ["pumer_compile"]:
                yield from [path[1]] if path[1:] else names
        else:
            yield from imported(node, inside)


def arrows() -> Iterator[tuple[str, str]]:
    """File and part of the package, for every import."""
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        yield from ((place.as_posix(), part) for part in imported(tree, place.parts[:-1]))


def first_part(place: str) -> str:
    return place.partition("/")[0].removesuffix(".py")


def test_no_import_goes_up() -> None:
    found = list(arrows())
    assert len(found) > 300
    upward = {(place, part) for place, part in found if stage(part) > stage(first_part(place))}
    assert upward == EXCEPT


def test_the_command_line_is_imported_by_nobody() -> None:
    cli = {"cli"}
    assert {place for place, part in arrows() if part in cli and first_part(place) not in cli} == {"__main__.py"}


def test_the_search_sees_every_form_of_import() -> None:
    forms = (
        "from . import cli_options\nfrom .exporters.base import Profile\nimport pumer_compile.bench.bench\n"
        "from pumer_compile import parity\nfrom pumer_compile.files import publish\nimport torch\n"
        "def f():\n    from .replay import Recorder\nif TYPE_CHECKING:\n    from .memory import Feeds\n"
    )
    assert list(imported(ast.parse(forms), ())) == ["cli_options", "exporters", "bench", "parity", "files", "replay"]
    nested = "from ..errors import E\nfrom .base import B\nfrom ... import cli\nfrom .. import manifest\n"
    assert list(imported(ast.parse(nested), ("exporters", "onnx_passes"))) == [
        "exporters",
        "exporters",
        "cli",
        "exporters",
    ]


LINES = 60


def lines(function: ast.FunctionDef | ast.AsyncFunctionDef, inside: str) -> int:
    """Of a function from its decorators on; of a command (its signature is the list of its options) the body's."""
    first = min(node.lineno for node in (function, *function.decorator_list))
    if inside == "cli":
        first = function.body[0].lineno
    assert function.end_lineno is not None
    return function.end_lineno - first + 1


def too_long(tree: ast.AST, inside: str = "") -> dict[str, int]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [(node.name, lines(node, inside)) for node in ast.walk(tree) if isinstance(node, kinds)]
    return {name: count for name, count in found if count > LINES}


def test_functions_fit_a_screen() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE).parts[0]
        assert not too_long(ast.parse(file.read_text(encoding="utf-8")), inside), file


def test_the_count_sees_decorators_methods_and_bodies() -> None:
    body = "    x = 1\n" * (LINES - 1)
    assert not too_long(ast.parse(f"def f():\n{body}"))
    assert too_long(ast.parse(f"def f():\n{body}    x = 2\n")) == {"f": LINES + 1}
    assert too_long(ast.parse(f"@first\n@second\nasync def f():\n{body}")) == {"f": LINES + 2}
    method = ast.parse(f"class C:\n    def f(\n        self,\n    ):\n{body.replace('    ', '        ')}")
    assert too_long(method) == {"f": LINES + 2} and not too_long(method, "cli")
    assert too_long(ast.parse(f"def f():\n{body}    x = 2\n    x = 3\n"), "cli") == {"f": LINES + 1}


def test_no_test_imports_another() -> None:
    """What tests share is in `tests/support`."""
    found = []
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tests":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found += [f"{file.name}: {name}" for name in names if ".test_" in name]
    assert found == []


METHOD_FILES, REDUCER_FILES, ROOT_FILES = 120, 150, 10
# The shelf of issue 18; PuMer's own files are older and longer, and what several share is no method.
SHELF = (
    "cdpruner dart divprune downsample evs fastervlm fastv holov pyramiddrop random sparsevlm uniform vidcom2 "
    "visionzip vispruner"
).split()


def test_nobody_outside_methods_compares_a_name() -> None:
    """Facts are asked: a new method touches its own file alone."""
    compared = re.compile(r"method (==|!=|in)|semantics (==|!=|in)")
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] != "methods":
            assert not compared.search(file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize("name", SHELF)
def test_a_method_is_one_short_file(name: str) -> None:
    for folder, most in (("methods", METHOD_FILES), ("reducers", REDUCER_FILES)):
        file = PACKAGE / folder / f"{name}.py"
        assert not file.exists() or len(file.read_text(encoding="utf-8").splitlines()) <= most, file
    assert (PACKAGE / "methods" / f"{name}.py").exists()


def test_few_files_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_FILES
