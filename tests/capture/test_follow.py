"""Follow the sample: what a traced model asks of its inputs becomes constant, and what it computes does not.

Every module here is captured with one sample and compared with eager PyTorch on another, which has other pixels and
other words.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.capture.capture import Program
from pumer_compile.errors import CaptureError, UsageError

Tensors = dict[str, Tensor]
IMAGE = 9
Body = Callable[["Asks", Tensor, Tensor, Tensor], Tensor]


class Asks(nn.Module):
    """Words, a grid of patches and their pixels; what is computed of them is a test's."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.table, self.linear = body, nn.Embedding(20, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, ids: Tensor, grid: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(self, ids, grid, pixels)}


def sample(seed: int, batch: int = 2) -> Tensors:
    """`batch` prompts of 6 with placeholders at 2 and 3, and 6 patches of width 4; batch, grid and prompt collide: 2
    and 6 are sizes of several dimensions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (batch, 6), generator=generator)
    ids[:, 2:4] = IMAGE
    return {"ids": ids, "grid": torch.tensor([[2, 3]]), "pixels": torch.randn(batch, 6, 4, generator=generator)}


def captured(body: Body, inputs: Tensors | None = None) -> tuple[nn.Module, Program]:
    model = Asks(body).eval()
    return model, pumer.capture(model, sample(0) if inputs is None else inputs)


def agree(model: nn.Module, program: Program, inputs: Tensors) -> Tensor:
    for guard in program.guards:
        guard.check(inputs)
    with torch.no_grad():
        found, wanted = program.module(**inputs)["out"], model(**inputs)["out"]
    torch.testing.assert_close(found, wanted, atol=0.0, rtol=0.0)
    return wanted


def rows_and_columns(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    ((height, width),) = grid.tolist()
    return self.linear(pixels).reshape(len(pixels), height, width, 4).mean(2)


def first_of_them(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    return self.linear(pixels[:, : int(grid[0, 0].item())])


def as_an_index(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    return self.linear(pixels[:, : grid[0, 1]])


def both_ways(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    return self.linear(pixels) if (grid[:, 0] == 2).all() else pixels


def repeated(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    return self.linear(pixels[:, torch.repeat_interleave(torch.arange(2), grid[0])])


def counted(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    return self.linear(pixels[:, :1]) * torch.arange(grid[0, 0]).view(1, -1, 1)


def split_by_size(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    return torch.cat([part.mean(1) for part in self.linear(pixels).split((grid[0] * 2 - 1).tolist()[:1] * 2, 1)], 1)


def segments(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    ends = torch.repeat_interleave(grid[:, 1], grid[:, 0]).cumsum(0)
    return torch.stack([self.linear(pixels)[:, end - 1] for end in ends])


def resized(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    height, width = grid[0]
    image = self.linear(pixels).view(len(pixels), height, width, 4).permute(0, 3, 1, 2)
    return nn.functional.interpolate(image, size=(height * 2, width)).flatten(2)


GEOMETRY = (
    resized,
    rows_and_columns,
    first_of_them,
    as_an_index,
    both_ways,
    repeated,
    counted,
    split_by_size,
    segments,
)


@pytest.mark.parametrize("body", GEOMETRY)
@pytest.mark.parametrize("batch", [1, 2])
def test_geometry_is_fixed_and_pixels_are_not(body: Body, batch: int) -> None:
    model, program = captured(body, sample(0, batch))
    results = [agree(model, program, sample(seed, batch)) for seed in (0, 1)]
    assert not torch.equal(*results)
    assert program.fixed == ("grid",) and program.guards == ()
    assert not [n for n in program.module.graph.nodes if n.op == "placeholder" and n.target == "grid" and n.users]


def at_places(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    places = (ids[0] == IMAGE).nonzero().flatten()
    return self.table(ids)[:, places] + self.linear(pixels[:, : len(places)])


def by_mask(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    chosen = self.table(ids)[ids == IMAGE]
    return chosen.view(len(ids), -1, 4) * self.linear(pixels).mean(1, keepdim=True)


def written_at_places(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    words = self.table(ids).clone()
    places = torch.nonzero(ids == IMAGE, as_tuple=True)
    words[places] = self.linear(pixels[:, : int((ids[0] == IMAGE).sum())]).flatten(0, 1)
    return words


def at_places_of_each(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    places = torch.where(ids[0] == IMAGE)[0]
    assert torch.argwhere(ids[0] == IMAGE).shape == (len(places), 1)
    return self.table(ids)[:, places] + self.linear(pixels[:, : len(places)])


def as_many_features(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    """Asks for the size of what a mask chooses from features, as HunYuan-VL does."""
    words, features = self.table(ids), self.linear(pixels[:, :2])
    there = (ids == IMAGE).unsqueeze(-1).expand_as(words)
    if words[there].numel() != features.numel():
        raise ValueError("other placeholders")
    return words.masked_scatter(there, features)


def first_place(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    start = int((ids[0] == IMAGE).int().argmax()) if bool((ids == IMAGE).any()) else 0
    return self.table(ids[:, start:]) if start < 9 else pixels


CONTENT = (at_places, by_mask, written_at_places, at_places_of_each, as_many_features)


@pytest.mark.parametrize("body", CONTENT)
def test_places_are_fixed_and_words_are_not(body: Body) -> None:
    model, program = captured(body)
    results = [agree(model, program, sample(seed)) for seed in (0, 1)]
    assert not torch.equal(*results)
    assert program.fixed == () and program.guards
    assert {name for guard in program.guards for name in guard.inputs} == {"ids"}


@pytest.mark.parametrize("body", CONTENT)
def test_placeholders_elsewhere_are_refused(body: Body) -> None:
    _, program = captured(body)
    other = sample(1)
    other["ids"] = other["ids"].roll(1, 1)
    with pytest.raises(UsageError, match=r"placeholders|compiled for"):
        for guard in program.guards:
            guard.check(other)


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"Asks decides by the numbers of ids through argmax \(.*test_follow.py:\d+"):
        captured(first_place)


def without_black(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
    """Leaves out patches that are all black, as SmolVLM does with images."""
    real = (pixels[0] == 0).sum(-1) != 4
    return self.linear(pixels[:, real])


def test_pixels_that_a_mask_chooses_are_not_baked_in() -> None:
    """The worst trap: `pixels[mask]`, computed for real, would be a constant, and the sample still agree."""
    model, program = captured(without_black)
    assert not torch.equal(*[agree(model, program, sample(seed)) for seed in (0, 1)])
    black = sample(1)
    black["pixels"][0, 4] = 0
    (guard,) = program.guards
    with pytest.raises(UsageError, match=r"finds \[True, .* where it looks at pixels \(.*test_follow.py:\d+\), and fi"):
        guard.check(black)


def test_a_number_of_the_words_is_a_guard() -> None:
    """It is in the graph as a factor; prompts that have another one are refused."""

    def times_first(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        return self.table(ids) * int(ids[0, 0])

    model, program = captured(times_first)
    same = sample(1)
    same["ids"][0, 0] = sample(0)["ids"][0, 0]
    agree(model, program, same)
    same["ids"][0, 0] += 1
    with pytest.raises(UsageError, match=r"finds . where it looks at ids"):
        agree(model, program, same)


@pytest.mark.parametrize(
    "ask", [lambda p: p.sum().item() > 0, lambda p: p[0, 0].tolist()[0] > 0, lambda p: float(p.mean()) > 0]
)
def test_a_float_of_the_content_is_refused(ask: Callable[[Tensor], bool]) -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        return self.linear(pixels) if ask(pixels) else pixels

    with pytest.raises(CaptureError, match=r"Asks decides by the numbers of pixels .* choose with a mask"):
        captured(body)


def test_a_learned_number_is_no_constant() -> None:
    """What comes from parameters has no shadow: a trace that asks for it fails, and not with the sample's answer."""

    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        height = grid[0, 0].item()
        return self.linear(pixels[:, :height]) if self.linear(pixels).sum() > 0 else pixels

    with pytest.raises(CaptureError, match="could not trace Asks"):
        captured(body)


