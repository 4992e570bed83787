"""Broken YAML, in plain words: the file, the line, and what to write."""

from __future__ import annotations

import pytest

from pumer_compile.errors import ScheduleError
from pumer_compile.schedule import Schedule

pytestmark = pytest.mark.fast

BROKEN = {
    "an open list": ("layers: [2, 5\nprune: 0.1", 1, "the list that begins with `[` is not closed"),
    "an open list at the end": ("prune: 0.1\nlayers: [2, 5\n", 2, "the list that begins with `[` is not closed"),
    "an open mapping": ("merge: {image: 0.3\nprune: 1", 1, "the mapping that begins with `{` is not closed"),
    "no colon": ("layers: [2]\nprune 0.1\nsemantics: safe", 2, "a key without a value"),
    "no space after a colon": ("layers: [2]\nprune:0.1\nsemantics: safe", 2, "a space after the colon"),
    "no space in the first line": ("prune:0.1\nlayers: [2]", 2, "the line before lacks a space"),
    "a tab": ("layers: [2]\n\tprune: 0.1", 2, "a tab; indent with spaces"),
    "an indent": ("layers: [2]\n  prune: 0.1", 2, "an indent (or a dash) that fits nothing above"),
    "two colons": ("layers: [2]\nprune: 0.1: 3", 2, "a second `:`"),
    "an open quote": ("layers: [2]\nsemantics: 'safe", 2, "a quote that is not closed"),
    "two documents": ("layers: [2]\nprune: 0.1\n---\nlayers: [3]", 3, "a second document"),
    "a tag": ("prune: 0.1\nlayers: !!python/object/apply:os.getcwd []", 2, "a tag (`!...`)"),
    "a list as a key": ("layers: [2]\n[1, 2]: 3", 2, "a key that is no word"),
    "an alias": ("layers: [2]\nprune: *most", 2, "an alias"),
    "a key twice": ("layers: [2]\nlayers: [3]", 2, "key 'layers' appears twice"),
    "what has no words of ours": ('layers: [2]\nsemantics: "a\\q"', 2, "unknown escape character 'q'"),
}


@pytest.mark.parametrize(("text", "line", "says"), BROKEN.values(), ids=BROKEN)
def test_broken_yaml(text: str, line: int, says: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_yaml(text, name="my.yaml")
    message = str(caught.value)
    assert message.startswith(f"my.yaml is not valid YAML in line {line}: ") and says in message
    for word in ("<unicode string>", "block mapping", "flow", "scalar", "<stream end>", "column"):
        assert word not in message


def test_a_value_that_cannot_be() -> None:
    with pytest.raises(ScheduleError, match=r"my\.yaml is not valid YAML: month must be in 1\.\.12\."):
        Schedule.from_yaml("layers: [2]\nprune: 2020-13-45", name="my.yaml")


@pytest.mark.parametrize("given", ["[2]", "[2, 5]"])
def test_one_layer_given_as_a_list(given: str) -> None:
    with pytest.raises(ScheduleError, match=r"layer: expected an integer, such as 2 \(lists are for `layers`\), got"):
        Schedule.from_yaml(f"method: fastv\nbudget: 4\nlayer: {given}")
