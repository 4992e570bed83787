"""`text_length` of `torch.compile(backend="pumer")`: outputs of the call's own length, labels, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import BlipConfig, BlipForConditionalGeneration, PreTrainedModel

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.reduce import reduce_graph
from tests.support.compiling import SMALL, assert_near, compiled, fresh_dynamo, graphs, padded, shortened
from tests.support.models import Fusion, inputs_for, make

__all__ = ["fresh_dynamo"]

IMAGE = Schedule(semantics="safe", layers=(0,), prune=0.2, merge={"image": 0.3})
BOTH = Schedule(semantics="safe", layers=(0,), prune=0.2, merge={"image": 0.3, "text": 0.25})


def blip(**text: Any) -> PreTrainedModel:
    """A caption model whose weights are large enough that a wrong position shows."""
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    words = {"vocab_size": 61, "encoder_hidden_size": 24, "max_position_embeddings": 16, "pad_token_id": 0}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(text_config={**sizes, **words, **text}, vision_config=vision)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def caption(length: int, batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 60, (batch, length), generator=g)
    pixels = torch.randn(batch, 3, 32, 32, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def reduced_logits(model: nn.Module, inputs: dict[str, Tensor], wanted: Schedule = IMAGE) -> Tensor:
    """Of a text of its own length, which nothing pads."""
    return reduce_graph(pumer.capture(model, inputs, outputs=["logits"]), wanted)(**inputs)["logits"]


def caption_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)


def test_captions_have_the_length_of_the_call_and_labels_its_loss() -> None:
    """One graph for every length; the loss is that of the logits, over the call's own labels."""
    model, before = blip(label_smoothing=0.1), graphs()
    fast = compiled(model, IMAGE, dynamic=True, text_length=12)
    for length, batch in ((12, 2), (7, 2), (9, 4)):
        inputs = caption(length, batch)
        labels = inputs["input_ids"].masked_fill(torch.arange(length) == 2, -100)
        with torch.no_grad():
            found, wanted = fast(**inputs, labels=labels), reduced_logits(model, inputs)
            unreduced = model(**inputs).logits
        assert found.logits.shape == unreduced.shape == (batch, length, 61)
        assert (wanted - unreduced).abs().max() > 1e-2
        assert_near(found, wanted)
        torch.testing.assert_close(found.loss, caption_loss(wanted, labels, 0.1), atol=1e-5, rtol=0)
    assert graphs() == before + 1


def test_captions_train() -> None:
    """The gradients of the loss of reduced logits."""
    model, inputs = blip(), caption(7)
    labels = inputs["input_ids"].clone()
    found = compiled(model, IMAGE)(**inputs, labels=labels).loss
    wanted = caption_loss(reduced_logits(model, inputs), labels, 0.0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert_same_gradients(model, found, wanted, at_least=40)


def assert_same_gradients(model: nn.Module, found: Tensor, wanted: Tensor, at_least: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, wanted)]
    compared = [(a, b) for a, b in zip(*pairs, strict=True) if b is not None]
    assert len(compared) >= at_least
    for a, b in compared:
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b, atol=1e-4, rtol=1e-4)


def test_a_loss_over_reduced_text_is_refused() -> None:
    model = telling(lambda x, ids, labels, n: token_loss(x, labels))
    with pytest.raises(BackendCompilerFailed, match=r"cross_entropy_loss.*token axis \(2 x \[text:5\]\)"):
        compiled(model, BOTH)(**text(5), labels=torch.ones(2, 5, dtype=torch.int64))


# --- outputs --------------------------------------------------------------------------------------------------------

Tell = Callable[..., Any]


class Telling(Fusion):
    """Gives `tell(hidden states, ids, labels, how many are text)`."""

    tell: Tell

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        x = self.embed(input_ids, pixel_values)
        mask = None if attention_mask is None else self.mask(x, attention_mask, None)
        for layer in self.layers:
            x = layer(x, mask)
        n = input_ids.shape[1]
        if position_ids is not None:
            x = torch.cat([x[:, :n] + self.positions(position_ids), x[:, n:]], 1)
        return type(self).tell(self.last(x), input_ids, labels, n)


def telling(tell: Tell, **config: Any) -> Telling:
    model = make(
        dataclasses.replace(SMALL, layers=1, **config), kind=type("Telling", (Telling,), {"tell": staticmethod(tell)})
    )
    assert isinstance(model, Telling)
    return model


def asked(outputs: str, wanted: Schedule = IMAGE) -> Schedule:
    return wanted.model_copy(update={"outputs": outputs})


def text(length: int = 5) -> dict[str, Tensor]:
    inputs = shortened(inputs_for(SMALL), length)
    return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}


def many(*tells: Tell) -> Tell:
    """Several things told by one graph, each compile being slow."""
    return lambda *given: tuple(tell(*given) for tell in tells)


def outputs_of(value: Any) -> list[Tensor]:
    found = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
    return [v for v in found if v.dtype != torch.bool]


