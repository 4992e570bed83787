"""How many of transformers' own test configurations of vision-language models are captured and reduced.

    python -m benchmarks.configurations --transformers DIR            # all that have no result yet
    python -m benchmarks.configurations --transformers DIR clip aria  # these anew

`DIR` is a checkout of transformers, whose tests build a small model of every architecture with inputs; none of it is
part of this repository. Each is captured, compared with eager PyTorch on two samples, reduced by several methods, and
run reduced on both, in a process of its own. Results are kept in benchmarks/results/configurations.json and counted in
docs/architectures.md (`python -m benchmarks.architectures --render`). What the numbers are held against is in the tests
of single families; here nothing but the capture is compared.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import inspect
import json
import os
import random
import signal
import sys
import types
import unittest
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/configurations.json"
SECONDS = 150
Result = dict[str, Any]
TEXT = {"input_ids", "decoder_input_ids"}
IMAGE = set(
    "pixel_values pixel_values_videos visual_feats visual_embeds image_embeds flattened_patches image_patches "
    "image_pixel_values image_features input_image_embeds high_res_pixel_values".split()
)
# The class that people use, where a test has several.
USED = ("ForConditionalGeneration", "ForVisionText2Text", "ForQuestionAnswering", "ForCausalLM", "ForImageAndText")
# Losses, and what is no tensor of a prefill.
LEFT_OUT = {"labels", "next_sentence_label", "obj_labels", "matched_label", "ans", "return_loss", "use_cache"}
# What transformers' tests import and do not need here.
STAND_INS = ("datasets", "librosa", "timeout_decorator", "pandas", "fetch_hub_objects_for_ci")
ENOUGH = 2
"""Methods that reduce a prompt, after which no others are tried."""
PROMPT_METHODS: Mapping[str, dict[str, Any]] = {
    "fastv": {"layer": 1},
    "vispruner": {"positions": "original"},
    "divprune": {"positions": "original"},
    "uniform": {"positions": "original"},
}


# --- transformers' tests ----------------------------------------------------------------------------------------------


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


@contextmanager
def _stand_ins() -> Any:
    for name in STAND_INS:
        sys.modules[name] = _StandIn(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    try:
        yield
    finally:
        for name in STAND_INS:
            sys.modules.pop(name, None)


def use_tests(checkout: Path) -> None:
    """Let `tests` be those of transformers."""
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        del sys.modules[name]
    sys.path[:0] = [str(checkout), str(checkout / "utils")]


def test_modules(checkout: Path) -> list[str]:
    """Those that speak of text and images: `clip`, and so on, by folder and file."""
    found = []
    for path in sorted(checkout.glob("tests/models/*/test_modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if any(name in text for name in IMAGE) and ("input_ids" in text or "seq_length" in text):
            found.append(".".join(path.relative_to(checkout).with_suffix("").parts))
    return found


def prepared(module: str) -> Iterable[tuple[str, Any, Any, dict[str, Any]]]:
    """The tests of a module with a model of text and image: name, class of the model, configuration, inputs."""
    import torch

    with _stand_ins():
        loaded = importlib.import_module(module)
    for name, kind in list(vars(loaded).items()):
        own = inspect.isclass(kind) and issubclass(kind, unittest.TestCase) and kind.__module__ == module
        if not own or not name.endswith("Test") or "Integration" in name:
            continue
        test = kind(next(m for m in dir(kind) if m.startswith("test_")))
        torch.manual_seed(0)
        random.seed(0)
        try:
            test.setUp()
            config, inputs = test.model_tester.prepare_config_and_inputs_for_common()
        except Exception as error:  # tests without a model; or of a library that is not here
            print(f"{name}: {type(error).__name__}: {error}"[:160], file=sys.stderr)
            continue
        classes = [c for c in getattr(test, "all_model_classes", ()) or () if _takes_both(c, inputs)]
        if classes:
            chosen = next((c for part in USED for c in classes if part in c.__name__), classes[-1])
            yield name, chosen, config, test._prepare_for_class(inputs, chosen)


def _takes_both(kind: Any, inputs: Mapping[str, Any]) -> bool:
    parameters = inspect.signature(kind.forward).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    taken = set(inputs) if any_name else set(inputs) & set(parameters)
    return bool(taken & TEXT and taken & IMAGE)


def built(kind: Any, config: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model, and its tensors: nothing is padded, an image is more than one token, and stands at one place in all
    prompts."""
    import torch

    torch.manual_seed(1)
    model = kind(config).eval()
    parameters = inspect.signature(kind.forward).parameters
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    tensors = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name not in LEFT_OUT and (any_name or name in parameters)
    }
    mask = tensors.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        tensors["attention_mask"] = torch.ones_like(mask)
    placeholder = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    ids = tensors.get("input_ids")
    if (
        placeholder is not None
        and ids is not None
        and not bool(((ids == placeholder) == (ids[0] == placeholder)).all())
    ):
        # Drawn at random, so that a placeholder is among the words of one prompt and not of another.
        tensors["input_ids"] = ids[:1].repeat(len(ids), 1)
    return model, _larger(tensors, placeholder)


