"""What the commands share: the application, errors as one paragraph, and what is going on."""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import typer
from rich.logging import RichHandler

from ..errors import PumerError, UsageError, exit_code_of
from .tables import console, status

EXAMPLES = """
Examples. Compile a fine-tuned model to a reduced ONNX model, proved against eager PyTorch before it is written:

    pumer-compile MODEL --schedule vilt-vqa -o model.onnx

Look at the token counts and the arithmetic first:

    pumer-compile plan MODEL --schedule schedule.yaml

Prove an artifact again, on your own inputs:

    pumer-compile parity model.onnx --model MODEL --inputs samples.npz

MODEL is a save_pretrained folder, a torch.export archive, a checkpoint, or the id of a model in the Hugging Face
Hub's local cache. SCHEDULE is a YAML file, `none`, or a preset: vilt-vqa, vilt-nlvr2, vilt-ve, vilt-irtr, meter-vqa,
meter-ve, meter-nlvr2, meter-irtr, meter-vqa-tower, meter-ve-tower, lossless.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 parity failed.
"""


def epilog(examples: str) -> str:
    """Paragraphs as typer keeps them apart."""
    return examples.replace("\n\n", "\n\n\n")


app = typer.Typer(
    name="pumer-compile",
    help="Make vision-language transformers cheap to serve: reduce tokens at compile time.",
    epilog=epilog(EXAMPLES),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)
log = logging.getLogger("pumer_compile")
LOG_LEVELS = ("debug", "info", "warning", "error")
# How many stages the commands have that take long: of these, and not of the time, is the share that is shown.
STAGES = {"compile_": 4, "plan_": 3, "parity_": 2}


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors become one paragraph and the documented exit code; `-v` adds the traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        # Errors go to the other console, in any case.
        console.quiet = bool(kwargs.get("quiet"))
        # Where JSON is asked for, nothing else is on standard output.
        console.stderr = bool(kwargs.get("as_json"))
        _clock.begin(STAGES.get(command.__name__, 0))
        try:
            _set_up_logging(verbose, kwargs.get("log_level"), quiet=console.quiet)
            if verbose and console.quiet:
                raise UsageError("--verbose and --quiet exclude each other; choose one.")
            command(*args, **kwargs)
        except PumerError as error:
            _fail(error, str(error), verbose)
        except MemoryError as error:
            _fail(error, "The machine ran out of memory. Try a smaller --batch.", verbose)
        except OSError as error:
            _fail(error, f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), verbose)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # A defect of ours: say so, without burying the user in a traceback that -v gives.
            text = " ".join(str(error).split())[:400]
            _fail(error, f"Unexpected {type(error).__name__}: {text} (run with -v for a traceback).", verbose)
        finally:
            console.quiet = console.stderr = False

    return run


def _fail(error: BaseException, message: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    say_error(message)
    raise typer.Exit(exit_code_of(error))


def say_error(message: str) -> None:
    """One paragraph on standard error."""
    status.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _set_up_logging(verbose: bool, level: str | None, *, quiet: bool) -> None:
    """Log lines go to standard error; where that is no terminal, each begins with the seconds since the start."""
    if level is not None and level not in LOG_LEVELS:
        raise UsageError(f"No log level {level!r}: choose {', '.join(LOG_LEVELS)}.")
    handler = RichHandler(console=status, show_path=False, show_time=False)
    if not status.is_terminal:
        handler.setFormatter(_Elapsed())
    log.handlers = [handler]
    usual = "info" if verbose else "error" if quiet else "warning"
    log.setLevel((level or usual).upper())
    log.propagate = False


class _Elapsed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"[{_clock.seconds:.1f} s] {super().format(record)}"


@dataclass
class _Clock:
    """How long a command has been running, and how many of its stages have begun."""

    began: float = field(default_factory=time.monotonic)
    stages: int = 0
    begun: int = 0

    def begin(self, stages: int) -> None:
        self.began, self.stages, self.begun = time.monotonic(), stages, 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def next(self) -> str:
        """What a line of progress begins with: the share of the stages that are done, and the time."""
        done, self.begun = self.begun, self.begun + 1
        share = f"{min(done / self.stages, 1):.0%}, " if self.stages else ""
        return f"[{share}{self.seconds:.1f} s]"


_clock = _Clock()


@contextmanager
def stage(text: str) -> Iterator[Callable[[str], None]]:
    """Say what is going on: a spinner on a terminal, which the yielded function adds to, a line elsewhere."""
    if console.quiet:
        yield lambda step: None
    elif status.is_terminal:
        with status.status(f"{text} ...") as spinner:
            yield lambda step: spinner.update(f"{text}: {step} ...")
    else:
        _progress(f"{_clock.next()} {text} ...")
        yield lambda step: _progress(f"[{_clock.seconds:.1f} s] {text}: {step} ...")


def _progress(line: str) -> None:
    status.print(line, markup=False, highlight=False, soft_wrap=True)
