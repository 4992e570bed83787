"""Framing: prompts of several lengths in the one form that an artifact is compiled for.

An artifact has one length of prompt, and its images at fixed places. A shorter prompt is put into this frame so that
its image stands where the frame has one: padding goes in front of a shorter text before the image, and behind a shorter
text after it. The mask hides both. Behind the prompt nothing else is needed: no token looks back from there. In front,
the positions of the tokens that follow have to be counted without padding, by the artifact (M-RoPE, whose positions
come from the mask) or by who gives `position_ids`. Where the last token of a prompt decides what is kept, it has to
stand last: then padding goes between the image and the text after it, and positions are counted so too. So it goes
behind an image that a shorter text follows up to the next image. What the prefill leaves of padding in its cache is cut
out, so that a step of decoding sees the cache of the prompt alone.
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
class Images:
    """Images in a frame.

    Attributes:
        blocks: first place and the one behind the last, of each, in order; those that touch are one.
        placeholders: ids that stand there.
        length: tokens of the frame.
    """

    blocks: tuple[tuple[int, int], ...]
    placeholders: tuple[int, ...]
    length: int

    @property
    def texts(self) -> list[int]:
        """Tokens that the frame has before, between and behind them."""
        starts, stops = [start for start, _ in self.blocks], [stop for _, stop in self.blocks]
        return [start - stop for start, stop in zip([*starts, self.length], [0, *stops], strict=True)]


@dataclass(frozen=True)
class Framed:
    """Prompts in the frame of an artifact.

    Attributes:
        inputs: as the artifact takes them.
        lengths: of each prompt, without padding.
        front: of each prompt, tokens of padding before it.
        back: of each prompt, tokens of padding behind it.
        gaps: of each prompt, tokens of padding behind each of its images.
        images: where the frame has images.
        alike: whether a reducer leaves as many tokens of each of them.
    """

    inputs: dict[str, Tensor]
    lengths: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]
    gaps: tuple[tuple[int, ...], ...]
    images: Images
    alike: bool = True

    @property
    def gap(self) -> tuple[int, ...]:
        """Of each prompt, tokens of padding behind its last image."""
        return tuple(own[-1] if own else 0 for own in self.gaps)

    @property
    def extents(self) -> tuple[int, ...]:
        """Of each prompt, tokens from its first to its last, padding among them included."""
        return tuple(own + sum(gaps) for own, gaps in zip(self.lengths, self.gaps, strict=True))

    @property
    def padding(self) -> tuple[int, ...]:
        """Of each prompt, how many tokens."""
        return tuple(
            front + back + sum(gaps) for front, back, gaps in zip(self.front, self.back, self.gaps, strict=True)
        )

    def spans(self, row: int, size: int) -> tuple[slice, ...]:
        """Where the tokens of a prompt are among all of its frame.

        Args:
            row: of the prompt.
            size: how many tokens the frame has; fewer than it is compiled for, where its images are reduced.

        Raises:
            UsageError: that does not say where padding between images is.
        """
        found, start, gone = [], self.front[row], self.images.length - size
        last = len(self.images.blocks) - 1
        for number, ((_, stop), gap) in enumerate(zip(self.images.blocks, self.gaps[row], strict=True)):
            if not gap:
                continue
            if number < last and gone and not self.alike:
                raise UsageError(
                    "A prompt has fewer tokens between its images than the artifact was compiled for, and its images "
                    "are of several sizes, or keep several numbers of tokens. Give prompts with the compiled number of "
                    "tokens between the images."
                )
            end = stop - gone * (number + 1) // (last + 1)
            found.append(slice(start, end))
            start = end + gap
        return (*found, slice(start, size - self.back[row]))

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
    images = _images(manifest, int(takes[IDS]["shape"][1]))
    length, lengths = images.length, tuple(stop - start for start, stop in spans)
    front, between = _fronts(images, ids, spans)
    behind = tuple(length - own - before - sum(gaps) for own, before, gaps in zip(lengths, front, between, strict=True))
    if any(rest < 0 for rest in behind):
        raise UsageError(
            f"A prompt has {max(lengths)} tokens, and the artifact was compiled for {length}. Compile it with a longer "
            "sample prompt, or give prompts with as many images."
        )
    none = (0,) * len(spans)
    back, last = (none, behind) if _last_decides(manifest) and images.blocks else (behind, none)
    gaps = tuple((*own, rest) if images.blocks else () for own, rest in zip(between, last, strict=True))
    framed = Framed({}, lengths, front, back, gaps, images, _alike(manifest, images))
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


def _images(manifest: Mapping[str, Any], length: int) -> Images:
    """Where a frame of a length has images."""
    blocks: list[tuple[int, int]] = []
    for place in sorted(_places(manifest), key=lambda place: int(place["start"])):
        if blocks and blocks[-1][1] == place["start"]:
            blocks[-1] = blocks[-1][0], int(place["stop"])
        else:
            blocks.append((int(place["start"]), int(place["stop"])))
    return Images(tuple(blocks), tuple(sorted({int(place["placeholder"]) for place in _places(manifest)})), length)


def _alike(manifest: Mapping[str, Any], images: Images) -> bool:
    """Whether images are of one size and every reducer leaves as many tokens of each."""
    steps: dict[str, list[tuple[int, int]]] = {}
    for site in (manifest.get("plan") or {}).get("sites", ()):
        for stream, before in site["before"].items():
            if stream.endswith("image"):
                steps.setdefault(stream, []).append((before, site["after"].get(stream, before)))
    sizes = {stop - start for start, stop in images.blocks}
    return len(sizes) < 2 and len(steps) == len(images.blocks) and len({tuple(own) for own in steps.values()}) == 1


def _fronts(
    images: Images, ids: Tensor, spans: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Of each prompt, the padding before it that puts its first image where the frame has it, and that behind each of
    its images but the last, for the next ones.

    Raises:
        UsageError: a text is longer than the frame's.
    """
    if not images.blocks:
        return tuple(images.length - (stop - start) for start, stop in spans), ((),) * len(spans)
    rooms = images.texts
    fronts, between = [], []
    for row, (start, stop) in zip(ids, spans, strict=True):
        texts = _texts(row[start:stop].cpu(), images.placeholders)
        if len(texts) != len(rooms):
            # Of other images; this is nonsense, which `check_prompts` then says.
            texts = [texts[0], *rooms[1:-1], texts[-1]] if len(texts) > 1 else [*rooms[:-1], 0]
        names = ["before", *["between"] * (len(rooms) - 2), "behind"]
        for name, has, room in zip(names, texts, rooms, strict=True):
            if has > room:
                raise UsageError(
                    f"A prompt has {has} tokens {name} its images, and the artifact was compiled for at most {room} "
                    f"there. Compile it with a sample prompt whose text {name} the images is the longest."
                )
        left = [room - has for has, room in zip(texts, rooms, strict=True)]
        fronts.append(left[0])
        between.append(tuple(left[1:-1]))
    return tuple(fronts), tuple(between)


def _texts(ids: Tensor, placeholders: Sequence[int]) -> list[int]:
    """How many tokens a prompt has before, between and behind its images."""
    texts, inside = [0], False
    for image in torch.isin(ids, torch.tensor(placeholders)).tolist():
        if image and not inside:
            texts.append(0)
        elif not image:
            texts[-1] += 1
        inside = image
    return texts


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
    others, gapped = sorted(set(plan["signals"]) - _WITHOUT_PADDING), any(map(any, framed.gaps))
    if set(others) - _OF_LAST - _BEHIND or (set(others) & _BEHIND and (any(framed.back) or gapped)):
        raise UsageError(
            f"The artifact decides by its text ({', '.join(others)}), and padding in {shorter} would be read as text. "
            "Compile it for a text of this length."
        )
    renumbers = Schedule.from_manifest(manifest["schedule"]).renumbers
    by_mask = POSITIONS in takes or MASK in manifest.get("counted_masks", ())
    where = "in front of a prompt" if any(framed.front) else "in front of the text behind the image"
    if (any(framed.front) or gapped) and (not by_mask or renumbers):
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
        for span in framed.spans(row, length):
            end = min(start + span.stop - span.start, stop)
            moved[row, span] = tensor[row, start:end]
            start = end
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
