"""What `make docs` adds to the pages of this folder: pages of the repository's root, the command line, schedules' keys.

Pages are read in the repository as well, so their links lead out of this folder (to the source, to a test). On the site
such a link is text alone; here it must lead to something that is there, or the build fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Of the root, as the site calls them.
OF_ROOT = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of this folder."""
    made = {**{page: of_root(source) for source, page in OF_ROOT.items()}, "reference/cli.md": command_line()}
    made |= {"reference/api.md": api(), "reference/schedules.md": schedule_keys()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of this folder be text; refuse those that lead nowhere."""
    where = DOCS / page.file.src_uri

    def without(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, _, _ = target.partition("#")
        if picture or not path.startswith("../") or "://" in target:
            return match[0]
        found = (where.parent / path).resolve()
        if found.is_relative_to(DOCS):
            return match[0]
        if not found.exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, and there is no {found.relative_to(ROOT)}.")
        inside = {source: name for source, name in OF_ROOT.items()}.get(str(found.relative_to(ROOT)))
        if inside is not None:
            up = "../" * page.file.src_uri.count("/")
            return f"[{text}]({up}{inside}{target[len(path) :]})"
        return text

    return outside_of_code(markdown, lambda prose: LINK.sub(without, prose))


def outside_of_code(markdown: str, change: Any) -> str:
    """Change what is no fenced block."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


def of_root(name: str) -> str:
    """A page of the root, with its links as from this folder."""

    def moved(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        inside = target.startswith("docs/")
        return f"{picture}[{text}]({target.removeprefix('docs/') if inside else '../' + target})"

    text = (ROOT / name).read_text(encoding="utf-8")
    text = outside_of_code(text, lambda prose: LINK.sub(moved, prose))
    return re.sub(r'src="docs/', 'src="', text)


# --- Pages from the package -------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its options, as typer writes them down."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from pumer_compile.cli.commands import app

    command = get_command(app)
    context = typer.Context(command, info_name="pumer-compile")
    text: str = get_docs_for_click(obj=command, ctx=context, name="pumer-compile")
    text = re.sub(r"\n{3,}", "\n\n", text).replace("{MODEL}", "MODEL").replace("{ARTIFACT}", "ARTIFACT")
    return text.replace("# `pumer-compile`\n", "# Command line\n", 1)


def api() -> str:
    """Public names, by what they are for; mkdocstrings fills in their docstrings."""
    import pumer_compile

    groups: dict[str, tuple[str, ...]] = {
        "Capture and reduce": ("capture", "Program", "reduce", "Reduced", "Schedule", "Plan"),
        "Export, prove, run": ("export", "Exported", "OnnxOptions", "parity", "ParityReport", "Engine", "OnnxSession"),
        "Train": ("Teacher", "distillation_loss"),
        "Look at it": ("report", "Report", "resize_images"),
        "Errors": ("PumerError",),
    }
    listed = {name for names in groups.values() for name in names}
    missing = sorted({*pumer_compile.__all__} - listed)
    lines = ["# Python", "", "`import pumer_compile as pumer`. Public names, and `pumer_compile.generation`.", ""]
    groups["More"] = tuple(missing)
    for group, names in groups.items():
        lines += [f"## {group}", ""] if names else []
        lines += [line for name in names for line in _documented(_place(name))]
    lines += ["## Generation", ""]
    for name in ("Generator", "export_decode", "reduced_forward", "whole_forward"):
        lines += _documented(f"pumer_compile.generation.{name}")
    return "\n".join(lines)


def _place(name: str) -> str:
    from pumer_compile import _MODULES

    return f"pumer_compile.{_MODULES.get(name, 'errors')}.{name}"


def _documented(place: str) -> list[str]:
    return [f"::: {place}", "    options:", "      heading_level: 3", ""]


def schedule_keys() -> str:
    """The keys of every method, from the models that read schedules."""
    from pumer_compile.methods import METHODS, PRESETS

    lines = ["# Keys of schedules", "", "`method:` says which keys there are; an unknown one is an error."]
    lines += ["[Schedules](../schedules.md) explains them, [methods](../methods.md) what the methods do.", ""]
    for name, method in sorted(METHODS.items()):
        lines += [f"## `{name}`", "", f"{method.about.does[0].upper()}{method.about.does[1:]}.", ""]
        lines += ["| key | type | default | |", "| --- | --- | --- | --- |"]
        said = attributes(method)
        for key, field in method.model_fields.items():
            kind = str(field.annotation).replace("typing.", "") if field.annotation is not None else ""
            kind = re.sub(r"(<class '([\w.]+)'>)", r"\2", kind).replace("pumer_compile.methods.budgets.", "")
            default = "required" if field.is_required() else "" if field.default is None else f"`{field.default}`"
            kind = re.sub(r"Annotated\[(\w+), [^\]]*\)\]", r"\1", kind)
            lines.append(f"| `{key}` | `{kind}` | {default} | {said.get(key, '')} |".replace(" | None`", "`"))
        lines.append("")
    lines += ["## Presets", "", "| preset | schedule |", "| --- | --- |"]
    for name, schedule in PRESETS.items():
        keys = schedule.model_dump(mode="json", exclude_none=True, exclude_unset=True)
        lines.append(f"| `{name}` | {', '.join(f'`{key}: {value}`' for key, value in keys.items())} |")
    return "\n".join(lines) + "\n"


def attributes(cls: type) -> dict[str, str]:
    """What docstrings say of fields, those of nearer classes first."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        for key, text in _described((base.__dict__.get("__doc__") or "").splitlines()):
            found.setdefault(key, text)
    return found


def _described(lines: Iterable[str]) -> Iterable[tuple[str, str]]:
    key, text = "", ""
    for line in [*lines, "end"]:
        start = re.match(r"\s{8}(\w+): (.*)", line)
        if start or not line.startswith(" " * 12):
            if key:
                yield key, text.strip().replace("|", "\\|")
            key, text = (start[1], start[2]) if start else ("", "")
        else:
            text += " " + line.strip()
