"""FISM (Kabbur et al., 2013) with item vectors that are learnt from who consumes what, not from who likes it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.losses import full_softmax
from sellarec.collab.model import CollabModel, Sizes, values
from sellarec.config import DENSE_SETTINGS, Collab
from sellarec.training.table import Jagged, Table
from sellarec.training.task import WHOLE, Batch, Peers, Vectors


class Model(CollabModel):
    """score = constant + b_u + b_i + <z_u + g, v_i>.

    v_i are unit item vectors, z_u the unit mean of those in the history, g is learnt and tells what liking an item has to do
    with where it lies. <z_u, v_i> has no learnt weight: that would come out too small, as train rows made the vectors.

    No gradient of the labels reaches v. A loss of its own makes them: the softmax over the catalog of which item the row holds,
    whatever its label, given the mean of the history's vectors (not of unit length), of which `dropout` of the items are left
    out, with the items' counts as prior, so that vectors need not tell them. Labels are few and hold much chance; who rates
    what is known of every row.

    An item's row: its vector, its bias in that softmax, its bias in the score. A user's row has the bias alone, in its last
    column.
    """

    reads = ("history", "dropout", *DENSE_SETTINGS)
    ignores = ("biases", "temperature")
    losses = ("bce",)
    reads_catalog = True
    empty_history = "zeros in the place of its mean; what is learnt of liking still counts"
    init_from_vectors = ("items",)

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__(sizes, settings)
        self.history, self._dropout = settings.history, settings.dropout
        user, item = self.tables
        item = Table("item", item.rows, item.dim, ("item", "history"), init_std=item.init_std)
        self.tables = (Table("user", user.rows, USER_COLUMNS, ("user",)), item)
        self.liking = nn.Parameter(torch.zeros(settings.dim - 2))

    def user(self, batch: Batch, vectors: Vectors) -> Tensor:
        history = vectors["history"]
        units = F.normalize(history.values[:, :-2].detach(), dim=1)
        mean = F.normalize(Jagged(units, history.lengths).sum(), dim=1)
        bias = super().user(batch, vectors)[:, -1:]
        return torch.cat([mean + self.liking, torch.zeros_like(bias), bias], dim=1)

    def product(self, user: Tensor, item: Tensor, plain: bool = False) -> Tensor:
        return super().product(user, _of_score(item), plain)

    def of_items(self, items: Tensor, plain: bool = False) -> Tensor:
        return super().of_items(_of_score(items), plain)

    def represent_item(self, batch: Batch, vectors: Vectors) -> Tensor:
        return _of_score(super().represent_item(batch, vectors))

    def as_represented(self, side: str, rows: Tensor) -> Tensor:
        return _as_scored(rows, rows[..., :-2]) if side == "items" else rows

    def auxiliary_loss(self, batch: Batch, vectors: Vectors, log_counts: Tensor, peers: Peers) -> Tensor:
        """float [b]: the cross-entropy of the row's item among all, given the history."""
        history, catalog, item = vectors["history"], vectors[WHOLE + "item"], values(vectors["item"])
        kept = history.values.new_ones(len(history.values))
        if self.training:
            kept = (torch.rand_like(kept) >= self._dropout).float()
        sums = Jagged(torch.cat([history.values[:, :-2] * kept[:, None], kept[:, None]], dim=1), history.lengths).sum()
        users = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        prior = log_counts[batch[WHOLE + "item"]]
        there = prior.isfinite().nonzero()[:, 0]
        bias = (catalog[:, -2] + prior.clamp(min=0))[there, None]
        positive = (users * item[:, :-2]).sum(1) + item[:, -2] + log_counts[batch["item"]].clamp(min=0)
        ones = torch.ones_like(users[:, :1])
        return full_softmax(
            torch.cat([users, ones], dim=1), positive, torch.cat([catalog[there, :-2], bias], dim=1), peers
        )


USER_COLUMNS = 4
"""The narrowest table that the kernels take."""


def _of_score(items: Tensor) -> Tensor:
    """Items' rows [..., D] as the score takes them, which has no part in their vectors' gradients."""
    return _as_scored(items, items[..., :-2].detach())


def _as_scored(items: Tensor, vectors: Tensor) -> Tensor:
    """Rows [..., D] of these vectors [..., D - 2], brought to one length, and of the items' biases in the score."""
    return torch.cat([F.normalize(vectors, dim=-1), torch.zeros_like(items[..., :1]), items[..., -1:]], dim=-1)
