"""From a model to a `Program`: its graph, as pre-decomposition ATen operators, with static token counts.

transformers' models go through transformers' own dynamo exporter (its patches and our frontends are installed
while it traces), any other `nn.Module` through `torch.export` directly, and an `ExportedProgram` is taken as
it is. The model object is left as it was found, also when the capture fails.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols
from transformers import PreTrainedModel
from transformers.exporters import utils as exporter_utils
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.utils import apply_patches, get_leaf_tensors

from .. import frontends  # importing it registers the rewrites that tracing needs
from ..added_inputs import AddedInput
from ..analysis.dead_code import draws_nothing
from ..analysis.nodes import describe, values
from ..analysis.outputs import drop_unasked, join_features, select_outputs
from ..errors import CaptureError, PumerError, UsageError
from ..frontends import gated_delta_rule
from ..frontends.rope_index import open_padding
from ..guards import Guard
from ..methods.lossless import Lossless
from ..passes.fold_masks import FoldedMasks
from ..passes.manager import History, State, run_passes
from ..passes.pipeline import UNPADDED
from ..shown.tables import Shown, Table
from .asked import guards_of
from .exported_inputs import check_exported_inputs, example_inputs, exported_inputs, fixed_inputs
from .fold import fold, fold_written
from .follow import FollowSample, following, forward_of
from .inputs import (
    check_inputs,
    constant_inputs,
    describe_inputs,
    differs,
    eager_outputs,
    explain_inputs,
    word_table,
)
from .loading import LoadedModel, first_line, quiet
from .model_state import restoring_model_state, set_for_inference
from .plain_graph import plain_graph_module, refuse_training, without_numbers


@dataclass(frozen=True, repr=False)
class Program(Shown):
    """A captured model.

    Attributes:
        module: the unlifted, pre-decomposition ATen graph. It is called with the model's inputs by keyword and returns
            the model's own output type; its parameters are the model's own `nn.Parameter` objects under their own
            names (a weight is never copied), so training it trains the model.
        inputs: the sample inputs it was captured with, by forward argument and in forward order, cast to the model's
            floating dtype and device; their batch is 2 where the batch is dynamic and the sample had a batch of 1.
        dynamic_batch: whether the batch size is open.
        model: what was captured; None where it is not at hand.
        streams: names of token streams, by the input that starts them.
        checkpoint_sha256: of the file that the model was read from.
        outputs: the names that were asked for; with any, the module returns a dictionary of them.
        fixed: inputs whose numbers the model looked at while it was traced (the sizes of images that are cut into
            crops): the graph is for these alone and does not read them.
        unpadded: those of them that are masks, of ones.
        constant: inputs that the model takes as well, and the value that, everywhere in them, is as good as leaving
            them out (token types of zeros).
        guards: what must be true of other inputs, where the trace followed the sample (`follow.py`).
        counted: masks over which positions were counted there (M-RoPE): padding takes none.
        added: inputs that the model does not take, and a method reads (`added.py`).
        history: what passes did at capture (`fold_masks`).
    """

    module: fx.GraphModule
    inputs: dict[str, Tensor]
    dynamic_batch: bool = False
    model: nn.Module | None = None
    streams: dict[str, str] = field(default_factory=dict)
    checkpoint_sha256: str | None = None
    outputs: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    unpadded: tuple[str, ...] = ()
    constant: dict[str, int] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    counted: tuple[str, ...] = ()
    added: Mapping[str, AddedInput] = field(default_factory=dict)
    history: History = field(default_factory=History)

    def tables(self) -> list[Table]:
        """See `Shown`: a row for each input."""
        name = type(self.model).__name__ if self.model is not None else "torch.export archive"
        batch = ", any batch" if self.dynamic_batch else ""
        rows = [
            (name, str(list(tensor.shape)), str(tensor.dtype).removeprefix("torch."), "fixed" * (name in self.fixed))
            for name, tensor in self.inputs.items()
        ]
        heading = f"Program of {name}: {len(self.module.graph.nodes)} nodes{batch}"
        return [Table(heading, ("input", "shape", "dtype", ""), rows)]


def capture(
    model: nn.Module | ExportedProgram | LoadedModel,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    dynamic_batch: bool = False,
    streams: Mapping[str, str] | None = None,
    outputs: Sequence[str] | None = None,
    padding: bool = True,
) -> Program:
    """Capture a model as a graph, in eval mode, with the shapes of sample inputs.

    Args:
        model: a module, a `torch.export` program, or what `load_model` read. It is left as it was found.
        inputs: tensors by forward argument, `[batch, ...]`, such as `input_ids` int64 `[batch, tokens]` and
            `pixel_values` `[batch, channels, height, width]` in any floating dtype. They may be left out for an
            `ExportedProgram` that holds its example inputs.
        dynamic_batch: keep dimension 0 symbolic for every input that has the batch there; all other sizes are fixed.
        streams: the token stream that an input starts (`{"input_ids": "text"}`), where the graph alone does not say.
        outputs: keep only these, by name (`["itm_score"]`).
        padding: False writes masks of ones into the graph, which then reads none: for inputs that are never padded.

    Returns:
        The graph, with the inputs that it was captured with.

    Raises:
        UsageError: inputs that do not fit the model, or names that it does not have.
        CaptureError: a model that cannot be traced.
    """
    sha256: str | None = None
    if isinstance(model, LoadedModel):
        sha256, model = model.sha256, model.source
    inputs = _apart(inputs) if isinstance(inputs, Mapping) else inputs
    if isinstance(model, ExportedProgram):
        program = _from_exported(model, inputs, dynamic_batch)
    else:
        if inputs is None:
            raise UsageError(
                f"No sample inputs were given for {type(model).__name__}. A capture fixes every token count, "
                "so it needs one tensor for each input of the model; make_inputs() makes random ones for a "
                "transformers model."
            )
        program = _from_module(model, inputs, dynamic_batch)
    unknown = [name for name in streams or {} if name not in program.inputs]
    if unknown:
        raise UsageError(
            f"streams names the input {unknown[0]!r}, but the captured inputs are {', '.join(program.inputs)}."
        )
    join_features(program.module)
    if outputs:
        select_outputs(program.module, outputs)
    else:
        drop_unasked(program.module)
    program = replace(program, streams=dict(streams or {}), checkpoint_sha256=sha256, outputs=tuple(outputs or ()))
    return program if padding else _without_padding(program)


def _apart(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor for each input: a trace takes one that is given twice (`labels=ids`) for one input."""
    apart: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        again = isinstance(tensor, Tensor) and any(tensor is other for other in apart.values())
        apart[name] = tensor.clone() if again else tensor
    return apart


