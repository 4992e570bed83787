"""optuna's study: new, or one that is stored, in a journal file or a database, where several machines may share it."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    import optuna

NAME = "pumer-compile"
MISSING = "searching needs optuna: pip install 'pumer-compile[search]'"


def check_installed() -> None:
    """Whether optuna is there, in a version that knows constraints of trials, and matplotlib.

    Raises:
        UsageError: it is not.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError(f"{MISSING[0].upper()}{MISSING[1:]}.") from error
    if find_spec("matplotlib") is None:
        raise UsageError("The picture of a search needs matplotlib: pip install 'pumer-compile[search]'.")
    if not hasattr(optuna.trial.Trial, "set_constraint"):
        raise UsageError(f"optuna {optuna.__version__} is too old; {MISSING}.")


def open_study(storage: str | None, *, resume: bool, sampler: str, seed: int) -> optuna.Study:
    """A study of two objectives, both made small: multiply-adds, and what is lost.

    Args:
        storage: a journal file, or the URL of a database; None: this process's memory.
        resume: whether there must be one; else there must be none.
        sampler: `tpe` or `random`.
        seed: of the sampler; of a study that is resumed, what was drawn before is not drawn again.

    Raises:
        UsageError: optuna is missing; the storage cannot be opened, or holds a study or none, against what was said.
    """
    check_installed()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if resume and storage is None:
        raise UsageError("--resume goes on with a study that is stored: say where with --storage.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate sampling is called experimental
        where = _storage(storage)
        there = _names(where, storage) if where is not None else []
        if there and not resume:
            raise UsageError(
                f"{storage} holds a search already, of {_count(where)} trials. Go on with it by --resume, or name "
                "another --storage."
            )
        if resume and not there:
            raise UsageError(f"{storage} holds no search to resume. Leave out --resume to begin one there.")
        # A second process draws others.
        seed += _count(where) if there else 0
        chosen: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=10)
        )
        return optuna.create_study(
            storage=where,
            study_name=NAME,
            sampler=chosen,
            directions=["minimize", "minimize"],
            load_if_exists=True,
        )


def _storage(text: str | None) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if text is None:
        return None
    try:
        if "://" in text:
            return optuna.storages.get_storage(text)
        if not Path(text).absolute().parent.is_dir():
            raise UsageError(f"--storage {text!r}: its folder does not exist. Create it.")
        return optuna.storages.JournalStorage(JournalFileBackend(text))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--storage {text!r} cannot be opened: {type(error).__name__}: {_line(error)}. Give a journal file, or the "
            "URL of a database such as sqlite:///search.db."
        ) from error


def _names(storage: Any, text: str | None) -> list[str]:
    try:
        return [study.study_name for study in storage.get_all_studies()]
    except Exception as error:
        raise UsageError(
            f"--storage {text!r} is no study of optuna's: {type(error).__name__}: {_line(error)}."
        ) from error


def _count(storage: Any) -> int:
    studies = storage.get_all_studies()
    return len(storage.get_all_trials(studies[0]._study_id, deepcopy=False)) if studies else 0


def check_same(stored: dict[str, Any], asked: dict[str, Any], storage: str | None) -> None:
    """A stored search must be of this model, these samples and this measure.

    Raises:
        UsageError: it is of others.
    """
    what = {
        "model": "another model",
        "samples": "other samples",
        "measure": "another measure",
        "space": "other methods",
    }
    for key, words in what.items():
        if stored.get(key) != asked[key]:
            raise UsageError(
                f"{storage} holds a search of {words}: {stored.get(key)} there, {asked[key]} here. Name another "
                "--storage, or the files that it was begun with."
            )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
