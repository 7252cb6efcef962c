"""Training a collaborative model as each worker of a test does, without Ray."""

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from sellarec.artifacts import Place
from sellarec.collab.task import CollabTask, build_collab
from sellarec.config import Collab, Tables
from sellarec.data.log import read_log
from sellarec.errors import UserError
from sellarec.training import table as table_module
from sellarec.training import tables as tables_module
from sellarec.training.engine import Engine
from sellarec.training.storage import Storage
from sellarec.training.stream import Order, Prepare, prepared, row_groups, slices
from sellarec.training.workers import Workers, together

SEED = 5
BATCH, STEPS = 16, 6
SEQUENCES = 4
"""Sequences of a global batch."""
QUERIES = 3
"""Queries of a global batch that is ranked: of the last one some workers have padding alone."""
CUT = 5
"""Places of a short list."""


@dataclass(frozen=True)
class Run:
    """A model that is trained for some steps.

    Attributes:
        log: folder of a prepared log, as `engine_log` writes it.
        rate: what the learning rates are multiplied by at a step.
        max_columns: wider tables are cut into pieces.
        file_rows, file_bytes: rows of a file of what is exported, and its bytes, at most.
        checkpoint: where the state is saved before step `save_at`.
        start_at, start_from: a step, and the checkpoint that is loaded before it.
        output: what is exported goes there.
        damage: (rank, column, value): the worker's last valid row of the first step gets that value.
        init_from: folder of an artifact whose tables and dense weights are started from.
        broken: (row, value): a row that the item table is read from holds that value.
    """

    settings: Collab
    log: Path
    storage: Tables = field(default_factory=Tables)
    steps: int = STEPS
    max_columns: int = 1024
    file_rows: int = 1 << 20
    file_bytes: int = 1 << 28
    checkpoint: Path | None = None
    save_at: int = 0
    start_at: int = 0
    start_from: Path | None = None
    output: Path | None = None
    damage: tuple[int, str, int] | None = None
    init_from: Path | None = None
    broken: tuple[int, float] | None = None


def rate_at(step: int) -> float:
    return (1.0, 0.5, 2.0, 1.5)[step % 4]


def task_of(run: Run) -> CollabTask:
    """The same on all workers."""
    torch.manual_seed(SEED)
    task = build_collab(read_log(run.log), run.settings, run.init_from, run.log / "counts.npy", seed=SEED)
    if run.broken is not None:
        task.tables = tuple(
            replace(table, read=Broken(*run.broken, table.dim)) if table.name == "item" else table
            for table in task.tables
        )
    return task


@dataclass(frozen=True)
class Broken:
    row: int
    value: float
    columns: int

    def __call__(self, start: int, stop: int) -> np.ndarray:
        rows = np.ones((stop - start, self.columns), np.float32)
        if start <= self.row < stop:
            rows[self.row - start, 1] = self.value
        return rows


def order_of(run: Run) -> Order:
    if run.settings.train_on == "sequences":
        return Order(tuple(row_groups([str(run.log / "sequences.parquet")])), SEQUENCES, SEED)
    paths = [str(path) for path in read_log(run.log).split_paths("train")]
    return Order(tuple(row_groups(paths)), BATCH, SEED)


def valid_order_of(run: Run) -> Order:
    paths = [str(path) for path in read_log(run.log).split_paths("valid")]
    return Order(tuple(row_groups(paths)), 7, None)


def rows_of(
    order: Order, task: CollabTask, how: Prepare | None, first: int, last: int, also: tuple[str, ...] = ()
) -> Any:
    """All rows of some steps as the reading tasks prepare them, in tables of any size.

    Args:
        also: columns beside those of the task.
    """
    columns = list(dict.fromkeys((*task.columns, *also)))
    return chain.from_iterable(prepared(order, piece, columns, how) for piece in order.pieces(first, last))


def workers_of() -> Workers:
    return Workers(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=torch.device("cpu"),
        tables=dist.new_group(),
        control=dist.new_group(),
    )


def storage_of(workers: Workers) -> Storage:
    return Storage(workers, "test", 0, print, Place.of("/"))


def engine_of(run: Run, task: CollabTask, workers: Workers) -> Engine:
    return Engine(task, workers, SEED, run.settings, run.storage, "float32")


