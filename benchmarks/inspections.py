"""`pumer-compile inspect` over every architecture of docs/architectures.md: an answer for each, and how long it takes.

    python -m benchmarks.inspections            # all of them, one after the other in one process
    python -m benchmarks.inspections BLIP LXMERT    # these only

Models are built as `benchmarks.architectures` builds them, without weights. Results are kept in
benchmarks/results/inspections.json; `cpu_seconds` are of capture and inspection together, in one thread.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/inspections.json"


def inspect_one(name: str) -> dict[str, Any]:
    """What `inspect` says of an architecture, and the time that takes."""
    from transformers.initialization import no_init_weights

    from benchmarks.architecture_models import ARCHITECTURES
    from pumer_compile import PumerError, capture
    from pumer_compile.inspection.inspect import inspect_program, short

    architecture = ARCHITECTURES[name]
    try:
        with no_init_weights():
            model, inputs = architecture.build()
    except ImportError as error:
        return {"not_built": str(error).strip().splitlines()[0][:200]}
    start, begun = time.process_time(), time.perf_counter()
    try:
        program = capture(model.eval(), inputs, outputs=list(architecture.outputs) or None)
        found = inspect_program(program).to_dict()
    except PumerError as error:
        return {"fits": False, "why_not": str(error), **_times(start, begun)}
    except Exception as error:  # a defect: it is counted
        traceback.print_exc()
        return {"traceback": f"{type(error).__name__}: {error}"[:400], **_times(start, begun)}
    suggestion = found["suggestion"]
    return {
        "fits": found["fits"],
        "why_not": found["why_not"],
        "streams": found["outline"]["streams"],
        "methods": [one["method"] for one in found["methods"] if one["schedule"]],
        "others": {one["method"]: short(one["reason"]) for one in found["methods"] if not one["schedule"]},
        "suggestion": suggestion and suggestion["schedule"],
        "ratio": suggestion and round(suggestion["plan"]["multiply_adds"]["ratio"], 4),
        "small": architecture.size.startswith("small"),
        **_times(start, begun),
    }


def _times(start: float, begun: float) -> dict[str, float]:
    return {
        "cpu_seconds": round(time.process_time() - start, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    """Inspect, and keep what was said."""
    import torch
    import transformers

    from benchmarks.architecture_models import ARCHITECTURES

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in sys.argv[1:] or ARCHITECTURES:
        kept[name] = inspect_one(name)
        said = kept[name].get("suggestion") or kept[name].get("why_not") or kept[name]
        print(name, kept[name].get("cpu_seconds"), str(said)[:150], flush=True)
        versions = {package: version(package).partition("+")[0] for package in ("transformers", "torch")}
        found = {"versions": versions, **{key: kept[key] for key in ARCHITECTURES if key in kept}}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        gc.collect()


if __name__ == "__main__":
    main()
