"""Attention nodes: found in both forms, followed to their residual, and nothing else taken for one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pumer_compile import Program, capture
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import Attention, choose, locate, mask_kinds
from pumer_compile.analysis.nodes import values
from pumer_compile.errors import LocateError, UsageError
from tests.support.helpers import count_op
from tests.support.models import Config, describe, program, variants

aten = torch.ops.aten


def located(captured: Program) -> list[Attention]:
    return locate(captured.module, annotate(captured.module, captured.streams))


FORMS = variants(form=("unfused", "sdpa"), norm=("pre", "post"), mask=("none", "additive", "bool"))


@pytest.mark.parametrize("config", FORMS, ids=describe)
def test_every_layer_is_found(config: Config) -> None:
    captured = program(config)
    before = len(captured.module.graph.nodes)
    found = located(captured)
    assert [a.address for a in found] == ["cross_modal.0", "cross_modal.1", "cross_modal.2"]
    assert [a.module for a in found] == [f"layers.{i}.attention" for i in range(3)]
    form = aten.scaled_dot_product_attention.default if config.form == "sdpa" else aten.softmax.int
    assert count_op(captured.module, form) == 3
    assert len(captured.module.graph.nodes) == before
    for attention in found:
        assert attention.cross_modal
        assert attention.streams == ("text", "image")
        assert str(attention.query_axis) == str(attention.key_axis) == "[text:7 | image:25]"
        assert attention.fused == (config.form == "sdpa")
        assert tuple(values(attention.query)[0].shape) == (2, 4, 32, 8)
        assert tuple(values(attention.context)[0].shape) == (2, 4, 32, 8)
        key = attention.key if attention.fused else attention.key_transposed
        assert tuple(values(key)[0].shape) == ((2, 4, 32, 8) if attention.fused else (2, 4, 8, 32))
        assert (attention.key is not None) == (attention.scores is None) == attention.fused
        assert len(attention.masks) == (config.mask != "none")
        for mask in attention.masks:
            assert tuple(values(mask.node)[0].shape) == (2, 1, 1, 32)
        assert attention.carrier is not None
        expected = aten.layer_norm.default if config.norm == "post" else aten.add.Tensor
        assert attention.carrier.target is expected
        assert tuple(values(attention.carrier)[0].shape) == (2, 32, 32)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_carrier_is_what_the_mlp_reads(norm: str) -> None:
    captured = program(Config(norm=norm))
    for index, attention in enumerate(located(captured)):
        users = [n for n in attention.carrier.users if values(n)]
        if norm == "pre":
            assert {u.target for u in users} == {aten.layer_norm.default, aten.add.Tensor}
            residual = next(u for u in users if u.target is aten.add.Tensor)
            assert residual.args[0] is attention.carrier
        else:
            assert {u.target for u in users} == {aten.linear.default, aten.add.Tensor}
            stack = next(iter(reversed(list(attention.carrier.meta["nn_module_stack"].values()))))
            assert stack[0] == f"layers.{index}.norm1"


def test_scores_are_scaled_and_not_yet_masked() -> None:
    """The reducer's own softmax starts from them."""
    captured = program(Config(mask="additive"))
    for attention in located(captured):
        assert attention.scores.target is aten.div.Tensor
        assert attention.scores.args[1] == pytest.approx(math.sqrt(8))
        assert attention.probabilities.target is aten.softmax.int


# --- attention by itself ------------------------------------------------------------------------------------


class Block(nn.Module):
    """Text ids and patches, one attention of some kind, a residual of some kind."""

    def __init__(self, attend, residual: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.table = nn.Parameter(torch.randn(1, 2, 13, 13))
        self.packed = nn.Linear(8, 24)
        self.attend, self.residual = attend, residual

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        x = torch.cat([self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)], 1)
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        context = self.attend(self, q, k, v)
        y = self.out(context.transpose(1, 2).flatten(2))
        return (x + y if self.residual else y)[:, 0]


