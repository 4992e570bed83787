"""What may be done with padded texts inside a graph: every spelling is refused, or gives what the plain text gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pumer_compile.errors import UsageError
from pumer_compile.torch_compile.follow_padding import follow_padding
from pumer_compile.torch_compile.lowering import Padding

LENGTH, LEAST, WIDTH, IMAGE = 7, 2, 8, 5


class Words(nn.Module):
    """Gives `read(module, words [B, N, 8], image [B, 5, 8], mask [B, N], ids, labels)`."""

    def __init__(self, read: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = read
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Parameter(torch.randn(16, WIDTH))
        self.wide, self.norm, self.near = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, 1, 1)
        self.batch = nn.BatchNorm1d(WIDTH)
        self.just = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.register_buffer("last", torch.tensor([-1]))
        self.register_buffer("first", torch.tensor([0, 1]))

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor, image: Tensor) -> Tensor:
        return self.read(self, self.words(ids), image, mask, ids, labels)


def inputs(length: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 50, (3, length), generator=g)
    mask = torch.ones_like(ids)
    ids[0, 1] = 49
    mask[1, length - 1] = 0
    labels = torch.randint(0, WIDTH, (3, length), generator=g)
    return {"ids": ids, "mask": mask, "labels": labels, "image": torch.randn(3, IMAGE, WIDTH, generator=g)}


FILL = {"ids": 0, "mask": 0, "labels": -100}


def padded(given: dict[str, Tensor]) -> dict[str, Tensor]:
    missing = LENGTH - given["ids"].shape[1]
    return {n: F.pad(t, (0, missing), value=FILL[n]) if n in FILL else t for n, t in given.items()}


def lowered(model: nn.Module, length: int) -> fx.GraphModule:
    """As `DynamoGraph.lower` gives it, parameters as attributes."""
    given = inputs(length)
    with FakeTensorMode(allow_non_fake_inputs=True), enable_python_dispatcher():
        fakes = [torch.empty(t.shape, dtype=t.dtype) for t in given.values()]
        module = make_fx(lambda *tensors: model(*tensors), pre_dispatch=True)(*fakes)
    for node, name in zip(module.graph.find_nodes(op="placeholder"), given, strict=True):
        node.target = name
    module.graph.eliminate_dead_code()
    return module


def follow(read: Callable[..., Tensor]) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The model, and where its output has padding (dimension 1); raises where it is refused."""
    model = Words(read).eval()
    long = lowered(model, LENGTH)
    padding = Padding(LENGTH, FILL, None, frozenset({"ids"}), LEAST)
    places = follow_padding(long, lowered(model, LEAST), padding, LEAST)
    (output,) = long.graph.output_node().all_input_nodes
    found = {d.index: p for d, p in places.items() if d.node is output}
    assert set(found) <= {1}
    return model, found[1].numbers if found else None


def pooled(m: Any, x: Tensor, i: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def additive(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, :].float()) * torch.finfo(torch.float32).min


def moved_right(m: Any, x: Tensor, i: Tensor, mask: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """The ids behind a start, as decoders take them."""
    moved = ids.new_zeros(ids.shape)
    moved[:, 1:] = ids[:, :-1].clone()
    moved[:, 0] = 3
    return m.words(moved)


def attend(x: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], mask, **options)[:, 0]


def write_zeros(m: Any, x: Tensor, *_: Any) -> Tensor:
    kept = torch.zeros_like(x)
    kept.add_(x)
    return kept.sum(1)


