"""A prompt made up for its image: where only the image matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from .inputs import check_inputs, float_dtype, forward_inputs
from .loading import first_line

# Words behind the image of a prompt that is made for its image.
WORDS = 4


def make_image_prompt(
    model: nn.Module, *, batch: int | None = None, image_size: int | tuple[int, int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A prompt of one random image for each sample, and a few words behind it.

    How many placeholders an image takes is asked of the model itself (`get_image_features`).

    Args:
        model: of transformers, with `get_image_features` and an image token in its config.
        batch: samples, 1 unless given.
        image_size: pixels, or (height, width); that of the config unless given.
        seed: of the pixels.

    Returns:
        `input_ids` and `attention_mask`, int64 `[batch, tokens + WORDS]`, and `pixel_values` in the model's dtype,
        `[batch, channels, height, width]`.

    Raises:
        UsageError: the model has no image in its prompt, or cuts images into crops (then it takes their sizes too).
    """
    config: Any = getattr(model, "config", None)
    accepted = forward_inputs(model)
    if not has_image_token(model):
        raise _no_image(model, "has no image token in its config")
    vision = config.vision_config
    size = vision.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    shape = (batch or 1, getattr(vision, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=generator).to(float_dtype(model))
    ids = torch.ones(batch or 1, _tokens(model, pixels[:1]) + WORDS, dtype=torch.int64)
    ids[:, :-WORDS] = config.image_token_id
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if "token_type_ids" in accepted:
        made["token_type_ids"] = torch.zeros_like(ids)
    return check_inputs(model, {key: made[key] for key in accepted if key in made})


def has_image_token(model: Any) -> bool:
    """Whether a model puts images into prompts, and says so in its config."""
    return getattr(getattr(model, "config", None), "image_token_id", None) is not None and hasattr(
        model, "get_image_features"
    )


def _no_image(model: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"No sample image can be made for {type(model).__name__}, which {why}. Give the inputs its processor makes: "
        "--inputs with an .npz file."
    )


def _tokens(model: Any, pixels: Tensor) -> int:
    """How many tokens an image has in the prompt."""
    device = next(model.parameters()).device
    with torch.no_grad():
        try:
            found = model.get_image_features(pixel_values=pixels.to(device))
        except TypeError as error:
            raise _no_image(model, f"wants more than pixels ({first_line(error)})") from error
    # transformers 5.17 gives the features themselves.
    features = [t for t in tree_leaves(getattr(found, "pooler_output", found)) if isinstance(t, Tensor)]
    return sum(t.numel() // t.shape[-1] for t in features)
