"""Training stage align as each worker of a test does, without Ray; and the same in one process on whole tables of plain torch."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import engine_cases
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from engine_cases import BATCH, SEED, STEPS
from table_cases import Setup, plain_optimizer

from sellarec.alignment.align import AlignTask, build_align
from sellarec.alignment.measures import compare_views, draw_rows_of_users
from sellarec.artifacts import Place
from sellarec.collab.task import build_collab
from sellarec.config import Align, Collab, Tables
from sellarec.data.keys import uniform
from sellarec.data.log import read_log
from sellarec.errors import UserError
from sellarec.training import engine as engine_module
from sellarec.training.engine import Engine
from sellarec.training.stream import Order, row_groups, slices
from sellarec.training.table import Jagged, initial_rows
from sellarec.training.task import INITIAL, Alone

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


def profiled(start: int, stop: int) -> np.ndarray:
    """Every third user has no profile."""
    return distilled(start, stop)[:, ::-1] * (np.arange(start, stop) % 3 > 0)[:, None]


def task_of(run: Run) -> AlignTask:
    torch.manual_seed(SEED)
    collab = build_collab(read_log(run.log), run.collab, None, run.log / "counts.npy", seed=SEED)
    profiles = profiled if run.settings.user_vectors == "profile" else None
    rows = None if run.settings.side == "items" else run.log / f"users-{run.settings.user_vectors}.parquet"
    return build_align(collab, WIDTH, distilled, run.collab.dim, run.settings, MEASURED, SEED, profiles, rows)


def write_users(log: Path) -> None:
    """The rows by whose users is measured: of all who have what they are aligned to, a row each."""
    columns = ("row", "user", "item", "label", "user_seen", "item_seen", "history")
    order = Order(tuple(row_groups([str(path) for path in read_log(log).split_paths("train")])), BATCH, SEED)
    ways = {
        "liked": lambda rows: pc.list_value_length(rows["history"]).to_numpy() > 0,
        "profile": lambda rows: rows["user"].to_numpy() % 3 > 0,
    }
    for name, has_vector in ways.items():
        pq.write_table(draw_rows_of_users(order, columns, has_vector), log / f"users-{name}.parquet")


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
        engine.export(Place.of(str(run.output)), engine_cases.storage_of(workers))
    return {
        "losses": losses,
        "plan": engine.plan(),
        "state": sorted(engine._state()["tables"].get("rows", {})),
        "measured": (before, engine.measure()),
    }


def refusal(run: Run, unread: int) -> str:
    """What a worker is refused in making the engine, where the log's train split is there for all but worker `unread`."""
    workers, task = engine_cases.workers_of(), task_of(run)
    assert task.graph is not None and task.model is not None
    if workers.rank == unread:
        task.graph = replace(task.graph, paths=(str(run.log / "gone.parquet"),))
    try:
        Engine(task, workers, SEED, run.settings, run.storage, "float32")
    except UserError as error:
        return str(error)
    return "nothing"


def score(run: Run) -> dict[str, Any]:
    """What a worker looks up to score the valid split, before any step: by feature how many ids, and by width how many lists its
    tables were given, empty ones too; on worker 0 the scores."""
    workers, task = engine_cases.workers_of(), task_of(run)
    engine = Engine(task, workers, SEED, run.settings, run.storage, "float32")
    asked: dict[str, int] = {}
    given: dict[int, int] = {}
    for tables in (tables for tables in (engine.tables, engine.frozen_tables) if tables is not None):
        tables.look_up = partial(_counted, tables.look_up, asked)
        for name, collection in tables._collections.items():
            tables._collections[name] = partial(_given, collection, int(name.removeprefix("width_")), given)
    valid = Order(tuple(row_groups([str(path) for path in read_log(run.log).split_paths("valid")])), 7, None)
    rows = engine_cases.rows_of(valid, task, task.prepare_to_score, 0, valid.steps_per_epoch)
    parts = slices(rows, valid, workers.rank, workers.world_size, 0, valid.steps_per_epoch)
    return {"scores": engine.score(parts, lambda _: None), "asked": asked, "given": given}


def _counted(look_up: Any, asked: dict[str, int], ids: dict[str, Any], *shares: Any) -> Any:
    for name, values in ids.items():
        asked[name] = asked.get(name, 0) + len(values.values if isinstance(values, Jagged) else values)
    return look_up(ids, *shares)


def _given(collection: Any, width: int, given: dict[int, int], keyed: Any) -> Any:
    found = collection(keyed)
    given[width] = given.get(width, 0) + len(keyed.lengths())
    return found


