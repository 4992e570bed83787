"""Why a model does not fit, in the words of who brings it."""

from __future__ import annotations

from collections.abc import Mapping

from ..capture.capture import Program
from ..capture.inputs import describe_inputs
from ..errors import PumerError
from ..methods.proposing import Outline


def why_not(program: Program, outline: Outline, refused: Mapping[str, PumerError]) -> str:
    """Why no method that is suggested reduces a model.

    Args:
        program: captured.
        outline: of it.
        refused: what the graph said to proposals, by method.
    """
    images = {name: count for name, count in outline.streams.items() if "image" in name.split("_")}
    remedy = "The exact passes alone apply: `--schedule lossless`."
    if outline.rows == 1:
        return (
            "This model pools its image features before the prompt: one token stands there for each image, and there "
            f"is nothing to reduce. {remedy}"
        )
    if outline.frames > 1 and outline.crops == 1:
        return f"Each of the {outline.frames} frames or crops of an image is one token of the prompt. {remedy}"
    if not outline.streams:
        inputs = describe_inputs(program.inputs)
        return f"No stream of text or image tokens was found from the inputs {inputs}. {_said(refused)}{remedy}"
    if not images:
        return (
            f"No image tokens were found: the streams are {_counted(outline.streams)}. Either the model takes no "
            f"image, or its features are convolutions that never become tokens. {remedy}"
        )
    if not (outline.rows or outline.informed or outline.tower):
        return (
            f"This model has {_counted(images)} tokens, and no attention among them or from text to them was found: "
            f"looked for softmax between two products and for scaled_dot_product_attention. {remedy}"
        )
    return f"Its graph refuses every method that is suggested by default. {_said(refused)}".strip()


def _counted(streams: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {name}" for name, count in streams.items())


def _said(refused: Mapping[str, PumerError]) -> str:
    return "".join(f"`{name}`: {error} " for name, error in refused.items())
