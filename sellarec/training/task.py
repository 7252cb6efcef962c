"""What a stage tells the training loop about its model: the one protocol between the two.

Nothing in a task knows Ray, process groups or sharding; nothing in the loop knows a model.
Shapes: b rows of one worker's slice (or of a micro-batch of it), D columns of a table, W workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sellarec.training.stream import Prepare
from sellarec.training.table import Table

Batch = dict[str, Any]
"""Tensors with one leading dimension b, or Jagged of b lists; `weight` (float32 [b]) is 0 for padding."""

Vectors = dict[str, Any]
"""By feature, the vectors of its ids: [b, D], [b, L, D] or Jagged of b lists of them."""

INITIAL = "initial "
"""Where rows are smoothed over a graph, a feature's rows as they lie in the table are found under its name after this."""

WHOLE = "whole "
"""A worker's share of a feature's whole table is found under the feature's name after this, its ids in the batch likewise."""


WORTH_SHARING = 0.6
"""Rows that begin alike are scored by what they share where that leaves the model at most so much of the tokens to read. Two
passes take longer than one of as many tokens; with the demo's small model, which loses most, they are about even here."""


class Peers(Protocol):
    """The other workers, as a loss needs them. All workers call the same in the same order; gradients flow back."""

    def gather(self, rows: Tensor) -> Tensor:
        """[b, ...] of each worker, with equal b -> [W b, ...] of all."""

    def own(self, rows: Tensor) -> Tensor:
        """[W b, ...] of all -> [b, ...], those of this worker."""

    def add(self, values: Tensor) -> Tensor:
        """The sum over workers of tensors of one shape."""

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over workers, element by element, of tensors of one shape. Without a gradient."""


class Alone:
    """`Peers` of a worker that has no others, for a loss outside of the training loop."""

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def own(self, rows: Tensor) -> Tensor:
        return rows

    def add(self, values: Tensor) -> Tensor:
        return values

    def largest(self, values: Tensor) -> Tensor:
        return values.detach()


@dataclass(frozen=True)
class Graph:
    """Where the graph of users and items is read from: the prepared log's train split, of which positives are edges."""

    paths: tuple[str, ...]
    users: int
    items: int


class Task(Protocol):
    """A model with its loss and scores, written for a single device. What most tasks have alike is the default here.

    Attributes:
        columns: columns of the interactions (or of whatever the stage streams) that are read.
        prepare: what the reading tasks do with rows to train on (draw negatives, make tokens); None where it is nothing.
        prepare_to_score: the same of rows to score; `prepare` where nothing else is said.
        tables: embedding tables, which the loop shards over the workers; it changes no row of those that are frozen, and leaves
            no tables in the artifact where all are.
        whole: features of whose tables each worker gets its share of the rows when training.
        graph: the graph over which rows of the tables `user` and `item` are smoothed; None for none.
        model: the dense part, which the loop shards with FSDP2; None where there is none.
        blocks: submodules of `model` that are gathered one at a time (decoder layers).
    """

    columns: Sequence[str]
    prepare: Prepare | None
    tables: Sequence[Table] = ()
    whole: Sequence[str] = ()
    graph: Graph | None = None
    model: nn.Module | None
    blocks: Sequence[nn.Module] = ()

    @property
    def prepare_to_score(self) -> Prepare | None:
        return self.prepare

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        """Prepared rows with their `weight` -> tensors. What is drawn may depend on (step, row), never on the worker;
        `step` is None when scoring."""

    def lookups(self, batch: Batch) -> Batch:
        """Feature -> int64 ids [b], [b, L] or Jagged, of features of the tables."""
        return {}

    def mask(self, rows: Tensor, nodes: Tensor, step: int) -> Tensor:
        """Rows [R, D] of the graph's users and items -> the same, of which some may be taken away before they are smoothed to be
        trained on. What is drawn may depend on (step, node), never on the worker. Called only where there is a `graph`.

        Args:
            nodes: int64 [R], the rows' places among all users, and after them all items.
        """
        return rows

    def propagate(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows [R, D] of the graph's users and items -> smoothed rows; `multiply` is the product with the graph's matrix.
        Called only where there is a `graph`."""
        return rows

    def targets(self, batch: Batch) -> Tensor:
        """How many valid targets the slice has: what the summed loss is divided by, over all workers."""

    def loss(self, model: nn.Module | None, batch: Batch, vectors: Vectors, peers: Peers) -> Tensor:
        """The loss summed (not averaged) over the valid targets of these rows: a scalar."""

    def score(self, model: nn.Module | None, batch: Batch, vectors: Vectors) -> Tensor:
        """float32 [b]: the log-odds, up to a monotone function, that the user likes the item."""

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the trained dense weights (whole, by name in `model`) into `folder`. One worker calls it."""

    def facts(self) -> dict[str, Any]:
        """What the manifest should say of the model beside its settings."""


@runtime_checkable
class MeasuredTask(Protocol):
    """What a task has beside that measures something of some items, and of some users by a row each, before its first step and
    of the state that is kept.

    Attributes:
        measured: int64 [n], the items.
        measured_features: the features under which they are looked up.
        measured_rows: the users' rows; None where users aren't measured.
    """

    measured: np.ndarray
    measured_features: Sequence[str]
    measured_rows: pa.Table | None

    def collate_measured(self, rows: pa.Table) -> Batch:
        """The batch of some of `measured_rows`."""

    def views_of_users(self, model: nn.Module, batch: Batch, vectors: Vectors) -> tuple[Tensor, ...]:
        """What is measured of their users: two views, [b, K] each."""

    def measure(
        self, weights: dict[str, Tensor], vectors: dict[str, Tensor], users: Sequence[Tensor] | None
    ) -> dict[str, Any]:
        """What is found, as JSON takes it. One worker calls it.

        Args:
            weights: the trained dense weights, whole, by name in `model`.
            vectors: the items' vectors [n, D], by feature.
            users: what `views_of_users` gives of all of `measured_rows`; None where there are none.
        """


@runtime_checkable
class RankingTask(Protocol):
    """What a task has beside, whose score is a product, so that the whole catalog can be ranked."""

    def users(self, model: nn.Module | None, batch: Batch, vectors: Vectors) -> Tensor:
        """float [b, D]: the users' vectors."""

    def catalog(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Rows [m, D] of items int64 [m], as the score takes them."""

    def products(self, users: Tensor, items: Tensor) -> Tensor:
        """The scores of all pairs: [b, D] and [m, D] -> [b, m]."""


@runtime_checkable
class SharingTask(Protocol):
    """What a task has beside, whose model reads what rows to score have in common at their beginning only once."""

    def share(self, rows: pa.Table, size: int) -> tuple[pa.Table, float, int]:
        """Prepared rows, by length -> the same in another order, of which `collate` and `score` share what micro-batches of
        `size` rows have in common; the tokens that the model then reads, and those that it reads of the rows as they were."""


@runtime_checkable
class CheckedTask(Protocol):
    """What a task has beside, whose saved weights are for other programs too: once saved, they are loaded as those load them."""

    def check_saved(
        self, model: nn.Module, batch: Batch, folder: Path | None, dtype: torch.dtype, weights: dict[str, Tensor]
    ) -> None:
        """Compare the trained model with what `save` has written of its `weights` into `folder`. All workers call it, each with
        some rows, and all but one with None, as they only take part in running the sharded model, which computes in `dtype`.

        Raises:
            UserError: the two don't agree.
        """
