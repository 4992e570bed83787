"""Distillation: train a reduced model with soft targets from the unreduced one (PuMer, section 4.3).

```python
teacher = Teacher(model)                     # a frozen copy, before training changes the weights
loss = task_loss + teacher.loss(outputs.logits, batch)
```
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import UsageError


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean divergence of the student's answers from the teacher's (Hinton et al. 2015).

    `KL(teacher || student)` of the two softmaxes at a temperature, times its square, so that gradients keep their
    size; the published PuMer code has it at temperature 1.

    Args:
        logits: of the student, floating `[batch, ..., classes]`; computed in float32 at least.
        teacher_logits: of the teacher, the same shape; no gradient reaches them.
        temperature: above 1 softens both.

    Raises:
        UsageError: shapes that differ, or a temperature that is not above 0.
    """
    if logits.shape != teacher_logits.shape:
        raise UsageError(
            f"The student's logits are {list(logits.shape)} and the teacher's {list(teacher_logits.shape)}: a "
            "distillation compares the same answers of the same samples."
        )
    if not temperature > 0:
        raise UsageError(f"The temperature must be above 0; found {temperature}.")
    student, teacher = (
        (x if x.dtype == torch.float64 else x.float()) / temperature for x in (logits, teacher_logits.detach())
    )
    divergence = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return divergence * temperature**2


class Teacher:
    """The unreduced model as it is now: frozen, in eval mode, apart from the one being trained.

    Args:
        model: gives an output with `logits`, or the logits themselves. It is copied: a reduced module shares its
            parameters, and a teacher must not learn.
        weight: of its part of the loss.
        temperature: see `distillation_loss`.
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, temperature: float = 1.0) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.weight, self.temperature = weight, temperature

    @torch.no_grad()
    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The teacher's logits on a batch of inputs by name; `labels` are left out.

        Raises:
            UsageError: the model's output has no `logits`.
        """
        given = {name: value for name, value in inputs.items() if name != "labels"}
        output: Any = self.model(**given)
        if isinstance(output, Mapping):
            output = output.get("logits")
        if not isinstance(output, Tensor):
            raise UsageError(
                f"The teacher {type(self.model).__name__} gives no logits to learn from. Take its outputs yourself "
                "and call distillation_loss."
            )
        return output

    def loss(self, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The weighted distillation loss of a student's logits on a batch, a scalar."""
        return self.weight * distillation_loss(logits, self.logits(inputs), self.temperature)
