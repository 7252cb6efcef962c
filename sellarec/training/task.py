"""What a stage tells the training loop about its model: the one protocol between the two.

Nothing in a task knows Ray, process groups or sharding; nothing in the loop knows a model.
Shapes: b rows of one worker's slice (or of a micro-batch of it), D columns of a table.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from torch import Tensor, nn

from sellarec.training.stream import Prepare
from sellarec.training.tables import Table

Batch = dict[str, Any]
"""Tensors with one leading dimension b, or Jagged of b lists; `weight` (float32 [b]) is 0 for padding."""

Vectors = dict[str, Any]
"""By feature, the vectors of its ids: [b, D], [b, L, D] or Jagged of b lists of them."""

Gather = Callable[[Tensor], Tensor]
"""[b, ...] of each worker -> [W * b, ...] of all; gradients flow back to where the rows came from."""


class Task(Protocol):
    """A model with its loss and scores, written for a single device.

    Attributes:
        columns: columns of the interactions (or of whatever the stage streams) that are read.
        prepare: what the reading tasks do with the rows (draw negatives, make tokens); None where it is nothing.
        tables: embedding tables, which the loop shards over the workers.
        model: the dense part, which the loop shards with FSDP2; None where there is none.
        blocks: submodules of `model` that are gathered one at a time (decoder layers).
    """

    columns: Sequence[str]
    prepare: Prepare | None
    tables: Sequence[Table]
    model: nn.Module | None
    blocks: Sequence[nn.Module]

    def collate(self, rows: pa.Table, step: int | None) -> Batch:
        """Prepared rows with their `weight` -> tensors. What is drawn may depend on (step, row), never on the worker;
        `step` is None when scoring."""

    def lookups(self, batch: Batch) -> Batch:
        """Feature -> int64 ids [b], [b, L] or Jagged, every feature of every table."""

    def targets(self, batch: Batch) -> Tensor:
        """How many valid targets the slice has: what the summed loss is divided by, over all workers."""

    def loss(self, model: nn.Module | None, batch: Batch, vectors: Vectors, gather: Gather) -> Tensor:
        """The loss summed (not averaged) over the valid targets of these rows: a scalar."""

    def score(self, model: nn.Module | None, batch: Batch, vectors: Vectors) -> Tensor:
        """float32 [b]: the log-odds, up to a monotone function, that the user likes the item."""

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the trained dense weights (whole, by name in `model`) into `folder`. One worker calls it."""

    def facts(self) -> dict[str, Any]:
        """What the manifest should say of the model beside its settings."""
