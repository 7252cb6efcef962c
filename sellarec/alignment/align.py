"""Stage align: collaborative training with contrastive alignment to the items' distilled vectors.

The projection of an item's collaborative row is drawn to the item's distilled vector and away from other items' vectors, and the
other way round (SeLLa-Rec, arXiv 2504.10107, section on semantic alignment). A user's vector may be drawn to the mean of the
distilled vectors of what the user liked, as RLMRec (arXiv 2310.15950) does with profiles of users.

Shapes: b rows of one worker, D columns of a collaborative row, H columns of a distilled vector.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.alignment.measures import compare_views
from sellarec.alignment.rows import LIKED, prepare
from sellarec.collab.model import CollabModel
from sellarec.collab.task import WEIGHTS, CollabTask, save_parts
from sellarec.config import Align
from sellarec.fusion.projection import Projection
from sellarec.training.stream import Prepare
from sellarec.training.table import Jagged, RowReader, Table
from sellarec.training.task import Batch, Peers, Task, Vectors

PROJECTION = "projection.safetensors"
"""File of the projection's weights in an artifact."""


class Aligned(nn.Module):
    """The collaborative model, and the projection D -> hidden -> H of what is aligned of it: its items' rows, its users'
    vectors (which are also what fusion makes tokens of)."""

    def __init__(self, network: CollabModel, projection: Projection, side: str) -> None:
        super().__init__()
        self.network, self.projection = network, projection
        self._sides = ("items", "users") if side == "both" else (side,)

    def forward(
        self, batch: Batch, vectors: Vectors, *candidates: Tensor
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """What the collaborative model gives, and by side what is aligned, projected: [b, H]."""
        users, scores = self.network(batch, vectors, *candidates)
        rows = {"items": vectors["item"], "users": users}
        return users, scores, {side: self.projection(rows[side]) for side in self._sides}


class AlignTask(Task):
    """The collaborative model's loss plus `weight` times the contrastive one, of items, of users, or the sum of both.

    Tables: those of the collaborative model, and semantic ([I, H], starting from the distilled vectors). For users the distilled
    vectors of the row's own history are looked up in it, so no row tells of what comes after it.
    """

    def __init__(
        self, collab: CollabTask, semantic: Table, projection: Projection, settings: Align, measured: np.ndarray
    ) -> None:
        self._collab, self.measured = collab, measured
        self.columns, self.prepare = collab.columns, collab.prepare
        if settings.side != "items":
            self.columns = tuple(dict.fromkeys([*collab.columns, "history"]))
            self.prepare = partial(prepare, settings.history, collab.prepare, "history" in collab.columns)
        self.tables, self.whole, self.graph = (*collab.tables, semantic), collab.whole, collab.graph
        self.model = Aligned(collab.network, projection, settings.side)
        self._settings = settings

    @property
    def prepare_to_score(self) -> Prepare | None:
        return self._collab.prepare_to_score

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return self._collab.propagate(rows, multiply)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch = self._collab.collate(rows, step)
        if step is not None and self._settings.side != "items":
            batch[LIKED] = Jagged.of(rows[LIKED])
        return batch

    def lookups(self, batch: Batch) -> Batch:
        found = self._collab.lookups(batch)
        if LIKED in batch:
            found[LIKED] = batch[LIKED]
        if LIKED not in batch or self._settings.side == "both":
            found["semantic"] = batch["item"]
        return found

    def targets(self, batch: Batch) -> Tensor:
        return self._collab.targets(batch)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        projected: dict[str, Tensor] = {}

        def network(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
            users, scores, found = model(*arguments)
            projected.update(found)
            return users, scores

        collab_vectors = {name: found for name, found in vectors.items() if name not in ("semantic", LIKED)}
        total = self._collab.loss(network, batch, collab_vectors, peers)
        for side, found in projected.items():
            weights = self._collab.row_weights(batch)
            if side == "items":
                semantic, ids = vectors["semantic"], batch["item"]
            else:
                liked = vectors[LIKED]
                # without a history there is nothing to be drawn to
                semantic, ids = liked.sum() / liked.lengths.clamp(min=1)[:, None], batch["user"]
                weights = weights * (liked.lengths > 0)
            views = Views.gather(found, semantic, ids, weights, peers)
            total = total + self._settings.weight * (contrastive_loss(views, self._settings) * weights).sum()
        return total

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return self._collab.score(lambda *arguments: model(*arguments)[:2], batch, vectors)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_parts(weights, {"projection.": folder / PROJECTION, "network.": folder / WEIGHTS})

    def measure(self, weights: dict[str, Tensor], vectors: dict[str, Tensor]) -> dict[str, Any]:
        """How the items' projected rows and distilled vectors lie to each other."""
        part = {
            name.removeprefix("projection."): value.to(vectors["item"].device)
            for name, value in weights.items()
            if name.startswith("projection.")
        }
        first, last = part["layers.0.weight"], part["layers.2.weight"]
        with torch.device("meta"):
            projection = Projection(first.shape[1], len(first), len(last))
        projection.load_state_dict(part, assign=True)
        return compare_views(projection(vectors["item"]), vectors["semantic"])

    def facts(self) -> dict[str, Any]:
        return self._collab.facts()


def build_align(
    collab: CollabTask, width: int, vectors: RowReader, dim: int, settings: Align, measured: np.ndarray
) -> AlignTask:
    """The task for a collaborative model.

    Args:
        width: H, columns of the distilled vectors.
        vectors: reads the distilled vectors.
        dim: D, columns of the collaborative rows.
        measured: int64 [n], the items by which the two spaces are compared before and after training.
    """
    items = next(table.rows for table in collab.tables if table.name == "item")
    features = ("semantic",) if settings.side == "items" else ("semantic", LIKED)
    semantic = Table("semantic", items, width, features, read=vectors, frozen=settings.semantic == "frozen")
    return AlignTask(collab, semantic, Projection(dim, settings.hidden, width), settings, measured)
