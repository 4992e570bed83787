"""The page: what it says is what the reducers did, and it loads nothing."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pumer_compile as pumer
from pumer_compile.errors import UsageError
from pumer_compile.parity.report import OutputReport, ParityReport
from pumer_compile.reducers import noted_decisions
from pumer_compile.report.words import Answers, text_of, words_of
from tests.support.browser import find_chromium, look
from tests.support.commands import artifact, done, feed, folder, refused, schedule
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

VOID = {"meta", "link", "br", "input", "img"}


class Page(HTMLParser):
    """The elements of a page, each closed; `path`, `rect` and `use` close themselves."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return {**text_inputs(2), **image_inputs([(96, 96), (96, 96)], (96, 96))}


@pytest.fixture(scope="module")
def reduced(inputs: dict[str, torch.Tensor]) -> pumer.Reduced:
    keys = {"prune": 0.2, "merge": {"image": 0.3, "text": 0.2}}
    return pumer.reduce(pumer.capture(tiny_vilt(num_hidden_layers=3), inputs), pumer.Schedule(layers=[0, 1], **keys))


@pytest.fixture(scope="module")
def report(reduced: pumer.Reduced, inputs: dict[str, torch.Tensor]) -> pumer.Report:
    return pumer.report(reduced, inputs)


@pytest.fixture(scope="module")
def page(report: pumer.Report) -> Page:
    return Page(report.html())


def test_fates_are_what_the_reducers_decide(
    report: pumer.Report, reduced: pumer.Reduced, inputs: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad(), noted_decisions(reduced.module) as noted:
        reduced.module(**inputs)
    for row, sample in enumerate(report.data.samples):
        steps = {(step.site, step.stream): step for step in sample.steps}
        assert set(steps) == {(s.site, m) for s in reduced.plan.sites for m in ("text", "image")}
        first = steps["cross_modal.0", "image"]
        decided = noted["reducer.cross_modal_0.image"]
        kept = decided.kept[row].tolist()
        assert [t for t, fate in enumerate(first.fates) if fate == "pruned"] == sorted(set(range(37)) - set(kept))
        joined: dict[int, set[int]] = {}
        for source, target in zip(decided.source[row].tolist(), decided.target[row].tolist(), strict=True):
            joined.setdefault(kept[target], {kept[target]}).add(kept[source])
        assert sorted(map(sorted, joined.values())) == sorted(map(sorted, first.groups.values()))
        # What was pruned is what had the lowest scores, but for the class token, which stays.
        assert first.scores is not None
        scores = {t: first.scores[t] for t in range(1, 37)}
        pruned = {t for t in scores if first.fates[t] == "pruned"}
        assert pruned == set(sorted(scores, key=scores.__getitem__)[: len(pruned)]) and pruned
        second = steps["cross_modal.1", "image"]
        assert {t for t, f in enumerate(second.fates) if f == "gone"} == pruned
        assert [p is None for p in first.places] == [True] + [False] * 36 and second.places == first.places
        assert steps["cross_modal.0", "text"].words == tuple(map(str, inputs["input_ids"][row].tolist()))


def test_every_picture_is_there_and_nothing_is_loaded(page: Page, inputs: dict[str, torch.Tensor]) -> None:
    images = page.all("image")
    assert len(images) == 2
    for image, values in zip(images, inputs["pixel_values"], strict=True):
        kind, _, data = image["href"].partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as decoded:
            assert decoded.size == (96, 96) == (int(image["width"]), int(image["height"]))
            low, high = float(values.min()), float(values.max())
            expected = np.rint((values.numpy() - low) / (high - low) * 255).transpose(1, 2, 0)
            assert np.abs(np.array(decoded).astype(int) - expected).max() <= 1
    known = {image["id"] for image in images}
    assert {use["href"].removeprefix("#") for use in page.all("use")} == known
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "onload", "onclick")
            assert name != "href" or value.startswith(("data:", "#"))
    assert not page.all("script") and "stretched" in page.text


def test_who_does_not_see_the_pictures_is_told(page: Page, report: pumer.Report) -> None:
    shown = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(shown) > 10 and all(attributes["aria-label"] for attributes in shown)
    step = next(step for step in report.data.samples[0].steps if step.stream == "image")
    said = f"{step.count('pruned')} are pruned here"
    assert any("cross_modal.0" in one["aria-label"] and said in one["aria-label"] for one in shown)
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    labels = {label["for"] for label in page.all("label")}
    assert labels <= ids and len(labels) == 4  # two samples, two sites
    assert page.all("html")[0]["lang"] == "en"


