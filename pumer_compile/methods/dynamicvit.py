"""`method: dynamicvit`: image tokens that small networks keep, trained with the model (Rao et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import LocateError, PlanError, ScheduleError
from .about import About
from .base import Method

if TYPE_CHECKING:
    from torch import Tensor

    from ..analysis.attention import Attention
    from ..reducers import LearnedReducer, Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream


class DynamicViT(Method):
    """Keeps the image tokens that a predictor before each of some layers is surest of. It reads no text: tokens of a
    fusion model are rated by what the layers before have made of them.

    The predictors learn: `training: true` gives a graph in which every token stays and later attention is masked, for
    `distill.keep_ratio_loss`; then `predictors` is the file that `distill.save_predictors` wrote.

    Args:
        layers: attention nodes in execution order, from 0; a predictor stands before the layer of each.
        group: of which those are: `cross_modal`, or `vision` of a tower.
        keep: share of the image tokens, class token not counted, that is kept at the first of them; the square of it
            at the second, and so on. Rounded down.
        predictors: file of their weights (safetensors), from the working directory; without one they are new, for
            training alone.
        training: mask tokens instead of dropping them.
    """

    about = About(
        does="keeps the image tokens that small trained networks choose, before some layers",
        reads="the tokens themselves",
        use="as the baseline of PuMer's paper; its predictors have to be trained",
        paper="Rao et al., DynamicViT, NeurIPS 2021",
        code="raoyongming/DynamicViT, MIT",
    )

    method: Literal["dynamicvit"] = "dynamicvit"
    semantics: Literal["reference"] = "reference"
    layers: Annotated[
        tuple[Annotated[int, Field(ge=0, strict=True)], ...],
        Field(description="the attention nodes before whose layers a predictor stands, such as [3, 6, 9]"),
    ]
    group: Literal["cross_modal", "vision"] = "cross_modal"
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.7
    predictors: str | None = None
    training: bool = False

    @field_validator("layers")
    @classmethod
    def _ascending(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or list(layers) != sorted(set(layers)):
            raise ValueError(f"`layers` names at least one layer, in ascending order, each once; got {list(layers)}")
        return layers

    @model_validator(mode="after")
    def _has_predictors(self) -> DynamicViT:
        if self.predictors is None and not self.training:
            raise ValueError(
                "its predictors have to be trained: give `predictors: FILE`, which distill.save_predictors wrote, or "
                "`training: true` to train new ones"
            )
        return self

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`; of the file what it holds, not its name."""
        from ..files import sha256_file

        weights = {"predictors": sha256_file(self._file())} if self.predictors is not None else {}
        keys = {"layers": list(self.layers), "group": self.group, "keep": self.keep, "training": self.training}
        return {**super().canonical(), **keys, **weights}

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Method.addresses`."""
        return tuple(f"{self.group}.{layer}" for layer in self.layers)

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: what enters the layers."""
        from ..analysis.carrier import entering_of
        from ..rewrite.sites import Site

        sites: list[Site] = []
        for address in self.addresses:
            for attention in graph.choose(address):
                images = _images(graph, attention)
                entering = entering_of(attention.context)
                if entering is None:
                    raise LocateError(
                        f"`method: dynamicvit` reduces what enters the layer of {attention.described}, and no residual "
                        "value was found there: looked for what the output of its attention is added to, from which "
                        "its queries and keys are computed."
                    )
                graph.check_whole(attention)
                first = sites[0] if sites else None
                share = self.keep ** (1 + self.layers.index(int(address.split(".")[1])))
                sites.append(Site(attention, entering, streams=images, keep=share, first=first))
        assert sites[0].attention is not None
        graph.check_masks(sites[0].attention)
        return sites

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..analysis.rules import shape
        from ..reducers import LearnedReducer, MaskingReducer

        whole = stream.tokens if site.first is None or site.first.plan is None else site.first.plan.before[stream.name]
        keep = int((whole - stream.learned) * site.keep) + stream.learned
        if not stream.learned < keep < whole or (keep >= stream.tokens and not self.training):
            raise PlanError(
                f"A share of {site.keep:.3g} of the {whole - stream.learned} tokens of {stream.name} is "
                f"{keep - stream.learned}, and {stream.tokens - stream.learned} are left at {site.described}: a stage "
                "leaves at least 1 and fewer than before. Choose another `keep`."
            )
        assert site.after is not None
        width = int(shape(site.after)[-1])
        if width % 4:
            raise PlanError(f"Tokens at {site.described} are {width} wide; a predictor needs a multiple of 4.")
        made: LearnedReducer = (
            MaskingReducer(stream.tokens, keep, width, stream.learned, share=site.keep)
            if self.training
            else LearnedReducer(stream.tokens, keep, width, stream.learned)
        )
        if self.predictors is not None:
            self._load(made, f"{site.name}.{stream.name}")
        return made

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: attention that knows the masks, while they are learned."""
        from ..rewrite.published_softmax import masked_softmaxes

        assert sites[0].attention is not None
        return masked_softmaxes(graph, sites[0].attention, set(sites[0].streams)) if self.training else {}

    def _file(self) -> Path:
        path = Path(str(self.predictors))
        if not path.is_file():
            raise ScheduleError(f"The schedule names the predictors {str(path)!r}, and there is no such file.")
        return path

    def _load(self, reducer: LearnedReducer, name: str) -> None:
        """Give a reducer its predictor's weights.

        Raises:
            ScheduleError: the file has none for it, or others.
        """
        from safetensors.torch import load_file

        weights = load_file(self._file())
        prefix = f"{name}."
        found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        wanted: dict[str, Tensor] = reducer.predictor.state_dict()
        sizes, own = ({key: list(value.shape) for key, value in x.items()} for x in (found, wanted))
        if sizes != own:
            others = sorted({key.rsplit(".", 3)[0] for key in weights})
            raise ScheduleError(
                f"{self.predictors} does not hold the weights of the predictor {name}: it has predictors for "
                f"{', '.join(others) or 'nothing'}, and tensors of this one with the sizes {sizes or 'none'}; a model "
                f"of this width needs {own}. Train them with the same `layers` and `group`, on this model."
            )
        reducer.predictor.load_state_dict(found)


def _images(graph: LocatedGraph, attention: Attention) -> tuple[str, ...]:
    """The image among the queries and keys of an attention."""
    both = [s for s in attention.query_axis.streams if s in attention.key_axis.streams]
    images = tuple(s for s in both if graph.modality(s) == "image")
    if not images:
        raise LocateError(
            f"`method: dynamicvit` keeps image tokens where they attend to each other, and {attention.described} is "
            f"attention from {attention.query_axis} to {attention.key_axis}. Choose layers whose queries and keys are "
            "the image, alone or with the text."
        )
    return images
