"""One step of decoding as an artifact.

The prefill is an ordinary artifact (`export`), whose outputs hold the cache of the reduced prompt. A step of decoding
reads that cache whatever its length, so it is the unreduced model's own: transformers' exporter takes it out of
`generate` (`decompose_for_generation`) and converts it. FastV leaves caches of two lengths, and transformers makes one
mask for all layers; but a new token sees the whole of a cache without padding, so the step has no mask.

A model with an encoder has two caches: of the tokens made so far, and of what the encoder left of the prompt.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import decompose_for_generation, get_leaf_tensors
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput

from ..analysis.outputs import lasting_names
from ..artifacts.manifest import read_sealed, seal_onnx
from ..artifacts.options import DEFAULT_OPSET
from ..capture.model_state import restoring_model_state, set_for_inference
from ..errors import ExportError, ParityError, UsageError
from ..exporters.onnx import append_metadata, save_onnx, torch_onnx
from ..files import check_writable, publish
from ..runtimes.ort import OnnxSession

KEY = "pumer_compile.decode"
CACHE = "past_key_values."
DECODER = "decoder_input_ids"
# What a step of a model with an encoder takes of it, beside its cache.
ENCODED = "encoder_outputs.last_hidden_state"
UNMASKED = "pumer_compile_unmasked"
# A decoding step is the same arithmetic as eager PyTorch's: nothing is decided in it.
TOLERANCE = 1e-4


def export_decode(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], path: str | os.PathLike[str], *, by_layer: bool = False
) -> Path:
    """Write one step of greedy decoding as ONNX: a token and a cache in, logits and the longer cache out.

    The batch is that of `inputs`; the length of the cache is open. The step is run on caches of two lengths, and
    compared with eager PyTorch, before it is published.

    Args:
        model: that generates.
        inputs: a prompt without padding, as for the prefill; a model with an encoder begins with its own start token.
        path: of the artifact.
        by_layer: a layer whose cache is shorter than that of the first one counts the positions of new tokens on from
            its own length, as a prefill with `positions: compact` inside the language model needs (`pyramiddrop`).

    Raises:
        UsageError: the model does not generate, the prompt has padding, or positions cannot be told by layer.
        ExportError: transformers cannot convert the step.
        ParityError: it computes something else.
    """
    path = Path(path)
    check_writable(path)
    _check(model, inputs)
    start = _start(model)
    inputs = {name: tensor for name, tensor in inputs.items() if name != DECODER}
    with restoring_model_state(model), torch_onnx(), torch.no_grad():
        set_for_inference(model)
        # A cache of one token would be taken for one of a fixed length.
        begun = {} if start is None else _begun(inputs, start, 2)
        parts = decompose_for_generation(model, {**inputs, **begun})
        if "decode" not in parts:
            raise UsageError(f"{type(model).__name__} has no decoding step of its own; found {', '.join(parts)}.")
        step, given = parts["decode"]
        converted, apart = _converted(step, given, by_layer)
        _lasting_names(converted)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            files = save_onnx(converted, Path(folder) / path.name)
            session = OnnxSession(files[-1])
            _check_step(model, session)
            offset = _offset(given["position_ids"], inputs["input_ids"].shape[1]) if start is None else 0
            kinds = {name: int(given[name].flatten()[0]) for name in KINDS if isinstance(given.get(name), Tensor)}
            _prove(model, inputs, session, offset, kinds, start)
            described = {
                "inputs": session.inputs,
                "outputs": session.outputs,
                "position_offset": offset,
                "start": start,
                "token_types": kinds,
                "lengths_by_layer": apart,
                "positions_by_layer": by_layer,
                "window": window_of(model),
            }
            append_metadata(files[-1], {KEY: json.dumps(described)})
            seal_onnx(files[-1], {file.name: file for file in files[:-1]})
            publish([(file, path.with_name(file.name)) for file in files])
    return path


def _converted(step: torch.nn.Module, given: Any, by_layer: bool) -> tuple[Any, bool]:
    """A step as ONNX, and whether each of its layers may have a cache of its own length.

    Raises:
        ExportError: transformers cannot convert it.
        UsageError: positions cannot be told by layer.
    """
    assert isinstance(step, PreTrainedModel)  # of a decoder: the model itself
    config = OnnxConfig(dynamic=True, opset_version=DEFAULT_OPSET)
    try:
        with restoring_model_state(step), _positions_by_layer(step) if by_layer else nullcontext():
            apart = _without_mask(step, needed=by_layer)
            return OnnxExporter().export_program(step, given, config)[0], apart
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"transformers could not convert the decoding step: {error}") from error


def _lasting_names(converted: Any) -> None:
    """Let the cache of a step have the name that the outputs of a prefill have, whichever version names it."""
    for value in (*converted.graph.inputs, *converted.graph.outputs):
        side, point, name = str(value.name).partition(".")
        if side in ("input", "output"):
            value.name = f"{side}{point}{lasting_names([name])[name]}"


def _check(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
        raise UsageError(f"{type(model).__name__} does not generate text, so there is no decoding step.")
    if not hasattr(OnnxExporter, "export_program"):
        raise UsageError(
            f"transformers {transformers.__version__} cannot convert a decoding step: its ONNX exporter has no "
            "`export_program`, as 5.23 has. Install a newer one."
        )
    check_unpadded(inputs)


def check_unpadded(inputs: Mapping[str, Tensor]) -> None:
    """Positions of new tokens and the mask of a step are those of a prompt that is full."""
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise UsageError("A prompt for generation must have no padding: batch prompts of one length.")


def window_of(model: PreTrainedModel) -> int | None:
    """How many tokens the layers with the smallest sliding window see; None without one."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    window = getattr(text, "sliding_window", None)
    return int(window) if window and "sliding_attention" in kinds else None


