"""`torch.compile(model, backend="pumer")`: the passes on Dynamo's graph, then an inner backend.

PyTorch finds this backend by its entry point, so no import is needed. Dynamo calls it once for each graph; it lowers
the graph to what the passes read (`lowering.py`), runs them, and hands the reduced graph to the inner backend,
through which it also trains.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.registry import lookup_backend

from ..analysis.annotate import Annotation, annotate
from ..analysis.attention import choose
from ..errors import LocateError, PlanError, UsageError, VerifyError
from ..frontends import install_for_dynamo
from ..methods.proposing import at_depths
from ..passes.manager import State, run_passes
from ..passes.pipeline import ANALYSE, EXACT, EXACT_ALONE, REDUCE
from ..rewrite.rewriter import Rewriter
from ..schedule import Merge, Schedule, as_trained, trained_with
from . import dynamo
from .causal_mask import materialize_causal_mask
from .lowering import Cut, DynamoGraph, may_attend
from .padding import plan_padding, with_labels
from .prompts import (
    Compiled,
    PromptGraph,
    has_static_cache,
    has_tower,
    no_image,
    reduces_prompts,
    run_while_tracing,
    scatters,
)
from .unpadding import check_numbers, check_padding, output_cuts, padded_streams

log = logging.getLogger("pumer_compile")

INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Options:
    """`options` of `torch.compile`.

    Attributes:
        schedule: what to reduce: a path, the name of a preset, a mapping or a `Schedule`. Without one, the
            `pumer_schedule` of the model's configuration, or else `default_schedule`.
        semantics: of the schedule, in place of its own.
        inner: the backend that compiles the reduced graph, one of `INNER`.
        strict: whether a graph in which nothing is reduced is an error (True) or a warning.
        text_length: pad shorter texts to so many tokens, so that one compiled graph serves them all.
        streams: the token stream that an input starts, by its name, where the graph alone does not say.
    """

    schedule: Schedule | None = None
    semantics: str | None = None
    inner: str = "inductor"
    strict: bool = True
    text_length: int | None = None
    streams: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from what the user gave.

        Raises:
            UsageError: an unknown option, or a value that it cannot have.
            ScheduleError: not a valid schedule.
        """
        values = dict(given or {})
        known = [f.name for f in fields(cls)]
        unknown = [str(name) for name in values if name not in known]
        if unknown:
            raise UsageError(f"The backend pumer has no option {unknown[0]!r}. Its options: {', '.join(known)}.")
        if "schedule" in values:
            values["schedule"] = _schedule(values["schedule"], "options['schedule']", values.get("semantics"))
        elif values.get("semantics") is not None:
            raise UsageError("options['semantics'] goes with options['schedule'], and none was given.")
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        if self.inner not in INNER:
            raise UsageError(f"options['inner'] is {self.inner!r}; it must be one of {', '.join(INNER)}.")
        if not isinstance(self.strict, bool):
            raise UsageError(f"options['strict'] is {self.strict!r}; it must be True or False.")
        length = self.text_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise UsageError(f"options['text_length'] is {length!r}; it must be a number of tokens, at least 1.")
        if not isinstance(self.streams, Mapping):
            raise UsageError(f"options['streams'] is {self.streams!r}; it must map inputs to streams.")