def test_the_bars_have_the_plans_numbers(report: pumer.Report, reduced: pumer.Reduced) -> None:
    plan, data = reduced.plan, report.data
    assert {(t.site, t.stream): t.after for t in data.tokens} == {
        (site, stream): count for site, counts in plan.layers.items() for stream, count in counts.items()
    }
    assert {t.before for t in data.tokens if t.stream == "image"} == {37}
    assert sum(layer.after for layer in data.layers) == pytest.approx(plan.multiply_adds_after, rel=0.01)
    assert sum(layer.before for layer in data.layers) == pytest.approx(plan.multiply_adds_before, rel=0.01)
    assert [r.name for r in data.passes] == [r.name for r in reduced.history.records]


def test_both_sides_answer(report: pumer.Report, reduced: pumer.Reduced, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        logits = {
            "unreduced": reduced.program.module(**inputs).logits,
            "reduced": reduced.module(**inputs).logits,
        }
    for row, sample in enumerate(report.data.samples):
        (answer,) = sample.answers
        for side in answer.ranked:
            first, second = logits[side.side][row].sort(descending=True).values[:2]
            assert side.best[0][0] == str(int(logits[side.side][row].argmax()))
            assert side.margin == pytest.approx(float(first - second), rel=1e-4)
            assert side.best[0][1] == pytest.approx(float(logits[side.side][row].softmax(0).max()), rel=1e-4)


def test_what_was_not_compared_or_measured_is_said(report: pumer.Report, page: Page, tmp_path: Path) -> None:
    assert "Not compared: this is the report of a model" in page.text and "Not measured." in page.text
    proof = ParityReport("model.onnx", "float16", "cpu", samples=3, end_to_end=1)
    proof.outputs = [OutputReport("logits", "end_to_end", True, 1e-2, 1e-2)]
    rows = [{"artifact": "some/model.onnx", "batch": 4, "p50_ms": 1.25, "p90_ms": 2, "peak_memory_bytes": 2**21}]
    text = Page(pumer.Report(replace(report.data, parity=proof, bench={"measurements": rows})).html()).text
    said = "Parity of model.onnx (float16, cpu), 3 samples: failed: no output was compared with eager PyTorch"
    assert said in text and "not compared" in text
    assert re.search(r"model.onnx\s*4\s*1.25 ms\s*2 ms\s*2 MiB", text)


def test_in_a_notebook_it_is_a_frame_and_on_disk_a_file(report: pumer.Report, tmp_path: Path) -> None:
    frame = Page(report._repr_html_())
    (attributes,) = frame.all("iframe")
    assert attributes["srcdoc"] == report.html()
    report.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.html()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert len(repr(report)) < 300


@pytest.mark.fast
def test_words_and_answers_have_names_where_there_are_any() -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return {1: "what", 2: " "}.get(ids[0], f"w{ids[0]}")

        def convert_ids_to_tokens(self, number: int) -> str:
            return f"<{number}>"

    assert words_of([1, 2, 3], Tokenizer()) == ["what", "<2>", "w3"] and words_of([1, 2], None) == ["1", "2"]
    assert text_of([1, 9, 9, 3, 9, 0], [1, 1, 1, 1, 1, 0], {9}, Tokenizer()) == "what [image] w3 [image]"
    config = type("Config", (), {"id2label": {0: "no", 1: "yes"}})
    sides = {"unreduced": {"logits": torch.tensor([[1.0, 3.0]])}, "reduced": {"logits": torch.tensor([[2.0, 1.0]])}}
    (answer,) = Answers(config, None).of(sides, 0, 1, -1)
    assert [side.best[0][0] for side in answer.ranked] == ["yes", "no"] and not answer.agrees
    assert answer.difference == pytest.approx(5**0.5 / 10**0.5)
    # Of a language model the last word that is no padding; its prompt is shorter afterwards.
    words = {"unreduced": {"logits": torch.eye(5)[None]}, "reduced": {"logits": torch.eye(5)[None, 2:]}}
    (answer,) = Answers(None, Tokenizer()).of(words, 0, 1, -2)
    assert [side.best[0][0] for side in answer.ranked] == ["w3", "w3"] and answer.difference is None


def test_inputs_that_do_not_fit_are_refused(reduced: pumer.Reduced, inputs: dict[str, torch.Tensor]) -> None:
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(UsageError, match="no picture among the inputs"):
        pumer.report(reduced, text)
    with pytest.raises(UsageError, match="pixel_mask is missing"):
        pumer.report(reduced, {name: tensor for name, tensor in inputs.items() if name != "pixel_mask"})
    with pytest.raises(UsageError, match=r"input_ids \[2, 7\], which fixes its shapes, and is given \[2, 5\]"):
        pumer.report(reduced, {**inputs, "input_ids": inputs["input_ids"][:, :5]})
    with pytest.raises(UsageError, match="takes no input extra"):
        pumer.report(reduced, {**inputs, "extra": inputs["pixel_mask"]})
    with pytest.raises(UsageError, match="Leave --schedule out"):
        pumer.report(reduced, inputs, schedule="vilt-vqa")
    with pytest.raises(UsageError, match="name one"):
        pumer.report(tiny_vilt(), inputs)


def test_an_artifact_is_shown_with_its_own_decisions(tmp_path: Path) -> None:
    samples = tmp_path / "samples.npz"
    np.savez(samples, **feed())
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"measurements": [{"artifact": "a.onnx", "batch": 2, "p50_ms": 4.0}]}))
    out = tmp_path / "report.html"
    target = ("report", artifact(), "--model", folder(), "--inputs", samples, "-o", out)
    said = done(*target, "--bench", bench, "--samples", 1)
    assert "1 sample;" in said.out and "answers are the same" in said.out
    page = Page(out.read_text(encoding="utf-8"))
    assert "shown with its own decisions" in page.text and "The first 1 of 2 samples are shown" in page.text
    assert re.search(r"Parity of \S*model.onnx \(float32, CPUExecutionProvider\), 2 samples: passed", page.text)
    assert len(page.all("image")) == 1 and len(page.all("article")) == 1 and "4 ms" in page.text
    sides = re.findall(r"(unreduced|reduced|artifact)\d", page.text)
    assert sides[:3] == ["unreduced", "reduced", "artifact"]


