"""CLIP's checkpoint beside a model: what a method asks how relevant image tokens are to a question."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LocateError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ..analysis.marks import Mark
    from ..reducers.clip import ClipRelevance, ClipText

PROJECTION = "visual_projection.weight"
_NORM = "post_layernorm"


@cache
def clip_config(folder: Path) -> dict[str, Any]:
    """The sizes of the text tower, of a folder with a `config.json` of CLIP or of its text tower.

    Raises:
        UsageError: there is none, or it is another model's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(
            f"No CLIP checkpoint in {folder}: it has no config.json. Give the folder of one (--text-tower)."
        )
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    text: dict[str, Any] = {"projection_dim": config.get("projection_dim", 512), **config.get("text_config", config)}
    if not str(text.get("model_type", "")).startswith("clip"):
        raise UsageError(
            f"{path} is of a {config.get('model_type')} model; CDPruner's relevance is CLIP's. Give the folder of the "
            "CLIP checkpoint that the vision tower is from."
        )
    known = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    more = {"num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu"}
    return {**known, **more, **text}


def clip_relevance(folder: Path, mark: Mark, *, with_text: bool) -> ClipRelevance:
    """The part of CLIP that compares image tokens with a text.

    Args:
        folder: of the checkpoint.
        mark: rows of a prompt. The model has the layer norm behind its vision tower where the checkpoint has none.
        with_text: with the text tower.

    Raises:
        UsageError: weights are missing, or of another width than the vision tower.
        LocateError: neither has the layer norm; or the rows are not one token of a tower each.
    """
    from torch import nn

    from ..analysis.rules import shape
    from ..reducers.clip import ClipRelevance

    if mark.tower is None:
        raise LocateError(
            "`variant: paper` compares the question with what image tokens are when they leave a CLIP vision tower, "
            "and the rows of this prompt are not one of its tokens each. `variant: openvino` compares the rows."
        )
    width, weights = int(shape(mark.tower.features)[2]), _weights(folder)
    projection = _one(weights, folder, PROJECTION)
    if projection.shape[1] != width:
        raise UsageError(
            f"{PROJECTION} of {folder} takes features of width {projection.shape[1]}, and the vision tower gives "
            f"{width}. Give the CLIP checkpoint that this vision tower is from."
        )
    module: Any = mark.node.graph.owning_module
    own = {name: value.detach() for name, value in module.named_parameters()}
    norms = {}
    for part in ("weight", "bias"):
        name = f"{_NORM}.{part}"
        found = [
            v for source in (weights, own) for n, v in source.items() if n.endswith(f".{name}") and len(v) == width
        ]
        if not found:
            raise LocateError(
                f"Neither {folder} nor the model has the {name} of CLIP's vision tower, of width {width}. Give the "
                "folder of the whole CLIP checkpoint."
            )
        norms[part] = found[0].float().clone()
    norm = nn.LayerNorm(width, eps=1e-5)
    norm.load_state_dict(norms)
    text = _text_tower(folder, weights) if with_text else None
    return ClipRelevance(norm.requires_grad_(False), projection.float(), text).eval()


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"No weights of CLIP in {folder}: it has no .safetensors file.")
    return {name: value for file in files for name, value in load_file(file).items()}


def _one(weights: dict[str, Tensor], folder: Path, name: str) -> Tensor:
    if name not in weights:
        raise UsageError(f"The files of {folder} have no {name}. Give the folder of the whole CLIP checkpoint.")
    return weights[name]


def _text_tower(folder: Path, weights: dict[str, Tensor]) -> ClipText:
    from ..reducers.clip import ClipText

    config = clip_config(folder)
    tower = ClipText(
        config["vocab_size"],
        config["hidden_size"],
        config["intermediate_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["max_position_embeddings"],
        _one(weights, folder, "text_projection.weight").shape[0],
        config["hidden_act"] == "quick_gelu",
    )
    state = {}
    for name in tower.state_dict():
        theirs = name.replace(".fc", ".mlp.fc") if ".fc" in name else name
        theirs = theirs.replace("token_embedding", "embeddings.token_embedding")
        theirs = theirs.replace("position_embedding", "embeddings.position_embedding")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            theirs = theirs.replace(f".{part}", f".self_attn.{part}")
        theirs = (
            theirs
            if theirs.startswith("text_projection")
            else f"text_model.{theirs}".replace(".layers", ".encoder.layers")
        )
        state[name] = _one(weights, folder, theirs).float()
    tower.load_state_dict(state)
    return tower.requires_grad_(False)
