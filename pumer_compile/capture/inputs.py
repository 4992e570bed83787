"""Sample inputs: checked against what a model takes, and what the model takes beside them.

A capture fixes every token count, so the sample inputs *are* the artifact's shapes. What is certain to be
wrong is refused before tracing (`check_inputs`); what only some models refuse is explained after a trace failed and
the model itself refused it (`explain_inputs`), because a rule that one model breaks may be how another one works.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.exporters.utils import get_leaf_tensors

from ..errors import UsageError

# Inputs of transformers models by the convention of their names.
_INTEGER_INPUTS = frozenset({"input_ids", "token_type_ids", "decoder_input_ids"})
_FLOATING_INPUTS = frozenset({"pixel_values", "inputs_embeds", "image_embeds"})
_BATCH_FIRST = frozenset({"input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "pixel_mask"})
_TEXT_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids")
_USUAL_RANK = {"input_ids": 2, "attention_mask": 2, "token_type_ids": 2, "pixel_values": 4, "pixel_mask": 3}


def describe(tensor: Tensor) -> str:
    """A tensor in an error message: `int64[2, 40]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in tensor.shape)}]"


def describe_inputs(inputs: Mapping[str, Tensor]) -> str:
    """All inputs in an error message: `input_ids int64[2, 40], pixel_values float32[2, 3, 384, 384]`."""
    return ", ".join(f"{name} {describe(tensor)}" for name, tensor in inputs.items())


def float_dtype(model: nn.Module) -> torch.dtype | None:
    """The model's floating dtype: that of its first floating parameter (or buffer); None if it has none."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            return tensor.dtype
    return None


def forward_inputs(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The named arguments of the model's forward, in order."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in named}


def lookup(config: Any, part: str, *names: str) -> Any:
    """The first of `names` on the config, or else on its `part` (`text_config`, `vision_config`)."""
    for owner in (config, getattr(config, part, None)):
        for name in names:
            if (value := getattr(owner, name, None)) is not None:
                return value
    return None


# --- Checking -----------------------------------------------------------------------------------------------


def check_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in forward order; for a transformers model on its device, floating ones in its dtype.

    Raises UsageError for names that the forward does not take, required ones that are missing, values that
    are no tensors, and, for a transformers model, dtypes, batch sizes and token ids that cannot be right.
    """
    name = type(model).__name__
    accepted = forward_inputs(model)
    check_names(name, accepted, inputs, _handed_on(model), open_ended=_takes_any_keyword(model))
    ordered = [key for key in accepted if key in inputs] + [key for key in inputs if key not in accepted]
    sample = {key: inputs[key] for key in ordered}
    for key, tensor in sample.items():
        if tensor.numel() == 0:
            raise UsageError(f"The input {key} of {name} is empty: {describe(tensor)}. Give at least one sample.")
    if not isinstance(model, PreTrainedModel):
        return sample
    _check_dtypes(name, sample)
    _check_batch(name, sample)
    _check_token_ids(model, sample)
    dtype, device = float_dtype(model), model.device
    return {
        key: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for key, tensor in sample.items()
    }


def _takes_any_keyword(model: nn.Module) -> bool:
    """Whether extra names reach the model. transformers' `**kwargs` swallow a misspelt input, so there they do not."""
    return _has_keywords(model) and not isinstance(model, PreTrainedModel)


def _handed_on(model: nn.Module) -> set[str]:
    """Names that a forward of transformers takes for a model inside it (ColPali hands token types to PaliGemma)."""
    names: set[str] = set()
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    while inside and _has_keywords(model):
        names = names.union(*(forward_inputs(child) for child in inside))
        model = next((child for child in inside if _has_keywords(child)), inside[0])
        inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return names


def _has_keywords(model: nn.Module) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def check_names(
    model: str,
    accepted: Mapping[str, inspect.Parameter],
    inputs: Mapping[str, Any],
    handed_on: Set[str] = frozenset(),
    *,
    open_ended: bool,
) -> None:
    """Raise UsageError where an input is unknown, missing or no tensor.

    Args:
        model: for messages.
        accepted: what its forward takes.
        inputs: by name.
        handed_on: names that it takes as keywords for a model inside it.
        open_ended: whether it takes any keyword.
    """
    if not isinstance(inputs, Mapping) or not inputs:
        raise UsageError(
            f"The sample inputs of {model} must be a mapping from argument names to tensors, with at least "
            f"one entry; found {type(inputs).__name__}. Its forward takes {', '.join(accepted)}."
        )
    unknown = [key for key in inputs if key not in accepted and key not in handed_on]
    if unknown and not open_ended:
        raise UsageError(
            f"{model} has no input {unknown[0]!r}. Its forward takes {', '.join(accepted)}. Rename or remove it."
        )
    required = [key for key, p in accepted.items() if p.default is inspect.Parameter.empty]
    missing = [key for key in required if key not in inputs]
    if missing:
        raise UsageError(
            f"{model} needs the input {missing[0]!r}, which is missing; given were {', '.join(inputs)}. Add it."
        )
    for key, value in inputs.items():
        if isinstance(value, np.ndarray | list):
            kind, made = ("a list", "tensor") if isinstance(value, list) else ("a NumPy array", "from_numpy")
            raise UsageError(f"The input {key} of {model} is {kind}; give a torch tensor: torch.{made}({key}).")
        if not isinstance(value, Tensor):
            raise UsageError(
                f"The input {key} of {model} is {type(value).__name__}, but only tensors can be captured. "
                "Leave it out, or set it on the model's config instead."
            )


def _check_dtypes(model: str, sample: Mapping[str, Tensor]) -> None:
    for key, tensor in sample.items():
        if key in _INTEGER_INPUTS and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise UsageError(f"The input {key} of {model} must be integers (int64); found {describe(tensor)}.")
        if key in _FLOATING_INPUTS and not tensor.is_floating_point():
            raise UsageError(
                f"The input {key} of {model} must be floating point, as the model's image processor makes "
                f"it; found {describe(tensor)}."
            )


def _check_batch(model: str, sample: Mapping[str, Tensor]) -> None:
    sizes = {key: tensor.shape[0] for key, tensor in sample.items() if key in _BATCH_FIRST and tensor.ndim > 0}
    if len(set(sizes.values())) > 1:
        raise UsageError(
            f"The inputs of {model} differ in their batch size (dimension 0): "
            f"{', '.join(f'{key} has {size}' for key, size in sizes.items())}. Give each input one row for "
            "each sample."
        )


def word_table(model: nn.Module) -> nn.Embedding | None:
    """The table in which a transformers model looks up words; None where it has no one table (CLIP, say)."""
    try:
        table = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except NotImplementedError:
        return None
    return table if isinstance(table, nn.Embedding) else None


def _check_token_ids(model: PreTrainedModel, sample: Mapping[str, Tensor]) -> None:
    table = word_table(model)
    if "input_ids" not in sample or sample["input_ids"].is_meta or table is None:
        return
    low, high = (int(bound) for bound in torch.aminmax(sample["input_ids"]))
    if low < 0 or high >= table.num_embeddings:
        raise UsageError(
            f"The input input_ids of {type(model).__name__} must hold token ids from 0 to "
            f"{table.num_embeddings - 1} (its vocabulary); found {low} to {high}. Use the tokenizer that "
            "belongs to the model."
        )


def explain_inputs(model: nn.Module, sample: Mapping[str, Tensor]) -> str:
    """What is likely at fault in inputs that a model refuses, or ''. Names the input, expected and found."""
    config = getattr(model, "config", None)
    if config is None:
        return ""
    packed = {"image_grid_thw", "spatial_shapes"} & set(forward_inputs(model))  # patches come as rows
    for key, rank in _USUAL_RANK.items():
        if key in sample and sample[key].ndim != rank and not (packed and key.startswith("pixel")):
            return f"{key} should have {rank} dimensions and has {sample[key].ndim}"
    text = {key: sample[key].shape[1] for key in _TEXT_INPUTS if key in sample}
    if len(set(text.values())) > 1:
        return f"the text inputs differ in length: {', '.join(f'{key} has {n}' for key, n in text.items())}"
    limit = lookup(config, "text_config", "max_text_length", "max_position_embeddings")
    if text and isinstance(limit, int) and max(text.values()) > limit:
        return f"the text has {max(text.values())} tokens, but config.max_position_embeddings is {limit}"
    rows = {key: tensor.shape[0] for key, tensor in sample.items()}
    if len(set(rows.values())) > 1 and not packed:
        return f"the batch sizes differ: {', '.join(f'{key} has {n}' for key, n in rows.items())}"
    channels = lookup(config, "vision_config", "num_channels")
    if "pixel_values" in sample and isinstance(channels, int) and sample["pixel_values"].shape[1] != channels:
        found = sample["pixel_values"].shape[1]
        return f"pixel_values should have {channels} channels (dimension 1, config.num_channels) and has {found}"
    accepted = forward_inputs(model)
    for key, instead in (("input_ids", "inputs_embeds"), ("pixel_values", "image_embeds")):
        if key in accepted and key not in sample and instead not in sample:
            return f"{key}, which its forward takes too, was not given"
    return ""


# What processors make besides, by the convention of its name: the inputs it goes with, the dimension of theirs that it
# lacks, and the values by which it may say no more than its absence.
_CONSTANT = {
    "attention_mask": (("input_ids",), None, (1,)),
    "token_type_ids": (("input_ids",), None, (0,)),
    "pixel_mask": (("pixel_values",), -3, (1,)),
    "visual_attention_mask": (("visual_embeds", "visual_feats"), -1, (1,)),
    "visual_token_type_ids": (("visual_embeds", "visual_feats"), -1, (0, 1)),
}


def constant_inputs(model: nn.Module, sample: Mapping[str, Tensor], eager: Mapping[str, Tensor]) -> dict[str, int]:
    """Inputs that the model takes and the sample lacks, with the value that, everywhere in them, changes nothing.

    The model shows it: it runs in eager PyTorch with each. Nothing is found on the meta device.

    Args:
        model: in eval mode.
        sample: its inputs.
        eager: what the model gives for these (`eager_outputs`).
    """
    if not eager:
        return {}
    taken = forward_inputs(model).keys() | _handed_on(model)
    shapes = {name: shape for name in _CONSTANT if name in taken and (shape := _shape(name, sample))}
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        for value in _CONSTANT[name][2]:
            given = torch.full(shape, value, device=next(iter(sample.values())).device)
            if name not in found and _alike(eager, eager_outputs(model, {**sample, name: given})):
                found[name] = value
    return found


def _shape(name: str, sample: Mapping[str, Tensor]) -> list[int]:
    """Of an input that the sample lacks; [] where it has it, or nothing that it goes with."""
    beside, lacking, _ = _CONSTANT[name]
    other = next((sample[other] for other in beside if other in sample), None)
    if name in sample or other is None or other.ndim < 2:
        return []
    shape = list(other.shape)
    if lacking is not None:
        del shape[lacking]
    return shape


def eager_outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model gives for inputs in eager PyTorch, by name; nothing where it refuses them, or on the meta device. A
    random order is always the same."""
    if any(tensor.is_meta for tensor in inputs.values()):
        return {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return dict(get_leaf_tensors(model(**inputs)))
        except Exception:  # a model may raise anything
            return {}


def differs(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The first floating-point result in which two runs differ by more than the rounding of many layers; '' if none."""
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.is_floating_point() and a.shape == b.shape and a.numel():
            given, wanted = a.double().nan_to_num(), b.double().nan_to_num()
            limit = max(1.0, float(wanted.abs().max())) * 10 * torch.finfo(a.dtype).eps ** 0.5
            if float((given - wanted).abs().max()) > limit:
                return name
    return ""


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_close(value, other[name]) for name, value in one.items())


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or one.numel() == 0:
        return torch.equal(one, other)
    limit = 100 * torch.finfo(one.dtype).eps
    return torch.allclose(one.double(), other.double(), rtol=limit, atol=limit * max(1.0, float(one.abs().max())))
