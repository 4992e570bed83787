"""From a path to a model, told apart by content and never by suffix.

Nothing in a model file is executed: checkpoints are read with `torch.load(weights_only=True)`, torch.export
archives only after `archive.refuse_unsafe` found nothing in them that would be, and custom code named by a
config is refused. `allow_pickle=True` is the user's word that the file may run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export import _trace as export_trace
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from ..errors import CaptureError, PumerError, UsageError
from ..files import sha256_file
from ..frontends import MODELS
from . import archive

log = logging.getLogger("pumer_compile")

SMALL = 1 << 16
_ACCEPTED = (
    "a save_pretrained folder, a torch.export archive, a checkpoint holding {'config', 'state_dict'}, or "
    "a state dict (torch.save or safetensors) with --config"
)


@dataclass(frozen=True)
class LoadedModel:
    """A model from disk: either `model` or, for a torch.export archive, `exported`.

    `kind` says what the path turned out to be: `folder`, `archive`, `checkpoint`, `state_dict` or `pickle`.
    `sha256` is the hash of the one file, or of the names and hashes of all files where there are several
    (weights and config).
    """

    path: Path
    kind: str
    sha256: str
    model: nn.Module | None = None
    exported: ExportedProgram | None = None

    @property
    def source(self) -> nn.Module | ExportedProgram:
        """Whichever of the two it holds."""
        source = self.exported if self.model is None else self.model
        assert source is not None
        return source


def load_model(
    path: str | Path, *, config: str | Path | None = None, allow_pickle: bool = False, weights: bool = True
) -> LoadedModel:
    """Load the model at `path`; `config` is a config.json, or a folder with one, for weights that come without.

    A `path` that is not there may be the id of a model in the local cache of the Hugging Face Hub. Without `weights`
    those of a folder are not read, and need not be there: parameters are zero.
    Raises UsageError for a path or option that does not fit, CaptureError for content that cannot be loaded.
    """
    path = Path(path)
    if not path.exists():
        path = _cached(path)
    with quiet():
        if path.is_dir():
            if config is not None:
                raise UsageError(
                    f"--config goes with a bare state dict, but {path} is a folder with its own config.json."
                )
            return _load_folder(path) if weights else _without_weights(path)
        try:
            return _load_file(path, None if config is None else Path(config), allow_pickle)
        except PermissionError as error:
            raise UsageError(f"The model {path} cannot be read: permission denied.") from error


def _cached(path: Path) -> Path:
    """The folder of a model of the Hugging Face Hub in its local cache; nothing is downloaded.

    Raises:
        UsageError: not there, or no id of a model.
    """
    name = path.as_posix()
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UsageError(f"The model {path} does not exist. Expected {_ACCEPTED}.")
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"There is no path {path}, and no model {name} in the local cache of the Hugging Face Hub. If it is the id "
            f"of a model there, download it first (hf download {name}); else expected is {_ACCEPTED}."
        ) from error


# --- Folders ------------------------------------------------------------------------------------------------


def _load_folder(path: Path) -> LoadedModel:
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"The folder {path} has no config.json, so it is not a save_pretrained folder; it holds {found}. "
            "Save the model with model.save_pretrained(folder), or give the model file itself."
        )
    weights = _weight_files(path)
    values = _read_config(path)
    model_class = _architecture(values, path)
    refused = _drop_attention(values)
    # Without a config from_pretrained reads its own.
    given = {"config": _config_of(model_class, values)} if refused else {}
    try:
        loaded = _from_pretrained(model_class, path, local_files_only=True, **given)
        if loaded[1]["missing_keys"]:
            loaded = _unwrapped(loaded, _read_weights(weights), path)
    except PumerError:
        raise
    except Exception as error:
        raise _unreadable(path, error, weights) from error
    model = _complete(loaded, path)
    _say_attention(refused, model, path)
    return LoadedModel(path, "folder", _sha256([path / "config.json", *weights]), model)


def _without_weights(path: Path) -> LoadedModel:
    """The model of a folder's config. Its parameters are memory that nothing writes to, but for small ones: what was in
    memory before could be no number."""
    values = _read_config(path)
    model_class = _architecture(values, path)
    _drop_attention(values)
    try:
        with no_init_weights():
            model = model_class(_config_of(model_class, values))
    except Exception as error:
        raise CaptureError(f"The model of {path / 'config.json'} cannot be built: {first_line(error)}.") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < SMALL:
                parameter.zero_()
    return LoadedModel(path, "folder", _sha256([path / "config.json"]), model.eval())


def _from_pretrained(model_class: type[PreTrainedModel], *args: Any, **options: Any) -> Any:
    """A model, and what was found of its weights. Mismatched shapes are let through here and named in `_complete`."""
    return model_class.from_pretrained(*args, output_loading_info=True, ignore_mismatched_sizes=True, **options)


def _config_of(model_class: type[PreTrainedModel], values: Mapping[str, Any]) -> PreTrainedConfig:
    assert model_class.config_class is not None  # only PreTrainedModel itself has none
    config: PreTrainedConfig = model_class.config_class.from_dict(dict(values))
    return config


def _weight_files(path: Path) -> list[Path]:
    """The files that from_pretrained will read, in its order of preference; all of them must be there and not empty."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = path / f"{stem}.{suffix}", path / f"{stem}.{suffix}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (path / shard).is_file()]
            if missing:
                raise CaptureError(f"The folder {path} lacks the weights {missing[0]}, which {index.name} names.")
            return [index, *(path / shard for shard in shards)]
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
    raise CaptureError(
        f"The folder {path} has a config.json but no weights: neither model.safetensors (or its index) nor "
        f"pytorch_model.bin; it holds {found}. Save the model again with model.save_pretrained(folder)."
    )


