"""Values from before a reducer brought to its tokens, against loops over groups of old tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers import AlignAxis, OwnWeights, TokenWeights
from tests.support.helpers import data_dependent

pytestmark = pytest.mark.fast

Members = list[list[list[int]]]


def members_of(rng: np.random.Generator, batch: int, before: int, after: int) -> Members:
    """For each sample, `after` groups of old tokens: some tokens dropped, the others shared out."""
    samples = []
    for _ in range(batch):
        order = rng.permutation(before).tolist()
        samples.append([[i] for i in order[:after]])
        for token in order[after : after + (before - after) // 2]:
            samples[-1][int(rng.integers(after))].append(token)
    return samples


def map_of(members: Members, before: int) -> Tensor:
    """`[batch, after, before]`: the mean of each group."""
    result = torch.zeros(len(members), len(members[0]), before)
    for b, sample in enumerate(members):
        for new, group in enumerate(sample):
            for old in group:
                result[b, new, old] = 1 / len(group)
    return result


def expected(value: np.ndarray, dim: int, pieces: list[tuple[int, Members | None]], batch: int, how) -> list:
    """`value` aligned along `dim` with loops, as an object array of Python numbers."""
    full = np.broadcast_to(value, (batch, *value.shape[1:]))
    after = sum(n if m is None else len(m[0]) for n, m in pieces)
    out = np.empty([after if i == dim else s for i, s in enumerate(full.shape)], dtype=object)
    for index in itertools.product(*(range(s) for s in out.shape)):
        position, start, old = index[dim], 0, []
        for n, m in pieces:
            length = n if m is None else len(m[0])
            if position < length:
                old = [start + position] if m is None else [start + i for i in m[index[0]][position]]
                break
            position, start = position - length, start + n
        out[index] = how([full[(*index[:dim], i, *index[dim + 1 :])].item() for i in old])
    return out.tolist()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def log_mean_exp(values: list[float]) -> float:
    total = sum(math.exp(v) for v in values) / len(values)
    return math.log(total) if total > 0 else -math.inf


@st.composite
def values(draw: st.DrawFn) -> dict:
    """A value of rank 2 to 4 whose axis `dim` holds one to three segments, some of them reduced."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 3))
    pieces: list[tuple[int, Members | None]] = []
    for index in range(draw(st.integers(1, 3))):
        before = draw(st.integers(1, 7))
        reduced = index == 0 or draw(st.booleans())
        after = draw(st.integers(1, before))
        pieces.append((before, members_of(rng, batch, before, after) if reduced else None))
    rank = draw(st.integers(2, 4))
    dim = draw(st.integers(1, rank - 1))
    sizes = [draw(st.integers(1, 3)) for _ in range(rank)]
    sizes[0] = draw(st.sampled_from([1, batch]))
    sizes[dim] = sum(n for n, _ in pieces)
    return {"rng": rng, "batch": batch, "pieces": pieces, "dim": dim, "sizes": sizes}


def align(case: dict, mode: str, value: Tensor) -> Tensor:
    module = AlignAxis(case["dim"], tuple((n, m is not None) for n, m in case["pieces"]), mode)
    return module(value, *(map_of(m, n) for n, m in case["pieces"] if m is not None))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@given(case=values())
def test_features_are_averaged(dtype: torch.dtype, case: dict) -> None:
    value = torch.from_numpy(case["rng"].integers(-9, 9, case["sizes"]).astype(np.float64)).to(dtype)
    result = align(case, "mean", value)
    assert result.dtype == dtype
    wanted = expected(value.double().numpy(), case["dim"], case["pieces"], case["batch"], mean)
    atol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.double(), torch.tensor(wanted, dtype=torch.float64), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@given(case=values())
def test_additive_masks_become_the_share_of_open_tokens(dtype: torch.dtype, case: dict) -> None:
    closed = case["rng"].random(case["sizes"]) < 0.4
    value = torch.where(torch.from_numpy(closed), torch.finfo(dtype).min, 0.0).to(dtype)
    result = align(case, "log_mean_exp", value)
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    shares = expected((~closed).astype(np.float64), case["dim"], case["pieces"], case["batch"], mean)
    # As a mask: what it multiplies a key's weight with.
    torch.testing.assert_close(result.double().exp(), torch.tensor(shares, dtype=torch.float64), atol=1e-3, rtol=0)


@given(case=values())
def test_additive_masks_of_any_value(case: dict) -> None:
    value = torch.from_numpy(case["rng"].normal(size=case["sizes"])).float()
    result = align(case, "log_mean_exp", value)
    wanted = expected(value.double().numpy(), case["dim"], case["pieces"], case["batch"], log_mean_exp)
    torch.testing.assert_close(result.double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("mode", "how", "share"), [("any", any, 0.3), ("all", all, 0.7)])
@given(case=values())
def test_boolean_masks(mode: str, how: Callable[[list], bool], share: float, case: dict) -> None:
    value = torch.from_numpy(case["rng"].random(case["sizes"]) < share)
    result = align(case, mode, value)
    assert result.dtype == torch.bool
    assert result.tolist() == expected(value.numpy(), case["dim"], case["pieces"], case["batch"], how)


