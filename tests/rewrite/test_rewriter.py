"""Sizes that follow the reducers: whatever stands behind a site computes what it would on fewer tokens.

Most tests are differential: the head of a small encoder does something with its tokens, written with `x.shape` in
PyTorch, and the reduced graph, in which these sizes were literals, must equal the head on tokens reduced by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pumer_compile import capture
from pumer_compile.analysis.annotate import Annotation
from pumer_compile.analysis.attention import locate
from pumer_compile.errors import AxisError, PumerError
from pumer_compile.reduce import reduce_graph
from pumer_compile.rewrite.rewriter import Rewriter
from tests.support.helpers import count_op
from tests.support.models import Config, Fusion, Head, inputs_for, make, program, reduced, schedule
from tests.support.walks import BASE, IMAGE, SITES, TEXT, TEXT_AFTER, compared, walk

aten = torch.ops.aten

# --- heads that follow ----------------------------------------------------------------------------------------------


def sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2]


def view_heads(x: Tensor, text: int) -> Tensor:
    b, n, d = sizes(x)
    y = x.view(b, n, 4, d // 4).permute(0, 2, 1, 3).softmax(2)
    return y.transpose(1, 2).reshape(b, n, d).mean(1)


def flat_batch(x: Tensor, text: int) -> Tensor:
    b, n, d = sizes(x)
    return x.reshape(b * n, d).softmax(-1).view(b, n, d).mean(1)


def flatten_unflatten(x: Tensor, text: int) -> Tensor:
    b, n, _ = sizes(x)
    return x.flatten(0, 1).softmax(-1).unflatten(0, (b, n)).mean(1)


def batch_and_heads(x: Tensor, text: int) -> Tensor:
    """Batched products of three dimensions, as in `nn.MultiheadAttention`."""
    b, n, d = sizes(x)
    y = x.view(b, n, 4, d // 4).transpose(1, 2).reshape(b * 4, n, d // 4)
    y = torch.bmm(torch.bmm(y, y.transpose(1, 2)).softmax(-1), y)
    return y.view(b, 4, n, d // 4).transpose(1, 2).reshape(b, n, d).mean(1)


def parts(x: Tensor, text: int) -> Tensor:
    return torch.cat([x[:, :text] * 2, x[:, text:].tanh()], 1).mean(1)


def swapped(x: Tensor, text: int) -> Tensor:
    y = torch.cat([x[:, text:], x[:, :text]], 1)
    return y[:, 0] + y[:, y.shape[1] - text]


def between_streams(x: Tensor, text: int) -> Tensor:
    a, b = x[:, :text], x[:, text:]
    return ((a @ b.transpose(1, 2)).softmax(-1) @ b).mean(1) + a[:, 0] + b.amax(1)


def expanded(x: Tensor, text: int) -> Tensor:
    b, n, d = sizes(x)
    return (x * torch.linspace(0.5, 1.5, d).view(1, 1, d).expand(b, n, d)).amax(1)


def constants(x: Tensor, text: int) -> Tensor:
    b, n, _ = sizes(x)
    x = x * torch.full((b, n, 1), 0.5) + torch.ones(1, n, 1) + torch.zeros(1, n, 1)
    return (x * x.new_ones(b, n, 1)).amax(1)


def self_similarity(x: Tensor, text: int) -> Tensor:
    return ((x @ x.transpose(1, 2)).softmax(-1) @ x).amax(1)


def einsums(x: Tensor, text: int) -> Tensor:
    weights = torch.einsum("bnd,bmd->bnm", x, x).softmax(-1)
    return torch.einsum("bnm,bmd->bnd", weights, x).amax(1)


def centred(x: Tensor, text: int) -> Tensor:
    return (x - x.mean(1, keepdim=True)).amax(1)


def repeated(x: Tensor, text: int) -> Tensor:
    return x.repeat(1, 1, 2).amax(1)[:, : x.shape[-1]]


def reduced_twice(x: Tensor, text: int) -> Tensor:
    return x.mean((1, 2)).unsqueeze(-1) + x.amax(1)


def stacked(x: Tensor, text: int) -> Tensor:
    return torch.stack([x, x.tanh()], 2).amax((1, 2))


def squeezed(x: Tensor, text: int) -> Tensor:
    return x.unsqueeze(1).unsqueeze(-1).squeeze(1).squeeze(-1).amin(1)


def from_the_end(x: Tensor, text: int) -> Tensor:
    return x[:, -x.shape[1] :].amax(1) + x[:, text - x.shape[1] :].amax(1)


def narrowed(x: Tensor, text: int) -> Tensor:
    return x.narrow(1, 0, x.shape[1]).amax(1)


def first_text(x: Tensor, text: int) -> Tensor:
    return x[:, 0]


def first_image(x: Tensor, text: int) -> Tensor:
    """The class token under `safe`."""
    return x[:, text]


def gathered_features(x: Tensor, text: int) -> Tensor:
    return x.index_select(2, torch.arange(x.shape[2]).flip(0)).amax(1)


def norm_and_dropout(x: Tensor, text: int) -> Tensor:
    return F.dropout(F.layer_norm(x, (x.shape[-1],)), 0.1, False).amax(1)


def chunked(x: Tensor, text: int) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([b, a], -1).amax(1)


def summed_features(x: Tensor, text: int) -> Tensor:
    """A sum over another axis than that of the tokens, divided by nothing."""
    return (x * x.tanh().sum(-1, keepdim=True)).amax(1)


def counted_mean(x: Tensor, text: int) -> Tensor:
    """Tokens summed, and counted by a sum of ones, which no learned number is in."""
    return x.sum(1) / torch.ones_like(x).sum(1)


def own_shares(x: Tensor, text: int) -> Tensor:
    """Weights that are divided by their own sum, and so come to 1 for any number of tokens."""
    weights = x.mean(-1).sigmoid()
    weights = weights / (weights.sum(1, keepdim=True) + 1e-6)
    return (weights.unsqueeze(1) @ x).squeeze(1)


HEADS: tuple[Head, ...] = (
    summed_features,
    counted_mean,
    own_shares,
    view_heads,
    batch_and_heads,
    parts,
    swapped,
    between_streams,
    expanded,
    constants,
    self_similarity,
    einsums,
    centred,
    repeated,
    reduced_twice,
    stacked,
    squeezed,
    from_the_end,
    first_text,
    first_image,
    gathered_features,
    norm_and_dropout,
    narrowed,
    chunked,
)

ALONE: tuple[Head, ...] = (flat_batch, flatten_unflatten)
"""Each in a model of its own, so that it fails by itself."""


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("head", HEADS + ALONE, ids=lambda h: h.__name__)
def test_the_rest_of_the_model_follows(head: Head, dynamic: bool) -> None:
    heads = (head,) if head in ALONE else HEADS
    found, expected, unreduced = compared(heads, dynamic, "safe", SITES[0])
    name = head.__name__
    torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    # A reducer that does nothing would be seen.
    assert (unreduced[name] - expected[name]).abs().max() > 1e-3


# --- sums over tokens with a count that was a literal ---------------------------------------------------------------


def mean_by_shape(x: Tensor, text: int) -> Tensor:
    return x.sum(1) / x.shape[1]


def mean_of_text(x: Tensor, text: int) -> Tensor:
    return x[:, :text].sum(1) * (1 / text)


def root_of_count(x: Tensor, text: int) -> Tensor:
    return x.sum(1) / x.shape[1] ** 0.5


@pytest.mark.parametrize("head", [mean_by_shape, mean_of_text, root_of_count], ids=lambda h: h.__name__)
def test_a_count_in_the_arithmetic_follows_or_is_refused(head: Head) -> None:
    """A divisor that was the number of tokens is a plain number in the graph. It must not stay the old one."""
    config = dataclasses.replace(BASE, head=head, mask="additive")
    inputs = inputs_for(config)
    expected, _ = reduced(make(config), inputs, SITES, "safe")
    try:
        module = reduce_graph(program(config), schedule("safe", (0,)))
    except PumerError as error:
        assert "aten.sum" in str(error)
        return
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


class Pooled(Fusion):
    """Mean over real tokens, by the attention mask."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        x = self.layers[0](x, self.mask(x, attention_mask, None))
        weights = self.tokens_open(x, attention_mask, None).to(x.dtype)
        return (x * 0 + 1 * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


def test_masked_mean_pooling_stays_a_mean_or_is_refused() -> None:
    """The mean of ones is one, over however many tokens."""
    config = dataclasses.replace(BASE, mask="additive", layers=1)
    captured = capture(make(config, kind=Pooled), inputs_for(config))
    try:
        module = reduce_graph(captured, schedule("safe", (0,)))
    except PumerError as error:
        assert "sum" in str(error)
        return
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs_for(config)), torch.ones(2, config.width))


