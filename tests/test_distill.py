"""Distillation: the loss against a hand-written sum, a teacher that does not learn, and the paper's recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pumer_compile as pumer
from pumer_compile.distill import Teacher, distillation_loss
from pumer_compile.errors import UsageError
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

pytestmark = pytest.mark.fast


def divergence(student: list[float], teacher: list[float], temperature: float) -> float:
    """`KL(teacher || student)` of one sample, with sums and logarithms."""
    p, q = ([math.exp(x / temperature) for x in logits] for logits in (teacher, student))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_mean_divergence(temperature: float) -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    wanted = sum(divergence(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)) / 3
    assert float(distillation_loss(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-9)


def test_equal_answers_cost_nothing_and_only_the_student_learns() -> None:
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    assert distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    # The gradient of a divergence is the difference of the two distributions.
    assert torch.allclose(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 2, atol=1e-6)


def test_half_precision_is_computed_in_single() -> None:
    student, teacher = torch.randn(2, 4).half(), torch.randn(2, 4).half()
    loss = distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, distillation_loss(student.float(), teacher.float()))


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"\[2, 4\] and the teacher's \[2, 5\]"):
        distillation_loss(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(UsageError, match="temperature must be above 0; found 0"):
        distillation_loss(torch.zeros(2, 4), torch.zeros(2, 4), temperature=0)
    with pytest.raises(UsageError, match="gives no logits"):
        Teacher(_Pooled()).logits({"x": torch.zeros(1, 3)})


class _Pooled(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": x}


def test_the_papers_recipe_moves_the_reduced_model_towards_its_teacher() -> None:
    """Some steps on the reduced module, which shares parameters with the model: the teacher stays as it was."""
    model = tiny_vilt(num_hidden_layers=3)
    batch = {**text_inputs(4), **image_inputs([(96, 96)] * 4, (96, 96))}
    before = model(**batch).logits.detach()
    reduced = pumer.reduce(
        pumer.capture(model, batch),
        pumer.Schedule(semantics="reference", layers=[0, 1], prune=0.2, merge={"image": 0.3, "text": 0.2}),
    )
    teacher = Teacher(model, weight=2.0)
    with torch.no_grad():  # random weights hardly tell tokens apart: start from a student that is really off
        for parameter in model.classifier.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    start = teacher.loss(reduced.module(**batch).logits, batch).item()
    optimizer = torch.optim.Adam(reduced.module.parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        teacher.loss(reduced.module(**batch).logits, batch).backward()
        optimizer.step()
    assert teacher.loss(reduced.module(**batch).logits, batch).item() < 0.2 * start
    assert not torch.allclose(model(**batch).logits, before, atol=1e-4)  # the student is the model
    # Labels are the student's affair, and the random order of ViLT's patches does not change its logits.
    assert torch.allclose(teacher.logits({**batch, "labels": torch.zeros(4)}), before, atol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
