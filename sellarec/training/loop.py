"""The training loop that every stage with gradients runs, on each worker, under Ray Train.

The global batch is fixed and workers slice it, so any number of workers takes the same step (`sellarec.training.engine`).
"""

import contextlib
import dataclasses
import math
import random
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
import ray.util
import torch
import torch.distributed as dist

from sellarec.artifacts import Place
from sellarec.config import STORAGE_TIMEOUT, WORKER_TIMEOUT, Dense, Selection, Sparse, Steps, Tables
from sellarec.errors import StageFailed, UserError
from sellarec.evaluation.metrics import auc, uauc
from sellarec.training.checkpoints import Checkpoints
from sellarec.training.engine import Engine, rank_queries
from sellarec.training.launch import CHECKPOINTS
from sellarec.training.progress import PROGRESS_SECONDS, note
from sellarec.training.schedule import warmup_steps
from sellarec.training.scoring import distinct, report_scored, split_slices
from sellarec.training.storage import Storage
from sellarec.training.stream import Order, named_counts, shortened, whole_batches
from sellarec.training.task import CheckedTask, MeasuredTask, Task
from sellarec.training.workers import Workers, together, together_of_first

FIRST_LOSSES = 20

CHECKED_ROWS = 4
"""Rows of the valid split by which a saved model is compared with the trained one, of each worker."""


@dataclass(frozen=True)
class Profiled:
    """Steps of which each worker writes a trace of torch's profiler.

    Attributes:
        first: the first of them, from 2 on, counted from where the workers start or take up a stage.
        steps: how many.
        place: a folder for `STAGE-step-N-worker-R.json.gz`, as chrome://tracing and Perfetto read them.
    """

    first: int
    steps: int
    place: Place


@dataclass(frozen=True)
class Training:
    """All that a worker needs to train one stage.

    Attributes:
        stage: the stage's name, for messages.
        build: makes the task; called on each worker.
        settings: the stage's section of the config; which of Dense, Sparse, Selection, Language it is tells the loop
            what to do.
        train: order of the training rows.
        valid: order of the rows by which the kept state is selected; None where it is the last one.
        output: the artifact that the result is written to.
        profiled: the steps of which traces are written; None for none.
        board: actor that takes progress records.
        timeout: seconds after which a worker that doesn't answer counts as lost.
        storage_timeout: seconds for which storage that fails is tried again.
        dtype: compute type of the dense part.
        storage: how embedding tables are stored and sharded.
        window: with how many evaluations on the valid split behind them the settings begin to hold, and with how many they
            end to; None: never. Outside of it no step is taken: the training pauses, and leaves a checkpoint.
        pause_after: evaluations after which a training that is not at its end pauses too; None for none.
    """

    stage: str
    build: Callable[[], Task]
    settings: Steps
    seed: int
    train: Order
    valid: Order | None
    output: Place
    board: Any = None
    timeout: float = WORKER_TIMEOUT
    storage_timeout: float = STORAGE_TIMEOUT
    dtype: str = "float32"
    storage: Tables = field(default_factory=Tables)
    profiled: "Profiled | None" = None
    window: tuple[int, int | None] = (0, None)
    pause_after: int | None = None

    @property
    def steps(self) -> int:
        steps = math.ceil(self.settings.epochs * self.train.steps_per_epoch)
        return min(steps, self.settings.max_steps or steps)

    def is_outside(self, evaluations: int) -> bool:
        """Whether its settings don't hold with so many evaluations behind it."""
        first, last = self.window
        return evaluations < first or (last is not None and evaluations >= last)

    def pauses(self, evaluations: int) -> bool:
        """Whether no step is to be taken with so many evaluations behind it."""
        return self.is_outside(evaluations) or (self.pause_after is not None and evaluations >= self.pause_after)