def _without_padding(program: Program) -> Program:
    state = State(program.module, Lossless(), dict(program.inputs), dict(program.streams))
    history = run_passes(state, UNPADDED)
    masks = state.get(FoldedMasks).names
    return replace(program, module=state.captured, fixed=(*program.fixed, *masks), unpadded=masks, history=history)


# transformers' exporter looks at these before it traces; on the meta device there is nothing to see.
_READ_AS_NUMBERS = ("image_sizes",)


def _from_module(model: nn.Module, inputs: Mapping[str, Tensor], dynamic_batch: bool) -> Program:
    sample = check_inputs(model, inputs)
    sample |= {n: inputs[n] for n in _READ_AS_NUMBERS if n in sample and sample[n].is_meta}
    shapes = None
    if dynamic_batch:
        sample, shapes = symbolic_batch(sample)
    with restoring_model_state(model), quiet():
        set_for_inference(model)
        # On the meta device (a plan of a model too large to hold) integers are kept: ids say where an image stands in a
        # prompt, and a grid how large it is.
        kept = {n: inputs[n] if t.is_meta and not t.is_floating_point() else t for n, t in sample.items()}
        try:
            traced = _traced(model, sample, kept, shapes)
            refuse_training(traced.graph, "Make it follow self.training")
            with frontends.in_fixed_order():
                eager = eager_outputs(model, sample)
                _check_eager(model, sample, traced.graph, eager)
                constant = constant_inputs(model, sample, eager)
        except PumerError:
            raise
        except Exception as error:
            raise _failure(model, sample, dynamic_batch, error) from error
    return Program(
        traced.graph,
        kept,
        dynamic_batch,
        model,
        fixed=traced.fixed,
        constant=constant,
        guards=traced.guards,
        counted=traced.counted,
    )


