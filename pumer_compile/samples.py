"""Samples at random: batches for a proof, and an image in a prompt where only the image matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import UsageError
from .inputs import check_inputs, float_dtype, forward_inputs, make_inputs, make_text
from .loading import LoadedModel, first_line
from .plan import PromptPlace

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
    token = getattr(config, "image_token_id", None)
    if token is None or not hasattr(model, "get_image_features"):
        raise _no_image(model, "has no image token in its config")
    vision = config.vision_config
    size = vision.image_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    shape = (batch or 1, getattr(vision, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=generator).to(float_dtype(model))
    ids = torch.ones(batch or 1, _tokens(model, pixels[:1]) + WORDS, dtype=torch.int64)
    ids[:, :-WORDS] = token
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if "token_type_ids" in accepted:
        made["token_type_ids"] = torch.zeros_like(ids)
    return check_inputs(model, {key: made[key] for key in accepted if key in made})


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


def random_batches(
    model: Any,
    shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str],
    count: int = 3,
    *,
    prompts: Sequence[PromptPlace] = (),
    fixed: Mapping[str, Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """Random inputs in the shapes of an artifact's inputs, one batch for each seed.

    Texts are padded, prompts are not: other words, and other images at the same places.

    Args:
        model: whose config says what random ids and images are.
        shapes: by input name.
        dtypes: by input name, such as `int64`. What a config does not describe is standard normal where it is
            floating point (region features), all ones where it is a mask, and zeros where it is token types.
        count: how many.
        prompts: where images stand.
        fixed: inputs that have one value.

    Raises:
        UsageError: inputs cannot be made up for this model; give real ones.
    """
    source = model.source if isinstance(model, LoadedModel) else model
    ids, pixels = shapes.get("input_ids"), shapes.get("pixel_values")
    batches = []
    for seed in range(count):
        if prompts:
            made = _prompts(source, shapes, prompts, seed)
        else:
            made = make_inputs(
                source,
                batch=next(iter(shapes.values()))[0],
                text_length=ids[1] if ids else None,
                image_size=(pixels[-2], pixels[-1]) if pixels else None,
                seed=seed,
                padding=True,
            )
        made.update(fixed or {})
        generator = torch.Generator().manual_seed(seed)
        batches.append({n: made[n] if n in made else _made_up(n, shapes[n], dtypes[n], generator) for n in shapes})
    return batches


def _prompts(
    model: Any, shapes: Mapping[str, Sequence[int]], prompts: Sequence[PromptPlace], seed: int
) -> dict[str, Tensor]:
    """Ids with the placeholders at their places, and random words around them."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for place in prompts:
        if place.input not in made:
            batch, length = shapes[place.input]
            made[place.input] = make_text(model.config, [False] * batch, length, generator)["input_ids"]
        made[place.input][:, place.start : place.stop] = place.placeholder
    return made


def _made_up(name: str, shape: Sequence[int], dtype: str, generator: torch.Generator) -> Tensor:
    if dtype.startswith(("float", "bfloat")):
        return torch.randn(list(shape), generator=generator)
    if name.endswith("mask"):
        return torch.ones(list(shape), dtype=getattr(torch, dtype))
    if name.endswith("token_type_ids"):
        return torch.zeros(list(shape), dtype=torch.int64)
    raise UsageError(f"Random samples cannot be made for the input {name}. Give samples (`--inputs FILE.npz`).")
