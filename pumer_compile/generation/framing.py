"""Framing: prompts of several lengths in the one form that an artifact is compiled for.

An artifact has one length of prompt, and its images at fixed places. A shorter prompt is put into this frame so that
its image stands where the frame has one: padding goes in front of a shorter text before the image, and behind a shorter
text after it. The mask hides both. Behind the prompt nothing else is needed: no token looks back from there. In front,
the positions of the tokens that follow have to be counted without padding, by the artifact (M-RoPE, whose positions
come from the mask) or by who gives `position_ids`. What the prefill leaves of padding in its cache is cut off at both
ends, so that a step of decoding sees the cache of the prompt alone.

Text between images has the compiled length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
# Inputs with an entry for every token of a prompt, `[batch, tokens, ...]`.
BY_TOKEN = (IDS, MASK, "token_type_ids", "mm_token_type_ids", POSITIONS, "cross_attention_mask")
# What reducers read (`Signal`) that holds nothing of the text around an image.
_OF_IMAGES = {"class_feature", "class_token", "keys", "tower_keys", "weights"}


@dataclass(frozen=True)
class Framed:
    """Prompts in the frame of an artifact.

    Attributes:
        inputs: as the artifact takes them.
        lengths: of each prompt, without padding.
        front: of each prompt, tokens of padding before it.
        back: of each prompt, tokens of padding behind it.
    """

    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]

    @property
    def padding(self) -> tuple[int, ...]:
        """Of each prompt, how many tokens."""
        return tuple(front + back for front, back in zip(self.front, self.back, strict=True))

    @property
    def prompts(self) -> list[Tensor]:
        """The ids of each, without padding."""
        spans = zip(self.inputs[IDS].cpu(), self.front, self.lengths, strict=True)
        return [row[front : front + length] for row, front, length in spans]


def frame(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor], *, first: int = 0) -> Framed:
    """Prompts in the frame of an artifact.

    Args:
        manifest: of the artifact.
        inputs: what the model's processor makes of prompts: `input_ids`, `[batch, tokens]`, and whatever else the
            artifact takes; padded in front or behind, with an `attention_mask` that says where, or not at all.
        first: the position of a prompt's first token, for positions that are not given.

    Raises:
        UsageError: a text is longer than the compiled one; padding stands between tokens; or the artifact cannot take
            a prompt with padding at this side.
    """
    takes = {**manifest.get("unread_inputs", {}), **manifest["inputs"]}
    if IDS not in inputs or IDS not in takes:
        raise UsageError(f"A prompt for generation comes as {IDS}; given were {', '.join(inputs)}.")
    ids = inputs[IDS]
    spans = [_span(row) for row in inputs.get(MASK, torch.ones_like(ids))]
    length = int(takes[IDS]["shape"][1])
    front = _fronts(manifest, ids, spans, length)
    lengths = tuple(stop - start for start, stop in spans)
    back = tuple(length - own - before for own, before in zip(lengths, front, strict=True))
    framed = Framed({}, lengths, front, back)
    _check_sides(manifest, takes, framed)
    for name, tensor in inputs.items():
        framed.inputs[name] = _moved(tensor, spans, framed, length) if name in BY_TOKEN else tensor
    if any(framed.padding):
        framed.inputs[MASK] = _moved(torch.ones_like(ids), spans, framed, length)
    if POSITIONS in takes and POSITIONS not in inputs:
        framed.inputs[POSITIONS] = _counted(framed, length, first, takes[POSITIONS]["shape"])
    return framed


def _places(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [place for place in (manifest.get("plan") or {}).get("prompts", ()) if place["input"] == IDS]


def _span(mask: Tensor) -> tuple[int, int]:
    """First and last-but-one token of a prompt, by its row of a mask.

    Raises:
        UsageError: there is padding between them, or none.
    """
    places = mask.nonzero().flatten()
    if not len(places) or len(places) != int(places[-1] - places[0]) + 1:
        raise UsageError(
            f"A prompt for generation has its padding in front or behind; {MASK} has zeros among its tokens."
            if len(places)
            else f"A prompt for generation has tokens; {MASK} has a row of zeros."
        )
    return int(places[0]), int(places[-1]) + 1


def _fronts(manifest: Mapping[str, Any], ids: Tensor, spans: Sequence[tuple[int, int]], length: int) -> tuple[int, ...]:
    """Of each prompt, the padding before it that puts its first image where the frame has it.

    Raises:
        UsageError: a text is longer than the frame's.
    """
    places = _places(manifest)
    if not places:
        return tuple(length - (stop - start) for start, stop in spans)
    at, end = min(place["start"] for place in places), max(place["stop"] for place in places)
    placeholders = torch.tensor(sorted({place["placeholder"] for place in places}))
    fronts = []
    for row, (start, stop) in zip(ids, spans, strict=True):
        found = torch.isin(row[start:stop].cpu(), placeholders).nonzero().flatten()
        # Without the image this is nonsense, which `check_prompts` then says.
        before, after = (int(found[0]), stop - start - int(found[-1]) - 1) if len(found) else (at, 0)
        for text, has, room in (("before", before, at), ("behind", after, length - end)):
            if has > room:
                raise UsageError(
                    f"A prompt has {has} tokens {text} its images, and the artifact was compiled for at most {room} "
                    f"there. Compile it with a sample prompt whose text {text} the images is the longest."
                )
        fronts.append(at - before)
    return tuple(fronts)


def _check_sides(manifest: Mapping[str, Any], takes: Mapping[str, Any], framed: Framed) -> None:
    """Whether an artifact can take padding where it is.

    Raises:
        UsageError: it cannot.
    """
    if not any(framed.padding):
        return
    shorter = f"prompts of {' and '.join(map(str, sorted(set(framed.lengths))))} tokens"
    plan = manifest.get("plan") or {}
    if MASK not in takes or MASK in manifest.get("unpadded_inputs", ()):
        raise UsageError(
            f"The artifact takes no {MASK}, which would hide the padding of {shorter} from it. Compile it with one "
            "among the sample inputs (and without --no-padding)."
        )
    if not _places(manifest) or "signals" not in plan:
        raise UsageError(
            f"The artifact does not say where its images stand and what its reducers read, and {shorter} would be "
            "padded. Compile it by this version, with a budget of image tokens; or give prompts of the compiled length."
        )
    others = sorted(set(plan["signals"]) - _OF_IMAGES)
    if (any(framed.back) and others) or set(others) - {"last_query"}:
        raise UsageError(
            f"The artifact decides by what text looks at ({', '.join(others)}), and in {shorter} padding "
            f"{'behind it' if others == ['last_query'] else 'among it'} would be looked with. Compile it for a text "
            "of this length behind the image."
        )
    schedule = manifest["schedule"] or {}
    by_mask = POSITIONS in takes or MASK in manifest.get("counted_masks", ())
    if any(framed.front) and (not by_mask or schedule.get("positions", "compact") == "compact"):
        raise UsageError(
            f"The artifact counts padding in front of a prompt as positions, and {shorter} need some there. Compile it "
            f"with `positions: original` and with {POSITIONS} among the sample inputs (0, 1, 2, and so on), which "
            "are then given without padding; or give prompts with the compiled text in front of the image."
        )


def _moved(tensor: Tensor, spans: Sequence[tuple[int, int]], framed: Framed, length: int) -> Tensor:
    """A tensor with an entry for every token, `[batch, tokens, ...]`, in the frame; 0 for padding."""
    if tensor.dim() < 2 or tensor.shape[0] != len(spans):
        return tensor  # positions in several dimensions, say: as they are given
    moved = tensor.new_zeros((len(spans), length, *tensor.shape[2:]))
    for row, ((start, stop), front) in enumerate(zip(spans, framed.front, strict=True)):
        moved[row, front : front + stop - start] = tensor[row, start:stop]
    return moved


def _counted(framed: Framed, length: int, first: int, shape: Sequence[int]) -> Tensor:
    """Positions of the tokens of each prompt, `[batch, tokens]`, int64; 0 for padding.

    Raises:
        UsageError: the artifact takes positions in several dimensions.
    """
    if len(shape) != 2:
        raise UsageError(f"The artifact takes {POSITIONS} of shape {list(shape)}, and none were given.")
    positions = torch.zeros(len(framed.lengths), length, dtype=torch.int64)
    for row, (front, own) in enumerate(zip(framed.front, framed.lengths, strict=True)):
        positions[row, front : front + own] = torch.arange(first, first + own)
    return positions
