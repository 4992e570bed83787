"""What a parity check does not let pass: other shapes and names, too many other choices, nothing compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.errors import CaptureError, UsageError
from pumer_compile.parity import check as check_module
from pumer_compile.parity.check import _fault, check
from pumer_compile.parity.report import OutputReport, ParityReport, ReducerReport
from pumer_compile.reduce import Reduced
from pumer_compile.reducers.base import Decisions, Forcing, Reducer
from pumer_compile.reducers.holov import HoloVReducer
from pumer_compile.reducers.last_query import LastQueryReducer
from pumer_compile.reducers.merger import ModalityAwareMerger
from pumer_compile.reducers.prune_merge import StreamReducer
from pumer_compile.reducers.pruner import TextInformedPruner
from pumer_compile.reducers.visual import VisualReducer
from tests.support.models import Config, Fusion, inputs_for, program, schedule

Arrays = dict[str, np.ndarray]
CONFIG = Config(layers=2, batch=3)
IMAGE, TEXT = "reducer.cross_modal_0.image", "reducer.cross_modal_0.text"


class Two(Fusion):
    """Two answers of one shape."""

    def finish(self, x: Tensor, text: int) -> Any:
        answer = super().finish(x, text)
        return {"answer": answer, "match": 1 - 2 * answer}


class Open:
    """An open artifact: the reduced module in eager PyTorch, and what `change` does to what it gives."""

    path, provider = "fake.onnx", "none"

    def __init__(self, reduced: Reduced, change: Callable[[Arrays], Arrays] = lambda given: given) -> None:
        self.twin, self.decisions = pumer.reduce.__globals__["with_decisions"](reduced.module)
        self.change, self.ran = change, []
        self.outputs = ["answer", "match", *self.decisions]

    def run(self, batch: Mapping[str, Tensor]) -> Arrays:
        self.ran.append(batch)
        return self.change({name: value.numpy().copy() for name, value in self.twin(**batch).items()})

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture(scope="module")
def reduced() -> Reduced:
    return pumer.reduce(program(CONFIG, Two), schedule(layers=(0,)))


def judged(reduced: Reduced, change: Callable[[Arrays], Arrays] = lambda given: given, **more: Any) -> ParityReport:
    opened: Any = Open(reduced, change)
    batches = more.pop("batches", [inputs_for(CONFIG)])
    dtype = more.pop("dtype", "float32")
    return check(opened, reduced.module, reduced.program.module, batches, dtype, opened.decisions, **more)


# --- Names, shapes, dtypes --------------------------------------------------------------------------------------------


def other_order(given: Arrays) -> Arrays:
    return dict(sorted(given.items(), reverse=True))


def swapped(given: Arrays) -> Arrays:
    return {**given, "answer": given["match"], "match": given["answer"]}


def missing(given: Arrays) -> Arrays:
    return {name: value for name, value in given.items() if name != "match"}


def renamed(given: Arrays) -> Arrays:
    return {("matched" if name == "match" else name): value for name, value in given.items()}


def as_double(given: Arrays) -> Arrays:
    return {**given, "answer": given["answer"].astype(np.float64)}


def as_shape(*shape: int) -> Callable[[Arrays], Arrays]:
    return lambda given: {**given, "answer": given["answer"].reshape(shape)}


def test_outputs_are_paired_by_name(reduced: Reduced) -> None:
    report = judged(reduced, other_order)
    assert report.passed and {row.name for row in report.outputs} == {"answer", "match"}
    assert all(row.max_abs < 1e-6 for row in report.outputs if row.against == "forced")
    report = judged(reduced, swapped)
    assert not report.passed and "output answer (forced) differs" in report.failures()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (missing, "gives no output match"),
        (renamed, "gives an output matched, and the model gives answer, match"),
        (as_double, "output answer is float64, and float32 in eager PyTorch"),
        (as_shape(15), r"output answer has shape [15], and [3, 5] in eager PyTorch"),
        (as_shape(3, 1, 5), r"has shape [3, 1, 5]"),
        (as_shape(1, 3, 5), r"has shape [1, 3, 5]"),
        (as_shape(5, 3), r"has shape [5, 3]"),
    ],
)
def test_outputs_of_another_form_fail(reduced: Reduced, change: Any, words: str) -> None:
    for dtype in ("float32", "float16"):
        report = judged(reduced, change, dtype=dtype)
        assert not report.passed and words in report.failures()
        assert report.to_dict()["faults"] == report.faults != []


def test_half_precision_may_give_half_precision(reduced: Reduced) -> None:
    def halved(given: Arrays) -> Arrays:
        return {n: v.astype(np.float16) if v.dtype == np.float32 else v for n, v in given.items()}

    assert judged(reduced, halved, dtype="float16").passed
    assert "is float16, and float32" in judged(reduced, halved).failures()


def test_whole_numbers_are_right_or_wrong() -> None:
    class Counting(Fusion):
        def finish(self, x: Tensor, text: int) -> Any:
            answer = super().finish(x, text)
            return {"answer": answer, "match": answer.argmax(-1) + 30000}

    reduced = pumer.reduce(program(CONFIG, Counting), schedule(layers=(0,)))
    assert judged(reduced).passed

    def one_more(given: Arrays) -> Arrays:
        return {**given, "match": given["match"] + 1}

    for dtype in ("float32", "float16"):
        assert "output match (forced) differs" in judged(reduced, one_more, dtype=dtype).failures()
    assert judged(reduced, one_more, atol=1.0).passed


def test_an_output_with_nothing_in_it() -> None:
    class Empty(Fusion):
        def finish(self, x: Tensor, text: int) -> Any:
            return {"answer": super().finish(x, text), "match": x[:, :0]}

    assert judged(pumer.reduce(program(CONFIG, Empty), schedule(layers=(0,)))).passed


def test_an_output_that_mixes_samples_is_held_against_those_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of pairs of samples (`logits_per_text`), those that both chose alike; of all in one, only where all did."""

    class Pairs(Fusion):
        def finish(self, x: Tensor, text: int) -> Any:
            answer = super().finish(x, text)
            return {"answer": answer @ answer.T, "match": answer.sum()}

    reduced = pumer.reduce(program(CONFIG, Pairs), schedule(layers=(0,)))

    def another(given: Arrays) -> Arrays:
        given[f"{IMAGE}.kept"][0, [0, 1]] = given[f"{IMAGE}.kept"][0, [1, 0]]
        given["answer"][0] += 1  # as a sample that chose otherwise would
        given["answer"][:, 0] += 1
        given["match"] += 1
        return given

    loosen(monkeypatch)
    rows = {row.name: row for row in judged(reduced, another).outputs if row.against == "end_to_end"}
    assert rows["answer"].passed and rows["answer"].samples == 2
    assert rows["match"].verdict == "not compared"


