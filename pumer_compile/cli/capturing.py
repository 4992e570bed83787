"""From the options of a command to a captured program, and to a reduced one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import options as opt
from .shell import log, stage
from .tables import console, say, status


def captured(
    model: Path,
    config: Path | None,
    allow_pickle: bool,
    inputs: Path | None,
    sizes: tuple[int | None, int | None, str | None],
    dynamic_batch: bool,
    stream: list[str] | None,
    outputs: str | None,
    component: str | None = None,
    *,
    padding: bool = True,
    schedule: Any = None,
    weights: bool = True,
    image_prompt: bool = False,
) -> Any:
    """Load and capture; the schedule was read before, since a typo should not wait for a model to load."""
    batch, text_length, image_size = sizes
    if inputs is not None and any(size is not None for size in sizes):
        raise UsageError("--inputs fixes every shape; leave out --batch, --text-length and --image-size.")
    pixels = opt.image_pixels(image_size)
    streams = dict(opt.name_and_value(item, "--stream", "INPUT=NAME") for item in stream or [])

    added = schedule.adds if schedule is not None else {}

    with stage(f"loading {model}"):
        from ..capture.added import capture_with
        from ..capture.image_prompt import has_image_token
        from ..capture.image_size import fit_images
        from ..capture.loading import load_model
        from ..capture.make_inputs import load_inputs, make_inputs

        loaded = load_model(model, config=config, allow_pickle=allow_pickle, weights=weights)
        interpolated = fit_images(loaded.source, pixels)
        if inputs is not None:
            sample = load_inputs(inputs, loaded.source, added)
        elif component is not None or (image_prompt and has_image_token(loaded.source) and text_length is None):
            sample = _image_prompt(loaded.source, batch, text_length, pixels)
        else:
            sample = make_inputs(
                loaded.source, batch=batch, text_length=text_length, image_size=pixels, padding=padding
            )
        interpolated = interpolated or fit_images(loaded.source, sample)
    if interpolated:
        height, width = sample["pixel_values"].shape[-2:]
        say(f"Position embeddings of {', '.join(interpolated)} are interpolated for images of {height} x {width}.")
    with stage("capturing"):
        wanted = outputs or ("image_hidden_states" if component else "")
        kept = [name.strip() for name in wanted.split(",") if name.strip()]
        how: dict[str, Any] = {"dynamic_batch": dynamic_batch, "streams": streams, "outputs": kept, "padding": padding}
        return capture_with(loaded, sample, added, **how)


def _image_prompt(
    source: Any, batch: int | None, text_length: int | None, pixels: int | tuple[int, int] | None
) -> dict[str, Any]:
    from torch.nn import Module

    from ..capture.image_prompt import make_image_prompt

    if text_length is not None or not isinstance(source, Module):
        raise UsageError(
            "--component vision has no text (leave out --text-length), and takes a model, not a torch.export archive."
        )
    return make_image_prompt(source, batch=batch, image_size=pixels)


def reduced_with(program: Any, schedule: Any, dump_graph: Path | None) -> Any:
    """Reduce; the program itself where there is no schedule. What passes did is shown with -v."""
    from ..reduce import dump_captured, reduce

    if schedule is None:
        reduced, history = program, dump_captured(program, dump_graph)
    else:
        with stage("reducing"):
            reduced = reduce(program, schedule, dump_graph=dump_graph)
        history = reduced.history
    if history.records and log.isEnabledFor(logging.INFO):
        status.print(str(history), markup=False, highlight=False)
    return reduced


def suggested(program: Any, dump_graph: Path | None, component: str | None = None) -> Any:
    """Reduce by the schedule that `inspect` suggests, and say so.

    Raises:
        UsageError: none is.
    """
    from ..inspection.outline import look
    from ..inspection.suggest import suggest
    from ..reduce import Analysed

    with stage("looking for a schedule"):
        analysed = Analysed(program)
        found = suggest(analysed, look(analysed).outline)
    opt.check_component(component, None, found.schedule)
    say(f"No schedule was given: taking {found.schedule.described}, {found.why}:")
    console.print(found.schedule.to_yaml(), markup=False, highlight=False, soft_wrap=True)
    return found.reduced if dump_graph is None else reduced_with(program, found.schedule, dump_graph)
