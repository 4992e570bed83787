"""The code in docs/ and the README runs as it is printed, and their figures and links are what they should be."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pumer_compile as pumer
from benchmarks import plans, readme
from pumer_compile.analysis import rules
from pumer_compile.errors import NoRuleError, ScheduleError
from pumer_compile.methods import METHODS
from tests.support.commands import done
from tests.support.llava import model, program, tensors
from tests.support.models import Config, inputs_for
from tests.support.visual import logits_by_hand, visual_cues

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
FLIP = torch.ops.aten.flip.default


def code_in(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the blocks of adding-a-rule.md define, without the rule in force."""
    blocks = code_in("adding-a-rule.md")
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "adding_a_rule"}
    own = rules._RULES.pop(FLIP)  # the table has had one since; the page is about adding it
    try:
        for block in blocks:
            exec(compile(block, "adding-a-rule.md", "exec", dont_inherit=True), names)
        assert rules._RULES.pop(FLIP) is names["flip"]
        yield names
    finally:
        rules._RULES[FLIP] = own


def test_without_the_rule_the_error_is_the_one_on_the_page(page: dict[str, Any]) -> None:
    program = pumer.capture(page["Flipping"](Config()), inputs_for(Config()))
    with pytest.raises(NoRuleError) as error:
        pumer.reduce(program, page["SCHEDULE"])
    message = str(error.value)
    assert re.match(r"No rule says how aten\.flip\.default \(node flip", message)
    assert "adding-a-rule.md:" in message  # the line that called it
    assert re.search(r"carries the token axis \[text:\d+ \| image:\d+\] of its input \w+ \(dimension 1\)", message)
    assert "Add a rule for aten.flip.default" in message and "docs/adding-a-rule.md" in message


def test_the_tests_on_the_page_pass_with_the_rule(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rules._RULES, FLIP, page["flip"])
    found = [name for name in page if name.startswith("test_")]
    assert len(found) == 2
    for name in found:
        page[name]()


# --- adding-a-method.md -----------------------------------------------------------------------------------------------


@pytest.fixture
def method() -> Iterator[dict[str, Any]]:
    """What adding-a-method.md defines; the method is gone afterwards."""
    (block,) = code_in("adding-a-method.md")
    assert len(block.splitlines()) <= 60
    names: dict[str, Any] = {"__name__": "adding_a_method"}
    try:
        exec(compile(block, "adding-a-method.md", "exec", dont_inherit=True), names)
        yield names
    finally:
        METHODS.pop("longest", None)


def test_the_method_on_the_page_is_all_it_takes(method: dict[str, Any]) -> None:
    """Two samples keep other tokens, and both are what transformers gives for the image of these tokens alone."""
    schedule = pumer.Schedule.from_yaml("method: longest\nbudget: 30\n")
    assert isinstance(schedule, method["Longest"]) and len(schedule.sha256) == 64
    reduced = pumer.reduce(program(), schedule)
    inputs = tensors()
    features, _ = visual_cues(model(), inputs["pixel_values"])
    kept = features.norm(dim=-1).argsort(descending=True, stable=True)[:, :30].sort().values
    assert not torch.equal(kept[0], kept[1])
    with torch.no_grad():
        found = reduced.module(**inputs)["logits"]
    torch.testing.assert_close(found, logits_by_hand(model(), inputs, kept, features), atol=1e-4, rtol=0)
    (site,) = reduced.plan.sites
    assert (site.before, site.after) == ({"prompt_image": 144}, {"prompt_image": 30})


def test_a_wrong_key_of_the_method_on_the_page_is_refused(method: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=r"`layer` is for .*`method: fastv`; leave out `layer`"):
        pumer.Schedule(method="longest", budget=3, layer=1)
    with pytest.raises(ScheduleError, match="`method: longest` needs a `budget`, the image tokens to keep"):
        pumer.Schedule(method="longest")
    with pytest.raises(ValueError, match=r"`method: fastv` is .* already"):
        type("Other", (METHODS["fastv"],), {})