def _check_eager(
    model: nn.Module, sample: Mapping[str, Tensor], graph: fx.GraphModule, eager: Mapping[str, Tensor]
) -> None:
    """A graph must give what the model gives, where that is known (not on the meta device) and nothing is drawn.

    Raises:
        CaptureError: it does not: the model does something else while it is traced (PaliGemma without token types has a
            causal mask then, and none in eager PyTorch; AIMv2 skips its causal mask where nothing is padded).
    """
    if not eager:
        return
    seeded = [n for n in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    if not all(map(draws_nothing, seeded)):
        return
    with torch.no_grad():
        found = differs(dict(get_leaf_tensors(graph(**sample))), eager)
    if found:
        raise CaptureError(
            f"{type(model).__name__} gives other {found} in eager PyTorch than while it is traced, for the inputs "
            f"{describe_inputs(sample)}. It makes something up for an input that is left out: give all that its "
            "processor makes (token_type_ids, masks). Or its attention skips a mask where that looks needless: load it "
            "with attn_implementation='eager' (in config.json as well), whose masks are always applied."
        )


class _Traced(NamedTuple):
    """A graph, the inputs that are written into it, and what is true of the others (`Program`)."""

    graph: fx.GraphModule
    fixed: tuple[str, ...]
    guards: tuple[Guard, ...] = ()
    counted: tuple[str, ...] = ()


def _traced(
    model: nn.Module, sample: dict[str, Tensor], kept: Mapping[str, Tensor], shapes: dict[str, Any] | None
) -> _Traced:
    """The graph of a model: as it is traced; and where it asks for data on the way, as the sample answers."""
    try:
        exported = _export(model, sample, shapes)
        graph = plain_graph_module(exported)
        if shapes is not None or not _sized_by_data(graph):
            fold_written(graph)
            return _Traced(graph, without_numbers(graph, fixed_inputs(exported), sample))
    except Exception as error:
        if isinstance(error, PumerError):
            raise
        if shapes is not None:  # no sample has the numbers of every batch
            _refuse_open_batch(model, sample, kept, error)
            raise
    return _followed(model, sample, kept)


def _followed(model: nn.Module, sample: dict[str, Tensor], kept: Mapping[str, Tensor]) -> _Traced:
    """The graph of a model that follows its sample.

    Raises:
        CaptureError: a size still depends on data, or what was asked could not be checked of other inputs.
    """
    exported, follow = _export_followed(model, sample, kept)
    graph = plain_graph_module(exported)
    content = frozenset(n for n, t in kept.items() if t.is_floating_point()) | follow.content
    asked, guards = guards_of(follow.asked, content, kept, type(model).__name__)
    fixed = fixed_inputs(exported)
    without_numbers(graph, fixed, sample)
    fold(graph, {n: kept[n] for n in asked if n not in fixed}, follow.lifted)
    open_ = _sized_by_data(graph)
    if open_:
        raise CaptureError(f"{describe(open_[0])} has a size that depends on data; a compiled graph has fixed sizes.")
    counted = tuple(sorted(follow.opened))
    return _Traced(graph, (*fixed, *(n for n in asked if n not in fixed)), guards, counted)


def _export_followed(
    model: nn.Module, sample: dict[str, Tensor], kept: Mapping[str, Tensor]
) -> tuple[ExportedProgram, FollowSample]:
    """The trace of a model that follows its sample, and what was asked."""
    try:
        return _traced_following(model, sample, kept, as_expanded=False)
    except GuardOnDataDependentSymNode:  # masks that are expanded to features are followed as a last resort
        return _traced_following(model, sample, kept, as_expanded=True)


def _traced_following(
    model: nn.Module, sample: dict[str, Tensor], kept: Mapping[str, Tensor], *, as_expanded: bool
) -> tuple[ExportedProgram, FollowSample]:
    follow = FollowSample(kept, word_table(model), as_expanded=as_expanded)
    with following(model, follow), open_padding(model, follow.keep_open):
        return _export(model, sample, None), follow


def _refuse_open_batch(
    model: nn.Module, sample: dict[str, Tensor], kept: Mapping[str, Tensor], error: Exception
) -> None:
    """Raise CaptureError if a trace with an open batch fails where the model asks its inputs for data."""
    follow = FollowSample(kept)
    with contextlib.suppress(Exception), following(model, follow), open_padding(model, follow.keep_open):
        _export(model, sample, None)
    if follow.asked:
        names = " and ".join(sorted(frozenset().union(*(question.made.inputs for question in follow.asked))))
        raise CaptureError(
            f"{type(model).__name__} looks at the numbers of {names} while it is traced (first at "
            f"{follow.asked[0].where}), and a graph with an open batch has none that hold for every batch. Capture "
            "with a fixed batch (without dynamic_batch, --dynamic-batch)."
        ) from error


def _sized_by_data(graph: fx.GraphModule) -> list[fx.Node]:
    """Nodes that give a number, or a value with a size, that only a run would tell."""
    return [
        node
        for node in graph.graph.nodes
        if node.target in _NUMBERS
        or any(isinstance(s, torch.SymInt) and free_unbacked_symbols(s) for value in values(node) for s in value.shape)
    ]


_NUMBERS = frozenset({torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default})


def _export(model: nn.Module, sample: dict[str, Tensor], shapes: dict[str, Any] | None) -> ExportedProgram:
    # With gradients: otherwise the graph does not say what the model itself computes without.
    with torch.inference_mode(False), torch.enable_grad(), _gradient_blocks(), gated_delta_rule.kept_whole():
        if isinstance(model, PreTrainedModel):
            with _inputs_as_given():
                exported = DynamoExporter().export(model, dict(sample), DynamoConfig(dynamic_shapes=shapes))
            # transformers 5.17 returns the program itself, later versions wrap it.
            program: ExportedProgram = exported if isinstance(exported, ExportedProgram) else exported.program
            return program
        # A plain module around a transformers model needs the patches of that model as well.
        wraps = any(isinstance(module, PreTrainedModel) for module in model.modules())
        with apply_patches("dynamo") if wraps else nullcontext(), _named_arguments(model, sample):
            return torch.export.export(model, args=(), kwargs=sample, dynamic_shapes=shapes, strict=False)


@contextmanager
def _gradient_blocks() -> Iterator[None]:
    """Let torch.export see what a forward computes without gradients: transformers' exporter switches them off for the
    whole trace, and `inference_mode` leaves nothing in a graph, where `no_grad` does."""
    export, mode = torch.export.export, torch.inference_mode

    def with_gradients(*args: Any, **kwargs: Any) -> ExportedProgram:
        with torch.enable_grad():
            return export(*args, **kwargs)

    def enter(self: Any) -> None:
        self._pumer_before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(not self.mode)

    def leave(self: Any, *_: Any) -> None:
        torch._C._set_grad_enabled(self._pumer_before)

    with (
        mock.patch.object(torch.export, "export", with_gradients),
        mock.patch.object(mode, "__enter__", enter),
        mock.patch.object(mode, "__exit__", leave),
    ):
        yield


@contextmanager
def _inputs_as_given() -> Iterator[None]:
    """Keep transformers' exporter from giving a model more inputs than its sample has: what it computes for the parts
    of a model (a vision encoder's `position_ids` from `target_sizes`) means something else to the whole."""
    compute = getattr(exporter_utils, "precompute_export_inputs", None)
    if compute is None:  # a version of transformers that does not
        yield
        return

    def without_more(model: nn.Module, inputs: dict[str, Any]) -> None:
        given = set(inputs)
        inputs.setdefault("position_ids", True)  # else it counts them, which on the meta device cannot be
        compute(model, inputs)
        for name in inputs.keys() - given:
            del inputs[name]

    with mock.patch.object(exporter_utils, "precompute_export_inputs", without_more):
        yield


@contextmanager
def _named_arguments(model: nn.Module, sample: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a forward that takes any keyword (an adapter, a wrapper) take the sample's by name: torch.export finds no
    dynamic shapes for `**kwargs`. `restoring_model_state` undoes it also where the block raises."""
    parameters = inspect.signature(model.forward).parameters
    if all(name in parameters for name in sample):
        yield
        return
    original = model.forward

    def forward(**kwargs: Any) -> Any:
        return original(**kwargs)

    with forward_of(model, forward, sample):
        yield


def symbolic_batch(sample: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The sample with a batch of at least 2 (torch.export specialises 0 and 1), and its dynamic shapes."""
    batched = batch_inputs(sample)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} if name in batched else None for name in sample}
    if any(sample[name].shape[0] == 1 for name in batched):
        sample = {name: torch.cat([t, t]) if name in batched else t for name, t in sample.items()}
    return sample, shapes