TEXT = many(
    lambda x, ids, labels, n: x[:, :n],
    lambda x, ids, labels, n: x[:, : n - 1],
    lambda x, ids, labels, n: x[:, 1:n],
    lambda x, ids, labels, n: x[:, :n] @ x[:, :n].transpose(1, 2),
    lambda x, ids, labels, n: x[:, 0],
)
WHOLE = many(
    lambda x, ids, labels, n: x,
    lambda x, ids, labels, n: x.transpose(1, 2),
    lambda x, ids, labels, n: torch.cat([x[:, n:], x[:, :n]], 1),
    lambda x, ids, labels, n: x.mean(-1)[:, None],
)
CUT = {
    "text": (TEXT, IMAGE),
    "text and image": (WHOLE, asked("reduced")),
    "all tokens again": (WHOLE, asked("restored", BOTH)),
    "exact": (TEXT, Schedule(method="lossless")),
}


def without_padding(value: Tensor, shape: torch.Size, images_first: bool) -> Tensor:
    """What is left of an output of seven text tokens, two of them padding, written again."""
    for dim, (long, short) in enumerate(zip(value.shape, shape, strict=True)):
        if long == short:
            continue
        assert long == short + 2
        text = min(long, 7) if not images_first else long
        value = torch.cat([value.narrow(dim, 0, text - 2), value.narrow(dim, text, long - text)], dim)
    return value


@pytest.mark.parametrize("name", CUT)
def test_outputs_lose_the_padding_of_their_text(name: str) -> None:
    """What the graph gives of a padded text, without the rows of its padding."""
    tell, wanted = CUT[name]
    model, long, short = telling(tell), padded(text(5), 7), text(5)
    with torch.no_grad():
        exact = wanted.method == "lossless"
        given = outputs_of((model if exact else reduce_graph(pumer.capture(model, long), wanted))(**long))
        found = outputs_of(compiled(model, wanted, dynamic=True, text_length=7)(**short))
        unpadded = outputs_of(model(**short))
    assert len(found) == len(given) == len(unpadded) >= 4
    for number, (value, whole, plain) in enumerate(zip(found, given, unpadded, strict=True)):
        assert value.is_contiguous() or not plain.is_contiguous()
        assert_near(value, without_padding(whole, value.shape, images_first=tell is WHOLE and number == 2))
        if wanted.outputs != "reduced":
            assert value.shape == plain.shape


def test_reduced_text_has_its_budget_whatever_the_call() -> None:
    """One entry for each token that is left: the text's budget is that of the padded text."""
    model, wanted = telling(lambda x, ids, labels, n: x), asked("reduced", BOTH)
    with torch.no_grad():
        whole = reduce_graph(pumer.capture(model, padded(text(5), 7)), wanted)(**padded(text(5), 7))
        assert_near(compiled(model, wanted, dynamic=True, text_length=7)(**text(5)), whole)


def test_positions_of_the_text_are_padded_too() -> None:
    model = telling(lambda x, ids, labels, n: x[:, :n])
    fast = compiled(model, IMAGE, dynamic=True, text_length=7)
    for positions in (torch.arange(5).flip(0), torch.arange(5).flip(0)[None].repeat(2, 1)):
        inputs = {**text(5), "position_ids": positions}
        with torch.no_grad():
            assert_near(fast(**inputs), reduce_graph(pumer.capture(model, inputs), IMAGE)(**inputs))


# --- refused --------------------------------------------------------------------------------------------------------


