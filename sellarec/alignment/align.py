"""Stage align: collaborative training with bidirectional contrastive alignment to the items' distilled vectors.

The projection of an item's collaborative row is drawn to the item's distilled vector and away from other items' vectors,
and the other way round; gradients reach both tables (SeLLa-Rec, arXiv 2504.10107, section on semantic alignment).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.collab.model import CollabModel
from sellarec.collab.task import WEIGHTS, CollabTask, save_parts
from sellarec.config import Align
from sellarec.fusion.projection import Projection
from sellarec.training.stream import Prepare
from sellarec.training.table import RowReader, Table
from sellarec.training.task import Batch, Peers, Task, Vectors

PROJECTION = "projection.safetensors"
"""File of the projection's weights in an artifact."""


class Aligned(nn.Module):
    """The collaborative model, and the projection D -> hidden -> H of its items' rows."""

    def __init__(self, network: CollabModel, projection: Projection) -> None:
        super().__init__()
        self.network, self.projection = network, projection

    def forward(self, batch: Batch, vectors: Vectors, *candidates: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """What the collaborative model gives, and the rows' items projected, [b, H]."""
        return *self.network(batch, vectors, *candidates), self.projection(vectors["item"])


class AlignTask(Task):
    """The collaborative model's loss plus `weight` times the contrastive one.

    Tables: those of the collaborative model, and semantic ([I, H], starting from the distilled vectors).
    """

    def __init__(self, collab: CollabTask, semantic: Table, projection: Projection, settings: Align) -> None:
        self._collab = collab
        self.columns, self.prepare = collab.columns, collab.prepare
        self.tables, self.whole, self.graph = (*collab.tables, semantic), collab.whole, collab.graph
        self.model = Aligned(collab.network, projection)
        self._settings = settings

    @property
    def prepare_to_score(self) -> Prepare | None:
        return self._collab.prepare_to_score

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return self._collab.propagate(rows, multiply)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        return self._collab.collate(rows, step)

    def lookups(self, batch: Batch) -> Batch:
        return {**self._collab.lookups(batch), "semantic": batch["item"]}

    def targets(self, batch: Batch) -> Tensor:
        return self._collab.targets(batch)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        projected: list[Tensor] = []

        def network(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
            users, scores, found = model(*arguments)
            projected.append(found)
            return users, scores

        collab_vectors = {name: found for name, found in vectors.items() if name != "semantic"}
        collab = self._collab.loss(network, batch, collab_vectors, peers)
        (item,), weights = projected, self._collab.row_weights(batch)
        views = Views.gather(item, vectors["semantic"], batch["item"], weights, peers)
        contrastive = contrastive_loss(views, self._settings)
        return collab + self._settings.weight * (contrastive * weights).sum()

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return self._collab.score(lambda *arguments: model(*arguments)[:2], batch, vectors)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_parts(weights, {"projection.": folder / PROJECTION, "network.": folder / WEIGHTS})

    def facts(self) -> dict[str, Any]:
        return self._collab.facts()


def build_align(collab: CollabTask, width: int, vectors: RowReader, dim: int, settings: Align) -> AlignTask:
    """The task for a collaborative model.

    Args:
        width: H, columns of the distilled vectors.
        vectors: reads the distilled vectors.
        dim: D, columns of the collaborative rows.
    """
    items = next(table.rows for table in collab.tables if table.name == "item")
    semantic = Table("semantic", items, width, ("semantic",), read=vectors)
    return AlignTask(collab, semantic, Projection(dim, settings.hidden, width), settings)
