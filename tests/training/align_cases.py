"""Training stage align as each worker of a test does, without Ray; and the same in one process on whole tables of plain torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import engine_cases
import numpy as np
import pyarrow as pa
import torch
from engine_cases import BATCH, SEED, STEPS
from table_cases import Setup, plain_optimizer

from sellarec.alignment.align import AlignTask, build_align
from sellarec.alignment.measures import compare_views
from sellarec.artifacts import Place
from sellarec.collab.task import build_collab
from sellarec.config import Align, Collab, Tables
from sellarec.data.log import read_log
from sellarec.training import engine as engine_module
from sellarec.training.engine import Engine
from sellarec.training.stream import Order, row_groups, slices
from sellarec.training.table import Jagged, initial_rows

WIDTH = 8
"""Columns of the distilled vectors: as many as the collaborative rows have, so that TorchRec could put them together."""

MEASURED = np.array([0, 2, 3, 5, 7, 8, 9, 11])


@dataclass(frozen=True)
class Run:
    """A few steps of stage align; the attributes are those of `engine_cases.Run`."""

    settings: Align
    collab: Collab
    log: Path
    storage: Tables = field(default_factory=Tables)
    checkpoint: Path | None = None
    save_at: int = 0
    start_at: int = 0
    start_from: Path | None = None
    output: Path | None = None


def distilled(start: int, stop: int) -> np.ndarray:
    return np.random.default_rng(8).standard_normal((100, WIDTH)).astype(np.float32)[start:stop]


def task_of(run: Run) -> AlignTask:
    torch.manual_seed(SEED)
    collab = build_collab(read_log(run.log), run.collab, None, run.log / "counts.npy", seed=SEED)
    return build_align(collab, WIDTH, distilled, run.collab.dim, run.settings, MEASURED)


def order_of(run: Run) -> Order:
    return Order(tuple(row_groups([str(path) for path in read_log(run.log).split_paths("train")])), BATCH, SEED)


def rows_of(run: Run, task: AlignTask, first: int, last: int) -> Any:
    return engine_cases.rows_of(order_of(run), task, task.prepare, first, last)


def train(run: Run) -> dict[str, Any]:
    """What a worker finds: the losses, where each table lies, and what a checkpoint holds."""
    workers, task = engine_cases.workers_of(), task_of(run)
    engine = Engine(task, workers, SEED, run.settings, run.storage, "float32")
    if run.start_from is not None:
        engine.load_checkpoint(str(run.start_from))
    engine_module.MEASURED_AT_ONCE = 2
    before = engine.measure()
    losses, rows = [], rows_of(run, task, run.start_at, STEPS)
    parts = slices(rows, order_of(run), workers.rank, workers.world_size, run.start_at, STEPS)
    for step, part in enumerate(parts, run.start_at):
        if run.checkpoint is not None and step == run.save_at:
            engine.save_checkpoint(str(run.checkpoint))
        losses.append(engine.step(part, step, engine_cases.rate_at(step)))
    if run.output is not None:
        engine.export(Place.of(str(run.output)))
    return {
        "losses": losses,
        "plan": engine.plan(),
        "state": sorted(engine._state()["tables"].get("rows", {})),
        "measured": (before, engine.measure()),
    }


class Alone:
    """`Peers` of one worker."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def add(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return values.detach()


class Twin:
    """The losses of the steps, and tables and dense weights after them."""

    def __init__(self, run: Run) -> None:
        task, order, settings = task_of(run), order_of(run), run.settings
        rows = {t.name: torch.from_numpy(initial_rows(t, SEED, 0, t.rows)).requires_grad_() for t in task.tables}
        trained = [table for table in task.tables if not (table.name == "semantic" and settings.semantic == "frozen")]
        setup = Setup(tuple(trained), replace(settings))
        optimizers = {t.name: plain_optimizer(setup, t, rows[t.name]) for t in trained}
        dense = list(task.model.parameters())
        optimizer = torch.optim.AdamW(dense, weight_decay=settings.weight_decay)
        self.losses, self.measured = [], [self.measure(task, rows)]
        for step in range(STEPS):
            rate = engine_cases.rate_at(step)
            whole = pa.concat_tables(rows_of(run, task, step, step + 1))
            weight = pa.array(np.ones(order.batch_rows(step), np.float32))
            batch = task.collate(whole.append_column("weight", weight), step)
            vectors: dict[str, Any] = {}
            touched: dict[str, set[int]] = {table.name: set() for table in task.tables}
            for feature, ids in task.lookups(batch).items():
                (name,) = (table.name for table in task.tables if feature in table.features)
                flat = ids.values if isinstance(ids, Jagged) else ids
                touched[name] |= set(flat.tolist())
                found = rows[name][flat]
                vectors[feature] = Jagged(found, ids.lengths) if isinstance(ids, Jagged) else found
            loss = task.loss(task.model, batch, vectors, Alone()) / task.targets(batch)
            for values in rows.values():
                values.grad = torch.zeros_like(values)
            optimizer.zero_grad()
            loss.backward()
            self.losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(dense, settings.clip)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
            optimizer.step()
            for name, of_table in optimizers.items():
                of_table.step(settings.table_learning_rate * rate, sorted(touched[name]))
        self.measured.append(self.measure(task, rows))
        self.tables = {name: values.detach().numpy() for name, values in rows.items()}
        self.dense = {name: weight.detach().numpy() for name, weight in task.model.named_parameters()}

    @staticmethod
    @torch.no_grad()
    def measure(task: AlignTask, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
        return compare_views(task.model.projection(rows["item"][MEASURED]), rows["semantic"][MEASURED])
