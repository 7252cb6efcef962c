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
from functools import partial, reduce
from pathlib import Path
from typing import Any, TypeVar

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
from sellarec.config import Dense, Language, Selection, Sparse, Steps, Tables
from sellarec.errors import UserError
from sellarec.evaluation.metrics import auc, uauc
from sellarec.evaluation.ranking import TopList, UserMetrics, merge, top_k, user_metrics
from sellarec.training import dense
from sellarec.training.graph import Kind, ShardedGraph
from sellarec.training.plan import place
from sellarec.training.progress import PROGRESS_SECONDS
from sellarec.training.stream import Order, Prepare, stream, whole_batches
from sellarec.training.table import Jagged, index
from sellarec.training.tables import ShardedTables
from sellarec.training.task import INITIAL, WHOLE, Batch, RankingTask, Task, Vectors

FIRST_LOSSES = 20

KINDS: tuple[Kind, ...] = ("user", "item")
"""Tables whose rows a graph smooths, in the order of its rows."""

Made = TypeVar("Made")

DENSE_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


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
        storage: how embedding tables are stored and sharded.
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
    storage: Tables = field(default_factory=Tables)

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
    evaluations: list[tuple[int, dict[str, float | None]]] = field(default_factory=list)
    """(step, metrics on the valid split by name)."""


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
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
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
        """[b, ...] of each worker -> [W b, ...]; the gradient of a row is summed over all that used it."""
        if self.world_size == 1:
            return rows
        from torch.distributed.nn.functional import all_gather

        return torch.cat(list(all_gather(rows.contiguous())))

    def own(self, rows: Tensor) -> Tensor:
        """[W b, ...] of all -> [b, ...], those of this worker."""
        share = len(rows) // self.world_size
        return rows[self.rank * share : (self.rank + 1) * share]

    def add(self, values: Tensor) -> Tensor:
        """The sum over workers; the gradient of a worker's summand is the sum of all workers' gradients."""
        if self.world_size == 1:
            return values
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(values.contiguous())

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over workers, element by element. Without a gradient."""
        found = values.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found


def _refuse(message: str | None) -> None:
    if message is not None:
        raise UserError(f"{message}: the prepared log is damaged, prepare the data again")


def _part(found: dict[str, Any], rows: slice, parts: Sequence[slice]) -> dict[str, Any]:
    """Some rows of a batch or of its vectors; where there is but one part, all that it has."""
    return found if len(parts) == 1 else {name: value[rows] for name, value in found.items()}


class Engine:
    """A task's model and tables on all workers, with their optimizers."""

    def __init__(self, task: Task, workers: Workers, seed: int, settings: Any, storage: Tables, dtype: str) -> None:
        self.task, self.workers = task, workers
        self.settings = settings
        self.micro_batch = settings.micro_batch if isinstance(settings, Language) else None
        self.tables = None
        if task.tables:
            optimizer = settings if isinstance(settings, Sparse) else None
            placements = place(task.tables, storage, optimizer, workers.world_size, workers.device.type)
            make = partial(ShardedTables, placements, storage, optimizer, workers.tables, workers.device, seed)
            self.tables = _together(make, workers)  # rows that are read may be refused on one worker alone
        self._graph = None
        if task.graph is not None:
            paths, sizes = task.graph.paths, (task.graph.users, task.graph.items)
            self._graph = ShardedGraph.read(
                paths, *sizes, workers.tables if workers.world_size > 1 else None, workers.device
            )
        self._smoothed: Tensor | None = None
        self.optimizer = None
        if task.model is not None:
            task.model.to(workers.device)
            dense.shard(task.model, task.blocks, workers.device, getattr(torch, dtype))
            task.model.train(isinstance(settings, Dense))
            if isinstance(settings, Dense):
                self.optimizer = DENSE_OPTIMIZERS[settings.optimizer](
                    dense.trainable(task.model),
                    lr=settings.learning_rate,
                    weight_decay=settings.weight_decay,
                    fused=True,  # one kernel for all parameters: a fifth of a small model's step otherwise
                )

    def rate(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at a step."""
        return learning_rate_factor(self.settings, step, steps) if isinstance(self.settings, Dense) else 1.0

    def _look_up(self, batch: Batch) -> Vectors:
        """The vectors of a batch's ids; of `whole` features the worker's share too, whose ids are added to the batch."""
        task, tables = self.task, self.tables
        if tables is None:
            return {}
        ids = task.lookups(batch)
        whole = task.whole if torch.is_grad_enabled() else ()
        shares = {WHOLE + name: Jagged.one(tables.share(name), len(batch["weight"])) for name in whole}
        batch |= {name: share.values for name, share in shares.items()}
        if self._graph is None:
            found = tables.look_up({**ids, **shares})
            return found | {name: found[name].values for name in shares}
        vectors: Vectors = {}
        rows = self._smoothed if self._smoothed is not None else self._smooth()
        columns = rows.shape[1] // 2
        for kind in KINDS:
            (table,) = (table for table in task.tables if table.name == kind)
            for feature in table.features:
                if feature in shares:
                    start = 0 if kind == "user" else self._graph.rows - len(batch[feature])
                    vectors[feature] = rows[start : start + len(batch[feature]), :columns]
                elif feature in ids:
                    asked = ids.pop(feature)
                    found = self._graph.fetch(rows, kind, asked.values if isinstance(asked, Jagged) else asked)
                    for name, part in ((feature, found[..., :columns]), (INITIAL + feature, found[..., columns:])):
                        vectors[name] = Jagged(part, asked.lengths) if isinstance(asked, Jagged) else part
        return vectors | (tables.look_up(ids) if ids else {})

    def _agree(self, batch: Batch, count: float = 0.0) -> float:
        """The sum of all workers' counts. On all workers a UserError where one has an id that its table doesn't have."""
        wrong = self.tables.out_of_range(self.task.lookups(batch)) if self.tables is not None else None
        total, refused = self.workers.sum(count, float(wrong is not None))
        if refused:
            _together(partial(_refuse, wrong), self.workers)
        return total

    def _smooth(self) -> Tensor:
        """The worker's share of users and items, smoothed over the graph, and beside that as they lie in the tables."""
        assert self.tables is not None and self._graph is not None
        shares: dict[str, Jagged] = {kind: Jagged.one(self.tables.share(kind), 1) for kind in KINDS}
        found = self.tables.look_up(shares)
        rows = torch.cat([found[name].values for name in shares])
        return torch.cat([self.task.propagate(rows, self._graph.multiply), rows], dim=1)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Without dropout; rows that a graph smooths are smoothed once for all slices."""
        model = self.task.model
        training = model is not None and model.training
        if model is not None:
            model.eval()
        if self._graph is not None:
            self._smoothed = self._smooth()
        yield
        self._smoothed = None
        if model is not None:
            model.train(training)

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
        count = self._agree(batch, task.targets(batch).item())
        if self.tables is not None:
            self.tables.set_learning_rate(self.settings.table_learning_rate * rate)
        vectors = self._look_up(batch)
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
            loss = task.loss(task.model, _part(batch, part, parts), _part(given, part, parts), workers)
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
        if self.tables is not None:
            torch.autograd.backward(list(found.values()), list(gradients.values()))
            self.tables.step()
        return mean

    @torch.no_grad()
    def score(self, slices: Iterable[pa.Table], report: Callable[[int], None]) -> dict[str, np.ndarray] | None:
        """Scores of all workers' rows: `row` int64 and `score` float32, padding left out, sorted by row.

        All workers call it with equally many slices; worker 0 gets the whole, the others None.

        Args:
            report: is told every PROGRESS_SECONDS how many slices are done.
        """
        task = self.task
        found = []
        told = time.monotonic()
        with self._scoring():
            for number, rows in enumerate(slices):
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    report(number)
                rows = self._by_length(rows)
                batch = self._to_device(task.collate(rows, None))
                self._agree(batch)
                vectors = self._look_up(batch)
                parts = self._parts(len(batch["weight"]))
                scores = [
                    task.score(task.model, _part(batch, part, parts), _part(vectors, part, parts)) for part in parts
                ]
                valid = rows["weight"].to_numpy() > 0
                found.append((rows["row"].to_numpy()[valid], torch.cat(scores).float().cpu().numpy()[valid]))
        gathered = self.workers.collect(found)
        if gathered is None:
            return None
        row = np.concatenate([row for part in gathered for row, _ in part])
        score = np.concatenate([score for part in gathered for _, score in part])
        order = np.argsort(row)
        return {"row": row[order], "score": score[order]}

    @torch.no_grad()
    def rank(self, batches: Iterable[pa.Table], k: int, report: Callable[[int], None]) -> np.ndarray | None:
        """Each query's k best items of the whole catalog but for its `excluded` ones; int64 [queries, k] on worker 0, elsewhere
        None.

        The workers share out a batch's queries to make the users' vectors, gather those, and rank each its share of the
        catalog for all of them; the lists are merged. So no worker holds more of the catalog than its share.

        Args:
            batches: whole global batches of `sellarec.evaluation.queries`, the same on all workers.
        """
        task, workers, tables = self.task, self.workers, self.tables
        assert isinstance(task, RankingTask) and tables is not None
        found = []
        told = time.monotonic()
        with self._scoring():
            ids = tables.share("item")
            if self._smoothed is not None:
                rows = self._smoothed[len(self._smoothed) - len(ids) :, : self._smoothed.shape[1] // 2]
            else:
                rows = tables.look_up({"item": Jagged.one(ids, 1)})["item"].values
            rows = task.catalog(ids, rows)
            first = int(ids[0]) if len(ids) else 0
            for number, batch_rows in enumerate(batches):
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    report(number)
                valid = int((batch_rows["weight"].to_numpy() > 0).sum())
                share = -(-len(batch_rows) // workers.world_size)
                places = np.arange(workers.rank * share, (workers.rank + 1) * share) % len(batch_rows)
                batch = self._to_device(task.collate(batch_rows.take(places), None))
                self._agree(batch)
                users = workers.gather(task.users(task.model, batch, self._look_up(batch)))[:valid]
                excluded = Jagged.of(batch_rows["excluded"].slice(0, valid)).to(workers.device)
                best = top_k(users, rows, first, k, (excluded.values, excluded.lengths), scores_of=task.products)
                parts = zip(
                    *(workers.gather(part.to(users.device)).chunk(workers.world_size) for part in best), strict=True
                )
                best = reduce(partial(merge, k=k), (TopList(*part) for part in parts))
                found.append(best.items.cpu().numpy())
        return np.concatenate(found) if workers.rank == 0 else None

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
    """What the learning rates are multiplied by at a step: a linear warm-up, then constant, or a cosine to 0."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
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


def _together(make: Callable[[], Made], workers: Workers) -> Made:
    """What `make` gives; where any worker is refused, all end, instead of waiting for that one in a collective."""
    refusal: UserError | None = None
    try:
        made = make()
    except UserError as error:
        refusal = error
    messages: list[Any] = [None] * workers.world_size
    dist.all_gather_object(messages, str(refusal) if refusal else None, group=workers.control)
    found = [message for message in messages if message is not None]
    if found:
        raise UserError(found[0]) from refusal
    return made


def _train(training: Training) -> None:
    settings = training.settings
    workers = Workers.join()
    seed_everything(training.seed, training.stage)
    task = _together(training.build, workers)
    engine = _together(
        partial(Engine, task, workers, training.seed, settings, training.storage, training.dtype), workers
    )
    position = Position()
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder)
            position = Position(**json.loads((Path(folder) / "position.json").read_text()))
    selection = settings if isinstance(settings, Selection) else None
    if workers.rank == 0:
        training.board.put.remote({"stage": training.stage, "started": position.step, "steps": training.steps})
    valid = _Valid(training, task, workers) if selection else None
    validate_every = max(1, round(selection.validate_every * training.train.steps_per_epoch)) if selection else 0
    steps = training.steps
    reporter = _Reporter(training, workers, steps, position.step)
    batches = _slices(training.train, task, task.prepare, workers, position.step, steps)
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
            improved = valid.evaluate(engine, position)
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
    order: Order, task: Task, how: Prepare | None, workers: Workers, first: int, last: int, more: Sequence[str] = ()
) -> Generator[pa.Table]:
    """This worker's slices of steps [first, last), prepared `how`, with the columns that a task reads and `more`."""
    return stream(order, _once([*task.columns, *more]), how, workers.rank, workers.world_size, first, last)


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
        optimizers["tables"] = engine.tables.optimizer
    if isinstance(training.settings, Dense) and engine.optimizer is not None:
        name = type(engine.optimizer).__name__
        optimizers["dense"] = f"{name}, peak learning rate {training.settings.learning_rate}"
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
    """The valid split, read once and kept, by which a state is selected."""

    def __init__(self, training: Training, task: Task, workers: Workers) -> None:
        order = training.valid
        assert order is not None and isinstance(training.settings, Selection)
        self._stage, self._settings, self._workers = training.stage, training.settings, workers
        self._ranks = "@" in training.settings.select_on
        self._report = partial(_scored, workers, training.board, training.stage, "valid", order)
        steps = order.steps_per_epoch
        if self._ranks:
            columns = _once([*task.columns, "user", "relevant", "excluded"])
            self._rows = list(whole_batches(order, columns, task.prepare_to_score, workers.rank, 0, steps))
            return
        self._rows = list(_slices(order, task, task.prepare_to_score, workers, 0, steps, ("row", "user", "label")))
        wanted = ("row", "user", "label", "weight")
        labels = [np.stack([part[c].to_numpy().astype(np.int64) for c in wanted]) for part in self._rows]
        gathered = workers.collect(np.concatenate(labels, axis=1))
        self._truth = None
        if gathered is not None:
            everything = np.concatenate(gathered, axis=1)
            everything = everything[:, everything[3] > 0]
            self._truth = everything[:, np.argsort(everything[0])]

    def _score(self, engine: Engine) -> dict[str, float]:
        """The metrics, on worker 0."""
        if self._ranks:
            cutoff = int(self._settings.select_on.partition("@")[2])
            ranked = rank_queries(engine, self._rows, (cutoff,), self._report)
            return {} if ranked is None else ranked.means()
        scored = engine.score(self._rows, self._report)
        if scored is None or self._truth is None:
            return {}
        _, users, labels, _ = self._truth
        return {"auc": auc(labels, scored["score"]), "uauc": uauc(users, labels, scored["score"]).value}

    def evaluate(self, engine: Engine, position: Position) -> bool:
        """Score the split, note the metrics in `position`; True where they are the best so far."""
        metrics = [self._score(engine)]
        dist.broadcast_object_list(metrics, src=0, group=self._workers.control)
        (found,) = metrics
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
        if value > position.best:
            position.best, position.best_step = value, position.step
            position.improvements += 1
            position.evaluations_without = 0
            return True
        position.evaluations_without += 1
        return False


