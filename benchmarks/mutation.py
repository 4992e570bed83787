"""Does a proof notice? Artifacts with one thing changed, and how many of those that give other outputs are refused.

    python -m benchmarks.mutation                  # 100 mutations of each artifact: then `python -m benchmarks.readme`
    python -m benchmarks.mutation --only "ViLT, safe" --mutations 20

Every mutant is one change to the ONNX graph of a sound artifact: another constant, operator, attribute, weight or wire,
a choice that does not look at its input, outputs under other names. Whether it gives other outputs is measured on
samples that the proof does not see, some of each length; a mutant that does not run counts as refused. Hashes are left
out of it: they refuse every change of a file, and none of a compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper

import pumer_compile as pumer
from benchmarks.common import machine
from pumer_compile.artifacts.engine import Engine
from pumer_compile.artifacts.session import decision_session_of
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.make_inputs import load_inputs, make_inputs
from pumer_compile.capture.samples import Samples, captured_batch, kinds_of, proof_batches, proof_sizes
from pumer_compile.errors import PumerError
from pumer_compile.exporters import OnnxOptions, OnnxSession
from pumer_compile.files import atomic_path
from pumer_compile.parity.check import _Comparison, check
from pumer_compile.parity.report import TOLERANCES, ParityReport
from pumer_compile.plan import PromptPlace

ORACLES = Path(__file__).parent.parent / "tests" / "oracle"
RESULTS = Path(__file__).parent / "results" / "mutation.json"
# Samples on which a mutant's outputs are compared with the sound artifact's.
JUDGES = 64
PUMER: dict[str, Any] = {"layers": [2, 5, 8], "prune": 0.1, "merge": {"image": 0.3, "text": 0.2}}


@dataclass(frozen=True)
class Case:
    """An artifact to mutate.

    Attributes:
        name: of its row.
        folder: of the model, in `tests/oracle`.
        schedule: None compiles it as it is.
        options: of the export.
        outputs: that are kept; all where there are none.
        given: whether the folder's own inputs are taken for the capture, in place of made-up ones.
    """

    name: str
    folder: str
    schedule: dict[str, Any] | None
    options: OnnxOptions = field(default_factory=OnnxOptions)
    outputs: tuple[str, ...] = ()
    given: bool = False


CASES = (
    Case("ViLT, reference", "vilt-tiny", {"semantics": "reference", **PUMER}),
    Case("ViLT, safe", "vilt-tiny", {"semantics": "safe", **PUMER}),
    Case("ViLT, as it is", "vilt-tiny", None),
    Case("ViLT, safe, float16", "vilt-tiny", {"semantics": "safe", **PUMER}, OnnxOptions(dtype="float16")),
    Case(
        "METER, reference",
        "meter-tiny",
        {"semantics": "reference", "layers": [0, 2], "prune": 0.2, "merge": {"image": 0.2, "text": 0.2}},
    ),
    Case(
        "ViT, tome",
        "tome-tiny",
        {"method": "tome", "sites": [{"at": f"vision.{i}", "merge": {"image": 8}} for i in range(3)]},
    ),
    Case("LLaVA, vispruner", "llava-tiny", {"method": "vispruner", "budget": 48}, outputs=("logits",), given=True),
    Case("LLaVA, fastv", "llava-tiny", {"method": "fastv", "layer": 1, "budget": 48}, outputs=("logits",), given=True),
)


# --- Mutations --------------------------------------------------------------------------------------------------------

Mutation = Callable[[ModelProto, random.Random], str]
_OTHER = {
    "Add": "Sub", "Sub": "Add", "Mul": "Add", "Div": "Mul", "Greater": "GreaterOrEqual", "Less": "LessOrEqual",
    "GreaterOrEqual": "Greater", "LessOrEqual": "Less", "Equal": "Greater", "ReduceMax": "ReduceMin",
    "ReduceMin": "ReduceMax", "ReduceSum": "ReduceMean", "ReduceMean": "ReduceMax", "And": "Or", "Or": "And",
    "Sqrt": "Exp", "Exp": "Neg", "Erf": "Tanh", "Tanh": "Erf", "Gelu": "Relu", "Softmax": "LogSoftmax", "Floor": "Ceil",
}  # fmt: skip


class NothingToMutateError(Exception):
    """The graph has nothing of this kind."""


def _nodes(model: ModelProto, kinds: set[str] | None = None) -> list[NodeProto]:
    found = [n for n in model.graph.node if kinds is None or n.op_type in kinds]
    if not found:
        raise NothingToMutateError
    return found


def _values(model: ModelProto) -> dict[str, Any]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {v.name: v.type.tensor_type for v in [*inferred.value_info, *inferred.input, *inferred.output]}


def _form(kind: Any) -> tuple[Any, ...]:
    return (kind.elem_type, *((d.dim_value or d.dim_param) for d in kind.shape.dim))


def _constants(model: ModelProto, wanted: Callable[[Any], bool]) -> list[Any]:
    found = [t for t in model.graph.initializer if wanted(t)]
    found += [
        a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t") and wanted(a.t)
    ]
    if not found:
        raise NothingToMutateError
    return found


def _set(tensor: Any, values: np.ndarray[Any, Any]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def integer(model: ModelProto, rng: random.Random) -> str:
    """One number of an integer constant, by one."""
    tensor = rng.choice(_constants(model, lambda t: t.data_type in (6, 7) and numpy_helper.to_array(t).size > 0))
    values = numpy_helper.to_array(tensor).copy()
    place = rng.randrange(values.size)
    old = int(values.flat[place])
    values.flat[place] = old + rng.choice((-1, 1))
    _set(tensor, values)
    return f"{tensor.name}: {old} -> {values.flat[place]}"


def scalar(model: ModelProto, rng: random.Random) -> str:
    """A small floating-point constant, by a tenth, or with another sign."""
    tensor = rng.choice(_constants(model, lambda t: t.data_type in (1, 10) and np.prod(t.dims, dtype=int) <= 8))
    values = numpy_helper.to_array(tensor).copy()
    factor = rng.choice((1.1, -1.0, 0.5))
    _set(tensor, (values * factor if values.any() else values + 1).astype(values.dtype))
    return f"{tensor.name}: {values.flatten()[:3]} by {factor}"


def weight(model: ModelProto, rng: random.Random) -> str:
    """One row of a weight: nothing, another row's numbers, or a twentieth more."""
    tensor = rng.choice(
        _constants(model, lambda t: t.data_type in (1, 10) and len(t.dims) >= 1 and np.prod(t.dims) > 8)
    )
    values = numpy_helper.to_array(tensor).copy()
    row, other = rng.randrange(len(values)), rng.randrange(len(values))
    how = rng.choice(("zero", "swap", "more"))
    if how == "zero":
        values[row] = 0
    elif how == "swap":
        values[[row, other]] = values[[other, row]]
    else:
        values[row] *= 1.05
    _set(tensor, values)
    return f"{tensor.name}, row {row} of {len(values)}: {how}"


