"""The order of training rows: a pure function of (seed, epoch, step), streamed through Ray Data.

Row groups are shuffled, then rows within windows of row groups; the global batch of a step is the next `batch` rows of that
order, and worker r of W takes the r-th of W equal slices; of prompts that are trained on, those that `dealt` gives it. So any
number of workers sees the same global batches, and a position is (epoch, step) alone. The last batch of an epoch is short; short
slices are padded with rows of weight 0.

One Ray Data pipeline reads for all workers: its tasks read each window once, prepare its rows (draw negatives, make
tokens) and put them into the object store as blocks of the global order. Worker 0 drives it and hands the blocks'
references on; each worker cuts its own slices out of the blocks.
"""

import functools
import itertools
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sellarec.errors import UserError
from sellarec.ranges import ranges

WINDOW_ROWS = 1 << 18
"""Rows shuffled together; what a reading task holds in memory."""

PREPARED_ROWS = 1 << 12
"""Rows that are prepared at once."""

BLOCK_BYTES = 4 << 20
"""What a reading task puts into the object store at once, about."""

AHEAD_BYTES = 1 << 30
"""What is read ahead of the workers at most."""

STANDSTILL = 6 * 3600.0
"""Seconds after which a pipeline from which nothing is taken is given up: workers may train or evaluate for hours on what was
read ahead."""

PIECES_AT_ONCE = 512
"""Pieces of one Ray Data pipeline; the next pipeline begins when its last rows are taken."""

LEFT_OUT = "titles_left_out"
"""Column of prepared rows that are prompts: how many titles of the row's history were left out so that its prompt fits."""