def batch_inputs(sample: Mapping[str, Tensor]) -> list[str]:
    """The inputs with the batch on dimension 0: those as long there as the token ids, or else as the first input."""
    tensors = {name: tensor for name, tensor in sample.items() if tensor.ndim > 0}
    if not tensors:
        return []
    batch = tensors.get("input_ids", next(iter(tensors.values()))).shape[0]
    return [name for name, tensor in tensors.items() if tensor.shape[0] == batch]


def _failure(model: nn.Module, sample: dict[str, Tensor], dynamic_batch: bool, error: Exception) -> PumerError:
    """The error for a failed trace: the inputs' fault where the model itself refuses them, else the trace's."""
    name, given, line = type(model).__name__, describe_inputs(sample), first_line(error)
    refusal = _refusal(model, sample)
    if refusal is not None:
        fault, said = explain_inputs(model, sample), f"{name} itself ends with {first_line(refusal)}"
        if fault or not any(tensor.is_meta for tensor in sample.values()):
            return UsageError(f"{name} does not take these inputs ({given}): {f'{fault}. ' if fault else ''}{said}.")
    remedy = (
        "Capture with a static batch, or find where the model reads the batch size as a number."
        if dynamic_batch
        else "If the inputs are right, the model needs a change that torch.export can trace, or a frontend."
    )
    return CaptureError(f"torch.export could not trace {name} with the inputs {given}: {line}{_where(error)}. {remedy}")