def operator(model: ModelProto, rng: random.Random) -> str:
    """Another operator."""
    node = rng.choice(_nodes(model, set(_OTHER)))
    old, node.op_type = node.op_type, _OTHER[node.op_type]
    if old in ("Gelu", "Softmax"):
        kept = [a for a in node.attribute if a.name != "approximate"]
        del node.attribute[:]
        node.attribute.extend(kept)
    node.domain = ""
    return f"{node.name}: {old} -> {node.op_type}"


def operands(model: ModelProto, rng: random.Random) -> str:
    """Two inputs of a node that does not take them in any order."""
    kinds = {"Sub", "Div", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "Where", "Concat", "MatMul"}
    node = rng.choice(_nodes(model, kinds))
    one = 1 if node.op_type == "Where" else 0
    node.input[one], node.input[one + 1] = node.input[one + 1], node.input[one]
    return f"{node.name}: inputs {one} and {one + 1} swapped"


def attribute(model: ModelProto, rng: random.Random) -> str:
    """One number of an attribute."""
    nodes = [n for n in model.graph.node if any(a.type in (1, 2, 6, 7) for a in n.attribute)]
    node = rng.choice(nodes)
    given = rng.choice([a for a in node.attribute if a.type in (1, 2, 6, 7)])
    if given.type == onnx.AttributeProto.FLOAT:
        given.f = given.f * 1.5 + 1e-3
    elif given.type == onnx.AttributeProto.INT:
        given.i += rng.choice((-1, 1))
    elif given.type == onnx.AttributeProto.INTS and len(given.ints) > 1:
        given.ints[0], given.ints[-1] = given.ints[-1], given.ints[0]
    else:
        raise NothingToMutateError
    return f"{node.name}: {given.name}"