def _read_weights(files: list[Path]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".safetensors":
            found |= load_safetensors(file)
        elif file.suffix != ".json":
            found |= torch.load(file, map_location="cpu", weights_only=True)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CaptureError(f"{path} is not valid JSON: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise CaptureError(f"{path} must hold a JSON object; found {type(content).__name__}.")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    """The config at `path`: a JSON file, or a folder with a config.json."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"The config {file} does not exist. Give a config.json, or a folder that has one.")
    return _read_json(file)


def _architecture(config: Mapping[str, Any], source: Path) -> type[PreTrainedModel]:
    """The class that `config["architectures"]` names: one of transformers, or one that transformers lacks."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CaptureError(
            f"The config of {source} names no architecture, so the model's class is unknown. Add "
            '"architectures": ["ViltForQuestionAnswering"], or whichever class the weights are of.'
        )
    model_class = getattr(transformers, names[0], None) or MODELS.get(names[0])
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        custom = " Its config asks for custom code (auto_map), which is never run." if "auto_map" in config else ""
        raise CaptureError(
            f"The architecture {names[0]} of {source} is no model class of transformers "
            f"{transformers.__version__} or of pumer_compile.frontends.{custom} Load the model in Python and pass "
            "it to pumer_compile.capture, or save it with torch.export.save."
        )
    return model_class


def _complete(loaded: Any, source: Path) -> PreTrainedModel:
    """The model of a from_pretrained result, if its weights were all there and all used."""
    model, info = loaded
    for problem, keys in (("lack", info["missing_keys"]), ("have unexpected", info["unexpected_keys"])):
        if keys:
            names = sorted(keys)
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CaptureError(
                f"The weights of {source} {problem} {', '.join(names[:3])}{rest}, so they do not belong to "
                f"{type(model).__name__} with this config. Check the config's architectures and sizes."
            )
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise CaptureError(
            f"The weight {name} of {source} has the shape {list(found)}, but the config asks for {list(expected)}."
        )
    result: PreTrainedModel = model
    return result


# What torch.compile, activation checkpointing and FSDP put into the names of what they wrap, anywhere.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def _unwrapped(loaded: Any, weights: Mapping[str, Tensor], source: Path) -> Any:
    """A better from_pretrained result, of weights without what a wrapper has put into their names (`module.`,
    `_orig_mod.`, `model.`); the one given where that does not help."""
    model, info = loaded
    best, shortest = loaded, len(info["missing_keys"])
    for prefix in _prefixes(weights):
        renamed = {_WRAPPER.sub("", name).removeprefix(prefix): tensor for name, tensor in weights.items()}
        if renamed.keys() == weights.keys() or len(renamed) < len(weights):
            continue
        tried = _from_pretrained(type(model), None, config=model.config, state_dict=renamed)
        if len(tried[1]["missing_keys"]) < shortest:
            best, shortest = tried, len(tried[1]["missing_keys"])
            name, short = next((old, new) for old, new in zip(weights, renamed, strict=True) if old != new)
        if not shortest:
            break
    if best is not loaded:
        log.warning("The weights of %s have the names of a wrapped model: %s is read as %s.", source, name, short)
    return best


def _prefixes(weights: Mapping[str, Tensor]) -> list[str]:
    """What all names have in front, in whole parts: the longest first, nothing last."""
    parts: list[str] = []
    for column in zip(*(_WRAPPER.sub("", name).split(".")[:-1] for name in weights), strict=False):
        if len(set(column)) > 1:
            break
        parts.append(f"{column[0]}.")
    return ["".join(parts[:count]) for count in range(len(parts), -1, -1)]


_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def _drop_attention(values: dict[str, Any]) -> set[str]:
    """Leave the attention to transformers' default in a config, and in those inside it, unless it is `eager`; what else
    was asked for. Flash attention and flex attention need another machine, and no exporter traces them."""
    dropped: set[str] = set()
    for key in _ATTENTION:
        asked = values.get(key)
        parts = asked if isinstance(asked, dict) else {"": asked}
        if isinstance(asked, dict):
            values[key] = {part: kind for part, kind in asked.items() if kind == "eager"}
        elif asked != "eager":
            values.pop(key, None)
        dropped |= {str(kind) for kind in parts.values() if kind not in ("eager", None)}
    for part in values.values():
        if isinstance(part, dict):
            dropped |= _drop_attention(part)
    return dropped


def _say_attention(asked: set[str], model: PreTrainedModel, source: Path) -> None:
    used = {m.config._attn_implementation for m in model.modules() if isinstance(m, PreTrainedModel)}
    if other := sorted(asked - used):
        log.warning(
            "The config of %s asks for the attention %s, which cannot be compiled here: it is read as %s.",
            *(source, " and ".join(other), " and ".join(sorted(used))),
        )


def _unreadable(path: Path, error: Exception, files: Sequence[Path] = ()) -> CaptureError:
    """The error for weights that a library refuses: `files`, or the one at `path`; says whether one is cut short."""
    line = first_line(error)
    short = next((file for file in files or [path] if _is_short(file, error)), None)
    if short is not None:
        return CaptureError(
            f"The weights of {path} cannot be loaded: {line}. {short.name} is truncated: it ends before its own format "
            "says. Compare its size or hash with the original, or save the model again."
        )
    return CaptureError(
        f"The model {path} cannot be loaded: {line}. Where Python can load it, pass the model itself to "
        "pumer_compile.capture."
    )


def _is_short(path: Path, error: Exception | None = None) -> bool:
    """Whether a file of weights (safetensors, or what `torch.save` writes) ends before its own format says it does.

    A pickle of the old format does not tell its length; there it is what the error of reading it says.
    """
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"PK"):
            return not zipfile.is_zipfile(path)
        if head.startswith(b"\x80"):
            return isinstance(error, EOFError) or any(w in str(error) for w in ("truncated", "Ran out of", "EOF"))
        length = int.from_bytes(head, "little")
        try:
            entries = json.loads(file.read(length)) if len(head) == 8 and length < path.stat().st_size else None
            ends = [e["data_offsets"][1] for name, e in (entries or {}).items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return entries is None or 8 + length + max(ends, default=0) > path.stat().st_size


# --- Files --------------------------------------------------------------------------------------------------


def _load_file(path: Path, config: Path | None, allow_pickle: bool) -> LoadedModel:
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise CaptureError(f"The model {path} is an empty file. Expected {_ACCEPTED}.")
    if head[8:9] == b"{":  # safetensors: eight bytes of header length, then JSON
        return _load_safetensors_file(path, config)
    if head.startswith(b"PK"):
        names = _zip_names(path)
        if archive.is_archive(path, names):
            if config is not None:
                raise UsageError(f"--config goes with a bare state dict, but {path} is a torch.export archive.")
            return LoadedModel(path, "archive", sha256_file(path), exported=archive.load(path, allow_pickle))
        if any(name.endswith("/constants.pkl") for name in names):
            raise CaptureError(f"{path} is a TorchScript archive, which has no exportable graph. Expected {_ACCEPTED}.")
        if not any(name.endswith("/data.pkl") for name in names):
            raise CaptureError(f"{path} is a zip file, but not one that torch wrote. Expected {_ACCEPTED}.")
    elif not head.startswith(b"\x80"):  # a pickle, as torch wrote before 1.6
        raise CaptureError(f"{path} is not a model file: it starts with {head[:8]!r}. Expected {_ACCEPTED}.")
    return _load_checkpoint(path, config, allow_pickle)


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as zipped:
            return zipped.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _load_safetensors_file(path: Path, config: Path | None) -> LoadedModel:
    try:
        state_dict = load_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return _from_state_dict(path, "state_dict", state_dict, config, None)


def _load_checkpoint(path: Path, config: Path | None, allow_pickle: bool) -> LoadedModel:
    content = _torch_load(path, allow_pickle)
    if isinstance(content, nn.Module):
        return LoadedModel(path, "pickle", sha256_file(path), content)
    if isinstance(content, Mapping) and "state_dict" in content:
        inner = content.get("config")
        if isinstance(inner, str):
            try:
                inner = json.loads(inner)
            except ValueError as error:
                raise CaptureError(f"The config in {path} is not valid JSON: {first_line(error)}.") from error
        if inner is not None and not isinstance(inner, Mapping):
            raise CaptureError(f"The config in {path} must be a dict or JSON; found {type(inner).__name__}.")
        return _from_state_dict(path, "checkpoint", content["state_dict"], config, inner)
    return _from_state_dict(path, "state_dict", content, config, None)


def _torch_load(path: Path, allow_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch says "Weights only load failed" both for what it refuses and for bytes that are no pickle.
        if not allow_pickle:
            raise UsageError(
                f"{path} holds Python objects besides tensors ({_refused_global(error)}); loading those runs "
                "whatever code the file contains. Pass --allow-pickle (allow_pickle=True) only if you trust "
                "where it comes from, or save the state dict alone: "
                "torch.save({'config': ..., 'state_dict': model.state_dict()}, path)."
            ) from error
    except Exception as error:
        raise _unreadable(path, error) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise _unreadable(path, error) from error


def _refused_global(error: Exception) -> str:
    """The class that weights-only loading refused, from its message."""
    words = str(error).replace("`", " ").split()
    if "GLOBAL" in words and words.index("GLOBAL") + 1 < len(words):
        return words[words.index("GLOBAL") + 1]
    return "not plain tensors"


def _from_state_dict(
    path: Path, kind: str, state_dict: Any, config: Path | None, inner: Mapping[str, Any] | None
) -> LoadedModel:
    """A model from a state dict and its config: `config` if the user gave one, else `inner`, the checkpoint's own."""
    tensors = isinstance(state_dict, Mapping) and all(isinstance(value, Tensor) for value in state_dict.values())
    if not tensors or not state_dict:
        found = f"a dict with the keys {list(state_dict)[:6]}" if isinstance(state_dict, Mapping) else type(state_dict)
        raise CaptureError(f"{path} holds no state dict of tensors; found {found}. Expected {_ACCEPTED}.")
    if config is None and inner is None:
        raise UsageError(
            f"{path} holds weights without a config, so the model's architecture is unknown. Give its "
            "config.json (or a folder that has one) with --config."
        )
    values = dict(inner or {}) if config is None else _read_config(config)
    model_class = _architecture(values, path if config is None else config)
    refused = _drop_attention(values)
    try:
        settings = _config_of(model_class, values)
        loaded = _from_pretrained(model_class, None, config=settings, state_dict=dict(state_dict))
        if loaded[1]["missing_keys"]:
            loaded = _unwrapped(loaded, state_dict, path)
    except PumerError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    model = _complete(loaded, path)
    _say_attention(refused, model, path)
    config_file = [] if config is None else [config / "config.json" if config.is_dir() else config]
    return LoadedModel(path, kind, _sha256([path, *config_file]), model)


def _sha256(files: list[Path]) -> str:
    if len(files) == 1:
        return sha256_file(files[0])
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of its message, without a full stop; cut where it is very long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {shorten(lines[0], 400).rstrip('.')}" if lines else type(error).__name__


def shorten(text: str, length: int) -> str:
    """The text, or its beginning where it is longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --- Quiet --------------------------------------------------------------------------------------------------


_TRACING = ("torch.export", "torch._export", "torch.fx", "torch._subclasses", "torch._dynamo", "torch._functorch")


def _not_printed(*_: Any, **__: Any) -> None:
    """What torch.export prints is the graph so far, where a trace ended with an error."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings, log lines and progress bars of transformers and torch.export from the terminal, and the graphs
    and tracebacks that torch writes besides the errors it raises."""
    verbosity, progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in _TRACING]
    levels = [logger.level for logger in loggers]
    # Its errors are raised as well.
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), mock.patch.object(export_trace, "print", _not_printed, create=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