# --- The model's own forward ------------------------------------------------------------------------------------------


class Off(nn.Module):
    """A model whose capture gives something else."""

    def __init__(self, model: nn.Module, by: float, rows: slice = slice(None)) -> None:
        super().__init__()
        self.model, self.by, self.rows = model, by, rows

    def forward(self, **inputs: Tensor) -> Any:
        given = dict(self.model(**inputs))
        given["answer"] = given["answer"].clone()
        given["answer"][self.rows] += self.by
        return given


def test_the_captured_graph_is_held_against_the_models_own_forward(reduced: Reduced) -> None:
    model = reduced.program.model
    assert model is not None
    batches = [inputs_for(CONFIG, seed=seed) for seed in range(3)]
    report = judged(reduced, model=Off(model, 0.0), batches=batches)
    rows = [row for row in report.outputs if row.against == "model"]
    assert report.passed and [(row.name, row.judged, row.samples) for row in rows] == [
        ("answer", True, 6),
        ("match", True, 6),
    ]  # two batches are enough
    report = judged(reduced, model=Off(model, 1e-2, slice(1, 2)), batches=batches)
    assert not report.passed
    assert "output answer of the captured graph differs" in report.failures()


def test_a_capture_without_an_output_of_the_model_is_told(reduced: Reduced) -> None:
    class Other(Off):
        def forward(self, **inputs: Tensor) -> Any:
            return {"answer": super().forward(**inputs)["answer"]}

    assert reduced.program.model is not None
    report = judged(reduced, model=Other(reduced.program.model, 0.0))
    assert "captured graph gives an output match [3, 5]" in report.failures()


