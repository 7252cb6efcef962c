"""A collaborative model as the training loop takes it: rows to tensors, and the loss.

Shapes: b rows of a worker's slice, n targets (the rows, or all positions of b sequences), N negatives of a target, D columns
of a row, B targets of all workers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sellarec.collab import unseen
from sellarec.collab.losses import bpr, full_softmax, sampled_softmax, shared_softmax, softmax_among
from sellarec.collab.model import CollabModel, Sizes, values
from sellarec.collab.negatives import Negatives
from sellarec.collab.rows import Rows
from sellarec.config import SAMPLED, Collab
from sellarec.data.log import Log
from sellarec.errors import UserError
from sellarec.pairs import Alike
from sellarec.training.stream import Prepare
from sellarec.training.table import Jagged, saved_rows
from sellarec.training.task import WHOLE, Batch, Graph, Peers, Task, Vectors

WEIGHTS = "collab.safetensors"
"""File of a model's dense weights in an artifact."""

Network = Callable[..., tuple[Tensor, list[Tensor]]]
"""A model of `sellarec.collab.models`, or what stands for it: (batch, vectors, *candidates) -> users, scores."""


class CollabTask(Task):
    """Trains and scores a model of `sellarec.collab.models`.

    Args:
        network: the model.
        seen: bool [items], which items the train split has: others are left out of histories and of the full softmax.
        negatives: what draws them; None for a loss that takes none, and where the model is only scored with.
        graph: where the graph is read from, for a model that smooths its rows over it.
        counts: int64 [items], each item's train rows, to train a model that `reads_catalog`.
    """

    def __init__(
        self,
        network: CollabModel,
        settings: Collab,
        seen: np.ndarray,
        negatives: Negatives | None = None,
        graph: Graph | None = None,
        counts: np.ndarray | None = None,
    ) -> None:
        self.network, self._settings = network, settings
        self.model: nn.Module | None = network if network.has_weights else None
        self._sequences = settings.train_on == "sequences"
        self._has_negatives = negatives is not None
        self._draws = negatives is not None and settings.negatives != "in-batch"
        self._draws_own = self._draws and not settings.shared_negatives
        self._corrects = self._draws_own and settings.loss == "softmax" and settings.log_q
        self._seen = torch.from_numpy(seen)
        self._log_counts = torch.zeros(0) if counts is None else torch.from_numpy(counts).float().log()
        self.whole = ("item",) if settings.loss == "full-softmax" or network.reads_catalog else ()
        more = [*["negative"] * self._draws, *(WHOLE + name for name in self.whole)]
        self.tables = tuple(
            replace(table, features=(*table.features, *more)) if table.name == "item" else table
            for table in network.tables
        )
        self.graph = graph
        to_train = Rows(network.history, seen, self._sequences, negatives, self._corrects)
        to_score = Rows(network.history, seen)
        self.prepare = to_train.prepare if self._sequences or negatives or network.history else None
        self._prepare_to_score = to_score.prepare if network.history or self._draws else None
        history = ["history"] * bool(network.history or self._draws)
        self.columns = ("row", "user", "item", "label", "user_seen", "item_seen", *history)

    @property
    def prepare_to_score(self) -> Prepare | None:
        return self._prepare_to_score

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        return self.network.propagate(rows, multiply)

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        batch: Batch = {name: torch.from_numpy(rows[name].to_numpy().copy()) for name in ("user", "item")}
        batch |= {name: _float(rows[name]) for name in ("label", "weight")}
        if step is None:  # a train row's user and item are seen
            batch |= {name: _float(rows[name]) for name in ("user_seen", "item_seen")}
        if self.network.history:
            batch["history"] = Jagged.of(rows["history"])
        training = step is not None
        if training and self._sequences:
            batch["item"] = Jagged.of(rows["targets"])
        if training and self._draws:
            batch |= {name: Jagged.of(rows[name]) for name in ("negative", "negative_log_q")}
        if training and self._corrects:
            batch["log_rest"] = Jagged.of(rows["log_rest"]) if self._sequences else _float(rows["log_rest"])
        if training and self._has_negatives:
            batch["log_q"] = Jagged.of(rows["log_q"]) if self._sequences else _float(rows["log_q"])
        return batch

    def lookups(self, batch: Batch) -> Batch:
        return {name: batch[name] for table in self.tables for name in table.features if name in batch}

    def row_weights(self, batch: Batch) -> Tensor:
        """float [b]: 1 for rows that have a loss; a ranking loss takes positives alone."""
        return batch["weight"] if self._settings.loss == "bce" else batch["weight"] * batch["label"]

    def targets(self, batch: Batch) -> Tensor:
        return self._of_targets(batch, self.row_weights(batch)).sum()

    def _of_targets(self, batch: Batch, of_rows: Tensor) -> Tensor:
        """What each row has, for each of its targets: [b] -> [n]."""
        item = batch["item"]
        return torch.repeat_interleave(of_rows, item.lengths) if isinstance(item, Jagged) else of_rows

    def loss(self, model: Network | None, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        """The sum over targets; `model` stands for the network where that has dense weights."""
        network, settings = model or self.network, self._settings
        weights = self._of_targets(batch, self.row_weights(batch))
        positive = self.network.item(batch, vectors)[:, None]
        own = [vectors["negative"].values.unflatten(0, (-1, settings.negatives_per_row))] if self._draws_own else []
        users, (score, *of_own) = network(batch, vectors, positive, *own)
        score = score[:, 0]
        if settings.loss == "bce":
            losses = F.binary_cross_entropy_with_logits(score, batch["label"], reduction="none")
        elif settings.loss == "full-softmax":
            seen = self._is_seen(batch[WHOLE + "item"]).nonzero()[:, 0]
            catalog = self.network.of_items(vectors[WHOLE + "item"].index_select(0, seen))
            losses = full_softmax(self.network.of_users(users), score, catalog, peers)
        elif self._draws_own:
            log_q = batch["negative_log_q"].values.unflatten(0, (-1, settings.negatives_per_row))
            counts = log_q.isfinite()
            if settings.loss == "bpr":
                losses = bpr(score, of_own[0], counts)
            elif self._corrects:
                losses = sampled_softmax(score, of_own[0], counts, values(batch["log_rest"]), log_q)
            else:
                losses = softmax_among(score, of_own[0], counts)
        else:
            shared = self._drawn_by_all if self._draws else self._targets_of_all
            negatives, log_q, alike = shared(batch, vectors, positive[:, 0], weights, peers)
            if settings.loss == "bpr":
                same = torch.stack([own[:, None] == theirs for own, theirs in alike]).any(0)
                losses = bpr(score, self.network.products(users, negatives), ~same)
            else:
                of_users, of_negatives = self.network.of_users(users), self.network.of_items(negatives)
                both = (values(batch["log_q"]), log_q) if settings.log_q else None
                losses = shared_softmax(score, of_users, of_negatives, alike, both)
        if self._settings.l2:
            losses = losses + 0.5 * self._settings.l2 * self.network.squared_norms(vectors)
        total = (losses * weights).sum()
        if not self.network.reads_catalog:
            return total
        log_counts = self._log_counts = self._log_counts.to(score.device)
        auxiliary = self.network.auxiliary_loss(batch, vectors, log_counts, peers)
        assert auxiliary is not None
        return total + (auxiliary * batch["weight"]).sum()

    # What the targets of all workers share as negatives: rows [M, D], how likely each was drawn, float [M] (as a logarithm), and
    # which of them are none of which target's.

    def _drawn_by_all(
        self, batch: Batch, vectors: Vectors, positive: Tensor, weights: Tensor, peers: Peers
    ) -> tuple[Tensor, Tensor, Alike]:
        rows, items = peers.gather(vectors["negative"].values), peers.gather(batch["negative"].values)
        log_q = peers.gather(batch["negative_log_q"].values)
        drawn = peers.gather(weights).repeat_interleave(self._settings.negatives_per_row) > 0
        kept = (drawn & log_q.isfinite()).nonzero()[:, 0]
        return rows.index_select(0, kept), log_q[kept], ((batch["item"], items[kept]),)

    def _targets_of_all(
        self, batch: Batch, vectors: Vectors, positive: Tensor, weights: Tensor, peers: Peers
    ) -> tuple[Tensor, Tensor, Alike]:
        """Each other's targets: but for those of the same user."""
        kept = (peers.gather(weights) > 0).nonzero()[:, 0]
        alike = tuple((batch[name], peers.gather(batch[name])[kept]) for name in ("item", "user"))
        return peers.gather(positive).index_select(0, kept), peers.gather(values(batch["log_q"]))[kept], alike

    def score(self, model: Network | None, batch: Batch, vectors: Vectors) -> Tensor:
        return self.network.score(batch, vectors, model)

    def users(self, model: Network | None, batch: Batch, vectors: Vectors) -> Tensor:
        return (model or self.network)(batch, vectors)[0]

    def catalog(self, ids: Tensor, rows: Tensor) -> Tensor:
        return rows * self._is_seen(ids)[:, None]

    def _is_seen(self, ids: Tensor) -> Tensor:
        """bool [m], on the device of item ids [m]."""
        self._seen = self._seen.to(ids.device)
        return self._seen[ids]

    def products(self, users: Tensor, items: Tensor) -> Tensor:
        return self.network.products(users, items, self.network.plain_score)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, folder / WEIGHTS)

    def facts(self) -> dict[str, Any]:
        return {"constant": self.network.constant, "unseen": self.unseen()}

    def unseen(self) -> dict[str, str]:
        """`CollabModel.unseen`, and what counts of a user or item that has train rows, but none that a ranking loss takes."""
        found, settings = self.network.unseen(), self._settings
        if settings.loss == "bce":
            return found
        decay = ["table_weight_decay"] * bool(settings.table_weight_decay)
        if unseen.USER in found:
            found[unseen.USER_WITHOUT_POSITIVE] = _initial(decay)
        is_negative = settings.loss == "full-softmax" or settings.negatives == "uniform"
        of_histories = any({"item", "history"} <= set(table.features) for table in self.network.tables)
        case = unseen.ITEM_WITHOUT_SEQUENCE if self._sequences else unseen.ITEM_WITHOUT_POSITIVE
        found[case] = _initial(
            [*decay, *["negatives"] * is_negative, *["histories"] * (of_histories and not self._sequences)]
        )
        return found