def _larger(tensors: dict[str, Any], placeholder: int | None, side: int = 8) -> dict[str, Any]:
    """Images of `side` x `side` packed patches where each is one token of the prompt: there is nothing to reduce."""
    import torch

    grid, ids, pixels = (tensors.get(name) for name in ("image_grid_thw", "input_ids", "pixel_values"))
    if grid is None or ids is None or pixels is None or pixels.dim() != 2 or placeholder is None:
        return tensors
    images = (ids == placeholder).sum(1)
    if not bool((images == 1).all()) or len(grid) != len(ids) or not bool((grid == grid[0]).all()):
        return tensors
    times = side * side // int(grid[0, 1] * grid[0, 2])
    where = (ids == placeholder).int().argmax(1)

    def longer(value: Any) -> Any:
        rows = [
            torch.cat([row[:at], row[at : at + 1].repeat(times), row[at + 1 :]])
            for row, at in zip(value, where.tolist(), strict=True)
        ]
        return torch.stack(rows)

    by_token = {n: longer(t) for n, t in tensors.items() if t.shape == ids.shape and not t.is_floating_point()}
    grids = torch.tensor([[int(grid[0, 0]), side, side]]).repeat(len(grid), 1)
    more = torch.rand(len(pixels) * times, pixels.shape[1])
    return {**tensors, **by_token, "image_grid_thw": grids, "pixel_values": more}


# --- one of them ------------------------------------------------------------------------------------------------------


def described(error: BaseException) -> Result:
    """An error, and whether it is one of ours that is meant."""
    from pumer_compile import PumerError

    text = " ".join(str(error).split())
    meant = isinstance(error, PumerError) and "met something it does not know" not in text
    return {"class": type(error).__name__, "meant": meant, "text": text[:600]}


def other_pixels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A second sample: all that goes by floating point is another, but for boxes and masks."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def other(name: str, value: Any) -> Any:
        fixed = not value.is_floating_point() or any(part in name for part in ("mask", "box", "pos"))
        return value if fixed else torch.rand(value.shape, generator=generator).to(value.dtype)

    return {name: other(name, value) for name, value in inputs.items()}


def examine(kind: Any, config: Any, inputs: Mapping[str, Any]) -> Result:
    """Capture, compare, reduce."""
    import torch

    import pumer_compile as pumer
    from pumer_compile.capture.inputs import differs

    def tensors(output: Any) -> dict[str, Any]:
        from transformers.exporters.utils import get_leaf_tensors

        return dict(get_leaf_tensors(output))

    result: Result = {"class": kind.__name__}
    try:
        model, given = built(kind, config, inputs)
        with torch.no_grad():
            model(**given)
    except Exception as error:
        return {**result, "not_built": described(error)}
    try:
        program = pumer.capture(model, given)
    except Exception as error:
        return {**result, "refused": described(error)}
    samples = [given, other_pixels(given)]
    with torch.no_grad():
        found = [differs(tensors(program.module(**s)), tensors(model(**s))) for s in samples]
    result["differs"] = next(filter(None, found), "")
    result["methods"] = dict(reductions(program, samples))
    return result


