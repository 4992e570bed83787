"""`pumer-compile inspect MODEL`: does it fit; and the schedule of a compilation without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CaptureError
from . import options as opt
from .capturing import captured
from .shell import app, epilog, readable_errors, stage
from .tables import console, gained, make_table, say, shapes, wrapped

if TYPE_CHECKING:
    from ..inspection.inspect import Inspection

INSPECT_EXAMPLES = """
Examples. A folder, whose weights are not read; a prompt as its processor makes it; every reason, as JSON:

    pumer-compile inspect MODEL

    pumer-compile inspect MODEL --inputs samples.npz

    pumer-compile inspect MODEL --json
"""


@app.command("inspect", epilog=epilog(INSPECT_EXAMPLES))
@readable_errors
def inspect_(
    model: opt.Model,
    config: opt.Config = None,
    allow_pickle: opt.AllowPickle = False,
    inputs: opt.Inputs = None,
    batch: opt.Batch = None,
    text_length: opt.TextLength = None,
    image_size: opt.ImageSize = None,
    stream: opt.Streams = None,
    no_padding: opt.NoPadding = False,
    outputs: opt.Outputs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say whether a model fits: tokens, sites, methods that apply, a schedule to begin with; or why not."""
    sizes = (batch, text_length, image_size)
    how: dict[str, Any] = {"padding": not no_padding, "weights": False, "image_prompt": inputs is None}
    try:
        program = captured(model, config, allow_pickle, inputs, sizes, False, stream, outputs, **how)
    except CaptureError as error:
        if as_json:
            print(json.dumps({"fits": False, "why_not": str(error)}, indent=2))
        else:
            say(f"{model} does not fit: it could not be captured. {error}")
        return
    from ..inspection.inspect import inspect_program

    with stage("inspecting") as progress:
        found = inspect_program(program, progress)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_inspection(found, model, program, verbose=verbose)


def print_inspection(found: Inspection, model: Path, program: Any, *, verbose: bool = False) -> None:
    """On a screen of 80 columns: the answer first."""
    kind = type(program.model).__name__ if program.model is not None else "A torch.export archive"
    if found.suggestion is not None:
        say(f"{kind} fits: {gained(found.suggestion.reduced.plan)} by the schedule suggested below.")
    elif found.fits:
        say(f"{kind} fits, but no schedule is suggested. {found.why_not}")
    else:
        say(f"{kind} does not fit. {found.why_not}")
    say(f"Inputs: {shapes(found.inputs)}.")
    say(f"Tokens: {_counted(found.outline.streams)}.")
    for place in found.prompts:
        say(f"Prompt: an image stands at {place['start']} to {place['stop'] - 1} of {place['input']}.")
    _print_sites(found, verbose)
    _print_methods(found, verbose)
    if found.suggestion is not None:
        say(f"Suggested schedule ({found.suggestion.why}):")
        console.print(found.suggestion.schedule.to_yaml(), markup=False, highlight=False, soft_wrap=True)
        say(f"Package: {found.package()}.")
        say(
            f"Next: pumer-compile {model} -o model.onnx (compiles by the suggestion), or search for a better one: "
            f"pumer-compile search {model} --inputs samples.npz --max-drop 1% -o schedule.yaml"
        )


def _counted(streams: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in streams.items()) or "none that could be followed"


def _print_sites(found: Inspection, verbose: bool) -> None:
    groups: dict[str, list[Any]] = {}
    for attention in found.attentions:
        groups.setdefault(attention["address"].partition(".")[0], []).append(attention)
    for several in groups.values():
        first, last = several[0], several[-1]
        addresses = first["address"] if len(several) == 1 else f"{first['address']} to {last['address']}"
        say(f"Attention: {addresses}, from {first['queries']} to {first['keys']}.")
    if verbose and found.attentions:
        table = make_table("Attention", ["site", "module", "queries", "keys"], [])
        for attention in found.attentions:
            table.add_row(
                attention["address"], wrapped(attention["module"], 24), attention["queries"], attention["keys"]
            )
        console.print(table)


def _print_methods(found: Inspection, verbose: bool) -> None:
    from ..inspection.inspect import short

    fitting = [v.method for v in found.verdicts if v.schedule is not None and not v.control]
    controls = [v.method for v in found.verdicts if v.schedule is not None and v.control]
    say(f"Methods that apply: {', '.join(fitting) or 'none'}.")
    if controls:
        say(f"Controls that apply: {', '.join(controls)}.")
    others = [v for v in found.verdicts if v.schedule is None]
    if not verbose:
        say(f"Others: {', '.join(v.method for v in others) or 'none'} (why: -v).")
        return
    table = make_table("Methods that do not apply", ["method", "why"], [])
    for verdict in others:
        table.add_row(verdict.method, short(verdict.reason))
    console.print(table)
