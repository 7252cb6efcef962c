"""The training loop that every stage with gradients runs, on each worker, under Ray Train.

One rule for gradients: the loss is a sum over valid targets divided by their global count, and every engine sums over
workers. The global batch is fixed and workers slice it, so any number of workers takes the same step. Rows of tables are
looked up once per step; micro-batches collect gradients in that lookup's output, and one backward takes them into the
tables, after all was found to be finite.
"""

import contextlib
import json
import math
import os
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from sellarec.artifacts import Place
from sellarec.config import Dense, Language, Selection, Sparse, Steps
from sellarec.errors import UserError
from sellarec.evaluation.metrics import auc, uauc
from sellarec.training import dense
from sellarec.training.progress import PROGRESS_SECONDS
from sellarec.training.stream import Order, stream
from sellarec.training.tables import Jagged, ShardedTables, index
from sellarec.training.task import Batch, Task, Vectors

FIRST_LOSSES = 20


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
        board: actor that takes progress records.
        dtype: compute type of the dense part.
    """

    stage: str
    build: Callable[[], Task]
    settings: Steps
    seed: int
    train: Order
    valid: Order | None
    output: Place
    board: Any = None
    dtype: str = "float32"

    @property
    def steps(self) -> int:
        steps = math.ceil(self.settings.epochs * self.train.steps_per_epoch)
        return min(steps, self.settings.max_steps or steps)


@dataclass
class Position:
    """Where a run stands: what a checkpoint holds beside weights and optimizer state."""

    step: int = 0
    best_step: int = 0
    best: float = -math.inf
    improvements: int = 0
    evaluations_without: int = 0
    first_losses: list[float] = field(default_factory=list)
    """Loss of each of the first steps: what two runs are compared by."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean loss since the entry before)."""
    evaluations: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    """(step, AUC, UAUC) on the valid split."""


@dataclass
class Workers:
    """This worker's place among all, and the groups it talks over."""

    rank: int
    world_size: int
    device: torch.device
    tables: dist.ProcessGroup
    control: dist.ProcessGroup

    @classmethod
    def join(cls) -> "Workers":
        """Make the process groups: tables, FSDP (its mesh makes its own) and control messages don't share one."""
        import ray.train.torch

        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
        return cls(
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            device=device,
            tables=dist.new_group(),
            control=dist.new_group(backend="gloo"),
        )

    def sum(self, *values: float) -> list[float]:
        """Sums over all workers, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def collect(self, value: Any) -> list[Any] | None:
        """Each worker's value, by rank, on worker 0; None on the others."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self.control)
        return gathered

    def gather(self, rows: Tensor) -> Tensor:
        """[b, ...] of each worker -> [W * b, ...]; the gradient of a row is summed over all that used it."""
        if self.world_size == 1:
            return rows
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(rows.contiguous())))


