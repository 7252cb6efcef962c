"""SASRec (Kang and McAuley, 2018): a causal transformer over the items of a history."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.model import CollabModel, Sizes, padded, places
from sellarec.config import DENSE_SETTINGS, Collab
from sellarec.training.table import Jagged, Table
from sellarec.training.task import Batch, Vectors


class Model(CollabModel):
    """The user's vector is the transformer's output at the last item of the history; items of the catalog share their rows
    with those of histories.

    With `user_rows` a user's own row is added, which is masked for unseen users. A user without a history and a row
    counts as zeros. Positions count from the oldest item that is read.
    """

    reads = ("layers", "heads", "dropout", "history", "user_rows", *DENSE_SETTINGS)
    has_positions = True

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__(sizes, settings)
        self.history = settings.history
        user, item = self.tables
        self.has_user_rows = settings.user_rows
        self.empty_history = "the user's row alone" if settings.user_rows else "a row of zeros as the user"
        item = Table("item", item.rows, item.dim, ("item", "history"), init_std=item.init_std)
        self.tables = (user, item) if settings.user_rows else (item,)
        self.position = nn.Parameter(torch.randn(settings.history, settings.dim) * settings.init_std)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(
            Block(settings.dim, settings.heads, settings.dropout) for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(settings.dim, eps=1e-8)

    def user(self, batch: Batch, vectors: Vectors) -> Tensor:
        history = vectors["history"]
        there, place = places(history.lengths)
        # one after the other, without padding, but for the attention
        states = self.dropout(history.values * history.values.shape[1] ** 0.5 + self.position[place])
        for block in self.blocks:
            states = block(states, there)
        states = self.norm(states)
        if isinstance(vectors.get("item"), Jagged):  # the next item at every position of a sequence
            return states
        users = states.new_zeros(len(history), states.shape[1])
        some = history.lengths > 0
        users = users.index_put((some,), states[history.lengths.cumsum(0)[some] - 1])
        return users + super().user(batch, vectors) if self.has_user_rows else users


class Block(nn.Module):
    """Self-attention, then a feed-forward layer of the same width, as published.

    Positions after a history's end are never attended to by those before, as the mask is causal.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-8) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.forward_1, self.forward_2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, there: Tensor) -> Tensor:
        """float [n, D], the states of b histories one after the other, and bool [b, L], where they lie -> the same."""
        query = self.norms[0](states)  # keys and values are the states themselves, as published
        q, k, v = (self._heads(part, there) for part in (self.query(query), self.key(states), self.value(states)))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0)
        states = query + self.out(found.transpose(1, 2)[there].flatten(1))
        states = self.norms[1](states)
        inner = self.dropout(F.relu(self.forward_1(states)))
        return states + self.dropout(self.forward_2(inner))

    def _heads(self, states: Tensor, there: Tensor) -> Tensor:
        """[n, D] -> [b, heads, L, D / heads]."""
        return padded(states, there).unflatten(2, (self.heads, -1)).transpose(1, 2)