def block(attend, residual: bool = True) -> Program:
    inputs = {"ids": torch.randint(0, 20, (2, 7)), "pixels": torch.randn(2, 3, 4, 6)}
    return capture(Block(attend, residual).eval(), inputs)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ transposed(k)


ATTENTIONS = {
    "scaled after": (lambda m, q, k, v: (scores(q, k) / 2).softmax(-1) @ v, 0),
    "scaled before": (lambda m, q, k, v: scores(q / 2, k).softmax(-1) @ v, 0),
    "not scaled": (lambda m, q, k, v: scores(q, k).softmax(-1) @ v, 0),
    "softmax in single precision": (
        lambda m, q, k, v: (scores(q, k) / 2).softmax(-1, dtype=torch.float32).to(v.dtype) @ v,
        0,
    ),
    "dropout": (lambda m, q, k, v: F.dropout(scores(q, k).softmax(-1), 0.1, m.training) @ v, 0),
    "a learned bias": (lambda m, q, k, v: (scores(q, k) / 2 + m.table).softmax(-1) @ v, 0),
    "a learned bias and a mask": (
        lambda m, q, k, v: (scores(q, k) / 2 + m.table + torch.zeros(1, 1, 1, 13)).softmax(-1) @ v,
        1,
    ),
    "two masks": (
        lambda m, q, k, v: (
            (scores(q, k) + torch.zeros(1, 1, 1, 13)).masked_fill(torch.ones(13) < 0, -1e4).softmax(-1) @ v
        ),
        2,
    ),
    "where": (
        lambda m, q, k, v: torch.where(torch.ones(1, 1, 1, 13) > 0, scores(q, k), -1e4).softmax(-1) @ v,
        1,
    ),
    "fused": (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v), 0),
    "fused with a scale": (lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 0),
    "fused with a mask by position": (
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(1, 1, 1, 13).bool()),
        1,
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_as_people_write_it(name: str) -> None:
    attend, masks = ATTENTIONS[name]
    (attention,) = located(block(attend))
    assert attention.address == "cross_modal.0"
    assert attention.carrier is not None, attention.no_carrier
    assert len(attention.masks) == masks
    if name == "a learned bias":
        assert attention.scores.target is aten.add.Tensor  # it belongs to the scores


def fused_projection(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One linear layer for queries, keys and values, taken apart."""
    x = q.transpose(1, 2).flatten(2)
    q, k, v = (m.heads(part) for part in m.packed(x).chunk(3, -1))
    return (scores(q, k) / 2).softmax(-1) @ v


def fused_heads(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by a view and unbind."""
    x = q.transpose(1, 2).flatten(2)
    q, k, v = m.packed(x).view(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("attend", [fused_projection, fused_heads])
def test_queries_keys_and_values_from_one_projection(attend) -> None:
    (attention,) = located(block(attend))
    assert str(attention.key_axis) == "[text:7 | image:6]"
    assert attention.carrier is not None


NOT_ATTENTION = {
    "softmax over features": lambda m, q, k, v: v.softmax(-1),
    "softmax over tokens": lambda m, q, k, v: v.softmax(2),
    "softmax over queries": lambda m, q, k, v: scores(q, k).softmax(2) @ v,
    "softmax without values": lambda m, q, k, v: v * scores(q, k).softmax(-1).sum(-1, keepdim=True),
    "sigmoid attention": lambda m, q, k, v: scores(q, k).sigmoid() @ v,
    "channel attention": lambda m, q, k, v: transposed((transposed(q) @ k).softmax(-1) @ transposed(v)),
    "softmax on the right": lambda m, q, k, v: transposed(transposed(v) @ scores(q, k).softmax(-1)),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_is_not_attention(name: str) -> None:
    with pytest.raises(LocateError) as caught:
        located(block(NOT_ATTENTION[name]))
    message = str(caught.value)
    assert "No attention over tokens" in message
    assert "text (7 tokens), image (6 tokens)" in message


def test_a_model_without_tokens_says_so() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scores(x, x).softmax(-1) @ x

    with pytest.raises(LocateError, match="Token streams found: none"):
        located(capture(Plain(), {"x": torch.randn(2, 7, 7)}))


# --- masks ----------------------------------------------------------------------------------------------------------


def open_keys(ids: Tensor) -> Tensor:
    """`[B, 1, 1, 13]`: which keys are open."""
    ones = torch.ones(ids.shape[0], 6, dtype=torch.bool)
    return torch.cat([ids > 3, ones], 1)[:, None, None, :]


class Padded(Block):
    """A block whose attention gets a mask made from the ids."""

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        x = torch.cat([self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)], 1)
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        context = self.attend(q, k, v, open_keys(ids))
        return (x + self.out(context.transpose(1, 2).flatten(2)))[:, 0]


def padded(attend) -> Program:
    inputs = {"ids": torch.randint(0, 20, (2, 7)), "pixels": torch.randn(2, 3, 4, 6)}
    return capture(Padded(attend).eval(), inputs)


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, -1e9)


POLARITIES = {
    "added": (lambda q, k, v, m: (scores(q, k) + additive(m)).softmax(-1) @ v, "additive"),
    "added on the left": (lambda q, k, v, m: (additive(m) + scores(q, k)).softmax(-1) @ v, "additive"),
    "filled": (lambda q, k, v, m: scores(q, k).masked_fill(~m, -1e4).softmax(-1) @ v, "drop"),
    "where kept": (lambda q, k, v, m: torch.where(m, scores(q, k), -1e4).softmax(-1) @ v, "keep"),
    "where dropped": (lambda q, k, v, m: torch.where(~m, -1e4, scores(q, k)).softmax(-1) @ v, "drop"),
    "fused boolean": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m), "keep"),
    "fused additive": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, additive(m)), "additive"),
}


