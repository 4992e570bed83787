"""Distillation: train a reduced model with soft targets from the unreduced one (PuMer, section 4.3).

```python
teacher = Teacher(model)                     # a frozen copy, before training changes the weights
loss = task_loss + teacher.loss(outputs.logits, batch)
```

and the losses of DynamicViT, whose predictors learn with the model (`method: dynamicvit`, `training: true`):

```python
reduced.module.train()                       # masks are drawn; in eval mode they are what the predictors are surest of
with noted_masks(reduced.module) as masks:
    outputs = reduced.module(**batch)
loss = task_loss + 2 * keep_ratio_loss(masks.values()) + teacher.loss(outputs.logits, batch)
save_predictors(reduced.module, "predictors.safetensors")
```
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import UsageError
from .files import atomic_path

if TYPE_CHECKING:
    from .reducers import MaskingReducer, Reduction


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean divergence of the student's answers from the teacher's (Hinton et al. 2015).

    `KL(teacher || student)` of the two softmaxes at a temperature, times its square, so that gradients keep their
    size; the published PuMer code has it at temperature 1.

    Args:
        logits: of the student, floating `[batch, ..., classes]`; computed in float32 at least.
        teacher_logits: of the teacher, the same shape; no gradient reaches them.
        temperature: above 1 softens both.

    Returns:
        A scalar, in nats per sample; float64 where a student's logits are, else float32.

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


# --- DynamicViT -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeptMask:
    """What a predictor decided about a batch.

    Attributes:
        mask: 1 where a token is kept, else 0, `[batch, tokens]` float32, without learned tokens; with gradient.
        share: of the tokens that shall be kept.
    """

    mask: Tensor
    share: float


@contextmanager
def noted_masks(module: nn.Module) -> Iterator[dict[str, KeptMask]]:
    """Note what the predictors inside a module decide in a forward pass within the block, by module path.

    Yields the masks, which a forward pass fills in.

    Raises:
        UsageError: there is no predictor that is being trained.
    """
    noted: dict[str, KeptMask] = {}

    def note(name: str, reducer: MaskingReducer, given: Any, result: Reduction) -> None:
        noted[name] = KeptMask(result.weights[:, reducer.learned :], reducer.share)

    hooks = [reducer.register_forward_hook(partial(note, name)) for name, reducer in _predicting(module).items()]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


def keep_ratio_loss(masks: Iterable[KeptMask]) -> Tensor:
    """Mean over stages and samples of the squared difference of the kept share from what it shall be (DynamicViT,
    equation 12), a scalar.

    Raises:
        UsageError: no masks; the forward pass ran outside of `noted_masks`.
    """
    found = [((kept.mask.float().mean(1) - kept.share) ** 2).mean() for kept in masks]
    if not found:
        raise UsageError("No masks were noted: run the reduced module within noted_masks, and take its masks then.")
    return torch.stack(found).mean()


def token_distillation_loss(tokens: Tensor, teacher_tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of the kept tokens from the teacher's, over tokens and features (DynamicViT, equation
    10), a scalar; 0 where none is kept.

    Args:
        tokens: what leaves the student's last layer, `[batch, tokens, width]`.
        teacher_tokens: the same of the teacher; no gradient reaches them.
        mask: of the last stage, `[batch, tokens]`.

    Raises:
        UsageError: shapes that differ.
    """
    if tokens.shape != teacher_tokens.shape or tokens.shape[:2] != mask.shape:
        raise UsageError(
            f"Tokens of the student are {list(tokens.shape)}, of the teacher {list(teacher_tokens.shape)}, and the "
            f"mask is {list(mask.shape)}: the same tokens are compared, without learned ones."
        )
    kept = (mask.detach() > 0.5).to(tokens.dtype)
    difference = ((tokens - teacher_tokens.detach()) ** 2).mean(-1)
    return (difference * kept).sum() / kept.sum().clamp(min=1)


def save_predictors(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of the predictors inside a reduced module, for `predictors:` of a schedule (safetensors).

    Raises:
        UsageError: there is no predictor that is being trained.
    """
    from safetensors.torch import save_file

    weights = {
        f"{name.removeprefix('reducer.')}.{key}": value.detach().contiguous()
        for name, reducer in _predicting(module).items()
        for key, value in reducer.predictor.state_dict().items()
    }
    with atomic_path(Path(path)) as staging:
        save_file(weights, staging)


def _predicting(module: nn.Module) -> dict[str, MaskingReducer]:
    from .reducers import MaskingReducer, reducers_of

    found = {name: reducer for name, reducer in reducers_of(module).items() if isinstance(reducer, MaskingReducer)}
    if not found:
        raise UsageError(
            "The module has no predictors that are being trained: reduce the model with `method: dynamicvit` and "
            "`training: true`."
        )
    return found