def _without_mask(step: PreTrainedModel, *, needed: bool) -> bool:
    """Let a step compute its attention without a mask, so that the cache of each layer may have its own length; False
    where some layer does not see the whole of it (a sliding window), or the attention is not transformers' `sdpa`."""
    text = step.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    windows = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    if set(kinds) != {"full_attention"} or windows or text._attn_implementation != "sdpa":
        if needed:
            raise UsageError(
                f"The attention of {type(step).__name__} reads a mask in a decoding step (a sliding window, or none of "
                "transformers' sdpa), so caches have one length: leave out `by_layer`."
            )
        return False
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, _no_mask)
    text._attn_implementation = UNMASKED
    return True


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _start(model: PreTrainedModel) -> int | None:
    """The token that a decoder begins with; None where there is no encoder.

    Raises:
        UsageError: there is one, and no such token.
    """
    if not model.config.is_encoder_decoder:
        return None
    for config in (model.generation_config, model.config, model.config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(found := getattr(config, name, None), int):
                return found
    raise UsageError(f"{type(model).__name__} has a decoder, and its config no decoder_start_token_id to begin with.")


def _begun(inputs: Mapping[str, Tensor], start: int, tokens: int = 1) -> dict[str, Tensor]:
    return {DECODER: torch.full((len(inputs["input_ids"]), tokens), start)}


@contextmanager
def _positions_by_layer(step: PreTrainedModel) -> Iterator[None]:
    """Let every layer turn queries and keys by the length of its own cache, while the block lasts."""
    decoder: Any = next((m for m in step.modules() if hasattr(m, "rotary_emb") and hasattr(m, "layers")), None)
    if decoder is None:
        raise UsageError(
            f"{type(step).__name__} gives positions to its layers in another way than by rotary angles (`rotary_emb`), "
            "so no layer can count its own. Use `positions: original`."
        )
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs["past_key_values"]
        seen["lengths"] = [cache.get_seq_length(index) for index in range(len(decoder.layers))]

    def turn(index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        gone = seen["lengths"][0] - seen["lengths"][index]
        angles = decoder.rotary_emb(args[0] if args else kwargs["hidden_states"], kwargs["position_ids"] - gone)
        return args, {**kwargs, "position_embeddings": angles}

    hooks = [decoder.register_forward_pre_hook(note, with_kwargs=True)]
    for index, layer in enumerate(decoder.layers):
        hooks.append(layer.register_forward_pre_hook(partial(turn, index), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_step(model: PreTrainedModel, session: OnnxSession) -> None:
    needed = DECODER if model.config.is_encoder_decoder else "position_ids"
    known = {"position_ids": ["input_ids", *KINDS], DECODER: ["attention_mask", ENCODED]}[needed] + [needed]
    others = [n for n in session.inputs if n not in known and not n.startswith(f"input.{CACHE}")]
    if others or needed not in session.inputs:
        raise UsageError(
            f"The decoding step of {type(model).__name__} takes {', '.join(others) or f'no {needed}'}; a token, its "
            "position and type and the cache are what the reference loop gives."
        )


# Types that transformers gives to a new token (PaliGemma: 1, what is behind the prompt).
KINDS = ("token_type_ids", "mm_token_type_ids")
Offset = int | list[int]


def _offset(positions: Tensor, length: int) -> Offset:
    """How far the position of a new token is from the length of the prompt: some models count from 1; where positions
    have several axes (M-RoPE), for each of them.

    Args:
        positions: of the first new token, `[batch, 1]` or `[axes, batch, 1]`.
        length: of the prompt.

    Raises:
        UsageError: prompts of a batch differ in it.
    """
    offsets = (positions[..., 0] - length).reshape(-1, positions.shape[-2])
    if not bool((offsets == offsets[:, :1]).all()):
        raise UsageError("The prompts of the batch go on at other positions; give prompts of one form.")
    return int(offsets[0, 0]) if positions.dim() == 2 else [int(offset) for offset in offsets[:, 0]]


def _prove(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    session: OnnxSession,
    offset: Offset,
    kinds: Mapping[str, int],
    start: int | None,
) -> None:
    """Compare with eager PyTorch, which counts positions by itself, after the prompt and again one token later."""
    found = model(**inputs, **({} if start is None else _begun(inputs, start)), use_cache=True)
    encoded = None if start is None else found.encoder_last_hidden_state
    beside, more = encoded_inputs(session, encoded), {}
    if encoded is not None:
        more = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded)}
    token = found.logits[:, -1:].argmax(-1)
    length = inputs["input_ids"].shape[1]
    named = "cache" if "cache" in found else "past_key_values"  # of transformers 5.24 and newer
    cache = cache_of(get_leaf_tensors({"past_key_values": found[named]}))
    for position in (length, length + 1):
        step = step_inputs(session, token, position, offset, kinds)
        outputs = session.run({**step, **beside, **past_of(session, cache)})
        typed = {name: step[name] for name in (*KINDS, "input_ids", DECODER) if name in step}
        found = model(use_cache=True, **{named: found[named]}, **typed, **more)
        error = float(np.abs(outputs["logits"] - found.logits.float().numpy()).max())
        if not error <= TOLERANCE:
            raise ParityError(f"The decoding step differs from eager PyTorch by {error:.2e}, allowed {TOLERANCE:g}.")
        token, cache = found.logits[:, -1:].argmax(-1), next_cache(outputs)


def read_step(path: Path) -> dict[str, Any]:
    """What `export_decode` wrote down of a step.

    Raises:
        UsageError: it is none.
    """
    metadata = read_sealed(path)
    if KEY in metadata:
        return dict(json.loads(metadata[KEY]))
    raise UsageError(f"{path} is no decoding step of pumer-compile: its metadata has no {KEY}.")


def step_inputs(
    session: OnnxSession, token: Tensor, position: int, offset: Offset, kinds: Mapping[str, int]
) -> dict[str, Tensor]:
    """What a step takes beside a cache.

    Args:
        session: of the step.
        token: of each prompt, `[rows, 1]`.
        position: of the token, counted over the prompt.
        offset: see `_offset`.
        kinds: types of new tokens, by the input that holds them.
    """
    if isinstance(offset, int):
        positions = torch.full_like(token, position + offset)
    else:
        positions = torch.stack([torch.full_like(token, position + own) for own in offset])
    given = {"input_ids": token, DECODER: token, "position_ids": positions}
    given |= {name: torch.full_like(token, kind) for name, kind in kinds.items()}
    return {name: tensor for name, tensor in given.items() if name in session.inputs}


def encoded_inputs(session: OnnxSession, encoded: Tensor | None) -> dict[str, Tensor]:
    """What a step takes of an encoder: what it left of the prompts, `[rows, tokens, width]`, none of which is padding;
    nothing where there is none."""
    if encoded is None:
        return {}
    given = {ENCODED: encoded, "attention_mask": torch.ones(encoded.shape[:2], dtype=torch.int64)}
    return {name: tensor for name, tensor in given.items() if name in session.inputs}


def past_of(session: OnnxSession, cache: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A cache under the names that a step takes it by."""
    return {name: cache[name.removeprefix("input.")] for name in session.inputs if name.startswith("input.")}


def cache_of(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cache among what a model gives."""
    return {name: tensor.detach() for name, tensor in leaves.items() if name.startswith(CACHE)}


def next_cache(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The cache that a step leaves, under the names that a prefill gives it."""
    longer = {n.removeprefix("output."): a for n, a in outputs.items() if n.startswith(f"output.{CACHE}")}
    return {name: torch.from_numpy(array) for name, array in longer.items()}