class Engine:
    """A task's model and tables on all workers, with their optimizers."""

    def __init__(self, task: Task, workers: Workers, seed: int, settings: Any, dtype: str) -> None:
        self.task, self.workers = task, workers
        self.settings = settings
        self.micro_batch = settings.micro_batch if isinstance(settings, Language) else None
        self.tables = None
        if task.tables:
            rate = settings.table_learning_rate if isinstance(settings, Sparse) else 0.0
            self.tables = ShardedTables(task.tables, rate, workers.tables, workers.device, seed)
        self.optimizer = None
        if task.model is not None:
            task.model.to(workers.device)
            dense.shard(task.model, task.blocks, workers.device, getattr(torch, dtype))
            task.model.train(isinstance(settings, Dense))
            if isinstance(settings, Dense):
                self.optimizer = torch.optim.AdamW(
                    dense.trainable(task.model),
                    lr=settings.learning_rate,
                    weight_decay=settings.weight_decay,
                    fused=True,  # one kernel for all parameters: a fifth of a small model's step otherwise
                )

    def rate(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at a step; 1 for tables alone."""
        return 1.0 if self.optimizer is None else learning_rate_factor(self.settings, step, steps)

    def _to_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.workers.device, non_blocking=True) for name, value in batch.items()}

    def _parts(self, rows: int) -> list[slice]:
        size = self.micro_batch or rows
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def _by_length(self, rows: pa.Table) -> pa.Table:
        """Prompts by their length, so that those of a micro-batch are alike long and little is padded."""
        if self.micro_batch is None or "tokens" not in rows.column_names:
            return rows
        return rows.take(np.argsort(pc.list_value_length(rows["tokens"]).to_numpy(), kind="stable"))

    def step(self, rows: pa.Table, step: int, rate: float) -> float:
        """One optimizer step on this worker's slice; `rate` multiplies the learning rates.

        Returns:
            The global mean loss.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; no weight has been changed. On all workers alike.
        """
        task, workers = self.task, self.workers
        batch = self._to_device(task.collate(self._by_length(rows), step))
        (count,) = workers.sum(task.targets(batch).item())
        vectors: Vectors = {}
        if self.tables is not None:
            self.tables.set_learning_rate(self.settings.table_learning_rate * rate)
            vectors = self.tables.look_up(task.lookups(batch))
        found = {name: value.values if isinstance(value, Jagged) else value for name, value in vectors.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in found.items()}
        given = {
            name: Jagged(leaves[name], value.lengths) if isinstance(value, Jagged) else leaves[name]
            for name, value in vectors.items()
        }
        parts = self._parts(len(batch["weight"]))
        total = 0.0
        for number, part in enumerate(parts):
            if task.model is not None:
                task.model.set_requires_gradient_sync(number == len(parts) - 1)
            loss = task.loss(
                task.model,
                {name: value[part] for name, value in batch.items()},
                {name: value[part] for name, value in given.items()},
                workers.gather,
            )
            loss = loss / max(count, 1.0)
            loss.backward()
            total += loss.item()
        gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
        if self.optimizer is not None:
            norm = torch.nn.utils.clip_grad_norm_(dense.trainable(task.model), self.settings.clip)
            finite = finite and bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        mean, bad = workers.sum(total, 0.0 if finite else 1.0)
        if bad or not math.isfinite(mean):
            what = "loss" if not math.isfinite(mean) else "gradient"
            raise FloatingPointError(f"the {what} is not finite (mean loss {mean})")
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if vectors:
            torch.autograd.backward(list(found.values()), list(gradients.values()))
        return mean

    @torch.no_grad()
    def score(self, slices: Iterable[pa.Table], report: Callable[[int], None]) -> dict[str, np.ndarray] | None:
        """Scores of all workers' rows: `row` int64 and `score` float32, padding left out, sorted by row.

        All workers call it with equally many slices; worker 0 gets the whole, the others None.

        Args:
            report: is told every PROGRESS_SECONDS how many slices are done.
        """
        task = self.task
        training = task.model is not None and task.model.training
        if task.model is not None:
            task.model.eval()
        found = []
        told = time.monotonic()
        for number, rows in enumerate(slices):
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                report(number)
            rows = self._by_length(rows)
            batch = self._to_device(task.collate(rows, None))
            vectors = self.tables.look_up(task.lookups(batch)) if self.tables is not None else {}
            scores = []
            for part in self._parts(len(batch["weight"])):
                scores.append(
                    task.score(
                        task.model,
                        {name: value[part] for name, value in batch.items()},
                        {name: value[part] for name, value in vectors.items()},
                    )
                )
            valid = rows["weight"].to_numpy() > 0
            found.append((rows["row"].to_numpy()[valid], torch.cat(scores).float().cpu().numpy()[valid]))
        if task.model is not None:
            task.model.train(training)
        gathered = self.workers.collect(found)
        if gathered is None:
            return None
        row = np.concatenate([row for part in gathered for row, _ in part])
        score = np.concatenate([score for part in gathered for _, score in part])
        order = np.argsort(row)
        return {"row": row[order], "score": score[order]}

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.tables is not None:
            state["tables"] = self.tables.state()
        if self.optimizer is not None:
            model, optimizer = get_state_dict(
                self.task.model, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
            )
            state |= {"model": model, "optimizer": optimizer}
        return state

    def save_checkpoint(self, folder: str) -> None:
        dcp.save(self._state(), checkpoint_id=folder, process_group=self.workers.control)

    def load_checkpoint(self, folder: str) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder, process_group=self.workers.control)
        if self.tables is not None:
            self.tables.load_state(state["tables"])
        if self.optimizer is not None:
            set_state_dict(
                self.task.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(ignore_frozen_params=True, strict=False),
            )

    def export(self, output: Place) -> None:
        """Write the trained state in open formats: sharded safetensors for tables, what the task says for the rest."""
        weights = dense.trained_weights(self.task.model) if self.optimizer is not None else {}
        control, rank = self.workers.control, self.workers.rank
        if rank == 0:
            output.delete("tables")
        dist.barrier(group=control)
        written: list[dict[str, Any]] = []
        if self.tables is not None:
            with (output / "tables").writing() as folder:
                written = self.tables.save(folder)
        if rank == 0 and self.optimizer is not None:
            with output.writing() as folder:
                self.task.save(folder, weights)
        gathered: list[Any] = [None] * self.workers.world_size
        dist.all_gather_object(gathered, written, group=control)
        if rank == 0:
            for table in self.task.tables:
                parts = [part for of_worker in gathered for part in of_worker]
                (output / "tables").write_json(f"{table.name}.json", index(table, parts))


def learning_rate_factor(settings: Dense, step: int, steps: int) -> float:
    """What the learning rates are multiplied by at a step: linear warm-up, then a cosine to 0."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def seed_everything(*parts: int | str) -> None:
    """Seed torch, numpy and random from several numbers or names."""
    seed = zlib.crc32(repr(parts).encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker. A mistake of the user's is told to the driver, not retried."""
    training: Training = config["training"]
    try:
        _train(training)
    except (UserError, FloatingPointError) as error:
        # All workers end here together, and it would be the same again: report it and end, instead of retrying.
        ray.get(training.board.put.remote({"error": str(error)}))


def _build(build: Callable[[], Task], workers: Workers) -> Task:
    """The task; where any worker can't build its own, all end, instead of waiting for that one in a collective."""
    refusal: UserError | None = None
    try:
        task = build()
    except UserError as error:
        refusal = error
    messages: list[Any] = [None] * workers.world_size
    dist.all_gather_object(messages, str(refusal) if refusal else None, group=workers.control)
    found = [message for message in messages if message is not None]
    if found:
        raise UserError(found[0]) from refusal
    return task


def _train(training: Training) -> None:
    settings = training.settings
    workers = Workers.join()
    seed_everything(training.seed, training.stage)
    task = _build(training.build, workers)
    engine = Engine(task, workers, training.seed, settings, training.dtype)
    position = Position()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder)
            position = Position(**json.loads((Path(folder) / "position.json").read_text()))
    selection = settings if isinstance(settings, Selection) else None
    if workers.rank == 0:
        training.board.put.remote({"stage": training.stage, "started": position.step, "steps": training.steps})
    valid = _Valid(training.stage, training.valid, task, workers, training.board) if selection else None
    validate_every = max(1, round(selection.validate_every * training.train.steps_per_epoch)) if selection else 0
    steps = training.steps
    reporter = _Reporter(training, workers, steps, position.step)
    batches = _slices(training.train, task, workers, position.step, steps)
    saved = time.monotonic()
    stopped = selection is not None and position.evaluations_without >= selection.patience
    while position.step < steps and not stopped:
        with reporter.waiting():
            rows = next(batches)
        seed_everything(training.seed, training.stage, position.step, workers.rank)
        try:
            loss = engine.step(rows, position.step, engine.rate(position.step, steps))
        except FloatingPointError as error:
            raise FloatingPointError(f"stage {training.stage}, step {position.step + 1} of {steps}: {error}") from error
        position.step += 1
        if len(position.first_losses) < FIRST_LOSSES:
            position.first_losses.append(loss)
        reporter.step(position, loss, training.train.batch_rows(position.step - 1))
        improved = False
        if selection and valid and (position.step % validate_every == 0 or position.step == steps):
            improved = valid.evaluate(engine, position, selection)
            reporter.evaluated(position)
            stopped = position.evaluations_without >= selection.patience
        (due,) = workers.sum(time.monotonic() - saved > settings.checkpoint_every if workers.rank == 0 else 0.0)
        if improved or due:
            reporter.flush(position)
            _report_checkpoint(engine, position, improved)
            saved = time.monotonic()
    batches.close()
    reporter.flush(position)
    if valid and position.best_step != position.step:
        best = next(
            kept.checkpoint
            for kept in ray.train.get_all_reported_checkpoints()
            if kept.metrics["step"] == position.best_step
        )
        with best.as_directory() as folder:
            engine.load_checkpoint(folder)
    engine.export(training.output)
    if workers.rank == 0:
        training.output.write_json("training.json", _facts(training, engine, position))


def _slices(
    order: Order, task: Task, workers: Workers, first: int, last: int, more: Sequence[str] = ()
) -> Generator[pa.Table]:
    """This worker's slices of steps [first, last), prepared for a task, with the columns that it reads and `more`."""
    columns = list(dict.fromkeys([*task.columns, *more]))
    return stream(order, columns, task.prepare, workers.rank, workers.world_size, first, last)


def _report_checkpoint(engine: Engine, position: Position, improved: bool) -> None:
    """Save a checkpoint from all workers. `rank_of_best` makes Ray Train keep the best one beside the newest."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder)
        if engine.workers.rank == 0:
            (Path(folder) / "position.json").write_text(json.dumps(vars(position)))
        ray.train.report(
            {"step": position.step, "rank_of_best": position.improvements if improved else -1},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{position.step:09d}",
        )


def _facts(training: Training, engine: Engine, position: Position) -> dict[str, Any]:
    optimizers = {}
    if engine.tables is not None and isinstance(training.settings, Sparse):
        optimizers["tables"] = f"row-wise Adagrad (fused), learning rate {training.settings.table_learning_rate}"
    if isinstance(training.settings, Dense) and engine.optimizer is not None:
        optimizers["dense"] = f"AdamW, peak learning rate {training.settings.learning_rate}"
    return {
        "steps": position.step,
        "kept_step": position.best_step if training.valid is not None else position.step,
        "first_losses": position.first_losses,
        "losses": position.losses,
        "evaluations": position.evaluations,
        "optimizers": optimizers,
        "sharding": engine.tables.plan() if engine.tables is not None else [],
        "workers": engine.workers.world_size,
        "device": str(engine.workers.device),
        **engine.task.facts(),
    }


class _Valid:
    """The valid split, read once: each worker keeps its slices."""

    def __init__(self, stage: str, order: Order | None, task: Task, workers: Workers, board: Any) -> None:
        self._stage = stage
        assert order is not None
        self._report = partial(_scored, workers, board, stage, "valid", order)
        self._slices = list(_slices(order, task, workers, 0, order.steps_per_epoch, ("row", "user", "label")))
        wanted = ("row", "user", "label", "weight")
        labels = [np.stack([part[c].to_numpy().astype(np.int64) for c in wanted]) for part in self._slices]
        gathered = workers.collect(np.concatenate(labels, axis=1))
        self._workers = workers
        self._truth = None
        if gathered is not None:
            everything = np.concatenate(gathered, axis=1)
            everything = everything[:, everything[3] > 0]
            self._truth = everything[:, np.argsort(everything[0])]

    def evaluate(self, engine: Engine, position: Position, settings: Selection) -> bool:
        """Score the split, note the metrics in `position`; True where they are the best so far."""
        scored = engine.score(self._slices, self._report)
        metrics: list[dict[str, float]] = [{}]
        if scored is not None and self._truth is not None:
            _, users, labels, _ = self._truth
            scores = scored["score"]
            metrics = [{"auc": auc(labels, scores), "uauc": uauc(users, labels, scores).value}]
        dist.broadcast_object_list(metrics, src=0, group=self._workers.control)
        (found,) = metrics
        if math.isnan(found[settings.select_on]):
            raise UserError(
                f"stage {self._stage} selects its state by {settings.select_on} on the valid split, which has none: it takes "
                "users with rows of both labels; give a larger valid split, or select_on auc"
            )
        shown = {name: None if math.isnan(value) else value for name, value in found.items()}
        position.evaluations.append((position.step, shown["auc"], shown["uauc"]))
        if found[settings.select_on] > position.best:
            position.best, position.best_step = found[settings.select_on], position.step
            position.improvements += 1
            position.evaluations_without = 0
            return True
        position.evaluations_without += 1
        return False


class _Reporter:
    """Rank 0's progress records, at a steady rate."""

    def __init__(self, training: Training, workers: Workers, steps: int, first_step: int) -> None:
        self._training, self._rank, self._steps = training, workers.rank, steps
        self._rows = 0.0
        self._clock = self._start = time.monotonic()
        self._first_step = first_step
        self._wait = 0.0
        self._losses: list[float] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._wait += time.monotonic() - start

    def step(self, position: Position, loss: float, rows: int) -> None:
        if position.step == self._first_step + 1:
            # the first step starts things up, so the time left is told by those after it
            self._start = time.monotonic()
        self._losses.append(loss)
        self._rows += rows
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
        self._send(
            {
                "step": position.step,
                "steps": self._steps,
                "loss": loss,
                "rows/s": self._rows / seconds,
                "data wait %": 100 * self._wait / seconds,
                "seconds left": (now - self._start) / done * (self._steps - position.step) if done else None,
            }
        )
        self._clock, self._wait, self._rows, self._losses = now, 0.0, 0.0, []

    def evaluated(self, position: Position) -> None:
        step, auc_, uauc_ = position.evaluations[-1]
        self._send(
            {"step": step, "steps": self._steps, "valid AUC": auc_, "valid UAUC": uauc_, "best": position.best_step}
        )

    def _send(self, record: dict[str, Any]) -> None:
        if self._rank == 0:
            self._training.board.put.remote({"stage": self._training.stage, **record})


def _scored(workers: Workers, board: Any, stage: str, what: str, order: Order, steps: int) -> None:
    """Send how much of a split is scored."""
    if workers.rank == 0:
        scored = min(steps * order.batch, order.rows)
        board.put.remote({"stage": stage, "what": what, "scored": scored, "rows": order.rows})


@dataclass(frozen=True)
class Scoring:
    """All that a worker needs to score one split with several tasks.

    Attributes:
        build: by model name, what makes the task with its trained weights; called on each worker.
        order: order of the rows.
        output: the place that `scores.parquet` is written to: column `row`, and one float32 column a model.
    """

    stage: str
    build: dict[str, Callable[[], Task]]
    settings: Any
    order: Order
    output: Place
    board: Any = None
    dtype: str = "float32"


def score_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker of the stage evaluate."""
    scoring: Scoring = config["scoring"]
    try:
        _score(scoring)
    except UserError as error:
        ray.get(scoring.board.put.remote({"error": str(error)}))


def _score(scoring: Scoring) -> None:
    workers = Workers.join()
    order = scoring.order
    columns: dict[str, np.ndarray] = {}
    for name, build in scoring.build.items():
        start = time.monotonic()
        task = _build(build, workers)
        engine = Engine(task, workers, 0, scoring.settings, scoring.dtype)
        slices = _slices(order, task, workers, 0, order.steps_per_epoch)
        found = engine.score(slices, partial(_scored, workers, scoring.board, scoring.stage, name, order))
        if found is not None:
            columns["row"], columns[name] = found["row"], found["score"]
            seconds = time.monotonic() - start
            record = {"stage": scoring.stage, "model": name, "rows": len(found["row"]), "seconds": seconds}
            scoring.board.put.remote(record)
    if workers.rank == 0:
        with scoring.output.writing() as folder:
            pq.write_table(pa.table(columns), folder / "scores.parquet")
