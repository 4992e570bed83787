"""The loop: new tokens from a prefill and a decoding step under onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ..artifacts.manifest import read_manifest
from ..errors import UsageError
from ..guards import check_prompts
from ..runtimes.ort import OnnxSession
from ..schedule import Schedule
from .choosing import Choosing
from .decode import CACHE, DECODER, encoded_inputs, next_cache, past_of, read_step, step_inputs
from .framing import Framed, frame

# What a prefill with an encoder gives of it.
_ENCODED = "encoder_last_hidden_state"


@dataclass
class _Rows:
    """Prompts of one length, which a step of decoding takes together.

    Attributes:
        rows: their numbers in the batch.
        position: of the next token, counted over the prompt, before the model's own offset.
        cache: as the step takes it, without padding.
        encoded: what the step takes of an encoder.
    """

    rows: list[int]
    position: int
    cache: dict[str, Tensor]
    encoded: dict[str, Tensor]


class Generator:
    """Generation from two artifacts under onnxruntime; a reference for a server, not one.

    Prompts may be shorter than the compiled one (`framing.py`), each of a batch by its own length. A step has no mask:
    prompts of one length go through it together, others by themselves.

    Args:
        prefill: made by `export` with its cache among the outputs.
        decode: made by `export_decode` from the same model.

    Raises:
        UsageError: an artifact of another kind.
    """

    def __init__(self, prefill: str | os.PathLike[str], decode: str | os.PathLike[str]) -> None:
        self._manifest = read_manifest(Path(prefill))
        schedule = self._manifest["schedule"] or {}
        method = Schedule.from_manifest(schedule) if schedule else None
        self._compact = method is None or method.renumbers
        step = read_step(Path(decode))
        self.prefill, self.decode = OnnxSession(Path(prefill)), OnnxSession(Path(decode))
        if "logits" not in self.prefill.outputs or not any(n.startswith(CACHE) for n in self.prefill.outputs):
            raise UsageError(
                f"{prefill} gives {', '.join(self.prefill.outputs)}; generating needs logits and a cache. Compile it "
                "without --outputs."
            )
        by_layer = method is not None and method.cache_lengths == "by_layer"
        if by_layer and not step.get("lengths_by_layer"):
            raise UsageError(
                f"{prefill} gives a cache that is longer in the first layers (`method: {schedule['method']}`), and "
                f"{decode} takes one of the same length in all. Export the step again; of models with sliding windows, "
                "or whose attention is not transformers' sdpa, it is not supported."
            )
        if method is not None and method.renumbers_layers and not step.get("positions_by_layer"):
            raise UsageError(
                f"{prefill} counts positions anew behind every stage (`method: {schedule['method']}`, `positions: "
                f"compact`), so that each layer has its own, and {decode} gives one to all layers. Export the step "
                "with `by_layer=True`, or choose `positions: original`."
            )
        if step.get("positions_by_layer") and not (method is not None and method.renumbers_layers):
            raise UsageError(
                f"{decode} counts the positions of new tokens by layer, and {prefill} has the same ones in all layers. "
                "Export the step without `by_layer`."
            )
        self._window = step.get("window") if schedule and not self._compact else None
        self._offset, self._start = step["position_offset"], step.get("start")
        if self._start is not None and _ENCODED not in self.prefill.outputs:
            raise UsageError(f"{prefill} does not give {_ENCODED}, which {decode} reads. Compile it without --outputs.")
        # Steps exported before have one type.
        self._kinds = step.get("token_types") or {"token_type_ids": step.get("token_type", 0)}

    def generate(
        self,
        inputs: Mapping[str, Tensor],
        tokens: int,
        stop: int | Sequence[int] | None = None,
        *,
        config: GenerationConfig | None = None,
        processors: LogitsProcessorList | None = None,
    ) -> Tensor:
        """New tokens; greedy, unless a configuration says otherwise.

        Args:
            inputs: what the model's processor makes of prompts, each at most as long as the compiled one before and
                behind its images; padded or not.
            tokens: how many, at most.
            stop: ids of which any ends a text, beside the configuration's; where all have ended, no more are made.
            config: transformers': whether tokens are drawn (with torch's own random numbers, as `torch.manual_seed`
                sets them), temperature and so on, `eos_token_id`, and `pad_token_id` for what stands behind an end.
            processors: further logits processors of transformers'.

        Returns:
            `[batch, tokens or fewer]`, int64.

        Raises:
            UsageError: a prompt does not fit the artifact, or is longer than a sliding window; or the configuration
                says what is not done here.
        """
        framed = frame(self._manifest, inputs, first=self._offset if isinstance(self._offset, int) else 0)
        said = framed.prompts
        if self._start is not None:
            framed.inputs.setdefault(DECODER, torch.full((len(said), 1), self._start))
            said = [*framed.inputs[DECODER].cpu()]
        check_prompts(self._manifest, framed.inputs)
        self._check_window(max(framed.extents), tokens)
        choosing = Choosing(said, config, processors, stop)
        groups, logits = self._begin(framed)
        made = [choosing.next(logits)]
        while len(made) < tokens and not choosing.ended:
            logits = torch.cat([self._advance(group, made[-1]) for group in groups])
            made.append(choosing.next(logits[_inverse(groups)]))
        return torch.stack(made, 1)

    def _check_window(self, longest: int, tokens: int) -> None:
        if self._window is not None and longest + tokens > self._window:
            raise UsageError(
                f"A prompt of {longest} tokens and {tokens} new ones are more than the sliding window of "
                f"{self._window}, and a step counts the window along the shortened cache, where the tokens that went "
                "leave no gaps. Use `positions: compact`, or generate no more tokens than the window has room for."
            )

    def _begin(self, framed: Framed) -> tuple[list[_Rows], Tensor]:
        """Prompts by their lengths, and the logits of the last token of each, `[batch, vocabulary]`."""
        outputs = {name: torch.from_numpy(a) for name, a in self.prefill.run(framed.inputs).items()}
        logits = outputs["logits"]
        # Behind an encoder the decoder's own tokens have logits, and none is padding.
        back = framed.back if self._start is None else [0] * len(framed.back)
        last = torch.tensor([logits.shape[1] - 1 - own for own in back])
        cache = past_of(self.decode, outputs)
        if any(framed.padding):
            _check_by_token(cache)
        batch = self.decode.input_specs["input_ids" if self._start is None else DECODER].shape[0]
        # Of the first layers, before any reducer inside the language model.
        longest = max((t.shape[2] for name, t in cache.items() if _by_token(name)), default=logits.shape[1])
        groups = []
        for rows in _together(framed.padding, alone=batch == 1):
            length = longest - framed.padding[rows[0]] if self._compact else framed.lengths[rows[0]]
            cut = {name: _cut(name, tensor, rows, framed) for name, tensor in cache.items()}
            encoded = None if self._start is None else _without_padding(outputs[_ENCODED], 1, rows, framed)
            groups.append(_Rows(rows, length, cut, encoded_inputs(self.decode, encoded)))
        return groups, logits[torch.arange(len(last)), last]

    def _advance(self, group: _Rows, made: Tensor) -> Tensor:
        """Logits behind one more token of each prompt of a group, `[rows, vocabulary]`."""
        step = step_inputs(self.decode, made[group.rows, None], group.position, self._offset, self._kinds)
        outputs = self.decode.run({**step, **group.encoded, **group.cache})
        group.cache, group.position = past_of(self.decode, next_cache(outputs)), group.position + 1
        return torch.from_numpy(outputs["logits"])[:, -1]


def _together(padding: Sequence[int], *, alone: bool) -> list[list[int]]:
    """Numbers of the prompts that have the same length; or each alone."""
    if alone:
        return [[row] for row in range(len(padding))]
    return [[row for row, own in enumerate(padding) if own == one] for one in sorted(set(padding))]


def _inverse(groups: Sequence[_Rows]) -> Tensor:
    """Where the row of each prompt is among those of all groups."""
    return torch.tensor([row for group in groups for row in group.rows]).argsort()


def _cut(name: str, tensor: Tensor, rows: Sequence[int], framed: Framed) -> Tensor:
    """What a cache holds of some prompts, without padding."""
    if not _by_token(name) or ".self_attention_cache." in name:  # of an encoder's decoder, which has no padding
        return tensor[rows] if tensor.dim() else tensor  # a number, such as the width of a window
    return _without_padding(tensor, 2, rows, framed)


def _without_padding(tensor: Tensor, dim: int, rows: Sequence[int], framed: Framed) -> Tensor:
    """Some prompts' entries for each token along a dimension (0 is the prompt), without padding."""
    kept = [torch.cat([torch.arange(tensor.shape[dim])[s] for s in framed.spans(r, tensor.shape[dim])]) for r in rows]
    return torch.stack([tensor[row].index_select(dim - 1, places) for row, places in zip(rows, kept, strict=True)])


def _by_token(name: str) -> bool:
    """Whether a part of a cache has an entry for every token, `[rows, heads, tokens, size]`."""
    return name.endswith((".keys", ".values"))


def _check_by_token(cache: Mapping[str, Tensor]) -> None:
    """Whether padding can be cut off a cache.

    Raises:
        UsageError: some of it is a state that the last tokens leave (short convolutions, linear attention).
    """
    others = [name for name, tensor in cache.items() if tensor.dim() and not _by_token(name)]
    if others:
        raise UsageError(
            f"The step of decoding reads {others[0]}, which is no entry for each token, and padding would be a part of "
            "it. Give prompts of the compiled length."
        )
