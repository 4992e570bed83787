"""Which vision-language architectures can be reduced, where, and what that saves: docs/architectures.md.

    python -m benchmarks.architectures            # compile all of them anew (about half an hour) and write the page
    python -m benchmarks.architectures BLIP LXMERT    # these only, and write the page
    python -m benchmarks.architectures --render       # write the page from the results there are

Every model is built at its published size with memory for its weights that nothing ever writes to, captured, reduced
and counted in a process of its own. Nothing is computed: whether the numbers are right is for the tests named in the
page. Results are kept in benchmarks/results/architectures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import configurations

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/architectures.json"
PAGE = ROOT / "docs/architectures.md"
SHIPPED = ROOT / "pumer_compile/inspection/architectures.json"
SECONDS = 600
# Where the paper reduces ViLT's twelve layers (2, 5 and 8), and by how much.
DEPTHS = (1 / 6, 5 / 12, 2 / 3)
PRUNE, MERGE_IMAGE, MERGE_TEXT = 0.1, 0.3, 0.2
Result = dict[str, Any]


def blank(name: str) -> Result:
    """What is known of a model before it is built."""
    from benchmarks.architecture_models import ARCHITECTURES

    architecture = ARCHITECTURES[name]
    versions = {package: version(package).partition("+")[0] for package in ("transformers", "torch")}
    return {"name": name, "size": architecture.size, "proof": architecture.proof, "versions": versions}


# --- compiling one --------------------------------------------------------------------------------------------------


def compile_one(name: str) -> Result:
    """Build, capture, locate, reduce; how far it came and what it found."""
    import transformers
    from transformers.initialization import no_init_weights

    from benchmarks.architecture_models import ARCHITECTURES
    from pumer_compile import Schedule, capture
    from pumer_compile.reduce import Analysed

    transformers.logging.set_verbosity_error()
    architecture, start = ARCHITECTURES[name], time.perf_counter()
    result = blank(name)
    try:
        with no_init_weights():
            model, inputs = architecture.build()
        result["class"] = type(
            getattr(model, "model", model) if "benchmarks" in type(model).__module__ else model
        ).__name__
        result["parameters"] = sum(p.numel() for p in model.parameters())
        program = capture(model.eval(), inputs, outputs=list(architecture.outputs) or None)
        # Of a method that reads no prompt: attention as the exact passes before it leave it.
        found = Analysed(program).state(Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 1}}]))
        annotation, attentions = found.annotation, found.attentions
        result["streams"] = dict(annotation.streams)
    except Exception as error:  # whatever a model does: the page says what
        return {**result, "error": describe(error)}
    result["sites"] = [
        {"site": a.address, "module": a.module, "queries": str(a.query_axis), "keys": str(a.key_axis)}
        for a in attentions
        if a.call == 0
    ]
    result |= reduce_somehow(program, annotation, attentions)
    result["seconds"] = round(time.perf_counter() - start, 1)
    result["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    return result


def reduce_somehow(program: Any, annotation: Any, attentions: list[Any]) -> Result:
    """Reduce before a prompt where the image has a place in one, by the text where it asks the image in attention, else
    merge in the vision tower; in that of the text where the image has no tokens."""
    from pumer_compile.analysis.prompts import lower_masked_scatter

    try:
        prompt = lower_masked_scatter(program.module, program.inputs)
    except Exception as error:  # as above
        return in_the_language_model(program) or {"error": describe(error)}
    if prompt is not None:
        found = before_the_prompt(program, min(len(crop) for mark in prompt.marks for crop in mark.crops))
        if "error" not in found:
            return found
        return in_the_language_model(program) or merged_in_the_tower(program, attentions) or found

    def modalities(axis: Any) -> set[str]:
        return {annotation.modality[stream] for stream in axis.streams}

    informed = [
        a.address for a in attentions if "text" in modalities(a.query_axis) and "image" in modalities(a.key_axis)
    ]
    vision = tower_sites(attentions)
    if informed:
        both = {"prune": PRUNE, "merge": {"image": MERGE_IMAGE, "text": MERGE_TEXT}}
        image = {"prune": PRUNE, "merge": {"image": MERGE_IMAGE}}
        attempts = [("text and image", "safe", both), ("image only", "safe", image)]
        chosen, extra = spread(informed), [("reference", both), ("paper", both)]
    elif vision:
        attempts = [("vision tower", "tome", {"merge": {"image": MERGE_IMAGE}})]
        chosen, extra = spread(vision), []
    elif words := [a.address for a in attentions if a.address.startswith("text.")]:
        attempts = [("text tower", "tome", {"merge": {"text": MERGE_TEXT}})]
        chosen, extra = spread(words), []
    else:
        nothing = {"error": "No attention from text to image, and none among image tokens, could be followed."}
        return in_the_language_model(program) or nothing
    refusals: dict[str, str] = {}
    for what, semantics, budgets in attempts:
        found = attempt(program, chosen, semantics, budgets)
        if "error" not in found:
            if what == "text and image":
                outcomes = {s: attempt(program, chosen, s, b) for s, b in extra}
                refusals = {s: o["error"] for s, o in outcomes.items() if "error" in o}
                found["semantics"] = ["safe", *(s for s in outcomes if s not in refusals)]
            return {**found, "what": what, "refusals": refusals}
        refusals[what] = found["error"]
    return {"error": refusals[attempts[-1][0]], "refusals": refusals, "informed": bool(informed)}


def in_the_language_model(program: Any) -> Result:
    """Keep a ninth of the image tokens behind the first language layer; nothing where that fails too."""
    from pumer_compile import Schedule, reduce
    from pumer_compile.analysis.prompts import lower_masked_scatter
    from pumer_compile.analysis.read_images import mark_read_images

    try:
        prompt = lower_masked_scatter(program.module, program.inputs, "layers", votes=False)
        prompt = prompt or mark_read_images(program.module, "layers", votes=False)
        if prompt is None:
            return {}
        tokens = min(sum(map(len, mark.crops)) for mark in prompt.marks)
        plan = reduce(program, Schedule(method="fastv", layer=1, budget=max(1, tokens // 9))).plan
    except Exception:  # what the method before it says is told
        return {}
    return of_plan(plan, "language model")


def merged_in_the_tower(program: Any, attentions: list[Any]) -> Result:
    """Merge in the vision tower where the image cannot be reduced before the prompt; nothing where that fails too."""
    sites = spread(tower_sites(attentions))
    if not sites:
        return {}
    found = attempt(program, sites, "tome", {"merge": {"image": MERGE_IMAGE}})
    return {} if "error" in found else {**found, "what": "vision tower", "refusals": {}}


def tower_sites(attentions: list[Any]) -> list[str]:
    """Attention among image tokens in layers like the first of them: a decoder behind the tower is none of it."""
    vision = [a for a in attentions if a.address.startswith("vision.")]
    return [a.address for a in vision if re.sub(r"\d+", "*", a.module) == re.sub(r"\d+", "*", vision[0].module)]


def before_the_prompt(program: Any, tokens: int) -> Result:
    """Keep a ninth of the image tokens (64 of LLaVA's 576) by visual cues; `tokens` are those of a crop."""
    from pumer_compile import Schedule, reduce

    try:
        plan = reduce(program, Schedule(method="vispruner", budget=max(1, tokens // 9), positions="original")).plan
    except Exception as error:  # as above
        return {"error": describe(error)}
    return of_plan(plan, "prompt")


def of_plan(plan: Any, what: str) -> Result:
    """Where a method of the prompt reduces, and what that saves."""
    return {
        "what": what,
        "refusals": {},
        "reduced_at": [site.site for site in plan.sites],
        "tokens": [plan.sites[0].before, *(site.after for site in plan.sites)],
        "multiply_adds": [plan.multiply_adds_before, plan.multiply_adds_after],
    }


def spread(sites: list[str]) -> list[str]:
    """Three of the sites, at the paper's depths."""
    unique = list(dict.fromkeys(sites))
    return [unique[i] for i in sorted({int(len(unique) * depth) for depth in DEPTHS})]


def attempt(program: Any, sites: list[str], semantics: str, budgets: dict[str, Any]) -> Result:
    """Reduce; the plan, or the error."""
    from pumer_compile import Schedule, reduce

    how = {"method": "tome"} if semantics == "tome" else {"semantics": semantics}
    try:
        schedule = Schedule(sites=[{"at": site, **budgets} for site in sites], outputs="reduced", **how)
        plan = reduce(program, schedule).plan
    except Exception as error:  # as above
        return {"error": describe(error)}
    return {
        "reduced_at": sites,
        "tokens": [plan.sites[0].before, *(site.after for site in plan.sites)],
        "multiply_adds": [plan.multiply_adds_before, plan.multiply_adds_after],
    }


def describe(error: Exception) -> str:
    """An error without its places in files; those that are not ours with their type."""
    from pumer_compile import PumerError

    text = re.sub(r",? at /\S+?(?=[),\s])|/\S+\.cpp:\d+: ", "", " ".join(str(error).split()))
    return text if isinstance(error, PumerError) else f"{type(error).__name__}: {text}"


def run_one(name: str) -> Result:
    """`compile_one` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--one", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {**blank(name), "error": f"It took more than {SECONDS} seconds."}
    if done.returncode:
        return {**blank(name), "error": f"Its process ended with {done.returncode}: {done.stderr.strip()[-300:]}"}
    found: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# --- the page -------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Architectures

Written by `python -m benchmarks.architectures` with transformers {transformers} and torch {torch}; nothing here is
typed by hand. Models have their published sizes unless a row says "small configuration"; no weights are needed, and
none were read. *Multiply-adds* are of the whole graph, for one sample. *Held against* names the tests that compare a
small model of the architecture, number by number, with another implementation; a row without one is compiled and its
shapes are verified, no more.
"""

INFORMED = """\
## Reduced by the text

Attention from text to image decides which image tokens stay. Three sites at 1/6, 5/12 and 2/3 of the depth (the
paper's layers 2, 5 and 8 of twelve), each pruning 10% of the image tokens and merging 30% of them and 20% of the
text, semantics `safe`. What comes before the first site, such as an image tower, stays as it is; below 1x the
reducers cost more than they save. "Image only" is `merge: {text: 0}`, where the text is causal or has no keys to
merge by; a causal decoder then lets later words choose which image tokens earlier ones see.
"""

TOWERS = """\
## Reduced in the vision tower

Text and image meet in a product, or only past the tower, so no attention tells what the text asks for. `method: tome`,
merging 30% of the image tokens at the same depths of the tower. A text-informed schedule is refused.
"""

WORDS = """\
## Reduced in the text tower

The image goes through convolutions, whose positions are no tokens. `method: tome`, merging 20% of the text.
"""

PROMPTS = """\
## Reduced before the prompt

Image features stand in the place of words of a language model. `method: vispruner` keeps a ninth of them by visual cues
(64 of LLaVA's 576), decided in the attention named.
"""

LAYERS = """\
## Reduced in the language model

No attention of a tower tells their image tokens apart, or text reads the image by cross-attention. `method: fastv`
keeps a ninth of them behind the first language layer.
"""

CONFIGURATIONS = """\
## transformers' own test configurations

The small models that transformers' tests build of every architecture that takes text and images, with the inputs that
they build (`python -m benchmarks.configurations`; without padding, and with images of 8 x 8 patches where theirs are
one token). Captured means that the graph gives what eager PyTorch gives, on two samples. Reduced means that the method
compiles and runs; what it gives is held against the models' own modules for the families named in
[prompts.md](prompts.md) and above.
"""

REFUSED = """\
## Not reduced

What the compiler says of each, shortened.
"""

SITES = """\
## Where the sites are

Attention over tokens by group, as a schedule names it (`cross_modal.0`, `vision.3`): how many, and the modules. `*` is
the number of a layer.
"""


def render(results: list[Result]) -> str:
    """The page."""
    done = [r for r in results if "multiply_adds" in r]
    informed = [r for r in done if r["what"] not in ("vision tower", "text tower", "prompt", "language model")]
    layers = [r for r in done if r["what"] == "language model"]
    prompts = [r for r in done if r["what"] == "prompt"]
    towers = [r for r in done if r["what"] == "vision tower"]
    words = [r for r in done if r["what"] == "text tower"]
    refused = [r for r in results if "error" in r]
    parts = [
        INTRODUCTION.format(**{package: used(results, package) for package in ("transformers", "torch")}),
        INFORMED,
        table(("Model", "Size", "Reduced", "At", "Image tokens", "Text tokens", *SAVED), map(informed_row, informed)),
        *notes(informed),
        TOWERS,
        table(("Model", "Size", "At", "Image tokens", *SAVED), map(tower_row, towers)),
        WORDS,
        table(("Model", "Size", "At", "Text tokens", *SAVED), (tower_row(r, "text") for r in words)),
        PROMPTS,
        table(("Model", "Size", "At", "Image tokens", *SAVED), map(tower_row, prompts)),
        LAYERS,
        table(("Model", "Size", "At", "Image tokens", *SAVED), map(tower_row, layers)),
        REFUSED,
        table(("Model", "Size", "Why"), ((title(r), r.get("size", ""), short(r["error"])) for r in refused)),
        SITES,
        table(("Model", "Cross-modal", "Vision", "Text"), map(sites_row, [r for r in results if r.get("sites")])),
        CONFIGURATIONS,
        *counted(configurations.kept()),
    ]
    return "\n".join(parts)


def shipped(result: Result) -> Result:
    """What `pumer-compile list models` shows."""
    done = "multiply_adds" in result
    return {
        "name": result["name"],
        "class": result.get("class", ""),
        "size": result.get("size", ""),
        "reduced": result["what"] if done else "",
        "ratio": round(result["multiply_adds"][0] / result["multiply_adds"][1], 4) if done else 0,
        "refused": short(result["error"]) if "error" in result else "",
    }


def used(results: list[Result], package: str) -> str:
    """The versions of a package that the results come from."""
    return " and ".join(sorted({r["versions"][package] for r in results}))


SAVED = ("Multiply-adds", "Ratio", "Held against")


def table(head: tuple[str, ...], rows: Any) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def title(result: Result) -> str:
    """The model's name and class."""
    return f"{result['name']} (`{result['class']}`)" if "class" in result else str(result["name"])


def informed_row(result: Result) -> tuple[str, ...]:
    """A model that its text reduces."""
    return (
        title(result),
        result["size"],
        result["what"],
        ", ".join(f"`{site}`" for site in result["reduced_at"]),
        counts(result, "image"),
        counts(result, "text"),
        *saved(result),
    )


def tower_row(result: Result, modality: str = "image") -> tuple[str, ...]:
    """A model one tower of which is reduced."""
    at = ", ".join(f"`{site}`" for site in result["reduced_at"])
    return title(result), result["size"], at, counts(result, modality), *saved(result)


def saved(result: Result) -> tuple[str, ...]:
    """What a reduction saves, and who says that it is right."""
    before, after = result["multiply_adds"]
    proof = f"[`{result['proof']}`](../{result['proof']})" if result["proof"] else ""
    return f"{before / 1e9:.2f} G → {after / 1e9:.2f} G", f"{before / after:.2f}x", proof


def counts(result: Result, modality: str) -> str:
    """Tokens of the streams of a modality from site to site."""
    names = [name for name in result["tokens"][0] if modality in name.split("_")]
    lines = [" → ".join(str(step[name]) for step in result["tokens"] if name in step) for name in names]
    return "; ".join(lines)


def notes(results: list[Result]) -> list[str]:
    """What the other semantics refuse."""
    lines = [
        f"- {r['name']}, `{semantics}`: {short(reason)}"
        for r in results
        for semantics, reason in r["refusals"].items()
        if semantics in ("reference", "paper")
    ]
    return ["Other semantics do the same, but for these:\n\n" + "\n".join(lines) + "\n"] if lines else []


def short(message: str) -> str:
    """The first sentence, without the remedy, fit for a table."""
    text = re.sub(r" \(node [^()]*\)", "", message)
    text = re.sub(r"could not trace \S+ with the inputs .*?: (?=\w+(Error|SymNode): )", "could not trace it: ", text)
    text = re.sub(r"does not take these inputs \(.*?\):.* Tracing ended with", "could not be traced:", text)
    text = re.split(r"(?<=[a-z0-9\])`])[.;] ", text)[0].rstrip(".")
    return (text if len(text) <= 260 else text[:257].rsplit(" ", 1)[0] + " ...").replace("|", "\\|")


def sites_row(result: Result) -> tuple[str, ...]:
    """The attention of a model."""
    groups: dict[str, dict[str, int]] = {"cross_modal": {}, "vision": {}, "text": {}}
    for site in result["sites"]:
        patterns = groups.setdefault(site["site"].partition(".")[0], {})
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site["module"]) or "(the model itself)"
        patterns[pattern] = patterns.get(pattern, 0) + 1
    cells = ("<br>".join(f"{n} × `{p}`" for p, n in groups[g].items()) for g in ("cross_modal", "vision", "text"))
    return str(result["name"]), *cells


def counted(found: dict[str, Result]) -> list[str]:
    """How many of transformers' test configurations are captured, and by how many methods they are reduced."""
    if not found:
        return []
    built = {name: r for name, r in found.items() if "not_built" not in r}
    captured = {name: r for name, r in built.items() if "refused" not in r and not r["differs"]}
    prompts = {name: r for name, r in captured.items() if "vispruner" in r["methods"]}
    times = {n: sum(map(configurations.reduces, r["methods"].values())) for n, r in prompts.items()}
    single = [n for n, r in prompts.items() if not times[n] and any("after" in m for m in r["methods"].values())]
    reduced = [number for name, number in times.items() if name not in single]
    others = [any(map(configurations.reduces, r["methods"].values())) for n, r in captured.items() if n not in prompts]
    errors = [r["refused"] for r in built.values() if "refused" in r]
    errors += [m["error"] for r in captured.values() for m in r["methods"].values() if "error" in m]
    kinds = {name.partition(".")[0] for name in built}
    said = [
        f"- {len(captured)} of {len(built)} are captured ({len(kinds)} model types). {len(found) - len(built)} more "
        "need a library that was not there, or were refused by the model itself.",
        f"- {len(prompts)} of these have the image in a prompt; in {len(single)} it is one token, and there is nothing "
        f"to reduce. Of the other {len(reduced)}, {sum(n >= 2 for n in reduced)} are reduced by two methods or more, "
        f"{sum(n == 1 for n in reduced)} by one, {sum(n == 0 for n in reduced)} by none.",
        f"- {sum(others)} of the other {len(others)} are reduced by `pumer` or `tome`.",
        f"- {sum(not e['meant'] for e in errors)} of the {len(errors)} refusals are errors that nobody meant.",
    ]
    rows = [configuration_row(name, r) for name, r in found.items()]
    return ["\n".join(said) + "\n", table(("Configuration", "Captured", "Reduced by", "Refused"), rows)]


def configuration_row(name: str, result: Result) -> tuple[str, ...]:
    """A test configuration."""
    title = f"{name.partition('.')[0]} (`{result['class']}`)" if "class" in result else name
    for what in ("not_built", "refused"):
        if what in result:
            return title, "not built" if what == "not_built" else "no", "", short(result[what]["text"])
    if result["differs"]:
        return title, f"other {result['differs']} than in eager PyTorch", "", ""
    methods = result["methods"]
    done = ", ".join(f"`{name}`" for name, method in methods.items() if configurations.reduces(method))
    by_reason: dict[str, list[str]] = {}
    for name, method in methods.items():
        if "error" in method:
            by_reason.setdefault(short(method["error"]["text"]), []).append(f"`{name}`")
    refused = "<br>".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
    return title, "yes", done, refused


def kept() -> list[Result]:
    """The results there are."""
    found: list[Result] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    return found


# --- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Compile, keep, render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all of them if none is named")
    parser.add_argument("--render", action="store_true", help="only write the page")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_one(options.names[0])))
        return
    from benchmarks.architecture_models import ARCHITECTURES

    unknown = [name for name in options.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"no model named {unknown[0]!r}; there are {', '.join(ARCHITECTURES)}")
    results = {r["name"]: r for r in kept()}
    for name in [] if options.render else options.names or ARCHITECTURES:
        results[name] = run_one(name)
        outcome = short(results[name]["error"]) if "error" in results[name] else saved(results[name])[1]
        print(f"{name}: {outcome} ({results[name].get('seconds')} s, {results[name].get('peak_gib')} GiB)", flush=True)
        ordered = [results[name] for name in ARCHITECTURES if name in results]
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    found = [results[name] for name in ARCHITECTURES if name in results]
    PAGE.write_text(render(found), encoding="utf-8")
    SHIPPED.write_text(json.dumps(list(map(shipped, found)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
