"""Projections of embedding rows into the language model's space."""

import torch
from torch import Tensor, nn


class Projection(nn.Module):
    """Linear(D, hidden) - GELU - Linear(hidden, H), as SeLLa-Rec's Proj_{C->L}."""

    def __init__(self, dim: int, hidden: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, rows: Tensor) -> Tensor:
        """[b, D] -> [b, H]."""
        return self.layers(rows)


class HybridProjection(nn.Module):
    """Three soft tokens from a user's row, an item's row and the item's distilled vector.

    One projection is shared by user and item, a linear one takes the distilled vector (SeLLa-Rec's Proj_{C->L} and
    Proj_{W->L}). The alignment works in the space of last hidden states, whose norms are far from those of input
    embeddings; each token is brought to `norm`, the mean norm of the model's input embeddings, times a learned gain.

    Args:
        collaborative: the projection D -> H.
        width: H.
        norm: mean norm of the model's input embeddings.
    """

    def __init__(self, collaborative: Projection, width: int, norm: float) -> None:
        super().__init__()
        self.collaborative = collaborative
        self.semantic = nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(3, 1))
        self._norm = norm

    def forward(self, user: Tensor, item: Tensor, semantic: Tensor) -> dict[str, Tensor]:
        """[b, D], [b, D], [b, H] -> user, item, semantic: [b, H] each."""
        tokens = (self.collaborative(user), self.collaborative(item), self.semantic(semantic))
        scaled = [
            gain * self._norm * token / token.norm(dim=1, keepdim=True).clamp(min=1e-6)
            for gain, token in zip(self.gain, tokens, strict=True)
        ]
        return dict(zip(("user", "item", "semantic"), scaled, strict=True))