def test_all_of_very_many() -> None:
    """One false among three hundred is seen, and rounding of three hundred shares is not."""
    value = torch.ones(2, 300, dtype=torch.bool)
    value[1, 17] = False
    rows = torch.full((2, 1, 300), 1 / 300)
    assert AlignAxis(1, ((300, True),), "all")(value, rows).tolist() == [[True], [False]]


@given(case=values())
def test_positions_are_gathered(case: dict) -> None:
    case["pieces"] = [(n, m and [[g[:1] for g in s] for s in m]) for n, m in case["pieces"]]
    value = torch.from_numpy(case["rng"].integers(-1000, 100000, case["sizes"]))
    result = align(case, "gather", value)
    assert result.dtype == torch.int64
    wanted = expected(value.numpy(), case["dim"], case["pieces"], case["batch"], lambda v: v[0])
    assert result.tolist() == wanted


def test_a_fully_masked_group_does_not_make_nan_of_a_row() -> None:
    mask = torch.full((1, 1, 1, 4), float("-inf"))
    merged = AlignAxis(3, ((4, True),), "log_mean_exp")(mask, torch.full((1, 2, 4), 0.25))
    assert merged.flatten().tolist() == [torch.finfo(torch.float32).min / 2] * 2
    assert torch.isfinite(merged.softmax(-1)).all()


def test_the_mask_of_a_merged_pair_weighs_it_by_its_real_share() -> None:
    mask = torch.tensor([[[[0.0, float("-inf"), 0.0]]]])
    rows = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    merged = AlignAxis(3, ((3, True),), "log_mean_exp")(mask, rows)
    torch.testing.assert_close(merged.flatten(), torch.tensor([0.5, 1.0]).log())


def test_segments_keep_their_order() -> None:
    value = torch.arange(7.0).view(1, 7, 1)
    drop = torch.eye(3)[1:].unsqueeze(0)
    result = AlignAxis(1, ((2, False), (3, True), (2, False)), "mean")(value, drop)
    assert result.flatten().tolist() == [0, 1, 3, 4, 5, 6]


def test_gradients_flow_through_features() -> None:
    members = members_of(np.random.default_rng(0), 2, 5, 3)
    value = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    aligned = AlignAxis(1, ((1, False), (5, True)), "mean")(value, map_of(members, 5))
    (gradient,) = torch.autograd.grad(aligned.sum(), value)
    wanted = torch.cat([torch.ones(2, 1), map_of(members, 5).sum(1)], 1)
    torch.testing.assert_close(gradient, wanted.unsqueeze(-1).expand(-1, -1, 3).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["mean", "log_mean_exp", "any", "all", "gather"])
def test_nothing_data_dependent_is_traced(mode: str) -> None:
    dtype = {"any": torch.bool, "all": torch.bool, "gather": torch.int64}.get(mode, torch.float32)
    value = torch.ones(1, 2, 5, dtype=dtype)
    rows = torch.eye(4)[:2].unsqueeze(0).expand(3, -1, -1)
    program = torch.export.export(AlignAxis(2, ((1, False), (4, True)), mode), (value, rows))
    assert not data_dependent(program.run_decompositions().graph_module)


# --- weights from a mask --------------------------------------------------------------------------------------------

REAL = torch.tensor([[True, True, True, False, True], [True, True, False, False, True]])[:, None, None, :]
MASKS = {
    "additive": (torch.where(REAL, 0.0, torch.finfo(torch.float32).min), "additive"),
    "infinite": (torch.where(REAL, 0.0, float("-inf")), "additive"),
    "half": (torch.where(REAL, 0.0, torch.finfo(torch.float16).min).half(), "additive"),
    "true is kept": (REAL, "keep"),
    "true is dropped": (~REAL, "drop"),
}


@pytest.mark.parametrize("name", MASKS)
def test_weights_of_a_mask(name: str) -> None:
    mask, kind = MASKS[name]
    weights = TokenWeights(1, 3, kind)(mask)
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("kind", ["keep", "drop", "additive"])
def test_a_key_is_real_when_any_query_of_any_head_sees_it(kind: str) -> None:
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    mask[0, 1, 2, 1] = True
    mask[0, 0, 0, 3] = True
    given = {"keep": mask, "drop": ~mask, "additive": torch.where(mask, 0.0, -1e9)}[kind]
    assert TokenWeights(0, 4, kind)(given).tolist() == [[0, 1, 0, 1]]


def test_weights_of_a_soft_mask_are_its_exponentials() -> None:
    mask = torch.tensor([0.5, 1.0, 0.25]).log().view(1, 1, 1, 3)
    torch.testing.assert_close(TokenWeights(0, 3)(mask), torch.tensor([[0.5, 1.0, 0.25]]))


@pytest.mark.parametrize("kind", ["keep", "drop", "additive"])
def test_a_token_is_real_when_it_sees_itself(kind: str) -> None:
    """In the first prompt padding sees real tokens, and they see it; in the second all do."""
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = False
    given = {"keep": mask, "drop": ~mask, "additive": torch.where(mask, 0.0, -1e9)}[kind]
    assert OwnWeights(kind)(given).tolist() == [[1, 0, 1], [1, 1, 1]]
    assert OwnWeights(kind)(given[:, :, 1:2]).tolist() == [[1, 0, 1], [1, 1, 1]]  # one row for all queries