READ: dict[str, Callable[..., Tensor]] = {
    "adaptive pooling": lambda m, x, *_: F.adaptive_avg_pool1d(x.transpose(1, 2), 1)[..., 0],
    "adaptive max pooling": lambda m, x, *_: F.adaptive_max_pool1d(x.transpose(1, 2), 2)[..., 0],
    "std": lambda m, x, *_: x.std(1),
    "var": lambda m, x, *_: x.var(1),
    "var_mean": lambda m, x, *_: torch.var_mean(x, 1)[1],
    "flip": lambda m, x, *_: x.flip(1)[:, 0],
    "flip cumsum": lambda m, x, *_: x.flip(1).cumsum(1).flip(1),
    "roll": lambda m, x, *_: x.roll(1, 1)[:, 0],
    "chunk": lambda m, x, *_: x.chunk(2, 1)[1].amax(1),
    "half": lambda m, x, *_: x[:, : x.shape[1] // 2],
    "split": lambda m, x, *_: x.split([1, x.shape[1] - 1], 1)[1].sum(1),
    "split last": lambda m, x, *_: x.split([x.shape[1] - 1, 1], 1)[1],
    "unbind": lambda m, x, *_: x.unbind(1)[-1],
    "index_select": lambda m, x, *_: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1))[:, 0],
    "index_select last": lambda m, x, *_: x.index_select(1, m.last),
    "index by length": lambda m, x, *_: x[:, torch.tensor([x.shape[1] - 1])],
    "index last": lambda m, x, *_: x[:, m.last],
    "gather": lambda m, x, i, mask, *_: x.gather(1, (mask.sum(1) - x.shape[1])[:, None, None].expand(-1, 1, WIDTH)),
    "gather negative": lambda m, x, i, mask, *_: x[torch.arange(3), -mask.sum(1)],
    "softmax": lambda m, x, *_: x.softmax(1),
    "log_softmax": lambda m, x, *_: x.log_softmax(1),
    "softmax of scores": lambda m, x, *_: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "small mask": lambda m, x, i, mask, *_: (x @ x.transpose(1, 2) + (mask[:, None] - 1) * 3.0).softmax(-1) @ x,
    "inverted mask": lambda m, x, i, mask, *_: (
        (x @ x.transpose(1, 2)).masked_fill(mask[:, None] == 1, -1e9).softmax(-1) @ x
    ),
    "attention": lambda m, x, *_: attend(x, None),
    "attention by ones": lambda m, x, i, mask, *_: attend(x, torch.ones_like(mask).bool()[:, None, None, :]),
    "attention the wrong way": lambda m, x, i, mask, *_: attend(x, (mask == 0)[:, None, None, :]),
    "layer_norm": lambda m, x, *_: F.layer_norm(x.transpose(1, 2), x.shape[1:2]).transpose(1, 2),
    "layer_norm of all": lambda m, x, *_: F.layer_norm(x, x.shape[1:]),
    "group_norm": lambda m, x, *_: F.group_norm(x.transpose(1, 2), 2).amax(-1),
    "batch_norm": lambda m, x, *_: F.batch_norm(x.flatten(0, 1), None, None, training=True).view(x.shape),
    "normalize": lambda m, x, *_: F.normalize(x, dim=1),
    "norm": lambda m, x, *_: torch.linalg.vector_norm(x, dim=1),
    "mean of ids": lambda m, x, i, mask, ids, _: ids.float().mean(1),
    "mean of the mask": lambda m, x, i, mask, *_: mask.float().mean(1),
    "masked mean by length": lambda m, x, i, mask, *_: (x * mask[..., None]).mean(1),
    "ones_like": lambda m, x, i, mask, ids, _: x.sum(1) / torch.ones_like(ids).sum(1, keepdim=True),
    "count by ones_like": lambda m, x, i, mask, ids, _: torch.ones_like(ids).sum(1),
    "count by ones": lambda m, x, *_: x[:, 0] * torch.ones(x.shape[1]).sum(),
    "count by arange": lambda m, x, *_: x[:, 0] * torch.arange(x.shape[1]).amax(),
    "count by full": lambda m, x, *_: x[:, 0] * torch.full((), float(x.shape[1])),
    "count by size": lambda m, x, *_: x[:, 0] * x.shape[1],
    "fill with the length": lambda m, x, *_: torch.full_like(x, float(x.shape[1])),
    "places backwards": lambda m, x, *_: x + m.places[torch.arange(x.shape[1] - 1, -1, -1)],
    "places as a fraction": lambda m, x, *_: x * torch.linspace(0, 1, x.shape[1])[:, None],
    "places of tokens behind": lambda m, x, i, *_: (torch.cat([x, i], 1) + m.places[: x.shape[1] + IMAGE])[:, -IMAGE:],
    "sum": lambda m, x, *_: x.sum(1),
    "sum of the rest": lambda m, x, i, mask, *_: (x * (1 - mask)[..., None]).sum(1),
    "sum of the mask but the last": lambda m, x, i, mask, *_: mask[:, :-1].sum(1),
    "sum of all": lambda m, x, *_: x.sum(),
    "max": lambda m, x, *_: x.max(1).values,
    "amax": lambda m, x, *_: x.amax(1),
    "amin": lambda m, x, *_: x.amin(1),
    "argmax": lambda m, x, *_: x.argmax(1),
    "argmin": lambda m, x, i, mask, *_: mask.argmin(1),
    "topk": lambda m, x, *_: x.topk(2, 1).values,
    "sort": lambda m, x, *_: x.sort(1).values,
    "argsort": lambda m, x, *_: x.argsort(1),
    "median": lambda m, x, *_: x.median(1).values,
    "prod": lambda m, x, *_: x.prod(1),
    "any": lambda m, x, i, mask, *_: (mask == 0).any(1),
    "all": lambda m, x, i, mask, *_: (mask == 1).all(1),
    "logsumexp": lambda m, x, *_: x.logsumexp(1),
    "cummax": lambda m, x, *_: x.flip(1).cummax(1).values,
    "cumsum behind": lambda m, x, i, *_: torch.cat([x, i], 1).cumsum(1),
    "last of cumsum": lambda m, x, *_: x.cumsum(1)[:, -1],
    "conv1d": lambda m, x, *_: m.near(x.transpose(1, 2)).transpose(1, 2),
    "unfold": lambda m, x, *_: x.unfold(1, 2, 1).amax(-1),
    "interpolate": lambda m, x, *_: F.interpolate(x.transpose(1, 2), size=4, mode="linear"),
    "matmul": lambda m, x, *_: x.transpose(1, 2) @ x,
    "matmul twice": lambda m, x, *_: (x @ x.transpose(1, 2)) @ (x @ x.transpose(1, 2)),
    "einsum": lambda m, x, *_: torch.einsum("bnd,bne->bde", x, x),
    "einsum sum": lambda m, x, *_: torch.einsum("bnd->bd", x),
    "bmm": lambda m, x, *_: torch.bmm(x.transpose(1, 2), x),
    "scrambled": lambda m, x, *_: x.reshape(x.shape[0], WIDTH, x.shape[1])[:, :, 0],
    "features of tokens": lambda m, x, *_: x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)[:, 0],
    "last": lambda m, x, *_: x[:, -1],
    "last of a part": lambda m, x, *_: x[:, 1:][:, -1],
    "third token, or the image": lambda m, x, i, *_: torch.cat([x, i], 1)[:, 2],
    "every second": lambda m, x, i, *_: torch.cat([x, i], 1)[:, ::2].amax(1),
    "text meets image": lambda m, x, i, *_: torch.cat([x, i], 1) + torch.cat([i, x], 1),
    "labels": lambda m, x, i, mask, ids, labels: F.cross_entropy(x.flatten(0, 1), ids.flatten() % WIDTH),
    "labels moved": lambda m, x, i, mask, ids, labels: F.cross_entropy(x.flatten(0, 1), labels.roll(-1, 1).flatten()),
    "squared error": lambda m, x, *_: F.mse_loss(x, torch.zeros_like(x)),
    "written over": write_zeros,
    "cdist": lambda m, x, *_: torch.cdist(x, x).amin(-1),
    "masked select": lambda m, x, i, mask, *_: x.masked_fill(mask[..., None] == 0, 0.0).amax(1),
}

