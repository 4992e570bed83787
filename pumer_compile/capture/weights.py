"""Whether a model is as large as the one that an artifact was compiled from: by the shapes of its weights.

A model of another size would fail somewhere inside a runtime (an id beyond a smaller vocabulary) or inside PyTorch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..errors import UsageError
from .capture import Program
from .loading import LoadedModel

Shapes = Counter[tuple[int, ...]]


def read_weights(module: fx.GraphModule) -> list[dict[str, Any]]:
    """The weights that a captured graph reads, as a manifest keeps them: `[{"shape": [768, 768], "count": 48}]`."""
    return [{"shape": list(shape), "count": count} for shape, count in sorted(_read(module).items())]


def check_model(manifest: Mapping[str, Any], model: Program | LoadedModel | nn.Module | ExportedProgram) -> None:
    """Refuse a model of another size than the artifact's. Manifests made before do not tell.

    Args:
        manifest: of the artifact.
        model: captured, where its graph must read the same weights; or not yet, where it must have them.

    Raises:
        UsageError: naming the weights that differ, and the hashes of both checkpoints where they are known.
    """
    said = manifest.get("weights")
    sha256, known = _sha256(model), manifest.get("checkpoint_sha256")
    if not said or (sha256 is not None and sha256 == known):
        return
    wanted: Shapes = Counter({tuple(entry["shape"]): int(entry["count"]) for entry in said})
    found = _read(model.module) if isinstance(model, Program) else _has(model)
    # Before it is captured a model may have weights that its graph does not read.
    whole = isinstance(model, Program)
    differ = sorted(s for s in wanted | found if found[s] < wanted[s] or (whole and found[s] > wanted[s]))
    if not differ:
        return
    listed = [f"{wanted[shape]} of shape {list(shape)} where that has {found[shape]}" for shape in differ[:3]]
    hashes = f" (SHA-256 of the checkpoints: {known} and {sha256})" if known and sha256 else ""
    raise UsageError(
        f"The artifact was compiled from a model of another size than the one given{hashes}: its weights are "
        f"{', '.join(listed)}{' and others' if len(differ) > 3 else ''}. Give the model that it was compiled from."
    )


def _sha256(model: Program | LoadedModel | nn.Module | ExportedProgram) -> str | None:
    if isinstance(model, Program):
        return model.checkpoint_sha256
    return model.sha256 if isinstance(model, LoadedModel) else None


def _read(module: fx.GraphModule) -> Shapes:
    names = {str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.users}
    # Tied weights have several names.
    named = module.named_parameters(remove_duplicate=False)
    return _shapes({id(parameter): parameter for name, parameter in named if name in names}.values())


def _has(model: LoadedModel | nn.Module | ExportedProgram) -> Shapes:
    return _shapes((model.source if isinstance(model, LoadedModel) else model).parameters())


def _shapes(parameters: Iterable[Tensor]) -> Shapes:
    return Counter(tuple(parameter.shape) for parameter in parameters)
