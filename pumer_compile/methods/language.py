"""What methods that act inside a language model share: its layers, the prompt that it reads, and stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import LocateError, PlanError
from .base import Method, TokenOutputs
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from torch import fx

    from ..analysis.attention import Attention
    from ..rewrite.sites import LocatedGraph


class InLanguageModel(Method):
    """A method that reduces the image tokens of a prompt after some layers of the language model.

    The query that votes, and the words that are read, stand at the end of the prompt: prompts of several lengths are
    padded in front.
    """

    needs_prompt = True
    wants = "an image in a prompt, and two language layers and more that see it"
    cache_lengths: ClassVar[Literal["uniform", "by_layer"]] = "by_layer"

    outputs: TokenOutputs = "reduced"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: half of the tokens after the second layer, as FastV has it."""
        if outline.rows > 1 and outline.layers > 1 and "layer" in cls.model_fields:
            layer = ask.count("layer", 1, outline.layers - 1, 2)
            yield from cls.in_either_order(
                layer=layer, budget=ask.count("budget", 1, outline.rows - 1, outline.rows // 2)
            )

    @classmethod
    def falling(cls, outline: Outline, ask: Ask, least: float) -> dict[int, float]:
        """After a quarter, half and three quarters of the language layers: the share that stays, each smaller than the
        one before; as PyramidDrop has them, a half at each.

        Args:
            outline: with at least two layers.
            ask: chooses.
            least: share that may stay at the end.
        """
        places = sorted({max(1, outline.layers * quarter // 4) for quarter in (1, 2, 3)})
        found: dict[int, float] = {}
        left = 1.0
        for place in places:
            left = round(max(least, left * (1 - ask.share(f"after {place}", 0.8, 0.5))), 4)
            if left < min(found.values(), default=1.0):
                found[place] = left
        return found

    def layers_of(self, graph: LocatedGraph, *, reading: bool = False) -> list[Attention]:
        """The attentions of the language model over a prompt with all its images, in order.

        Args:
            graph: captured.
            reading: or those to images that stand in no prompt.

        Raises:
            LocateError: there is none.
        """
        layers = graph.prompt_layers() or (graph.reading_layers() if reading else [])
        if layers:
            return layers
        images = " and ".join(graph.prompt_images()) or "its image"
        if not reading and graph.reading_layers():
            raise LocateError(
                f"`method: {self.method}` reduces the image tokens that stand in a prompt, and here the language model "
                f"reads {images} by cross-attention alone. `method: fastv` reduces what is read so."
            )
        raise LocateError(
            f"`method: {self.method}` reads the attention of a language model, and none was found whose queries and "
            f"keys are the text tokens of a prompt with {images} among them."
        )

    def check_layer(self, layers: Sequence[Attention], number: int, key: str, least: int = 1) -> None:
        """So many layers come before the ones that see fewer tokens.

        Args:
            layers: of the language model.
            number: of layers that see what there was before.
            key: that says so, such as `layer`.
            least: of these.

        Raises:
            PlanError: none comes after them.
        """
        if number >= len(layers):
            few = f"choose {least} to {len(layers) - 1}" if len(layers) > least else "there is none to choose"
            raise PlanError(
                f"`{key}: {number}` lets the first {number} language layers see every token and the others fewer, and "
                f"this model has {len(layers)}: {few}."
            )

    def entering(self, attention: Attention, does: str = "reduces") -> fx.Node:
        """The residual value that enters the layer of an attention.

        Args:
            attention: of the language model.
            does: what the method does with that value, for the message.

        Raises:
            LocateError: none is found.
        """
        from ..analysis.carrier import entering_of

        found = entering_of(attention.context)
        if found is None:
            raise LocateError(
                f"`method: {self.method}` {does} what enters the layer of {attention.described}, and no residual "
                "value was found there: looked for what the output of its attention is added to, from which its "
                "queries and keys are computed."
            )
        return found

    def check_prompt(self, graph: LocatedGraph, attention: Attention, why: str) -> None:
        """A layer can be reduced, its prompt ends with text, and its images are whole.

        Args:
            graph: captured.
            attention: over the prompt.
            why: what the method does with the text that must stand last; '' where none need be.

        Raises:
            LocateError: it is otherwise.
        """
        graph.check_reducible(attention)
        graph.check_masks(attention)
        *_, last = attention.query_axis.segments
        if why and (last.stream is None or graph.modality(last.stream) != "text"):
            raise LocateError(
                f"The prompt {attention.query_axis} ends with an image, and `method: {self.method}` {why}. Compile it "
                "for a prompt that ends with text."
            )
        images = graph.prompt_images()
        cut = [s for s in attention.query_axis.segments if s.stream in images and not s.whole]
        if cut:
            raise LocateError(
                f"The prompt {attention.query_axis} has {cut[0].length} tokens of {cut[0].stream} apart from the "
                "others; an image is reduced whole."
            )

    def check_seen(
        self, graph: LocatedGraph, layers: Sequence[Attention], number: int, choices: Mapping[int, str]
    ) -> None:
        """What the last token does not see gets no vote, and chance would decide over it.

        Args:
            graph: captured.
            layers: of the language model.
            number: of the layer that decides, from 1.
            choices: what a user would write to let another layer decide, by its number.

        Raises:
            PlanError: its last token sees a window that does not reach over the images.
        """
        images, attention = graph.prompt_images(), layers[number - 1]
        if not set(images) <= set(attention.query_axis.streams):
            return  # images that are read hold tiles of padding, which nobody sees
        unseen = graph.hidden_from_last(attention, images)
        if not unseen:
            return
        others = [i for i in choices if not graph.hidden_from_last(layers[i - 1], images)]
        remedy = (
            f"Choose `{choices[min(others, key=lambda i: abs(i - number))]}`, whose last token sees every image token"
            if others
            else "Use a method that reads the vision tower, or a prompt that the window reaches over"
        )
        raise PlanError(
            f"The last token of the prompt does not see all of {' and '.join(unseen)} in language layer {number} "
            f"({attention.described}), whose mask lets it look at a window of tokens; the others would get no vote in "
            f"`method: {self.method}`. {remedy}."
        )


def in_order(given: object, kind: type[int] | type[float], example: str) -> dict[int, Any]:
    """`stages:` in the order of their layers.

    Args:
        given: after so many layers: what is left.
        kind: of what is left: tokens (integers of at least 1), or shares (above 0 and below 1).
        example: of a mapping, for messages.

    Raises:
        ValueError: no such mapping, or a stage that leaves no less than the one before; in the user's words.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"expected a mapping, after so many layers: what is left, such as {example}; got {given!r}")
    found: dict[int, Any] = {}
    for key, left in given.items():
        layer = int(key) if isinstance(key, str) and key.isdecimal() else key  # JSON has no other keys
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1 or layer in found:
            raise ValueError(f"a stage stands after so many language layers, an integer of at least 1, got {key!r}")
        if type(left) is not kind or left <= 0 or (kind is float and left >= 1):
            wanted = "a number of tokens, at least 1" if kind is int else "a share above 0 and below 1, such as 0.5"
            raise ValueError(f"what is left after layer {layer} is {wanted}, got {left!r}")
        found[layer] = left
    found = dict(sorted(found.items()))
    for (before, more), (layer, left) in zip(list(found.items())[:-1], list(found.items())[1:], strict=True):
        if left >= more:
            raise ValueError(
                f"each stage leaves fewer tokens than the one before it: {left} after layer {layer} is not less than "
                f"{more} after layer {before}"
            )
    return found
