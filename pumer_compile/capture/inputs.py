"""Sample inputs: checked against what a model takes, made at random from its config, or read from an .npz file.

A capture fixes every token count, so the sample inputs *are* the artifact's shapes. What is certain to be
wrong is refused before tracing (`check_inputs`); what only some models refuse is explained after a trace failed and
the model itself refused it (`explain_inputs`), because a rule that one model breaks may be how another one works.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_unflatten
from transformers import PreTrainedModel
from transformers.exporters.utils import get_leaf_tensors

from ..errors import CaptureError, UsageError
from .loading import LoadedModel, first_line

DEFAULT_TEXT_LENGTH = 40

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


# --- Checking -----------------------------------------------------------------------------------------------


def check_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in forward order; for a transformers model on its device, floating ones in its dtype.

    Raises UsageError for names that the forward does not take, required ones that are missing, values that
    are no tensors, and, for a transformers model, dtypes, batch sizes and token ids that cannot be right.
    """
    name = type(model).__name__
    accepted = forward_inputs(model)
    _check_names(name, accepted, inputs, _handed_on(model), open_ended=_takes_any_keyword(model))
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


def _check_names(
    model: str,
    accepted: Mapping[str, inspect.Parameter],
    inputs: Mapping[str, Any],
    handed_on: Set[str] = frozenset(),
    *,
    open_ended: bool,
) -> None:
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
    limit = _lookup(config, "text_config", "max_text_length", "max_position_embeddings")
    if text and isinstance(limit, int) and max(text.values()) > limit:
        return f"the text has {max(text.values())} tokens, but config.max_position_embeddings is {limit}"
    rows = {key: tensor.shape[0] for key, tensor in sample.items()}
    if len(set(rows.values())) > 1 and not packed:
        return f"the batch sizes differ: {', '.join(f'{key} has {n}' for key, n in rows.items())}"
    channels = _lookup(config, "vision_config", "num_channels")
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


# --- Exported programs --------------------------------------------------------------------------------------


def exported_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """The inputs of an exported program by argument name, as fake tensors (a symbolic size is a `SymInt`).

    Those that the trace has written into the graph (`fixed_inputs`) are real tensors.

    Raises CaptureError where they are not a flat list of tensors or a size other than the batch is symbolic.
    """
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    users = exported.graph_signature.user_inputs
    leaves = [nodes[name].meta["val"] if name in nodes else name for name in users]
    args, kwargs = tree_unflatten(leaves, exported.call_spec.in_spec)
    signature = exported.module_call_graph[0].signature
    names = list((signature.forward_arg_names if signature else None) or users)
    tensors = [_as_fixed(value) for value in (*args, *kwargs.values())]
    if len(names) != len(tensors) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise CaptureError(
            "The torch.export archive does not take plain tensors: its inputs are nested, constant or None "
            f"({', '.join(str(name) for name in names)}). Export the model again with one tensor for each "
            "argument."
        )
    for name, tensor in zip(names, tensors, strict=True):
        symbolic = [i for i, size in enumerate(tensor.shape) if i > 0 and not isinstance(size, int)]
        if symbolic:
            raise CaptureError(
                f"The input {name} of the torch.export archive has a symbolic size in dimension "
                f"{symbolic[0]}, but only the batch (dimension 0) may be symbolic: token counts are fixed. "
                "Export it again with fixed sizes."
            )
    return dict(zip(names, tensors, strict=True))


def _as_fixed(value: Any) -> Any:
    """A tensor of nested lists of numbers; anything else as it is."""
    numbers = tree_leaves(value)
    if isinstance(value, list | tuple) and numbers and all(isinstance(number, int | float) for number in numbers):
        return torch.tensor(value)
    return value


def fixed_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """Inputs whose numbers the model looked at while it was traced (the sizes of LLaVA-NeXT's images), by name."""
    return {name: t for name, t in exported_inputs(exported).items() if not isinstance(t, FakeTensor)}


