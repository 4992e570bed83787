"""Small encoders whose heads do something with their tokens, and the rewriting pass over them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, fx

from pumer_compile import Schedule, capture
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import locate, mask_kinds
from pumer_compile.passes.insert import plan_insertions
from pumer_compile.reduce import reduce_graph
from pumer_compile.rewrite.rewriter import Rewriter
from pumer_compile.rewrite.sites import LocatedGraph, cross_modal_layers
from tests.support.models import Config, Fusion, Head, inputs_for, make, program, reduced, schedule

BASE = Config(mask="none", layers=2)
SITES = {0: (0.2, 0.3, 0.25)}
TEXT, IMAGE, TEXT_AFTER, IMAGE_AFTER = 7, 25, 5, 12


def walk(config: Config, wanted: Schedule) -> tuple[Rewriter, fx.GraphModule]:
    """The rewriting pass alone."""
    module = program(config).module
    annotation = annotate(module)
    attentions = locate(module, annotation)
    insertions = plan_insertions(LocatedGraph(annotation, attentions), wanted)
    rewriter = Rewriter(module, annotation, mask_kinds(attentions), layers=cross_modal_layers(attentions))
    return rewriter, rewriter.run(insertions.after, insertions.instead)


class ManyHeads(Fusion):
    """Gives what every head gives, by name: one capture for all of them."""

    heads: tuple[Head, ...]

    def finish(self, x: Tensor, text: int) -> dict[str, Tensor]:
        x = self.last(x)
        return {head.__name__: head(x, text) for head in self.heads}


@functools.cache
def compared(
    heads: tuple[Head, ...], dynamic: bool, semantics: str, sites: tuple[Any, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by head: of the reduced graph, of the model reduced by hand, and of the unreduced model."""
    kind = type("Heads", (ManyHeads,), {"heads": heads})
    config = dataclasses.replace(BASE, dynamic=dynamic, mask="additive")
    model = make(config, kind=kind)
    captured = capture(model, inputs_for(config), dynamic_batch=dynamic)
    prune, image, text = sites
    wanted = schedule(semantics, (0,), prune=prune, merge={"image": image, "text": text})
    inputs = inputs_for(config, seed=7, batch=3 if dynamic else 2)
    with torch.no_grad():
        found = reduce_graph(captured, wanted)(**inputs)
        expected, _ = reduced(model, inputs, {0: sites}, semantics)
        return found, expected, model(**inputs)