def reductions(program: Any, samples: list[dict[str, Any]]) -> Iterable[tuple[str, Result]]:
    """By methods: the tokens of the image before and after, or the error."""
    rows = rows_of(program)
    if rows is not None:
        done = 0
        for name, keys in PROMPT_METHODS.items():
            budgets = [max(1, rows // 2), 1] if rows > 1 else [1]
            found = first([{"method": name, "budget": budget, **keys} for budget in budgets], program, samples)
            yield name, found
            done += reduces(found)
            if done == ENOUGH:
                return
        return
    informed, tower, words = sites_of(program)
    if not informed and not tower and not words:
        yield "fastv", attempt({"method": "fastv", "budget": 2, "layer": 1}, program, samples)
    if informed:
        tries = [{"sites": [{"at": at, "prune": 1}], "outputs": "reduced"} for at in informed]
        yield "pumer", first(tries, program, samples)
    if tower:
        merge = {"image": 1}
        tries = [{"method": "tome", "sites": [{"at": at, "merge": merge}], "outputs": "reduced"} for at in tower]
        yield "tome", first(tries, program, samples)
    elif words and not informed:
        tries = [{"method": "tome", "sites": [{"at": at, "merge": {"text": 1}}], "outputs": "reduced"} for at in words]
        yield "tome", first(tries, program, samples)


def rows_of(program: Any) -> int | None:
    """Tokens of the smallest image in a prompt, 2 where they are not found; None where there is no prompt."""
    import torch

    from pumer_compile.analysis.prompts import lower_masked_scatter

    scatters = [n for n in program.module.graph.nodes if n.target is torch.ops.aten.masked_scatter.default]
    try:
        prompt = lower_masked_scatter(program.module, program.inputs, "layers", votes=False)
    except Exception:  # the methods say what
        return 2
    if prompt is None:
        return 2 if scatters else None
    return min(len(crop) for mark in prompt.marks for crop in mark.crops)


def sites_of(program: Any) -> tuple[list[str], list[str], list[str]]:
    """Attention from text to image, among image tokens of a tower, and among text tokens of one: the first three of
    each, as the exact passes leave them."""
    import pumer_compile as pumer
    from pumer_compile.reduce import Analysed

    reads_no_prompt = pumer.Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 1}}])
    try:
        found = Analysed(program).state(reads_no_prompt)
    except Exception:  # the methods say what
        return [], [], []

    def modalities(axis: Any) -> set[str]:
        return {found.annotation.modality[stream] for stream in axis.streams}

    attentions = found.attentions
    informed = [
        a.address for a in attentions if "text" in modalities(a.query_axis) and "image" in modalities(a.key_axis)
    ]
    vision, text = (
        [a.address for a in attentions if a.address.startswith(f"{group}.")] for group in ("vision", "text")
    )
    return tuple(list(dict.fromkeys(sites))[:3] for sites in (informed, vision, text))  # type: ignore[return-value]


def first(schedules: list[dict[str, Any]], program: Any, samples: list[dict[str, Any]]) -> Result:
    """The first schedule that reduces; or one that keeps every token, or what is said of the first."""
    found: list[Result] = []
    for keys in schedules:
        found.append(attempt(keys, program, samples))
        if reduces(found[-1]):
            return found[-1]
    return next((result for result in found if "error" not in result), found[0])


def reduces(result: Result) -> bool:
    """Whether a schedule leaves fewer tokens: an image, or a tile, of one token has none to lose."""
    return "error" not in result and sum(result["after"].values()) < sum(result["before"].values())


def attempt(keys: dict[str, Any], program: Any, samples: list[dict[str, Any]]) -> Result:
    """Reduce, and run that in eager PyTorch."""
    import torch

    import pumer_compile as pumer

    try:
        reduced = pumer.reduce(program, pumer.Schedule(**keys))
        with torch.no_grad():
            for sample in samples:
                reduced.module(**sample)
    except Exception as error:
        return {"error": described(error)}
    before: dict[str, int] = {}
    after: dict[str, int] = {}
    for site in reduced.plan.sites:
        before = {**site.before, **before}
        after |= site.after
    return {"before": before, "after": after}


# --- all of them ------------------------------------------------------------------------------------------------------


def kept() -> dict[str, Result]:
    """The results there are."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def in_a_process(do: Callable[[], Result]) -> Result:
    """What a function gives in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            json.dump(do(), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if text:
        return json.loads(text)  # type: ignore[no-any-return]
    return {"refused": {"class": "Ended", "meant": False, "text": f"Its process ended, within {SECONDS} seconds."}}


def main() -> None:
    """Examine, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "names", nargs="*", help="folders of transformers' tests; all without a result if none is named"
    )
    parser.add_argument("--transformers", type=Path, required=True, metavar="DIR", help="a checkout")
    options = parser.parse_args()
    use_tests(options.transformers)
    import transformers

    transformers.logging.set_verbosity_error()
    import torch

    torch.set_num_threads(1)
    results = kept()
    for module in test_modules(options.transformers):
        folder = module.split(".")[2]
        if options.names and folder not in options.names:
            continue
        try:
            found = list(prepared(module))
        except ImportError as error:
            print(f"{folder}: {error}"[:160], file=sys.stderr)
            continue
        for name, kind, config, inputs in found:
            key = f"{folder}.{name}"
            if key in results and not options.names:
                continue
            results[key] = in_a_process(lambda kind=kind, config=config, inputs=inputs: examine(kind, config, inputs))
            print(key, summary(results[key]), flush=True)
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


def summary(result: Result) -> str:
    """In a line."""
    for what in ("not_built", "refused"):
        if what in result:
            return f"{what}: {result[what]['class']}: {result[what]['text'][-150:]}"
    marks = {True: "", False: "!!"}
    said = [
        f"{name}={'ok' if 'error' not in r else marks[r['error']['meant']] + r['error']['class']}"
        for name, r in result["methods"].items()
    ]
    return " ".join([f"DIFFERS {result['differs']}" if result["differs"] else "captured", *said])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
