"""CLIP beside a model: its text tower, and image tokens in the space of its texts (Radford et al., ICML 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .relevance import to_text

NO_TOKEN = -1
"""Stands behind the ids of a question that is shorter than its input."""


class ClipRelevance(nn.Module):
    """Minus the cosine of image tokens and a text in CLIP's space, mean over the windows of the text (CDPruner: image
    tokens are unlike the text that they show).

    Args:
        norm: the layer norm behind CLIP's vision tower.
        projection: from its width to that of texts, `[texts' width, width]`.
        text: the text tower; None where the texts are given in CLIP's space.
    """

    def __init__(self, norm: nn.LayerNorm, projection: Tensor, text: ClipText | None = None) -> None:
        super().__init__()
        self.norm, self.text = norm, text
        self.projection = nn.Parameter(projection, requires_grad=False)

    def forward(self, features: Tensor, text: Tensor) -> Tensor:
        """`[batch, tokens]`, float32.

        Args:
            features: that leave the vision tower, `[batch, tokens, width]`.
            text: `[batch, texts, width]`, or the ids of a question, `[batch, length]`.
        """
        image: Tensor = self.norm(features.float()) @ self.projection.T
        if self.text is None:
            cosines = to_text(image, text.float())
            return -cosines.mean(-1)
        given: tuple[Tensor, Tensor] = self.text(text)
        texts, real = given
        cosines = to_text(image, texts) * real.unsqueeze(1)
        return -cosines.sum(-1) / real.sum(-1, keepdim=True).clamp(min=1.0)


class ClipText(nn.Module):
    """CLIP's text tower over windows of a question.

    A window is pooled where its id is largest (the end of a text; any token of a window without one).

    Args:
        vocabulary, width, hidden, layers, heads: sizes.
        window: tokens that it sees at once.
        projected: width of its output.
        quick: whether its GELU is `x * sigmoid(1.702 x)`.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        hidden: int,
        layers: int,
        heads: int,
        window: int,
        projected: int,
        quick: bool,
    ) -> None:
        super().__init__()
        self.window = window
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(window, width)
        self.layers = nn.ModuleList([_Layer(width, hidden, heads, quick) for _ in range(layers)])
        self.final_layer_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, projected, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Texts, `[batch, windows, projected]`, and 1 where a window has a token, else 0, `[batch, windows]`.

        Args:
            ids: `[batch, length]`, int64; `NO_TOKEN` behind the last.
        """
        length = ids.shape[1]
        short = -length % self.window
        ids = torch.nn.functional.pad(ids, (0, short), value=NO_TOKEN).reshape(-1, self.window)
        windows = (length + short) // self.window
        known = ids.clamp(min=0)
        states = self.token_embedding(known) + self.position_embedding.weight
        for layer in self.layers:
            states = layer(states)
        states = self.final_layer_norm(states)
        last = known == known.amax(-1, keepdim=True)
        first = last & (last.long().cumsum(-1) == 1)
        pooled = (first.float().unsqueeze(1) @ states).squeeze(1)
        real = (ids >= 0).any(-1).float()
        return self.text_projection(pooled).reshape(-1, windows, pooled_width(self)), real.reshape(-1, windows)


def pooled_width(tower: ClipText) -> int:
    """The width of what a text tower gives."""
    return int(tower.text_projection.out_features)


class _Layer(nn.Module):
    """One layer of the text tower, its norms in front."""

    def __init__(self, width: int, hidden: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.heads, self.quick = heads, quick
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        """`[windows, window, width]`, each token seeing those before it."""
        normed = self.layer_norm1(states)
        size = normed.shape[-1] // self.heads
        q, k, v = (
            part(normed).unflatten(-1, (self.heads, size)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        length = torch.arange(states.shape[1], device=states.device)
        scores = (q * size**-0.5) @ k.transpose(-1, -2)
        scores = torch.where(length <= length.unsqueeze(1), scores, -torch.inf)
        seen = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        states = states + self.out_proj(seen)
        up = self.fc1(self.layer_norm2(states))
        up = up * torch.sigmoid(1.702 * up) if self.quick else torch.nn.functional.gelu(up)
        out: Tensor = states + self.fc2(up)
        return out