def test_bad_usage_of_the_command(tmp_path: Path) -> None:
    samples, text, out = tmp_path / "samples.npz", tmp_path / "text.npz", tmp_path / "report.html"
    np.savez(samples, **feed())
    np.savez(text, **{name: feed()[name] for name in ("input_ids", "attention_mask")})
    short, broken = tmp_path / "short.npz", tmp_path / "bench.json"
    np.savez(short, **feed(text=9))
    broken.write_text("{}")
    asked = ("report", folder(), "--schedule", schedule(), "-o", out)
    assert "give them as --inputs" in refused(2, *asked)
    message = refused(2, *asked, "--inputs", text)
    assert "pixel" in message
    assert "--bench" not in refused(2, "report", folder(), "--inputs", samples, "-o", out)
    assert "not what pumer-compile bench --json writes" in refused(2, *asked, "--inputs", samples, "--bench", broken)
    assert "--model MODEL" in refused(2, "report", artifact(), "--inputs", samples, "-o", out)
    proved = ("report", artifact(), "--model", folder(), "-o", out)
    assert "input_ids" in refused(2, *proved, "--inputs", short)
    assert "none" in refused(2, "report", folder(), "--schedule", "none", "--inputs", samples, "-o", out)
    assert not out.exists()


@pytest.mark.fast
def test_the_reports_of_the_docs_stand_alone() -> None:
    """They are small, hold their pictures, and link to nothing."""
    pages = sorted((Path(__file__).parents[2] / "docs" / "reports").glob("*.html"))
    assert [page.stem for page in pages] == ["demo", "meter", "qwen2_5_vl"]
    for path in pages:
        assert path.stat().st_size <= 600_000
        page = Page(path.read_text(encoding="utf-8"))
        used = {use["href"].removeprefix("#") for use in page.all("use")}
        assert used and used == {image["id"] for image in page.all("image")}
        links = [value for _, attributes in page.elements for name, value in attributes.items() if name == "href"]
        assert all(link.startswith(("data:", "#")) for link in links) and not page.all("script")


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed: the page was not looked at in a browser")
def test_in_a_browser(report: pumer.Report, tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed: the page was not looked at in a browser")
    report.save(tmp_path / "page.html")
    seen = look(tmp_path / "page.html", tmp_path / "look.png")
    assert seen.console == [] and seen.requests == []
    assert seen.pictures == [[96, 96]] * 2
    assert set(seen.probes) == {"1280 light", "1280 dark", "400 light", "400 dark"}
    for said in seen.probes.values():
        assert said["overflow"] == 0 and said["unnamed"] == 0
        assert said["panels"] == [1, 1] and said["drawings"] == 4
    assert seen.tabs == [True, True]
    for width in (1280, 400):
        with Image.open(tmp_path / f"look-{width}-dark.png") as shot:
            assert shot.size[0] == width and len(np.unique(np.array(shot.convert("L")))) > 50