Prepare = Callable[[pa.Table, int, np.ndarray], pa.Table]
"""(rows, epoch, step of each row int64 [n]) -> the same rows with columns added or left out. Runs in the reading tasks, so it
should pickle small, or as large numpy arrays, which tasks of one machine share."""


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
class Piece:
    """Positions [start, stop) of an epoch's order; all of them lie in one window."""

    epoch: int
    window: int
    start: int
    stop: int


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
        """Rows of a step's global batch, steps counted over all epochs; the last one of an epoch is short."""
        return min(self.batch, self.rows - step % self.steps_per_epoch * self.batch)

    def windows(self, epoch: int) -> list[list[RowGroup]]:
        """The epoch's windows: runs of row groups of at least WINDOW_ROWS rows (the last one may be smaller)."""
        groups = list(self.groups)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(groups))
            groups = [groups[i] for i in order]
        windows: list[list[RowGroup]] = [[]]
        rows = 0
        for group in groups:
            if rows >= WINDOW_ROWS:
                windows.append([])
                rows = 0
            windows[-1].append(group)
            rows += group.rows
        return windows

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """The rows of steps [first, last), counted over all epochs: one piece for each window that they lie in."""
        per_epoch = self.steps_per_epoch
        for epoch in range(first // per_epoch, -(-last // per_epoch)):
            start = max(first - epoch * per_epoch, 0) * self.batch
            stop = min((last - epoch * per_epoch) * self.batch, self.rows)
            for number, (low, high) in enumerate(self._positions(epoch)):
                if max(start, low) < min(stop, high):
                    yield Piece(epoch, number, max(start, low), min(stop, high))

    def _positions(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Positions [start, stop) of the epoch's order that lie in each window."""
        ends = np.cumsum([0, *(sum(group.rows for group in window) for window in self.windows(epoch))])
        return itertools.pairwise((-(-ends // self.every)).tolist())

    def read(self, piece: Piece, columns: Sequence[str]) -> pa.Table:
        """The rows of a piece, in order."""
        return take(*self.window(piece, columns))

    def window(self, piece: Piece, columns: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
        """The rows of the window that a piece lies in, and which of them the piece has, in its order: int64 [n]."""
        windows = self.windows(piece.epoch)
        before = sum(group.rows for window in windows[: piece.window] for group in window)
        table = pa.concat_tables(
            pq.ParquetFile(group.path).read_row_group(group.index, columns=list(columns))
            for group in windows[piece.window]
        )
        wanted = np.arange(piece.start, piece.stop) * self.every - before
        if self.seed is not None:
            shuffled = np.random.default_rng([self.seed, piece.epoch, piece.window]).permutation(len(table))
            wanted = shuffled[wanted]
        return table.combine_chunks(), wanted


def take(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Some rows of a table. Values of lists of numbers are gathered here: of histories, which are most of what is read, that was
    measured to take a quarter of the time that Arrow takes."""
    named = [name for name in table.column_names if _is_list_of_numbers(table[name])]
    found = table.drop_columns(named).take(rows)
    for name in named:
        (column,) = table[name].chunks
        offsets = column.offsets.to_numpy()
        starts, lengths = offsets[rows], np.diff(offsets)[rows]
        ends = np.concatenate([[0], np.cumsum(lengths)])
        values = pa.array(column.values.to_numpy()[ranges(starts, lengths)])
        found = found.append_column(name, type(column).from_arrays(pa.array(ends.astype(offsets.dtype)), values))
    return found.select(table.column_names)


def _is_list_of_numbers(column: pa.ChunkedArray) -> bool:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        return False
    return column.num_chunks == 1 and column.null_count == 0 and column.chunk(0).values.null_count == 0


def prepared(order: Order, piece: Piece, columns: Sequence[str], prepare: Prepare | None) -> Iterator[pa.Table]:
    """The rows of a piece in order, some at a time, as they come out of `prepare`."""
    window, wanted = order.window(piece, columns)
    if prepare is None:
        yield take(window, wanted)
        return
    step = piece.epoch * order.steps_per_epoch + np.arange(piece.start, piece.stop) // order.batch
    for start in range(0, len(wanted), PREPARED_ROWS):
        part = slice(start, start + PREPARED_ROWS)
        # taken some at a time too: histories of a whole window, each value's place beside it, don't fit into a cache
        yield prepare(take(window, wanted[part]), piece.epoch, step[part])


def slice_rows(batch: int, world_size: int) -> int:
    """Rows that each worker takes of a global batch, padding included."""
    return -(-batch // world_size)


def dealt(lengths: np.ndarray, share: int, world_size: int, micro_batch: int) -> np.ndarray:
    """Which rows of a global batch of prompts each worker takes, so that little of its micro-batches is padding, and all workers
    have alike much to do at a time: in the order of their lengths, `micro_batch` to each worker in its turn.

    Args:
        lengths: int64 [b], tokens of each row.
        share: rows that each worker takes, at least b / world_size.

    Returns:
        int64 [world_size, share], places in the batch; -1 for padding, which comes before the shortest.
    """
    places = np.full(world_size * share, -1)
    places[len(places) - len(lengths) :] = np.argsort(lengths, kind="stable")
    turn = world_size * micro_batch
    turns = [places[start : start + turn].reshape(world_size, -1) for start in range(0, len(places), turn)]
    return np.concatenate(turns, axis=1)


def slices(
    blocks: Iterator[pa.Table],
    order: Order,
    rank: int,
    world_size: int,
    first: int,
    last: int,
    micro_batch: int | None = None,
) -> Iterator[pa.Table]:
    """One worker's slices of steps [first, last), cut out of the rows of these steps.

    Args:
        blocks: the rows of steps from `first` on, in order, in tables of any size.
        micro_batch: prompts (rows with `tokens`) are dealt out in so many at a time; None cuts equal slices.

    Yields:
        For each step `slice_rows(batch, world_size)` rows: the columns, and `weight` (float32: 1, or 0 for padding).
    """
    share = slice_rows(order.batch, world_size)
    waiting = next(blocks)
    for step in range(first, last):
        size = order.batch_rows(step)
        while len(waiting) < size:
            waiting = pa.concat_tables([waiting, next(blocks)])
        if micro_batch is not None and "tokens" in waiting.column_names:
            lengths = pc.list_value_length(waiting["tokens"].slice(0, size)).to_numpy()
            places = dealt(lengths, share, world_size, micro_batch)[rank]
            # the shortest stands in padding, so that it is where the lengths put it
            rows = waiting.take(np.where(places < 0, lengths.argmin(), places))
            weight = (places >= 0).astype(np.float32)
        else:
            start = rank * share
            rows = waiting.slice(start, max(0, min(share, size - start)))
            weight = (np.arange(share) < len(rows)).astype(np.float32)
            if len(rows) < share:
                # what stands in padding has no meaning: a row of the batch
                rows = pa.concat_tables([rows, waiting.take(np.zeros(share - len(rows), np.int64))])
        yield rows.append_column("weight", pa.array(weight))
        waiting = waiting.slice(size)


def shortened(rows: pa.Table) -> tuple[int, int, int]:
    """Of prepared rows of weight 1: prompts, those whose history was cut to fit, titles left out of it. Zeros of rows that are
    no prompts."""
    if LEFT_OUT not in rows.column_names:
        return 0, 0, 0
    left_out = rows[LEFT_OUT].to_numpy()[rows["weight"].to_numpy() > 0]
    return len(left_out), int((left_out > 0).sum()), int(left_out.sum())


def named_counts(counts: Sequence[float] | np.ndarray) -> dict[str, int]:
    """What `shortened` counts, added up, as manifests have it."""
    return dict(zip(("prompts", "shortened", "titles left out"), map(int, counts), strict=True))


def counts_in_words(histories: Mapping[str, Mapping[str, int]]) -> str:
    """One line of `named_counts` by what was read."""
    return "; ".join(
        f"{what}: {found['shortened']:,} of {found['prompts']:,} prompts, {found['titles left out']:,} titles left out"
        for what, found in histories.items()
    )


def stream(
    order: Order,
    columns: Sequence[str],
    prepare: Prepare | None,
    rank: int,
    world_size: int,
    first: int,
    last: int,
    micro_batch: int | None = None,
) -> Generator[pa.Table]:
    """This worker's slices of steps [first, last), counted over all epochs. All workers of a group call it alike.

    Args:
        micro_batch: as of `slices`.

    Yields:
        As `slices`.
    """
    if first < last:
        blocks = _blocks(order, columns, prepare, rank, first, last)
        yield from slices(blocks, order, rank, world_size, first, last, micro_batch)


def whole_batches(
    order: Order, columns: Sequence[str], prepare: Prepare | None, rank: int, first: int, last: int
) -> Generator[pa.Table]:
    """The global batches of steps [first, last), whole on each worker, with `weight` as in `slices`."""
    if first < last:
        yield from slices(_blocks(order, columns, prepare, rank, first, last), order, 0, 1, first, last)


def _blocks(
    order: Order, columns: Sequence[str], prepare: Prepare | None, rank: int, first: int, last: int
) -> Iterator[pa.Table]:
    """All rows of steps [first, last) in order, on each worker: what worker 0's pipeline reads."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    handout = _handout(rank) if ray.train.get_context().get_world_size() > 1 else None
    references = _pipeline(order, columns, prepare, first, last) if rank == 0 else None
    for number in itertools.count():
        reference, ticket, mistake = None, 0, None
        if references is not None:
            try:
                reference = next(references)
            except Exception as error:
                mistake = _mistake(error)
                if mistake is None:
                    raise RuntimeError(f"rows could not be read: {error}") from error
        if handout is not None:
            if reference is not None:
                ticket = ray.get(handout.put.remote([reference]))
            theirs, ticket, mistake = broadcast_from_rank_zero((number, ticket, mistake))
            if theirs != number:
                raise RuntimeError(f"worker {rank} asks for block {number} of the rows, worker 0 hands on {theirs}")
            if reference is None and mistake is None:
                (reference,) = ray.get(handout.get.remote(ticket))
        if mistake is not None:  # on all workers: a worker that ended alone would leave the others waiting
            raise UserError(mistake)
        yield ray.get(reference)


def _mistake(error: BaseException | None) -> str | None:
    """What a UserError of a reading task's says, whatever Ray has wrapped it in; None where there is none."""
    found = None
    while error is not None:
        if isinstance(error, UserError):
            found = str(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found  # the innermost: Ray's own have a traceback in them


class Handout:
    """Where the workers beside worker 0 get the references that it hands on. Inside of a broadcast they would be pickled, and
    what a pickled reference names is kept for as long as the worker lives."""

    def __init__(self) -> None:
        self._tickets = itertools.count()
        self._held: dict[int, list[Any]] = {}

    def put(self, references: list[Any]) -> int:
        """Keep them in the place of the ones before the last; gives their ticket."""
        ticket = next(self._tickets)
        # whoever still asks for the last one has not come to the broadcast that follows this call
        self._held = {ticket - 1: self._held.get(ticket - 1, []), ticket: references}
        return ticket

    def get(self, ticket: int) -> list[Any]:
        return self._held[ticket]


@functools.cache
def _handout(rank: int) -> Any:
    """This group's actor, on worker 0's node, for as long as the worker lives."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name, made = None, None
    if rank == 0:
        name = f"rows-{uuid.uuid4().hex}"
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        made = ray.remote(num_cpus=0, scheduling_strategy=here)(Handout).options(name=name).remote()
        ray.get(made.__ray_ready__.remote())
    name = broadcast_from_rank_zero(name)
    return made or ray.get_actor(name)


def _pipeline(order: Order, columns: Sequence[str], prepare: Prepare | None, first: int, last: int) -> Iterator[Any]:
    """References to tables that hold the rows of steps [first, last), in order."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = STANDSTILL
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
    shared = ray.put(prepare)

    def read(piece: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        found = Piece(**{name: int(value.item()) for name, value in piece.items()})
        yield from prepared(order, found, columns, ray.get(shared))

    pieces = (asdict(piece) for piece in order.pieces(first, last))
    while some := list(itertools.islice(pieces, PIECES_AT_ONCE)):
        dataset = ray.data.from_items(some, override_num_blocks=len(some)).map_batches(
            read, batch_size=1, batch_format="numpy"
        )
        for bundle in dataset.iter_internal_ref_bundles():
            yield from bundle.block_refs