# --- Tutorials, the first page, figures, links ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fusion", "schedule", "training"])
def test_tutorials_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own assertions hold; each is read from the top, in the root of a checkout."""
    monkeypatch.chdir(ROOT)
    blocks = code_in(f"tutorials/{name}.md")
    assert blocks
    names: dict[str, Any] = {"__name__": name}
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec", dont_inherit=True), names)


def test_the_first_page_is_short_and_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 160
    shown = re.search(r"^\$ pumer-compile (plan .*)\n((?:.+\n)+)", page, re.MULTILINE)
    assert shown
    monkeypatch.chdir(ROOT)
    printed = [line.rstrip() for line in done(*shown[1].split()).out.splitlines()]
    # The page leaves out what the next command is.
    expected = shown[2].splitlines()
    assert printed[: len(expected)] == expected
    assert printed[len(expected)].startswith("Fixed shapes:")
    ratio = re.search(r"([\d.]+)x fewer", " ".join(expected))
    assert ratio and ratio[1] + "x" == readme.demo_fewer()


@pytest.mark.parametrize("page", list(readme.SECTIONS))
def test_figures_are_those_of_the_results(page: str) -> None:
    """`python -m benchmarks.readme` changes nothing; a figure that somebody typed would go."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme.filled(page) == text
    row = next(line for line in text.splitlines() if re.match(r"\| .*\d\.\d", line))
    assert readme.filled(page) != text.replace(row, "| typed |")


def test_the_figure_is_drawn_from_the_plans() -> None:
    found = readme.planned()
    assert plans.FIGURE.read_text(encoding="utf-8") == plans.figure(found)
    before, layers = plans.counts(found["ViLT-B/32"]["vilt-vqa"])
    assert before == (145, 40) and layers[0] == (145, 40) and layers[2] == (87, 32) and layers[-1] == (31, 21)


def test_a_ratio_is_the_same_on_every_page() -> None:
    """Of a schedule that has a name of its own: beside it stands today's ratio, wherever it stands in a table."""
    ratios = {
        name: f"{plan['multiply_adds']['ratio']:.2f}x" for p in readme.planned().values() for name, plan in p.items()
    }
    seen = 0
    for path in (ROOT / "README.md", DOCS / "results.md"):
        header: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if "Fewer multiply-adds" in cells or "Fewer" in cells:
                header = cells
            elif header and line.startswith("|") and not line.startswith("| ---"):
                words = set(re.findall(r"[\w-]+", " ".join(cells[:3])))
                named = [name for name in ratios if name in words]
                column = header.index("Fewer multiply-adds" if "Fewer multiply-adds" in header else "Fewer")
                if named:
                    seen += 1
                    assert cells[column] == ratios[named[0]], line
            elif not line.startswith("|"):
                header = []
    assert seen > 15


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^()\s]+)\)", prose):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


# --- Docstrings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pumer.__all__)
def test_public_names_say_what_they_take_give_and_refuse(name: str) -> None:
    """Functions: every argument, what they give, what they raise. Classes: what they hold or take, and every method."""
    thing = getattr(pumer, name)
    if inspect.isfunction(thing):
        check_function(thing)
        return
    assert inspect.getdoc(thing)
    if not issubclass(thing, Exception):
        assert re.search(r"^(Args|Attributes):$", inspect.getdoc(thing) or "", re.MULTILINE)
    for method, function in inspect.getmembers(thing, inspect.isfunction):
        if not method.startswith("_") and function.__module__.startswith("pumer_compile"):
            assert inspect.getdoc(function), f"{name}.{method}"


def check_function(function: Any) -> None:
    said = inspect.getdoc(function) or ""
    sections = dict(re.findall(r"^(Args|Returns|Raises):\n((?: {4}.*\n|\n)+)", said + "\n", re.MULTILINE))
    signature = inspect.signature(function)
    described = re.findall(r"^ {4}(\w+): ", sections["Args"], re.MULTILINE)
    assert described == list(signature.parameters), function.__name__
    assert "Returns" in sections or signature.return_annotation in (None, "None")
    assert "Error: " in sections["Raises"]


def test_a_docstring_without_an_argument_is_seen() -> None:
    def bad(first: int, second: int) -> int:
        """Do it.

        Args:
            first: is here.

        Returns:
            A number.

        Raises:
            UsageError: never.
        """
        return first + second

    with pytest.raises(AssertionError):
        check_function(bad)
