"""Prompt: say plainly where images stand in a language model's prompt.

Models of LLaVA's kind look a prompt up in the word table, placeholders included, and scatter the projected image
features over the placeholders (`masked_scatter`). Where these stand is data; for one compiled prompt form it is fixed.
This pass reads it off the sample ids and writes it down as what it is: words, image, words, and so on, joined by a
`cat`. From there on the axes of the prompt follow by the ordinary rules. It also marks where the features leave the
vision tower for the projector, as streams of their own (`visual_tokens`), one for each block of placeholders.

Where several rows of the tower's output make one prompt (images, or the crops of one), or tokens are rearranged on the
way (`arrangement.py`), the tokens are brought into the prompt's order before the projector, which looks at each token
alone. Learned separators between them (the end of a picture's row) are kept until a reducer drops them. Sound that is
scattered into a prompt stands there as words do: it is not marked, and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, fx

from ..errors import AxisError
from .constant_places import lookups_of_words, lower_constant_places, lower_other_lookups, masked_updates, same_tokens
from .dead_code import with_writes
from .marks import ActsOn, Prompt, Words
from .nodes import after_attention, ancestors, copied, describe, keep_parameters, values
from .operators import ATTENTION, SOFTMAX, aten
from .prompt_scatter import Scatter

_SCATTER = aten.masked_scatter.default
_ATTENTION = SOFTMAX | {ATTENTION}
_SOUND = ("audio", "input_features", "input_values", "sound", "speech", "waveform")


def lower_masked_scatter(
    captured: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    acts_on: ActsOn = "tower",
    *,
    votes: bool = True,
    early: bool = False,
) -> Prompt | None:
    """The graph with each scatter into a prompt lowered to a `cat`; None where nothing is scattered into one.

    Args:
        captured: pre-decomposition ATen graph; it is not changed.
        inputs: the sample inputs, whose placeholder ids say where images stand.
        acts_on: mark the features where they leave the vision tower; or the rows that are scattered, whatever they are
            made of (crop by crop, without the separators between them, or for `layers` as they are).
        votes: find the attention of the tower that decides over rows.
        early: of a tower without a class token: begin the mark of an image of one crop at the token of text in front of
            it (`Mark.early`).

    Raises:
        AxisError: the placeholders stand elsewhere in another row, or do not fit the features; or more than moving
            happens to features between projector and prompt.
    """
    if not any(node.target is _SCATTER for node in captured.graph.nodes):
        return None
    graph = copied(captured.graph)
    module = fx.GraphModule(captured, graph)
    keep_parameters(captured, module)
    prompt, updates = Prompt(module, [], []), masked_updates(graph)
    words = _lower_scatters(prompt, inputs, set(updates), acts_on, votes=votes, early=early)
    graph.eliminate_dead_code()
    names = [mark.place for mark in prompt.marks]
    images = dict(zip(prompt.blocks, names, strict=True))
    lower_constant_places(graph, images, [mark.node for mark in prompt.marks], inputs, updates)
    lower_other_lookups(graph, images, words)
    graph.eliminate_dead_code()
    if acts_on == "rows":
        text = _words(prompt, words)
        prompt.marks[:] = [replace(mark, words=text) for mark in prompt.marks]
    if acts_on != "layers":
        again = [node for node in graph.nodes if node.target is same_tokens]
        text_nodes = [mark.words.node for mark in prompt.marks if mark.words is not None]
        _hoist(graph, [*(mark.prompted for mark in prompt.marks), *again, *text_nodes])
    graph.lint()
    module.recompile()
    return prompt if prompt.marks else None


def _is_sound(features: fx.Node) -> bool:
    """Whether what is scattered comes from sound, by the names that processors give it, and from no picture."""
    given = [n for n in ancestors(features) if n.op == "placeholder" and values(n)[0].is_floating_point()]
    return bool(given) and all(any(part in str(n.target) for part in _SOUND) for n in given)


def _lower_scatters(
    prompt: Prompt, inputs: Mapping[str, Tensor], updates: set[fx.Node], acts_on: ActsOn, *, votes: bool, early: bool
) -> set[fx.Node]:
    """Every scatter of image features as a `cat`; gives the lookups of the words around them."""
    words: set[fx.Node] = set()
    for node in [n for n in prompt.module.graph.nodes if n.target is _SCATTER]:
        behind = ancestors(node)
        if node in updates and behind & {mark.node for mark in prompt.marks}:
            continue  # it adds to an image that is in the prompt already
        if node in updates and after_attention(node.args[0]):
            raise AxisError(
                f"{describe(node)} adds image features to places of a prompt that layers have read before an image was "
                "there; an image is reduced as it enters the prompt, in front of the first layer."
            )
        words |= lookups_of_words(node.args[0])
        if _is_sound(node.args[2]):
            Scatter(prompt, node, inputs, updates=False).lower_sound()
            continue
        needed = any(n.target in _ATTENTION for n in behind)  # the output of a tower
        if not votes:
            needed = any(n.op == "placeholder" and values(n)[0].is_floating_point() for n in behind)
        if needed:
            # Features that later layers add to an image have no row for the token of text.
            scatter = Scatter(prompt, node, inputs, updates=node in updates, early=early and not updates)
            scatter.lower(acts_on, votes)
    return words


def _words(prompt: Prompt, lookups: set[fx.Node]) -> Words | None:
    """The text of a prompt; None where it is not looked up in one table."""
    there = set(prompt.module.graph.nodes)
    found = [node for node in lookups if node in there and values(node)[0].dim() == 3]
    if len(found) != 1:
        return None
    beside = {place for start, stop in [*prompt.blocks, *prompt.sound] for place in range(start - 1, stop + 1)}
    return Words(found[0], tuple(p for p in range(int(values(found[0])[0].shape[1])) if p not in beside))


def _hoist(graph: fx.Graph, marks: list[fx.Node]) -> None:
    """Let everything that the marks need come before everything else: positions in a prompt may be counted before the
    image is looked at, and have to be counted over what is left of it."""
    early = with_writes(graph, set(marks).union(*(ancestors(mark) for mark in marks)))
    nodes = list(graph.nodes)
    first = next((n for n in nodes if n.op == "call_function" and n not in early), None)
    if first is None:
        return
    for node in nodes[nodes.index(first) :]:
        if node in early:
            first.prepend(node)