KEPT: dict[str, Callable[..., Tensor]] = {
    "each alone": lambda m, x, *_: m.norm(F.gelu(m.wide(x)) + m.places[: x.shape[1]]).softmax(-1),
    "as many places as there are": lambda m, x, *_: x + m.just[: x.shape[1]],
    "places by number": lambda m, x, *_: x + m.places[torch.arange(x.shape[1])],
    "places from the mask": lambda m, x, i, mask, *_: x + m.places[mask.cumsum(1) * mask],
    "features": lambda m, x, *_: x.std(-1) + x.amax(-1) + x.sort(-1).values[..., 0] + F.normalize(x, dim=-1)[..., 0],
    "masked mean": pooled,
    "masked mean by einsum": lambda m, x, i, mask, *_: torch.einsum("bnd,bn->bd", x, mask.float()),
    "masked maximum": lambda m, x, i, mask, *_: x.masked_fill(mask[..., None] == 0, -1e9).amax(1),
    "where it counts": lambda m, x, i, mask, *_: torch.where(mask[..., None] == 1, x, 0).sum(1),
    "mean of what is no padding": lambda m, x, i, mask, ids, _: (
        (x * (ids != 0)[..., None]).sum(1) / (ids != 0).sum(1, keepdim=True)
    ),
    "any, all": lambda m, x, i, mask, *_: (mask == 1).any(1) | (mask == 0).all(1),
    "softmax": lambda m, x, i, mask, *_: (x @ x.transpose(1, 2) + additive(mask)).softmax(-1) @ x,
    "scaled, filled softmax": lambda m, x, i, mask, *_: (
        (x @ x.transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9).div(3.0).softmax(-1) @ x
    ),
    "attention": lambda m, x, i, mask, *_: attend(x, mask.bool()[:, None, None, :]),
    "attention, additive": lambda m, x, i, mask, *_: attend(x, additive(mask)[:, None]),
    "causal attention": lambda m, x, *_: attend(x, None, is_causal=True),
    "causal mask": lambda m, x, i, mask, *_: attend(
        x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
    ),
    "pooled by attention": lambda m, x, i, mask, *_: (
        m.wide(x)[..., 0].masked_fill(mask == 0, -1e9).softmax(1)[..., None] * x
    ).sum(1),
    "last by the mask": lambda m, x, i, mask, *_: x[torch.arange(3), mask.sum(1) - 1],
    "gathered by the mask": lambda m, x, i, mask, *_: x.gather(
        1, (mask.sum(1) - 1)[:, None, None].expand(-1, 1, WIDTH)
    ),
    "end of the text": lambda m, x, i, mask, ids, _: x[torch.arange(3), (ids == 49).int().argmax(1)],
    "first": lambda m, x, *_: x[:, 0],
    "first two": lambda m, x, *_: x[:, m.first],
    "but the first": lambda m, x, *_: x[:, 1:],
    "but the last": lambda m, x, *_: x[:, :-1],
    "image behind": lambda m, x, i, *_: torch.cat([x, i], 1)[:, x.shape[1] :].sum(1),
    "image's last": lambda m, x, i, *_: torch.cat([x, i], 1)[:, -1],
    "image beside": lambda m, x, i, *_: torch.cat([i, x], 1)[:, :IMAGE].mean(1),
    "split from the image": lambda m, x, i, *_: torch.cat([x, i], 1).split([x.shape[1], IMAGE], 1)[1].mean(1),
    "ones over both": lambda m, x, i, *_: torch.cat([x, i], 1) * torch.ones(3, x.shape[1] + IMAGE)[..., None],
    "heads": lambda m, x, *_: x.view(3, -1, 2, 4).transpose(1, 2).reshape(6, -1, 4).view(3, 2, -1, 4)[:, 0],
    "labels": lambda m, x, i, mask, ids, labels: F.cross_entropy(x.flatten(0, 1), labels.flatten()),
    "labels moved": lambda m, x, i, mask, ids, labels: F.cross_entropy(
        x[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    ),
    "labels moved by padding": lambda m, x, i, mask, ids, labels: F.cross_entropy(
        x.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    ),
    "moved right": moved_right,
    "causal filter": lambda m, x, *_: x.cumsum(1),
}


@pytest.mark.parametrize("name", READ)
def test_what_reads_padding_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^aten\.\S+ \(node \w+\).*Leave text_length out"):
        follow(READ[name])


@pytest.mark.parametrize("name", [*KEPT, *READ])
def test_what_is_let_through_gives_what_the_text_alone_gives(name: str) -> None:
    """At every length, and whatever was expected of it."""
    try:
        model, numbers = follow(KEPT[name] if name in KEPT else READ[name])
    except UsageError:
        assert name not in KEPT
        return
    for length in range(LEAST, LENGTH):
        own, long = model(**inputs(length)), model(**padded(inputs(length)))
        if numbers is not None:
            missing = LENGTH - length
            start = numbers.index(-1) + length - LEAST
            kept = [i for i in range(long.shape[1]) if not start <= i < start + missing]
            long = long[:, kept]
        torch.testing.assert_close(long, own, atol=1e-6, rtol=0)
