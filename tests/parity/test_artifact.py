"""Parity: decisions first, then outputs with decisions forced, then end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile.errors import ParityError, UsageError
from pumer_compile.parity.artifact import check
from pumer_compile.parity.report import OutputReport, ParityReport
from pumer_compile.reduce import Reduced, with_decisions
from pumer_compile.reducers import forced_decisions
from pumer_compile.reducers.base import Decisions
from tests.support.commands import artifact, done, feed, folder, inner_manifest, refused, run, with_manifest
from tests.support.conversions import converted_once
from tests.support.models import Config, Fusion, inputs_for, make, program, schedule
from tests.support.tiny import tiny_vilt

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")

Arrays = dict[str, np.ndarray]
TEXT, IMAGE = "reducer.cross_modal_0.text", "reducer.cross_modal_0.image"
CONFIG = Config(layers=2, batch=3)
MERGE = {"image": 0.3, "text": 0.25}


class Named(Fusion):
    """Gives its answer by name, so that artifact and model speak of the same output."""

    def finish(self, x: Tensor, text: int) -> Any:
        return {"logits": super().finish(x, text)}


@pytest.fixture(scope="module")
def reduced() -> Reduced:
    return pumer.reduce(program(CONFIG, Named), schedule(layers=(0,)))


class Artifact:
    """Stands in for an open session: the reduced module in eager PyTorch, made to decide or to answer otherwise.

    `decide` changes the decisions (and the outputs follow), `claim` what is said of them, `answer` the outputs.
    """

    path, provider = Path("fake.onnx"), "none"

    def __init__(self, reduced: Reduced, **changes: Callable[[Arrays], None]) -> None:
        self.module, self.changes = reduced.module, changes
        self.twin, self.decisions = with_decisions(reduced.module)
        self.outputs = ["logits", *self.decisions]
        self.closed = False

    def run(self, batch: Mapping[str, Tensor]) -> Arrays:
        assert not self.closed
        chosen = {name: value.numpy().copy() for name, value in self.twin(**batch).items() if name != "logits"}
        self._change("decide", chosen)
        rows = len(batch["input_ids"])
        wanted = {
            TEXT: Decisions(
                torch.arange(CONFIG.text).expand(rows, -1), *(torch.from_numpy(chosen[f"{TEXT}.{d}"]) for d in PAIR)
            ),
            IMAGE: Decisions(*(torch.from_numpy(chosen[f"{IMAGE}.{d}"]) for d in ("kept", *PAIR))),
        }
        with forced_decisions(self.module, wanted):
            outputs = {"logits": self.module(**batch)["logits"].numpy()}
        self._change("answer", outputs)
        self._change("claim", chosen)
        return outputs | chosen

    def close(self) -> None:
        """Nothing runs afterwards."""
        self.closed = True

    def _change(self, what: str, arrays: Arrays) -> None:
        if what in self.changes:
            self.changes[what](arrays)


PAIR = ("source", "target")


def judged(reduced: Reduced, batch: Mapping[str, Tensor] | None = None, **changes: Any) -> ParityReport:
    tolerances = {name: changes.pop(name) for name in ("atol", "rtol") if name in changes}
    fake: Any = Artifact(reduced, **changes)
    batches = [inputs_for(CONFIG) if batch is None else batch]
    return check(fake, reduced.module, reduced.program.module, batches, "float32", fake.decisions, **tolerances)


def reducer(report: ParityReport, name: str) -> Any:
    return next(row for row in report.reducers if row.name == name)


def output(report: ParityReport, against: str) -> OutputReport:
    return next(row for row in report.outputs if row.against == against)


# --- Decisions --------------------------------------------------------------------------------------------------------


def test_an_artifact_that_does_the_same(reduced: Reduced) -> None:
    report = judged(reduced)
    assert report.passed and report.failures() == "" and report.samples == 3 and report.decisions_compared
    assert [row.name for row in report.reducers] == [TEXT, IMAGE]
    assert [(row.samples, row.differ, row.worst_margin) for row in report.reducers] == [(3, 0, 0.0)] * 2
    assert [(row.against, row.judged, row.samples) for row in report.outputs] == [
        ("forced", True, 3),
        ("end_to_end", True, 3),
        ("unreduced", False, 3),
    ]
    assert output(report, "forced").max_abs == output(report, "end_to_end").max_abs == 0
    assert output(report, "unreduced").max_abs > 1e-2  # reported, not judged


def dropped(kept: np.ndarray) -> list[int]:
    return sorted(set(range(CONFIG.image)) - set(kept.tolist()))


def keep_another(chosen: Arrays) -> None:
    """The first sample keeps a pruned token in place of its most salient one."""
    kept = chosen[f"{IMAGE}.kept"]
    kept[0, 0] = dropped(kept[0])[-1]


def merge_another(chosen: Arrays) -> None:
    """The second sample merges its first pair elsewhere."""
    targets = chosen[f"{TEXT}.target"]
    targets[1, 0] = 1 if targets[1, 0] != 1 else 3


@pytest.mark.parametrize(("change", "name"), [(keep_another, IMAGE), (merge_another, TEXT)])
def test_a_flipped_decision_fails(reduced: Reduced, change: Any, name: str) -> None:
    report = judged(reduced, decide=change)
    row = reducer(report, name)
    assert not report.passed and not row.passed
    assert (row.samples, row.differ, row.near_ties) == (3, 1, 0) and row.worst_margin > 1e-3
    assert f"{name} decides differently on 1 of 3 samples" in report.failures()
    # With the decisions forced the outputs agree all the same; end to end the sample that differs is left out.
    forced, end_to_end = output(report, "forced"), output(report, "end_to_end")
    assert forced.passed and forced.samples == 3 and forced.max_abs < 1e-5
    assert end_to_end.passed and end_to_end.samples == 2 and end_to_end.max_abs < 1e-5
    assert all(row.passed for row in report.reducers if row.name != name)


@pytest.mark.parametrize(("change", "runs"), [({}, 1), ({"decide": keep_another}, 2)])
def test_eager_pytorch_is_made_to_follow_only_choices_that_are_not_its_own(
    reduced: Reduced, change: dict[str, Any], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, ran = sys.modules[check.__module__], []
    eager = module._eager_leaves
    monkeypatch.setattr(module, "_eager_leaves", lambda graph, *rest: ran.append(graph) or eager(graph, *rest))
    report = judged(reduced, **change)
    assert ran == [reduced.module] * runs + [reduced.program.module]
    with torch.no_grad():
        given = Artifact(reduced).run(inputs_for(CONFIG))
    pairs = given[f"{IMAGE}.source"].size
    assert reducer(report, IMAGE).chosen == given[f"{IMAGE}.kept"].size + pairs
    assert reducer(report, TEXT).chosen == given[f"{TEXT}.source"].size


def test_a_decision_that_the_outputs_did_not_follow_fails(reduced: Reduced) -> None:
    report = judged(reduced, claim=keep_another)
    assert output(report, "forced").max_abs > 1e-4
    assert "output logits (forced)" in report.failures()


def twins(difference: float) -> tuple[Reduced, dict[str, Tensor], int, int]:
    """A model and inputs in which two image tokens are alike but for `difference`, and these tokens."""
    one, other = 5, 8
    model = make(CONFIG, kind=Named)
    inputs = inputs_for(CONFIG)
    with torch.no_grad():
        model.image_positions[:, other] = model.image_positions[:, one]
        for name in ("q", "k"):  # what the text sees in both is large, so that neither is pruned
            getattr(model.layers[0].attention, name).weight.mul_(0.1)
        size = Fusion.patch
        patches = inputs["pixel_values"].unfold(2, size, size).unfold(3, size, size)
        columns = CONFIG.grid[1]
        a, b = (divmod(token - 1, columns) for token in (one, other))  # token 0 is the class token
        patches[:, :, b[0], b[1]] = patches[:, :, a[0], a[1]] * (1 + difference)
    reduced = pumer.reduce(pumer.capture(model, inputs), schedule(layers=(0,), prune=2, merge=MERGE))
    return reduced, inputs, one, other


def swap(one: int, other: int) -> Callable[[Arrays], None]:
    def change(chosen: Arrays) -> None:
        kept = chosen[f"{IMAGE}.kept"][0]
        places = [int(np.flatnonzero(kept == token)[0]) for token in (one, other)]
        kept[places] = kept[places[::-1]]

    return change


def test_a_flipped_decision_on_a_tie_passes_and_is_counted() -> None:
    reduced, inputs, one, other = twins(0.0)
    report = judged(reduced, inputs, decide=swap(one, other))
    row = reducer(report, IMAGE)
    assert report.passed and row.passed
    assert (row.samples, row.differ, row.near_ties) == (3, 1, 1) and row.worst_margin <= 1e-6
    assert output(report, "forced").samples == 3 and output(report, "end_to_end").samples == 2


def test_the_same_flip_without_a_tie_fails() -> None:
    reduced, inputs, one, other = twins(0.5)
    report = judged(reduced, inputs, decide=swap(one, other))
    row = reducer(report, IMAGE)
    assert not report.passed and (row.differ, row.near_ties) == (1, 0) and row.worst_margin > 1e-5


def narrower(chosen: Arrays) -> None:
    chosen[f"{IMAGE}.kept"] = chosen[f"{IMAGE}.kept"][:, 1:]


def outside(chosen: Arrays) -> None:
    chosen[f"{IMAGE}.source"][1, 0] = 1000


def negative(chosen: Arrays) -> None:
    chosen[f"{TEXT}.target"][1, 0] = -1


def twice(chosen: Arrays) -> None:
    chosen[f"{IMAGE}.kept"][2, 1] = chosen[f"{IMAGE}.kept"][2, 0]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (narrower, IMAGE, "keeps 19 tokens, but the schedule asks for 20"),
        (outside, IMAGE, "to 1000, but there are only 20"),
        (negative, TEXT, "merges into tokens -1 to"),
        (twice, IMAGE, "keeps the same token twice"),
    ],
)
def test_what_cannot_be_a_decision_fails(reduced: Reduced, change: Any, name: str, words: str) -> None:
    report = judged(reduced, claim=change)
    assert not report.passed and not reducer(report, name).passed
    assert words in report.failures()


def test_without_decisions_everything_is_judged_end_to_end(reduced: Reduced) -> None:
    fake: Any = Artifact(reduced, decide=keep_another)
    fake.run = lambda batch, run=fake.run: {"logits": run(batch)["logits"]}
    fake.outputs = ["logits"]
    report = check(fake, reduced.module, reduced.program.module, [inputs_for(CONFIG)], "float32", [])
    assert not report.passed and not report.decisions_compared and not report.reducers
    assert output(report, "end_to_end").samples == 3
    assert "judged end to end alone" in report.notes[0]


class Hiding(Artifact):
    """An artifact that keeps its decisions to itself."""

    def __init__(self, reduced: Reduced, **changes: Callable[[Arrays], None]) -> None:
        super().__init__(reduced, **changes)
        self.outputs = ["logits"]

    def run(self, batch: Mapping[str, Tensor]) -> Arrays:
        return {"logits": super().run(batch)["logits"]}


def test_one_of_two_sessions_is_open_at_a_time(reduced: Reduced) -> None:
    fake: Any = Hiding(reduced)
    twin: Any = Artifact(reduced)
    opened = []

    def open_with_decisions() -> Any:
        assert fake.closed
        opened.append(twin)
        return twin

    batches = [inputs_for(CONFIG), inputs_for(CONFIG, seed=1)]
    report = check(
        fake,
        reduced.module,
        reduced.program.module,
        batches,
        "float32",
        twin.decisions,
        open_with_decisions=open_with_decisions,
    )
    assert report.passed and report.decisions_compared and opened == [twin] and twin.closed
    assert reducer(report, IMAGE).samples == reducer(report, TEXT).samples == 6
    assert output(report, "forced").samples == 6


def test_no_decision_session_is_opened_for_an_artifact_that_gives_no_numbers(reduced: Reduced) -> None:
    def spoil(arrays: Arrays) -> None:
        arrays["logits"][:] = np.nan

    def open_with_decisions() -> Any:
        pytest.fail("a decision session was opened")

    fake: Any = Hiding(reduced, answer=spoil)
    names = Artifact(reduced).decisions
    batches = [inputs_for(CONFIG)]
    report = check(
        fake, reduced.module, reduced.program.module, batches, "float32", names, open_with_decisions=open_with_decisions
    )
    assert not report.passed


def test_no_sample_is_no_proof(reduced: Reduced) -> None:
    fake: Any = Artifact(reduced)
    report = check(fake, reduced.module, reduced.program.module, [], "float32", fake.decisions)
    assert not report.passed and report.failures() == "no sample was compared"


# --- Outputs ----------------------------------------------------------------------------------------------------------


def add(value: float) -> Callable[[Arrays], None]:
    def change(outputs: Arrays) -> None:
        outputs["logits"][1, 2] += value

    return change


def test_a_wrong_output_fails(reduced: Reduced) -> None:
    report = judged(reduced, answer=add(0.01))
    assert not report.passed and all(row.passed for row in report.reducers)
    for against in ("forced", "end_to_end"):
        row = output(report, against)
        assert not row.passed and row.max_abs == pytest.approx(0.01, rel=1e-3)
        assert row.mean_abs == pytest.approx(0.01 / 15, rel=1e-3)
    assert "output logits (forced) differs by up to 1.00e-02" in report.failures()


@pytest.mark.parametrize(
    ("tolerances", "passes"),
    [
        ({}, False),
        ({"atol": 0.02}, True),
        ({"atol": 0.005}, False),
        ({"atol": {"logits": 0.02}}, True),
        ({"atol": {"logits": 0.005}}, False),
        ({"atol": {}}, False),
        ({"atol": 0.0, "rtol": 1e4}, True),
        ({"atol": 0.0, "rtol": {"logits": 1e-7}}, False),
    ],
)
def test_tolerances(reduced: Reduced, tolerances: dict[str, Any], passes: bool) -> None:
    report = judged(reduced, answer=add(0.01), **tolerances)
    assert report.passed == passes
    row = output(report, "forced")
    assert row.passed == (row.required_atol <= row.atol)


def test_a_tolerance_for_an_output_that_is_not_there(reduced: Reduced) -> None:
    with pytest.raises(UsageError, match=r"'logit'.*logits"):
        judged(reduced, atol={"logit": 1e-3})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_fail(reduced: Reduced, value: float) -> None:
    report = judged(reduced, answer=add(value), atol=math.inf)
    assert not report.passed
    assert "output logits (end to end) has NaN or Inf" in report.failures()
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["passed"] is False


def test_nan_on_both_sides_fails() -> None:
    model = make(dataclasses.replace(CONFIG, layers=1), kind=Named)
    with torch.no_grad():
        model.words.weight[:] = math.nan
    inputs = inputs_for(CONFIG)
    reduced = pumer.reduce(pumer.capture(model, inputs), schedule(layers=(0,)))
    fake: Any = Artifact(reduced)
    fake.run = lambda batch: {name: value.numpy() for name, value in fake.twin(**batch).items()}
    report = check(fake, reduced.module, reduced.program.module, [inputs], "float32", fake.decisions)
    assert not report.passed and "NaN or Inf" in report.failures()


def test_the_numbers_of_an_output() -> None:
    random = np.random.default_rng(0)
    eager = random.normal(size=(7, 3, 4))
    artifact = eager + 0.1 * random.normal(size=eager.shape)
    row = OutputReport("y", "forced", True, atol=0.1, rtol=0.01)
    for rows in (slice(0, 2), slice(2, 2), slice(2, 7)):
        row.add(artifact[rows], eager[rows])
    error = np.abs(artifact - eager)
    flat = [x.reshape(7, -1) for x in (artifact, eager)]
    cosines = [a @ e / np.linalg.norm(a) / np.linalg.norm(e) for a, e in zip(*flat, strict=True)]
    assert row.samples == 7
    assert row.max_abs == pytest.approx(error.max()) and row.mean_abs == pytest.approx(error.mean())
    relative = error / np.abs(eager)
    assert row.max_rel == pytest.approx(relative.max()) and row.mean_rel == pytest.approx(relative.mean())
    assert row.cosine == pytest.approx(min(cosines))
    assert row.top1 == pytest.approx(np.mean(flat[0].argmax(1) == flat[1].argmax(1))) and 0 < row.top1 <= 1
    assert row.required_atol == pytest.approx((error - 0.01 * np.abs(eager)).max())
    assert not row.passed
    assert dataclasses.replace(row, atol=row.required_atol).passed
    assert not dataclasses.replace(row, atol=row.required_atol * 0.999).passed
    assert dataclasses.replace(row, judged=False).passed


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_artifact_of_a_plain_compilation_can_be_proved_again(tmp_path: Path) -> None:
    """Although its decisions are no outputs: they are inside."""
    manifest = inner_manifest(artifact())
    assert manifest["outputs"] == ["logits"] and len(manifest["decisions"]) == 5
    report_file = tmp_path / "report.json"
    done("parity", artifact(), "--model", folder(), "--report", report_file)
    report = json.loads(report_file.read_text(encoding="utf-8"))
    assert report["passed"] and report["decisions_compared"] and report["samples"] >= 4
    assert not any("another checkpoint" in note for note in report["notes"])
    assert [row["name"] for row in report["reducers"]] == [TEXT, IMAGE]
    assert [(row["name"], row["against"], row["judged"]) for row in report["outputs"]] == [
        ("logits", "forced", True),
        ("logits", "end_to_end", True),
        ("logits", "unreduced", False),
        ("logits", "model", True),
    ]
    for row in report["outputs"]:
        assert {"max_abs", "mean_abs", "max_rel", "mean_rel", "cosine", "top1", "atol", "rtol", "finite"} <= set(row)
    assert report["outputs"][0]["atol"] == 1e-4
    assert report["dtype"] == "float32" and report["provider"] == "CPUExecutionProvider"


def test_on_given_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **feed())
    options = ("--inputs", tmp_path / "inputs.npz", "--report", tmp_path / "report.json")
    done("parity", artifact(), "--model", folder(), *options)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["samples"] == 2
    samples = [{name: torch.from_numpy(array) for name, array in feed(seed=seed).items()} for seed in (1, 2)]
    assert pumer.parity(artifact(), folder(), samples).samples == 4
    assert pumer.parity(artifact(), tiny_vilt(), samples[0]).samples == 2


def test_the_weights_of_another_model_fail(tmp_path: Path) -> None:
    result = run("parity", artifact(), "--model", folder(seed=1), "--report", tmp_path / "report.json")
    assert result.code == 3 and "Traceback" not in result.err
    assert "Parity failed: " in result.message and "FAIL" in result.out
    assert "output logits (forced)" in result.message
    assert "another checkpoint" in " ".join(result.out.split())
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not report["passed"] and report["outputs"][0]["max_abs"] > 1e-2


def doctored(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the artifact with another manifest inside."""
    model, manifest = onnx.load(str(artifact())), inner_manifest(artifact())
    change(manifest)
    return with_manifest(model, manifest, path)


