"""From a captured graph to its outline: what schedules of a model's own are made by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ..analysis.attention import Attention
from ..analysis.marks import Prompt
from ..errors import PumerError
from ..methods.base import ActsOn, Marking, Method
from ..methods.proposing import Outline
from ..passes.manager import State
from ..plan import PromptPlace
from ..reduce import Analysed
from ..rewrite.sites import LocatedGraph


class Looking(Method):
    """No method: what the analysis finds for a schedule that acts on these places of a prompt, or on none."""

    places: ActsOn | None = None

    @property
    def marks(self) -> Marking | None:
        """See `Method.marks`."""
        return None if self.places is None else Marking(self.places, votes=False)


@dataclass(frozen=True)
class Found:
    """What is in a graph.

    Attributes:
        outline: for schedules.
        attentions: in execution order, over the prompt where there is one.
        streams: tokens by stream, of the same graph.
        prompts: where images stand in prompts.
        errors: why a part was not found.
    """

    outline: Outline
    attentions: tuple[Attention, ...] = ()
    streams: dict[str, int] = field(default_factory=dict)
    prompts: tuple[PromptPlace, ...] = ()
    errors: tuple[PumerError, ...] = ()


def look(analysed: Analysed) -> Found:
    """What is in a captured program. Nothing is raised for a graph that cannot be followed: see `Found.errors`."""
    errors: list[PumerError] = []

    def state(places: ActsOn | None) -> State | None:
        try:
            return analysed.state(Looking(places=places))
        except PumerError as error:
            errors.append(error)
            return None

    layers = state("layers")
    if layers is None:
        layers = state("rows")
    elif not layers.get(LocatedGraph).marks:
        return _fusion(layers, errors)
    plain = state(None)
    if layers is None:
        return _fusion(plain, errors) if plain is not None else Found(Outline(), errors=tuple(errors))
    return _prompt(layers, state("rows"), plain, errors)


def _fusion(state: State, errors: list[PumerError]) -> Found:
    """A model whose image stands in no prompt."""
    graph, annotation = state.get(LocatedGraph), state.annotation
    images = [name for name, kind in annotation.modality.items() if kind == "image"]
    outline = Outline(
        streams=dict(annotation.streams),
        informed=_informed(graph),
        tower=_tower(graph),
        learned=max((annotation.learned.get(name, 0) for name in images), default=0),
    )
    return Found(outline, tuple(graph.attentions), dict(annotation.streams), errors=tuple(errors))


def _prompt(layers: State, rows: State | None, plain: State | None, errors: list[PumerError]) -> Found:
    """A model whose image stands in a language model's prompt."""
    graph, prompt = layers.get(LocatedGraph), layers.get(Prompt)
    marks = (rows or layers).get(LocatedGraph).marks or graph.marks
    smallest = min(marks, key=lambda mark: sum(map(len, mark.crops)))
    outline = Outline(
        streams=dict(layers.annotation.streams),
        informed=_informed(graph),
        tower=_tower((plain or layers).get(LocatedGraph)),
        crops=min(len(crop) for mark in marks for crop in mark.crops),
        rows=sum(map(len, smallest.crops)),
        frames=len(smallest.crops),
        layers=len(graph.prompt_layers() or graph.reading_layers()),
    )
    read = not prompt.blocks
    if read and plain is not None:
        outline = replace(outline, informed=_informed(plain.get(LocatedGraph)), read=True)
    streams = dict(layers.annotation.streams)
    return Found(outline, tuple(graph.attentions), streams, tuple(prompt.places), tuple(errors))


def _informed(graph: LocatedGraph) -> tuple[str, ...]:
    return _addresses(
        a
        for a in graph.attentions
        if a.carrier is not None
        and "text" in graph.modalities(a.query_axis)
        and "image" in graph.modalities(a.key_axis)
    )


def _tower(graph: LocatedGraph) -> tuple[str, ...]:
    """Attention among image tokens alone; in a prompt's graph, before it."""
    alone = (a for a in graph.attentions if graph.modalities(a.query_axis) == {"image"})
    return _addresses(a for a in alone if a.carrier is not None)


def _addresses(attentions: Iterable[Attention]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(attention.address for attention in attentions))
