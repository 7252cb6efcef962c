"""SASRec (Kang and McAuley, 2018): a causal transformer over the items of a history."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.model import CollabModel, Sizes, padded, places, values_of
from sellarec.config import DENSE_SETTINGS, Collab
from sellarec.training.table import Jagged, Table
from sellarec.training.task import Batch, Vectors

FEW = 8
"""Items of histories that are padded to one length, however short."""


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
        _, place = places(history.lengths)
        # one after the other, without padding, but for the attention; the shortest histories first, so that there is little of it
        states = self.dropout(history.values * history.values.shape[1] ** 0.5 + self.position[place])
        lengths, order = history.lengths.sort(stable=True)
        at = torch.repeat_interleave(history.lengths.cumsum(0)[order] - lengths.cumsum(0), lengths)
        at = at + torch.arange(len(at), device=at.device)
        states, groups = states.index_select(0, at), alike_long(lengths)
        for block in self.blocks:
            states = block(states, groups)
        states = self.norm(states)
        if isinstance(vectors.get("item"), Jagged):  # the next item at every position of a sequence
            return states.index_select(0, at.argsort())
        users = states.new_zeros(len(history), states.shape[1])
        some = lengths > 0
        users = users.index_put((order[some],), states[lengths.cumsum(0)[some] - 1])
        return users + super().user(batch, vectors) if self.has_user_rows else users


def alike_long(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Lists of int64 [b] lengths, the shortest first, in groups whose longest is FEW items long, or twice as long as that of the
    group before: of each group bool [b_g, L_g], where there is a value, and how many there are."""
    longest, ends = int(lengths[-1]) if len(lengths) else 0, [FEW]
    while 2 * ends[-1] < longest:
        ends.append(2 * ends[-1])
    last = torch.searchsorted(lengths, lengths.new_tensor(ends), right=True).tolist()
    rows = zip([0, *last], [*last, len(lengths)], strict=True)
    found = [places(lengths[start:end]) for start, end in rows if start < end]
    return [(there, len(place)) for there, place in found]


class Block(nn.Module):
    """Self-attention, then a feed-forward layer of the same width, as published.

    Positions after a history's end are never attended to by those before, as the mask is causal.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-8) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.forward_1, self.forward_2 = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, groups: Sequence[tuple[Tensor, int]]) -> Tensor:
        """float [n, D], the states of histories one after the other, and where they lie (`alike_long`) -> the same."""
        query = self.norms[0](states)  # keys and values are the states themselves, as published
        all_three = torch.stack([self.query(query), self.key(states), self.value(states)], dim=1)
        parts = all_three.split([size for _, size in groups])
        found = [self._attend(part, there) for part, (there, _) in zip(parts, groups, strict=True)]
        states = query + self.out(torch.cat([*found, states[:0]]))
        states = self.norms[1](states)
        inner = self.dropout(F.relu(self.forward_1(states)))
        return states + self.dropout(self.forward_2(inner))

    def _attend(self, states: Tensor, there: Tensor) -> Tensor:
        """Queries, keys and values [n, 3, D] of lists that lie where bool [b, L] says -> [n, D]."""
        q, k, v = padded(states, there).unflatten(3, (self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        return values_of(found.transpose(1, 2).flatten(2), there)