def bypass(model: ModelProto, rng: random.Random) -> str:
    """A node left out: what reads it reads its first input."""
    values = _values(model)
    able = [
        n
        for n in model.graph.node
        if len(n.output) == 1
        and n.input
        and n.input[0] in values
        and n.output[0] in values
        and _form(values[n.input[0]]) == _form(values[n.output[0]])
        and n.op_type not in ("Identity", "Cast", "Reshape")
    ]
    if not able:
        raise NothingToMutateError
    node = rng.choice(able)
    fed = node.input[0]
    del node.input[:]
    node.input.append(fed)
    old, node.op_type, node.domain = node.op_type, "Identity", ""
    del node.attribute[:]
    return f"{node.name}: {old} left out"


def wire(model: ModelProto, rng: random.Random) -> str:
    """An input of a node, from another value of the same shape that was made before."""
    values = _values(model)
    made, able = [], []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in values:
                alike = [m for m in made if m != name and _form(values[m]) == _form(values[name])]
                able += [(node, index, alike)] if alike else []
        made += [name for name in node.output if name in values]
    if not able:
        raise NothingToMutateError
    node, index, alike = rng.choice(able)
    old, node.input[index] = node.input[index], rng.choice(alike)
    return f"{node.name}: {old} -> {node.input[index]}"


