"""Scoring a split with several trained models, and ranking for its users, on each worker, under Ray Train."""

import gc
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train

from sellarec.artifacts import Place
from sellarec.config import STORAGE_TIMEOUT, WORKER_TIMEOUT, Tables
from sellarec.errors import StageFailed, UserError
from sellarec.evaluation.ranking import UserMetrics
from sellarec.training.engine import Engine, rank_queries
from sellarec.training.progress import note
from sellarec.training.storage import Storage
from sellarec.training.stream import Order, Prepare, named_counts, shortened, stream, whole_batches
from sellarec.training.task import Task
from sellarec.training.workers import Workers, together, together_of_first


@dataclass(frozen=True)
class Scoring:
    """All that a worker needs to score one split with several tasks.

    Attributes:
        timeout: seconds after which a worker that doesn't answer counts as lost.
        storage_timeout: seconds for which storage that fails is tried again.
        build: by model name, what makes the task with its trained weights; called on each worker.
        order: order of the rows.
        output: the place that `scores.parquet` is written to: column `row`, and one float32 column a model; and
            `scoring.json`: `histories`, by model what `named_counts` says of its prompts.
        queries: order of the queries for which each model ranks the catalog too; None ranks nothing.
        cutoffs: at which the rankings are measured; `MODEL.parquet` in the output has a row a user, a column a metric.
    """

    stage: str
    build: dict[str, Callable[[], Task]]
    settings: Any
    order: Order
    output: Place
    board: Any = None
    timeout: float = WORKER_TIMEOUT
    storage_timeout: float = STORAGE_TIMEOUT
    dtype: str = "float32"
    storage: Tables = field(default_factory=Tables)
    queries: Order | None = None
    cutoffs: Sequence[int] = ()


def score_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker of the stage evaluate."""
    scoring: Scoring = config["scoring"]
    try:
        _score(scoring)
    except UserError as error:
        scoring.output.reach()  # what isn't found while storage is away is no mistake: workers are started again, and wait
        ray.get(scoring.board.put.remote({"error": str(error)}))
    except StageFailed as error:
        ray.get(scoring.board.put.remote({"failed": str(error)}))


def _score(scoring: Scoring) -> None:
    workers = Workers.join(scoring.timeout)
    tell = partial(note, scoring.board, scoring.stage)
    storage = Storage(workers, scoring.stage, scoring.storage_timeout, tell, scoring.output)
    storage.wait()
    order = scoring.order
    columns: dict[str, np.ndarray] = {}
    histories: dict[str, dict[str, int]] = {}
    rankings: dict[str, pa.Table] = {}

    def score(name: str, build: Callable[[], Task]) -> None:
        """With one of the models, which is gone when the next one is loaded."""
        start = time.monotonic()
        task = together_of_first(build, workers)
        dtype = scoring.dtype if task.blocks else "float32"  # as each was trained
        engine = together(partial(Engine, task, workers, 0, scoring.settings, scoring.storage, dtype), workers)
        slices = split_slices(order, task, task.prepare_to_score, workers, 0, order.steps_per_epoch)
        counted = np.zeros(3, np.int64)
        found = engine.score(
            _counting(slices, counted),
            partial(report_scored, workers, scoring.board, scoring.stage, name, "rows scored", order),
        )
        counts = workers.sum(*counted.tolist())
        if counts[0]:
            histories[name] = named_counts(counts)
        if found is not None:
            columns["row"], columns[name] = found["row"], found["score"]
            seconds = time.monotonic() - start
            record = {"stage": scoring.stage, "model": name, "rows": len(found["row"]), "seconds": seconds}
            scoring.board.put.remote(record)
        if scoring.queries is not None:
            ranked = _rank(scoring, scoring.queries, name, engine)
            if ranked is not None:
                rankings[name] = pa.table({"user": ranked.users, **ranked.values})

    for name, build in scoring.build.items():
        score(name, build)
        gc.collect()  # FSDP's hooks and modules name each other

    def write() -> None:
        with scoring.output.writing() as folder:
            for name, ranking in rankings.items():
                pq.write_table(ranking, folder / f"{name}.parquet")
            pq.write_table(pa.table(columns), folder / "scores.parquet")
        scoring.output.write_json("scoring.json", {"histories": histories})

    storage.first(f"writing {scoring.output}/scores.parquet", write)


def _counting(slices: Iterable[pa.Table], counted: np.ndarray) -> Iterator[pa.Table]:
    """The slices; what `shortened` counts of them is added to `counted`, int64 [3]."""
    for rows in slices:
        counted += shortened(rows)
        yield rows


def _rank(scoring: Scoring, queries: Order, name: str, engine: Engine) -> UserMetrics | None:
    task, workers, steps = engine.task, engine.workers, queries.steps_per_epoch
    columns = distinct([*task.columns, "user", "relevant", "excluded"])
    batches = list(whole_batches(queries, columns, task.prepare_to_score, workers.rank, 0, steps))
    report = partial(report_scored, workers, scoring.board, scoring.stage, name, "users ranked", queries)
    return rank_queries(engine, batches, scoring.cutoffs, report)


def split_slices(
    order: Order,
    task: Task,
    how: Prepare | None,
    workers: Workers,
    first: int,
    last: int,
    more: Sequence[str] = (),
    micro_batch: int | None = None,
) -> Generator[pa.Table]:
    """This worker's slices of steps [first, last), prepared `how`, with the columns that a task reads and `more`. With a
    `micro_batch`, prompts are dealt out so that little of each is padding; prompts to score are not, as those that begin alike
    lie side by side."""
    columns = distinct([*task.columns, *more])
    return stream(order, columns, how, workers.rank, workers.world_size, first, last, micro_batch)


def distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def report_scored(workers: Workers, board: Any, stage: str, model: str, done: str, order: Order, steps: int) -> None:
    """Send how much of a split is done: "rows scored" or "users ranked"."""
    if workers.rank == 0:
        scored = min(steps * order.batch, order.rows)
        board.put.remote({"stage": stage, "what": model, "scored": scored, "rows": order.rows, "done": done})
