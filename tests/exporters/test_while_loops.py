"""Loops whose fixed tensors are carried: the same numbers, also under OpenVINO."""

from __future__ import annotations

import openvino
import pytest
import torch
from torch import Tensor, nn

from pumer_compile.exporters.while_loops import carry_everything
from pumer_compile.reducers.cdpruner import Determinantal


class Selection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.select = Determinantal(5, 0.5)

    def forward(self, features: Tensor, relevance: Tensor) -> Tensor:
        chosen: Tensor = self.select(features, relevance)
        return chosen


def sample(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 12, 16, generator=generator), torch.rand(2, 12, generator=generator)


def exported() -> torch.export.ExportedProgram:
    return torch.export.export(Selection().eval(), sample(0), strict=False)


def test_the_loop_reads_nothing_beside_what_it_carries() -> None:
    before, program = exported(), exported()
    carry_everything(program)
    (was,), (node,) = (
        [n for n in p.graph.nodes if n.target is torch.ops.higher_order.while_loop] for p in (before, program)
    )
    assert len(was.args[3]) > 0 and node.args[3] == ()
    assert node.args[2][len(was.args[2]) :] and len(node.args[2]) == len(was.args[2]) + len(was.args[3])


def test_openvino() -> None:
    with pytest.raises(Exception, match="must return same number of outputs"):
        openvino.convert_model(exported())
    model = openvino.compile_model(openvino.convert_model(carry_everything(exported())), "CPU")
    for seed in (0, 1):
        (found,) = model([t.numpy() for t in sample(seed)]).values()
        assert found.tolist() == Selection()(*sample(seed)).tolist()


def test_a_graph_without_a_loop_stays_as_it_is() -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),), strict=False)
    code = program.graph_module.code
    assert carry_everything(program).graph_module.code == code
