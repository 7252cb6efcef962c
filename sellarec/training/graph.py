"""The graph of users and items that a log's positives make, sharded over all workers, for graph convolution as LightGCN does it.

LightGCN (He et al., 2020, https://arxiv.org/abs/2002.02126) propagates E' = D^-1/2 A D^-1/2 E: A is 1 for a user and an item
of a positive and 0 elsewhere, symmetric over users and items; D holds the degrees, the row sums of A.

Shapes: R own rows of one worker, H rows that it receives, D columns, W workers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from sellarec.errors import UserError
from sellarec.training.table import sum_lists

MERGE_ENTRIES = 1 << 20
"""Entries that are read before repeated ones are first thrown away."""

Kind = Literal["user", "item"]

Ids = TypeVar("Ids", np.ndarray, Tensor)


@dataclass(frozen=True)
class _Blocks:
    """Who owns which rows: contiguous blocks of ceil(n / W) ids, users and items apart.

    A row's slot is its place where each worker has room for whole blocks, its users', then its items': slots are sorted by
    owner, then kind, then id, which is how all workers list rows, so that none has to tell another its order.
    """

    rows: dict[Kind, int]
    """Of the whole graph."""
    rank: int
    workers: int

    def size(self, kind: Kind) -> int:
        """Rows of a full block."""
        return -(-self.rows[kind] // self.workers)

    @property
    def slots(self) -> int:
        """Slots of one worker, at least one."""
        return max(1, self.size("user") + self.size("item"))

    def own(self, kind: Kind) -> tuple[int, int]:
        start, stop = (min(k * self.size(kind), self.rows[kind]) for k in (self.rank, self.rank + 1))
        return start, stop

    def slot(self, kind: Kind, ids: Ids) -> Ids:
        """int64 [n], of ids int64 [n]."""
        owner = ids // self.size(kind)
        return owner * self.slots + ids % self.size(kind) + (self.size("user") if kind == "item" else 0)

    def local(self, slots: Ids) -> Ids:
        """Which own row, int64 [n], an own slot is, counted from this worker's first."""
        start, stop = self.own("user")
        return slots - (slots >= self.size("user")) * (self.size("user") - (stop - start))