def dense_of(task: CollabTask) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy().copy() for name, weight in task.network.state_dict().items()}


def queries_of(log: Path) -> list[dict[str, Any]]:
    return pq.read_table(log / "queries.parquet").to_pylist()


def ranked(run: Run, engine: Engine, task: CollabTask, k: int) -> np.ndarray | None:
    """The k best items for each of the log's queries, on worker 0."""
    order = Order(tuple(row_groups([str(run.log / "queries.parquet")])), QUERIES, None)
    steps = order.steps_per_epoch
    rows = rows_of(order, task, task.prepare_to_score, 0, steps, ("excluded",))
    return engine.rank(slices(rows, order, 0, 1, 0, steps), k, lambda _: None)


def train(run: Run) -> dict[str, Any]:
    """What a worker finds: the losses, the initial dense weights, the seconds of exchanges and of all that is done on tables; and
    on worker 0 scores of the valid split and, of a model whose score is a product, whole lists and short ones of the queries."""
    table_module.MAX_COLUMNS, tables_module.FILE_ROWS = run.max_columns, run.file_rows
    tables_module.FILE_BYTES = run.file_bytes
    try:
        return _train(run)
    finally:  # the process serves other tests too
        table_module.MAX_COLUMNS, tables_module.FILE_ROWS = Run.max_columns, Run.file_rows
        tables_module.FILE_BYTES = Run.file_bytes


def _train(run: Run) -> dict[str, Any]:
    workers, task = workers_of(), task_of(run)
    dense = dense_of(task)
    engine = engine_of(run, task, workers)
    losses = []
    if run.start_from is not None:
        engine.load_checkpoint(str(run.start_from))
    order, rank = order_of(run), workers.rank
    rows = rows_of(order, task, task.prepare, run.start_at, run.steps)
    for step, part in enumerate(slices(rows, order, rank, workers.world_size, run.start_at, run.steps), run.start_at):
        if run.checkpoint is not None and step == run.save_at:
            engine.save_checkpoint(str(run.checkpoint))
        losses.append(engine.step(part, step, rate_at(step)))
    valid = valid_order_of(run)
    blocks = rows_of(valid, task, task.prepare_to_score, 0, valid.steps_per_epoch)
    scored = engine.score(slices(blocks, valid, rank, workers.world_size, 0, valid.steps_per_epoch), lambda _: None)
    places = read_log(run.log).facts["items"] + 1
    lists = [ranked(run, engine, task, k) for k in (places, CUT)] if run.settings.model != "din" else None
    if run.output is not None:
        engine.export(Place.of(str(run.output)), storage_of(workers))
    seconds = engine.exchanges.seconds, engine.table_seconds
    return {"losses": losses, "dense": dense, "scores": scored, "lists": lists, "seconds": seconds}


def optimizers_after_loading(run: Run) -> dict[str, dict[str, Any]]:
    """What an engine's optimizers step with once they have taken over a checkpoint."""
    workers, task = workers_of(), task_of(run)
    engine = engine_of(run, task, workers)
    engine.load_checkpoint(str(run.start_from))
    return engine.optimizers


def refusal(run: Run) -> dict[str, Any]:
    """What a worker is refused, in making the engine or in its first step; and whether it did change a row."""
    workers, task = workers_of(), task_of(run)
    try:
        engine: Engine = together(lambda: engine_of(run, task, workers), workers)
    except UserError as error:
        return {"made": str(error)}
    order = order_of(run)
    (part,) = slices(rows_of(order, task, task.prepare, 0, 1), order, workers.rank, workers.world_size, 0, 1)
    if run.damage is not None and run.damage[0] == workers.rank:
        part = damaged(part, *run.damage[1:])
    found: dict[str, Any] = {"rows": part["row"].to_pylist()}
    for what, call in (
        ("step", lambda: engine.step(part, 0, 1.0)),
        ("score", lambda: engine.score([part], lambda _: None)),
    ):
        try:
            call()
        except (UserError, FloatingPointError) as error:
            found[what] = f"{type(error).__name__}: {error}"
    return found


def damaged(rows: pa.Table, column: str, value: float) -> pa.Table:
    values = rows[column].to_numpy().copy()
    values[-1] = value
    return rows.set_column(rows.column_names.index(column), column, pa.array(values))
