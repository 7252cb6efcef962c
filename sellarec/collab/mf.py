"""Matrix factorisation with biases (Koren et al., 2009), and with the user's history (SVD++; Koren, 2008).

Shapes: b rows, D columns of a row, of which the last is the bias, N sampled negatives of a row, B rows of all workers.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab.losses import bpr, sampled_softmax
from sellarec.collab.negatives import Negatives
from sellarec.config import Collab
from sellarec.training.tables import Jagged, RowReader, Table
from sellarec.training.task import Batch, Gather, Vectors


def mf_score(user: Tensor, item: Tensor, log_odds: float) -> Tensor:
    """log_odds + <u, i> + b_u + b_i: float [..., b] from rows [..., b, D] whose last column is the bias."""
    return log_odds + (user[..., :-1] * item[..., :-1]).sum(-1) + user[..., -1] + item[..., -1]


class MatrixFactorization:
    """Scores of (user, item). A user or item that isn't in the train split counts as a row of zeros.

    With a table `history`, a user's row is added to by those of the n items in the row's history, their sum over the root
    of n; so an unseen user with a history isn't zero.

    Args:
        tables: the user and the item table, and for SVD++ the history table.
        positive_rate: share of positives among the training rows; its log-odds are the constant of the score.
        negatives: what draws them, for a ranking loss.
    """

    model = None
    blocks = ()

    def __init__(
        self, tables: tuple[Table, ...], positive_rate: float, settings: Collab, negatives: Negatives | None = None
    ) -> None:
        self.tables = tables
        self._log_odds = math.log(positive_rate / (1 - positive_rate))
        self._settings = settings
        self._has_history = any(table.name == "history" for table in tables)
        self._draws = any("negative" in table.features for table in tables)
        self.prepare = partial(negatives.prepare, keep_history=self._has_history) if negatives else None
        reads_history = self._has_history or self._draws
        self.columns = ("row", "user", "item", "label", "user_seen", "item_seen", *["history"] * reads_history)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch: Batch = {name: torch.from_numpy(rows[name].to_numpy().copy()) for name in ("user", "item")}
        batch |= {name: _float(rows[name]) for name in ("user_seen", "item_seen", "label", "weight")}
        if self._has_history:
            batch["history"] = Jagged.of(rows["history"])
        if self._draws and step is None:
            batch["negative"] = torch.zeros(len(rows), 0, dtype=torch.int64)
        elif self._draws:
            batch["negative"] = Jagged.of(rows["negative"]).values.reshape(len(rows), -1)
            batch["negative_log_q"] = Jagged.of(rows["negative_log_q"]).values.reshape(len(rows), -1)
        if self.prepare is not None and step is not None:
            batch["log_q"] = _float(rows["log_q"])
        return batch

    def lookups(self, batch: Batch) -> Batch:
        return {name: batch[name] for table in self.tables for name in table.features}

    def row_weights(self, batch: Batch) -> Tensor:
        """float [b]: 1 for rows that have a loss; a ranking loss takes positives alone."""
        return batch["weight"] if self._settings.loss == "bce" else batch["weight"] * batch["label"]

    def targets(self, batch: Batch) -> Tensor:
        return self.row_weights(batch).sum()

    def represent(self, batch: Batch, vectors: Vectors) -> tuple[Tensor, Tensor]:
        """User and item as the model sees them, float [b, D] each: unseen ones are zeros, a history is added."""
        user = vectors["user"] * batch["user_seen"][:, None]
        if self._has_history:
            history = vectors["history"]
            user = user + history.sum() / history.lengths.clamp(min=1).sqrt()[:, None]
        return user, vectors["item"] * batch["item_seen"][:, None]

    def loss(self, model: nn.Module | None, batch: Batch, vectors: Vectors, gather: Gather) -> Tensor:
        user, item = self.represent(batch, vectors)
        score, weights = mf_score(user, item, self._log_odds), self.row_weights(batch)
        norms = vectors["user"].square().sum(1) + vectors["item"].square().sum(1)
        if self._has_history:
            history = vectors["history"]
            squares = Jagged(history.values.square(), history.lengths).sum().sum(1)
            norms = norms + squares / history.lengths.clamp(min=1)
        if self._settings.loss == "bce":
            losses = F.binary_cross_entropy_with_logits(score, batch["label"], reduction="none")
        elif self._draws:
            counts = batch["negative_log_q"].isfinite()
            squares = (vectors["negative"].square().sum(2) * counts).sum(1)
            norms = norms + squares / counts.sum(1).clamp(min=1)
            negative = mf_score(user[:, None], vectors["negative"], self._log_odds)
            losses = self._ranking_loss(score, negative, counts, batch["log_q"], batch["negative_log_q"])
        else:
            # the items of other users' positives on all workers; [b, B], without a [b, B, D] in between
            others = gather(item)
            negative = user[:, :-1] @ others[:, :-1].T + others[:, -1] + user[:, -1:] + self._log_odds
            same_item = batch["item"][:, None] == gather(batch["item"])
            same_user = batch["user"][:, None] == gather(batch["user"])
            counts = ~same_item & ~same_user & (gather(weights) > 0)
            log_q = gather(batch["log_q"]).expand_as(negative)
            losses = self._ranking_loss(score, negative, counts, batch["log_q"], log_q)
        return ((losses + 0.5 * self._settings.l2 * norms) * weights).sum()

    def _ranking_loss(
        self, score: Tensor, negative: Tensor, counts: Tensor, log_q: Tensor, negative_log_q: Tensor
    ) -> Tensor:
        if self._settings.loss == "bpr":
            return bpr(score, negative, counts)
        return sampled_softmax(score, negative, counts, log_q, negative_log_q)

    def score(self, model: nn.Module | None, batch: Batch, vectors: Vectors) -> Tensor:
        return mf_score(*self.represent(batch, vectors), self._log_odds)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        raise TypeError("matrix factorisation has no dense weights")

    def facts(self) -> dict[str, Any]:
        return {"log_odds": self._log_odds}


def _float(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.float32))


def table_names(settings: Collab) -> tuple[str, ...]:
    """The tables of a model."""
    return ("user", "item", "history") if settings.model == "svd++" else ("user", "item")


def build_collab(
    users: int,
    items: int,
    positive_rate: float,
    settings: Collab,
    start: Mapping[str, RowReader],
    counts: Path | None = None,
    seed: int = 0,
) -> MatrixFactorization:
    """A model for a prepared log's sizes.

    Args:
        start: by table, where its rows start from; a table that isn't there starts from fresh rows.
        counts: file of `sellarec.data.log.item_counts`: needed to train with negatives.
        seed: of the drawn negatives.
    """
    negatives = None
    if counts is not None:
        negatives = Negatives(settings.negatives, np.load(counts), settings.negatives_per_row, seed)
    drawn = negatives is not None and settings.negatives != "in-batch"
    tables = tuple(
        Table(
            name,
            users if name == "user" else items,
            settings.dim,
            ("item", "negative") if name == "item" and drawn else (name,),
            # what a history adds is learnt from nothing: an item that no training history holds adds nothing
            init_std=0.0 if name == "history" else settings.init_std,
            read=start.get(name),
        )
        for name in table_names(settings)
    )
    return MatrixFactorization(tables, positive_rate, settings, negatives)
