"""Stage align: collaborative training with contrastive alignment to the items' distilled vectors.

The projection of an item's collaborative row is drawn to the item's distilled vector and away from other items' vectors, and the
other way round (SeLLa-Rec, arXiv 2504.10107, section on semantic alignment). A user's vector may be drawn to the mean of the
distilled vectors of what the user liked, or, as RLMRec (arXiv 2310.15950) does it, to that of a profile of the user. Of RLMRec,
`rlmrec-con` projects the distilled vector, and `rlmrec-gen` takes rows away before a graph smooths them, to have them told by
their neighbours. `darec` aligns the structure of what both sides share (`disentangled.py`).

Shapes: b rows of one worker, D columns of a collaborative row, H columns of a distilled vector, K of both once one of them is
projected to the width of the other.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from sellarec.alignment.contrastive import Views, contrastive_loss
from sellarec.alignment.disentangled import Disentangling, Parts, disentangled_loss
from sellarec.alignment.measures import compare_views
from sellarec.alignment.rows import LIKED, last_liked, prepare
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

DRAWN = "drawn "
"""Under this and the side, a number that is drawn for each row's item, or user, at the step: float64 [b]."""


class Aligned(nn.Module):
    """The collaborative model, and what brings its items and users, as it represents them, together with distilled vectors: a
    projection D -> hidden -> H of the former (of which fusion also makes tokens), with rlmrec-con one H -> hidden -> D of the
    latter, with darec a shared and a specific part of either."""

    def __init__(self, network: CollabModel, projection: Projection | Disentangling, contrastive: str) -> None:
        super().__init__()
        self.network, self.projection, self._contrastive = network, projection, contrastive

    def forward(
        self, semantic: Mapping[str, Tensor], batch: Batch, vectors: Vectors, *candidates: Tensor
    ) -> tuple[Tensor, list[Tensor], dict[str, tuple[Tensor, ...]]]:
        """What the collaborative model gives, and by side what is aligned.

        Args:
            semantic: by side (items, users) the semantic vectors [b, H] of the rows; none to score.
        """
        users, scores = self.network(batch, vectors, *candidates)
        rows, found = {"items": vectors["item"], "users": users}, {}
        for side in semantic:
            represented = self.network.as_represented(side, rows[side])
            found[side] = views(self.projection, self._contrastive, represented, semantic[side])
        return users, scores, found


def views(projection: nn.Module, contrastive: str, rows: Tensor, semantic: Tensor) -> tuple[Tensor, ...]:
    """Collaborative vectors [b, D] and semantic ones [b, H] -> what is drawn together of them in one space, [b, K] each; with
    darec that is their shared parts, and after them come the specific ones."""
    if contrastive == "darec":
        return projection(rows, semantic)
    return (rows, projection(semantic)) if contrastive == "rlmrec-con" else (projection(rows), semantic)