def test_a_model_that_asks_nothing_is_traced_as_it_is() -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        return self.linear(pixels) * grid.float().mean() + self.table(ids)

    model, program = captured(body)
    assert program.fixed == () and program.guards == ()
    other = {**sample(1), "grid": torch.tensor([[4, 1]])}
    agree(model, program, other)


def test_a_mask_that_chooses_all_moves_nothing() -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        height = int(grid[0, 0])
        return self.linear(pixels)[:, :height][(ids[:, 0] != IMAGE)]

    model, program = captured(body)
    agree(model, program, sample(1))
    assert not program.module.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)


# --- in-place writes --------------------------------------------------------------------------------------------------


def test_a_write_by_index_is_replayed() -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = ids == IMAGE
        chosen[:, 5] = True  # the last word too
        return self.table(ids)[chosen].view(len(ids), -1, 4) + self.linear(pixels)[:, : int(chosen[0].sum())]

    model, program = captured(body)
    assert not torch.equal(*[agree(model, program, sample(seed)) for seed in (0, 1)])
    other = sample(1)
    other["ids"][:, 5] = IMAGE  # chosen anyway: the same answer
    agree(model, program, other)
    other["ids"][:, 4] = IMAGE
    with pytest.raises(UsageError, match="looks at ids"):
        agree(model, program, other)


def test_a_write_through_a_view_is_no_guard_of_its_owner() -> None:
    """How the owner was made does not say what it holds; no predicate is better than a wrong one."""

    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = ids == IMAGE
        chosen[0].logical_not_()
        return self.table(ids)[chosen] + self.linear(pixels)[0, : int(chosen.sum())]

    with pytest.raises(CaptureError, match="decides by the numbers of ids"):
        captured(body)


def no_black_by_index(chosen: Tensor, black: Tensor) -> Tensor:
    row = chosen[0]
    row[black[0]] = False
    return chosen


