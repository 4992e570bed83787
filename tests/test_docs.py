"""The code in docs/ runs as it is printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pumer_compile as pumer
from pumer_compile.errors import NoRuleError
from pumer_compile.passes import rules
from tests.models import Config, inputs_for

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