def stronger(manifest: dict[str, Any]) -> None:
    manifest["schedule"]["prune"] = 0.2


def another_semantics(manifest: dict[str, Any]) -> None:
    manifest["schedule"]["semantics"] = "safe"
    manifest["schedule_revision"] = 2


def another_layer(manifest: dict[str, Any]) -> None:
    manifest["schedule"]["layers"] = [1]


def no_decisions(manifest: dict[str, Any]) -> None:
    manifest["decisions"] = []
    manifest["schedule"]["prune"] = 0.2


def other_decisions(manifest: dict[str, Any]) -> None:
    manifest["decisions"] = ["reducer.cross_modal_9.image.kept"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (stronger, "keeps 33 tokens, but the schedule asks for 30"),
        (another_semantics, "decides differently on"),
        (another_layer, "but the schedule asks for"),
        (no_decisions, "output logits (end to end) differs"),
        (other_decisions, "does not have the decisions that its manifest names"),
    ],
)
def test_the_artifact_of_another_schedule_fails(change: Any, words: str, tmp_path: Path) -> None:
    path = doctored(tmp_path / "model.onnx", change)
    assert words in refused(3, "parity", path, "--model", folder())


@pytest.mark.parametrize("said", [1, None])
def test_an_artifact_of_what_a_schedule_meant_before_is_not_called_wrong(said: int | None, tmp_path: Path) -> None:
    """`safe` ordered tokens by saliency once; manifests of that time hold no revision."""

    def before(manifest: dict[str, Any]) -> None:
        assert manifest.pop("schedule_revision") == 1  # `reference` has had one meaning
        manifest["schedule"]["semantics"] = "safe"
        manifest.update({} if said is None else {"schedule_revision": said})

    message = refused(2, "parity", doctored(tmp_path / "model.onnx", before), "--model", folder())
    assert "compiled when pumer, semantics safe meant something else (schedule_revision 1" in message
    assert "Compile it again" in message


