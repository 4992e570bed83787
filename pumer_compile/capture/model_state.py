"""The model object: set for inference, and put back as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def set_for_inference(model: nn.Module) -> None:
    """Put a model in eval mode, without its loss, its experts as plain products; `restoring_model_state` undoes it."""
    for module in model.modules():
        _write_out_experts(module)
        # Not eval(): a model may override it with work that nothing undoes.
        module.training = False
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and getattr(config, "return_loss", False):
            config.return_loss = False  # transformers traces no loss


def _write_out_experts(module: nn.Module) -> None:
    """Let a mixture of experts multiply each token with the weights of its experts. transformers otherwise sorts the
    tokens of all prompts by expert first, which leaves no token axis to follow."""
    settable = getattr(module, "_can_set_experts_implementation", None)  # since transformers 5
    if isinstance(module, PreTrainedModel) and settable is not None and settable():
        module.set_experts_implementation("batched_mm")


@contextmanager
def restoring_model_state(model: nn.Module) -> Iterator[None]:
    """Put back, after the block, every attribute of the model's modules and configs that the block rebound.

    Training flags, an instance's own `forward`, parameters and buffers swapped while tracing, cached tensors,
    settings on a config. Exporters undo most of what they do themselves, but not all of it, and not always
    after an error.
    """
    before = [(namespace, dict(namespace)) for namespace in _namespaces(model)]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for namespace, saved in before:
            if list(namespace) != list(saved) or any(namespace[name] is not saved[name] for name in saved):
                namespace.clear()
                namespace.update(saved)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


def _namespaces(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The dictionaries that hold the state of a model's modules and of their configs, each once."""
    seen: set[int] = set()
    pending: list[Any] = list(model.modules())
    while pending:
        owner = pending.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        attributes = vars(owner)
        yield attributes
        yield from (value for value in attributes.values() if isinstance(value, dict))  # _parameters, _buffers, hooks
        pending += [value for value in attributes.values() if isinstance(value, PreTrainedConfig)]