@dataclass
class Position:
    """Where a run stands: what a checkpoint holds beside weights and optimizer state."""

    step: int = 0
    best_step: int = 0
    best: float | None = None
    improvements: int = 0
    evaluations_without: int = 0
    first_losses: list[float] = field(default_factory=list)
    """Loss of each of the first steps: what two runs are compared by."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the entry before)."""
    evaluations: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)
    """(step, metrics on the valid split by name)."""
    measured: dict[str, Any] | None = None
    """What a `MeasuredTask` found before the first step."""
    shortened: list[float] = field(default_factory=lambda: [0, 0, 0])
    """Of the prompts stepped on, what `sellarec.training.stream.shortened` counts."""


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker. A mistake of the user's is told to the driver, not retried, nor is storage that failed
    for so long."""
    training: Training = config["training"]
    try:
        _train(training)
    except (UserError, FloatingPointError) as error:
        training.output.reach()  # what isn't found while storage is away is no mistake: workers are started again, and wait
        # All workers end here together, and it would be the same again: report it and end, instead of retrying.
        ray.get(training.board.put.remote({"error": str(error)}))
    except StageFailed as error:
        ray.get(training.board.put.remote({"failed": str(error)}))


def _train(training: Training) -> None:
    settings = training.settings
    group = ray.util.get_current_placement_group()
    if group is not None and ray.train.get_context().get_world_rank() == 0:
        training.board.put.remote({"group": group.id.hex()})  # first of all: who waits for it may lose this worker
    workers = Workers.join(training.timeout)
    seed_everything(training.seed, training.stage)
    tell = partial(note, training.board, training.stage)
    storage = Storage(workers, training.stage, training.storage_timeout, tell, training.output)
    storage.wait()
    task = together_of_first(training.build, workers)
    engine = together(
        partial(Engine, task, workers, training.seed, settings, training.storage, training.dtype), workers
    )
    position = Position()
    checkpoints = Checkpoints(training.output / CHECKPOINTS, storage)
    found = checkpoints.newest()
    if found is not None:
        checkpoints.load(engine, found["step"])
        position = Position(**found)
    selection = settings if isinstance(settings, Selection) else None
    if workers.rank == 0:
        training.board.put.remote({"stage": training.stage, "started": position.step, "steps": training.steps})
    valid = _Valid(training, task, workers) if selection else None
    validate_every = max(1, round(selection.validate_every * training.train.steps_per_epoch)) if selection else 0
    steps = training.steps
    reporter = _Reporter(training, engine, steps, position.step)
    profiler = _Profiler(training, workers, position.step)
    first, size = position.step, engine.micro_batch
    batches = split_slices(training.train, task, task.prepare, workers, first, steps, micro_batch=size)
    if isinstance(task, MeasuredTask) and position.step == 0:
        position.measured = engine.measure()
    saved, asked = time.monotonic(), _Asked(training.board)
    stopped, leave = selection is not None and position.evaluations_without >= selection.patience, 0.0
    paused = training.pauses(len(position.evaluations))
    while position.step < steps and not stopped and not paused:
        with reporter.waiting():
            rows = next(batches)
        seed_everything(training.seed, training.stage, position.step, workers.rank)
        try:
            loss = engine.step(rows, position.step, engine.rate(position.step, steps))
        except FloatingPointError as error:
            raise FloatingPointError(f"stage {training.stage}, step {position.step + 1} of {steps}: {error}") from error
        position.step += 1
        profiler.stepped(position.step)
        if len(position.first_losses) < FIRST_LOSSES:
            position.first_losses.append(loss)
        told = (0.0, 0.0)
        if workers.rank == 0:
            told = (asked.to_stop(), time.monotonic() - saved > settings.checkpoint_every)
        everyone = workers.tell(*told, *shortened(rows), *reporter.own(rows))
        leave, due = everyone[0, :2]
        position.shortened = (np.array(position.shortened) + everyone[:, 2:5].sum(0)).tolist()
        reporter.step(position, loss, training.train.batch_rows(position.step - 1), everyone[:, 5:])
        improved = False
        if selection and valid and (position.step % validate_every == 0 or position.step == steps):
            improved = valid.evaluate(engine, position)
            reporter.evaluated(position)
            stopped = position.evaluations_without >= selection.patience
            paused = training.pauses(len(position.evaluations))
        if improved or due or leave or paused:
            reporter.flush(position)
            checkpoints.save(engine, dataclasses.asdict(position))
            saved = time.monotonic()
        if leave:
            break
    batches.close()
    profiler.end()
    has_ended = stopped or position.step >= steps
    if leave or training.is_outside(len(position.evaluations)) or (paused and not has_ended):
        if workers.rank == 0:
            told_last = {"stopped": position.step} if leave else {"paused": position.evaluations}
            ray.get(training.board.put.remote(told_last))
        return
    reporter.flush(position)
    if valid and position.best_step != position.step:
        checkpoints.load(engine, position.best_step)
    engine.export(training.output, storage)
    measured = {}
    if isinstance(task, MeasuredTask):
        measured = {"measured": {"before": position.measured, "after": engine.measure()}}
    if isinstance(task, CheckedTask) and valid:
        together(partial(engine.check_export, valid.some(), training.output), workers)
    facts = _facts(training, engine, position) | measured
    if position.shortened[0]:
        facts["histories"] = {"train": named_counts(position.shortened)}
        if valid:
            facts["histories"]["valid"] = named_counts(valid.shortened)
    storage.first(
        f"writing {training.output}/training.json", partial(training.output.write_json, "training.json", facts)
    )


def _facts(training: Training, engine: Engine, position: Position) -> dict[str, Any]:
    optimizers = {
        name: ", ".join(str(value) if what == "optimizer" else f"{what} {value}" for what, value in found.items())
        for name, found in engine.optimizers.items()
    }
    if isinstance(training.settings, Dense):
        optimizers["schedule"] = _schedule(training.settings, training.steps)
    return {
        "steps": position.step,
        "kept_step": position.best_step if training.valid is not None else position.step,
        "first_losses": position.first_losses,
        "losses": position.losses,
        "evaluations": position.evaluations,
        "optimizers": optimizers,
        "sharding": engine.plan(),
        "workers": engine.workers.world_size,
        "device": str(engine.workers.device),
        **engine.task.facts(),
    }


def _schedule(settings: Dense, steps: int) -> str:
    """How the learning rates, which are those at their peak, go over the steps."""
    warmup = warmup_steps(settings, steps)
    rises = f", warm-up {warmup}" if warmup > 1 else ""  # the first step has the full rate without one
    falls = f", decay over the last {settings.decay:.0%}" if settings.schedule == "wsd" else ""
    return f"{settings.schedule} over {steps} steps{rises}{falls}"


class _Valid:
    """The valid split, read once and kept, by which a state is selected."""

    def __init__(self, training: Training, task: Task, workers: Workers) -> None:
        order = training.valid
        assert order is not None and isinstance(training.settings, Selection)
        self._stage, self._settings, self._workers = training.stage, training.settings, workers
        self._ranks = "@" in training.settings.select_on
        done = "users ranked" if self._ranks else "rows scored"
        self._report = partial(report_scored, workers, training.board, training.stage, "valid", done, order)
        steps = order.steps_per_epoch
        if self._ranks:
            columns = distinct([*task.columns, "user", "relevant", "excluded"])
            self._rows = list(whole_batches(order, columns, task.prepare_to_score, workers.rank, 0, steps))
            return
        self._rows = list(split_slices(order, task, task.prepare_to_score, workers, 0, steps, ("row", "user", "label")))
        self.shortened = workers.sum(*np.sum([shortened(part) for part in self._rows], axis=0).tolist())
        wanted = ("row", "user", "label", "weight")
        labels = [np.stack([part[c].to_numpy().astype(np.int64) for c in wanted]) for part in self._rows]
        gathered = workers.collect(np.concatenate(labels, axis=1))
        self._truth = None
        if gathered is not None:
            everything = np.concatenate(gathered, axis=1)
            everything = everything[:, everything[3] > 0]
            self._truth = everything[:, np.argsort(everything[0])]

    def some(self) -> pa.Table:
        """The first rows of this worker's."""
        return self._rows[0].slice(0, CHECKED_ROWS)

    def _score(self, engine: Engine) -> dict[str, float] | str:
        """The metrics, on worker 0; in words what is wrong with a score that isn't finite."""
        if self._ranks:
            cutoff = int(self._settings.select_on.partition("@")[2])
            ranked = rank_queries(engine, self._rows, (cutoff,), self._report)
            return {} if ranked is None else ranked.means()
        scored = engine.score(self._rows, self._report)
        if scored is None or self._truth is None:
            return {}
        bad = np.flatnonzero(~np.isfinite(scored["score"]))
        if len(bad):
            row, number = scored["row"][bad[0]], len(scored["score"])
            return f"{len(bad)} of {number} scores of the valid split are not finite, first that of row {row}"
        _, users, labels, _ = self._truth
        return {"auc": auc(labels, scored["score"]), "uauc": uauc(users, labels, scored["score"]).value}

    def evaluate(self, engine: Engine, position: Position) -> bool:
        """Score the split, note the metrics in `position`; True where they are the best so far."""
        metrics = [self._score(engine)]
        dist.broadcast_object_list(metrics, src=0, group=self._workers.control)
        (found,) = metrics
        if isinstance(found, str):
            raise FloatingPointError(f"stage {self._stage}, step {position.step}: {found}")
        name = self._settings.select_on
        value = found[name]
        if math.isnan(value):
            raise UserError(
                f"stage {self._stage} selects its state by {name} on the valid split, which has none: it takes "
                "users with rows of both labels (auc: rows of both labels); give a larger valid split, or another select_on"
            )
        position.evaluations.append(
            (position.step, {metric: None if math.isnan(value) else value for metric, value in found.items()})
        )
        if position.best is None or value > position.best:
            position.best, position.best_step = value, position.step
            position.improvements += 1
            position.evaluations_without = 0
            return True
        position.evaluations_without += 1
        return False