def pumer(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend, as Dynamo calls it.

    Args:
        module: Dynamo's graph.
        inputs: one value for each of its placeholders.
        options: see `Options`.
        mode: of `torch.compile`, for inductor (torch.compile takes either a mode or options).

    Returns:
        A callable with the inputs and outputs of `module`.

    Raises:
        PumerError: see `Options.parse`, `DynamoGraph` and the passes; LocateError where nothing is reduced. Dynamo
            wraps it in a BackendCompilerFailed that shows its message.
    """
    chosen = Options.parse(options)
    settings = {}
    if mode is not None:
        from torch._inductor import list_mode_options

        settings["config_patches"] = list_mode_options(mode)
    inner = partial(lookup_backend(chosen.inner), **settings)
    configs = list(dynamo.model_configs(module.graph))
    schedule = trained_with(configs) if chosen.schedule is None else _as_trained(chosen.schedule, configs)
    if reduces_prompts(schedule):
        return _with_prompt(module, inputs, chosen, schedule, inner)
    graph = DynamoGraph(module, inputs)
    try:
        module = _reduced(graph, chosen, schedule, dynamo.function())
    except _NothingReduced as nothing:
        _refuse_or_warn(module, str(nothing), chosen)
    except VerifyError as error:
        # What the rest of a split model reads may be an output with one entry for each token.
        raise type(error)(" ".join(filter(None, (str(error), dynamo.break_after(module))))) from error
    else:
        _reducing(dynamo.callback())
        _warn_before_the_last_compile()
    compiled: Compiled = inner(module, list(inputs))
    return compiled


# --- one graph --------------------------------------------------------------------------------------------------


class _NothingReduced(Exception):
    """Why a graph has nothing to reduce."""


def _reduced(graph: DynamoGraph, options: Options, schedule: Schedule | None, where: str) -> fx.GraphModule:
    """The reduced graph, with the inputs of Dynamo's."""
    if not may_attend(graph.module):
        raise _NothingReduced("It has no attention.")
    if options.text_length is not None:
        configs = list(dynamo.model_configs(graph.module.graph))
        graph.padding = plan_padding(graph, options.text_length, _first(configs, "pad_token_id") or 0)
    if graph.padding is not None:
        check_numbers(graph)
    lowered, inputs = graph.lower()
    if graph.padding is not None:
        graph.padding = with_labels(graph.padding, lowered)
    if reduces_prompts(schedule):
        materialize_causal_mask(lowered, graph.mode)
    unknown = [name for name in options.streams if name not in inputs]
    if unknown:
        raise UsageError(f"options['streams'] names the input {unknown[0]!r}, but there are {', '.join(inputs)}.")
    state = State(lowered, schedule or default_schedule([0]), dict(inputs), dict(options.streams))
    with enable_python_dispatcher():  # which shapes with an open batch need
        if state.method.exact:
            return graph.restore(_lossless(state, where), cuts=_cuts(graph, state, lowered))
        _find_attentions(state)
        if schedule is None:
            state.method = _default(state)
        if not reduces_prompts(state.method):
            _check_sites(state)
        # Not COUNT: its multiply-adds would be for one batch size, and the batch may be open here.
        run_passes(state, REDUCE + EXACT)
    _say_counts(state, where)
    restored = lowered if state.method.outputs == "restored" else None
    return graph.restore(state.reduced, restored, _cuts(graph, state, lowered))


def _cuts(graph: DynamoGraph, state: State, lowered: fx.GraphModule) -> dict[int, list[Cut]]:
    """The padding of texts that outputs hold; a padded graph that reads it elsewhere is refused."""
    if graph.padding is None:
        return {}
    captured, annotation = state.captured, state.find(Annotation) or annotate(state.captured, state.streams)
    streams = padded_streams(captured, annotation, graph.padding)
    places = check_padding(graph, lowered)
    rewriter = state.find(Rewriter)
    table = rewriter.epochs if rewriter is not None else None
    restored = state.method.outputs == "restored"
    return output_cuts(graph, captured, annotation, table, streams, places, restored=restored)


def _lossless(state: State, where: str) -> fx.GraphModule:
    try:
        history = run_passes(state, EXACT_ALONE)
    except PlanError as error:
        raise _NothingReduced(str(error)) from error
    log.info("torch.compile: %d operators narrowed or left out in %s", history.records[0].matches, where)
    return state.reduced


def _find_attentions(state: State) -> None:
    try:
        run_passes(state, ANALYSE)
    except LocateError as error:
        raise _NothingReduced(str(error)) from error
    except VerifyError as error:
        annotation = state.find(Annotation)
        if annotation is None or annotation.streams:
            raise
        raise _NothingReduced("It has attention, but no text or image tokens were found in it.") from error


def _check_sites(state: State) -> None:
    """Some site of the schedule must be here; a schedule that is met in part is an error of the passes."""
    sites = state.method.addresses
    if not {attention.address for attention in state.attentions} & set(sites):
        try:
            choose(state.attentions, sites[0])
        except LocateError as error:
            raise _NothingReduced(str(error)) from error


def _say_counts(state: State, where: str) -> None:
    before = state.annotation.streams
    counts = {s: [before[s], *(step.after for step in steps)] for s, steps in state.rewriter.epochs.steps.items()}
    text = ", ".join(f"{stream} {' -> '.join(map(str, numbers))}" for stream, numbers in counts.items())
    log.info("torch.compile: %s tokens in %s", text, where)


def _reducing(callback: Any) -> None:
    """Remember that some graph of this torch.compile is reduced."""
    if callback is not None:
        callback._pumer_reduces = True


def _refuse_or_warn(module: fx.GraphModule, reason: str, options: Options) -> None:
    parts = ("Nothing is reduced in this graph,", f"{dynamo.function()}.", reason, dynamo.break_after(module))
    what = " ".join(filter(None, parts))
    # A loss or an optimizer step, say, compiled together with a model that is reduced.
    beside = getattr(dynamo.callback(), "_pumer_reduces", False) and not may_attend(module)
    if options.strict and not beside:
        raise LocateError(
            f"{what} If this is a part of a model, compile it with fullgraph=True, and Dynamo says what splits it. "
            "With options={'strict': False} such a graph is compiled as it is, with a warning."
        )
    log.warning("%s It is compiled as it is.", what)


def _warn_before_the_last_compile() -> None:
    if dynamo.recompiles_left() == 0:
        log.warning(
            "Dynamo compiles %s for the last time (torch._dynamo.config.recompile_limit): for the next new shape it "
            "runs the model uncompiled and unreduced. Pad texts to one length (options={'text_length': ...}), raise "
            "the limit, or compile with fullgraph=True, which makes it an error.",
            dynamo.function(),
        )


# --- prompts with images ----------------------------------------------------------------------------------------


def _with_prompt(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, schedule: Schedule | None, inner: Compiled
) -> Compiled:
    """A graph of a model whose prompts hold images, for a schedule that reduces those."""
    callback, where = dynamo.callback(), dynamo.function()
    if options.text_length is not None:
        raise UsageError(
            "options['text_length'] pads texts behind their last token, where a prompt goes on. Leave it out for "
            "schedules that reduce an image in a prompt."
        )
    if not any(map(has_tower, scatters(module))):
        if getattr(callback, "_pumer_reduces", False) and not scatters(module):
            log.info("torch.compile: no image comes into %s, which is compiled as it is", where)
        else:
            _refuse_or_warn(module, no_image(module), options)
        as_it_is: Compiled = inner(module, list(inputs))
        return as_it_is
    _check_prompt(module, where)

    def compile_form(graph: DynamoGraph) -> Compiled:
        try:
            reduced = _reduced(graph, options, schedule, where)
        except _NothingReduced as nothing:
            raise LocateError(f"Nothing is reduced in {where}. {nothing}") from nothing
        _reducing(callback)
        with graph.compiling():
            compiled: Compiled = inner(reduced, [a.value for a in graph.arguments])
        return compiled

    _warn_before_the_last_compile()
    return PromptGraph(module, compile_form, where, strict=options.strict)


def _check_prompt(module: fx.GraphModule, where: str) -> None:
    """What runs after the graph must find the reduced prompt there."""
    split = dynamo.break_after(module)
    if split:
        raise LocateError(
            f"An image is reduced in {where}, and what goes on behind it would count the whole prompt's tokens. "
            f"{split} Compile with fullgraph=True, and Dynamo says what to change."
        )
    if has_static_cache(module):
        raise UsageError(
            f"{where} copies keys and values to places of a static cache (index_copy_), which are counted over the "
            "whole prompt. Generate with a cache that grows (cache_implementation='dynamic', the default)."
        )


# --- schedules --------------------------------------------------------------------------------------------------

_said: set[str] = set()


def _schedule(given: Any, what: str, semantics: str | None) -> Schedule:
    if given is None or isinstance(given, bool | int | float):
        raise UsageError(f"{what} is {given!r}; it must be a file, a preset, a mapping or a Schedule.")
    return Schedule.load(given, semantics=semantics)


def _first(configs: Sequence[Any], name: str) -> Any:
    """The attribute of the outermost configuration that has it."""
    found = (getattr(config, name, None) for config in configs)
    return next((value for value in found if value is not None), None)


def _as_trained(schedule: Schedule, configs: Sequence[Any]) -> Schedule:
    """The semantics that the model was fine-tuned with, where the schedule names none; said once."""
    resolved = as_trained(schedule, configs)
    if resolved is not schedule:
        _say_once(
            f"The schedule names no semantics: taking {resolved.semantics}, which the model was fine-tuned with "
            "(pumer_schedule in its configuration)."
        )
    return resolved


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)


