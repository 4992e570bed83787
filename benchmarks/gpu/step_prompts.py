"""Step 2: LLaVA-1.5-7B and Qwen2.5-VL-7B with random weights in bfloat16: the first token, and every further one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

import pumer_compile as pumer
from pumer_compile.schedule import Schedule

from .harness import Bench, Row, forget, fresh_cache, measure, reason_of
from .models import Inputs, PromptModel, llava, made_on, prompts_of, qwen2_5_vl

SHARES = (0.5, 0.25, 0.11)
FASTV_LAYER = 2  # as its paper has it


def schedules(model: PromptModel, *, tiny: bool) -> list[tuple[str, int, Schedule]]:
    """Method, image tokens that stay, and schedule; a budget of all methods before the next one."""
    found = []
    for share in SHARES[1:2] if tiny else SHARES:
        budget = round(model.rows * share)
        placed: dict[str, Any] = {"budget": budget, "positions": model.positions}
        found.append(("vispruner", budget, Schedule(method="vispruner", **placed)))
        found.append(("divprune", budget, Schedule(method="divprune", **placed)))
        layer = 1 if tiny else FASTV_LAYER
        found.append(("fastv", budget, Schedule(method="fastv", budget=budget, layer=layer)))
    return found


def run(bench: Bench) -> None:
    """A batch of one for both models, then of eight; the unreduced prefill first, which the others are set beside."""
    logging.getLogger("pumer_compile").setLevel(logging.ERROR)
    tiny, device = bench.settings.tiny, bench.settings.device
    some = bench.settings.some
    for batch in some((1, 2) if tiny else (1, 8)):
        for model in some((llava(tiny=tiny), qwen2_5_vl(tiny=tiny))):
            case = {"model": model.name, "batch": batch}
            if bench.seconds_left <= 0:
                bench.add(case, reason="not begun: the step's time was up")
                continue
            try:
                _one(model, made_on(model, device, torch.bfloat16), batch, bench)
            except Exception as error:
                bench.add(case, reason=reason_of(error))
            forget(device)


def _one(model: PromptModel, made: Any, batch: int, bench: Bench) -> None:
    inputs = prompts_of(model, made, batch)
    case: Row = {"model": model.name, "batch": batch, "prompt": inputs["input_ids"].shape[1]}
    start = time.perf_counter()
    program = pumer.capture(made, inputs)
    captured = time.perf_counter() - start
    whole: Row = {}

    def unreduced() -> Row:
        whole.update(_prefill_and_step(made, program.module, inputs, bench), capture_seconds=captured)
        return whole

    bench.attempt({**case, "method": "none", "image_tokens": model.rows, "share": 1.0}, unreduced)
    for method, budget, schedule in bench.settings.some(schedules(model, tiny=bench.settings.tiny)):

        def reduced(schedule: Schedule = schedule) -> Row:
            start = time.perf_counter()
            done = pumer.reduce(program, schedule)
            seconds = time.perf_counter() - start
            row = _prefill_and_step(made, done.module, inputs, bench)
            more = {"reduce_seconds": seconds, "fewer_multiply_adds": done.plan.ratio}
            if "median_ms" in whole:
                more["speed_up"] = whole["median_ms"] / row["median_ms"]
            return {**more, **row}

        share = budget / model.rows
        bench.attempt({**case, "method": method, "image_tokens": budget, "share": share}, reduced)


def _prefill_and_step(made: Any, module: Any, inputs: Inputs, bench: Bench) -> Row:
    """Time to the first token, then of one more on the cache that it leaves."""
    with torch.inference_mode():
        first = measure({"first_token": lambda: module(**inputs)}, bench)["first_token"]
        output = module(**inputs)
        if not output.logits.isfinite().all():
            raise ValueError("The logits are not finite.")
        try:
            further = measure({"token": decoding_step(made, output, inputs)}, bench)["token"]
        except Exception as error:
            further = {"reason": reason_of(error)}
    lengths = sorted({layer.keys.shape[-2] for layer in output.past_key_values.layers})
    return {**first, "token": further, "cache_tokens": lengths}


def decoding_step(made: Any, output: Any, inputs: Inputs) -> Callable[[], Any]:
    """The model's own forward on one new token and the cache of a prefill, which it leaves as it was."""
    batch, length = inputs["input_ids"].shape
    device = inputs["input_ids"].device
    ids = output.logits[:, -1].argmax(-1, keepdim=True)
    shape = (3, batch, 1) if "image_grid_thw" in inputs else (batch, 1)
    positions = torch.full(shape, length, device=device)

    def step() -> Any:
        cache = fresh_cache(output.past_key_values)
        return made(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True).logits

    return step
