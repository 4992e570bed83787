"""What the commands share: the application, errors as one paragraph, and what is going on."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)
log = logging.getLogger("pumer_compile")


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors become one paragraph and the documented exit code; `-v` adds the traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        verbose = bool(kwargs.get("verbose"))
        # Errors go to the other console, in any case.
        console.quiet = bool(kwargs.get("quiet"))
        _set_up_logging(verbose, quiet=console.quiet)
        try:
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

    return run


def _fail(error: BaseException, message: str, verbose: bool) -> None:
    if verbose:
        traceback.print_exception(error)
    say_error(message)
    raise typer.Exit(exit_code_of(error))


def say_error(message: str) -> None:
    """One paragraph on standard error."""
    status.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def _set_up_logging(verbose: bool, *, quiet: bool) -> None:
    log.handlers = [RichHandler(console=status, show_path=False, show_time=False)]
    log.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    log.propagate = False


@contextmanager
def stage(text: str) -> Iterator[Callable[[str], None]]:
    """Say what is going on: a spinner on a terminal, which the yielded function adds to, a line elsewhere."""
    if console.quiet:
        yield lambda step: None
    elif status.is_terminal:
        with status.status(f"{text} ...") as spinner:
            yield lambda step: spinner.update(f"{text}: {step} ...")
    else:
        status.print(f"{text} ...", markup=False, highlight=False, soft_wrap=True)
        yield lambda step: None