@pytest.mark.parametrize(
    ("semantics", "budgets", "fine"),
    [
        ("safe", {"prune": 4}, True),  # the class token is protected
        ("paper", {"merge": {"image": 4}}, True),  # token 0 never merges away
        ("paper", {"prune": 4}, False),  # the most salient token comes first
        ("reference", {"prune": 4}, True),  # the published code takes whatever comes first
    ],
)
def test_the_first_image_token_after_a_reducer(semantics: str, budgets: dict[str, Any], fine: bool) -> None:
    config = dataclasses.replace(BASE, head=first_image)
    if not fine:
        with pytest.raises(AxisError, match=r"aten\.select\.int.*takes position 7"):
            reduce_graph(program(config), schedule(semantics, (0,), **budgets))
        return
    module, inputs = reduce_graph(program(config), schedule(semantics, (0,), **budgets)), inputs_for(config)
    sites = {0: (budgets.get("prune", 0), budgets.get("merge", {}).get("image", 0), 0)}
    expected, _ = reduced(make(config), inputs, sites, semantics)
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), expected, atol=1e-5, rtol=0)


# --- the walk -------------------------------------------------------------------------------------------------------


def test_the_captured_graph_is_left_as_it_was() -> None:
    captured = program(Config())
    code, names = captured.module.code, {n for n, _ in captured.module.named_modules()}
    walk(Config(), schedule())
    assert captured.module.code == code
    assert {n for n, _ in captured.module.named_modules()} == names


