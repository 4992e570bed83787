"""Inputs and outputs of an artifact in Polygraphy's files, so that `polygraphy run` can replay them.

```
polygraphy run model.onnx --onnxrt --load-inputs inputs.json --load-outputs outputs.json
```
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifacts.session import Session
from ..errors import UsageError
from ..files import atomic_path, check_writable

Arrays = dict[str, np.ndarray[Any, Any]]


class Recorder:
    """A session that keeps what goes through another one.

    Args:
        session: that runs.
        manifest: of its artifact, which says in which dtypes inputs arrive there.

    Attributes:
        path, provider: of the session.
        fed, given: inputs and outputs by name, one entry for each batch.
    """

    def __init__(self, session: Session, manifest: Mapping[str, Any]) -> None:
        self.path, self.provider = session.path, session.provider
        self.fed: list[Arrays] = []
        self.given: list[Arrays] = []
        self._session = session
        self._dtypes = {name: getattr(torch, spec["dtype"]) for name, spec in manifest["inputs"].items()}

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return self._session.inputs

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return self._session.outputs

    def close(self) -> None:
        """As the session."""
        self._session.close()

    def run(self, batch: Mapping[str, Tensor]) -> Arrays:
        """As the session, which it asks."""
        outputs = self._session.run(batch)
        self.fed.append({n: batch[n].detach().cpu().to(self._dtypes[n]).contiguous().numpy() for n in self.inputs})
        self.given.append(outputs)
        return outputs

    def save(self, inputs: Path | None, outputs: Path | None) -> None:
        """Write what was kept.

        Args:
            inputs: for `polygraphy run --load-inputs`.
            outputs: for `--load-outputs`.
        """
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json

        if inputs is not None:
            with atomic_path(inputs) as temporary:
                save_json(self.fed, str(temporary))
        if outputs is not None:
            results = RunResults()
            results.add(self.given, runner_name=f"pumer-compile {self.provider}")
            with atomic_path(outputs) as temporary:
                results.save(str(temporary))


def check_recording(manifest: Mapping[str, Any], *paths: Path | None) -> None:
    """Refuse, before any long work, files that could not be written.

    Raises:
        UsageError: Polygraphy is not installed, a path cannot be written, or the artifact is in bfloat16.
    """
    wanted = [path for path in paths if path is not None]
    if not wanted:
        return
    try:
        import polygraphy.json  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "Polygraphy is not installed, and --save-inputs and --save-outputs write its format. Install the extra: "
            "pip install 'pumer-compile[tools]'."
        ) from error
    if manifest["dtype"] == "bfloat16":
        raise UsageError(
            "--save-inputs and --save-outputs write numpy's arrays, which have no bfloat16. Compile with --dtype "
            "float16 or float32 to record."
        )
    for path in wanted:
        check_writable(path)