def test_an_older_artifact_of_what_has_not_changed_is_proved(tmp_path: Path) -> None:
    path = doctored(tmp_path / "model.onnx", lambda manifest: manifest.pop("schedule_revision"))
    assert pumer.parity(path, folder()).passed


def test_tolerances_of_the_command() -> None:
    message = refused(3, "parity", artifact(), "--model", folder(), "--atol", "0", "--rtol", "0")
    assert "atol 0 + rtol 0" in message
    message = refused(3, "parity", artifact(), "--model", folder(), "--atol", "logits=0", "--rtol", "logits=0")
    assert "atol 0 + rtol 0" in message
    done("parity", artifact(), "--model", folder(), "--atol", "logits=1e-3", "--rtol", "1e-3")


def test_the_eager_side_is_float32_for_a_checkpoint_in_half_precision(tmp_path: Path) -> None:
    tiny_vilt(num_hidden_layers=1).half().save_pretrained(tmp_path / "model")
    done(tmp_path / "model", "--schedule", "none", "-o", tmp_path / "model.onnx", "--batch", 2, "--no-verify")
    done("parity", tmp_path / "model.onnx", "--model", tmp_path / "model", "--atol", "1e-5", "--rtol", "1e-5")


def test_a_failed_compilation_raises_with_the_report(reduced: Reduced, tmp_path: Path) -> None:
    with pytest.raises(ParityError) as error:
        pumer.export(reduced, tmp_path / "model.onnx", atol=0, rtol=0)
    assert isinstance(error.value.report, ParityReport) and not error.value.report.passed