def example_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """The example inputs that an exported program carries, by argument name.

    Raises UsageError where it carries none.
    """
    names = list(exported_inputs(exported))
    args, kwargs = exported.example_inputs or ((), {})
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    if list(values) != names:
        raise UsageError(
            "The torch.export archive holds no example inputs, so sample inputs must be given: an .npz file "
            f"with the arrays {', '.join(names)}."
        )
    return values


def check_exported_inputs(exported: ExportedProgram, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in the order of the exported program's arguments.

    Raises UsageError where a name, dtype or fixed size differs.
    """
    expected = exported_inputs(exported)
    wanted = inspect.Parameter.empty
    parameters = {name: inspect.Parameter("_", inspect.Parameter.KEYWORD_ONLY, default=wanted) for name in expected}
    _check_names("The torch.export archive", parameters, inputs, open_ended=False)
    for name, value in expected.items():
        given = inputs[name]
        sizes = [size if isinstance(size, int) else given.shape[0] for size in value.shape] if given.ndim else []
        if given.dtype != value.dtype or list(given.shape) != sizes:
            raise UsageError(
                f"The torch.export archive was exported with {name} {describe(value)}; found "
                f"{describe(given)}. An archive runs with the shapes it was exported with."
            )
        if not isinstance(value, FakeTensor) and not torch.equal(given.cpu(), value):
            raise UsageError(
                f"{name} was {value.tolist()} when the model was traced, and the graph is for that alone; found "
                f"{given.tolist()}. Export it again with these."
            )
    batches = {
        name: inputs[name].shape[0] for name, t in expected.items() if t.ndim and not isinstance(t.shape[0], int)
    }
    if len(set(batches.values())) > 1:
        raise UsageError(
            "The inputs of the torch.export archive differ in their batch size (dimension 0): "
            f"{', '.join(f'{name} has {size}' for name, size in batches.items())}."
        )
    return {name: inputs[name] for name in expected}


# --- Making and reading -------------------------------------------------------------------------------------


def make_inputs(
    model: nn.Module | ExportedProgram | LoadedModel,
    *,
    batch: int | None = None,
    text_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    padding: bool = True,
) -> dict[str, Tensor]:
    """Random, seeded sample inputs for a transformers model, from its config and its forward's arguments.

    - `input_ids` int64 `[batch, text_length]`: from the vocabulary without its special tokens; `batch` is 1
      and `text_length` 40, or less where the position table is shorter, unless given.
    - `attention_mask` int64: with `padding`, samples are padded on the right to different lengths; the first
      is not (a batch of 1 is padded unless the seed is 0).
    - `pixel_values` in the model's dtype `[batch, channels, height, width]`: standard normal, of the config's
      image size unless given; `[batch, images, ...]` where the config says that a sample has several images.
    - `pixel_mask` int64, if the forward takes one: with `padding`, every second sample is a smaller image,
      zero beyond.

    An exported program gets inputs like its own examples. Raises UsageError where the config does not say
    enough.
    """
    model = model.source if isinstance(model, LoadedModel) else model
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, ExportedProgram):
        alike = _like_examples(model, batch, generator)
        _check_fixed(alike, text_length, image_size)
        return alike
    name, config, accepted = type(model).__name__, getattr(model, "config", None), forward_inputs(model)
    if config is None:
        raise UsageError(
            f"{name} has no transformers config to make sample inputs from. Give them: an .npz file with the "
            f"arrays that its forward takes ({', '.join(accepted)})."
        )
    batch = 1 if batch is None else batch
    _check_positive(batch=batch, text_length=text_length, image_size=image_size)
    padded = [padding and (row > 0 or (batch == 1 and seed != 0)) for row in range(batch)]
    made: dict[str, Tensor] = {}
    if "input_ids" in accepted:
        made |= make_text(config, padded, text_length, generator)
    if "pixel_values" in accepted:
        made |= _make_images(config, batch, image_size, generator, name)
    if "pixel_mask" in accepted and "pixel_values" in made:
        made |= _make_image_padding(config, made["pixel_values"], padded, generator)
    made = {key: tensor for key, tensor in made.items() if key in accepted}
    required = [key for key, p in accepted.items() if p.default is inspect.Parameter.empty]
    missing = [key for key in required if key not in made]
    if missing or not made:
        raise UsageError(
            f"No sample values can be made for {missing[0] if missing else 'any input'} of {name}. Give the "
            f"inputs: an .npz file with the arrays that its forward takes ({', '.join(accepted)})."
        )
    if _lookup(config, "text_config", "image_token_id", "image_token_index") is not None and "pixel_values" in made:
        raise UsageError(
            f"{name} marks the place of an image by special tokens in its text, which random text does not "
            "have. Give the inputs its processor makes: an .npz file with input_ids, pixel_values and what "
            "else it takes."
        )
    return check_inputs(model, {key: made[key] for key in accepted if key in made})


def load_inputs(
    path: str | Path, model: nn.Module | ExportedProgram | LoadedModel, added: Collection[str] = ()
) -> dict[str, Tensor]:
    """Sample inputs from an .npz file with one array for each input, by name.

    Floating arrays are cast to the model's floating dtype and integers to int64 (for an exported program, to
    the dtypes it takes). `added` are those that the model does not take, and a method adds. Raises UsageError for a
    file that is no .npz, and for names and shapes that do not fit.
    """
    path, model = Path(path), model.source if isinstance(model, LoadedModel) else model
    arrays = read_arrays(path)
    if isinstance(model, ExportedProgram):
        expected = exported_inputs(model)
        tensors = {name: _tensor(path, name, array, None) for name, array in arrays.items()}
        cast = {n: t.to(expected[n].dtype) if n in expected else t for n, t in tensors.items()}
        return check_exported_inputs(model, cast)
    dtype = float_dtype(model)
    tensors = {name: _tensor(path, name, array, dtype) for name, array in arrays.items()}
    more = {name: tensors.pop(name) for name in added if name in tensors}
    return {**check_inputs(model, tensors), **more}


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by name from an .npz file.

    Raises:
        UsageError: no such file, or no .npz of plain arrays.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            arrays = None if isinstance(content, np.ndarray) else dict(content)
    except FileNotFoundError as error:
        raise UsageError(f"The inputs file {path} does not exist.") from error
    except Exception as error:  # damage shows as anything from OSError to zlib.error
        raise UsageError(
            f"The inputs file {path} cannot be read as an .npz of plain arrays: {first_line(error)}. Write "
            "it with numpy.savez(name=array)."
        ) from error
    if arrays is None:
        raise UsageError(f"The inputs file {path} is one array. Write it with numpy.savez(name=array).")
    return arrays


def _tensor(path: Path, name: str, array: Any, dtype: torch.dtype | None) -> Tensor:
    if array.dtype.kind == "f":
        native = np.float64 if array.dtype.itemsize > 4 else np.float32
        return torch.from_numpy(array.astype(native)).to(dtype)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind == "b":
        return torch.from_numpy(array)
    raise UsageError(f"The array {name} in {path} has the dtype {array.dtype}; numbers or booleans are expected.")


def _check_positive(**sizes: int | tuple[int, int] | None) -> None:
    for name, size in sizes.items():
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1; found {size}.")


def _lookup(config: Any, part: str, *names: str) -> Any:
    """The first of `names` on the config, or else on its `part` (`text_config`, `vision_config`)."""
    for owner in (config, getattr(config, part, None)):
        for name in names:
            if (value := getattr(owner, name, None)) is not None:
                return value
    return None


def make_text(config: Any, padded: list[bool], length: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Random `input_ids` and `attention_mask`, int64 `[batch, length]`, of ordinary words; none where the config tells
    no vocabulary. `padded` says of each sample whether it is padded on the right."""
    # Of the language model first: PaliGemma's own vocabulary is larger than its word table.
    vocabulary = _lookup(getattr(config, "text_config", None), "", "vocab_size") or _lookup(config, "", "vocab_size")
    if not isinstance(vocabulary, int):
        return {}
    limit = _lookup(config, "text_config", "max_text_length", "max_position_embeddings") or DEFAULT_TEXT_LENGTH
    length = min(limit, DEFAULT_TEXT_LENGTH) if length is None else length
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "image", "video", "decoder_start")
    special = {_lookup(config, "text_config", f"{kind}_token_id") for kind in kinds}
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    ids = ordinary[torch.randint(len(ordinary), (len(padded), length), generator=generator)]
    mask = torch.ones_like(ids)
    for row in [row for row, pad in enumerate(padded) if pad and length > 1]:
        kept = int(torch.randint(max(1, length // 2), length, (), generator=generator))
        mask[row, kept:] = 0
    pad_id = _lookup(config, "text_config", "pad_token_id")
    return {"input_ids": ids.where(mask.bool(), pad_id or 0), "attention_mask": mask}


def _make_images(
    config: Any, batch: int, image_size: int | tuple[int, int] | None, generator: torch.Generator, name: str
) -> dict[str, Tensor]:
    size = image_size if image_size is not None else _lookup(config, "vision_config", "image_size")
    if size is None:
        raise UsageError(f"The config of {name} has no image_size. Give the size of the images.")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = _lookup(config, "vision_config", "num_channels") or 3
    images = getattr(config, "num_images", None)
    shape = (batch, *([images] if isinstance(images, int) and images > 1 else []), channels, height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _make_image_padding(
    config: Any, pixels: Tensor, padded: list[bool], generator: torch.Generator
) -> dict[str, Tensor]:
    """A pixel mask with smaller images at every second padded sample, and the pixels zeroed beyond them."""
    patch = _lookup(config, "vision_config", "patch_size")
    step = patch if isinstance(patch, int) else 1
    *batch, _, height, width = pixels.shape
    mask = torch.ones(*batch, height, width, dtype=torch.int64)
    for row in [row for row, pad in enumerate(padded) if pad and (row % 2 == 1 or len(padded) == 1)]:
        for axis, side in ((-2, height), (-1, width)):
            cells = max(1, side // step)
            kept = step * int(torch.randint((cells + 1) // 2, cells + 1, (), generator=generator))
            mask[row].narrow(axis, kept, side - kept).zero_()
    return {"pixel_values": pixels * mask.unsqueeze(-3), "pixel_mask": mask}


def _like_examples(exported: ExportedProgram, batch: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs like the examples in an archive: noise, masks as they are, ids from the same range.

    `batch` only changes a symbolic batch.
    """
    expected, made = exported_inputs(exported), {}
    for name, example in example_inputs(exported).items():
        if batch is not None and example.ndim > 0 and not isinstance(expected[name].shape[0], int):
            example = example[torch.arange(batch) % example.shape[0]]
        if example.is_floating_point():
            made[name] = torch.randn(example.shape, generator=generator).to(example.dtype)
        elif int(example.max()) <= 1:
            made[name] = example.clone()
        else:
            low, high = int(example.min()), int(example.max())
            made[name] = torch.randint(low, high + 1, example.shape, generator=generator).to(example.dtype)
    found = made["input_ids"].shape[0] if "input_ids" in made else batch
    if batch is not None and found != batch:
        raise UsageError(f"A batch of {batch} was asked for, but the torch.export archive has a fixed one of {found}.")
    return check_exported_inputs(exported, made)


def _check_fixed(made: Mapping[str, Tensor], text_length: int | None, image_size: int | tuple[int, int] | None) -> None:
    """Refuse sizes that an archive, whose shapes are fixed, does not have."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    asked = {"input_ids": None if text_length is None else (text_length,), "pixel_values": size}
    for name, sizes in asked.items():
        if sizes and name in made and tuple(made[name].shape[-len(sizes) :]) != tuple(sizes):
            raise UsageError(
                f"The torch.export archive was exported with {name} {describe(made[name])}; other sizes "
                f"({', '.join(map(str, sizes))} were asked for) need another export."
            )
