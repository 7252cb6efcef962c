"""Stage align: collaborative training with bidirectional contrastive alignment to the items' distilled vectors.

The projection of an item's collaborative row is drawn to the item's distilled vector and away from other items' vectors,
and the other way round; gradients reach both tables (SeLLa-Rec, arXiv 2504.10107, section on semantic alignment).
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.torch import save_file
from torch import Tensor, nn

from sellarec.alignment.contrastive import symmetric_info_nce
from sellarec.collab.mf import MatrixFactorization
from sellarec.config import Align
from sellarec.fusion.projection import Projection
from sellarec.training.tables import RowReader, Table
from sellarec.training.task import Batch, Gather, Vectors


class AlignTask:
    """The collaborative model's loss plus `weight` times the contrastive one.

    Tables: those of the collaborative model, and semantic ([I, H], starting from the distilled vectors).
    Dense: the projection D -> hidden -> H.
    """

    def __init__(self, collab: MatrixFactorization, semantic: Table, projection: Projection, settings: Align) -> None:
        self._collab = collab
        self.columns, self.prepare = collab.columns, collab.prepare
        self.tables = (*collab.tables, semantic)
        self.model = projection
        self.blocks = ()
        self._weight, self._temperature = settings.weight, settings.temperature

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        return self._collab.collate(rows, step)

    def lookups(self, batch: Batch) -> dict[str, Tensor]:
        return {**self._collab.lookups(batch), "semantic": batch["item"]}

    def targets(self, batch: Batch) -> Tensor:
        return self._collab.targets(batch)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, gather: Gather) -> Tensor:
        collab = self._collab.loss(None, batch, vectors, gather)
        projected, semantic, weights = model(vectors["item"]), vectors["semantic"], self._collab.row_weights(batch)
        contrastive = symmetric_info_nce(
            projected, semantic, batch["item"], gather(projected), gather(semantic), gather(batch["item"]),
            gather(weights), self._temperature,
        )  # fmt: skip
        return collab + self._weight * (contrastive * weights).sum()

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return self._collab.score(None, batch, vectors)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, folder / "projection.safetensors")

    def facts(self) -> dict[str, Any]:
        return self._collab.facts()


def build_align(collab: MatrixFactorization, width: int, vectors: RowReader, dim: int, settings: Align) -> AlignTask:
    """The task for a collaborative model.

    Args:
        width: H, columns of the distilled vectors.
        vectors: reads the distilled vectors.
        dim: D, columns of the collaborative rows.
    """
    items = next(table.rows for table in collab.tables if table.name == "item")
    semantic = Table("semantic", items, width, ("semantic",), read=vectors)
    return AlignTask(collab, semantic, Projection(dim, settings.hidden, width), settings)
