"""Run the command line in forks of a process that has already imported it, and kill them.

One JSON object a line on standard input: `arguments`, and optionally

- `warm`: run here, without a fork; what it imports and caches, the forks have;
- `external`: weights beside the graph;
- `signal`: what to kill with, SIGKILL unless given;
- `after`: kill after so many seconds, or
- `at`: when this function of `pumer_compile.exporters.onnx` is called, or
- `replace` and `folder`: right after so many files were renamed into this folder.

One a line comes back: `code` (negative: the signal that killed it) and `seconds`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

import onnxruntime  # noqa: F401
import torch
from transformers import ViltForQuestionAnswering  # noqa: F401

import pumer_compile.exporters.onnx
from pumer_compile.cli.commands import main


def child(job: dict[str, Any]) -> None:
    """The command, in a fork."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if job.get("external"):
        pumer_compile.exporters.onnx.INLINE_WEIGHTS_LIMIT = 0
    number = job.get("signal", signal.SIGKILL)
    if "at" in job:
        setattr(pumer_compile.exporters.onnx, job["at"], lambda *args, **options: os.kill(os.getpid(), number))
    if "replace" in job:
        left, replace = job["replace"], os.replace

        def counted(source: Any, target: Any) -> None:
            nonlocal left
            replace(source, target)
            left -= os.path.dirname(target) == job["folder"]
            if left == 0:
                os.kill(os.getpid(), number)

        os.replace = counted
    try:
        main(job["arguments"])
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        os._exit(99)
    os._exit(0)


def serve() -> None:
    """Take jobs until the input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.monotonic()
        if job.get("warm"):
            with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
                main(job["arguments"])
            print("{}", flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(job)
        if "after" in job:
            time.sleep(max(0.0, job["after"] - (time.monotonic() - start)))
            os.kill(pid, job.get("signal", signal.SIGKILL))
        _, status = os.waitpid(pid, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