class ShardedGraph:
    """The normalized adjacency of users and items, each worker holding the rows of its own users, then of its own items.

    Own ids are contiguous blocks of ceil(n / W), the last ones short or empty; `own` has them. A worker holds the
    entries of its own rows, 4 bytes each (while it reads, about 75), and while it multiplies a copy of its own rows beside
    the H rows of others that are neighbours of its own.

    Traffic: in a multiply, and again in its backward, a row goes once to each other worker that owns a neighbour of it, as D
    float32. With E edges over n users and items, all workers together receive sum over rows v of
    |{workers other than v's owner that own a neighbour of v}| rows, at most min(2 E, (W - 1) n); where neighbours are spread
    evenly, about sum over v of (W - 1) (1 - (1 - 1/W)^degree(v)). So it grows with W as long as W is well below most
    degrees, and with E alone beyond. One worker receives at most min(entries of its own rows, n - R) rows; it comes near all
    n where the graph is dense and W small. `received` and `sent` are this worker's rows.

    All workers call each method alike and in the same order, and backward too is a collective: each worker's loss has to
    depend on what `multiply` and `fetch` gave it, be it of zero rows.

    `multiply` gives the same bits each time, and for any number of workers on devices of one kind; so does `fetch`. The
    gradient of `fetch` is the same each time for the same ids of each worker; ids shared out otherwise change rounding.
    """

    def __init__(
        self, blocks: _Blocks, entries: np.ndarray, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        """As `read` does, of the entries of own rows as `_entries` writes them, sorted, each once."""
        self.own: dict[Kind, tuple[int, int]] = {kind: blocks.own(kind) for kind in blocks.rows}
        """(first id, stop) of own users and own items."""
        self.rows = sum(stop - start for start, stop in self.own.values())
        """Own rows."""
        self.device, self._blocks, self._group = device, blocks, group
        slot, column = np.divmod(entries, blocks.workers * blocks.slots)
        row = blocks.local(slot)
        owner, place = np.divmod(column, blocks.slots)
        remote = owner != blocks.rank
        # Columns are own rows, then those received. An entry's place in its row stays that of its neighbour's id, so that
        # sums are taken in the same order for any number of workers.
        halo = _unique(column[remote])
        found = np.where(remote, self.rows + np.searchsorted(halo, column), blocks.local(place))
        # The matrix is symmetric, so what others need of this worker stands in its own entries.
        needed = _unique(owner[remote] * max(1, self.rows) + row[remote])
        to, send = np.divmod(needed, max(1, self.rows))
        self._receive = np.bincount(halo // blocks.slots, minlength=blocks.workers).tolist()
        self._send = np.bincount(to, minlength=blocks.workers).tolist()
        self._send_rows = torch.from_numpy(send).to(device)
        degrees = np.bincount(row, minlength=self.rows)
        index = np.int32 if max(len(entries), self.rows + len(halo)) < 2**31 else np.int64
        self._columns = torch.from_numpy(found.astype(index)).to(device)
        self._ends = torch.from_numpy(np.concatenate([[0], np.cumsum(degrees)]).astype(index)).to(device)
        # Rows are scaled by their owners, before they are sent and after they are summed: nobody needs others' degrees.
        scale = np.divide(1, np.sqrt(degrees), out=np.zeros(self.rows), where=degrees > 0)
        self._scale = torch.from_numpy(scale.astype(np.float32)[:, None]).to(device)

    @classmethod
    def read(
        cls,
        paths: Sequence[str | Path],
        users: int,
        items: int,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> "ShardedGraph":
        """This worker's part of the graph of a split's positives. Each worker reads all rows, some at a time; nothing is sent.

        Args:
            paths: the split's Parquet files in a prepared log, the same on all workers (row, user, item int64, label int8).
                A user and an item are neighbours once, however many positives they have.
            users, items: how many the log has.
            group: whose workers share the graph; None: this one has all of it.

        Raises:
            UserError: a file can't be read, or has an id that the log doesn't have.
        """
        rank, workers = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        blocks = _Blocks({"user": users, "item": items}, rank, workers)
        return cls(blocks, _distinct(_entries(paths, blocks)), group, device)

    @property
    def received(self) -> int:
        """Rows of others, H, that a multiply receives: times 4 D bytes."""
        return sum(self._receive)

    @property
    def sent(self) -> int:
        """Rows that a multiply sends, one for each worker that it is sent to: times 4 D bytes."""
        return sum(self._send)

    @property
    def entries(self) -> int:
        """The degrees of own rows, added up: over all workers twice the edges."""
        return len(self._columns)

    def multiply(self, rows: Tensor) -> Tensor:
        """D^-1/2 A D^-1/2 times float32 [R, D] on each worker -> the own rows of it, [R, D]; zeros for rows without neighbours.

        Raises:
            ValueError: there are not as many rows as this worker owns.
        """
        self._check(rows)
        return _Multiply.apply(rows, self)

    def fetch(self, rows: Tensor, asked: Sequence[tuple[Kind, Tensor]]) -> list[Tensor]:
        """Rows of any users and any items, in the order asked for: float32 [R, D] on each worker, int64 ids [...] -> [..., D].

        Each worker may ask for another number of rows, also none, and repeat ids, which are sent once. Gradients are summed
        over all that asked for a row.

        Args:
            asked: all workers give as many.

        Raises:
            IndexError: an id is none of the graph's.
            ValueError: there are not as many rows as this worker owns.
        """
        self._check(rows)
        if not asked:
            return []
        for kind, ids in asked:
            count = self._blocks.rows[kind]
            # Another kind's row would be found at some wrong ids.
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= count):
                raise IndexError(f"{kind}s {int(ids.min())} to {int(ids.max())} are asked for, the graph has {count}")
        slots = torch.cat([self._blocks.slot(kind, ids.reshape(-1)) for kind, ids in asked])
        wanted, place = torch.unique(slots, return_inverse=True)
        counts = torch.bincount(wanted // self._blocks.slots, minlength=self._blocks.workers)
        ones = [1] * self._blocks.workers
        receive, send = counts.tolist(), self._exchange(counts, ones, ones).tolist()
        local = self._blocks.local(self._exchange(wanted, send, receive) % self._blocks.slots)
        found = _Fetch.apply(rows, self, local, place, receive, send).split([ids.numel() for _, ids in asked])
        return [part.reshape(*ids.shape, rows.shape[1]) for part, (_, ids) in zip(found, asked, strict=True)]

    def _check(self, rows: Tensor) -> None:
        if len(rows) != self.rows:
            raise ValueError(f"{len(rows)} rows are given, but this worker owns {self.rows}")

    def _exchange(self, values: Tensor, receive: list[int], send: list[int], out: Tensor | None = None) -> Tensor:
        """Values [sum(send), ...] in the order of those they go to -> [sum(receive), ...] in the order of those they are from."""
        if self._group is None or self._blocks.workers == 1:
            return values
        if out is None:
            out = values.new_empty(sum(receive), *values.shape[1:])
        dist.all_to_all_single(out, values, receive, send, group=self._group)
        return out

    def _product(self, rows: Tensor) -> Tensor:
        columns = rows.new_empty(self.rows + self.received, rows.shape[1])
        torch.mul(rows, self._scale, out=columns[: self.rows])
        self._exchange(columns.index_select(0, self._send_rows), self._receive, self._send, columns[self.rows :])
        return sum_lists(columns, self._columns, self._ends).mul_(self._scale)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, graph: ShardedGraph) -> Tensor:
        ctx.graph = graph
        return graph._product(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Multiply.apply(gradient, ctx.graph), None  # the matrix is symmetric


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, graph: ShardedGraph, local: Tensor, place: Tensor, receive: list[int], send: list[int]
    ) -> Tensor:
        ctx.graph, ctx.receive, ctx.send = graph, receive, send
        ctx.save_for_backward(local, place)
        return graph._exchange(rows.index_select(0, local), receive, send).index_select(0, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        local, place = ctx.saved_tensors
        graph = ctx.graph
        summed = _sum_groups(gradient, place, sum(ctx.receive))
        if graph._blocks.workers == 1:  # each row was asked for once
            summed = summed.new_zeros(graph.rows, summed.shape[1]).index_copy_(0, local, summed)
        else:
            summed = _sum_groups(graph._exchange(summed, ctx.send, ctx.receive), local, graph.rows)
        return summed, None, None, None, None, None


def _sum_groups(rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums of rows [n, D] that have the same group, int64 [n] -> [groups, D]; rows of a group are added in order."""
    lengths = torch.bincount(group, minlength=groups)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return sum_lists(rows.contiguous(), torch.argsort(group, stable=True), ends)


def _entries(paths: Sequence[str | Path], blocks: _Blocks) -> Iterator[np.ndarray]:
    """Entries of own rows as numbers that sort by row, then column: (own slot) * W * slots + (slot of the column), int64 [n].

    Raises:
        UserError: as `ShardedGraph.read`.
    """
    for path in paths:
        try:
            before = 0
            for batch in pq.ParquetFile(path).iter_batches(columns=["user", "item", "label"]):
                positive = batch["label"].to_numpy() == 1
                slots = {}
                for kind, count in blocks.rows.items():
                    ids = batch[kind].to_numpy()[positive]
                    bad = np.flatnonzero((ids < 0) | (ids >= count))
                    if len(bad):
                        row = pq.read_table(path, columns=["row"])["row"][before + np.flatnonzero(positive)[bad[0]]]
                        raise UserError(
                            f"{kind} is {ids[bad[0]]} in row {row} of {path}, but table {kind} has the ids 0 to {count - 1}: "
                            "prepare the data again"
                        )
                    slots[kind] = blocks.slot(kind, ids)
                for row, column in ((slots["user"], slots["item"]), (slots["item"], slots["user"])):
                    own = row // blocks.slots == blocks.rank
                    yield row[own] % blocks.slots * (blocks.workers * blocks.slots) + column[own]
                before += len(batch)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"Cannot read the prepared log: {error}. Prepare the data again.") from error


def _distinct(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """The distinct numbers of int64 arrays, sorted, in memory for about twice as many."""
    distinct, waiting, count = np.empty(0, np.int64), [], 0
    for array in arrays:
        waiting.append(array)
        count += len(array)
        if count > max(MERGE_ENTRIES, len(distinct)):
            distinct, waiting, count = _unique(np.concatenate([distinct, *waiting])), [], 0
    return _unique(np.concatenate([distinct, *waiting]))


def _unique(numbers: np.ndarray) -> np.ndarray:
    """As np.unique, which goes by a hash table and took 100 times as long for two million int64 (NumPy 2.4)."""
    numbers = np.sort(numbers)
    return numbers[np.diff(numbers, prepend=numbers[:1] - 1) != 0]