@pytest.mark.parametrize("name", POLARITIES)
def test_how_a_mask_reads(name: str) -> None:
    attend, kind = POLARITIES[name]
    (attention,) = located(padded(attend))
    assert [m.kind for m in attention.masks] == [kind]
    assert tuple(values(attention.masks[0].node)[0].shape) == (2, 1, 1, 13)
    assert attention.unusual == ""


def test_what_is_only_reshaped_into_a_mask_reads_like_it() -> None:
    def attend_(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        wide = additive(m).to(q.dtype).expand(2, 1, 13, 13)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=wide)

    captured = padded(attend_)
    kinds = mask_kinds(located(captured))
    found = {node.target for node in kinds}
    assert aten.expand.default in found
    assert aten.where.ScalarOther in found or aten.where.self in found or aten.where.Scalar in found
    assert set(kinds.values()) == {"additive"}
    assert not any(node.op == "placeholder" for node in kinds)  # of another dtype: it reads otherwise


UNUSUAL = {
    "causal": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True), "is_causal"),
    "scaled after the mask": (
        lambda q, k, v, m: ((scores(q, k) + additive(m)) * 0.5).softmax(-1) @ v,
        "after the mask",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_attention_that_cannot_be_written_again(name: str) -> None:
    attend, why = UNUSUAL[name]
    (attention,) = located(padded(attend))
    assert why in attention.unusual


# --- residual -----------------------------------------------------------------------------------------------


def test_attention_without_a_residual_has_no_carrier() -> None:
    (attention,) = located(block(ATTENTIONS["fused"][0], residual=False))
    assert attention.carrier is None
    assert "residual addition" in attention.no_carrier
    assert "select" in attention.no_carrier


def test_what_stands_between_is_named() -> None:
    def gated(m: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = scores(q, k).softmax(-1) @ v
        return context.cumsum(-1)

    (attention,) = located(block(gated))
    assert attention.carrier is None
    assert "cumsum" in attention.no_carrier


def test_a_bias_is_no_residual() -> None:
    class Biased(Block):
        def __init__(self) -> None:
            super().__init__(None)
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
            x = torch.cat([self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)], 1)
            q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            y = F.linear(y, self.out.weight) + self.bias
            return (y + x).sum(1)

    inputs = {"ids": torch.randint(0, 20, (2, 7)), "pixels": torch.randn(2, 3, 4, 6)}
    (attention,) = located(capture(Biased(), inputs))
    assert attention.carrier is not None
    assert attention.carrier.args[0].target is aten.add.Tensor  # of the bias


# --- towers and cross-attention -----------------------------------------------------------------------------


class Towers(nn.Module):
    """A text tower, an image tower, and a co-attention pair: text looks at the image, then the image at the text."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.patches = nn.Conv2d(3, 8, 2, 2)
        self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def attend(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        q, k = x.unflatten(-1, (2, 4)).transpose(1, 2), y.unflatten(-1, (2, 4)).transpose(1, 2)
        context = scores(q, k).softmax(-1) @ k
        return x + self.out[index](context.transpose(1, 2).flatten(2))

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        text, image = self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)
        text = self.attend(0, text, text)
        image = self.attend(1, image, image)
        text, image = self.attend(2, text, image), self.attend(3, image, text)
        text = self.attend(4, text, text)
        return torch.cat([text[:, 0], image.mean(1)], 1)


def towers() -> Program:
    inputs = {"ids": torch.randint(0, 20, (2, 6)), "pixels": torch.randn(2, 3, 4, 6)}
    return capture(Towers(), inputs)


def test_sites_are_named_by_tower_and_counted_in_execution_order() -> None:
    found = located(towers())
    assert [a.address for a in found] == ["text.0", "vision.0", "cross_modal.0", "cross_modal.1", "text.1"]
    assert [(str(a.query_axis), str(a.key_axis)) for a in found] == [
        ("[text:6]", "[text:6]"),
        ("[image:6]", "[image:6]"),
        ("[text:6]", "[image:6]"),
        ("[image:6]", "[text:6]"),
        ("[text:6]", "[text:6]"),
    ]
    assert [a.cross_modal for a in found] == [False, False, True, True, False]
    assert all(a.carrier is not None for a in found)


class SideBySide(nn.Module):
    """Two attentions over the same words, written out in the model itself, which has no name for either."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for linear in (self.one, self.other):
            q = linear(self.words(input_ids)).unflatten(-1, (4, 4)).transpose(1, 2)
            x = x + linear(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        return x.amax(1)


def test_attentions_of_no_module_are_no_layer_that_runs_again() -> None:
    found = located(capture(SideBySide().eval(), {"input_ids": torch.arange(14).view(2, 7)}))
    assert [(a.address, a.call, a.module) for a in found] == [("text.0", 0, ""), ("text.1", 0, "")]


def test_choose() -> None:
    found = located(towers())
    assert choose(found, "vision.0") == [found[1]]
    assert choose(found, "cross_modal.1") == [found[3]]
    assert [a.name for a in found[1:4]] == ["vision_0", "cross_modal_0", "cross_modal_1"]
    assert {a.call for a in found} == {0}


def test_an_unknown_site_lists_those_there_are() -> None:
    with pytest.raises(LocateError) as caught:
        choose(located(towers()), "cross_modal.7")
    message = str(caught.value)
    assert all(part in message for part in ("cross_modal.7", "text.0 to text.1", "vision.0", "cross_modal.0 to"))
    assert isinstance(caught.value, UsageError)
    assert caught.value.exit_code == 2


def test_a_text_only_model_says_why_there_is_no_cross_modal_site() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            return (x + self.out(F.scaled_dot_product_attention(x, x, x)))[:, 0]

    found = located(capture(Text(), {"ids": torch.randint(0, 20, (2, 5))}))
    assert [a.address for a in found] == ["text.0"]
    with pytest.raises(LocateError, match="No attention mixes tokens of text and image"):
        choose(found, "cross_modal.0")


def test_location_needs_no_module_names() -> None:
    """A graph whose metadata was lost."""
    module = fx.GraphModule(program(Config()).module, program(Config()).module.graph.__deepcopy__())
    for node in module.graph.nodes:
        node.meta.pop("nn_module_stack", None)
        node.meta.pop("stack_trace", None)
    found = locate(module, annotate(module))
    assert [a.address for a in found] == ["cross_modal.0", "cross_modal.1", "cross_modal.2"]
    assert {a.module for a in found} == {""}
