"""Projections of embedding rows into the language model's space.

Shapes: b rows, D columns of a collaborative row, H width of the language model, E experts.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Projection(nn.Module):
    """Linear(D, hidden) - GELU - Linear(hidden, H), as SeLLa-Rec's Proj_{C->L}; with more hidden layers, as many times
    Linear(hidden, hidden) - GELU in between."""

    def __init__(self, dim: int, hidden: int, width: int, layers: int = 1) -> None:
        super().__init__()
        between = [module for _ in range(layers - 1) for module in (nn.Linear(hidden, hidden), nn.GELU())]
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), *between, nn.Linear(hidden, width))

    def forward(self, rows: Tensor) -> Tensor:
        """[b, D] -> [b, H]."""
        return self.layers(rows)


class MixtureProjection(nn.Module):
    """Projections of which each row takes a weighted sum, by the softmax of a linear gate (mixture of experts, Jacobs et al.,
    1991; SeLLa-Rec's released code has one, unused)."""

    def __init__(self, experts: Sequence[Projection], dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = nn.Linear(dim, len(experts))

    def forward(self, rows: Tensor) -> Tensor:
        """[b, D] -> [b, H]."""
        weights = self.gate(rows).softmax(dim=1)  # [b, E]
        found = torch.stack([expert(rows) for expert in self.experts], dim=1)  # [b, E, H]
        return (weights[:, :, None] * found).sum(1)


class HybridProjection(nn.Module):
    """Soft tokens, some of: from a user's row, an item's row, the item's distilled vector.

    The first two take one projection or each its own (SeLLa-Rec's Proj_{C->L}, which is shared), a linear one takes the
    distilled vector (Proj_{W->L}). The alignment works in the space of last hidden states, whose norms are far from those of
    input embeddings; so each token is brought to `norm` times a learned gain.

    Args:
        tokens: of user, item and semantic.
        projections: by token what makes it; by `collaborative` what makes those of user and item that have none of their own.
        norm: float32 [], mean norm of the model's input embeddings; None: tokens are as they are projected, as published.
    """

    def __init__(self, tokens: Sequence[str], projections: Mapping[str, nn.Module], norm: Tensor | None) -> None:
        super().__init__()
        self.tokens = tuple(tokens)
        self.projections = nn.ModuleDict(projections)
        self.register_buffer("norm", norm, persistent=False)
        if norm is not None:
            self.gain = nn.Parameter(torch.ones(len(self.tokens), 1))

    def forward(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By token [b, D] of user and item, [b, H] of semantic -> by token [b, H]."""
        tokens = {name: self._projected(name, vectors[name]) for name in self.tokens}
        if self.norm is None:
            return tokens
        return {
            name: gain * self.norm * token / token.norm(dim=1, keepdim=True).clamp(min=1e-6)
            for gain, (name, token) in zip(self.gain, tokens.items(), strict=True)
        }

    def _projected(self, token: str, rows: Tensor) -> Tensor:
        projection = self.projections[token if token in self.projections else "collaborative"]
        weight = next(projection.parameters(), rows)  # learned tokens have none
        return projection(rows.to(weight.dtype))
