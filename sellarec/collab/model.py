"""What the models of collaborative filtering have in common: one file each in `models/`, written for a single device.

Shapes: b rows, n targets (rows, or all positions of b sequences), N candidates of a target, L items of a history, D columns of
a row, of which the last is the bias where the model has biases.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab import unseen
from sellarec.config import Collab
from sellarec.training.table import Jagged, Table
from sellarec.training.task import INITIAL, WHOLE, Batch, Peers, Vectors


@dataclass(frozen=True)
class Sizes:
    """What a model needs to know of a log.

    Attributes:
        positive_rate: share of positives among the training rows.
    """

    users: int
    items: int
    positive_rate: float


class CollabModel(nn.Module):
    """A model: its tables, the user's vector, and scores of candidates. What differs from a plain product is overridden, with the
    same arguments.

    A model is a file `models/NAME.py` with a class `Model`; `collab.model NAME` takes it, and nothing else is to be changed.

    Attributes:
        reads: settings of `collab` that it reads beside those that every model reads.
        ignores: those that the other models read and it doesn't, so that another value than the default is refused.
        plain_score: whether scores are plain products where the loss takes cosines.
        is_product: whether a score is the product of a user's and an item's vector, which full ranking, in-batch
            negatives and the full softmax take.
        has_positions: whether it scores the next item at every position of a sequence (`collab.train_on sequences`).
        history: items of a row's history that it reads at most, the most recent ones; 0 reads none.
        losses: kinds of `collab.loss` that it can be trained with.
        reads_catalog: whether its `auxiliary_loss` takes the rows of the whole catalog, and how many train rows each item has.
        uses_graph: whether rows are smoothed over the graph of train positives (`propagate`).
        is_binary: whether the signs of rows are all that represents users and items, so that they can be written as codes.
        empty_history: what it makes of a history without a train item, in words; for a model that reads one.
        init_from_vectors: whose rows may start from vectors of a file (`collab.init_users`, `init_items`).
        dim: D, columns of what represents a user or an item.
    """

    reads: ClassVar[tuple[str, ...]] = ()
    ignores: ClassVar[tuple[str, ...]] = ()
    is_product: ClassVar[bool] = True
    has_positions: ClassVar[bool] = False
    losses: ClassVar[tuple[str, ...]] = ("bce", "bpr", "softmax", "full-softmax")
    reads_catalog: ClassVar[bool] = False
    uses_graph: ClassVar[bool] = False
    is_binary: ClassVar[bool] = False
    init_from_vectors: ClassVar[tuple[str, ...]] = ("users", "items")
    history: int = 0
    empty_history: str = ""

    def __init__(self, sizes: Sizes, settings: Collab) -> None:
        super().__init__()
        self.dim = settings.dim
        self.has_biases = settings.biases
        self._scale = None if settings.temperature is None else settings.temperature**-0.5
        self.plain_score = settings.plain_score
        rate = sizes.positive_rate
        # without a row of either label the log-odds say nothing, and a constant has no part in any ranking
        self.constant = math.log(rate / (1 - rate)) if settings.global_mean and 0 < rate < 1 else 0.0
        self.tables: tuple[Table, ...] = (
            Table("user", sizes.users, settings.dim, ("user",), init_std=settings.init_std),
            Table("item", sizes.items, settings.dim, ("item",), init_std=settings.init_std),
        )

    @property
    def has_weights(self) -> bool:
        """Whether there are dense weights beside the tables."""
        return any(True for _ in self.parameters())

    def unseen(self) -> dict[str, str]:
        """What a row counts as whose user, item, or history (all of its items), has no train row, in words: by case of
        `sellarec.collab.unseen`, those that the model can meet. Of a history that has others too, such items are left out."""
        masked = "masked (a row of zeros)"
        has_users = any("user" in table.features for table in self.tables)
        found = {unseen.USER: masked + ("; its history still counts" if self.history else "")} if has_users else {}
        found[unseen.ITEM] = masked
        return found | ({unseen.HISTORY: self.empty_history} if self.history else {})

    def user(self, batch: Batch, vectors: Vectors) -> Tensor:
        """The users' vectors: [n, D]."""
        return _of_seen(vectors["user"], batch.get("user_seen"))

    def item(self, batch: Batch, vectors: Vectors) -> Tensor:
        """The target items' vectors: [n, D]."""
        item = vectors["item"]
        return item.values if isinstance(item, Jagged) else _of_seen(item, batch.get("item_seen"))

    def forward(self, batch: Batch, vectors: Vectors, *candidates: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The users' vectors [n, D], and for candidates [n, N, D] each their scores [n, N]."""
        user = self.user(batch, vectors)
        return user, [self.product(user[:, None], items) for items in candidates]

    def score(
        self, batch: Batch, vectors: Vectors, model: Callable[..., tuple[Tensor, list[Tensor]]] | None = None
    ) -> Tensor:
        """The score of each row's item, [b]; `model` is called in the place of this one, where it stands for it."""
        item = self.item(batch, vectors)
        user, (score,) = (model or self)(batch, vectors, item[:, None])
        return self.product(user, item, plain=True) if self.plain_score else score[:, 0]

    def product(self, user: Tensor, item: Tensor, plain: bool = False) -> Tensor:
        """constant + <u, i> + b_u + b_i: float [...] from rows [..., D]; with a temperature, and unless it shall be the `plain`
        product, <u, i> is their cosine divided by it."""
        (u, user_bias), (i, item_bias) = self._parts(user, plain), self._parts(item, plain)
        return self.constant + (u * i).sum(-1) + user_bias + item_bias

    def products(self, users: Tensor, items: Tensor, plain: bool = False) -> Tensor:
        """The same of all pairs, without an array of three dimensions: [n, D] and [m, D] -> [n, m]."""
        return self.of_users(users, plain) @ self.of_items(items, plain).T

    def of_users(self, users: Tensor, plain: bool = False) -> Tensor:
        """[n, D] -> [n, H]. Their products with `of_items` are those scores, with biases and constant."""
        vectors, bias = self._parts(users, plain)
        if not self.has_biases and not self.constant:
            return vectors
        ones = [torch.ones_like(bias[:, None])] * self.has_biases
        return torch.cat([vectors, bias[:, None] + self.constant, *ones], dim=1)

    def of_items(self, items: Tensor, plain: bool = False) -> Tensor:
        """[m, D] -> [m, H], as `of_users`."""
        vectors, bias = self._parts(items, plain)
        if not self.has_biases and not self.constant:
            return vectors
        return torch.cat([vectors, torch.ones_like(bias[:, None]), *[bias[:, None]] * self.has_biases], dim=1)

    def _parts(self, rows: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
        """What of rows [..., D] is multiplied, with a temperature brought to one length, and the biases [...]."""
        vectors, bias = (rows[..., :-1], rows[..., -1]) if self.has_biases else (rows, rows.new_zeros(rows.shape[:-1]))
        return vectors if plain or self._scale is None else F.normalize(vectors, dim=-1) * self._scale, bias

    def represent_user(self, batch: Batch, vectors: Vectors) -> Tensor:
        """A row's user as a vector, [b, D]: what fusion takes. Where a score is no product, it is that for the row's item."""
        if self.is_product:
            return self.user(batch, vectors)
        return self(batch, vectors, self.item(batch, vectors)[:, None])[0]

    def represent_item(self, batch: Batch, vectors: Vectors) -> Tensor:
        """A row's item as a vector, [b, D], of the feature `item` alone."""
        return self.item(batch, vectors)

    def as_represented(self, side: str, rows: Tensor) -> Tensor:
        """Rows of seen items, or the vectors of `users` that `forward` gives, [n, D], as `represent_item` and `represent_user`
        give them, but with gradients to all that they are made of: what align projects."""
        return rows

    def keep(self, represented: Sequence[str]) -> None:
        """Leave out the tables, and features of tables, that representing these (of user and item) doesn't read. Those of a
        graph stay together, as each row is smoothed with others of both."""
        if self.uses_graph and represented:
            return
        features = {"item"} if "item" in represented or ("user" in represented and not self.is_product) else set()
        if "user" in represented:
            features |= {feature for table in self.tables for feature in table.features} - {"item"}
        kept = (replace(table, features=tuple(f for f in table.features if f in features)) for table in self.tables)
        self.tables = tuple(table for table in kept if table.features)
        if "history" not in features:
            self.history = 0

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of users and items [R, D] -> smoothed rows [R, D], here as they are; `multiply` is the product with the graph's
        matrix. Called where `uses_graph`."""
        return rows

    def auxiliary_loss(self, batch: Batch, vectors: Vectors, log_counts: Tensor, peers: Peers) -> Tensor | None:
        """float [b]: a loss of the model's own, which is added for every row, whatever its label; None for none.

        Args:
            log_counts: float [items], the logarithm of how many train rows an item has; -inf for unseen ones.
        """
        return None

    def squared_norms(self, vectors: Vectors) -> Tensor:
        """[n]: what `l2` holds small, the squared norms of a target's rows; of a history's, or negatives', rows their mean."""
        targets = vectors["item"]
        norms = values(targets).square().sum(1)
        for name, found in vectors.items():
            squares = values(found).square().sum(1)
            if name == "negative":
                norms = norms + squares.view(len(norms), len(squares) // max(1, len(norms))).mean(1)
            elif isinstance(found, Jagged) and not isinstance(targets, Jagged):
                norms = norms + Jagged(squares[:, None], found.lengths).sum()[:, 0] / found.lengths.clamp(min=1)
            elif name != "item" and not name.startswith((INITIAL, WHOLE)):
                norms = norms + squares
        return norms


def _of_seen(rows: Tensor, seen: Tensor | None) -> Tensor:
    """Zeros in the place of rows [b, D] that aren't seen, float [b]; None: all are, as those of a row to train on."""
    return rows if seen is None else rows * seen[:, None]


def values(found: Tensor | Jagged) -> Tensor:
    return found.values if isinstance(found, Jagged) else found


def places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of int64 [b] lengths -> bool [b, L], where there is a value (L is at least 1), and int64 [n], each value's place in
    its list."""
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    place = torch.arange(longest, device=lengths.device)
    there = place < lengths[:, None]
    return there, place.expand_as(there)[there]


def padded(values: Tensor, there: Tensor) -> Tensor:
    """Values of lists [n, ...] one after the other -> [b, L, ...], with zeros after a list's end."""
    out = values.new_zeros(there.numel(), *values.shape[1:])
    return out.index_copy_(0, there.flatten().nonzero()[:, 0], values).unflatten(0, there.shape)


def values_of(lists: Tensor, there: Tensor) -> Tensor:
    """The values that `padded` was given, of [b, L, ...]."""
    return lists.flatten(0, 1).index_select(0, there.flatten().nonzero()[:, 0])
