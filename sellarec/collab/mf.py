"""Stage collab: matrix factorisation with biases (Koren et al., 2009), trained on labels with the logistic loss.

Shapes: b rows, D columns of a row, of which the last is the bias.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.config import Collab
from sellarec.training.tables import Table
from sellarec.training.task import Batch, Gather


def mf_score(user: Tensor, item: Tensor, log_odds: float) -> Tensor:
    """log_odds + <u, i> + b_u + b_i: float [b] from rows [b, D] whose last column is the bias."""
    return log_odds + (user[:, :-1] * item[:, :-1]).sum(1) + user[:, -1] + item[:, -1]


class MatrixFactorization:
    """Scores of (user, item). A user or item that isn't in the train split counts as a row of zeros.

    Args:
        tables: the user and the item table.
        positive_rate: share of positives among the training rows; its log-odds are the constant of the score.
        l2: weight of half the squared norm of a row's two vectors in its loss.
    """

    columns = ("row", "user", "item", "label", "user_seen", "item_seen")
    prepare = None
    model = None
    blocks = ()

    def __init__(self, tables: tuple[Table, ...], positive_rate: float, l2: float) -> None:
        self.tables = tables
        self._log_odds = math.log(positive_rate / (1 - positive_rate))
        self._l2 = l2

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        return {
            "user": torch.from_numpy(rows["user"].to_numpy().copy()),
            "item": torch.from_numpy(rows["item"].to_numpy().copy()),
            "user_seen": _float(rows["user_seen"]),
            "item_seen": _float(rows["item_seen"]),
            "label": _float(rows["label"]),
            "weight": _float(rows["weight"]),
        }

    def lookups(self, batch: Batch) -> dict[str, Tensor]:
        return {"user": batch["user"], "item": batch["item"]}

    def targets(self, batch: Batch) -> Tensor:
        return batch["weight"].sum()

    def loss(self, model: nn.Module | None, batch: Batch, vectors: dict[str, Tensor], gather: Gather) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(self.score(model, batch, vectors), batch["label"], reduction="none")
        norms = vectors["user"].square().sum(1) + vectors["item"].square().sum(1)
        return ((losses + 0.5 * self._l2 * norms) * batch["weight"]).sum()

    def score(self, model: nn.Module | None, batch: Batch, vectors: dict[str, Tensor]) -> Tensor:
        user = vectors["user"] * batch["user_seen"][:, None]
        item = vectors["item"] * batch["item_seen"][:, None]
        return mf_score(user, item, self._log_odds)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        raise TypeError("matrix factorisation has no dense weights")

    def facts(self) -> dict[str, Any]:
        return {"log_odds": self._log_odds}


def _float(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.float32))


def build_collab(users: int, items: int, positive_rate: float, settings: Collab) -> MatrixFactorization:
    """A fresh model for a prepared log's sizes."""
    user = Table("user", users, settings.dim, ("user",), init_std=settings.init_std)
    item = Table("item", items, settings.dim, ("item",), init_std=settings.init_std)
    return MatrixFactorization((user, item), positive_rate, settings.l2)