def _refusal(model: nn.Module, sample: Mapping[str, Tensor]) -> Exception | None:
    """What a model in eager PyTorch says of inputs that it does not take."""
    try:
        with torch.no_grad():
            model(**sample)
    except Exception as error:  # a model may raise anything
        return error
    return None


def _where(error: Exception) -> str:
    """The line of the model's code that a trace ended at."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name != "<lambda>"]
    own = [
        f for f in frames if not {"torch", "pumer_compile", "exporters", "contextlib.py"} & {*Path(f.filename).parts}
    ]
    return f", at {own[-1].filename}:{own[-1].lineno}" if own else ""


def _from_exported(exported: ExportedProgram, inputs: Mapping[str, Tensor] | None, dynamic_batch: bool) -> Program:
    expected = exported_inputs(exported)
    symbolic = any(t.ndim > 0 and not isinstance(t.shape[0], int) for t in expected.values())
    if dynamic_batch and not symbolic:
        raise UsageError(
            "A dynamic batch was asked for, but the torch.export archive has a fixed one "
            f"({describe_inputs(expected)}). Export it again with torch.export.Dim on dimension 0."
        )
    sample = check_exported_inputs(exported, example_inputs(exported) if inputs is None else inputs)
    if symbolic:
        sample = symbolic_batch(sample)[0]
    with quiet():
        module = plain_graph_module(exported)
        refuse_training(module, "Export it again after model.eval()")
        fixed = without_numbers(module, fixed_inputs(exported), sample)
        return Program(module, sample, symbolic, fixed=fixed)
