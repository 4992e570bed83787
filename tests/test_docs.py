"""The code in docs/ runs as it is printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pumer_compile as pumer
from pumer_compile.analysis import rules
from pumer_compile.errors import NoRuleError, ScheduleError
from pumer_compile.methods import METHODS
from tests.support.llava import model, program, tensors
from tests.support.models import Config, inputs_for
from tests.support.visual import logits_by_hand, visual_cues

DOCS = Path(__file__).parents[1] / "docs"
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