class AlignTask(Task):
    """The collaborative model's loss plus `weight` times the contrastive one, of items, of users, or the sum of both.

    Tables: those of the collaborative model, and semantic ([I, H], starting from the distilled vectors). For users the distilled
    vectors of the row's own history are looked up in it, so no row tells of what comes after it; or, with `profiles`, those of
    their profiles in a table of their own (profile, [U, H]), which tell of all that the user liked in train. To score, none are.

    With rlmrec-gen a share of users and items is masked at each step: their rows are zeros before they are smoothed over the
    graph (in its code a learned token, which starts as zeros), for the collaborative loss too. Only rows of masked items, or
    users, have the contrastive loss, whose mean over them is taken; the code's is over all masked nodes, whatever the batch has.
    With darec the term is one of the whole batch too.
    """

    measured_features = ("item", "semantic")

    def __init__(
        self,
        collab: CollabTask,
        semantic: Table,
        make_projection: Callable[[], Projection | Disentangling],
        settings: Align,
        measured: np.ndarray,
        seed: int,
        profiles: Table | None = None,
        measured_rows: pa.Table | None = None,
    ) -> None:
        self._collab, self.measured, self._seed = collab, measured, seed
        self.measured_rows = measured_rows
        self._sides = ("items", "users") if settings.side == "both" else (settings.side,)
        self._has_profiles = profiles is not None
        self.columns, self.prepare = collab.columns, collab.prepare
        if settings.side != "items" and not self._has_profiles:
            self.columns = tuple(dict.fromkeys([*collab.columns, "history"]))
            self.prepare = partial(prepare, settings.history, collab.prepare, "history" in collab.columns)
        tables = (semantic,) if profiles is None else (semantic, profiles)
        self.tables, self.whole, self.graph = (*collab.tables, *tables), collab.whole, collab.graph
        self.model = Aligned(collab.network, make_projection(), settings.contrastive)
        self._make_projection, self._settings = make_projection, settings

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
        if self._has_profiles:
            batch["profile"] = batch["user"]
        elif "users" in self._sides:
            batch[LIKED] = Jagged.of(rows[LIKED])
        if "items" in self._sides:
            batch["semantic"] = batch["item"]
        if self._settings.contrastive == "darec":
            ids = {"items": batch["item"], "users": batch["user"]}
            batch |= {
                DRAWN + side: torch.from_numpy(uniform(ids[side].numpy(), self._seed, step)) for side in self._sides
            }
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
            semantic["users"], has_vector = self._semantic_of_users(vectors)
        aligned: dict[str, tuple[Tensor, ...]] = {}

        def network(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
            users, scores, found = model(semantic, *arguments)
            aligned.update(found)
            return users, scores

        collab_vectors = {name: found for name, found in vectors.items() if name not in ("semantic", "profile", LIKED)}
        total, kind = self._collab.loss(network, batch, collab_vectors, peers), self._settings.contrastive
        for side, found in aligned.items():
            weights = self._collab.row_weights(batch)
            if side == "users":  # without what was liked there is nothing to be drawn to
                weights = weights * has_vector
            if kind == "rlmrec-gen":
                weights = weights * batch[MASKED + side]
            scale: float | Tensor = self._settings.weight
            if kind in ("rlmrec-gen", "darec"):
                # the loop divides by all targets, here the mean is of those that have the term
                scale = scale * peers.add(self.targets(batch)) / peers.add(weights.sum()).clamp(min=1)
            ids = batch["item" if side == "items" else "user"]
            if kind == "darec":
                losses = disentangled_loss(Parts(*found), ids, weights, batch[DRAWN + side], peers, self._settings)
            else:
                left, right = found
                losses = contrastive_loss(
                    Views.gather(left, right, ids, weights, self._settings, peers), self._settings, peers
                )
            total = total + scale * (losses * weights).sum()
        return total

    def _semantic_of_users(self, vectors: Vectors) -> tuple[Tensor, Tensor]:
        """[b, H], what the rows' users are drawn to, and bool [b], whether there is something."""
        if self._has_profiles:
            profile = vectors["profile"]
            return profile, (profile.detach() != 0).any(1)  # a user without a profile has zeros
        liked = vectors[LIKED]
        return liked.sum() / liked.lengths.clamp(min=1)[:, None], liked.lengths > 0

    def score(self, model: nn.Module, batch: Batch, vectors: Vectors) -> Tensor:
        return self._collab.score(lambda *arguments: model({}, *arguments)[:2], batch, vectors)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_parts(weights, {"projection.": folder / PROJECTION, "network.": folder / WEIGHTS})

    def collate_measured(self, rows: pa.Table) -> Batch:
        prepare = self.prepare_to_score
        prepared = rows if prepare is None else prepare(rows, 0, np.zeros(len(rows), np.int64))
        batch = self._collab.collate(prepared.append_column("weight", pa.array(np.ones(len(rows), np.float32))), None)
        if self._has_profiles:
            batch["profile"] = batch["user"]
        else:
            batch[LIKED] = Jagged.of(last_liked(rows, self._settings.history))
        return batch

    def views_of_users(self, model: nn.Module, batch: Batch, vectors: Vectors) -> tuple[Tensor, ...]:
        semantic, _ = self._semantic_of_users(vectors)
        item = self._collab.network.item(batch, vectors)[:, None]
        _, _, found = model({"users": semantic}, batch, vectors, item)
        return found["users"][:2]  # with darec the shared parts

    def measure(
        self, weights: dict[str, Tensor], vectors: dict[str, Tensor], users: Sequence[Tensor] | None
    ) -> dict[str, Any]:
        """How the items' rows and distilled vectors lie to each other, as they are aligned; and under `users`, where those are
        aligned, how their vectors and what these are drawn to do."""
        part = {
            name.removeprefix("projection."): value.to(vectors["item"].device)
            for name, value in weights.items()
            if name.startswith("projection.")
        }
        with torch.device("meta"):
            projection = self._make_projection()
        projection.load_state_dict(part, assign=True)
        items = self._collab.network.as_represented("items", vectors["item"])
        found: dict[str, Any] = compare_views(
            *views(projection, self._settings.contrastive, items, vectors["semantic"])[:2]
        )
        if users is None:
            return found
        return found | {"users": compare_views(*users)}

    def facts(self) -> dict[str, Any]:
        return self._collab.facts()


def build_align(
    collab: CollabTask,
    width: int,
    vectors: RowReader,
    dim: int,
    settings: Align,
    measured: np.ndarray,
    seed: int,
    profiles: RowReader | None = None,
    measured_rows: Path | None = None,
) -> AlignTask:
    """The task for a collaborative model.

    Args:
        width: H, columns of the distilled vectors.
        vectors: reads the distilled vectors.
        dim: D, columns of the collaborative rows.
        measured: int64 [n], the items by which the two spaces are compared before and after training.
        seed: of the masked users and items, and of those that centres start as.
        profiles: reads the vectors of users' profiles; None where users, if any, are aligned to what they liked.
        measured_rows: Parquet file of the rows by whose users the two spaces are compared too; None where users aren't aligned.
    """
    rows = {table.name: table.rows for table in collab.tables}
    features = ("semantic",) if settings.side == "items" or profiles is not None else ("semantic", LIKED)
    frozen = settings.semantic == "frozen"
    semantic = Table("semantic", rows["item"], width, features, read=vectors, frozen=frozen)
    of_users = None
    if profiles is not None:
        of_users = Table("profile", rows["user"], width, ("profile",), read=profiles, frozen=frozen)
    ends = (width, dim) if settings.contrastive == "rlmrec-con" else (dim, width)
    kind = Disentangling if settings.contrastive == "darec" else Projection
    make = partial(kind, ends[0], settings.hidden, ends[1], settings.layers)
    rows_of_users = None if measured_rows is None else pq.read_table(measured_rows)
    return AlignTask(collab, semantic, make, settings, measured, seed, of_users, rows_of_users)
