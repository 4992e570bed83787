"""Another image size than a model was trained with: its position embeddings, interpolated as transformers does it.

Vision models of transformers have `interpolate_pos_encoding`, which resizes their table of positions to the grid of
other images, each in its own way; it is used where `forward` is told to. Here the model's own method runs once, for one
size, and what it gives becomes a parameter: a graph then has a table, and no interpolation, which runtimes round
differently.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from .loading import first_line

log = logging.getLogger("pumer_compile")

FLAG = "interpolate_pos_encoding"
TABLE = "interpolated_positions"


def resize_images(model: nn.Module, size: int | tuple[int, int]) -> list[str]:
    """Make a model take images of one other size, in place.

    Args:
        model: of transformers.
        size: pixels, or (height, width), of all its images from now on.

    Returns:
        The modules whose position embeddings were interpolated, by path.

    Raises:
        UsageError: it has none that transformers interpolates, or they cannot be for this size.
    """
    height, width = (size, size) if isinstance(size, int) else size
    found = dict(positioned(model))
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no position embeddings that transformers interpolates: looked for modules "
            f"with `{FLAG}`. Give it images of the size that it was made for."
        )
    for name, module in found.items():
        positions = _Positions(module, name, height, width)
        module.register_parameter(TABLE, nn.Parameter(positions.computed(), requires_grad=positions.learns))
        module.__dict__[FLAG] = positions
        for inner in module.modules():
            if _takes_flag(inner):
                inner.__dict__["forward"] = _Told(inner)
        log.info("position embeddings of %s are interpolated for images of %d x %d", name, height, width)
    return list(found)


def fit_images(model: Any, images: Mapping[str, Tensor] | int | tuple[int, int] | None) -> list[str]:
    """`resize_images` to the size of the images among sample inputs, or to a size, where the model needs it; else
    nothing.

    Returns:
        The modules whose position embeddings were interpolated.
    """
    if isinstance(images, Mapping):
        pixels = images.get("pixel_values")
        images = None if pixels is None or pixels.dim() < 4 else (int(pixels.shape[-2]), int(pixels.shape[-1]))
    if not isinstance(model, nn.Module) or images is None:
        return []
    wanted = (images, images) if isinstance(images, int) else images
    made_for = [_size_of(module) for _, module in positioned(model)]
    return resize_images(model, wanted) if any(size not in (None, wanted) for size in made_for) else []


def positioned(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold position embeddings which can be interpolated, by path; none that was resized already."""
    for name, module in model.named_modules():
        own = callable(getattr(module, FLAG, None)) and not isinstance(module, PreTrainedModel)
        if own and TABLE not in module._parameters:
            yield name, module


def _takes_flag(module: nn.Module) -> bool:
    """Whether a module's forward interpolates where it is told to; others always do."""
    return FLAG in inspect.signature(module.forward).parameters


def _size_of(module: nn.Module) -> tuple[int, int] | None:
    """Pixels that a module's table is for; None where it does not say."""
    size = getattr(module, "image_size", None)
    if size is None:
        size = getattr(getattr(module, "patch_embeddings", None), "image_size", None)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


class _Positions:
    """Takes the place of a module's `interpolate_pos_encoding`.

    Args:
        module: whose.
        name: its path.
        height, width: of the images, in pixels.
    """

    def __init__(self, module: nn.Module, name: str, height: int, width: int) -> None:
        self.module, self.name, self.size = module, name, (height, width)
        self.learns = any(parameter.requires_grad for parameter in module.parameters())

    def computed(self) -> Tensor:
        """What the module's own method gives, as its own forward calls it.

        Raises:
            UsageError: it fails, or was not called.
        """
        own, given = getattr(self.module, FLAG), list[Tensor]()

        def note(*args: Any, **kwargs: Any) -> Tensor:
            given.append(own(*args, **kwargs))
            return given[-1]

        patches = next((m for m in self.module.modules() if isinstance(m, nn.Conv2d)), None)
        channels = 3 if patches is None else patches.in_channels
        like = next(self.module.parameters())
        self.module.__dict__[FLAG] = note
        try:
            with torch.no_grad():
                zeros = torch.zeros(1, channels, *self.size, dtype=like.dtype, device=like.device)
                self.module(zeros, **({FLAG: True} if _takes_flag(self.module) else {}))
        except Exception as error:
            raise UsageError(
                f"The position embeddings of {self.name} ({type(self.module).__name__}) cannot be interpolated for "
                f"images of {self.size[0]} x {self.size[1]}: {first_line(error)}. Choose a multiple of its patches."
            ) from error
        finally:
            del self.module.__dict__[FLAG]
        if len(given) != 1:
            raise UsageError(
                f"{self.name} ({type(self.module).__name__}) does not interpolate its position embeddings."
            )
        return given[0].detach().clone()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The table, for images of its size.

        Raises:
            UsageError: others.
        """
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        if numbers and tuple(numbers[-2:]) != self.size:
            raise UsageError(
                f"The position embeddings of {self.name} were interpolated for images of {self.size[0]} x "
                f"{self.size[1]}, and it is given {numbers[-2]} x {numbers[-1]}. Load the model again for another size."
            )
        table: Tensor = getattr(self.module, TABLE)
        return table


class _Told:
    """A module's forward with `interpolate_pos_encoding` set, whatever its callers say."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, type(module).forward
        self.__signature__ = inspect.signature(module.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.arguments[FLAG] = True
        return self.own(self.module, *bound.args, **bound.kwargs)