def test_transformers_models_that_mean_something_else_while_they_are_traced() -> None:
    """ColPali without the kinds of tokens: with sdpa and nothing padded transformers leaves its causal mask out, and so
    every row sees every other; in a trace it cannot, and with eager attention it never does."""
    inputs = {
        "input_ids": torch.cat([torch.full((1, 4), 99), torch.tensor([[3, 4, 5]])], 1),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with pytest.raises(CaptureError, match=r"gives other \S+ in eager PyTorch than while it is traced"):
        pumer.capture(colpali("sdpa"), inputs, outputs=["embeddings"])
    captured = pumer.capture(colpali("eager"), inputs, outputs=["embeddings"])
    opened: Any = Open.__new__(Open)
    opened.twin, opened.decisions, opened.change, opened.ran = captured.module, [], lambda given: given, []
    opened.outputs = ["embeddings"]
    assert check(opened, captured.module, captured.module, [inputs], "float32", [], model=captured.model).passed


def colpali(implementation: str) -> Any:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**sizes, "model_type": "gemma", "vocab_size": 100, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=99, projection_dim=16
    )
    torch.manual_seed(0)
    model = transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=config, embedding_dim=8))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


# --- What is enough ---------------------------------------------------------------------------------------------------


def turned(samples: set[int]) -> Callable[[Arrays], Arrays]:
    """The first two kept tokens change places in some of the samples that are asked for, in order."""
    count = itertools.count()

    def change(given: Arrays) -> Arrays:
        kept = given[f"{IMAGE}.kept"]
        for row in kept:
            if next(count) in samples:
                row[[0, 1]] = row[[1, 0]]
        return given

    return change


