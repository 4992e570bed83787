"""Which pixels a token is made of: found by gradients, whatever moved them there.

Between the pixels and a reducer, models cut patches (in any order), project, normalise, fold neighbours together and
mix tokens by attention. With every attention's context held fixed, a token depends on its own pixels alone: those that
its residual value came from. Three backward passes tell which: of the sum of all tokens (each read through one random
vector), of the same with weights 1, 2, 3 ..., and with their squares. At a pixel that one token is made of, the second
over the first is its number, and the third over the first its square; where several tokens share a pixel (patches that
overlap), the two do not agree, and no token has it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..analysis.narrow import published_softmax
from ..analysis.operators import ATTENTION, MATMULS, SOFTMAX, VIEWS
from ..analysis.rules import is_pointwise
from ..reducers import ApplyMap, Signal, reducers_of

Owners = dict[str, np.ndarray[Any, Any]]
"""By input: of each element, the number of its token, `sample * tokens + token`; -1 where it has none, or several."""

# Of what has a gradient, how much must be of one token each; less is an accident.
_SHARE = 0.9
# Where gradients are smaller than this share of the largest, they are rounding.
_NOTHING = 1e-9
# How far a ratio may be from a whole number.
_ROUNDING = 0.1


def owners_of(module: fx.GraphModule, inputs: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Owners]:
    """The pixels of the tokens that reducers are given.

    Args:
        module: a reduced graph, in float32.
        inputs: a batch; floating-point inputs are looked at, and others taken as they are.
        wanted: names of reducers.

    Returns:
        By reducer; one without an entry is given tokens that no pixel can be followed to.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = {
        # Noise: a picture in one colour would leave norms without a gradient.
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float32).requires_grad_()
        for name, tensor in inputs.items()
        if tensor.is_floating_point()
    }
    watch = _Watch(module, wanted)
    order = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    with torch.enable_grad(), _fixed(module):
        watch.run(*({**inputs, **pixels}[name] for name in order), enable_io_processing=False)
        return {name: found for name, given in watch.given.items() if (found := _owners(given, pixels))}


def contexts_of(graph: fx.Graph) -> set[fx.Node]:
    """Where tokens meet: fused attention, and products of probabilities with values, whatever wrote the softmax."""
    found, open_ = set(), []
    for node in graph.nodes:
        if node.target is ATTENTION:
            found.add(node)
        elif node.target in SOFTMAX or published_softmax(node) is not None:
            open_.append(node)
    seen = set(open_)
    while open_:
        node = open_.pop()
        for user in node.users:
            if user.target in MATMULS and user.args[0] is node:
                found.add(user)
            elif user not in seen and user.op == "call_function" and (user.target in VIEWS or is_pointwise(user)):
                seen.add(user)
                open_.append(user)
    return found


@contextmanager
def _fixed(module: nn.Module) -> Iterator[None]:
    """Parameters without gradients, within the block."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


class _Watch(fx.Interpreter):
    """Runs a graph as far as some reducers, every attention's context held fixed, and keeps what they are given.

    A reducer of tokens that are on no carrier there (a co-attention's image), or whose output projection was moved
    behind it (`sink_projections`), is given none: then its keys do, or what its map is applied to, summand by summand.
    """

    def __init__(self, module: fx.GraphModule, wanted: Collection[str]) -> None:
        super().__init__(module)
        self.wanted = {name: reducer for name, reducer in reducers_of(module).items() if name in wanted}
        self.contexts = contexts_of(module.graph)
        self.given: dict[str, list[Tensor]] = {}
        self.direct: set[str] = set()
        self.calls = {node: name for node in module.graph.find_nodes(op="call_module") if (name := self._reducer(node))}
        self.left = len(self.calls)

    def _reducer(self, node: fx.Node) -> str:
        """Of a node that takes the tokens of a wanted reducer, its name; else ''."""
        target = str(node.target)
        assert isinstance(self.module, nn.Module)
        if isinstance(self.module.get_submodule(target), ApplyMap):
            target = target.removesuffix("_map")
        return target if target in self.wanted else ""

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`; once all is seen, the rest is not run."""
        if not self.left:
            return None
        result = super().run_node(n)
        if n in self.calls:
            self._keep(self.calls[n], str(n.target) in self.wanted, self.fetch_args_kwargs_from_env(n)[0])
            self.left -= 1
        return result.detach() if n in self.contexts and isinstance(result, Tensor) else result

    def _keep(self, name: str, called: bool, args: Sequence[Any]) -> None:
        tokens, reads = args[0], self.wanted[name].reads
        if called and tokens is None and Signal.KEYS in reads:
            keys = args[1 + reads.index(Signal.KEYS)]
            tokens = keys.transpose(1, 2).flatten(2)
        if isinstance(tokens, Tensor) and (called or name not in self.direct):
            self.given.setdefault(name, []).append(tokens)
            self.direct |= {name} if called else set()


def _owners(given: Sequence[Tensor], pixels: Mapping[str, Tensor]) -> Owners:
    """Of the summands of one reducer's tokens, `[batch, tokens, width]` each."""
    given = [tokens for tokens in given if tokens.requires_grad]
    if not given:
        return {}
    batch, tokens, width = given[0].shape
    read = torch.randn(width, generator=torch.Generator().manual_seed(1))
    values = sum((part.float() @ read for part in given if part.shape == given[0].shape), torch.zeros(batch, tokens))
    number = torch.arange(1, batch * tokens + 1, dtype=torch.float32).view(batch, tokens)
    passes = [
        torch.autograd.grad((values * weights).sum(), list(pixels.values()), retain_graph=True, allow_unused=True)
        for weights in (torch.ones_like(number), number, number * number / number.numel())
    ]
    found = {}
    for name, once, counted, squared in zip(pixels, *passes, strict=True):
        if once is not None:
            found[name] = _numbered(once, counted, squared, number.numel())
    return {name: owners for name, owners in found.items() if (owners >= 0).any()}


def _numbered(once: Tensor, counted: Tensor, squared: Tensor, tokens: int) -> np.ndarray[Any, Any]:
    once, counted, squared = once.double(), counted.double(), squared.double()
    something = once.abs() > _NOTHING * once.abs().amax().clamp(min=1e-30)
    safe = torch.where(something, once, 1.0)
    first, second = counted / safe, (squared * tokens / safe).clamp(min=0).sqrt()
    nearest = first.round()
    alone = (first - nearest).abs().le(_ROUNDING) & (second - nearest).abs().le(_ROUNDING)
    good = something & alone & (nearest >= 1) & (nearest <= tokens)
    if int(good.sum()) < _SHARE * int(something.sum()):
        good = torch.zeros_like(good)
    return torch.where(good, nearest - 1, -1.0).long().numpy()
