"""What is asked of every architecture: the same tests, inherited by one class for each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from pumer_compile import Program, Reduced, Schedule, capture, export, reduce
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import Attention, locate
from pumer_compile.runtimes.ort import OnnxSession
from tests.architectures.builders import Build, Inputs
from tests.architectures.oracle import MERGE_IMAGE, MERGE_TEXT, PRUNE, Oracle
from tests.support.commands import tensorrt_refuses

Forward = Callable[..., Any]
each_semantics = pytest.mark.parametrize("semantics", ["safe", "reference"])


@functools.cache
def built(build: Build, dtype: torch.dtype) -> nn.Module:
    return build().to(dtype)


@functools.cache
def captured(
    build: Build,
    make_inputs: Callable[[], Inputs],
    outputs: tuple[str, ...],
    dtype: torch.dtype = torch.float64,
) -> Program:
    return capture(built(build, dtype), cast(make_inputs(), dtype), outputs=outputs)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}


def located(program: Program) -> list[Attention]:
    return locate(program.module, annotate(program.module))


def run(module: Callable[..., Any], inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """Some outputs by name, of a model or of a captured one."""
    with torch.no_grad():
        found = module(**inputs)
    return {name: functools.reduce(lambda value, key: value[key], _path(found, name), found) for name in names}


def _path(found: Any, name: str) -> list[str]:
    return [name] if name in found else name.split(".")


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference of any output."""
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].shape == b[name].shape
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@contextmanager
def forwards(replaced: dict[nn.Module, Forward]) -> Iterator[None]:
    """Modules that run other functions within the block."""
    with ExitStack() as stack:
        for module, forward in replaced.items():
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


class FusionSuite:
    """A model whose text and image meet in attention.

    Attributes:
        build: makes the model.
        make_inputs: makes inputs from a seed; some text is padded.
        outputs: what is compared; none has an entry for each token.
        image: image tokens.
        learned: class tokens that lead the image.
        sites: cross-modal attentions by number, with the layers of `replaced` that hold them.
        modules: what the modules of the sites are called.
    """

    build: ClassVar[Build]
    make_inputs: ClassVar[Callable[..., Inputs]]
    outputs: ClassVar[tuple[str, ...]]
    image: ClassVar[int]
    learned: ClassVar[int] = 0
    sites: ClassVar[dict[int, int]]
    modules: ClassVar[list[str]]

    @classmethod
    def replaced(cls, model: Any, oracle: Oracle, sites: set[int]) -> dict[nn.Module, Forward]:
        """The modules to run otherwise; those of the layers `sites` reduce."""
        raise NotImplementedError

    # --- helpers ----------------------------------------------------------------------------------------------------

    @classmethod
    def program(cls, dtype: torch.dtype = torch.float64) -> Program:
        return captured(cls.build, cls.make_inputs, cls.outputs, dtype)

    @classmethod
    def schedule(cls, semantics: str) -> Schedule:
        merge = {"image": MERGE_IMAGE, "text": MERGE_TEXT}
        return Schedule(semantics=semantics, layers=list(cls.sites), prune=PRUNE, merge=merge)

    @classmethod
    def reduced(cls, semantics: str, dtype: torch.dtype = torch.float64) -> Reduced:
        return _reduced(cls, semantics, dtype)

    @classmethod
    def by_hand(
        cls,
        semantics: str,
        inputs: Inputs,
        sites: set[int] | None = None,
        wrong: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[dict[str, Tensor], Oracle]:
        """The model's own forward with reducers between: its outputs, and what was reduced."""
        model = built(cls.build, dtype)
        oracle = Oracle(semantics, inputs["attention_mask"], cls.image, cls.learned, wrong)
        chosen = set(cls.sites.values()) if sites is None else sites
        with forwards(cls.replaced(model, oracle, chosen)):
            return run(model, cast(inputs, dtype), cls.outputs), oracle

    # --- tests ------------------------------------------------------------------------------------------------------

    def test_sites(self) -> None:
        found = [a for a in located(self.program()) if a.cross_modal]
        assert [a.module for a in found if a.address in [f"cross_modal.{i}" for i in self.sites]] == self.modules

    def test_the_oracle_without_sites_is_the_model(self) -> None:
        inputs = self.make_inputs()
        expected = run(built(self.build, torch.float64), cast(inputs, torch.float64), self.outputs)
        assert difference(self.by_hand("safe", inputs, set())[0], expected) <= 1e-9
        assert difference(run(self.program().module, cast(inputs, torch.float64), self.outputs), expected) <= 1e-9

    @each_semantics
    def test_token_counts_are_those_of_the_oracle(self, semantics: str) -> None:
        _, oracle = self.by_hand(semantics, self.make_inputs())
        plan = self.reduced(semantics).plan
        for stream in ("image", "text"):
            counts = getattr(oracle, stream).counts
            assert [(s.before[stream], s.after[stream]) for s in plan.sites] == list(itertools.pairwise(counts))
        assert plan.ratio > 1

    @each_semantics
    @pytest.mark.parametrize("seed", range(3))
    def test_outputs_are_those_of_the_oracle(self, semantics: str, seed: int) -> None:
        inputs = self.make_inputs(seed)
        found = run(self.reduced(semantics).module, cast(inputs, torch.float64), self.outputs)
        expected, _ = self.by_hand(semantics, inputs)
        assert difference(found, expected) <= 1e-5
        unreduced = run(self.program().module, cast(inputs, torch.float64), self.outputs)
        assert difference(expected, unreduced) > 1e-3

    @each_semantics
    def test_one_wrong_token_in_any_site_shows(self, semantics: str) -> None:
        expected, _ = self.by_hand(semantics, self.make_inputs())
        for site in range(1, len(self.sites) + 1):
            assert difference(self.by_hand(semantics, self.make_inputs(), wrong=site)[0], expected) > 1e-4

    # `reference` goes through ONNX in the oracle tests of ViLT and METER.
    @pytest.mark.parametrize("semantics", ["safe"])
    def test_onnx(self, semantics: str, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        result = export(self.reduced(semantics, torch.float32), path)
        assert result.report is not None and result.report.passed
        assert all(o.max_abs <= 2e-5 for o in result.report.outputs if o.judged)  # of some twenty samples
        assert tensorrt_refuses(path) == []
        inputs = self.make_inputs(seed=3)
        found = {name: torch.from_numpy(value) for name, value in OnnxSession(path).run(inputs).items()}
        eager = run(self.reduced(semantics, torch.float32).module, inputs, self.outputs)
        assert difference(found, eager) <= 1e-5
        assert difference(found, self.by_hand(semantics, inputs, dtype=torch.float32)[0]) <= 1e-4


class PaperSuite(FusionSuite):
    """A model that does not take an image token by position, which the paper's Algorithm 1 leaves nowhere."""

    @pytest.mark.parametrize("seed", range(3))
    def test_paper_outputs_are_those_of_the_oracle(self, seed: int) -> None:
        inputs = self.make_inputs(seed)
        found = run(self.reduced("paper").module, cast(inputs, torch.float64), self.outputs)
        expected, oracle = self.by_hand("paper", inputs)
        assert difference(found, expected) <= 1e-5
        assert [s.after for s in self.reduced("paper").plan.sites] == [
            {"text": text, "image": image}
            for text, image in zip(oracle.text.counts[1:], oracle.image.counts[1:], strict=True)
        ]
        assert difference(expected, self.by_hand("safe", inputs)[0]) > 1e-3


@functools.cache
def _reduced(cls: type[FusionSuite], semantics: str, dtype: torch.dtype) -> Reduced:
    return reduce(cls.program(dtype), cls.schedule(semantics))