def plain_scores(run: Run) -> np.ndarray:
    """Of the valid split, before any step: as the collaborative model scores it with whole tables."""
    task = task_of(run)
    collab = task._collab
    log = read_log(run.log).split("valid")
    batch = collab.collate(log.append_column("weight", pa.array(np.ones(len(log), np.float32))), None)
    tables = {t.name: torch.from_numpy(initial_rows(t, SEED, 0, t.rows)) for t in collab.tables}
    with torch.no_grad():
        return collab.score(None, batch, {name: tables[name][batch[name]] for name in ("user", "item")}).numpy()


class Twin:
    """The losses of the steps, and tables and dense weights after them."""

    def __init__(self, run: Run) -> None:
        task, order, settings = task_of(run), order_of(run), run.settings
        rows = {t.name: torch.from_numpy(initial_rows(t, SEED, 0, t.rows)).requires_grad_() for t in task.tables}
        distilled = ("semantic", "profile")
        trained = [table for table in task.tables if not (table.name in distilled and settings.semantic == "frozen")]
        setup = Setup(tuple(trained), replace(settings))
        optimizers = {t.name: plain_optimizer(setup, t, rows[t.name]) for t in trained}
        dense = list(task.model.parameters())
        optimizer = torch.optim.AdamW(dense, weight_decay=settings.weight_decay)
        self.run, self.matrix = run, None if task.graph is None else smoothing(run, task)
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
                found = self.smoothed(rows, step)[name][flat]
                vectors[feature] = Jagged(found, ids.lengths) if isinstance(ids, Jagged) else found
                if self.matrix is not None and name not in distilled:
                    vectors[INITIAL + feature] = rows[name][flat]
                    touched[name] = set(range(len(rows[name])))
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

    @torch.no_grad()
    def measure(self, task: AlignTask, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
        smoothed = self.smoothed(rows, None)
        found = self.compare(task, smoothed["item"][MEASURED], rows["semantic"][MEASURED])
        if task.measured_rows is None:
            return found
        users = task.measured_rows["user"].to_pylist()
        if self.run.settings.user_vectors == "profile":
            drawn_to = rows["profile"][users]
        else:
            last = [liked[-self.run.settings.history :] for liked in task.measured_rows["history"].to_pylist()]
            drawn_to = torch.stack([rows["semantic"][liked].mean(0) for liked in last])
        of_users = self.compare(task, smoothed["user"][users], drawn_to)
        return found | {f"{name} of users": value for name, value in of_users.items()}

    def compare(self, task: AlignTask, rows: torch.Tensor, semantic: torch.Tensor) -> dict[str, Any]:
        if self.run.settings.contrastive == "darec":
            return compare_views(*task.model.projection(rows, semantic)[:2])
        if self.run.settings.contrastive == "rlmrec-con":
            return compare_views(rows, task.model.projection(semantic))
        return compare_views(task.model.projection(rows), semantic)

    def smoothed(self, rows: dict[str, torch.Tensor], step: int | None) -> dict[str, torch.Tensor]:
        """Rows as LightGCN smooths them, by a whole matrix; at a training step those that are masked count as zeros."""
        if self.matrix is None:
            return rows
        both, settings = torch.cat([rows["user"], rows["item"]]), self.run.settings
        if step is not None and settings.contrastive == "rlmrec-gen":
            kept = uniform(np.arange(len(both)), SEED, step) >= settings.mask_share
            both = both * torch.from_numpy(kept)[:, None]
        layers = [both[:, :-1]]
        for _ in range(self.run.collab.layers):
            layers.append(self.matrix @ layers[-1])
        smooth = torch.cat([torch.stack(layers).mean(0), both[:, -1:]], dim=1)
        users = len(rows["user"])
        return rows | {"user": smooth[:users], "item": smooth[users:]}


def smoothing(run: Run, task: AlignTask) -> torch.Tensor:
    """The normalized adjacency of users, then items, by train positives."""
    assert task.graph is not None
    train = read_log(run.log).split("train", ["user", "item", "label"])
    user, item, label = (train[name].to_numpy() for name in train.column_names)
    matrix = torch.zeros(task.graph.users + task.graph.items, task.graph.users + task.graph.items)
    for u, i in zip(user[label == 1], task.graph.users + item[label == 1], strict=True):
        matrix[u, i] = matrix[i, u] = 1
    scale = matrix.sum(1).clamp(min=1) ** -0.5
    return scale[:, None] * matrix * scale
