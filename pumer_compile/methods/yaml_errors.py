"""What is wrong with a YAML file, in words for who writes one: the line, and what to write instead."""

from __future__ import annotations

import yaml

# How PyYAML's problems begin; whether it is the place where the construct began that is to be looked at; plain words.
_WORDS: tuple[tuple[str, bool, str], ...] = (
    ("expected ',' or ']'", True, "the list that begins with `[` is not closed; write `]` at its end"),
    ("expected ',' or '}'", True, "the mapping that begins with `{` is not closed; write `}` at its end"),
    ("could not find expected ':'", True, "a key without a value; write `key: value`, with a space after the colon"),
    ("mapping values are not allowed", False, "a second `:`, or the line before lacks a space after its colon"),
    ("found character '\\t'", False, "a tab; indent with spaces"),
    ("found unexpected end of stream", True, "a quote that is not closed"),
    (
        "expected <block end>",
        False,
        "an indent (or a dash) that fits nothing above; align it with the key it belongs to",
    ),
    ("but found another document", False, "a second document (`---`); a schedule is one"),
    ("could not determine a constructor", False, "a tag (`!...`); write plain values"),
    ("found unhashable key", False, "a key that is no word"),
    ("found undefined alias", False, "an alias (`*...`) without its anchor; put a text with a star into quotes"),
)


def explain_yaml(error: yaml.YAMLError | ValueError, name: str) -> str:
    """One sentence for an error of PyYAML.

    Args:
        error: that loading gave; ValueError is of a value, such as a date that does not exist.
        name: of the file.
    """
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name} is not valid YAML: {' '.join(str(error).split())}."
    problem = str(error.problem or error.context or "it cannot be read")
    mark, said = error.problem_mark, problem
    for start, at_its_start, words in _WORDS:
        if problem.startswith(start):
            said, mark = words, (error.context_mark if at_its_start else None) or mark
            break
    where = "" if mark is None else f" in line {mark.line + 1}"
    return f"{name} is not valid YAML{where}: {said}."
