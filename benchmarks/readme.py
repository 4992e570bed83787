"""Write the figures of the README and of pages of docs/ from the results files, so that no number is typed by hand.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.graph_optimizations import gain
from benchmarks.mutation import table
from examples.easy_vqa.results import render_table

ROOT = Path(__file__).resolve().parents[1]


def planned() -> dict[str, dict[str, Any]]:
    """The plans that every page's ratios come from, by model and schedule."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks/results/plans.json").read_text(encoding="utf-8"))
    return {name: dict(plans) for name, plans in found["models"].items()}


def fewer(model: str, name: str) -> str:
    """How many times fewer multiply-adds a contender has, which names its schedule among other words."""
    plans = planned()[model]
    (ratio,) = [plan["multiply_adds"]["ratio"] for key, plan in plans.items() if key in name.split()] or [1.0]
    return f"{ratio:.2f}x"


def demo_fewer() -> str:
    """The demo's ratio, as its table has it."""
    rows = json.loads((ROOT / "examples/easy_vqa/results.json").read_text(encoding="utf-8"))["rows"]
    work = {(row["name"], row["strength"]): row["multiply_adds"] for row in rows}
    return f"{work['unreduced', None] / work['reduced, reference', 'paper']:.2f}x"


def plans() -> str:
    """Multiply-adds of the schedules that pages speak of."""
    lines = ["| Model | Schedule | Before | After | Fewer |", "| --- | --- | ---: | ---: | ---: |"]
    for model, found in planned().items():
        for schedule, plan in found.items():
            said = plan["multiply_adds"]
            counts = f"{said['before'] / 1e9:,.4g} G | {said['after'] / 1e9:,.4g} G"
            lines.append(f"| {model} | `{schedule}` | {counts} | {said['ratio']:.2f}x |")
    return "\n".join(lines) + "\n"