def test_a_sample_must_be_judged_end_to_end(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    """With near-ties in every sample; what counts as one is widened for that."""
    loosen(monkeypatch)
    report = judged(reduced, turned({0, 1, 2}), atol=1e3)
    assert report.sound and report.end_to_end == 0 and not report.passed
    assert "no sample was judged end to end: in each of 3 a choice differs" in report.failures()
    assert any("end to end nothing was compared" in note for note in report.notes)
    rows = {row.against: row for row in report.outputs if row.name == "answer"}
    assert rows["forced"].verdict == "pass" and rows["end_to_end"].verdict == "not compared"
    written = next(r for r in report.to_dict()["outputs"] if r["against"] == "end_to_end")
    assert written["samples"] == 0 and written["cosine"] is written["max_abs"] is written["top1"] is None


def test_samples_are_drawn_until_one_is_judged_end_to_end(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    loosen(monkeypatch)
    monkeypatch.setattr(check_module, "MORE_SAMPLES", 0)
    more = (inputs_for(CONFIG, seed=seed) for seed in itertools.count(1))
    report = judged(reduced, turned(set(range(7))), more=more, atol=1e3)
    assert report.passed and (report.samples, report.end_to_end) == (9, 2)
    assert next(row for row in report.outputs if row.against == "end_to_end").samples == 2


def test_no_more_samples_than_a_proof_can_bear(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    loosen(monkeypatch)
    monkeypatch.setattr(check_module, "MORE_SAMPLES", 0)
    more = (inputs_for(CONFIG, seed=seed) for seed in itertools.count(1))
    report = judged(reduced, turned(set(range(1000))), more=more, atol=1e3)
    assert not report.passed and report.samples == 21


@pytest.mark.parametrize(("dtype", "passes"), [("float32", False), ("float16", True), ("int8", True)])
def test_below_float32_it_is_said_that_nothing_was(
    reduced: Reduced, monkeypatch: pytest.MonkeyPatch, dtype: str, passes: bool
) -> None:
    loosen(monkeypatch)
    report = judged(reduced, turned({0, 1, 2}), dtype=dtype, atol=1e3)
    assert report.passed == passes and any("end to end nothing was compared" in note for note in report.notes)


def loosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from pumer_compile.parity import check as parity_check

    for name, tolerance in list(parity_check.TOLERANCES.items()):
        monkeypatch.setitem(parity_check.TOLERANCES, name, replace(tolerance, tie=10.0, share=1.0))


def test_more_batches_while_they_choose_anew(reduced: Reduced) -> None:
    """Every place that is ever chosen is seen, not those of the first samples alone."""
    opened: Any = Open(reduced)
    more = (inputs_for(CONFIG, seed=seed) for seed in itertools.count(1))
    report = check(
        opened, reduced.module, reduced.program.module, [inputs_for(CONFIG)], "float32", opened.decisions, more=more
    )
    assert report.passed and 3 + 9 <= report.samples <= 3 + 18
    assert len(opened.ran) == report.samples / 3
    same: Any = Open(reduced)
    again = itertools.repeat(inputs_for(CONFIG))
    report = check(
        same, reduced.module, reduced.program.module, [inputs_for(CONFIG)], "float32", same.decisions, more=again
    )
    assert report.samples == 3 + 3 * 3  # three in vain


def test_no_more_batches_where_nothing_is_chosen() -> None:
    exact = program(CONFIG, Two)
    opened: Any = Open.__new__(Open)
    opened.twin, opened.decisions, opened.change, opened.ran = exact.module, [], lambda given: given, []
    opened.outputs = ["answer", "match"]
    more = (inputs_for(CONFIG, seed=seed) for seed in itertools.count(1))
    report = check(opened, exact.module, exact.module, [inputs_for(CONFIG)], "float32", [], more=more)
    assert report.passed and report.samples == 3 == report.end_to_end


# --- Too many other choices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flipped", "chosen", "share", "passes"),
    [(0, 50, 0.01, True), (1, 50, 0.01, True), (2, 50, 0.01, False), (2, 200, 0.01, True), (3, 200, 0.01, False)],
)
def test_a_share_of_other_choices_fails(flipped: int, chosen: int, share: float, passes: bool) -> None:
    """Near-ties or not; one alone is allowed."""
    for judged in (False, True):
        row = ReducerReport("r", samples=4, differ=4, near_ties=4, chosen=chosen, flipped=flipped, share=share)
        row.judged = judged
        assert row.passed == passes
        assert passes or f"chooses {flipped} of {chosen} otherwise" in row.failure


def test_a_reducer_without_scores_is_not_judged_by_gaps(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(given: Arrays) -> Arrays:
        kept = given[f"{IMAGE}.kept"]
        kept[0, -1] = next(i for i in range(CONFIG.image) if i not in kept[0])
        return given

    row = next(r for r in judged(reduced, first, dtype="float16").reducers if r.name == IMAGE)
    assert row.judged and not row.passed and "no near-tie" in row.failure
    for module in reduced.module.modules():
        if isinstance(module, StreamReducer):
            monkeypatch.setattr(module, "judged", False)
    row = next(r for r in judged(reduced, first, dtype="float16").reducers if r.name == IMAGE)
    assert not row.judged and row.passed and row.differ == 1


def test_choices_are_counted_as_sets(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    loosen(monkeypatch)
    row = next(r for r in judged(reduced, turned({0}), atol=1e3).reducers if r.name == IMAGE)
    kept, merged = 20, 8
    assert (row.differ, row.chosen) == (1, 3 * (kept + merged)) and row.flipped <= merged

    # Another token is kept.
    def another(given: Arrays) -> Arrays:
        chosen = given[f"{IMAGE}.kept"]
        chosen[0, -1] = next(i for i in range(CONFIG.image) if i not in chosen[0])
        return given

    row = next(r for r in judged(reduced, another, atol=1e3).reducers if r.name == IMAGE)
    assert row.differ == 1 and row.flipped >= 1


# --- Gaps -------------------------------------------------------------------------------------------------------------


def compared(reducer: Reducer, wanted: Decisions, **signals: Tensor) -> float:
    reducer.forcing = Forcing(wanted)
    reducer(torch.zeros(1, reducer.tokens, 4), **signals)
    assert reducer.forcing.comparison is not None and bool(reducer.forcing.comparison.differs)
    return float(reducer.forcing.comparison.margin)


def test_gaps_are_measured_at_the_cut_and_not_by_an_attention_sink() -> None:
    """One token draws nearly all attention; of the others the least salient ones are kept."""
    attention = torch.tensor([0.9, 0.04, 0.03, 0.02, 0.01]).reshape(1, 1, 1, 5)
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    reducer = StreamReducer(5, TextInformedPruner(3), ModalityAwareMerger(0))
    signals = {"keys": torch.ones(1, 1, 5, 2), "text_to_image": attention}
    assert compared(reducer, Decisions(torch.tensor([[0, 4, 3]]), nothing, nothing), **signals) == pytest.approx(0.75)
    last = LastQueryReducer(5, 3)
    wanted = Decisions(torch.tensor([[0, 3, 4]]), nothing, nothing)
    # The best that it leaves out is 0.04, the worst that it keeps 0.01.
    assert compared(last, wanted, last_query=attention) == pytest.approx(0.75)
    equal = torch.tensor([0.9, 0.03, 0.03 * (1 + 1e-5), 0.02, 0.01]).reshape(1, 1, 1, 5)
    assert (
        compared(LastQueryReducer(5, 2), Decisions(torch.tensor([[0, 1]]), nothing, nothing), last_query=equal) < 2e-5
    )


def test_rounding_of_what_nobody_looks_at_is_no_gap() -> None:
    """float16 cannot tell 1e-9 from 2e-9 beside 1; nor can a proof."""
    attention = torch.tensor([1.0, 2e-9, 1e-9]).reshape(1, 1, 1, 3)
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    reducer = StreamReducer(3, TextInformedPruner(2), ModalityAwareMerger(0))
    signals = {"keys": torch.ones(1, 1, 3, 2), "text_to_image": attention}
    assert compared(reducer, Decisions(torch.tensor([[0, 2]]), nothing, nothing), **signals) < 1e-3


def test_similarities_of_other_samples_are_no_measure() -> None:
    """Cosines are measured against 1, products against the sample's own largest."""
    keys = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    keys[1] *= 1e3
    reducer = StreamReducer(6, None, ModalityAwareMerger(1, similarity="dot"))
    chosen = reducer(None, keys)
    target = torch.where(chosen.target == 1, 3, 1)
    place = torch.arange(6).expand(2, -1)
    reducer.forcing = Forcing(Decisions(place, chosen.source, target))
    reducer(None, keys)
    assert reducer.forcing.comparison is not None
    alone = StreamReducer(6, None, ModalityAwareMerger(1, similarity="dot"))
    alone.forcing = Forcing(Decisions(place[:1], chosen.source[:1], target[:1]))
    alone(None, keys[:1])
    assert alone.forcing.comparison is not None
    assert float(reducer.forcing.comparison.margin[0]) == pytest.approx(float(alone.forcing.comparison.margin[0]))


def test_where_no_score_decides_no_gap_is_measured(reduced: Reduced) -> None:
    reducer = VisualReducer([range(6)], 3, 0.5)
    features = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    votes = torch.arange(6.0).unsqueeze(0)
    own = reducer(features, votes).kept
    other = torch.tensor([[i for i in range(6) if i not in own[0]]])
    nothing = other[:, :0]
    reducer.forcing = Forcing(Decisions(other, nothing, nothing))
    reducer(features, votes)
    assert reducer.forcing.comparison is not None and torch.isnan(reducer.forcing.comparison.margin).all()


# --- The report -------------------------------------------------------------------------------------------------------


def test_an_error_is_measured_by_each_samples_own_size() -> None:
    """The root mean square of a batch would let a small sample hide behind a large one."""
    eager = np.stack([np.full(4, 1e3), np.full(4, 1e-3)])
    row = OutputReport("y", "forced", True, atol=0.0, rtol=1e-2)
    artifact = eager.copy()
    artifact[1] += 1e-4
    row.add(artifact, eager)
    assert row.required_atol == pytest.approx(1e-4 - 1e-2 * 1e-3) and not row.passed


def test_infinities_that_both_give_are_alike() -> None:
    """Detectors give padding a score of -inf."""
    eager = np.array([[1.0, -np.inf, 2.0], [3.0, -np.inf, -np.inf]])
    row = OutputReport("y", "forced", True, atol=1e-3, rtol=0.0)
    row.add(eager.copy(), eager)
    assert row.passed and row.max_abs == 0 and row.samples == 2
    for place, value in (((0, 1), np.inf), ((0, 1), 0.0), ((0, 0), -np.inf), ((1, 2), np.nan)):
        other = eager.copy()
        other[place] = value
        row = OutputReport("y", "forced", True, atol=1e-3, rtol=0.0)
        row.add(other, eager)
        assert not row.passed


def test_a_sample_that_the_model_does_not_take_is_told(reduced: Reduced) -> None:
    batch = {**inputs_for(CONFIG), "input_ids": torch.full((3, CONFIG.text), 10**6)}
    with pytest.raises(UsageError, match=r"cannot run on a sample \(.*input_ids int64\[3, 7\].*--inputs"):
        judged(reduced, batches=[batch])


def faulty(reduced: Reduced, change: Callable[[Arrays], Any]) -> str:
    def changed(given: Arrays) -> Arrays:
        change(given)
        return given

    return judged(reduced, changed).failures()


def test_numbers_of_tokens_that_are_not_there(reduced: Reduced) -> None:
    """The number of tokens itself, as a kept one and as a target: one more than the last."""

    def kept(given: Arrays) -> None:
        given[f"{IMAGE}.kept"][0, 0] = CONFIG.image

    def target(given: Arrays) -> None:
        given[f"{IMAGE}.target"][0, 0] = given[f"{IMAGE}.kept"].shape[1]

    def pruned(given: Arrays) -> None:
        given[f"{IMAGE}.source"][0, 0] = given[f"{IMAGE}.kept"].shape[1]

    def twice(given: Arrays) -> None:
        given[f"{IMAGE}.source"][1, 1] = given[f"{IMAGE}.source"][1, 0]

    assert f"but there are only {CONFIG.image}" in faulty(reduced, kept)
    assert "merges into tokens" in faulty(reduced, target) and "there are only 20" in faulty(reduced, target)
    assert "merges tokens" in faulty(reduced, pruned) and "there are only 20" in faulty(reduced, pruned)
    assert "merges the same token twice" in faulty(reduced, twice)


@pytest.mark.parametrize(
    ("order", "kept", "words"),
    [
        ("reference", [2, 1, -1, -1], ""),  # tokens of zeros
        ("reference", [2, 2, -1, -1], "keeps the same token twice"),
        ("reference", [2, 1, -2, -1], "keeps tokens -2 to 2"),
        ("stable", [1, 2, 3, -1], "keeps tokens -1 to 3"),
    ],
)
def test_a_decision_may_be_of_nothing_where_it_says_so(order: Any, kept: list[int], words: str) -> None:
    chosen = torch.tensor([kept])
    fault = _fault(HoloVReducer([range(6)], 4, 2, order=order), Decisions(chosen, chosen[:, :0], chosen[:, :0]))
    assert words in fault and bool(fault) == bool(words)


def test_a_fault_and_a_gap_of_one_batch_stay(reduced: Reduced) -> None:
    count = itertools.count()

    def once(given: Arrays) -> Arrays:
        if next(count) == 0:
            given[f"{IMAGE}.kept"][0, 0] = CONFIG.image
        return given

    batches = [inputs_for(CONFIG, seed=seed) for seed in range(2)]
    assert "there are only" in judged(reduced, once, batches=batches).failures()
    first = next(r for r in judged(reduced, turned({0}), batches=batches[:1]).reducers if r.name == IMAGE).worst_margin
    both = next(r for r in judged(reduced, turned({0}), batches=batches).reducers if r.name == IMAGE)
    assert first > 0 and both.samples == 6 and both.worst_margin == first