class _Asked:
    """Whether the driver asks for a stop, as far as the board has answered: no step waits for it."""

    def __init__(self, board: Any) -> None:
        self._board, self._answer = board, board.is_stopping.remote()

    def to_stop(self) -> bool:
        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        stop = ray.get(self._answer)
        self._answer = self._board.is_stopping.remote()
        return stop


class _Profiler:
    """Torch's profiler over the steps that are asked for, on each worker."""

    def __init__(self, training: Training, workers: Workers, start: int) -> None:
        self._training, self._workers = training, workers
        asked = training.profiled
        self._first = -1 if asked is None else start + asked.first
        self._last = -1 if asked is None else self._first + asked.steps
        self._profile: torch.profiler.profile | None = None

    def stepped(self, step: int) -> None:
        """After each step."""
        if step + 1 == self._first:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()
        if step + 1 == self._last:
            self.end()

    def end(self) -> None:
        """Write the trace, of fewer steps where the stage has ended."""
        if self._profile is not None and self._training.profiled is not None:
            self._profile.stop()
            with self._training.profiled.place.writing() as folder:
                name = f"{self._training.stage}-step-{self._first}-worker-{self._workers.rank}.json.gz"
                self._profile.export_chrome_trace(str(folder / name))
        self._profile = None


class _Reporter:
    """Rank 0's progress records, at a steady rate, of what all workers measure."""

    def __init__(self, training: Training, engine: Engine, steps: int, first_step: int) -> None:
        self._training, self._engine, self._steps = training, engine, steps
        self._clock = self._start = time.monotonic()
        self._first_step = first_step
        self._wait = 0.0
        self._clear()

    def _clear(self) -> None:
        self._losses: list[float] = []
        self._rows = 0.0
        self._spent = np.zeros((self._engine.workers.world_size, 4))
        self._memory = np.zeros(self._engine.workers.world_size)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._wait += time.monotonic() - start

    def own(self, rows: pa.Table) -> tuple[float, ...]:
        """Of this worker since the last call: seconds of waiting for data, seconds spent on tables and of these in exchanges,
        tokens of the step's prompts, and bytes of memory at the peak."""
        tokens = pc.sum(pc.list_value_length(rows["tokens"])).as_py() if "tokens" in rows.column_names else 0
        device = self._engine.workers.device
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        engine = self._engine
        own = self._wait, engine.table_seconds, engine.exchanges.seconds, float(tokens or 0), float(memory)
        self._wait = engine.table_seconds = engine.exchanges.seconds = 0.0
        return own

    def step(self, position: Position, loss: float, rows: int, everyone: np.ndarray) -> None:
        """A step was taken; `everyone` is `own` of each worker, [W, 5]."""
        if position.step == self._first_step + 1:
            # the first step starts things up, so the time left is told by those after it
            self._start = time.monotonic()
        self._losses.append(loss)
        self._rows += rows
        self._spent += everyone[:, :4]
        self._memory = everyone[:, 4]
        if time.monotonic() - self._clock > PROGRESS_SECONDS:
            self.flush(position)

    def flush(self, position: Position) -> None:
        """Note the mean loss since the last record, and send a record."""
        if not self._losses:
            return
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9)
        loss = sum(self._losses) / len(self._losses)
        position.losses.append((position.step, loss))
        done = position.step - self._first_step - 1
        settings, rate = self._training.settings, self._engine.rate(position.step - 1, self._steps)
        waited, tables, exchanges, tokens = self._spent.T
        record = {
            "step": position.step,
            "steps": self._steps,
            "loss": loss,
            "rows/s": self._rows / seconds,
            **_mean_and_most("data wait %", 100 * waited / seconds),
            **_mean_and_most("memory GiB", self._memory / 2**30),
            "seconds left": (now - self._start) / done * (self._steps - position.step) if done else None,
        }
        if tokens.any():
            record["tokens/s"] = tokens.sum() / seconds
        if self._engine.trains_tables and isinstance(settings, Sparse):
            record |= _mean_and_most("tables %", 100 * tables / seconds)
            record |= _mean_and_most("all-to-all %", 100 * exchanges / seconds)
            record["table learning rate"] = settings.table_learning_rate * rate
        if self._engine.optimizer is not None and isinstance(settings, Dense):
            record["learning rate"] = settings.learning_rate * rate
        self._send(record)
        self._clock = now
        self._clear()

    def evaluated(self, position: Position) -> None:
        step, metrics = position.evaluations[-1]
        record = {"step": step, "steps": self._steps, "valid": metrics, "best": position.best_step}
        self._send({**record, "evaluations": list(position.evaluations)})

    def _send(self, record: dict[str, Any]) -> None:
        if self._engine.workers.rank == 0:
            self._training.board.put.remote({"stage": self._training.stage, **record})


def _mean_and_most(name: str, of_workers: np.ndarray) -> dict[str, float]:
    return {name: float(of_workers.mean()), f"{name}, most": float(of_workers.max())}


def seed_everything(*parts: int | str) -> None:
    """Seed torch, numpy and random from several numbers or names."""
    seed = zlib.crc32(repr(parts).encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