def no_black_in_place(chosen: Tensor, black: Tensor) -> Tensor:
    chosen[0].logical_and_(~black[0])
    return chosen.clone()


def no_black_in_a_view(chosen: Tensor, black: Tensor) -> Tensor:
    flat = chosen.view(-1)
    flat &= ~black.view(-1)
    return chosen | (chosen & chosen)


@pytest.mark.parametrize("leave", [no_black_by_index, no_black_in_place, no_black_in_a_view])
def test_a_write_that_changes_nothing_in_the_sample(leave: Callable[[Tensor, Tensor], Tensor]) -> None:
    """No patch of the sample is black. A predicate on the words alone would let one pass that is."""

    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = leave(ids == IMAGE, (pixels == 0).all(-1))
        return self.table(ids)[chosen].sum(0) + self.linear(pixels)[0, : int(chosen.sum())].sum(0)

    with pytest.raises(CaptureError, match="decides by the numbers of ids"):
        captured(body)


def test_a_row_that_is_written_back() -> None:
    """`x[0] |= y` writes through a view, and then says so of `x`."""

    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = ids == IMAGE
        chosen[0] |= (pixels[0] == 0).all(-1)
        return self.table(ids)[chosen].sum(0) + self.linear(pixels)[0, : int(chosen.sum())].sum(0)

    model, program = captured(body)
    assert not torch.equal(*[agree(model, program, sample(seed)) for seed in (0, 1)])
    black = sample(1)
    black["pixels"][0, 2] = 0
    agree(model, program, black)  # it is chosen anyway
    black["pixels"][0, 1] = 0
    with pytest.raises(UsageError, match="looks at ids and pixels"):
        agree(model, program, black)


def test_a_row_that_is_written_back_elsewhere() -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = ids == IMAGE
        row = chosen[0]
        row |= (pixels[0] == 0).all(-1)
        chosen[1] = row
        return self.table(ids)[chosen].sum(0) + self.linear(pixels)[0, : int(chosen.sum())].sum(0)

    with pytest.raises(CaptureError, match="decides by the numbers of ids"):
        captured(body)


def test_words_that_are_written_into_a_grid() -> None:
    """The grid's own numbers are fixed; those that another name put there are of the words."""

    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        sizes = grid.clone()
        sizes[0].copy_((ids == IMAGE).sum(1))
        return self.linear(pixels)[:, : int(sizes[0, 0])] + self.table(ids).mean(1, keepdim=True)

    with pytest.raises(CaptureError, match="decides by the numbers of grid and ids"):
        captured(body)


def test_a_write_of_what_is_not_known() -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = torch.zeros(2, 6)
        chosen[:] = self.linear(pixels).sum(-1)
        height = int(grid[0, 0])
        return pixels[:, :height] * chosen[:, :height, None]

    model, program = captured(body)
    assert not torch.equal(*[agree(model, program, sample(seed)) for seed in (0, 1)])


def test_a_question_of_what_something_learned_was_written_into() -> None:
    """The sample's numbers from before the write are no answer."""

    def mask(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        chosen = ids == IMAGE
        chosen[0].copy_(self.linear(pixels)[0].sum(-1) > 0)
        return self.table(ids)[chosen]

    def number(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        sizes = grid.clone()
        sizes[0].copy_((self.linear(pixels)[0, 0, :2] * 0).long() + 1)
        return self.linear(pixels)[:, : int(sizes[0, 0])]

    for body in (mask, number):
        with pytest.raises(CaptureError, match=r"depends on data|data-dependent"):
            captured(body)


# --- an open batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "name"), [(both_ways, "grid"), (at_places, "ids")])
def test_an_open_batch_has_no_numbers(body: Body, name: str) -> None:
    with pytest.raises(CaptureError, match=rf"looks at the numbers of {name} .*test_follow.py:\d+.*fixed batch"):
        pumer.capture(Asks(body).eval(), sample(0), dynamic_batch=True)


def test_an_open_batch_that_fails_for_another_reason_says_that() -> None:
    def body(self: Asks, ids: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        return self.linear(pixels) if len(pixels) == 2 else pixels

    with pytest.raises(CaptureError, match=r"could not trace Asks.*batch"):
        pumer.capture(Asks(body).eval(), sample(0), dynamic_batch=True)


def test_the_model_is_as_it_was() -> None:
    model, _ = captured(rows_and_columns)
    assert "forward" not in vars(model)
    with pytest.raises(CaptureError):
        pumer.capture(failing := Asks(first_place).eval(), sample(0))
    assert "forward" not in vars(failing)


def test_on_the_meta_device_integers_answer() -> None:
    """A plan of a model too large to hold: no pixel and no weight is there, the grid and the words are."""
    with torch.device("meta"):
        model = Asks(at_places).eval()
    inputs = sample(0)
    program = pumer.capture(model, {**inputs, "pixels": inputs["pixels"].to("meta")})
    assert program.guards == captured(at_places)[1].guards