def test_nothing_before_the_first_site_changes() -> None:
    rewriter, module = walk(Config(), schedule("paper", (1,)))
    sites = locate(rewriter.source, rewriter.annotation)
    for node in rewriter.source.graph.nodes:
        new = rewriter.env[node]
        if node is sites[1].carrier:
            break
        assert new.target == node.target
        assert [a for a in new.args if not isinstance(a, fx.Node | list | tuple)] == [
            a for a in node.args if not isinstance(a, fx.Node | list | tuple)
        ]
    module.graph.lint()


def test_literals_follow() -> None:
    """`view` to heads after the site: the sequence length is the new one, everything else as it was."""
    rewriter, _ = walk(BASE, schedule("paper", (0,)))
    found = []
    for node in rewriter.source.graph.nodes:
        if node.target in (aten.view.default, aten.reshape.default):
            found.append((list(node.args[1]), list(rewriter.env[node].args[1])))
    old, image = TEXT + IMAGE, 14
    new = TEXT_AFTER + image
    assert ([2, old, 4, 8], [2, new, 4, 8]) in found
    assert ([2, old, 32], [2, new, 32]) in found
    assert rewriter.literals == sum(a != b for a, b in found)
    unchanged = [(a, b) for a, b in found if a == b]
    assert unchanged  # those of the layer before the site


def test_operator_counts() -> None:
    """The walk adds reducers and slices, and takes away nothing but what they replace."""
    before = program(BASE).module
    _, after = walk(BASE, schedule("paper", (0,)))
    for target in (aten.linear.default, aten.softmax.int, aten.matmul.default, aten.layer_norm.default):
        assert count_op(after, target) == count_op(before, target)
    modules = [n for n in after.graph.nodes if n.op == "call_module"]
    assert [str(n.target) for n in modules] == ["reducer.cross_modal_0.text", "reducer.cross_modal_0.image"] or [
        str(n.target) for n in modules
    ] == ["reducer.cross_modal_0.image", "reducer.cross_modal_0.text"]
    assert count_op(after, aten.cat.default) == count_op(before, aten.cat.default) + 1


def test_new_nodes_say_where_they_come_from() -> None:
    _, module = walk(BASE, schedule("paper", (0,)))
    for node in module.graph.nodes:
        if node.op == "call_module":
            assert "tests/support/models.py" in node.meta["stack_trace"]


def test_parameters_are_shared_and_keep_their_names() -> None:
    captured = program(Config()).module
    module = reduce_graph(program(Config()), schedule("paper", (0,)))
    own = dict(module.named_parameters())
    assert own.keys() == dict(captured.named_parameters()).keys()
    for name, parameter in captured.named_parameters():
        assert own[name] is parameter
    assert set(module.state_dict()) == set(captured.state_dict())


def test_a_name_for_each_of_two_towers() -> None:
    """Layers of two kinds of towers have the same numbers; what is inserted for them has names of its own."""
    rewriter = Rewriter(fx.GraphModule({}, fx.Graph()), Annotation(), {})
    names = []
    for inside in (".real", "", ".real"):
        name = rewriter.free_name("reducer.vision_1.attention_0")
        rewriter.call_module(f"{name}{inside}", nn.Identity())
        names.append(name)
    assert names == [f"reducer.vision_1.attention_0{number}" for number in ("", "_2", "_3")]