def rank_queries(
    engine: Engine, batches: Sequence[pa.Table], cutoffs: Sequence[int], report: Callable[[int], None]
) -> UserMetrics | None:
    """Metrics of ranking the whole catalog for queries, on worker 0; elsewhere None. All workers call it."""
    best = engine.rank(batches, max(cutoffs), report)
    if best is None:
        return None
    rows = pa.concat_tables(batch.select(["user", "relevant", "weight"]) for batch in batches)
    rows = rows.filter(pc.greater(rows["weight"], 0))
    relevant = Jagged.of(rows["relevant"])
    return user_metrics(rows["user"].to_numpy(), best, (relevant.values.numpy(), relevant.lengths.numpy()), cutoffs)


def _once(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


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
        step, metrics = position.evaluations[-1]
        self._send({"step": step, "steps": self._steps, "valid": metrics, "best": position.best_step})

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
        queries: order of the queries for which each model ranks the catalog too; None ranks nothing.
        cutoffs: at which the rankings are measured; `MODEL.parquet` in the output has a row a user, a column a metric.
    """

    stage: str
    build: dict[str, Callable[[], Task]]
    settings: Any
    order: Order
    output: Place
    board: Any = None
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
        ray.get(scoring.board.put.remote({"error": str(error)}))


def _score(scoring: Scoring) -> None:
    workers = Workers.join()
    order = scoring.order
    columns: dict[str, np.ndarray] = {}
    for name, build in scoring.build.items():
        start = time.monotonic()
        task = _together(build, workers)
        engine = _together(partial(Engine, task, workers, 0, scoring.settings, scoring.storage, scoring.dtype), workers)
        slices = _slices(order, task, task.prepare_to_score, workers, 0, order.steps_per_epoch)
        found = engine.score(slices, partial(_scored, workers, scoring.board, scoring.stage, name, order))
        if found is not None:
            columns["row"], columns[name] = found["row"], found["score"]
            seconds = time.monotonic() - start
            record = {"stage": scoring.stage, "model": name, "rows": len(found["row"]), "seconds": seconds}
            scoring.board.put.remote(record)
        if scoring.queries is not None:
            ranked = _rank(scoring, scoring.queries, name, engine)
            if ranked is not None:
                with scoring.output.writing() as folder:
                    pq.write_table(pa.table({"user": ranked.users, **ranked.values}), folder / f"{name}.parquet")
    if workers.rank == 0:
        with scoring.output.writing() as folder:
            pq.write_table(pa.table(columns), folder / "scores.parquet")


def _rank(scoring: Scoring, queries: Order, name: str, engine: Engine) -> UserMetrics | None:
    task, workers, steps = engine.task, engine.workers, queries.steps_per_epoch
    columns = _once([*task.columns, "user", "relevant", "excluded"])
    batches = list(whole_batches(queries, columns, task.prepare_to_score, workers.rank, 0, steps))
    report = partial(_scored, workers, scoring.board, scoring.stage, f"{name}, users ranked for", queries)
    return rank_queries(engine, batches, scoring.cutoffs, report)
