"""Stage align: collaborative training with contrastive alignment to the items' distilled vectors.

The projection of an item's collaborative row is drawn to the item's distilled vector and away from other items' vectors, and the
other way round (SeLLa-Rec, arXiv 2504.10107, section on semantic alignment). A user's vector may be drawn to the mean of the
distilled vectors of what the user liked, as RLMRec (arXiv 2310.15950) does with profiles of users. Of that, `rlmrec-con` projects
the distilled vector, and `rlmrec-gen` takes rows away before a graph smooths them, to have them told by their neighbours.

Shapes: b rows of one worker, D columns of a collaborative row, H columns of a distilled vector, K of both once one of them is
projected to the width of the other.
"""

from collections.abc import Callable, Mapping
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
from sellarec.data.keys import uniform
from sellarec.fusion.projection import Projection
from sellarec.training.stream import Prepare
from sellarec.training.table import Jagged, RowReader, Table
from sellarec.training.task import Batch, Peers, Task, Vectors

PROJECTION = "projection.safetensors"
"""File of the projection's weights in an artifact."""

MASKED = "masked "
"""Which rows' items, or users, are masked is found in a batch under this and the side: float [b], 1 or 0."""


class Aligned(nn.Module):
    """The collaborative model, and a projection that brings it and the distilled vectors together: D -> hidden -> H of its items'
    rows and its users' vectors (which are also what fusion makes tokens of), or H -> hidden -> D of distilled vectors."""

    def __init__(self, network: CollabModel, projection: Projection, projects_semantic: bool) -> None:
        super().__init__()
        self.network, self.projection, self.projects_semantic = network, projection, projects_semantic

    def forward(
        self, semantic: Mapping[str, Tensor], batch: Batch, vectors: Vectors, *candidates: Tensor
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """What the collaborative model gives, and by side what is projected of what is aligned, [b, K].

        Args:
            semantic: by side (items, users) the semantic vectors [b, H] of the rows; none to score.
        """
        users, scores = self.network(batch, vectors, *candidates)
        rows = {"items": vectors["item"], "users": users}
        sources = semantic if self.projects_semantic else rows
        return users, scores, {side: self.projection(sources[side]) for side in semantic}

    def views(self, rows: Tensor, semantic: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Collaborative vectors [b, D], semantic ones [b, H], and what is projected of them -> the two in one space, [b, K]."""
        return (rows, projected) if self.projects_semantic else (projected, semantic)


class AlignTask(Task):
    """The collaborative model's loss plus `weight` times the contrastive one, of items, of users, or the sum of both.

    Tables: those of the collaborative model, and semantic ([I, H], starting from the distilled vectors). For users the distilled
    vectors of the row's own history are looked up in it, so no row tells of what comes after it. To score, none are.

    With rlmrec-gen a share of users and items is masked at each step: their rows are zeros before they are smoothed over the
    graph (in its code a learned token, which starts as zeros), for the collaborative loss too. Only rows of masked items, or
    users, have the contrastive loss, whose mean over them is taken; the code's is over all masked nodes, whatever the batch has.
    """

    measured_features = ("item", "semantic")

    def __init__(
        self,
        collab: CollabTask,
        semantic: Table,
        projection: Projection,
        settings: Align,
        measured: np.ndarray,
        seed: int,
    ) -> None:
        self._collab, self.measured, self._seed = collab, measured, seed
        self._sides = ("items", "users") if settings.side == "both" else (settings.side,)
        self.columns, self.prepare = collab.columns, collab.prepare
        if settings.side != "items":
            self.columns = tuple(dict.fromkeys([*collab.columns, "history"]))
            self.prepare = partial(prepare, settings.history, collab.prepare, "history" in collab.columns)
        self.tables, self.whole, self.graph = (*collab.tables, semantic), collab.whole, collab.graph
        self.model = Aligned(collab.network, projection, settings.contrastive == "rlmrec-con")
        self._settings = settings

    @property
    def prepare_to_score(self) -> Prepare | None:
        return self._collab.prepare_to_score

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return self._collab.propagate(rows, multiply)

    def mask(self, rows: Tensor, nodes: Tensor, step: int) -> Tensor:
        if self._settings.contrastive != "rlmrec-gen":
            return rows
        return rows * (1 - self._masked(nodes, step))[:, None]

    def _masked(self, nodes: Tensor, step: int) -> Tensor:
        """float32 [n]: which of the graph's nodes are masked at a step, 1 or 0."""
        drawn = uniform(nodes.cpu().numpy(), self._seed, step) < self._settings.mask_share
        return torch.from_numpy(drawn.astype(np.float32)).to(nodes.device)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch = self._collab.collate(rows, step)
        if step is None:
            return batch
        if "users" in self._sides:
            batch[LIKED] = Jagged.of(rows[LIKED])
        if "items" in self._sides:
            batch["semantic"] = batch["item"]
        if self._settings.contrastive == "rlmrec-gen":
            assert self.graph is not None
            nodes = {"items": self.graph.users + batch["item"], "users": batch["user"]}
            batch |= {MASKED + side: self._masked(nodes[side], step) for side in self._sides}
        return batch

    def lookups(self, batch: Batch) -> Batch:
        return {name: batch[name] for table in self.tables for name in table.features if name in batch}

    def targets(self, batch: Batch) -> Tensor:
        return self._collab.targets(batch)

    def loss(self, model: nn.Module, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        semantic: dict[str, Tensor] = {}
        if "items" in self._sides:
            semantic["items"] = vectors["semantic"]
        if "users" in self._sides:
            liked = vectors[LIKED]
            semantic["users"] = liked.sum() / liked.lengths.clamp(min=1)[:, None]
        aligned: dict[str, tuple[Tensor, Tensor]] = {}

        def network(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
            users, scores, projected = model(semantic, *arguments)
            rows = {"items": vectors["item"], "users": users}
            aligned.update({side: self.model.views(rows[side], semantic[side], projected[side]) for side in semantic})
            return users, scores

        collab_vectors = {name: found for name, found in vectors.items() if name not in ("semantic", LIKED)}
        total = self._collab.loss(network, batch, collab_vectors, peers)
        for side, found in aligned.items():
            weights = self._collab.row_weights(batch)
            if side == "users":  # without a history there is nothing to be drawn to
                weights = weights * (vectors[LIKED].lengths > 0)
            scale: float | Tensor = self._settings.weight
            if self._settings.contrastive == "rlmrec-gen":
                weights = weights * batch[MASKED + side]
                # the loop divides by all targets, here the mean is of those that are masked
                scale = scale * peers.add(self.targets(batch)) / peers.add(weights.sum()).clamp(min=1)
            ids = batch["item" if side == "items" else "user"]
            views = Views.gather(*found, ids, weights, peers)
            total = total + scale * (contrastive_loss(views, self._settings) * weights).sum()
        return total

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return self._collab.score(lambda *arguments: model({}, *arguments)[:2], batch, vectors)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_parts(weights, {"projection.": folder / PROJECTION, "network.": folder / WEIGHTS})

    def measure(self, weights: dict[str, Tensor], vectors: dict[str, Tensor]) -> dict[str, Any]:
        """How the items' rows and distilled vectors lie to each other, of which one is projected."""
        part = {
            name.removeprefix("projection."): value.to(vectors["item"].device)
            for name, value in weights.items()
            if name.startswith("projection.")
        }
        first, last = part["layers.0.weight"], part["layers.2.weight"]
        with torch.device("meta"):
            projection = Projection(first.shape[1], len(first), len(last))
        projection.load_state_dict(part, assign=True)
        item, semantic = vectors["item"], vectors["semantic"]
        projected = projection(semantic if self.model.projects_semantic else item)
        return compare_views(*self.model.views(item, semantic, projected))

    def facts(self) -> dict[str, Any]:
        return self._collab.facts()


def build_align(
    collab: CollabTask, width: int, vectors: RowReader, dim: int, settings: Align, measured: np.ndarray, seed: int
) -> AlignTask:
    """The task for a collaborative model.

    Args:
        width: H, columns of the distilled vectors.
        vectors: reads the distilled vectors.
        dim: D, columns of the collaborative rows.
        measured: int64 [n], the items by which the two spaces are compared before and after training.
        seed: of the masked users and items.
    """
    items = next(table.rows for table in collab.tables if table.name == "item")
    features = ("semantic",) if settings.side == "items" else ("semantic", LIKED)
    semantic = Table("semantic", items, width, features, read=vectors, frozen=settings.semantic == "frozen")
    ends = (width, dim) if settings.contrastive == "rlmrec-con" else (dim, width)
    projection = Projection(ends[0], settings.hidden, ends[1])
    return AlignTask(collab, semantic, projection, settings, measured, seed)