def default_schedule(layers: Sequence[int]) -> Schedule:
    """Budgets of the paper at the depths of its ViLT (layers 2, 5 and 8 of 12), for models not trained with reduction.

    Args:
        layers: cross-modal attention nodes at which the text can choose among image tokens, at least one.
    """
    return Schedule(semantics="safe", layers=tuple(at_depths(layers)), prune=0.1, merge=Merge(image=0.3, text=0.2))


def _default(state: State) -> Schedule:
    modality = state.annotation.modality
    by_text = (a for a in state.attentions if a.cross_modal and "text" in map(modality.get, a.query_axis.streams))
    layers = sorted({int(a.address.rpartition(".")[2]) for a in by_text})
    if not layers:
        raise _NothingReduced("No attention in it goes from text to image, which the default schedule is for.")
    schedule = default_schedule(layers)
    chosen = ", ".join(address.rpartition(".")[2] for address in schedule.addresses)
    message = (
        "No schedule was given, and the model's configuration has no pumer_schedule: taking semantics safe, prune "
        f"0.1, merge image 0.3 and text 0.2 at the cross-modal layers {chosen} "
        f"of {', '.join(map(str, layers))}."
    )
    _say_once(message)
    return schedule


# --- frontends --------------------------------------------------------------------------------------------------


def compiling() -> bool:
    """Whether the function that Dynamo is tracing is compiled with this backend."""
    return getattr(dynamo.callback(), "compiler_fn", None) is pumer


install_for_dynamo(torch.compiler.assume_constant_result(compiling))
run_while_tracing("transformers.utils.output_capturing.maybe_install_capturing_hooks")