def token_loss(x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(x[:, : labels.shape[1]].flatten(0, 1), labels.flatten(), **options)


REFUSED: dict[str, tuple[Tell, str]] = {
    "tokens flattened with features": (
        lambda x, ids, labels, n: x[:, :n].flatten(1),
        r"The output .*, and they index \(\[text:7\] x 32\): which of them come from the padding",
    ),
    "the last word": (
        lambda x, ids, labels, n: x[:, :n][:, -1],
        r"aten.select.int .* takes tokens counted from the end of the text, where text_length=7 puts padding",
    ),
    "words by their number": (
        lambda x, ids, labels, n: x[:, n - 2 : n],
        r"aten.slice.Tensor .*from the end of the text",
    ),
    "the last words": (lambda x, ids, labels, n: x[:, :n][:, -2:], r"aten.slice.Tensor .*from the end of the text"),
    "a mean": (
        lambda x, ids, labels, n: x[:, :n].mean(1),
        r"aten.mean.dim .* averages over the text's tokens, and text_length=7 would add padding",
    ),
    "a mean of losses": (
        lambda x, ids, labels, n: token_loss(x, labels, reduction="none").mean(),
        r"aten.mean.default .* averages over the text's tokens",
    ),
    "a mean by hand": (lambda x, ids, labels, n: x[:, :n].sum(1) / n, r"computes with the text's length"),
    "pooled": (
        lambda x, ids, labels, n: F.adaptive_avg_pool1d(x[:, :n].transpose(1, 2), 1),
        r"aten.adaptive_avg_pool1d.* at .*test_padding.py:\d+\) computes one thing of all of the text's tokens",
    ),
    "turned around": (
        lambda x, ids, labels, n: x[:, :n].flip(1)[:, 0],
        r"aten.flip.* at .*test_padding.py:\d+\) .* Leave text_length out",
    ),
    "a mean of ids": (
        lambda x, ids, labels, n: x[:, 0] + ids.float().mean(1, keepdim=True),
        r"aten.mean.dim .* averages over the text's tokens",
    ),
    "attention without a mask": (
        lambda x, ids, labels, n: F.scaled_dot_product_attention(x[:, :n], x[:, :n], x[:, :n])[:, 0],
        r"aten.scaled_dot_product_attention.* attends to the text's tokens without a mask that hides them",
    ),
    "a number": (lambda x, ids, labels, n: (x[:, 0], n * 3), r"The function returns a number \(3\*s\d+\) that follows"),
    "ids as labels": (
        lambda x, ids, labels, n: token_loss(x, ids),
        r"text_length=7 pads input_ids with a token, and aten.cross_entropy_loss.* Give the labels as an input",
    ),
    "labels that are computed": (
        lambda x, ids, labels, n: token_loss(x, (labels * 2) % 5),
        r"text_length=7 pads labels, which becomes the labels of aten.cross_entropy_loss.*by aten.remainder",
    ),
    "two kinds of labels": (
        lambda x, ids, labels, n: token_loss(x, labels) + token_loss(x, labels, ignore_index=3),
        r"labels goes to two losses that ignore different labels \(-100 and 3\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_read_padding_is_refused(name: str) -> None:
    tell, message = REFUSED[name]
    inputs = {**text(5), "labels": torch.ones(2, 5, dtype=torch.int64)}
    with pytest.raises(BackendCompilerFailed, match=message):
        compiled(telling(tell), IMAGE, dynamic=True, text_length=7)(**inputs)


def test_labels_are_no_mask() -> None:
    model = telling(lambda x, ids, labels, n: token_loss(x, labels), mask="none")
    inputs = {**text(5), "labels": torch.ones(2, 5, dtype=torch.int64)}
    del inputs["attention_mask"]
    with pytest.raises(BackendCompilerFailed, match=r"no integer input .* beside input_ids .* Pass the attention mask"):
        compiled(model, IMAGE, dynamic=True, text_length=7)(**inputs)


LOSSES = many(
    lambda x, ids, labels, n: token_loss(x, labels),
    lambda x, ids, labels, n: token_loss(x, labels, reduction="sum"),
    lambda x, ids, labels, n: token_loss(x, labels, reduction="none").view(-1, n).sum(1),
    lambda x, ids, labels, n: F.cross_entropy(x[:, :n].transpose(1, 2), labels, reduction="none"),
    lambda x, ids, labels, n: F.nll_loss(x[:, :n].log_softmax(-1).flatten(0, 1), labels.flatten()),
    lambda x, ids, labels, n: token_loss(x, torch.where(labels == 2, -100, labels)),
    lambda x, ids, labels, n: token_loss(x, F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()),
)
IGNORED = many(lambda x, ids, labels, n: token_loss(x, labels, ignore_index=7))


@pytest.mark.parametrize("losses", [LOSSES, IGNORED], ids=["losses", "ignored"])
def test_losses_are_of_the_call_alone(losses: Tell) -> None:
    """Against the eager losses of the hidden states that the reduced module gives of the text as it is."""
    model, states = telling(losses), telling(lambda x, ids, labels, n: x[:, :n])
    inputs, labels = text(5), torch.tensor([[3, 2, 9, 7, 1], [4, 2, 7, 0, 31]])
    with torch.no_grad():
        found = compiled(model, IMAGE, dynamic=True, text_length=7)(**inputs, labels=labels)
        hidden = reduce_graph(pumer.capture(states, inputs), IMAGE)(**inputs)
    for loss, wanted in zip(found, losses(hidden, None, labels, 5), strict=True):
        assert_near(loss, wanted)


def test_padded_texts_train() -> None:
    """Neither padded labels nor the padding that outputs lose have a gradient."""
    inputs, labels = text(5), torch.tensor([[3, 2, 9, 7, 1], [4, 2, 7, 0, 31]])
    own = telling(lambda x, ids, labels, n: (token_loss(x, labels), x[:, :n]))
    loss, hidden = compiled(own, IMAGE, dynamic=True, text_length=7)(**inputs, labels=labels)
    plain = reduce_graph(pumer.capture(own, {**inputs, "labels": labels}), IMAGE)(**inputs, labels=labels)
    weight = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    assert_same_gradients(own, loss + (hidden * weight).sum(), plain[0] + (plain[1] * weight).sum(), at_least=20)