def _initial(movers: Sequence[str]) -> str:
    return "its initial row" + (f", which only {' and '.join(movers)} may have changed" if movers else "")


def save_parts(weights: Mapping[str, Tensor], files: Mapping[str, Path]) -> None:
    """Write weights into files by the beginnings of their names, which are left out in the file; no file without weights."""
    for beginning, file in files.items():
        part = {name.removeprefix(beginning): value for name, value in weights.items() if name.startswith(beginning)}
        if part:
            save_file(part, file)


def _float(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(column.to_numpy().astype(np.float32))


def model_class(name: str) -> type[CollabModel]:
    """The model of a file in `sellarec/collab/models`."""
    return import_module(f"sellarec.collab.models.{name}").Model


def reads_counts(settings: Collab) -> bool:
    """Whether training takes `sellarec.data.log.item_counts`: for negatives, or for a model's own loss."""
    return settings.loss in SAMPLED or model_class(settings.model).reads_catalog


def build_collab(
    log: Log,
    settings: Collab,
    start: Path | None,
    counts: Path | None = None,
    seed: int = 0,
    given: Mapping[str, Path] = {},
    represented: Sequence[str] | None = None,
) -> CollabTask:
    """A model for a prepared log.

    Args:
        start: folder of an artifact whose tables and dense weights it starts from; None for fresh ones. Users and items that
            its tables don't have yet get fresh rows.
        counts: file of `sellarec.data.log.item_counts`: needed to train where `reads_counts` says so.
        seed: of the drawn negatives.
        given: folders of tables (`sellarec.collab.vectors`) that some of the model's start from, by name; the others are fresh.
        represented: of user and item, what the model is only asked to represent: what that doesn't read is left out. None: all.
    """
    facts = log.facts
    sizes = Sizes(facts["users"], facts["items"], facts["positives"]["train"] / facts["rows"]["train"])
    network = model_class(settings.model)(sizes, settings)
    if represented is not None:
        network.keep(represented)
    network.tables = tuple(
        saved_rows(table, given[table.name]) if table.name in given else table for table in network.tables
    )
    if start is not None:
        network.tables = tuple(saved_rows(table, start / "tables") for table in network.tables)
        if network.has_weights and (represented is None or "user" in represented):  # items take none
            if not (start / WEIGHTS).is_file():
                raise UserError(
                    f"{start} holds no {WEIGHTS}, but {settings.model} has dense weights: it is of another model"
                )
            network.load_state_dict(load_file(start / WEIGHTS))
    found = None if counts is None else np.load(counts)
    negatives = None
    if found is not None and settings.loss in SAMPLED:
        negatives = Negatives(settings.negatives, found, settings.negatives_per_row, seed)
    graph = None
    if network.uses_graph:
        graph = Graph(tuple(str(path) for path in log.split_paths("train")), sizes.users, sizes.items)
    return CollabTask(
        network, settings, log.items(["seen"])["seen"].to_numpy(), negatives, graph, None if found is None else found[0]
    )