def decision(model: ModelProto, rng: random.Random) -> str:
    """A comparison or a count of a reducer that no longer looks at its input: the first values, whatever they are."""
    values = _values(model)
    able = [
        n
        for n in model.graph.node
        if "reducer" in n.name
        and len(n.output) == 1
        and n.output[0] in values
        and n.op_type not in ("Constant", "Shape")
        and all(d.dim_value for d in values[n.output[0]].shape.dim)
        and values[n.output[0]].elem_type in (1, 7, 9)
    ]
    if not able:
        raise NothingToMutateError
    node = rng.choice(able)
    kind = values[node.output[0]]
    shape = [d.dim_value for d in kind.shape.dim]
    numbers = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    if shape:
        numbers = numbers % shape[-1]
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    constant = numbers < max(1, (shape or [1])[-1] // 2) if kind.elem_type == 9 else numbers.astype(dtype)
    place = list(model.graph.node).index(node)
    made = helper.make_node("Constant", [], list(node.output), name=node.name, value=numpy_helper.from_array(constant))
    model.graph.node.remove(node)
    model.graph.node.insert(place, made)
    return f"{node.name}: {node.op_type} -> a constant"


def names(model: ModelProto, rng: random.Random) -> str:
    """Two outputs under one another's names, or an output of another shape."""
    outputs = model.graph.output
    if len(outputs) > 1:
        one, other = rng.sample(range(len(outputs)), 2)
        a, b = outputs[one].name, outputs[other].name
        swap = {a: b, b: a}
        for node in model.graph.node:
            for listed in (node.input, node.output):
                for index, name in enumerate(listed):
                    listed[index] = swap.get(name, name)
        return f"{a} and {b} swapped"
    name = outputs[0].name
    for node in model.graph.node:
        for index, made in enumerate(node.output):
            if made == name:
                node.output[index] = "mutated"
    model.graph.node.append(helper.make_node("Neg", ["mutated"], [name], name="mutated"))
    return f"{name} negated"


MUTATIONS: tuple[Mutation, ...] = (
    integer, scalar, weight, operator, operands, attribute, bypass, wire, decision, names,
)  # fmt: skip


def mutants(model: ModelProto, count: int, seed: int) -> Iterator[tuple[ModelProto, str, str]]:
    """So many mutants, the kinds in turn; what was changed."""
    rng, made, seen = random.Random(seed), 0, set()
    for turn in range(50 * count):
        if made == count:
            return
        mutation = MUTATIONS[turn % len(MUTATIONS)]
        changed = ModelProto()
        changed.CopyFrom(model)
        try:
            what = mutation(changed, rng)
        except (NothingToMutateError, IndexError):
            continue
        if what not in seen:
            seen.add(what)
            made += 1
            yield changed, mutation.__name__, what


# --- Judging ----------------------------------------------------------------------------------------------------------


@dataclass
class Mutant:
    """What became of one mutant.

    Attributes:
        kind, what: the change.
        changes: on how many of the judging samples an output is beyond tolerance; -1 where it does not run.
        refused: whether the proof refused it, and in which words; one that gives the same outputs is not proved.
    """

    kind: str
    what: str
    changes: int
    refused: bool
    words: str


@dataclass
class Row:
    """All mutants of an artifact."""

    name: str
    judges: int
    seconds: float
    mutants: list[Mutant]

    @property
    def changing(self) -> list[Mutant]:
        """Those that give other outputs, or do not run."""
        return [m for m in self.mutants if m.changes]

    @property
    def missed(self) -> list[Mutant]:
        """Those of them that pass."""
        return [m for m in self.changing if not m.refused]


def measure(case: Case, count: int, seed: int, journal: Path) -> Row:
    """Mutate one artifact; mutants that `journal` has are taken from there, and each new one is written to it."""
    start = time.perf_counter()
    found = [Mutant(**json.loads(line)) for line in journal.read_text().splitlines()] if journal.exists() else []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        source = load_model(ORACLES / case.folder)
        given = (
            load_inputs(ORACLES / case.folder / "inputs.npz", source) if case.given else make_inputs(source, batch=2)
        )
        program = pumer.capture(source, given, outputs=list(case.outputs))
        reduced = program if case.schedule is None else pumer.reduce(program, case.schedule)
        manifest = pumer.export(reduced, path, options=case.options).manifest
        proof = _Proof(path, reduced, manifest)
        sound = onnx.load(str(path))
        for model, kind, what in list(mutants(sound, count, seed))[len(found) :]:
            ended = Mutant(kind, what[:160], -1, True, "ends the process that runs it")
            _begun(journal).write_text(json.dumps(asdict(ended)))
            found.append(proof.judge(model, kind, what))
            with journal.open("a") as file:
                file.write(json.dumps(asdict(found[-1])) + "\n")
    return Row(case.name, JUDGES, time.perf_counter() - start, found)


def _begun(journal: Path) -> Path:
    """Where the mutant that is judged just now is written down, as one that ends the process."""
    return journal.with_suffix(".begun")


def surviving(case: Case, count: int, seed: int, folder: Path) -> Row:
    """Mutate one artifact in a process of its own, and go on in another where a mutant ends it: onnxruntime may abort
    instead of raising, and a mutant that does not run is refused."""
    journal = folder / f"{CASES.index(case)}.jsonl"
    while True:
        _begun(journal).unlink(missing_ok=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                return pool.submit(measure, case, count, seed, journal).result()
            except BrokenProcessPool:
                if not _begun(journal).exists():  # it was no mutant
                    raise
        with journal.open("a") as file:
            file.write(_begun(journal).read_text() + "\n")


_RUN = _Comparison.run


class _Proof:
    """The proof of one artifact, again and again."""

    def __init__(self, path: Path, reduced: Any, manifest: dict[str, Any]) -> None:
        from pumer_compile.exporters.publish import _eager

        self.path, self.manifest = path, manifest
        self.eager, self.unreduced, self.model = _eager(reduced)
        self.kinds = kinds_of(manifest)
        self.prompts = [PromptPlace(**place) for place in (manifest["plan"] or {}).get("prompts", ())]
        judges = Samples(self.kinds, self.prompts, seed=12345)
        size = captured_batch(self.kinds)
        self.batches = [judges.batch() for _ in range(-(-JUDGES // size))]
        session = OnnxSession(path)
        self.right = [session.run(batch) for batch in self.batches]
        session.close()
        self.mutated = path.with_name("mutant.onnx")
        self.known: dict[bytes, Any] = {}
        report = ParityReport(str(path), manifest["dtype"], "eager PyTorch")
        tolerance, names = TOLERANCES[manifest["dtype"]], set(manifest["decisions"])
        self.comparison = _Comparison(report, self.eager, self.unreduced, None, tolerance, None, None, names)

    def judge(self, model: ModelProto, kind: str, what: str) -> Mutant:
        onnx.save(model, str(self.mutated))
        changes = self._changes()
        words = "does not run" if changes < 0 else self._refusal() if changes else ""
        return Mutant(kind, what[:160], changes, bool(words), words[:300])

    def _changes(self) -> int:
        """On how many samples an output is beyond the tolerance of the proof."""
        tolerance = TOLERANCES[self.manifest["dtype"]]
        try:
            session = OnnxSession(self.mutated)
            given = [session.run(batch) for batch in self.batches]
        except PumerError:
            return -1
        rows = 0
        for right, found in zip(self.right, given, strict=True):
            off: Any = False
            for name, wanted in right.items():
                if name not in found or found[name].shape != wanted.shape:
                    off = np.ones(len(wanted), bool)
                    break
                a, e = (x.astype(np.float64).reshape(len(wanted), -1) for x in (found[name], wanted))
                scale = np.maximum(np.abs(e), np.sqrt((e**2).mean(1, keepdims=True)))
                off = off | ~(np.abs(a - e) <= tolerance.atol + tolerance.rtol * scale).all(1)
            rows += int(np.sum(off))
        return rows

    def _refusal(self) -> str:
        """Why the proof refuses the mutant; empty where it passes."""
        samples = Samples(self.kinds, self.prompts)
        batches = proof_batches(samples, proof_sizes(captured_batch(self.kinds), False, [])[0])
        try:
            session = OnnxSession(self.mutated)
            with mock.patch.object(_Comparison, "run", self._run):
                report = check(
                    Engine.over(session, self.manifest),
                    self.eager,
                    self.unreduced,
                    batches,
                    self.manifest["dtype"],
                    self.manifest["decisions"],
                    open_with_decisions=decision_session_of(session, self.manifest["decisions"]),
                    reopen=lambda: Engine.over(OnnxSession(self.mutated), self.manifest),
                    more=samples,
                )
        except PumerError as error:
            return str(error).replace(f"{self.mutated.parent}/", "")
        return "" if report.passed else report.failures()

    def _run(self, batch: Any) -> Any:
        """What eager PyTorch gives, which is the same for every mutant."""
        key = b"".join(tensor.numpy().tobytes() for tensor in batch.values())
        if key not in self.known:
            self.known[key] = _RUN(self.comparison, batch)
        return self.known[key]


def table(rows: list[dict[str, Any]]) -> str:
    """The table of `docs/proof.md`."""
    lines = ["| Artifact | Mutants | Give other outputs | Refused | |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        changing = [m for m in row["mutants"] if m["changes"]]
        refused = sum(m["refused"] for m in changing)
        share = f"{refused / max(1, len(changing)):.1%}"
        lines.append(f"| {row['name']} | {len(row['mutants'])} | {len(changing)} | {refused} | {share} |")
    missed = [(row, m) for row in rows for m in row["mutants"] if m["changes"] and not m["refused"]]
    if missed:
        lines += ["", "Not refused:", ""]
        lines += [
            f"- {row['name']}, {m['kind']}, `{m['what']}`: seen on {m['changes']} of {row['judges']} samples"
            for row, m in missed
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100, help="of each artifact")
    parser.add_argument("--only", action="append", help="artifacts by name; nothing is written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="artifacts at a time, one core each")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        work = [pool.submit(surviving, case, arguments.mutations, arguments.seed, Path(folder)) for case in chosen]
        for done in as_completed(work):
            row = done.result()
            rows[row.name] = asdict(row)
            _say(row)
            if not arguments.only:  # after each, so that what was measured is there when a long run is cut off
                measured = [rows[case.name] for case in chosen if case.name in rows]
                with atomic_path(RESULTS) as temporary:
                    text = json.dumps({"machine": machine(), "rows": measured}, indent=1)
                    temporary.write_text(text + "\n", encoding="utf-8")


def _say(row: Row) -> None:
    print(
        f"{row.name}: {len(row.changing)} give other outputs, {len(row.missed)} pass, {row.seconds:.0f} s", flush=True
    )
    for mutant in row.missed:
        print(f"  {mutant.kind}: {mutant.what} ({mutant.changes} of {row.judges})", flush=True)


if __name__ == "__main__":
    main()
