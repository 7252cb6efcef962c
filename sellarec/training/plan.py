"""Which worker holds which rows and columns of the embedding tables, and the memory that takes.

Shapes: R rows of a table, D columns, W workers.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sellarec.config import DENSE_TABLE_OPTIMIZERS, Sparse, Tables
from sellarec.errors import UserError
from sellarec.training.table import Table

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

KERNELS = {"device": "fused", "uvm": "fused_uvm", "uvm-caching": "fused_uvm_caching"}
"""TorchRec's name of the kernel behind a placement."""

CACHED_SHARE = 0.2
"""What of a table a cache on the GPU holds, with placement uvm-caching."""

CACHE_BYTES = 4, 16
"""What that cache keeps beside its rows: of each row of the table, and of each that it holds (which it is, when it was used)."""

COLUMNS = 4
"""Columns that the kernels take at once: a worker holds a multiple of them."""

MOST_HELD = 1.25
"""What auto lets a worker hold at most, in equal shares of all bytes, where a table of its can be cut."""

GIB = 2**30


@dataclass(frozen=True)
class Placement:
    """Where a table lies.

    Attributes:
        sharding: row-wise: each of W workers holds a block of ceil(R / W) rows; column-wise: each holds a range of the columns
            of every piece of the table; table-wise: one holds it whole.
        worker: the one that holds it whole; else None.
    """

    table: Table
    sharding: Literal["row-wise", "column-wise", "table-wise"]
    worker: int | None = None

    def rows(self, worker: int, workers: int) -> int:
        """Rows of which a worker holds something."""
        if self.sharding == "row-wise":
            block = -(-self.table.rows // workers)
            return max(0, min(block, self.table.rows - worker * block))
        return self.table.rows if self.columns(worker, workers) else 0

    def columns(self, worker: int, workers: int) -> list[range]:
        """What a worker holds of the columns of its rows: ranges of the whole table's, at most one of each piece."""
        pieces = whole(self.table)
        if self.sharding == "column-wise":
            pieces = [column_share(piece, worker, workers) for piece in pieces]
        elif self.sharding == "table-wise" and worker != self.worker:
            pieces = []
        return [piece for piece in pieces if piece]


def whole(table: Table) -> list[range]:
    """All columns of a table, piece by piece."""
    return [range(start, stop) for _, start, stop in table.pieces]


def column_share(piece: range, worker: int, workers: int) -> range:
    """A worker's columns of a piece: multiples of COLUMNS as even as can be; the last workers may hold none."""
    least, more = divmod(-(-len(piece) // COLUMNS), workers)
    start = COLUMNS * (worker * least + min(worker, more))
    return piece[start : start + COLUMNS * (least + (worker < more))]


def optimizer_of(optimizer: Sparse | None, table: Table) -> Sparse | None:
    """The optimizer that changes a table's rows: none does those of a frozen one."""
    return None if table.frozen else optimizer


def row_bytes(columns: Sequence[range], storage: Tables, optimizer: Sparse | None) -> tuple[int, int]:
    """Bytes of those columns of a row, and of what the optimizer keeps beside them, a dense gradient included."""
    count = sum(map(len, columns))
    state = {"sgd": 0, "rowwise-adagrad": 4 * len(columns), "adagrad": 4 * count}
    state |= dict.fromkeys(DENSE_TABLE_OPTIMIZERS, 12 * count)
    return count * ITEM_BYTES[storage.dtype], state[optimizer.table_optimizer] if optimizer else 0


Memory = Literal["device", "host"]


def row_memory(columns: Sequence[range], storage: Tables, optimizer: Sparse | None) -> dict[Memory, int]:
    """Bytes that those columns of a row, with the optimizer's state, take on the worker's device and in its host's memory. As
    fbgemm has it, rows in the host's memory leave what is one float a row on the GPU, and a cache there is beside them."""
    weights, state = row_bytes(columns, storage, optimizer)
    if storage.placement == "device":
        return {"device": weights + state, "host": 0}
    by_rows = state if optimizer and optimizer.table_optimizer == "rowwise-adagrad" else 0
    cache = 0
    if storage.placement == "uvm-caching":
        of_each, of_held = (count * len(columns) for count in CACHE_BYTES)
        cache = of_each + math.ceil(CACHED_SHARE * (weights + of_held))
    return {"device": by_rows + cache, "host": weights + state - by_rows}


def place(
    tables: Sequence[Table], storage: Tables, optimizer: Sparse | None, workers: int, device: str
) -> list[Placement]:
    """Places by `storage.sharding`.

    Raises:
        UserError: the device's kernels can't do what is asked for.
    """
    check_kernels(storage, optimizer, device)
    if storage.sharding == "row-wise":
        return [_row_wise(table, workers) for table in tables]
    if storage.sharding == "column-wise":
        return [Placement(table, "column-wise") for table in tables]
    if storage.sharding == "auto":
        return balanced(_planned(tables, storage, workers, device), storage, optimizer, workers)
    size = {t.name: sum(row_bytes(whole(t), storage, optimizer_of(optimizer, t))) * t.rows for t in tables}
    held = [0] * workers
    placed = {}
    for name in sorted(size, key=lambda name: (-size[name], name)):
        worker = held.index(min(held))
        held[worker] += size[name]
        placed[name] = worker
    return [Placement(table, "table-wise", placed[table.name]) for table in tables]


def _row_wise(table: Table, workers: int) -> Placement:
    """A table of which a worker would get no row lies whole on the first: kernels fail that hold no row of any table."""
    placement = Placement(table, "row-wise")
    return placement if placement.rows(workers - 1, workers) else Placement(table, "table-wise", 0)


def balanced(
    placements: Sequence[Placement], storage: Tables, optimizer: Sparse | None, workers: int
) -> list[Placement]:
    """As long as a worker holds more than MOST_HELD equal shares of all bytes, the largest whole table of the one that holds most
    is cut by rows, where it can be.

    What a worker has room for isn't asked: a stage's workers place tables too, and all have to find the same.
    """
    placed = list(placements)
    while True:
        held = worker_bytes(placed, storage, optimizer, workers)
        fullest = max(range(workers), key=held.__getitem__)
        found = [p for p in placed if p.worker == fullest and _row_wise(p.table, workers).worker is None]
        if held[fullest] * workers <= MOST_HELD * sum(held) or not found:
            return placed
        largest = max(found, key=lambda p: p.table.rows * _held_bytes(p, fullest, workers, storage, optimizer))
        placed = [_row_wise(p.table, workers) if p is largest else p for p in placed]


def check_sharding(storage: Tables, optimizer: Sparse | None, stage: str | None = None) -> None:
    """Refuse a sharding that isn't offered, or not with that optimizer, on any device.

    Args:
        stage: whose optimizer it is, for the message.

    Raises:
        UserError: with the reason.
    """
    if storage.sharding == "grid":
        raise UserError(
            "tables.sharding is grid (table-row-wise within a node), which TorchRec refuses on CPUs, and which nothing here has "
            "run on GPUs: take row-wise, or column-wise for wide tables"
        )
    if storage.sharding == "data-parallel":
        raise UserError(
            "tables.sharding is data-parallel, but the fused optimizers skip tables that every worker holds whole, and on CPUs "
            "TorchRec's EmbeddingCollection fails with them: take row-wise"
        )
    if storage.sharding == "column-wise" and optimizer and optimizer.table_optimizer == "rowwise-adagrad":
        name = f"{stage}.table_optimizer" if stage else "table_optimizer"
        raise UserError(
            f"tables.sharding is column-wise and {name} rowwise-adagrad, which then keeps one sum of squares for each worker's "
            "range of columns: another optimizer, whose state depends on the number of workers; take adagrad, sgd, adam or adamw "
            f"({name}), or row-wise"
        )


def check_optimizer(storage: Tables, optimizer: Sparse, stage: str | None = None) -> None:
    """Refuse an optimizer that no kernels have, on any device, for tables that are stored so.

    Args:
        stage: whose optimizer it is, for the message.

    Raises:
        UserError: with the reason.
    """
    kind, prefix = optimizer.table_optimizer, f"{stage}." if stage else ""
    if kind in DENSE_TABLE_OPTIMIZERS and (storage.dtype != "float32" or storage.placement != "device"):
        raise UserError(
            f"{prefix}table_optimizer is {kind}, tables.dtype {storage.dtype} and tables.placement {storage.placement}: {kind} "
            "steps all rows with torch's own operations, which takes float32 on the device; take another optimizer or leave "
            "those out"
        )
    if optimizer.table_weight_decay and kind in ("sgd", "adagrad"):
        raise UserError(
            f"{prefix}table_weight_decay is {optimizer.table_weight_decay} and {prefix}table_optimizer {kind}, whose kernels for "
            "CPUs would ignore it: take rowwise-adagrad, adam or adamw, or the loss's own l2"
        )


def check_kernels(storage: Tables, optimizer: Sparse | None, device: str) -> None:
    """Raises UserError where the kernels of the device (cpu or cuda) can't do what is asked for, with the reason."""
    check_sharding(storage, optimizer)
    if device == "cpu" and storage.dtype == "bfloat16":
        raise UserError("tables.dtype is bfloat16, which the kernels for CPUs have not: take float16 or float32")
    if device == "cpu" and storage.placement != "device":
        raise UserError(f"tables.placement is {storage.placement}, but there is no GPU: leave it out")
    if optimizer is not None:
        check_optimizer(storage, optimizer)


def _planned(tables: Sequence[Table], storage: Tables, workers: int, device: str) -> list[Placement]:
    """What TorchRec's planner finds best of row-wise and table-wise."""
    import torch
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
    from torchrec.distributed.planner.types import ParameterConstraints, PlannerError

    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it warns of every topology that isn't asked of the hardware

    class Sharder(EmbeddingCollectionSharder):
        def sharding_types(self, compute_device_type: str) -> list[str]:
            return ["row_wise", "table_wise"]  # the first is left out for CPUs, where it works

    # A table's pieces lie together, so one of full width stands for them. TorchRec wants one width a collection.
    holder = torch.nn.Module()
    for width in sorted({table.dim for table in tables}):
        configs = [
            EmbeddingConfig(name=table.name, embedding_dim=width, num_embeddings=table.rows, feature_names=[table.name])
            for table in tables
            if table.dim == width
        ]
        setattr(holder, f"width_{width}", EmbeddingCollection(device=torch.device("meta"), tables=configs))
    constraint = ParameterConstraints(
        sharding_types=["row_wise", "table_wise"], compute_kernels=[KERNELS[storage.placement]]
    )
    memory: Any = {"hbm_cap": 2**50, "ddr_cap": 2**50}  # what fits is checked by our own arithmetic, optimizer included
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=workers, compute_device=device, local_world_size=workers, **memory),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints={table.name: constraint for table in tables},
    )
    try:
        plans = planner.plan(holder, [Sharder()]).plan
    except PlannerError as error:
        raise UserError(f"TorchRec's planner finds no plan: {error}; take --tables.sharding row-wise") from error
    found = {table.name: plans[f"width_{table.dim}"][table.name] for table in tables}
    return [
        _row_wise(table, workers)
        if found[table.name].sharding_type == "row_wise"
        else Placement(table, "table-wise", found[table.name].ranks[0])
        for table in tables
    ]


def describe(
    placements: Sequence[Placement], storage: Tables, optimizer: Sparse | None, workers: int
) -> list[dict[str, Any]]:
    """One line a table: where it lies, and the bytes of the worker that holds most of it."""
    lines = []
    for placement in placements:
        table, fullest = placement.table, placement.worker or 0  # the first holds most of a table that is cut
        rows, columns = placement.rows(fullest, workers), placement.columns(fullest, workers)
        weights, state = row_bytes(columns, storage, optimizer_of(optimizer, table))
        lines.append(
            {
                "table": table.name,
                "rows": table.rows,
                "columns": table.dim,
                "dtype": storage.dtype,
                "sharding": placement.sharding,
                "worker": placement.worker,
                "placement": storage.placement,
                "rows per worker": rows,
                "columns per worker": sum(map(len, columns)),
                "weight bytes": rows * weights,
                "optimizer bytes": rows * state,
            }
        )
    return lines


def worker_bytes(
    placements: Sequence[Placement],
    storage: Tables,
    optimizer: Sparse | None,
    workers: int,
    memory: Memory | None = None,
) -> list[int]:
    """Bytes of tables and their optimizer on each worker.

    Args:
        memory: only what lies there, a cache included; None: the rows and their optimizer, wherever.
    """
    return [
        sum(p.rows(w, workers) * _held_bytes(p, w, workers, storage, optimizer, memory) for p in placements)
        for w in range(workers)
    ]


def _held_bytes(
    placement: Placement,
    worker: int,
    workers: int,
    storage: Tables,
    optimizer: Sparse | None,
    memory: Memory | None = None,
) -> int:
    """Bytes of what a worker holds of a row, its optimizer's state included: as `worker_bytes`."""
    columns, of_table = placement.columns(worker, workers), optimizer_of(optimizer, placement.table)
    if memory is None:
        return sum(row_bytes(columns, storage, of_table))
    return row_memory(columns, storage, of_table)[memory]


def check_fits(
    placements: Sequence[Placement],
    storage: Tables,
    optimizer: Sparse | None,
    workers: int,
    room: int,
    whose: str,
    memory: Memory = "device",
) -> None:
    """Refuse tables of which a worker would hold more than it has room for.

    Args:
        room: bytes for the tables of one worker.
        whose: what has that room, for the message.
        memory: where that room is.

    Raises:
        UserError: with the arithmetic, and row-wise as the way out where that fits.
    """
    held = worker_bytes(placements, storage, optimizer, workers, memory)
    fullest = max(range(workers), key=held.__getitem__)
    if held[fullest] > room:
        sums = " + ".join(
            f"{p.table.name} {p.rows(fullest, workers):,} rows x "
            f"{_held_bytes(p, fullest, workers, storage, optimizer, memory):,} bytes"
            for p in placements
            if p.rows(fullest, workers)
        )
        cut = [_row_wise(p.table, workers) for p in placements]
        by_rows = max(worker_bytes(cut, storage, optimizer, workers, memory))
        where = " in its host's memory" if memory == "host" else ""
        fits = f"--tables.sharding row-wise ({by_rows / GIB:.2f} GiB), " if by_rows <= room else ""
        raise UserError(
            f"worker {fullest} of {workers} would hold {held[fullest] / GIB:.2f} GiB of tables{where} ({sums}), but {whose} has "
            f"room for {room / GIB:.2f} GiB: take {fits}a smaller width, rows stored as float16 (tables.dtype), an optimizer "
            "with less state (table_optimizer), or more machines"
        )
