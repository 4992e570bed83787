"""Framing: prompts of several lengths in the one form that an artifact is compiled for.

An artifact has one length of prompt, and its images at fixed places. A shorter prompt is put into this frame so that
its image stands where the frame has one: padding goes in front of a shorter text before the image, and behind a shorter
text after it. The mask hides both. Behind the prompt nothing else is needed: no token looks back from there. In front,
the positions of the tokens that follow have to be counted without padding, by the artifact (M-RoPE, whose positions
come from the mask) or by who gives `position_ids`. Where the last token of a prompt decides what is kept, it has to
stand last: then padding goes between the image and the text after it, and positions are counted so too. What the
prefill leaves of padding in its cache is cut out, so that a step of decoding sees the cache of the prompt alone.

Text between images has the compiled length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..schedule import Schedule

IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
# Inputs with an entry for every token of a prompt, `[batch, tokens, ...]`.
BY_TOKEN = (IDS, MASK, "token_type_ids", "mm_token_type_ids", POSITIONS, "cross_attention_mask")
# What reducers read (`Signal`) that holds nothing of padding: it is of the image alone, the mask is applied to it, or
# it is an input of its own.
_WITHOUT_PADDING = {
    *("class_token", "class_feature", "tower_keys", "tower_features", "keys", "weights", "normed"),
    *("text_embedding", "text_embeds", "question_ids"),
}
# What they read of the last token of a prompt.
_OF_LAST = {"last_query", "next_query"}
# What they read of the text behind the image, padding and all.
_BEHIND = {"text_keys", "text_normed", "behind_to_image", "text_rating"}


@dataclass(frozen=True)
class Framed:
    """Prompts in the frame of an artifact.

    Attributes:
        inputs: as the artifact takes them.
        lengths: of each prompt, without padding.
        front: of each prompt, tokens of padding before it.
        back: of each prompt, tokens of padding behind it.
        gap: of each prompt, tokens of padding behind its last image.
        tail: tokens that the frame has behind the last image.
    """

    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]
    gap: tuple[int, ...]
    tail: int

    @property
    def padding(self) -> tuple[int, ...]:
        """Of each prompt, how many tokens."""
        return tuple(map(sum, zip(self.front, self.back, self.gap, strict=True)))

    def spans(self, row: int, size: int) -> tuple[slice, slice]:
        """Where the tokens of a prompt are among all of its frame, before and behind the padding after its last image.

        Args:
            row: of the prompt.
            size: how many tokens the frame has; fewer than it is compiled for, where its images are reduced.
        """
        behind = self.tail - self.back[row] - self.gap[row]
        stop = size - self.back[row]
        return slice(self.front[row], size - self.tail), slice(stop - behind, stop)

    @property
    def prompts(self) -> list[Tensor]:
        """The ids of each, without padding."""
        ids = self.inputs[IDS].cpu()
        return [torch.cat([row[span] for span in self.spans(i, len(row))]) for i, row in enumerate(ids)]


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
    behind = tuple(length - own - before for own, before in zip(lengths, front, strict=True))
    none = (0,) * len(spans)
    back, gap = (none, behind) if _last_decides(manifest) else (behind, none)
    framed = Framed({}, lengths, front, back, gap, length - max((p["stop"] for p in _places(manifest)), default=length))
    _check_sides(manifest, takes, framed)
    for name, tensor in inputs.items():
        framed.inputs[name] = _moved(tensor, spans, framed, length) if name in BY_TOKEN else tensor
    if any(framed.padding):
        framed.inputs[MASK] = _moved(torch.ones_like(ids), spans, framed, length)
    if POSITIONS in takes and POSITIONS not in inputs:
        framed.inputs[POSITIONS] = _counted(framed, length, first, takes[POSITIONS]["shape"])
    return framed


def _last_decides(manifest: Mapping[str, Any]) -> bool:
    return bool(_OF_LAST & set((manifest.get("plan") or {}).get("signals", ())))


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
    others = sorted(set(plan["signals"]) - _WITHOUT_PADDING)
    if set(others) - _OF_LAST - _BEHIND or (set(others) & _BEHIND and any((*framed.back, *framed.gap))):
        raise UsageError(
            f"The artifact decides by its text ({', '.join(others)}), and padding in {shorter} would be read as text. "
            "Compile it for a text of this length."
        )
    renumbers = Schedule.from_manifest(manifest["schedule"]).renumbers
    by_mask = POSITIONS in takes or MASK in manifest.get("counted_masks", ())
    where = "in front of a prompt" if any(framed.front) else "in front of the text behind the image"
    if any((*framed.front, *framed.gap)) and (not by_mask or renumbers):
        raise UsageError(
            f"The artifact counts padding {where} as positions, and {shorter} need some there. Compile it with "
            f"`positions: original` and with {POSITIONS} among the sample inputs (0, 1, 2, and so on), which are then "
            "given without padding; or give prompts with a text of the compiled length there."
        )


def _moved(tensor: Tensor, spans: Sequence[tuple[int, int]], framed: Framed, length: int) -> Tensor:
    """A tensor with an entry for every token, `[batch, tokens, ...]`, in the frame; 0 for padding."""
    if tensor.dim() < 2 or tensor.shape[0] != len(spans):
        return tensor  # positions in several dimensions, say: as they are given
    moved = tensor.new_zeros((len(spans), length, *tensor.shape[2:]))
    for row, (start, stop) in enumerate(spans):
        before, behind = framed.spans(row, length)
        split = start + before.stop - before.start
        moved[row, before], moved[row, behind] = tensor[row, start:split], tensor[row, split:stop]
    return moved


def _counted(framed: Framed, length: int, first: int, shape: Sequence[int]) -> Tensor:
    """Positions of the tokens of each prompt, `[batch, tokens]`, int64; 0 for padding.

    Raises:
        UsageError: the artifact takes positions in several dimensions.
    """
    if len(shape) != 2:
        raise UsageError(f"The artifact takes {POSITIONS} of shape {list(shape)}, and none were given.")
    counted = torch.arange(first, first + length).repeat(len(framed.lengths), 1)
    return _moved(counted, [(0, own) for own in framed.lengths], framed, length)
