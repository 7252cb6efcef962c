"""The order of training rows: a pure function of (seed, epoch, step), streamed through Ray Data.

Row groups are shuffled, then rows within windows of row groups; the global batch of a step is the next `batch` rows of that
order, and worker r of W takes the r-th of W equal slices. So any number of workers sees the same global batches, and a
position is (epoch, step) alone. The last batch of an epoch is short; short slices are padded with rows of weight 0.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WINDOW_ROWS = 1 << 18
"""Rows shuffled together; what a reading task holds in memory."""

CHUNK_ROWS = WINDOW_ROWS
"""Rows of the global order that one reading task delivers at most; it reads the windows that they lie in whole."""


@dataclass(frozen=True)
class RowGroup:
    path: str
    index: int
    rows: int


def row_groups(paths: Sequence[str]) -> list[RowGroup]:
    """The row groups of Parquet files, in order, from their footers."""
    groups = []
    for path in paths:
        metadata = pq.read_metadata(path)
        groups += [RowGroup(path, i, metadata.row_group(i).num_rows) for i in range(metadata.num_row_groups)]
    return groups


@dataclass(frozen=True)
class Order:
    """The order in which the rows of some Parquet files are seen.

    Attributes:
        groups: all row groups.
        batch: rows of a global batch.
        seed: what the shuffling is drawn from; None keeps the files' own order.
        every: of the order so made, only every so many-th row is seen.
    """

    groups: tuple[RowGroup, ...]
    batch: int
    seed: int | None
    every: int = 1

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return -(-sum(group.rows for group in self.groups) // self.every)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch)

    def batch_rows(self, step: int) -> int:
        """Rows of a step's global batch, steps counted within an epoch; the last one is short."""
        return min(self.batch, self.rows - step * self.batch)

    def windows(self, epoch: int) -> list[list[RowGroup]]:
        """The epoch's windows: runs of row groups of at least WINDOW_ROWS rows (the last one may be smaller)."""
        groups = list(self.groups)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
            groups = [groups[i] for i in order]
        windows: list[list[RowGroup]] = [[]]
        for group in groups:
            if sum(g.rows for g in windows[-1]) >= WINDOW_ROWS:
                windows.append([])
            windows[-1].append(group)
        return windows

    def read(self, epoch: int, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows at positions [start, stop) of the epoch's order."""
        parts, first = [], 0
        start, stop = start * self.every, (stop - 1) * self.every + 1
        for number, window in enumerate(self.windows(epoch)):
            rows = sum(group.rows for group in window)
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                table = pa.concat_tables(
                    [pq.ParquetFile(g.path).read_row_group(g.index, columns=list(columns)) for g in window]
                )
                wanted = np.arange(low, high)
                wanted = wanted[wanted % self.every == 0] - first
                if self.seed is not None:
                    wanted = np.random.default_rng([self.seed, epoch, number]).permutation(rows)[wanted]
                parts.append(table.take(wanted))
            first += rows
        return pa.concat_tables(parts)

    def slices(self, epoch: int, first: int, last: int, columns: Sequence[str], rank: int, world_size: int) -> pa.Table:
        """One worker's slices of steps [first, last) of an epoch, one after the other.

        Returns:
            The columns and `weight` (float32: 1, or 0 for padding), with `slice_rows(batch, world_size)` rows a step.
        """
        share = slice_rows(self.batch, world_size)
        start = first * self.batch
        whole = self.read(epoch, start, min(last * self.batch, self.rows), columns)
        position = np.arange(last - first)[:, None] * self.batch + rank * share + np.arange(share)
        in_batch = rank * share + np.arange(share) < self.batch
        valid = in_batch & (position < len(whole))
        taken = whole.take(np.where(valid, position, 0).reshape(-1))
        return taken.append_column("weight", pa.array(valid.reshape(-1).astype(np.float32)))


def slice_rows(batch: int, world_size: int) -> int:
    """Rows that each worker takes of a global batch, padding included."""
    return -(-batch // world_size)


def stream(
    order: Order, columns: Sequence[str], rank: int, world_size: int, first_step: int, steps: int
) -> Generator[pa.Table]:
    """This worker's slices of the global batches of steps [first_step, steps), counted over all epochs, through Ray Data.

    Yields:
        Tables of `slice_rows(batch, world_size)` rows: the columns and `weight`.
    """
    import ray.data

    per_epoch = order.steps_per_epoch
    chunk = max(1, CHUNK_ROWS // order.batch)
    chunks = []
    step = first_step
    while step < steps:
        epoch, within = divmod(step, per_epoch)
        last = min(within + chunk, per_epoch, within + steps - step)
        chunks.append({"epoch": epoch, "first": within, "last": last})
        step += last - within
    if not chunks:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    def read(descriptors: dict[str, np.ndarray]) -> pa.Table:
        at = zip(descriptors["epoch"], descriptors["first"], descriptors["last"], strict=True)
        return pa.concat_tables([order.slices(int(e), int(f), int(s), columns, rank, world_size) for e, f, s in at])

    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        read, batch_size=1, batch_format="numpy"
    )
    yield from dataset.iter_batches(
        batch_size=slice_rows(order.batch, world_size), batch_format="pyarrow", prefetch_batches=2
    )
