"""A model's forward for its own `generate`, whose prefill is a captured and reduced graph.

Dynamo follows no sample: where a model reads grids or placeholders as numbers (Qwen-VL, SmolVLM), it cannot trace the
prefill. `capture` can, for one form of prompt. So here the prefill of each form is captured when it first comes,
reduced, and compiled by the inner backend of `torch.compile`; steps of decoding are the model's own forward, compiled.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_unflatten
from transformers import PreTrainedModel

from ..analysis.nodes import copied
from ..capture.capture import capture
from ..errors import UsageError
from ..guards import check_prompts
from ..reduce import Reduced, reduce, schedule_for
from ..schedule import Schedule
from ..torch_compile.backend import INNER
from .decode import window_of
from .forward import without_encoder_outputs

log = logging.getLogger("pumer_compile")

# What `generate` says beside tensors, that the prefill does anyway.
_KNOWN = ("use_cache", "return_dict")
# How versions of transformers call a cache.
_CACHES = ("past_key_values", "cache")


def reduced_forward(
    model: PreTrainedModel,
    schedule: Schedule | str | os.PathLike[str] | Mapping[str, Any],
    *,
    inner: str = "inductor",
) -> Callable[..., Any]:
    """The model's forward, reduced, for transformers' own `generate`; for every model that can be captured.

    ```python
    model.forward = reduced_forward(model, schedule)
    model.generate(**inputs, max_new_tokens=20)
    ```

    Each form of prompt (sizes, grids, places of the images) is captured and compiled at its first call, up to
    `torch._dynamo.config.recompile_limit` forms. It is for inference.

    Args:
        model: that generates.
        schedule: what to reduce; of methods with `positions`, the `original` ones, which is what `generate` counts.
        inner: the backend of `torch.compile` that compiles the reduced graph, and the steps of decoding.

    Returns:
        A bound method; it calls `model`'s forward as that was when this was called.

    Raises:
        UsageError: the model does not generate, or an unknown backend.
        ScheduleError: not a valid schedule.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise UsageError(f"{type(model).__name__} does not generate text; compile it with torch.compile(model).")
    if inner not in INNER:
        raise UsageError(f"inner is {inner!r}; it must be one of {', '.join(INNER)}.")
    prefills = _Prefills(copy.copy(model), schedule_for(model, schedule), inner)
    signature = inspect.signature(model.forward)

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return prefills(**_by_name(signature, args, kwargs))

    forward.__signature__ = without_encoder_outputs(signature)  # type: ignore[attr-defined]
    return MethodType(forward, model)


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


@dataclass(frozen=True)
class _Form:
    """A reduced prefill for one form of prompt.

    Attributes:
        shapes: of its inputs by name, and their dtypes.
        manifest: what an artifact would say of it: what must be true of inputs.
        run: gives what the model gives.
    """

    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    manifest: dict[str, Any]
    run: Callable[..., Any]

    def fits(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether prompts are of this form."""
        if self.shapes != _shapes(inputs):
            return False
        try:
            check_prompts(self.manifest, inputs)
        except UsageError:
            return False
        return True


class _Prefills:
    """Calls of a model's forward.

    Args:
        model: a shallow copy, whose own forward is the original.
        schedule: what to reduce.
        inner: backend of `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, schedule: Schedule, inner: str) -> None:
        self._model, self._schedule, self._inner = model, schedule, inner
        self._step = torch.compile(model.forward, backend=inner)
        self._forms: list[_Form] = []
        self._window = None if schedule.renumbers else window_of(model)

    def __call__(self, **given: Any) -> Any:
        """What the model gives; of a reduced prompt, where it has an image.

        Raises:
            UsageError: one form of prompt too many, or what a reduced prefill does not give.
            PumerError: from the capture and the passes.
        """
        self._check_window(given)
        caches = [given[name] for name in _CACHES if given.get(name) is not None]
        if any(cache.get_seq_length() for cache in caches):
            return self._step(**given)
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        keep = given.pop("logits_to_keep", 0)
        tensors.pop("logits_to_keep", None)
        if "inputs_embeds" in tensors:
            raise UsageError(
                "The forward is given inputs_embeds, in which an image that was computed before would stay whole. Give "
                "input_ids and pixels."
            )
        if not any(tensor.is_floating_point() for tensor in tensors.values()):
            log.info("%s is given a text without an image, which is not reduced", type(self._model).__name__)
            return self._step(**given, logits_to_keep=keep)
        _check_rest(given, tensors)
        if given.get("attention_mask") is None and "input_ids" in tensors:
            # `generate` leaves a mask of ones out, and models then look for other signs of several texts in one prompt.
            tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        form = next((form for form in self._forms if form.fits(tensors)), None) or self._captured(tensors)
        found = form.run(tensors)
        found.logits = found.logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return found

    def _check_window(self, given: Mapping[str, Any]) -> None:
        positions = given.get("position_ids")
        if self._window is not None and positions is not None and int(positions.max()) >= self._window:
            raise UsageError(
                f"A token at position {int(positions.max())} is behind the sliding window of {self._window} tokens, "
                "and a step counts the window along the shortened cache, where the tokens that went leave no gaps. "
                "Generate no more tokens than the window has room for."
            )

    def _captured(self, tensors: dict[str, Tensor]) -> _Form:
        limit = torch._dynamo.config.recompile_limit
        if len(self._forms) >= limit:
            raise UsageError(
                f"{type(self._model).__name__} has been compiled for {limit} forms of prompts (lengths, grids, places "
                "of the image), and this call has another one. Let prompts have few forms, or raise "
                "torch._dynamo.config.recompile_limit."
            )
        with torch.inference_mode(False):
            sample = {name: tensor.clone() for name, tensor in tensors.items()}
            reduced = reduce(capture(self._model, sample), self._schedule)
            run = _compiled(reduced, self._inner)
        form = _Form(_shapes(tensors), _said(reduced), run)
        self._forms.append(form)
        return form


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}


def _check_rest(given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A capture takes tensors alone, and gives what the model gives by default.

    Raises:
        UsageError: something else is asked for.
    """
    for name, value in given.items():
        if name in _KNOWN:
            plain = value is None or value is True
        else:
            plain = name in tensors or value is None or value is False or name in _CACHES
        if not plain:
            raise UsageError(
                f"A reduced prefill takes tensors, and gives logits and a cache; it was given {name}={value!r}. Leave "
                "it out, or give it as a tensor."
            )


def _said(reduced: Reduced) -> dict[str, Any]:
    """What must be true of inputs, as a manifest has it."""
    program = reduced.program
    return {
        "fixed_inputs": {name: program.inputs[name].tolist() for name in program.fixed},
        "guards": [guard.to_dict() for guard in program.guards],
        "plan": reduced.plan.to_dict(),
    }


def _compiled(reduced: Reduced, inner: str) -> Callable[..., Any]:
    """A reduced module, compiled; it takes inputs by name, and gives what the model gives."""
    info = vars(reduced.module.graph._codegen)["pytree_info"]
    graph = copied(reduced.module.graph)
    graph.set_codegen(CodeGen())
    flat = fx.GraphModule(reduced.module, graph)
    names = [str(node.target) for node in flat.graph.find_nodes(op="placeholder")]
    compiled = torch.compile(flat, backend=inner, fullgraph=True, dynamic=False)

    def run(tensors: Mapping[str, Tensor]) -> Any:
        return tree_unflatten(list(compiled(*(tensors[name] for name in names))), info.out_spec)

    return run
