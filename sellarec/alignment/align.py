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
from sellarec.config import Align, Collab
from sellarec.fusion.projection import Projection
from sellarec.training.tables import RowReader, Table
from sellarec.training.task import Batch, Gather


class AlignTask:
    """The collaborative model's loss plus `weight` times the contrastive one.

    Tables: user and item (collaborative, [U, D], [I, D]) and semantic ([I, H], starting from the distilled vectors).
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
        return batch["weight"].sum()

    def loss(self, model: nn.Module, batch: Batch, vectors: dict[str, Tensor], gather: Gather) -> Tensor:
        collab = self._collab.loss(None, batch, vectors, gather)
        projected, semantic = model(vectors["item"]), vectors["semantic"]
        contrastive = symmetric_info_nce(
            projected, semantic, batch["item"], gather(projected), gather(semantic), gather(batch["item"]),
            gather(batch["weight"]), self._temperature,
        )  # fmt: skip
        return collab + self._weight * (contrastive * batch["weight"]).sum()

    def score(self, model: nn.Module, batch: Batch, vectors: dict[str, Tensor]) -> Tensor:
        return self._collab.score(None, batch, vectors)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, folder / "projection.safetensors")

    def facts(self) -> dict[str, Any]:
        return self._collab.facts()


def build_align(
    sizes: tuple[int, int],
    positive_rate: float,
    width: int,
    vectors: RowReader,
    start: dict[str, RowReader | None],
    collab: Collab,
    settings: Align,
) -> AlignTask:
    """The task for a prepared log.

    Args:
        sizes: users and items.
        width: H, columns of the distilled vectors.
        vectors: reads the distilled vectors.
        start: by table (user, item), where its rows start from; None for fresh rows.
    """  # fmt: skip
    users, items = sizes
    tables = tuple(
        Table(name, rows, collab.dim, (name,), init_std=collab.init_std, read=start[name])
        for name, rows in (("user", users), ("item", items))
    )
    semantic = Table("semantic", items, width, ("semantic",), read=vectors)
    model = MatrixFactorization(tables, positive_rate, collab.l2)
    return AlignTask(model, semantic, Projection(collab.dim, settings.hidden, width), settings)
