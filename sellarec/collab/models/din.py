"""DIN (Zhou et al., 2018): the history is weighed by how it matches the candidate."""

import torch
from torch import Tensor, nn

from sellarec.collab.model import CollabModel, Sizes, padded, places
from sellarec.config import DENSE_SETTINGS, Collab
from sellarec.training.table import Table
from sellarec.training.task import Batch, Vectors

ATTENTION_WIDTHS = (80, 40)
"""Hidden layers of the network that weighs an item of the history, as published."""


class Model(CollabModel):
    """A network of the user's row, the weighed sum of the history's rows, and the candidate's row; a candidate at a time.

    Items of the history are weighed by a network of both items, their difference and product; weights aren't normalised, as
    published. PReLU stands for Dice, whose batch statistics would make a row's score depend on its batch. The user's vector,
    for alignment and fusion, is the user's row plus that sum for the row's item.
    """

    reads = ("history", "hidden", "dropout", *DENSE_SETTINGS)
    ignores = ("temperature",)
    is_product = False
    empty_history = "zeros in the place of its weighed sum"

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__(sizes, settings)
        dim = settings.dim
        self.history = settings.history
        user, item = self.tables
        self.tables = (user, Table("item", item.rows, dim, ("item", "history"), init_std=item.init_std))
        self.attention = _layers(4 * dim, ATTENTION_WIDTHS, 0.0)
        self.network = _layers(3 * dim, settings.hidden, settings.dropout)

    def forward(self, batch: Batch, vectors: Vectors, *candidates: Tensor) -> tuple[Tensor, list[Tensor]]:
        there, _ = places(vectors["history"].lengths)
        history = padded(vectors["history"].values, there)
        row = self.user(batch, vectors)
        users, scores = [], []
        for items in candidates:
            pooled = self._pool(history, there, items)
            user = row[:, None].expand_as(items)
            score = self.network(torch.cat([user, pooled, items], dim=-1))[..., 0]
            if self.has_biases:
                score = score + user[..., -1] + items[..., -1]
            scores.append(self.constant + score)
            users.append(user + pooled)
        return users[0][:, 0], scores

    def _pool(self, history: Tensor, there: Tensor, items: Tensor) -> Tensor:
        """[b, L, D], bool [b, L] and candidates [b, N, D] -> [b, N, D]."""
        shape = (*items.shape[:2], *history.shape[1:])
        one, other = items[:, :, None].expand(shape), history[:, None].expand(shape)
        weights = self.attention(torch.cat([one, other, one - other, one * other], dim=-1))
        return (weights * there[:, None, :, None] * other).sum(2)


def _layers(width: int, hidden: tuple[int, ...], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.PReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 1))
