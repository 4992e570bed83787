"""docs/architectures.md is what the results say, and says nothing that no test backs."""

from __future__ import annotations

import ast

from benchmarks import architectures, configurations
from benchmarks.architecture_models import ARCHITECTURES


def test_the_page_is_written_from_the_results() -> None:
    results = architectures.kept()
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.render(results)
    assert [r["name"] for r in results] == list(ARCHITECTURES)
    assert all(("error" in r) != ("multiply_adds" in r) for r in results)


def test_every_proof_is_a_file_with_tests() -> None:
    proofs = {architecture.proof for architecture in ARCHITECTURES.values()} - {""}
    assert len(proofs) >= 8
    for proof in proofs:
        tree = ast.parse((architectures.ROOT / proof).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert any(name.startswith(("test_", "Test")) for name in names), proof


def test_a_result_is_of_the_model_it_names() -> None:
    for result in architectures.kept():
        architecture = ARCHITECTURES[result["name"]]
        assert (result["size"], result["proof"]) == (architecture.size, architecture.proof)


def test_spread_is_the_papers_for_twelve_layers() -> None:
    layers = [f"cross_modal.{i}" for i in range(12)]
    assert architectures.spread(layers) == ["cross_modal.2", "cross_modal.5", "cross_modal.8"]
    assert architectures.spread(["cross_modal.4"]) == ["cross_modal.4"]


def test_transformers_test_configurations() -> None:
    """Each is one of four things; nearly all are captured, and nothing is refused by an error that nobody meant."""
    results = configurations.kept().values()
    assert all(sum(key in r for key in ("not_built", "refused", "methods")) == 1 for r in results)
    assert sum("methods" in r and not r["differs"] for r in results) >= 105
    errors = [r["refused"] for r in results if "refused" in r]
    errors += [m["error"] for r in results for m in r.get("methods", {}).values() if "error" in m]
    assert errors and all(error["meant"] for error in errors)


def test_what_is_left_as_it_was_is_not_reduced() -> None:
    assert configurations.reduces({"before": {"image": 4}, "after": {"image": 2}})
    assert not configurations.reduces({"before": {"image": 1}, "after": {"image": 1}})
    assert not configurations.reduces({"error": {"class": "PlanError", "meant": True, "text": "Nothing."}})