def gains() -> str:
    """The first page: one row for each kind of model."""
    lean_runs = json.loads((ROOT / "benchmarks/results/lean_cpu.json").read_text(encoding="utf-8"))["schedules"]
    faster = [f"{gain(runs, 'taken', 'none'):.2f}x" for runs in lean_runs["vilt-vqa"].values()]
    llava = json.loads((ROOT / "benchmarks/results/llava_cpu.json").read_text(encoding="utf-8"))
    whole, small = (sum(r["multiply_adds"].values()) for r in llava["plan"] if r["budget"] in (576, 64))
    times = {name: statistics.median(samples) for name, samples in llava["prefill"]["milliseconds"].items()}
    rows = json.loads((ROOT / "examples/easy_vqa/results.json").read_text(encoding="utf-8"))["rows"]
    right = {(r["name"], r["strength"]): sum(r["correct"]) / len(r["correct"]) / r["total"] for r in rows}
    control = right["unreduced, trained further by the same recipe (control)", None]
    whole_vilt = right["unreduced", None]
    tuned, as_it_is = right["reduced, reference, retrained", "paper"], right["reduced, safe", "paper"]
    answers = f"{whole_vilt:.1%} → {as_it_is:.1%}; trained {control:.1%} → {tuned:.1%}"
    (schedule, plan), *_ = planned()["Qwen2.5-VL-7B"].items()
    image, kept = _image(plan)
    speed = f"[{times['576'] / times['64']:.2f}x, cut to 2 language layers](docs/llava.md#what-it-saves)"
    table = [
        ("Kind", "Model", "Schedule", "Fewer multiply-adds", "Measured speed (2 CPU cores)", "Accuracy"),
        ("---", "---", "---", "---:", "---", "---"),
        (
            "fusion",
            "ViLT-B/32",
            "[`vilt-vqa`](docs/schedules.md)",
            fewer("ViLT-B/32", "vilt-vqa"),
            f"[{faster[0]}; batch 8 {faster[1]}](docs/graph-optimizations.md)",
            f"[small ViLT](docs/results.md#accuracy): {answers}",
        ),
        (
            "LLaVA",
            "LLaVA-1.5-7B",
            "[`vispruner`](docs/llava.md), 64 of 576",
            f"{whole / small:.2f}x",
            speed,
            "not measured",
        ),
        (
            "Qwen-VL",
            "Qwen2.5-VL-7B",
            f"[`{schedule.partition(',')[0]}`](docs/prompts.md), {kept} of {image}",
            f"{plan['multiply_adds']['ratio']:.2f}x",
            "not measured",
            "not measured",
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def _image(plan: dict[str, Any]) -> tuple[int, int]:
    (site,) = plan["sites"]
    ((name, before),) = [(n, c) for n, c in site["before"].items() if "image" in n]
    return before, site["after"][name]


def easy_vqa() -> str:
    """The accuracy table."""
    return render_table(json.loads((ROOT / "examples/easy_vqa/results.json").read_text(encoding="utf-8")))


def distillation() -> str:
    """With and without a teacher."""
    result = json.loads((ROOT / "examples/easy_vqa/distillation.json").read_text(encoding="utf-8"))
    lines = ["| Strength | Weight of the teacher's loss | Test accuracy |", "| --- | ---: | ---: |"]
    for row in result["rows"]:
        lines.append(f"| {row['strength']} | {row['weight']:g} | {row['correct'] / row['total']:.2%} |")
    return "\n".join(lines) + "\n"


def quantization() -> str:
    """int8 in every mode."""
    result = json.loads((ROOT / "examples/easy_vqa/quantization.json").read_text(encoding="utf-8"))
    lines = [
        "| Linear layers | Size | Test accuracy | Same answer | Largest error | Image chosen differently | Text |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        flips = {
            stream: ", ".join(f"{r['flip_rate']:.1%}" for name, r in row["reducers"].items() if name.endswith(stream))
            for stream in ("image", "text")
        }
        lines.append(
            f"| {'int8, ' + row['mode'] if row['mode'] else 'float32'} | {row['bytes'] / 1e6:.2f} MB | "
            f"{row['correct'] / row['total']:.2%} | {row['agree'] / row['total']:.2%} | {row['forced_error']:.1e} | "
            f"{flips['image']} | {flips['text']} |"
        )
    total, samples = result["rows"][0]["total"], result["rows"][0]["parity_samples"]
    calibration = result["calibration_samples"]
    lines += ["", f"{total:,} questions; choices and errors on {samples}; static is calibrated on {calibration}."]
    return "\n".join(lines) + "\n"


def performance() -> str:
    """Everybody's times side by side, and what goes with them."""
    result: dict[str, Any] = json.loads((ROOT / "benchmarks/results/performance_cpu.json").read_text(encoding="utf-8"))
    lines = []
    for work, batches in result["works"].items():
        for batch, measured in batches.items():
            lines += [*_beside(work, batch, measured), ""]
    for work, step in result["training"].items():
        least = statistics.median(step["bytes"]["none"])
        less = [
            f"{1 - statistics.median(v) / least:.0%} less with `{k}`" for k, v in step["bytes"].items() if k != "none"
        ]
        lines += [f"Memory of a training step of {work}, batch {step['batch']}, beyond weights, gradients and the "]
        lines[-1] += f"optimizer's state: {least / 1e6:.0f} MB; {', '.join(less)} (medians of 3)."
    machine = result["machine"]
    versions = machine["versions"]
    lines += [f"{machine['cores']} cores ({machine['cpu']}), torch {versions['torch']}, "]
    lines[-1] += f"onnxruntime {versions['onnxruntime']}, {result['text_length']} text tokens."
    return "\n".join(lines) + "\n"


def _beside(work: str, batch: str, measured: dict[str, Any]) -> list[str]:
    peak = statistics.median(measured["matrix_peak_multiply_adds_per_second"])
    rows = measured["contenders"]
    base = rows["onnx none"]
    lines = [
        f"{work}, batch {batch} (matrix peak {2 * peak / 1e9:.0f} GFLOP/s)",
        "",
        "| | Median ms (quartiles) | Speed-up | Fewer multiply-adds | Of the peak | Reducers | Compile and prove |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        low, median, high = statistics.quantiles(row["milliseconds"], n=4)
        ratio = statistics.median(base["milliseconds"]) / median
        seconds = f"{sum(row['stages'].values()):.0f} s" if "stages" in row else ""
        lines.append(
            f"| {name} | {median:.0f} ({low:.0f}–{high:.0f}) | {ratio:.2f}x | "
            f"{fewer(WORKS[work], name)} | {row['share_of_peak']:.0%} | "
            f"{format(row['reducers'], '.1%') if row.get('reducers') else ''} | {seconds} |"
        )
    return lines


def torch_compile() -> str:
    """Inductor unreduced against the backend `pumer`."""
    result = json.loads((ROOT / "benchmarks/results/torch_compile_cpu.json").read_text(encoding="utf-8"))
    lines = [
        "| Model | Batch | Unreduced, inductor: median ms (quartiles) | `pumer`: median ms (quartiles) | Speed-up | "
        "Fewer multiply-adds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, model in result["models"].items():
        for batch, measured in model["batches"].items():
            cells, medians = [], []
            for samples in measured["milliseconds"].values():
                low, median, high = statistics.quantiles(samples, n=4)
                cells.append(f"{median:.1f} ({low:.1f}–{high:.1f})")
                medians.append(median)
            ratio = demo_fewer() if name == "easy-vqa" else fewer("ViLT-B/32", "vilt-vqa")
            lines.append(f"| {name} | {batch} | {' | '.join(cells)} | {medians[0] / medians[1]:.2f}x | {ratio} |")
    return "\n".join(lines) + "\n"


def engines() -> str:
    """Build times of engines."""
    result = json.loads((ROOT / "benchmarks/results/engines.json").read_text(encoding="utf-8"))
    lines = [
        "| Model | Schedule | dtype | Batch | Whole command | Its builder | Peak memory | Engine |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        batch = ", ".join(profile.removeprefix("batch=") for profile in row["profiles"]) or "1"
        lines.append(
            f"| {row['model']} | `{row['schedule']}` | {row['dtype']} | {batch} | {row['seconds']:.0f} s | "
            f"{row['builder_seconds']:.1f} s | {row['peak_gib']:.1f} GiB | {row['mib']:.0f} MiB |"
        )
    machine = result["machine"]
    builder = result["rows"][0]["builder"]
    lines += ["", f"{builder}; {machine['cores']} cores ({machine['cpu']}). The demo is proved as well."]
    return "\n".join(lines) + "\n"


def lean() -> str:
    """What each pass gains."""
    result = json.loads((ROOT / "benchmarks/results/lean_cpu.json").read_text(encoding="utf-8"))
    lines, rounds = [], 0
    for schedule, batches in result["schedules"].items():
        heads = " | ".join(f"Batch {batch}: median ms (quartiles) | Times faster | Than unreduced" for batch in batches)
        lines += [f"| `{schedule}` | {heads} |", f"| --- |{' ---: | ---: | ---: |' * len(batches)}"]
        for name in next(iter(batches.values())):
            cells = []
            for samples in batches.values():
                low, median, high = statistics.quantiles(samples[name], n=4)
                ratios = [f"{gain(samples, name, base):.3f}" for base in ("reduced", "none")]
                cells.append(f"{median:.1f} ({low:.1f}–{high:.1f}) | {' | '.join(ratios)}")
                rounds = len(samples[name])
            lines.append(f"| {ROWS.get(name, f'`{name}`')} | {' | '.join(cells)} |")
        lines.append("")
    machine = result["machine"]
    versions = machine["versions"]
    lines += [f"{machine['cores']} cores ({machine['cpu']}), torch {versions['torch']}, onnxruntime "]
    lines[-1] += f"{versions['onnxruntime']}; {rounds} rounds, each with new sessions."
    return "\n".join(lines) + "\n"


def mutation() -> str:
    """Which mutants the proof refuses."""
    return table(json.loads((ROOT / "benchmarks/results/mutation.json").read_text(encoding="utf-8"))["rows"]) + "\n"


def order_flips() -> str:
    """What rounding changes, with tokens in the published order and in their old one."""
    result = json.loads((ROOT / "benchmarks/results/order_flips.json").read_text(encoding="utf-8"))
    rows = {(row["method"], row["order"], row["kind"]): row for row in result["rows"]}
    lines = ["| | Samples | Sets | Tokens | Accuracy |", "| --- | ---: | ---: | ---: | ---: |"]
    for method, order, kind in sorted(rows, key=lambda key: (key[0], key[2], key[1])):
        if kind != "float32":
            pair = [rows[method, order, kind], rows[method, order, "float32"]]
            shares = " | ".join(f"{pair[0][what]:.1%}" for what in ("samples", "sets", "tokens"))
            accuracy = ", float32 ".join(f"{row['correct'] / row['total']:.1%}" for row in pair)
            kind = kind if kind.startswith("float") else f"int8, {kind}"
            lines.append(f"| {method}, {kind}, {order} order | {shares} | {accuracy} |")
    return "\n".join(lines) + f"\n\n{result['questions']} questions.\n"


WORKS = {"vilt": "ViLT-B/32", "meter": "METER"}
ROWS = {
    "none": "unreduced",
    "reduced": "reduced, none of them",
    "taken": "reduced, as it is compiled",
    # What passes are called now; the results have the names of their day.
    "postpone": "`sink_projections`",
    "one_query": "`absorb_single_query`",
}


def fill(text: str, name: str, content: str) -> str:
    """`text` with the section `name` replaced by `content`."""
    pattern = re.compile(rf"(<!-- begin {name} .*?-->\n).*?(<!-- end {name} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    if count != 1:
        raise SystemExit(f"The section {name} must be there once; found {count}.")
    return filled


SECTIONS = {
    "README.md": (gains,),
    "docs/results.md": (plans, easy_vqa, distillation, quantization, performance, torch_compile),
    "docs/engines.md": (engines,),
    "docs/graph-optimizations.md": (lean,),
    "docs/proof.md": (mutation, order_flips),
}
"""What each page holds, between marks named after the functions."""


def filled(page: str) -> str:
    """A page as the results files say it should be."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for section in SECTIONS[page]:
        text = fill(text, section.__name__.replace("_", "-"), section())
    return text


if __name__ == "__main__":
    for page in SECTIONS:
        (ROOT / page).write_text(filled(page), encoding="utf-8")
